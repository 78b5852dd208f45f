"""The exams: every trained model's scores in `eval/<stage>.json`, and samples from before and after each stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from jaxchat.checkpoint import params_sha256, restore_params
from jaxchat.config import Config, MeshConfig
from jaxchat.data.rows import Rows
from jaxchat.engine import Engine, Result
from jaxchat.errors import DataError
from jaxchat.log import progress, say
from jaxchat.mesh import batch_devices, make_mesh, replicated
from jaxchat.model import gpt
from jaxchat.paths import RunDir, atomic_write, read_json, write_json
from jaxchat.state import make_eval_step
from jaxchat.tasks.base import Task, WrittenTask
from jaxchat.tasks.registry import get_task
from jaxchat.text.tokenizer import Tokenizer
from train.bpb import bits_per_byte
from train.samples import CHAT_PROMPTS, held_out_openings, samples

CHAT_EXAMS = ("word_problems", "identity")
STAGES = {"base": (), "sft": CHAT_EXAMS}  # trained stage -> its written exams, besides bits per byte
Z95 = 1.959963984540054  # standard deviations on each side of a 95 % interval

Scores = dict[str, Any]


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Examine every stage that has a checkpoint; facts: headline numbers by stage and task, digest.

    An exam that is done for the same parameters and settings is kept, so a killed evaluation goes on where it was.
    """
    tokenizer = Tokenizer.load(run.tokenizer)
    found: dict[str, dict[str, Scores]] = {}
    before = gpt.init_params(config.model, config.seed)
    for stage, exams in STAGES.items():
        if not any(p.name.isdigit() for p in run.stage(stage).glob("*")):
            continue
        params, _ = restore_params(run.stage(stage))
        examiner = Examiner(config, run, stage, params, tokenizer)
        found[stage] = examiner.examine(exams)
        write_samples(examiner, before)
        before = params
    if not found:
        raise DataError(f"{run.root}: nothing to examine; train it first")
    facts = {stage: {name: scores["metric"] for name, scores in tasks.items()} for stage, tasks in found.items()}
    return facts | {
        "digest": hashlib.sha256(
            json.dumps([facts, dataclasses.asdict(config.eval)], sort_keys=True).encode()
        ).hexdigest()
    }


