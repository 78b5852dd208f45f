"""The report card: `report.md` for people, `report.json` with every number of it, and the curves."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from statistics import median
from typing import Any

from jaxchat.config import Config, flatten
from jaxchat.log import read_metrics, say
from jaxchat.paths import RunDir, atomic_write, read_json, write_json
from train.plots import loss_plot
from train.report_plots import dynamics_plot
from train.report_text import STAGE_TITLES, markdown

ROOT = Path(__file__).resolve().parent.parent
MODEL_KEYS = ("recipe", "depth", "width", "n_heads", "n_kv_heads", "head_width", "seq_len", "vocab_size")
CURVE_POINTS = 500  # of one curve in report.json, at most; metrics.jsonl has them all
PRIVATE = ("serve.",)  # a card is there to be shown around; these keys hold addresses and API keys


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write the card from the records of the run; facts: its digest."""
    metrics = {stage: read_metrics(run.stage(stage) / "metrics.jsonl") for stage in STAGE_TITLES}
    card = collect(config, run, metrics)
    card["plots"] = _plots(run, metrics)
    write_json(run.root / "report.json", card)
    text = markdown(card, {stage: _samples(run, stage) for stage in STAGE_TITLES})
    atomic_write(run.report, text)
    say(f"  {run.report}")
    return {"digest": hashlib.sha256(text.encode()).hexdigest()}


def collect(config: Config, run: RunDir, metrics: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every number of the card, from `stages.json`, the metrics and the exams; parts that do not exist are left out."""
    records = {name: r for name, r in read_json(run.stages).items() if r["status"] == "done" and name != "report"}
    exams = {stage: read_json(run.eval(stage))["tasks"] for stage in STAGE_TITLES if run.eval(stage).exists()}
    facts = {name: record["facts"] for name, record in records.items()}
    seconds = {name: _seconds(record) for name, record in records.items()}
    pretrain = facts.get("pretrain", {})
    return {
        "tier": config.tier,
        "date": max((record["end"] for record in records.values()), default=None),
        "machines": _alike(records, "hardware"),
        "versions": _alike(records, "versions"),
        "commits": _alike(records, "commit"),
        "seed": config.seed,
        "config": {key: value for key, value in flatten(config).items() if not key.startswith(PRIVATE)},
        "model": {key: getattr(config.model, key) for key in MODEL_KEYS},
        "optimizer": {key: getattr(config.optim, key) for key in ("kind", "lr_scale", "matrix_lr", "weight_decay")},
        "tokenizer": facts.get("tokenizer", {}),
        "data": {"source": config.data.source} | facts.get("prepare", {}),
        "corpus_share": min(1.0, pretrain["epochs"]) if pretrain else None,
        "pretrain": pretrain,
        "sft": facts.get("sft", {}),
        "speed": {stage: _speed(steps) for stage, steps in metrics.items() if steps},
        "exams": exams,
        "curves": {stage: _curve(steps) for stage, steps in metrics.items() if steps},
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "peak_memory_bytes": max((r["peak_rss_bytes"] for r in records.values() if r.get("peak_rss_bytes")), default=0),
        "code": code_size(),
    }


def _seconds(record: dict[str, Any]) -> float:
    """Wall clock of a stage. A killed process leaves no record of its time, but the checkpoints have the training's."""
    facts = record["facts"]
    return max(record["seconds"], facts.get("seconds", 0.0) + facts.get("eval_seconds", 0.0))


def _alike(records: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """[{"stages": [...], "value": ...}]: what the stages ran on or with, those with the same value together."""
    groups: list[dict[str, Any]] = []
    for name, record in records.items():
        group = next((g for g in groups if g["value"] == record[key]), None)
        if group is None:
            groups.append(group := {"stages": [], "value": record[key]})
        group["stages"].append(name)
    return groups


def _speed(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps, and the mean, compiling included; `mfu` is null where the device's peak is unknown."""
    known = [r["mfu"] for r in steps if r["mfu"] is not None]
    return {
        "steps": len(steps),
        "tokens_per_second": median(r["tokens_per_second"] for r in steps),
        "mean_tokens_per_second": steps[-1]["tokens"] / max(sum(r["step_seconds"] for r in steps), 1e-9),
        "step_seconds": median(r["step_seconds"] for r in steps),
        "first_step_seconds": steps[0]["step_seconds"],
        "mfu": median(known) if known else None,
    }


def _curve(steps: list[dict[str, Any]]) -> dict[str, Any]:
    stride = -(-len(steps) // CURVE_POINTS)
    chosen = [*steps[:-1:stride], steps[-1]]
    return {
        "loss": [[r["tokens"], r["loss"]] for r in chosen],
        "val_bpb": [[r["tokens"], r["val_bpb"]] for r in steps if "val_bpb" in r],
    }


def _plots(run: RunDir, metrics: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Draw `plots/`; paths inside the run directory, by stage."""
    drawn: dict[str, list[str]] = {}
    run.plots.mkdir(parents=True, exist_ok=True)
    for stage, steps in metrics.items():
        if not any(record["loss"] is not None for record in steps):
            continue
        loss, dynamics = (run.plots / f"{stage}_{name}.png" for name in ("loss", "dynamics"))
        loss_plot(run.stage(stage) / "metrics.jsonl", loss, STAGE_TITLES[stage])
        dynamics_plot(steps, dynamics, STAGE_TITLES[stage])
        drawn[stage] = [path.relative_to(run.root).as_posix() for path in (loss, dynamics)]
    return drawn


def _samples(run: RunDir, stage: str) -> str:
    """`samples.md` of a stage, empty where there is none; a carriage return in a sample must not end its line."""
    path = run.stage(stage) / "samples.md"
    return path.read_bytes().decode("utf-8").replace("\r", " ") if path.exists() else ""


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
