"""Examine trained models: scores in `eval/<stage>.json`, and samples from before and after each stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxchat import distributed
from jaxchat import model as gpt
from jaxchat.chat import render_prompt
from jaxchat.checkpoint import params_sha256, trained_params
from jaxchat.config import Config, MeshConfig
from jaxchat.data.packing import Rows
from jaxchat.data.sources import iterate_documents
from jaxchat.engine import Engine, Request, Result
from jaxchat.engine.loading import batch_rows
from jaxchat.engine.scoring import Scorer
from jaxchat.errors import DataError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, atomic_write, read_json, write_json
from jaxchat.sharding import batch_devices, make_mesh, replicated
from jaxchat.tasks import core
from jaxchat.tasks.base import (
    ChoiceExample,
    ChoiceTask,
    Example,
    MissingData,
    Task,
    TaskFiles,
    WrittenTask,
    identity_digest,
    listing,
    user,
)
from jaxchat.tasks.registry import TASKS, get_task
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import TrainState, decided, make_eval_step

from .contamination import LONG_PASSAGE, memorized
from .loop import Evaluator, bits_per_byte
from .report import bits, code, exam_table, standing
from .statistics import accuracy, passes

STAGES = ("base", "sft", "rl")
FORMAT = 1  # of `eval/<stage>.json` and `samples.json`
AUTO = "auto"  # in `eval.exams`: every task with `auto` whose data is at hand
ORDER_SEED = 42  # of the shuffle that a cap cuts; nanochat's, so that its first N questions are ours
MARK = 12  # hexadecimal digits that identify a question of an exam
COPY_TEXTS = 20  # written to measure memorization
CORE_TEXTS = 8  # rows of a batch that an item of CORE takes, with its options and the examples before it
SEED = 1234  # of samples
PROMPT_TOKENS = 8  # of a held-out text, for samples of a base model
CHAT_PROMPTS = (
    "hello",
    "who are you?",
    "how are you?",
    "Tom has 12 apples and buys 30 more. How many?",
    "what do you like to do on weekends?",
)
# Settings of `eval` that change no score
FREE = (
    "batch_rows", "sample_tokens", "sample_prompts", "sample_temperatures", "chat_prompts", "copied", "exams",
    "overlap_documents",
)  # fmt: skip

Scores = dict[str, Any]
Decisions = list[dict[str, Any]]  # one for every question


# Samples


def samples(
    engine: Engine, prompts: Sequence[str], chat: bool, max_tokens: int, temperatures: Sequence[float]
) -> list[dict[str, Any]]:
    """Answer every prompt (a base model continues it) at each temperature; the same text every time.

    Returns `{"prompt", "answers": [{"temperature", "text"}]}` each. Prompts longer than the context are left out.
    """

    def request(prompt: str, **settings: Any) -> Request:
        return engine.chat_request([user(prompt)], **settings) if chat else engine.text_request(prompt, **settings)

    prompts = [prompt for prompt in prompts if len(request(prompt).tokens) <= engine.capacity]
    requests = [
        request(prompt, max_tokens=max_tokens, temperature=temperature, seed=SEED + i)
        for i, prompt in enumerate(prompts)
        for temperature in temperatures
    ]
    results = iter(engine.generate(requests))
    return [
        {"prompt": p, "answers": [{"temperature": t, "text": shown(next(results))} for t in temperatures]}
        for p in prompts
    ]


def shown(result: Result) -> str:
    """The text of an answer with its tool calls in brackets."""
    frames = {"text": "{}", "python": "[{} =", "python_output": " {}] "}
    text = "".join(frames[part["type"]].format(part["text"]) for part in result.parts)
    text = text.rstrip("\ufffd") + " ..." if result.finish_reason == "length" else text  # cut inside a character
    return text if text.strip() else ""


def samples_markdown(turns: Sequence[dict[str, Any]]) -> str:
    """`samples` for people to read."""
    lines: list[str] = []
    for turn in turns:
        lines += [f"> {code(turn['prompt'])}", ""]
        lines += [f"- **{a['temperature']:g}**: {code(a['text']) or '(nothing)'}" for a in turn["answers"]]
        lines.append("")
    return "\n".join(lines)


def held_out_openings(rows: Rows, tokenizer: Tokenizer, count: int) -> list[str]:
    """First words of held-out texts, in whatever language they are."""
    openings = [tokenizer.decode(rows[i][0][1 : 1 + PROMPT_TOKENS].tolist()) for i in range(min(count, len(rows)))]
    return [text.lstrip("\ufffd").rstrip("\ufffd ") for text in openings]  # a cut may fall inside a character


def write_samples(model: Model, before: Any) -> None:
    """Write `samples.json` and `samples.md`: the same prompts to the model before the stage and after it."""
    config, run = model.config, model.run
    chat = model.stage != "base"
    prompts = list(config.eval.chat_prompts or CHAT_PROMPTS)
    if not chat:
        rows = Rows(run.data / "rows" / "val", verify=False)
        prompts = held_out_openings(rows, model.tokenizer, config.eval.sample_prompts)
    tokens = min(config.eval.sample_tokens, config.model.seq_len // 2)
    found: dict[str, Any] = {"format": FORMAT}
    text = [f"# Samples: {model.stage}", "", "Temperature in bold; tool calls in brackets.", ""]
    for title, params in (("Before", before), ("After", model.params)):
        model.engine.load(params)
        turns = samples(model.engine, prompts, chat, tokens, config.eval.sample_temperatures)
        found[title.lower()] = turns
        text += [f"## {title}", "", samples_markdown(turns)]
    write_json(run.stage(model.stage) / "samples.json", found)
    atomic_write(run.stage(model.stage) / "samples.md", "\n".join(text))


# Exams


class Model:
    """A model under examination. Every exam returns its scores and its decision on every question.

    It uses the devices of this process, with whole parameters on each; other processes wait.
    """

    def __init__(self, config: Config, run: RunDir, stage: str, params: Any, tokenizer: Tokenizer):
        self.config, self.run, self.stage, self.params, self.tokenizer = config, run, stage, params, tokenizer
        self.mesh = make_mesh(MeshConfig(), jax.local_devices())
        self.batch_rows = batch_rows(config.model, config.eval.batch_rows, self.mesh)

    @functools.cached_property
    def engine(self) -> Engine:
        each = max(1, self.batch_rows // self.mesh.size)
        slots = self.mesh.size << (each.bit_length() - 1)
        return Engine(self.config.model, self.params, self.tokenizer, slots=slots, mesh=self.mesh)

    @functools.cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.config.model, self.params, self.mesh, self.batch_rows)

    def exam(self, task: Task, indices: Sequence[int]) -> tuple[Scores, Decisions]:
        """Ask the questions of those numbers."""
        if isinstance(task, WrittenTask):
            return self._written(task, indices)
        assert isinstance(task, ChoiceTask), f"{task.name} has questions of an unknown kind"
        return self._choice(task, indices)

    def _written(self, task: WrittenTask, indices: Sequence[int]) -> tuple[Scores, Decisions]:
        """Grade answers at temperature 0.

        A question longer than the context counts as wrong (`too_long`). `endless` counts truncated answers.
        """
        everything = task.examples()
        examples = [everything[i] for i in indices]
        requests = [self.engine.chat_request(e.prompt, max_tokens=task.max_tokens) for e in examples]
        fits = [len(request.tokens) <= self.engine.capacity for request in requests]
        asked = [request for request, fit in zip(requests, fits, strict=True) if fit]
        with progress(f"{self.stage} {task.name}", len(asked)) as bar:
            answers = iter(self.engine.generate(asked, lambda _: bar.advance()))
        results = [next(answers) if fit else Result([], [], "too_long", 0, 0) for fit in fits]
        right = task.grade_all(examples, [result.text for result in results])
        decisions: Decisions = [
            {"index": i, "prompt": e.prompt, "expected": e.expected, "answer": r.parts}
            | {"finish_reason": r.finish_reason, "right": ok}
            for i, e, r, ok in zip(indices, examples, results, right, strict=True)
        ]
        truncated = sum(result.finish_reason == "length" for result in results)
        scores = accuracy(right, task.chance) | {"too_long": fits.count(False), "endless": truncated}
        readings: dict[str, list[bool]] = defaultdict(list)
        for example, result in zip(examples, results, strict=True):
            for name, ok in task.readings(example, result.text).items():
                readings[name].append(ok)
        if readings:
            scores["readings"] = {name: accuracy(oks, task.chance) for name, oks in readings.items()}
        if k := self.config.eval.samples:
            drawn = iter(self._sampled(task, [e for e, fit in zip(examples, fits, strict=True) if fit], asked))
            for decision, fit in zip(decisions, fits, strict=True):
                decision["draws"] = next(drawn) if fit else [{"answer": [], "right": False}] * k
            scores["pass_at_k"] = passes([[draw["right"] for draw in d["draws"]] for d in decisions])
        if facts := task.facts():
            scores["facts"] = facts
        return scores | by_tags(examples, right, task.chance), decisions

    def _sampled(self, task: WrittenTask, examples: Sequence[Example], requests: Sequence[Request]) -> list[Decisions]:
        """`eval.samples` graded answers to each question, the same every time."""
        temperature, k = self.config.eval.temperature, self.config.eval.samples
        handles = []
        for place, request in enumerate(requests):
            seeds = [ORDER_SEED + place * k + i for i in range(k)]
            handles += self.engine.submit_group(dataclasses.replace(request, temperature=temperature), seeds)
        with progress(f"{self.stage} {task.name}, {k} samples", len(handles)) as bar:
            results = self.engine.finish(handles, lambda _: bar.advance())
        right = task.grade_all([e for e in examples for _ in range(k)], [result.text for result in results])
        graded = [{"answer": r.parts, "right": ok} for r, ok in zip(results, right, strict=True)]
        return [graded[i : i + k] for i in range(0, len(graded), k)]

    def _choice(self, task: ChoiceTask, indices: Sequence[int]) -> tuple[Scores, Decisions]:
        """Choose the letter of largest logit where the answer begins. `cropped` prompts lost their beginning."""
        everything = task.examples()
        examples = [everything[i] for i in indices]
        prompts = [render_prompt(self.tokenizer, e.prompt) for e in examples]
        letters = [[self._letter(letter) for letter in e.letters] for e in examples]
        with progress(f"{self.stage} {task.name}", len(prompts)) as bar:
            logits, cropped = self.scorer.letters(prompts, letters, bar.advance)
        chosen = [row.index(max(row)) for row in logits]
        right = [c == e.right for c, e in zip(chosen, examples, strict=True)]
        decisions: Decisions = [
            {"index": i, "question": digest([e])[:MARK], "chosen": e.letters[c], "expected": e.letters[e.right]}
            | {"right": ok}
            for i, e, c, ok in zip(indices, examples, chosen, right, strict=True)
        ]
        return accuracy(right, task.chance) | {"cropped": cropped} | by_tags(examples, right, task.chance), decisions

    def _letter(self, letter: str) -> int:
        ids = self.tokenizer.encode(letter)
        if len(ids) != 1:
            raise DataError(f"the tokenizer splits the letter {letter!r} into {len(ids)} tokens; it must be one")
        return ids[0]

    def core_task(
        self, task: core.CoreTask, items: Sequence[core.Item], count: int | None = None
    ) -> tuple[Scores, Decisions]:
        """Ask the first `count` items of one of CORE's tasks (None: all). `cropped` items do not fit the context."""
        asked = items[:count]
        decisions: Decisions = []
        cropped = 0
        with progress(f"{self.stage} core: {task.label}", len(asked)) as bar:
            for start in range(0, len(asked), core.BLOCK):
                block = range(start, min(start + core.BLOCK, len(asked)))
                groups = list(core.groups(task, items, self.tokenizer, block))
                for i, spans in zip(block, self.scorer.spans(groups), strict=True):
                    option, ok = core.decide(task, items[i], spans)
                    mark = digest([items[i]])[:MARK]
                    decisions.append({"index": i, "question": mark, "chosen": option, "right": ok})
                    cropped += any(span.cropped for span in spans)
                bar.advance(len(block))
        scores = accuracy([decision["right"] for decision in decisions], task.baseline)
        shots = min(task.shots, len(items) - 1)
        centred = core.centred(task, scores["accuracy"])
        return scores | {"centred": centred, "shots": shots, "cropped": cropped}, decisions

    def bits_per_byte(self) -> Scores:
        """Score held-out text, and held-out conversations where there are any. `n` counts rows."""
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
            if limit := min(config.eval.rows, len(rows)):
                lengths = self.tokenizer.byte_lengths()
                with progress(f"{self.stage} bits_per_byte, {kind}", None):
                    found = bits_per_byte(step, params, rows, lengths, rows_at_once, limit, self.mesh)
                scores[kind] = {"n": limit} | found
        if not scores:
            raise DataError(f"{self.run.data}: no held-out rows; run stage prepare again")
        first = next(iter(scores.values()))
        return {"metric": first["bits_per_byte"], "unit": "bits per byte"} | first | scores


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