class Examiner:
    """One model and its record of scores."""

    def __init__(self, config: Config, run: RunDir, stage: str, params: Any, tokenizer: Tokenizer):
        self.config, self.run, self.stage, self.params, self.tokenizer = config, run, stage, params, tokenizer
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """Made at the first exam that writes."""
        if self._engine is None:
            self._engine = self.engine_of(self.params)
        return self._engine

    def engine_of(self, params: Any) -> Engine:
        slots = 1 << (max(1, self.config.eval.batch_rows).bit_length() - 1)
        return Engine(self.config.model, params, self.tokenizer, slots=slots)

    def examine(self, exams: tuple[str, ...]) -> dict[str, Scores]:
        """All scores by task, from the record where they are there; writes the record after every exam."""
        path, inputs = self.run.eval(self.stage), self._inputs()
        record = read_json(path) if path.exists() else {}
        tasks = record.get("tasks", {}) if record.get("inputs") == inputs else {}
        todo: dict[str, Callable[[], Scores]] = {"bits_per_byte": self.bits_per_byte}
        todo |= {name: functools.partial(self.written, get_task(name)) for name in exams}
        for name, exam in todo.items():
            if name not in tasks:
                begin = time.perf_counter()
                scores = exam()
                tasks[name] = scores | {"seconds": round(time.perf_counter() - begin, 3)}
                write_json(path, {"tasks": tasks, "core": None, "chatcore": None, "inputs": inputs})
            say(f"  {self.stage:<5} {name:<14} {_line(tasks[name])}")
        return tasks

    def bits_per_byte(self) -> Scores:
        """On held-out text, and on held-out conversations where there are any. `n` counts rows."""
        mesh = make_mesh(MeshConfig(), jax.local_devices())  # whole parameters on each; other processes wait
        batch_rows = -(-self.config.eval.batch_rows // batch_devices(mesh)) * batch_devices(mesh)
        step = make_eval_step(self.config, mesh)
        params = jax.device_put(self.params, replicated(mesh))
        scores: Scores = {}
        for kind, folder in (("text", "rows/val"), ("conversations", "sft/val")):
            directory = self.run.data / folder
            if not (directory / "meta.json").exists():
                continue
            rows = Rows(directory, self.tokenizer.digest)
            if len(rows) == 0:
                continue
            limit, lengths = min(self.config.eval.rows, len(rows)), self.tokenizer.byte_lengths()
            found = bits_per_byte(step, params, rows, lengths, batch_rows, limit, mesh)
            scores[kind] = {"n": limit} | found
        if not scores:
            raise DataError(f"{self.run.data}: no held-out rows; run stage prepare again")
        first = next(iter(scores.values()))
        return {"metric": first["bits_per_byte"], "unit": "bits per byte"} | first | scores

    def written(self, task: Task) -> Scores:
        """Answers at temperature 0, all slots full; every answer is kept beside the scores.

        A question that is longer than the context counts as wrong; `too_long` says how many there are.
        """
        assert isinstance(task, WrittenTask)
        limit = self.config.eval.max_per_task
        examples = list(task.examples())[: limit if limit >= 0 else None]
        requests = [self.engine.chat_request(e.prompt, max_tokens=task.max_tokens) for e in examples]
        fitting = [len(request.tokens) <= self.engine.capacity for request in requests]
        with progress(f"{self.stage} {task.name}", sum(fitting)) as bar:
            made = self.engine.generate(
                [request for request, fits in zip(requests, fitting, strict=True) if fits], lambda _: bar.advance()
            )
        answered = iter(made)
        nothing = Result([], [], "too_long", 0, 0)
        results = [next(answered) if fits else nothing for fits in fitting]
        right = task.grade_all(examples, [result.text for result in results])
        groups: dict[str, list[bool]] = defaultdict(list)
        for example, ok in zip(examples, right, strict=True):
            for tag, value in example.tags.items():
                groups[f"{tag}: {value}"].append(ok)
        answers = [
            {
                "prompt": e.prompt,
                "expected": e.expected,
                "answer": r.parts,
                "finish_reason": r.finish_reason,
                "right": ok,
            }
            for e, r, ok in zip(examples, results, right, strict=True)
        ]
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        atomic_write(self.run.eval(self.stage).with_name(f"{self.stage}_{task.name}.jsonl"), lines)
        scores = accuracy(right) | {"too_long": fitting.count(False)}
        return scores | {"groups": {name: accuracy(oks) for name, oks in sorted(groups.items())}}

    def _inputs(self) -> dict[str, Any]:
        """What the scores depend on."""
        settings = {k: v for k, v in dataclasses.asdict(self.config.eval).items() if k != "sample_tokens"}
        return settings | {"params_sha256": params_sha256(self.params), "tokenizer": self.tokenizer.digest}


def accuracy(right: list[bool]) -> Scores:
    """Share of right answers with its 95 % interval; all these exams have chance level 0."""
    share = sum(right) / len(right) if right else 0.0
    return {
        "metric": share,
        "accuracy": share,
        "n": len(right),
        "right": sum(right),
        "interval": wilson(sum(right), len(right)),
        "chance": 0.0,
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval, 1927); (0, 1) where nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def write_samples(examiner: Examiner, before: Any) -> None:
    """`samples.md` of a stage: the same prompts to the model the stage began with and the one it made."""
    run, stage, config = examiner.run, examiner.stage, examiner.config
    chat = stage != "base"
    if chat:
        prompts = list(CHAT_PROMPTS)
    else:
        prompts = held_out_openings(Rows(run.data / "rows" / "val", verify=False), examiner.tokenizer)
    tokens = min(config.eval.sample_tokens, config.model.seq_len // 2)
    text = [f"# Samples: {stage}", "", "Temperature in bold; tool calls in brackets.", ""]
    for title, engine in (("Before", examiner.engine_of(before)), ("After", examiner.engine)):
        text += [f"## {title}", "", samples(engine, prompts, chat, tokens)]
    atomic_write(run.stage(stage) / "samples.md", "\n".join(text))


def _line(scores: Scores) -> str:
    if "interval" in scores:
        low, high = scores["interval"]
        return f"{scores['metric']:.1%} of {scores['n']} (95 %: {low:.1%} to {high:.1%})"
    return f"{scores['metric']:.4f}  perplexity {scores['perplexity']:.1f} on {scores['n']} rows"
