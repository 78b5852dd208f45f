"""The report card: `report.md` for people, `report.json` with every number of it, and the curves."""

from __future__ import annotations

import ast
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxchat.config import Config
from jaxchat.log import read_metrics, say
from jaxchat.paths import RunDir, atomic_write, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
STAGE_TITLES = {"base": "BASE", "sft": "SFT", "rl": "RL"}
CHANCE = {"word_problems": 0.0, "identity": 0.0}


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write the card from the records of the run; facts: its digest."""
    card = collect(config, run)
    for stage in card["curves"]:
        run.plots.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.stage(stage) / "loss.png", run.plots / f"{stage}_loss.png")
    write_json(run.root / "report.json", card)
    text = "\n".join(_lines(card, run)) + "\n"
    atomic_write(run.report, text)
    say(f"  {run.report}")
    return {"digest": hashlib.sha256(text.encode()).hexdigest()}


def collect(config: Config, run: RunDir) -> dict[str, Any]:
    """Every number of the card, from `stages.json`, the metrics and the exams; parts that do not exist are left out."""
    records = read_json(run.stages)
    exams = {s: read_json(run.eval(s))["tasks"] for s in STAGE_TITLES if run.eval(s).exists()}
    facts = {name: record["facts"] for name, record in records.items() if record["status"] == "done"}
    last = records.get("pretrain") or next(iter(records.values()))
    seconds = {name: record["seconds"] for name, record in records.items() if record["status"] == "done"}
    curves = {
        stage: _curve(run.stage(stage) / "metrics.jsonl")
        for stage in ("base", "sft")
        if (run.stage(stage) / "loss.png").exists()
    }
    peaks = [record["peak_rss_bytes"] for record in records.values() if record.get("peak_rss_bytes")]
    return {
        "tier": config.tier,
        "hardware": last["hardware"],
        "versions": last["versions"],
        "commit": last["commit"],
        "seed": config.seed,
        "model": {
            k: getattr(config.model, k) for k in ("recipe", "depth", "width", "n_heads", "seq_len", "vocab_size")
        },
        "optimizer": {
            "kind": config.optim.kind,
            "lr_scale": config.optim.lr_scale,
            "matrix_lr": config.optim.matrix_lr,
        },
        "tokenizer": facts.get("tokenizer", {}),
        "data": {"source": config.data.source} | facts.get("prepare", {}),
        "pretrain": facts.get("pretrain", {}),
        "sft": facts.get("sft", {}),
        "exams": exams,
        "chance": CHANCE,
        "curves": curves,
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "peak_memory_bytes": max(peaks, default=None),
        "code": code_size(),
    }


def code_size() -> dict[str, int]:
    """Files and code lines (without blank lines, comments and docstrings) of the product, and its dependencies."""
    files = [p for folder in ("jaxchat", "train", "serve") for p in sorted((ROOT / folder).rglob("*.py"))]
    files.append(ROOT / "launch.py")
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {
        "files": len(files),
        "lines": sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files),
        "code_lines": sum(len(_code_lines(p.read_text(encoding="utf-8"))) for p in files),
        "dependencies": sum(1 for line in requirements if line.strip() and not line.startswith("#")),
    }


def _code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold a statement or an expression other than a docstring."""
    tree = ast.parse(text)
    strings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and id(node) not in strings:
            lines |= {node.lineno, node.end_lineno or node.lineno}
        elif isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and id(node.value) in strings):
            lines.add(node.lineno)
    return lines


def _curve(path: Path) -> dict[str, Any]:
    records = read_metrics(path)
    return {
        "steps": len(records),
        "loss": [[r["tokens"], r["loss"]] for r in records],
        "val_bpb": [[r["tokens"], r["val_bpb"]] for r in records if "val_bpb" in r],
    }


def _lines(card: dict[str, Any], run: RunDir) -> list[str]:
    """The card as Markdown."""
    sections = [_headline(card), _exams(card), _groups(card), _training(card), _data(card), _curves(card)]
    sections += [_samples(run), _time(card), _machine(card)]
    return [f"# Report card: {card['tier']}", "", *(line for section in sections for line in section)]


def _headline(card: dict[str, Any]) -> list[str]:
    train, model = card["pretrain"], card["model"]
    if not train:
        return []
    last = card["exams"].get("sft") or card["exams"].get("base") or {}
    scores = ", ".join(
        f"{name.replace('_', ' ')} {task['accuracy']:.1%}" for name, task in last.items() if "accuracy" in task
    )
    base = card["exams"].get("base", {}).get("bits_per_byte")
    bpb = f" It reads held-out text at **{base['metric']:.3f} bits per byte**." if base else ""
    return [
        f"A chat model of {_count(train['parameters'])} parameters ({model['depth']} layers, width {model['width']}), "
        f"trained from raw text in **{_duration(card['seconds_total'])}** on {_device(card)}.{bpb}"
        + (f" It answers: {scores}." if scores else ""),
        "",
    ]


