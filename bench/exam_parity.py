"""Every decision of an exam here and in nanochat's own code, with the same weights, tokenizer and questions."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.compare import check_checkout, write_model
from jaxchat.chat import render_prompt
from jaxchat.config import Config
from jaxchat.data.sources import read_records
from jaxchat.engine.scoring import Scorer
from jaxchat.errors import UsageError
from jaxchat.tasks import core, get_task
from jaxchat.tasks.base import TaskFiles
from jaxchat.tasks.choice import LETTERS, MMLU, csv_rows
from jaxchat.tokenizer import Tokenizer
from train.evaluate import capped

WORKER = Path(__file__).with_name("nanochat_exams.py")
CORE = ("copa", "openbook_qa", "winograd", "winogrande", "lambada_openai", "bigbench_operators", "arc_easy", "boolq")
CHAT = ("mmlu", "arc_easy", "arc_challenge")


def compare(
    config: Config, params: Any, tokenizer: Tokenizer, data: str, directory: Path, python: str, limit: int
) -> dict[str, Any]:
    """Decisions that agree, by exam; prompts are not cropped, as in nanochat."""
    check_checkout(directory, "core_eval.py")
    files, scorer = TaskFiles(data), Scorer(config.model, params, context=0)
    ours: dict[str, list[Any]] = {}
    right: dict[str, int] = {}
    asked: dict[str, Any] = {}
    left_out: list[str] = []
    for task in (t for t in core.CORE_TASKS if t.label in CORE):
        name, items = f"core {task.label}", core.Core(files).load(task)[:limit]
        groups = core.groups(task, items, tokenizer, range(len(items)))
        if max(len(span.tokens) for group in groups for span in group) > 10 * config.model.seq_len:
            left_out.append(name)  # nanochat's rotary tables end there
            continue
        scores = scorer.spans(groups)
        ours[name] = [core.decide(task, i, s)[1] for i, s in zip(items, scores, strict=True)]
        right[name] = sum(ours[name])
        path = str(files.find((f"core/{task.data}", f"**/{task.data}"))[0].resolve())
        asked[name] = {
            "path": path,
            "kind": task.kind,
            "shots": task.shots,
            "delimiter": task.delimiter,
            "limit": limit,
        }
    for exam in CHAT:
        name = f"chat {exam}"
        examples = get_task(exam, files).examples()  # type: ignore[attr-defined]
        chosen = capped(len(examples), limit)
        examples = [examples[i] for i in chosen]
        prompts = [render_prompt(tokenizer, e.prompt) for e in examples]
        logits, _ = scorer.letters(prompts, [[tokenizer.encode(x)[0] for x in e.letters] for e in examples])
        ours[name] = [e.letters[row.index(max(row))] for e, row in zip(examples, logits, strict=True)]
        right[name] = sum(a == e.letters[e.right] for a, e in zip(ours[name], examples, strict=True))
        rows = published_rows(exam, files)
        asked[name] = {"exam": exam, "rows": [rows[i] for i in chosen]}
    theirs = _ask(config, params, tokenizer, asked, directory, python)
    compared = {
        name: {
            "asked": len(found),
            "agree": sum(a == b for a, b in zip(found, theirs[name], strict=True)),
            "right": right[name],
        }
        for name, found in ours.items()
    }
    return {
        "compared": compared,
        "decisions": sum(found["asked"] for found in compared.values()),
        "agree": sum(found["agree"] for found in compared.values()),
        "left_out": left_out,
        "shapes": sorted(scorer.shapes),
    }


def published_rows(exam: str, files: TaskFiles) -> list[dict[str, Any]]:
    """The questions as their publishers' tables have them, which is what nanochat reads."""
    if exam == "mmlu":
        paths = MMLU(files).paths("test")
        return [row for path in paths for _, row in (csv_rows if path.suffix == ".csv" else read_records)(path)]
    return [
        {
            "question": row["query"].removeprefix("Question: "),
            "choices": {"text": row["choices"], "label": list(LETTERS[: len(row["choices"])])},
            "answerKey": LETTERS[row["gold"]],
        }
        for _, row in read_records(files.find((f"core/{exam}.jsonl", f"**/{exam}.jsonl"))[0])
    ]


def _ask(
    config: Config, params: Any, tokenizer: Tokenizer, asked: dict[str, Any], directory: Path, python: str
) -> dict[str, list[Any]]:
    """nanochat's decisions by exam."""
    with tempfile.TemporaryDirectory() as folder:
        settings = write_model(config, params, tokenizer, Path(folder), directory) | {"asked": asked}
        (Path(folder) / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        done = subprocess.run(
            [python, str(WORKER), f"{folder}/settings.json"], cwd=directory, capture_output=True, text=True
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UsageError(
            f"nanochat ended with code {done.returncode}: {last}; --python names an interpreter with torch"
        )
    return json.loads(done.stdout.splitlines()[-1])
