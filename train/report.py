"""The report card: `report.md` and `report.html` for people, `report.json` with every number, and the curves."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jaxchat.config import Config
from jaxchat.log import read_metrics, say
from jaxchat.paths import RunDir, atomic_write, read_json, write_json
from jaxchat.toml import flatten
from train.compression import other_tokenizers
from train.cost import run_cost, wall_clock
from train.overlap import exam_overlap
from train.report_exams import STAGE_TITLES, standing
from train.report_html import page
from train.report_markdown import markdown
from train.report_plots import draw
from train.report_text import card_blocks

ROOT = Path(__file__).resolve().parent.parent
MODEL_KEYS = ("recipe", "depth", "width", "n_heads", "n_kv_heads", "head_width", "seq_len", "vocab_size")
FORMAT = 1  # of `report.json`
CURVE_POINTS = 500  # of one curve in report.json, at most; metrics.jsonl has them all
PRIVATE = ("serve.",)  # a card is there to be shown around; these keys hold addresses and API keys
RL_CURVES = ("reward", "right", "length", "endless", "kl")  # and pass@k

Steps = list[dict[str, Any]]


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write the card from the records of the run; facts: its digest."""
    metrics = {stage: read_metrics(run.stage(stage) / "metrics.jsonl") for stage in STAGE_TITLES}
    card = collect(config, run, metrics)
    card["overlap"] = exam_overlap(config, run, card["data"].get("train", {}).get("documents"))
    card["other_tokenizers"] = other_tokenizers(config, run) if card["tokenizer"] else []
    drawn = draw(run, metrics)
    card["plots"] = {stage: [plot.path for plot in plots] for stage, plots in drawn.items()}
    write_json(run.root / "report.json", card)
    title, blocks = f"Report card: {card['tier']}", card_blocks(card, {s: _samples(run, s) for s in STAGE_TITLES})
    text = markdown(title, blocks)
    atomic_write(run.report, text)
    themes = {plot.path: plot.svg for plots in drawn.values() for plot in plots}
    atomic_write(run.root / "report.html", page(title, blocks, themes))
    say(f"  {run.report}, and the same as one page: {run.root / 'report.html'}")
    return {"digest": hashlib.sha256(text.encode()).hexdigest()}


def collect(config: Config, run: RunDir, metrics: dict[str, Steps]) -> dict[str, Any]:
    """Every number of the card, from `stages.json`, the metrics and the exams; parts that do not exist are left out."""
    done = {name: r for name, r in run.records().items() if r["status"] == "done"}
    records = {name: r for name, r in done.items() if name not in ("report", "export") and "imported" not in r}
    exams = {stage: read_json(run.eval(stage)) for stage in STAGE_TITLES if run.eval(stage).exists()}
    facts = {name: record["facts"] for name, record in records.items()}
    seconds = {name: wall_clock(record) for name, record in records.items()}
    pretrain = facts.get("pretrain", {})
    return {
        "format": FORMAT,
        "tier": config.tier,
        "date": max((record["end"] for record in records.values()), default=None),
        "machines": _alike(records, "hardware"),
        "versions": _alike(records, "versions"),
        "commits": _alike(records, "commit"),
        "cost": run_cost(records),
        "seed": config.seed,
        "config": {key: value for key, value in flatten(config).items() if not key.startswith(PRIVATE)},
        "model": {key: getattr(config.model, key) for key in MODEL_KEYS},
        "optimizer": {key: getattr(config.optim, key) for key in ("kind", "lr_scale", "matrix_lr", "weight_decay")},
        "imported": next((r["imported"] for r in done.values() if "imported" in r), None),
        "tokenizer": facts.get("tokenizer", {}),
        "data": {"source": config.data.source} | facts.get("prepare", {}),
        "corpus_share": min(1.0, pretrain["epochs"]) if pretrain else None,
        "pretrain": pretrain,
        "sft": facts.get("sft", {}),
        "rl": facts.get("rl", {}),
        "rl_progress": _progress(metrics.get("rl", []), facts.get("rl", {}).get("start", {})),
        "speed": {stage: speed(steps) for stage, steps in metrics.items() if steps},
        "copied": exams.get("base", {}).get("copied"),
        "exams": {stage: record["tasks"] for stage, record in exams.items()},
        "standing": {stage: standing(record) for stage, record in exams.items()},
        "curves": {stage: _curve(steps) for stage, steps in metrics.items() if steps},
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "peak_memory_bytes": max((r["peak_rss_bytes"] for r in records.values() if r.get("peak_rss_bytes")), default=0),
        "code": code_size(),
    }


