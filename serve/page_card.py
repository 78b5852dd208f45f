"""The model's card beside the chat: size, training time, exam scores, as far as the run has them."""

from __future__ import annotations

import datetime
import html
from pathlib import Path
from typing import Any

from jaxchat.config import Config
from jaxchat.engine.loading import trained_stages
from jaxchat.errors import DataError
from jaxchat.model.sizes import count_parameters
from jaxchat.paths import RunDir, read_json

TRAINING = ("pretrain", "sft", "rl")
TOGETHER = ("core", "chatcore")  # scores over many exams
PROPER = {"core": "CORE", "chatcore": "ChatCORE", "mmlu": "MMLU", "arc_easy": "ARC-Easy",
          "arc_challenge": "ARC-Challenge", "gsm8k": "GSM8K", "humaneval": "HumanEval"}  # fmt: skip


def is_base(run: RunDir) -> bool:
    """Whether the model had no SFT: it goes on with texts, and answers nothing."""
    return trained_stages(run)[0] == "base"


def model_card(run: RunDir, config: Config, words: dict[str, str]) -> str:
    """Size, training time and exam scores as HTML."""
    model = config.model
    facts = [
        ("parameters", f"{count_parameters(model).total:,}", ""),
        ("layers", str(model.depth), ""),
        ("context", f"{model.seq_len:,}", ""),
    ]
    if seconds := training_seconds(run):
        facts.append(("trained", str(datetime.timedelta(seconds=round(seconds))), ""))
    facts += exam_scores(run)
    rows = "".join(
        f"<dt>{html.escape(words.get(name, PROPER.get(name, name.replace('_', ' '))))}</dt>"
        f'<dd title="{html.escape(hint)}">{html.escape(value)}</dd>'
        for name, value, hint in facts
    )
    return f'<dl id="card">{rows}</dl>'


def training_seconds(run: RunDir) -> float:
    """Of all trained stages together; 0 where it is not known."""
    stages = saved(run.stages)
    return sum(_number(stage.get("seconds")) or 0.0 for name in TRAINING if isinstance(stage := stages.get(name), dict))


def exam_scores(run: RunDir) -> list[tuple[str, str, str]]:
    """(name, value, hint) of every exam: of the furthest stage that took it, of bits per byte the base model."""
    tasks: dict[str, Any] = {}
    together: list[tuple[str, str, str]] = []
    for stage in ("rl", "sft", "base"):
        report = saved(run.eval(stage))
        taken = report.get("tasks")
        for name, task in taken.items() if isinstance(taken, dict) else ():
            if name not in TOGETHER and (name not in tasks or name == "bits_per_byte"):
                tasks[name] = task
        for name in TOGETHER:
            if (score := _number(report.get(name))) is not None and name not in {known for known, *_ in together}:
                together.append((name, f"{score:.3f}", ""))
    facts = []
    for name, task in sorted(tasks.items()):
        metric = _number(task.get("metric")) if isinstance(task, dict) else None
        if metric is not None:
            count = task.get("n")
            hint = f"n = {count:,}" if isinstance(count, int) else ""
            facts.append((name, f"{metric:.1%}" if "accuracy" in task else f"{metric:.3f}", hint))
    return sorted(together) + facts


def saved(path: Path) -> dict[str, Any]:
    """A JSON object of the run; a missing or damaged file keeps nobody from talking."""
    try:
        content = read_json(path)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
