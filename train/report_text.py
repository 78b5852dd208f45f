"""The report card as Markdown: from the numbers of `report.json` and the samples, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

STAGE_TITLES = {"base": "BASE", "sft": "SFT", "rl": "RL"}

Card = dict[str, Any]


def markdown(card: Card, samples: dict[str, str]) -> str:
    """The whole card; `samples` holds the text of each stage's `samples.md`, empty where there is none."""
    sections = [_headline(card), _exams(card), _kinds(card), _samples(samples), _curves(card), _training(card)]
    sections += [_data(card), _time(card), _machine(card), _config(card)]
    lines = [f"# Report card: {card['tier']}", "", *(line for section in sections for line in section)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _headline(card: Card) -> list[str]:
    train, model = card["pretrain"], card["model"]
    if not train:
        return []
    base = card["exams"].get("base", {}).get("bits_per_byte")
    parts = [
        f"A chat model of {_count(train['parameters'])} parameters ({model['depth']} layers, width {model['width']}), "
        f"trained from raw text in **{duration(card['seconds_total'])}** on {_device(_main_machine(card))}."
    ]
    if base:
        parts.append(f"It reads held-out text at **{base['metric']:.3f} bits per byte**.")
    answered = {
        name: task
        for stage in STAGE_TITLES
        for name, task in card["exams"].get(stage, {}).items()
        if "accuracy" in task
    }
    if answered:
        scores = (f"{name.replace('_', ' ')} **{task['accuracy']:.1%}**" for name, task in answered.items())
        parts.append(f"Exams: {', '.join(scores)}.")
    return [" ".join(parts), ""]


def _exams(card: Card) -> list[str]:
    """The table BASE / SFT / RL."""
    exams = card["exams"]
    stages = [stage for stage in STAGE_TITLES if stage in exams]
    if not stages:
        return []
    rows = []
    for name in dict.fromkeys(name for stage in stages for name in exams[stage]):
        tasks = [exams[stage].get(name) for stage in stages]
        known = next(task for task in tasks if task)
        chance = f"{known['chance']:.0%}" if "chance" in known else "-"
        rows.append([name, *(_score(task) for task in tasks), chance, _cases(tasks)])
        if name == "bits_per_byte":
            rows += _reading(tasks)
    head = ["exam", *(STAGE_TITLES[stage] for stage in stages), "chance", "cases"]
    note = (
        "In brackets: 95 % intervals (Wilson). Bits per byte and perplexity: lower is better; their cases are rows of "
        "text that no stage trained on."
    )
    long = sum(task.get("too_long", 0) for stage in stages for task in exams[stage].values())
    if long:
        note += f" {long:,} questions are longer than the context and count as wrong."
    return ["## Exams", "", *_table(head, rows), "", note, ""]


def _reading(tasks: list[dict[str, Any] | None]) -> list[list[str]]:
    """The rows below bits per byte."""
    rows = [["perplexity", *(f"{t['perplexity']:.1f}" if t else "-" for t in tasks), "-", _cases(tasks)]]
    talks = [task.get("conversations") if task else None for task in tasks]
    if any(talks):
        scores = (f"{talk['bits_per_byte']:.4f}" if talk else "-" for talk in talks)
        rows.append(["bits_per_byte, conversations", *scores, "-", _cases(talks)])
    return rows


def _cases(tasks: list[dict[str, Any] | None]) -> str:
    """How many; by stage where they were not asked the same number."""
    numbers = [f"{task['n']:,}" for task in tasks if task]
    return numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers)


def _score(task: dict[str, Any] | None) -> str:
    if task is None:
        return "-"
    if "interval" in task:
        low, high = task["interval"]
        return f"{task['metric']:.1%} ({low:.1%} to {high:.1%})"
    return f"{task['metric']:.4f}"


def _kinds(card: Card) -> list[str]:
    """Exams by kind of question, for the furthest trained stage."""
    stage = next((s for s in reversed(STAGE_TITLES) if s in card["exams"]), None)
    rows = [
        [task, name, _score(group), f"{group['n']:,}"]
        for task, scores in card["exams"].get(stage, {}).items()
        for name, group in scores.get("groups", {}).items()
    ]
    if stage is None or not rows:
        return []
    return ["### By kind of question", "", *_table(["exam", "kind", STAGE_TITLES[stage], "cases"], rows), ""]


def _samples(samples: dict[str, str]) -> list[str]:
    """What each stage writes, the furthest first; what it wrote before that stage is folded."""
    lines: list[str] = []
    for stage in reversed(STAGE_TITLES):
        parts = dict(part.split("\n", 1) for part in f"\n{samples.get(stage, '')}\n".split("\n## ")[1:])
        if "After" in parts:
            lines += [f"### After {STAGE_TITLES[stage]}", "", *parts["After"].strip().split("\n"), ""]
        if "Before" in parts:
            before = parts["Before"].strip().split("\n")
            lines += [
                "<details>",
                f"<summary>Before {STAGE_TITLES[stage]}</summary>",
                "",
                *before,
                "",
                "</details>",
                "",
            ]
    note = "The same prompts at both temperatures (in bold); the calculator's calls in brackets."
    return ["## Samples", "", note, "", *lines] if lines else []


def _curves(card: Card) -> list[str]:
    lines = [
        f"![{STAGE_TITLES[stage]}: {path.rsplit('_', 1)[1].removesuffix('.png')}]({path})"
        for stage, paths in card["plots"].items()
        for path in paths
    ]
    return ["## Curves", "", *(line for picture in lines for line in (picture, ""))] if lines else []