def _alike(records: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """[{"stages": [...], "value": ...}]: what the stages ran on or with, those with the same value together."""
    groups: list[dict[str, Any]] = []
    for name, record in records.items():
        group = next((g for g in groups if g["value"] == record[key]), None)
        if group is None:
            groups.append(group := {"stages": [], "value": record[key]})
        group["stages"].append(name)
    return groups


def speed(steps: Steps) -> dict[str, Any]:
    """Medians over the steps, and the mean, compiling included; null where the metrics do not say it."""

    def middle(key: str) -> float | None:
        known = [r[key] for r in steps if r.get(key) is not None]
        return median(known) if known else None

    spent, tokens = sum(r.get("step_seconds") or 0.0 for r in steps), steps[-1].get("tokens")
    return {
        "steps": len(steps),
        "tokens_per_second": middle("tokens_per_second"),
        "mean_tokens_per_second": None if tokens is None else tokens / max(spent, 1e-9),
        "step_seconds": middle("step_seconds") or 0.0,
        "first_step_seconds": steps[0].get("step_seconds") or 0.0,
        "mfu": middle("mfu"),
    }


def _curve(steps: Steps) -> dict[str, Any]:
    """Points (tokens, value), of RL (step, value)."""
    stride = -(-len(steps) // CURVE_POINTS)
    chosen = [*steps[:-1:stride], steps[-1]]
    curves = {
        "loss": [[r.get("tokens", r["step"]), r.get("loss")] for r in chosen],
        "val_bpb": [[r.get("tokens", r["step"]), r["val_bpb"]] for r in steps if "val_bpb" in r],
    }
    for key in _learned(steps):
        curves[key] = [[r["step"], r[key]] for r in (steps if "@" in key else chosen) if key in r]
    return curves


def _learned(steps: Steps) -> list[str]:
    """The figures of reinforcement learning that the records hold."""
    held = dict.fromkeys(key for record in steps for key in record if key in RL_CURVES or key.startswith("pass@"))
    order = {key: i for i, key in enumerate(RL_CURVES)}
    return sorted(held, key=lambda key: (order.get(key, len(order)), len(key), key))


def _progress(steps: Steps, start: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Where each figure of RL began and ended: means over a tenth of the steps, single values of what is measured at
    evaluations only, of which `start` is the one before the first step."""
    found = {}
    for key in _learned(steps):
        values = [r[key] for r in steps if r.get(key) is not None]
        seldom = len(values) < len(steps)
        if seldom and key in start:
            values.insert(0, start[key])
        part = 1 if seldom else -(-len(values) // 10)
        if values:
            ends = {"first": fmean(values[:part]), "last": fmean(values[-part:])}
            found[key] = ends | {"best": max(values), "values": len(values)}
    return found


def _samples(run: RunDir, stage: str) -> str:
    """`samples.md` of a stage, empty where there is none; a carriage return in a sample must not end its line."""
    path = run.stage(stage) / "samples.md"
    return path.read_bytes().decode("utf-8").replace("\r", " ") if path.exists() else ""


@functools.cache
def code_size() -> dict[str, int]:
    """Files and code lines (without blank lines, comments and docstrings) of the product, and its dependencies."""
    files = [p for folder in ("jaxchat", "train", "serve") for p in sorted((ROOT / folder).rglob("*.py"))]
    files.append(ROOT / "launch.py")
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {
        "files": len(files),
        "lines": sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files),
        "code_lines": sum(len(code_lines(p.read_text(encoding="utf-8"))) for p in files),
        "dependencies": sum(1 for line in requirements if line.strip() and not line.startswith("#")),
    }


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold Python other than a docstring: the reader's load."""
    tree = ast.parse(text)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return {n for n, line in lines if line.strip() and not line.lstrip().startswith("#") and n not in docstrings}
