"""The exams: every trained model's scores in `eval/<stage>.json`, and samples from before and after each stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxchat.checkpoint import params_sha256, trained_params
from jaxchat.config import Config
from jaxchat.data.corpus import iterate_documents
from jaxchat.data.rows import Rows
from jaxchat.errors import DataError
from jaxchat.log import say
from jaxchat.model import gpt
from jaxchat.paths import RunDir, atomic_write, read_json, write_json
from jaxchat.tasks.base import ChoiceTask, Task, WrittenTask
from jaxchat.tasks.core import CORE_TASKS, Core
from jaxchat.tasks.files import MissingData, TaskFiles, identity_digest, listing
from jaxchat.tasks.humaneval import open_sandbox
from jaxchat.tasks.registry import TASKS, get_task
from jaxchat.text.tokenizer import Tokenizer
from train.copying import LONG, copied_passages
from train.exams import Model, Scores, capped, core_summary, digest
from train.report_exams import bits, exam_table, standing
from train.samples import CHAT_PROMPTS, held_out_openings, samples, written

STAGES = ("base", "sft", "rl")
FORMAT = 1  # of `eval/<stage>.json`
COPY_TEXTS = 20  # written to see what is by heart
CORE_TEXTS = 8  # that an item of CORE comes to in a batch, with its options and the examples before it
AUTO = "auto"
GENERATED = ("word_problems", "identity")  # "auto": these, and the following where their data is at hand
WITH_DATA = ("core", "mmlu", "arc_easy", "arc_challenge", "gsm8k", "humaneval")
CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")


def run(config: Config, run: RunDir, one_batch: bool = False) -> dict[str, Any]:
    """Examine every stage that has a checkpoint; facts: headline numbers by stage and task, digest.

    `one_batch`: as of an `Examiner`.

    An exam that is done for the same parameters, questions and settings is kept, so a killed evaluation goes on where
    it was. One whose data is missing or damaged is reported as not run, with the reason, and the others go on.
    """
    tokenizer = Tokenizer.load(run.tokenizer)
    found: dict[str, dict[str, Scores]] = {}
    before = gpt.init_params(config.model, config.seed)
    for stage in STAGES:
        if not any(p.name.isdigit() for p in run.stage(stage).glob("*")):
            continue
        params = trained_params(run, stage)
        examiner = Examiner(Model(config, run, stage, params, tokenizer), one_batch)
        found[stage] = examiner.examine()
        write_samples(examiner.model, before)
        before = params
    if not found:
        raise DataError(f"{run.root}: nothing to examine; train it first")
    facts = {stage: {name: scores["metric"] for name, scores in tasks.items()} for stage, tasks in found.items()}
    records = {stage: read_json(run.eval(stage)) for stage in found}
    card: dict[str, Any] = {"exams": {}, "standing": {}}
    for stage, record in records.items():
        card["exams"][stage], card["standing"][stage] = record["tasks"], standing(record)
    say(f"\n{exam_table(card)}\n")
    return facts | {"digest": hashlib.sha256(json.dumps(_timeless(records), sort_keys=True).encode()).hexdigest()}


def _timeless(record: Any) -> Any:
    """A record without its times: the same for the same answers."""
    if isinstance(record, dict):
        return {key: _timeless(value) for key, value in record.items() if key != "seconds"}
    return record


def check(config: Config) -> None:
    """`UsageError` for an exam that does not exist or a sandbox that cannot be had, before any work."""
    for name in config.eval.exams:
        if name != AUTO:
            get_task(name)
        if name in (AUTO, "humaneval") and config.tasks.sandbox == "strict":
            open_sandbox("strict")


def looks(config: Config) -> str:
    """What the exams find outside the run: the mirror's files, the identity file."""
    return listing(config.tasks.data_dir) + identity_digest(config)


def exam_tasks(config: Config) -> Iterator[tuple[Task, bool]]:
    """The tasks of `eval.exams`, and of each whether it is left out silently where its data is not at hand."""
    seen: set[str] = set()
    for entry in config.eval.exams:
        names = [*GENERATED, *(n for n in WITH_DATA if n in TASKS)] if entry == AUTO else [entry]
        for name in names:
            if name not in seen:
                seen.add(name)
                files = TaskFiles.of(config, download=entry != AUTO)
                yield get_task(name, files), entry == AUTO


def chat_core(tasks: dict[str, Scores]) -> float | None:
    """ChatCORE: the mean of its five exams, centred so that guessing is 0; None unless all five are there."""
    if not all(name in tasks for name in CHATCORE):
        return None
    centred = ((tasks[n]["metric"] - tasks[n]["chance"]) / (1 - tasks[n]["chance"]) for n in CHATCORE)
    return sum(centred) / len(CHATCORE)