def chat_core(tasks: dict[str, Scores]) -> float | None:
    """ChatCORE: the mean of its five exams, centred so that guessing is 0; None unless all five are there."""
    names = [name for name, task in TASKS.items() if task.chat_core]
    if not all(name in tasks for name in names):
        return None
    return sum((tasks[n]["metric"] - tasks[n]["chance"]) / (1 - tasks[n]["chance"]) for n in names) / len(names)


def capped(count: int, limit: int) -> list[int]:
    """Return the indices of the questions to ask: all in order, or the first `limit` of a fixed shuffle."""
    if limit < 0 or limit >= count:
        return list(range(count))
    return [int(i) for i in np.random.default_rng(ORDER_SEED).permutation(count)[:limit]]


def digest(questions: Iterable[Any]) -> str:
    """SHA-256 of what is asked and what is right."""
    sha256 = hashlib.sha256()
    for q in questions:
        if isinstance(q, Example):
            q = [q.prompt, q.expected]
        elif isinstance(q, ChoiceExample):
            q = [q.prompt, q.letters, q.right]
        sha256.update(json.dumps(q, sort_keys=True, default=str).encode() + b"\n")
    return sha256.hexdigest()


def by_tags(examples: Sequence[Example | ChoiceExample], right: Sequence[bool], chance: float) -> Scores:
    """The same scores for every tag's value: `{"groups": {"kind: gain": ...}}`."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for example, ok in zip(examples, right, strict=True):
        for tag, value in example.tags.items():
            groups[f"{tag}: {value}"].append(ok)
    return {"groups": {name: accuracy(oks, chance) for name, oks in sorted(groups.items())}}


# The stage


def run(config: Config, run: RunDir, one_batch: bool = False) -> dict[str, Any]:
    """Examine every stage that has a checkpoint; facts: main scores by stage and task, digest.

    An exam that is done for the same parameters, questions and settings is kept, so a killed evaluation resumes. An
    exam whose data is missing or damaged is recorded as not run, with the reason. `one_batch`: see `Examiner`.
    """
    tokenizer, before = Tokenizer.load(run.tokenizer), gpt.init_params(config.model, config.seed)
    records: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        if not any(path.name.isdigit() for path in run.stage(stage).glob("*")):
            continue
        params = trained_params(run, stage)
        examiner = Examiner(Model(config, run, stage, params, tokenizer), one_batch)
        records[stage] = examiner.examine()
        write_samples(examiner.model, before)
        before = params
    if not records:
        raise DataError(f"{run.root}: nothing to examine; train it first")
    exams = {stage: record["tasks"] for stage, record in records.items()}
    say(f"\n{exam_table({'exams': exams, 'standing': {s: standing(r) for s, r in records.items()}})}\n")
    content = json.dumps(_without_seconds(records), sort_keys=True).encode()
    scores = {stage: {name: task["metric"] for name, task in tasks.items()} for stage, tasks in exams.items()}
    return scores | {"digest": hashlib.sha256(content).hexdigest()}


def _without_seconds(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: _without_seconds(value) for key, value in record.items() if key != "seconds"}
    return record


def check(config: Config) -> None:
    """`UsageError` for an exam that does not exist or cannot be sat with these settings, before any work."""
    for task, _ in exam_tasks(config):
        task.check()


def external_inputs(config: Config) -> str:
    """Describe the external inputs: the files of `tasks.data_dir`, the identity file."""
    return listing(config.tasks.data_dir) + identity_digest(config)


def exam_tasks(config: Config) -> Iterator[tuple[Task, bool]]:
    """Yield the tasks of `eval.exams`; True for one that is left out silently where its data is not at hand."""
    seen: set[str] = set()
    for entry in config.eval.exams:
        for name in [name for name, task in TASKS.items() if task.auto] if entry == AUTO else [entry]:
            if name not in seen:
                seen.add(name)
                yield get_task(name, TaskFiles.of(config, download=entry != AUTO)), entry == AUTO


class Examiner:
    """Fills `eval/<stage>.json`, starting from what an earlier evaluation of the same model left there.

    `one_batch` asks of every exam only as many questions as run at once, twice; the seconds of the second time, in
    which nothing compiles, are `again_seconds`, and `questions` is how many the whole exam has.
    """

    def __init__(self, model: Model, one_batch: bool = False):
        self.model, self.config, self.stage, self.one_batch = model, model.config, model.stage, one_batch
        self._path = model.run.eval(model.stage)
        settings = {k: v for k, v in dataclasses.asdict(self.config.eval).items() if k not in FREE}
        inputs = settings | {"params_sha256": params_sha256(model.params), "tokenizer": model.tokenizer.digest}
        before = read_json(self._path) if self._path.exists() else {}
        if before.get("inputs") != inputs or before.get("format", 1) != FORMAT:
            before = {"tasks": {}, "core_tasks": {}}
        fresh: dict[str, Any] = {"format": FORMAT, "core": None, "core_partial": None, "chatcore": None, "not_run": {}}
        self._record: dict[str, Any] = before | fresh | {"inputs": inputs}
        self._seen: dict[str, list[str]] = {"tasks": [], "core_tasks": []}  # exams of this evaluation

    def examine(self) -> dict[str, Any]:
        """Sit the exams that have no result yet; writes the record after each, and returns it."""
        self._exam("bits_per_byte", "bits per byte", "", lambda: (self.model.bits_per_byte(), []))
        for task, optional in exam_tasks(self.config):
            if isinstance(task, core.Core) != (self.stage == "base"):
                continue
            try:
                if isinstance(task, core.Core):
                    self._core(task)
                else:
                    self._chat_exam(task)
            except DataError as error:
                if not (optional and isinstance(error, MissingData)):
                    self._not_run(task.name, str(error))
        if self.stage == "base" and self.config.eval.copied:
            self._memorization()
        else:
            self._record.pop("copied", None)
        for where, names in self._seen.items():  # without exams that are no longer asked for
            self._record[where] = {name: self._record[where][name] for name in names}
        self._record["chatcore"] = mean = chat_core(self._record["tasks"])
        if mean is not None:
            say(f"  {self.stage:<5} ChatCORE {mean:.4f}")
        write_json(self._path, self._record)
        return self._record

    def _chat_exam(self, task: Task) -> None:
        examples = task.examples()
        indices = capped(len(examples), self.config.eval.max_per_task)
        if not indices:
            raise DataError(f"{task.name} has no questions, it is only a source of conversations")
        count = len(indices)
        if self.one_batch:
            indices = indices[: max(1, self.config.eval.batch_rows)]
        asked = digest([*(examples[i] for i in indices), *task.setting()])
        self._exam(task.name, task.title or task.name, asked, lambda: self.model.exam(task, indices), count=count)

    def _core(self, task: core.Core) -> None:
        """CORE's tasks one after the other. The score is called CORE only where none is missing."""
        missing: dict[str, str] = {}
        damaged: list[str] = []
        limit, baselines = self.config.eval.max_per_task, task.baselines()
        first = max(2, self.config.eval.batch_rows // CORE_TEXTS) if self.one_batch else None
        for part in core.CORE_TASKS:
            part = dataclasses.replace(part, baseline=baselines.get(part.label, part.baseline))
            try:
                items = task.load(part)[: limit if limit >= 0 else None]
            except DataError as error:
                missing[part.label] = str(error)
                damaged += [] if isinstance(error, MissingData) else [str(error)]
                continue
            if not items:
                missing[part.label] = "no questions"
                continue
            exam = functools.partial(self.model.core_task, part, items, first)
            self._exam(part.label, part.label, digest(items), exam, "core_tasks", len(items))
        if not self._seen["core_tasks"]:
            raise MissingData(next(iter(missing.values())))
        tasks = {label: self._record["core_tasks"][label] for label in self._seen["core_tasks"]}
        summary = core_summary(tasks)
        if missing:
            self._record["core_partial"] = {"metric": summary["metric"], "tasks": len(tasks), "missing": missing}
            title = f"core_partial (mean of {len(tasks)} of CORE's {len(core.CORE_TASKS)} tasks)"
            reasons = damaged or [next(iter(missing.values()))]
            self._not_run("core", f"no data of {', '.join(missing)}: {'; '.join(reasons)}")
        else:
            self._record["core"], title = summary["metric"], task.title
        name = "core_partial" if missing else "core"
        self._record["tasks"][name] = summary | {"title": title}
        self._seen["tasks"].append(name)
        say(f"  {self.stage:<5} {title} {summary['metric']:.4f}")
        write_json(self._path, self._record)

    def _exam(
        self,
        name: str,
        title: str,
        asked: str,
        exam: Callable[[], tuple[Scores, Decisions]],
        where: str = "tasks",
        count: int = 0,
    ) -> None:
        """Sit an exam, unless the record has its result for the same questions.

        `asked`: their digest. `count`: questions of the whole exam.
        """
        scores = self._record[where].get(name)
        if scores is None or scores.get("questions_sha256", "") != asked:
            begin = time.perf_counter()
            scores, decisions = exam()
            scores["seconds"] = round(time.perf_counter() - begin, 3)
            if decisions:
                lines = "".join(json.dumps(decision, ensure_ascii=False) + "\n" for decision in decisions)
                kind = "core_" if where == "core_tasks" else ""
                atomic_write(self._path.with_name(f"{self.stage}_{kind}{name}.jsonl"), lines)
            if self.one_batch:
                begin = time.perf_counter()
                exam()
                scores |= {"again_seconds": round(time.perf_counter() - begin, 3), "questions": count or scores["n"]}
            if asked:
                scores["questions_sha256"] = asked
        self._record[where][name] = scores = scores | {"title": title}
        self._seen[where].append(name)
        write_json(self._path, self._record)
        say(f"  {self.stage:<5} {name:<14} {_line(scores)}")

    def _not_run(self, name: str, why: str) -> None:
        self._record["not_run"][name] = why
        say(f"  {self.stage:<5} {name:<14} not run: {why}", style="yellow")
        write_json(self._path, self._record)

    def _memorization(self) -> None:
        """Passages that the model's own texts share with the training text."""
        limit, found = self.config.eval.overlap_documents, self._record.get("copied")
        if found is None or found["most"] != limit:
            engine, rows = self.model.engine, Rows(self.model.run.data / "rows" / "val", verify=False)
            openings = held_out_openings(rows, self.model.tokenizer, COPY_TEXTS)
            requests = [
                engine.text_request(text, temperature=0.8, seed=SEED + i, stop=()) for i, text in enumerate(openings)
            ]
            texts = [result.text for result in engine.generate(requests)]
            documents = itertools.islice(iterate_documents(self.config.data, "train"), limit if limit >= 0 else None)
            found = memorized(texts, documents) | {"most": limit}
        self._record["copied"] = found
        say(
            f"  {self.stage:<5} {'copied':<14} the longest memorized passage has {found['longest']:,} characters; "
            f"{found['share']:.1%} of {found['texts']} texts is in passages of {LONG_PASSAGE} bytes and more "
            f"({found['documents']:,} documents searched)"
        )


def _line(scores: Scores) -> str:
    if "accuracy" in scores or "centred" in scores:
        low, high = scores["interval"]
        beside = "".join(f", {name} {found['metric']:.1%}" for name, found in scores.get("readings", {}).items())
        cropped = f", {scores['cropped']} cropped" if scores.get("cropped") else ""
        return f"{scores['metric']:.1%} of {scores['n']} (95 %: {low:.1%} to {high:.1%}){beside}{cropped}"
    return f"{bits(scores)}  perplexity {scores['perplexity']:.1f} on {scores['n']} rows"


def spot_checks(config: Config, run: RunDir, tokenizer: Tokenizer, stage: str, cases: int) -> list[Evaluator]:
    """An evaluator that asks `cases` questions of every exam while a model trains: a curve, not a score to report.

    It yields `exam/NAME` for the exams of `eval.exams` whose data is at hand, and `chatcore` where its five are among
    them. An exam without data is reported once. None for 0 cases.
    """
    without_data: set[str] = set()

    def evaluate(state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        params = jax.tree.map(distributed.gathered, state.params)

        def work() -> dict[str, float]:
            model, scores = Model(config, run, stage, params, tokenizer), dict[str, Scores]()
            for task, optional in exam_tasks(config):
                try:
                    if task.name not in without_data and (indices := capped(len(task.examples()), cases)):
                        scores[task.name] = model.exam(task, indices)[0]
                except DataError as error:
                    without_data.add(task.name)
                    if not (optional and isinstance(error, MissingData)):
                        say(f"  {task.name} is not asked during training: {error}", style="yellow")
            mean = chat_core(scores)
            found = {f"exam/{name}": score["metric"] for name, score in scores.items()}
            return found | ({} if mean is None else {"chatcore": mean})

        yield from distributed.on_first(work).items()

    return [evaluate] if cases else []