def _exams(card: dict[str, Any]) -> list[str]:
    """The table BASE / SFT / RL."""
    stages = [stage for stage in STAGE_TITLES if stage in card["exams"]]
    if not stages:
        return []
    names = list(dict.fromkeys(name for stage in stages for name in card["exams"][stage]))
    rows = []
    for name in names:
        tasks = [card["exams"][stage].get(name) for stage in stages]
        known = next(task for task in tasks if task)
        chance = f"{known['chance']:.0%}" if "chance" in known else "-"
        rows.append([name, *(_score(task) for task in tasks), chance, f"{known['n']:,}"])
    perplexity = [card["exams"][stage].get("bits_per_byte", {}).get("perplexity") for stage in stages]
    rows.insert(1, ["perplexity", *(f"{p:.1f}" if p else "-" for p in perplexity), "-", ""])
    talk = [card["exams"][stage].get("bits_per_byte", {}).get("conversations") for stage in stages]
    if any(talk):
        rows.insert(
            2, ["bits_per_byte, conversations", *(f"{t['bits_per_byte']:.4f}" if t else "-" for t in talk), "-", ""]
        )
    head = ["exam", *(STAGE_TITLES[stage] for stage in stages), "chance", "cases"]
    note = "In brackets: 95 % intervals (Wilson). Bits per byte: lower is better; on text that no stage trained on."
    return ["## Exams", "", *_table(head, rows), "", note, ""]


def _score(task: dict[str, Any] | None) -> str:
    if task is None:
        return "-"
    if "interval" in task:
        low, high = task["interval"]
        return f"{task['metric']:.1%} ({low:.1%} to {high:.1%})"
    return f"{task['metric']:.4f}"


def _groups(card: dict[str, Any]) -> list[str]:
    """Exams by kind of question, for the furthest trained stage."""
    stage = next((s for s in reversed(STAGE_TITLES) if s in card["exams"]), None)
    rows = [
        [task, name, f"{group['accuracy']:.1%}", f"{group['n']:,}"]
        for task, scores in (card["exams"].get(stage) or {}).items()
        for name, group in scores.get("groups", {}).items()
    ]
    if not rows:
        return []
    return ["### By kind of question", "", *_table(["exam", "kind", STAGE_TITLES[str(stage)], "cases"], rows), ""]


def _training(card: dict[str, Any]) -> list[str]:
    rows = []
    train, sft = card["pretrain"], card["sft"]
    if train:
        rows += [
            ["parameters", f"{train['parameters']:,} ({train['scaling_parameters']:,} in products)"],
            ["recipe", ", ".join(f"{k} {v}" for k, v in card["model"].items())],
            [
                "optimizer",
                ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in card["optimizer"].items()),
            ],
            ["pretraining tokens", f"{train['tokens']:,} ({train['epochs']:.2f} epochs)"],
            ["pretraining FLOPs", f"{train['flops']:.3g} ({train['flops_per_token']:,} per token)"],
            ["tokens per second", f"{train['tokens_per_second']:,.0f}"],
            ["skipped steps", f"{train['bad_steps']}"],
            ["parameters' SHA-256", f"`{train['params_sha256'][:16]}`"],
        ]
    if sft:
        named = ", ".join(f"{name} ({count:,})" for name, count in sft["conversations"].items())
        rows += [
            ["SFT conversations", named],
            ["SFT tokens", f"{sft['tokens']:,} in {sft['steps']:,} steps, rows {sft['train']['fill']:.1%} filled"],
        ]
    return ["## Training", "", *_table(["", ""], rows), ""] if rows else []


def _data(card: dict[str, Any]) -> list[str]:
    data, rows = card["data"], [["source", f"`{card['data']['source']}`"]]
    for split in ("train", "val"):
        if split in data:
            d = data[split]
            text = f"{d['documents']:,} documents, {d['tokens']:,} tokens, {d['rows']:,} rows, {d['fill']:.2%} filled"
            rows.append([split, f"{text}, {d['cuts']:,} cuts, nothing dropped"])
    if card["tokenizer"]:
        t = card["tokenizer"]
        rows.append(["tokenizer", f"{t['vocab_size']:,} tokens, {t['bytes_per_token']:.2f} bytes per token (held out)"])
    return ["## Data", "", *_table(["", ""], rows), ""]


def _curves(card: dict[str, Any]) -> list[str]:
    lines = [f"![{STAGE_TITLES[stage]} loss](plots/{stage}_loss.png)" for stage in card["curves"]]
    return ["## Curves", "", *lines, ""] if lines else []


def _samples(run: RunDir) -> list[str]:
    """`samples.md` of each stage, headings two levels down."""
    lines: list[str] = []
    for stage in STAGE_TITLES:
        path = run.stage(stage) / "samples.md"
        if path.exists():
            text = path.read_text(encoding="utf-8").splitlines()
            lines += ["##" + line if line.startswith("#") else line for line in text] + [""]
    return ["## Samples", "", *lines] if lines else []


def _time(card: dict[str, Any]) -> list[str]:
    rows = [[name, _duration(seconds)] for name, seconds in card["seconds"].items()]
    rows.append(["**total**", f"**{_duration(card['seconds_total'])}**"])
    return ["## Time", "", *_table(["stage", "wall clock"], rows), ""]


def _machine(card: dict[str, Any]) -> list[str]:
    code, peak = card["code"], card["peak_memory_bytes"]
    rows = [
        ["hardware", _device(card)],
        ["peak memory", f"{peak / 2**30:.2f} GiB" if peak else "-"],
        ["versions", ", ".join(f"{k} {v}" for k, v in card["versions"].items())],
        ["commit", card["commit"] or "-"],
        [
            "code",
            f"{code['files']} files, {code['lines']:,} lines ({code['code_lines']:,} of code), "
            f"{code['dependencies']} dependencies",
        ],
        ["seed", str(card["seed"])],
    ]
    return ["## Machine and code", "", *_table(["", ""], rows)]


def _device(card: dict[str, Any]) -> str:
    hardware = card["hardware"]
    if hardware["platform"] == "cpu":
        return f"{hardware['cpu_cores']} CPU cores ({hardware['device']})"
    return f"{hardware['devices']} x {hardware['device']}"


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells)]


def _count(number: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