class Examiner:
    """One model and its record of scores.

    `one_batch`: of every exam only as many questions as run at once, asked twice; the seconds of the second time are
    `again_seconds` (nothing compiles in them), and `questions` is how many the whole exam has.
    """

    def __init__(self, model: Model, one_batch: bool = False):
        self.model, self.config, self.stage, self.one_batch = model, model.config, model.stage, one_batch
        self._path = model.run.eval(model.stage)
        inputs = self._inputs()
        record = read_json(self._path) if self._path.exists() else {}
        if record.get("inputs") != inputs or record.get("format", 1) != FORMAT:
            record = {"tasks": {}, "core_tasks": {}, "inputs": inputs}
        self._kept: dict[str, Any] = record  # what an earlier evaluation found
        self._record: dict[str, Any] = {
            "format": FORMAT,
            "tasks": {},
            "core": None,
            "core_partial": None,
            "chatcore": None,
            "not_run": {},
        }
        self._record |= {"core_tasks": {}, "inputs": inputs}

    def examine(self) -> dict[str, Scores]:
        """All scores by task, from the record where they are there; writes the record after every exam."""
        self._exam("bits_per_byte", "", self.model.bits_per_byte)
        for task, optional in exam_tasks(self.config):
            if isinstance(task, Core) != (self.stage == "base"):
                continue
            try:
                if isinstance(task, Core):
                    self._core(task)
                else:
                    self._chat_exam(task)
            except DataError as error:
                if not (optional and isinstance(error, MissingData)):
                    self._not_run(task.name, str(error))
        if self.stage == "base" and self.config.eval.copied:
            self._copied()
        tasks = self._record["tasks"]
        if (mean := chat_core(tasks)) is not None:
            self._record["chatcore"] = mean
            say(f"  {self.stage:<5} ChatCORE {mean:.4f}")
        write_json(self._path, self._record)
        return tasks

    def _copied(self) -> None:
        """Passages that the model's own texts share with the training text."""
        limit = self.config.eval.overlap_documents
        found = self._kept.get("copied")
        if found is None or found["most"] != limit:
            rows = Rows(self.model.run.data / "rows" / "val", verify=False)
            texts = written(self.model.engine, held_out_openings(rows, self.model.tokenizer, COPY_TEXTS))
            documents = iterate_documents(self.config.data, "train")
            found = copied_passages(texts, itertools.islice(documents, limit if limit >= 0 else None)) | {"most": limit}
        self._record["copied"] = found
        say(
            f"  {self.stage:<5} {'copied':<14} the longest passage by heart has {found['longest']:,} characters; "
            f"{found['share']:.1%} of {found['texts']} texts is in passages of {LONG} bytes and more "
            f"({found['documents']:,} documents searched)"
        )
        self._write()

    def _chat_exam(self, task: Task) -> None:
        if not isinstance(task, WrittenTask | ChoiceTask):
            raise DataError(f"{task.name} is no exam, only a source of conversations")
        examples = task.examples()
        indices = capped(len(examples), self.config.eval.max_per_task)
        if not indices:
            raise DataError(f"{task.name} has no questions")
        count = len(indices)
        if self.one_batch:
            indices = indices[: max(1, self.config.eval.batch_rows)]
        exam = self.model.written if isinstance(task, WrittenTask) else self.model.choice
        asked = digest([*(examples[i] for i in indices), *task.setting()])
        self._exam(task.name, asked, functools.partial(exam, task, indices), task.damaged, count=count)  # type: ignore[arg-type]

    def _core(self, task: Core) -> None:
        """CORE's tasks one after the other; the whole only where none is missing."""
        missing: dict[str, str] = {}
        damaged: list[str] = []
        limit, baselines = self.config.eval.max_per_task, task.baselines()
        for part in CORE_TASKS:
            part = dataclasses.replace(part, baseline=baselines.get(part.label, part.baseline))
            before = len(task.damaged)
            try:
                items = task.load(part)
            except DataError as error:
                missing[part.label] = str(error)
                damaged += [] if isinstance(error, MissingData) else [str(error)]
                continue
            items = items[: limit if limit >= 0 else None]
            if not items:
                missing[part.label] = "no questions"
                continue
            first = max(2, self.config.eval.batch_rows // CORE_TEXTS) if self.one_batch else None
            exam = functools.partial(self.model.core_task, part, items, first)
            self._exam(part.label, digest(items), exam, task.damaged[before:], "core_tasks", len(items))
        tasks = self._record["core_tasks"]
        if not tasks:
            raise MissingData(next(iter(missing.values())))
        summary = core_summary(tasks)
        if missing:
            names, reasons = ", ".join(missing), damaged or [next(iter(missing.values()))]
            self._record["core_partial"] = {"metric": summary["metric"], "tasks": len(tasks), "missing": missing}
            self._record["tasks"]["core_partial"] = summary
            say(f"  {self.stage:<5} mean of {len(tasks)} of CORE's {len(CORE_TASKS)} tasks {summary['metric']:.4f}")
            self._not_run("core", f"no data of {names}: {'; '.join(reasons)}")
        else:
            self._record["core"] = summary["metric"]
            self._record["tasks"]["core"] = summary
            say(f"  {self.stage:<5} CORE {summary['metric']:.4f}")
        self._write()

    def _exam(
        self,
        name: str,
        asked: str,
        exam: Callable[[], Scores],
        damaged: Sequence[str] = (),
        where: str = "tasks",
        count: int = 0,
    ) -> None:
        """Sit an exam, unless its result for the same questions is in the record. `count`: questions of all of it."""
        if damaged:
            what = f"{len(damaged)} of its questions cannot be used and are left out: {damaged[0]}"
            say(f"  {self.stage:<5} {name:<14} {what}", style="yellow")
        scores = self._kept.get(where, {}).get(name)
        if scores is None or scores.get("questions_sha256", "") != asked:
            begin = time.perf_counter()
            scores = exam() | {"seconds": round(time.perf_counter() - begin, 3)}
            if self.one_batch:
                begin = time.perf_counter()
                exam()
                scores |= {"again_seconds": round(time.perf_counter() - begin, 3), "questions": count or scores["n"]}
            if asked:
                scores["questions_sha256"] = asked
        self._record[where][name] = scores = scores | {"damaged": len(damaged)}
        self._write()
        say(f"  {self.stage:<5} {name:<14} {_line(scores)}")

    def _not_run(self, name: str, why: str) -> None:
        self._record["not_run"][name] = why
        say(f"  {self.stage:<5} {name:<14} not run: {why}", style="yellow")
        self._write()

    def _write(self) -> None:
        """With what is kept of exams that are still to come, so that a second kill does not lose it."""
        record = dict(self._record)
        for where in ("tasks", "core_tasks"):
            record[where] = self._kept.get(where, {}) | record[where]
        write_json(self._path, record)

    def _inputs(self) -> dict[str, Any]:
        """What the scores depend on, beside the questions."""
        free = (
            "batch_rows",
            "sample_tokens",
            "sample_prompts",
            "sample_temperatures",
            "chat_prompts",
            "copied",
            "exams",
            "overlap_documents",
        )
        settings = {k: v for k, v in dataclasses.asdict(self.config.eval).items() if k not in free}
        return settings | {"params_sha256": params_sha256(self.model.params), "tokenizer": self.model.tokenizer.digest}


def write_samples(model: Model, before: Any) -> None:
    """`samples.md` of a stage: the same prompts to the model the stage began with and the one it made."""
    run, stage, config = model.run, model.stage, model.config
    chat = stage != "base"
    if chat:
        prompts = list(config.eval.chat_prompts or CHAT_PROMPTS)
    else:
        rows = Rows(run.data / "rows" / "val", verify=False)
        prompts = held_out_openings(rows, model.tokenizer, config.eval.sample_prompts)
    tokens = min(config.eval.sample_tokens, config.model.seq_len // 2)
    text = [f"# Samples: {stage}", "", "Temperature in bold; tool calls in brackets.", ""]
    for title, params in (("Before", before), ("After", model.params)):
        model.engine.load(params)
        text += [f"## {title}", "", samples(model.engine, prompts, chat, tokens, config.eval.sample_temperatures)]
    atomic_write(run.stage(stage) / "samples.md", "\n".join(text))


def _line(scores: Scores) -> str:
    if "accuracy" in scores or "centred" in scores:
        low, high = scores["interval"]
        beside = "".join(f", {name} {found['metric']:.1%}" for name, found in scores.get("readings", {}).items())
        cropped = f", {scores['cropped']} cropped" if scores.get("cropped") else ""
        return f"{scores['metric']:.1%} of {scores['n']} (95 %: {low:.1%} to {high:.1%}){beside}{cropped}"
    return f"{bits(scores)}  perplexity {scores['perplexity']:.1f} on {scores['n']} rows"
