"""One exam of one model: questions in, scores with counts and intervals out, every decision kept beside them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxchat.config import Config, MeshConfig
from jaxchat.data.rows import Rows
from jaxchat.engine import Engine, Request, Result
from jaxchat.engine.loading import batch_rows
from jaxchat.engine.scoring import Scorer
from jaxchat.errors import DataError
from jaxchat.log import progress
from jaxchat.mesh import batch_devices, make_mesh, replicated
from jaxchat.paths import RunDir, atomic_write
from jaxchat.scores import make_eval_step
from jaxchat.state import decided
from jaxchat.tasks import core
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Example, WrittenTask
from jaxchat.text.chat import render_prompt
from jaxchat.text.tokenizer import Tokenizer
from train.bpb import bits_per_byte
from train.shares import accuracy, passes

ORDER_SEED = 42  # of the questions that a cap leaves; nanochat's, so that its first N are ours
MARK = 12  # hexadecimal digits that stand for a question among those of its exam

Scores = dict[str, Any]


class Model:
    """A model under examination, with the engine that writes and the scorer that reads, each made when first needed."""

    def __init__(self, config: Config, run: RunDir, stage: str, params: Any, tokenizer: Tokenizer):
        self.config, self.run, self.stage, self.params, self.tokenizer = config, run, stage, params, tokenizer

    @functools.cached_property
    def engine(self) -> Engine:
        each = max(1, self.batch_rows // self.mesh.size)
        slots = self.mesh.size << (each.bit_length() - 1)
        return Engine(self.config.model, self.params, self.tokenizer, slots=slots, mesh=self.mesh)

    @functools.cached_property
    def batch_rows(self) -> int:
        return batch_rows(self.config.model, self.config.eval.batch_rows, self.mesh)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """This process's devices, whole parameters on each; other processes wait."""
        return make_mesh(MeshConfig(), jax.local_devices())

    @functools.cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.config.model, self.params, self.mesh, self.batch_rows)

    def keep(self, name: str, decisions: Iterable[dict[str, Any]]) -> None:
        """Write `eval/<stage>_<name>.jsonl`, an object for every question."""
        lines = "".join(json.dumps(decision, ensure_ascii=False) + "\n" for decision in decisions)
        atomic_write(self.run.eval(self.stage).with_name(f"{self.stage}_{name}.jsonl"), lines)

    def bits_per_byte(self) -> Scores:
        """On held-out text, and on held-out conversations where there are any. `n` counts rows."""
        config, devices = self.config, batch_devices(self.mesh)
        rows_at_once = -(-self.batch_rows // devices) * devices
        step = make_eval_step(decided(config, self.mesh), self.mesh)
        params = jax.device_put(self.params, replicated(self.mesh))
        scores: Scores = {}
        for kind, folder in (("text", "rows/val"), ("conversations", "sft/val")):
            directory = self.run.data / folder
            if not (directory / "meta.json").exists():
                continue
            rows = Rows(directory, self.tokenizer.digest)
            if len(rows) == 0:
                continue
            limit, lengths = min(config.eval.rows, len(rows)), self.tokenizer.byte_lengths()
            with progress(f"{self.stage} bits_per_byte, {kind}", None):
                found = bits_per_byte(step, params, rows, lengths, rows_at_once, limit, self.mesh)
            scores[kind] = {"n": limit} | found
        if not scores:
            raise DataError(f"{self.run.data}: no held-out rows; run stage prepare again")
        first = next(iter(scores.values()))
        return {"metric": first["bits_per_byte"], "unit": "bits per byte"} | first | scores

    def written(self, task: WrittenTask, indices: Sequence[int]) -> Scores:
        """Answers at temperature 0, all slots full.

        A question that is longer than the context counts as wrong; `too_long` says how many there are. `endless` counts
        the answers that were cut off at their greatest length.
        """
        everything = task.examples()
        examples = [everything[i] for i in indices]
        requests = [self.engine.chat_request(e.prompt, max_tokens=task.max_tokens) for e in examples]
        fitting = [len(request.tokens) <= self.engine.capacity for request in requests]
        asked = [request for request, fits in zip(requests, fitting, strict=True) if fits]
        with progress(f"{self.stage} {task.name}", len(asked)) as bar:
            made = self.engine.generate(asked, lambda _: bar.advance())
        answered = iter(made)
        nothing = Result([], [], "too_long", 0, 0)
        results = [next(answered) if fits else nothing for fits in fitting]
        right = task.grade_all(examples, [result.text for result in results])
        draws: list[list[Scores]] = []
        if k := self.config.eval.samples:
            drawn = iter(self._draws(task, [e for e, fits in zip(examples, fitting, strict=True) if fits], asked))
            draws = [next(drawn) if fits else [{"answer": [], "right": False}] * k for fits in fitting]
        readings: dict[str, list[bool]] = defaultdict(list)
        for example, result in zip(examples, results, strict=True):
            for name, ok in task.readings(example, result.text).items():
                readings[name].append(ok)
        self.keep(
            task.name,
            (
                {"index": i, "prompt": e.prompt, "expected": e.expected, "answer": r.parts}
                | {"finish_reason": r.finish_reason, "right": ok}
                | ({"draws": draws[place]} if draws else {})
                for place, (i, e, r, ok) in enumerate(zip(indices, examples, results, right, strict=True))
            ),
        )
        endless = sum(result.finish_reason == "length" for result in results)
        scores = accuracy(right, task.chance) | {"too_long": fitting.count(False), "endless": endless}
        if readings:
            scores["readings"] = {name: accuracy(oks, task.chance) for name, oks in readings.items()}
        if draws:
            scores["pass_at_k"] = passes([[draw["right"] for draw in group] for group in draws])
        if found := task.facts():
            scores["facts"] = found
        return scores | by_tags(examples, right, task.chance)

    def _draws(self, task: WrittenTask, examples: Sequence[Example], requests: Sequence[Request]) -> list[list[Scores]]:
        """`eval.samples` answers to each question with their grades, the same every time."""
        temperature, k = self.config.eval.temperature, self.config.eval.samples
        handles = []
        for place, request in enumerate(requests):
            seeds = [ORDER_SEED + place * k + i for i in range(k)]
            handles += self.engine.submit_group(dataclasses.replace(request, temperature=temperature), seeds)
        with progress(f"{self.stage} {task.name}, {k} draws", len(handles)) as bar:
            results = self.engine.finish(handles, lambda _: bar.advance())
        right = task.grade_all([e for e in examples for _ in range(k)], [result.text for result in results])
        found = [{"answer": r.parts, "right": ok} for r, ok in zip(results, right, strict=True)]
        return [found[i : i + k] for i in range(0, len(found), k)]

    def choice(self, task: ChoiceTask, indices: Sequence[int]) -> Scores:
        """The letter of largest logit where the answer begins. `cropped` prompts are longer than the context and lost
        their beginning."""
        everything = task.examples()
        examples = [everything[i] for i in indices]
        marks = [digest([e])[:MARK] for e in examples]
        prompts = [render_prompt(self.tokenizer, e.prompt) for e in examples]
        letters = [[self._letter(letter) for letter in e.letters] for e in examples]
        with progress(f"{self.stage} {task.name}", len(prompts)) as bar:
            logits, cropped = self.scorer.letters(prompts, letters, bar.advance)
        chosen = [row.index(max(row)) for row in logits]
        right = [c == e.right for c, e in zip(chosen, examples, strict=True)]
        self.keep(
            task.name,
            (
                {"index": i, "question": mark, "chosen": e.letters[c], "expected": e.letters[e.right], "right": ok}
                for i, mark, e, c, ok in zip(indices, marks, examples, chosen, right, strict=True)
            ),
        )
        return accuracy(right, task.chance) | {"cropped": cropped} | by_tags(examples, right, task.chance)

    def _letter(self, letter: str) -> int:
        ids = self.tokenizer.encode(letter)
        if len(ids) != 1:
            raise DataError(
                f"the tokenizer splits the letter {letter!r} into {len(ids)} tokens, so no logit stands for it"
            )
        return ids[0]

    def core_task(self, task: core.CoreTask, items: Sequence[core.Item], count: int | None = None) -> Scores:
        """One of CORE's tasks; `items` after the cap, of which the first `count` are asked (None: all).

        `cropped` counts items with a text longer than the context.
        """
        asked = items[:count]
        chosen: list[int] = []
        right: list[bool] = []
        cropped = 0
        with progress(f"{self.stage} core: {task.label}", len(asked)) as bar:
            for start in range(0, len(asked), core.BLOCK):
                block = range(start, min(start + core.BLOCK, len(asked)))
                groups = list(core.groups(task, items, self.tokenizer, block))
                for index, scores in zip(block, self.scorer.spans(groups), strict=True):
                    option, ok = core.decide(task, items[index], scores)
                    chosen.append(option)
                    right.append(ok)
                    cropped += any(score.cropped for score in scores)
                bar.advance(len(block))
        self.keep(
            f"core_{task.label}",
            (
                {"index": i, "question": digest([item])[:MARK], "chosen": c, "right": ok}
                for i, (item, c, ok) in enumerate(zip(asked, chosen, right, strict=True))
            ),
        )
        found = accuracy(right, task.baseline)
        return found | {
            "centred": core.centred(task, found["accuracy"]),
            "shots": min(task.shots, len(items) - 1),
            "cropped": cropped,
        }


def core_summary(tasks: dict[str, Scores]) -> Scores:
    """The mean of the centred accuracies of CORE's tasks, by label; the interval adds up those of the tasks."""
    means = [task["centred"] for task in tasks.values()]
    half = math.sqrt(sum(((t["interval"][1] - t["interval"][0]) / 2 / (1 - t["chance"])) ** 2 for t in tasks.values()))
    metric = sum(means) / len(means)
    return {
        "metric": metric,
        "n": sum(task["n"] for task in tasks.values()),
        "seconds": round(sum(task["seconds"] for task in tasks.values()), 3),
        "interval": (metric - half / len(means), metric + half / len(means)),
        "chance": 0.0,
        "groups": tasks,
    }


def capped(count: int, limit: int) -> list[int]:
    """Which of `count` questions are asked: all in their order, or the first `limit` of a fixed shuffle."""
    if limit < 0 or limit >= count:
        return list(range(count))
    return [int(i) for i in np.random.default_rng(ORDER_SEED).permutation(count)[:limit]]


def digest(questions: Iterable[Any]) -> str:
    """SHA-256 of what is asked and what is right."""
    found = hashlib.sha256()
    for q in questions:
        if isinstance(q, Example):
            q = [q.prompt, q.expected]
        elif isinstance(q, ChoiceExample):
            q = [q.prompt, q.letters, q.right]
        found.update(json.dumps(q, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def by_tags(examples: Sequence[Example | ChoiceExample], right: Sequence[bool], chance: float) -> Scores:
    """The same scores for every tag's value: `{"groups": {"kind: gain": ...}}`."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for example, ok in zip(examples, right, strict=True):
        for tag, value in example.tags.items():
            groups[f"{tag}: {value}"].append(ok)
    return {"groups": {name: accuracy(oks, chance) for name, oks in sorted(groups.items())}}
