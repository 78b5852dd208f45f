"""The words of a report card: blocks from the numbers of `report.json` and the samples, and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from train.report_blocks import (
    Block,
    Bold,
    Fold,
    Heading,
    Line,
    Listing,
    Mono,
    Paragraph,
    Pictures,
    Samples,
    Table,
    Tiles,
    Turn,
)
from train.report_data import data_blocks
from train.report_exams import STAGE_TITLES, Card, bits, exam_blocks, taken

TILE_EXAMS = {"mmlu": "MMLU", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "gsm8k": "GSM8K",
              "humaneval": "HumanEval", "word_problems": "word problems", "identity": "identity"}  # fmt: skip
MOST_TILES = 8


def card_blocks(card: Card, samples: dict[str, str]) -> list[Block]:
    """The whole card; `samples` holds the text of each stage's `samples.md`, empty where there is none."""
    sections = (
        _headline(card), exam_blocks(card), _samples(samples), _curves(card), _learning(card), _training(card),
        data_blocks(card), _time(card), _machine(card), _config(card),
    )  # fmt: skip
    return [block for section in sections for block in section]


def _headline(card: Card) -> list[Block]:
    train, model = card["pretrain"], card["model"]
    if origin := card.get("imported"):
        return [
            Paragraph(
                [
                    f"The weights were imported from {origin['from']} ({origin['format']}). What they were trained on "
                    "is not known here: they may have seen the held-out text and the exams."
                ]
            )
        ]
    if not train:
        return []
    base = card["exams"].get("base", {}).get("bits_per_byte")
    text: list[Any] = [
        f"{'A chat model' if card['sft'] else 'A model'} of {count(train['parameters'])} parameters "
        f"({model['depth']} layers, width {model['width']}), trained from raw text in ",
        Bold(duration(card["seconds_total"])),
        f" on {_device(_main_machine(card))}.",
        "" if card["sft"] else " It goes on with a text; it was not taught to answer.",
    ]
    if base:
        text += [" It reads held-out text at ", Bold(f"{bits(base, 3)} bits per byte"), "."]
    latest = {name: task for stage in STAGE_TITLES for name, task in taken(card, stage).items() if "accuracy" in task}
    for i, (name, task) in enumerate(latest.items()):
        text += [", " if i else " Exams: ", f"{name.replace('_', ' ')} ", Bold(f"{task['accuracy']:.1%}")]
    return [Paragraph([*text, "."] if latest else text), Tiles(_tiles(card, latest))]


def _tiles(card: Card, latest: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that a reader wants first."""
    figures = [
        ("parameters", count(card["pretrain"]["parameters"])),
        ("wall clock", duration(card["seconds_total"])),
        ("cost", money(card["cost"]["usd"])),
    ]
    if base := card["exams"].get("base", {}).get("bits_per_byte"):
        figures.append(("bits per byte", bits(base, 3)))
    standing = card["standing"].values()
    for key, title in (("core", "CORE"), ("chatcore", "ChatCORE")):
        figures += [(title, f"{s[key]:.4f}") for s in standing if s.get(key) is not None][-1:]
    figures += [(title, f"{latest[name]['metric']:.1%}") for name, title in TILE_EXAMS.items() if name in latest]
    return figures[:MOST_TILES]


def _samples(samples: dict[str, str]) -> list[Block]:
    """What each stage writes, the furthest first; what it wrote before that stage is folded."""
    blocks: list[Block] = []
    for stage in reversed(STAGE_TITLES):
        parts = dict(part.split("\n", 1) for part in f"\n{samples.get(stage, '')}\n".split("\n## ")[1:])
        for title, folded in (("After", False), ("Before", True)):
            if title in parts:
                source = parts[title].strip().split("\n")
                blocks.append(Samples(f"{title} {STAGE_TITLES[stage]}", source, turns(source), folded))
    note = "The same prompts at both temperatures (in bold); the calculator's calls in brackets."
    return [Heading("Samples"), Paragraph(note, small=True), *blocks] if blocks else []


def turns(source: Sequence[str]) -> list[Turn]:
    """What the lines of `samples.md` say: prompts and answers without their marks."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for line in source:
        if line.startswith("> "):
            found.append((_bare(line[2:]), []))
        elif (match := re.fullmatch(r"- \*\*(.+?)\*\*: (.*)", line)) and found:
            found[-1][1].append((match[1], _bare(match[2])))
    return [Turn(prompt, answers) for prompt, answers in found]


def _bare(text: str) -> str:
    match = re.fullmatch(r"(`+) (.*) \1", text) or re.fullmatch("(`)([^`]*)`", text)
    return match[2] if match else text


def _curves(card: Card) -> list[Block]:
    titles = {"dynamics": "how training went", "loss": "loss", "rl": "reward, length and pass@k"}
    files = [
        (f"{STAGE_TITLES[stage]}: {titles.get(kind, kind)}", path)
        for stage, paths in card["plots"].items()
        for path in paths
        for kind in [path.rsplit("_", 1)[-1].removesuffix(".png")]
    ]
    return [Heading("Curves"), Pictures(files)] if files else []


def _learning(card: Card) -> list[Block]:
    """Reinforcement learning: where its figures began and ended."""
    found = card["rl_progress"]
    if not found:
        return []
    names = {"right": "share right", "length": "tokens per answer", "endless": "share without an end",
             "kl": "KL to the start, nats per token"}  # fmt: skip
    rows: list[Sequence[Line]] = [
        [names.get(name, name), f"{f['first']:.4g}", f"{f['last']:.4g}", f"{f['best']:.4g}", f"{f['values']:,}"]
        for name, f in found.items()
    ]
    note = "First and last: means over a tenth of the steps; of pass@k and KL the evaluations before and after."
    table = Table(["", "first", "last", "greatest", "measured"], rows, numeric=True)
    return [Heading("Reinforcement learning"), table, Paragraph(note, small=True)]


def _training(card: Card) -> list[Block]:
    train, speed = card["pretrain"], card["speed"]
    rows: list[Sequence[Line]] = []
    if train:
        rows += [
            ["parameters", f"{train['parameters']:,} ({train['scaling_parameters']:,} in products)"],
            ["model", _settings(card["model"])],
            ["optimizer", _settings(card["optimizer"])],
            ["pretraining tokens", f"{train['tokens']:,} in {speed['base']['steps']:,} steps"],
            ["pretraining FLOPs", f"{train['flops']:.3g} ({train['flops_per_token']:,} per token)"],
            ["pretraining speed", _speed(speed["base"])],
            ["pretraining, steps skipped", f"{train['bad_steps']:,}"],
            ["base parameters' SHA-256", Mono(train["params_sha256"])],
        ]
    if sft := card["sft"]:
        rows += [
            ["SFT conversations", ", ".join(f"{name} ({number:,})" for name, number in sft["conversations"].items())],
            [
                "SFT rows",
                f"{sft['train']['rows']:,}, {sft['train']['fill']:.1%} filled; "
                f"{sft['train']['cut']:,} conversations longer than a row, cut at a turn",
            ],
            ["SFT tokens", f"{sft['tokens']:,} in {sft['steps']:,} steps"],
            ["SFT speed", _speed(speed["sft"])],
            ["SFT, steps skipped", f"{sft['bad_steps']:,}"],
            ["SFT parameters' SHA-256", Mono(sft["params_sha256"])],
        ]
    if rl := card["rl"]:
        rows += [["RL environment", str(rl["environment"])]] if "environment" in rl else []
        rows += [[f"RL {key}", f"{rl[key]:,}"] for key in ("questions", "steps", "tokens") if key in rl]
        rows += [["RL speed", _speed(speed["rl"])]] if "rl" in speed else []
        rows += [["RL parameters' SHA-256", Mono(rl["params_sha256"])]] if "params_sha256" in rl else []
    return [Heading("Training"), Table(["", ""], rows)] if rows else []


def _speed(speed: dict[str, Any]) -> str:
    mfu = f", MFU {speed['mfu']:.1%}" if speed["mfu"] is not None else ""
    step = f"a step {speed['step_seconds']:.3g} s"
    if speed["tokens_per_second"] is None:
        return f"{step} (median), the first one {speed['first_step_seconds']:.3g} s"
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s{mfu}, {step} (medians); "
        f"{speed['mean_tokens_per_second']:,.0f} tokens/s with the first step of {speed['first_step_seconds']:.3g} s"
    )