def _training(card: Card) -> list[str]:
    train, sft, speed, rows = card["pretrain"], card["sft"], card["speed"], []
    if train:
        rows += [
            ["parameters", f"{train['parameters']:,} ({train['scaling_parameters']:,} in products)"],
            ["model", _settings(card["model"])],
            ["optimizer", _settings(card["optimizer"])],
            ["pretraining tokens", f"{train['tokens']:,} in {speed['base']['steps']:,} steps"],
            ["pretraining FLOPs", f"{train['flops']:.3g} ({train['flops_per_token']:,} per token)"],
            ["pretraining speed", _speed(speed["base"])],
            ["pretraining, steps skipped", f"{train['bad_steps']:,}"],
            ["base parameters' SHA-256", f"`{train['params_sha256']}`"],
        ]
    if sft:
        rows += [
            ["SFT conversations", ", ".join(f"{name} ({count:,})" for name, count in sft["conversations"].items())],
            [
                "SFT rows",
                f"{sft['train']['rows']:,}, {sft['train']['fill']:.1%} filled; "
                f"{sft['train']['cut']:,} conversations longer than a row, cut at a turn",
            ],
            ["SFT tokens", f"{sft['tokens']:,} in {sft['steps']:,} steps"],
            ["SFT speed", _speed(speed["sft"])],
            ["SFT, steps skipped", f"{sft['bad_steps']:,}"],
            ["SFT parameters' SHA-256", f"`{sft['params_sha256']}`"],
        ]
    return ["## Training", "", *_table(["", ""], rows), ""] if rows else []


def _speed(speed: dict[str, Any]) -> str:
    mfu = f", MFU {speed['mfu']:.1%}" if speed["mfu"] is not None else ""
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s{mfu}, a step {speed['step_seconds']:.3g} s (medians); "
        f"{speed['mean_tokens_per_second']:,.0f} tokens/s with the first step of {speed['first_step_seconds']:.3g} s"
    )


def _data(card: Card) -> list[str]:
    data, rows = card["data"], [["source", f"`{card['data']['source']}`"]]
    for split, title in (("train", "training text"), ("val", "held-out text")):
        if split in data:
            d = data[split]
            rows += [
                [title, f"{d['documents']:,} documents, {d['bytes']:,} bytes, {d['tokens']:,} tokens"],
                [
                    f"{title}, packed",
                    f"{d['rows']:,} rows, {d['fill']:.2%} filled, {d['cuts']:,} cuts, nothing dropped, nothing twice",
                ],
            ]
    if card["corpus_share"] is not None:
        epochs = card["pretrain"]["epochs"]
        rows.append(["training text used", f"{card['corpus_share']:.1%} ({epochs:.2f} epochs)"])
    if card["tokenizer"]:
        t = card["tokenizer"]
        how = "trained on the training text" if t["trained"] else "taken as it was"
        rows.append(
            [
                "tokenizer",
                f"{t['vocab_size']:,} tokens, {t['bytes_per_token']:.2f} bytes per token on held-out text, {how}",
            ]
        )
    return ["## Data", "", *_table(["", ""], rows), ""]


def _time(card: Card) -> list[str]:
    rows = [[name, duration(seconds)] for name, seconds in card["seconds"].items()]
    rows.append(["**total**", f"**{duration(card['seconds_total'])}**"])
    return ["## Time", "", *_table(["stage", "wall clock"], rows), ""]


def _machine(card: Card) -> list[str]:
    code, peak = card["code"], card["peak_memory_bytes"]
    rows = [
        ["hardware", _by_stage(card["machines"], _device)],
        ["peak memory", f"{peak / 2**30:.2f} GiB" if peak else "-"],
        ["versions", _by_stage(card["versions"], lambda found: ", ".join(f"{k} {v}" for k, v in found.items()))],
        ["commit", _by_stage(card["commits"], lambda commit: f"`{commit}`" if commit else "-")],
        [
            "code",
            f"{code['files']:,} files, {code['lines']:,} lines ({code['code_lines']:,} without comments), "
            f"{code['dependencies']} dependencies",
        ],
        ["seed", str(card["seed"])],
        ["finished", card["date"] or "-"],
    ]
    return ["## Machine and code", "", *_table(["", ""], rows), ""]


def _config(card: Card) -> list[str]:
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in card["config"].items())
    title = f"<summary>All settings ({len(card['config'])})</summary>"
    return ["## Configuration", "", "<details>", title, "", "```toml", *lines, "```", "", "</details>"]


def _by_stage(groups: list[dict[str, Any]], show: Any) -> str:
    """One value where all stages share it; else each with its stages."""
    if len(groups) == 1:
        return show(groups[0]["value"])
    return "; ".join(f"{show(group['value'])} ({', '.join(group['stages'])})" for group in groups) or "-"


def _main_machine(card: Card) -> dict[str, Any]:
    return next(group["value"] for group in card["machines"] if "pretrain" in group["stages"])


def _device(hardware: dict[str, Any]) -> str:
    hosts = f" on {hardware['hosts']} hosts" if hardware["hosts"] > 1 else ""
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu_cores']} CPU cores ({hardware['device']}){hosts}"
    return f"{hardware['devices']} x {hardware['device']}{hosts}"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells)]


def _count(number: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def duration(seconds: float) -> str:
    """A time as people say it: seconds, minutes and seconds, hours and minutes, or days and hours."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"