def _time(card: Card) -> list[Block]:
    cost, head = card["cost"], ["stage", "wall clock"]
    rows: list[list[Line]] = [[name, duration(seconds)] for name, seconds in card["seconds"].items()]
    rows.append([Bold("total"), Bold(duration(card["seconds_total"]))])
    if not cost["prices"]:
        return [Heading("Time"), Table(head, rows, numeric=True)]
    for row, name in zip(rows, card["seconds"], strict=False):
        row.append(money(cost["stages"].get(name)))
    rows[-1].append(Bold(money(cost["usd"])))
    prices = ", ".join(f"{price:g} USD for {name}" for name, price in cost["prices"].items())
    note = f"Cost: devices x hours x price, {cost['assumption']}: {prices}."
    return [Heading("Time"), Table([*head, "USD"], rows, numeric=True), Paragraph(note, small=True)]


def money(usd: float | None) -> str:
    """A cost as people say it."""
    if usd is None:
        return "not known"
    return f"{usd:,.2f} USD" if usd else "nothing"


def _machine(card: Card) -> list[Block]:
    code, peak = card["code"], card["peak_memory_bytes"]
    rows: list[Sequence[Line]] = [
        ["hardware", _by_stage(card["machines"], _device)],
        ["cost", card["cost"]["words"]],
        ["peak memory", f"{peak / 2**30:.2f} GiB" if peak else "-"],
        ["versions", _by_stage(card["versions"], lambda found: ", ".join(f"{k} {v}" for k, v in found.items()))],
        ["commit", _by_stage(card["commits"], lambda commit: Mono(commit) if commit else "-")],
        [
            "code",
            f"{code['files']:,} files, {code['lines']:,} lines ({code['code_lines']:,} without comments), "
            f"{code['dependencies']} dependencies",
        ],
        ["seed", str(card["seed"])],
        ["finished", card["date"] or "-"],
    ]
    return [Heading("Machine and code"), Table(["", ""], rows)]


def _config(card: Card) -> list[Block]:
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in card["config"].items()]
    return [Heading("Configuration"), Fold(f"All settings ({len(card['config'])})", [Listing(lines)])]


def _by_stage(groups: list[dict[str, Any]], show: Any) -> Line:
    """One value where all stages share it; else each with its stages."""
    if len(groups) == 1:
        return show(groups[0]["value"])
    pieces: list[Any] = []
    for group in groups:
        pieces += ["; "] if pieces else []
        pieces += [show(group["value"]), f" ({', '.join(group['stages'])})"]
    return pieces or "-"


def _main_machine(card: Card) -> dict[str, Any]:
    return next(group["value"] for group in card["machines"] if "pretrain" in group["stages"])


def _device(hardware: dict[str, Any]) -> str:
    hosts = f" on {hardware['hosts']} hosts" if hardware["hosts"] > 1 else ""
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu_cores']} CPU cores ({hardware['device']}){hosts}"
    return f"{hardware['devices']} x {hardware['device']}{hosts}"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def count(number: int) -> str:
    """A number as people say it: 4.9 million."""
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
