"""A few questions of every chat exam while a model trains: a curve to watch, not a score to report."""

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

from jaxchat import distributed as hosts
from jaxchat import model as gpt
from jaxchat.chat import render_prompt
from jaxchat.checkpoint import params_sha256, trained_params
from jaxchat.config import Config, MeshConfig
from jaxchat.data.packing import Rows
from jaxchat.data.sources import iterate_documents
from jaxchat.engine import Engine, Request, Result
from jaxchat.engine.loading import batch_rows
from jaxchat.engine.scoring import Scorer
from jaxchat.engine.turn import Turn
from jaxchat.errors import DataError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, atomic_write, read_json, write_json
from jaxchat.sharding import batch_devices, make_mesh, replicated
from jaxchat.tasks import core
from jaxchat.tasks.base import ChoiceExample, ChoiceTask, Example, Task, WrittenTask
from jaxchat.tasks.core import CORE_TASKS, Core
from jaxchat.tasks.files import MissingData, TaskFiles, identity_digest, listing
from jaxchat.tasks.humaneval import open_sandbox
from jaxchat.tasks.registry import TASKS, get_task
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import TrainState, decided, make_eval_step

from .contamination import LONG_PASSAGE, copied_passages
from .loop import Evaluator, bits_per_byte
from .report import bits, code, exam_table, standing
from .statistics import accuracy, passes

# Samples for a person to read: the same prompts at temperature 0 and 0.8, as Markdown.


TEMPERATURES = (0.0, 0.8)
SEED = 1234
CHAT_PROMPTS = (
    "hello",
    "who are you?",
    "how are you?",
    "Tom has 12 apples and buys 30 more. How many?",
    "what do you like to do on weekends?",
)
PROMPT_TOKENS = 8  # of a held-out text


def samples(
    engine: Engine,
    prompts: Sequence[str],
    chat: bool,
    max_tokens: int = 64,
    temperatures: Sequence[float] = TEMPERATURES,
) -> list[dict[str, Any]]:
    """Return `{"prompt", "answers": [{"temperature", "text"}, ...]}` for every prompt; always the same.

    Answers continue the prompt, or reply to it (`chat`). Prompts that are longer than the context are left out.
    """
    prompts = [p for p in prompts if len(_request(engine, p, chat).tokens) <= engine.capacity]
    requests = [
        _request(engine, prompt, chat, max_tokens=max_tokens, temperature=temperature, seed=SEED + i)
        for i, prompt in enumerate(prompts)
        for temperature in temperatures
    ]
    results = iter(engine.generate(requests))
    return [
        {"prompt": p, "answers": [{"temperature": t, "text": shown(next(results))} for t in temperatures]}
        for p in prompts
    ]


def samples_markdown(turns: Sequence[dict[str, Any]]) -> str:
    """Return the samples as Markdown: prompts quoted, temperatures in bold."""
    lines: list[str] = []
    for turn in turns:
        lines += [quote(turn["prompt"]), ""]
        lines += [f"- **{a['temperature']:g}**: {code(a['text']) or '(nothing)'}" for a in turn["answers"]]
        lines.append("")
    return "\n".join(lines)


def written(engine: Engine, openings: Sequence[str], temperature: float = 0.8) -> list[str]:
    """What a base model goes on with after each opening, to the end of its context; always the same."""
    requests = [
        engine.text_request(text, temperature=temperature, seed=SEED + i, stop=()) for i, text in enumerate(openings)
    ]
    return [result.text for result in engine.generate(requests)]


def held_out_openings(rows: Rows, tokenizer: Tokenizer, count: int = 5) -> list[str]:
    """First words of held-out texts, in whatever language they are."""
    openings = [tokenizer.decode(rows[i][0][1 : 1 + PROMPT_TOKENS].tolist()) for i in range(min(count, len(rows)))]
    return [text.lstrip("\ufffd").rstrip("\ufffd ") for text in openings]  # a piece may begin inside a character


def _request(engine: Engine, prompt: str, chat: bool, **settings: Any) -> Request:
    if chat:
        return engine.chat_request([{"role": "user", "content": prompt}], **settings)
    return engine.text_request(prompt, **settings)


def shown(result: Result) -> str:
    """Return an answer with its tool calls in brackets, and dots where it was cut off."""
    frames = {"text": "{}", "python": "[{} =", "python_output": " {}] "}
    text = "".join(frames[part["type"]].format(part["text"]) for part in result.parts)
    text = text.rstrip("\ufffd") + " ..." if result.finish_reason == "length" else text  # cut inside a character
    return text if text.strip() else ""


def answer_line(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """One line of an answer's ids, shown as in samples."""
    turn = Turn(tokenizer)
    for token in tokens:
        turn.add(token)
    turn.flush()
    return code(shown(Result(turn.tokens, turn.parts, "stop", 0, 0))) or "(nothing)"


def quote(prompt: str) -> str:
    """A question as a quotation of one line."""
    return f"> {code(prompt)}"


# One exam of one model: questions in, scores with counts and intervals out, every decision kept beside them.


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


# The exams: every trained model's scores in `eval/<stage>.json`, and samples from before and after each stage.


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
            f"{found['share']:.1%} of {found['texts']} texts is in passages of {LONG_PASSAGE} bytes and more "
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
    """Write `samples.json` and `samples.md` of a stage: the same prompts before the stage and after it."""
    run, stage, config = model.run, model.stage, model.config
    chat = stage != "base"
    if chat:
        prompts = list(config.eval.chat_prompts or CHAT_PROMPTS)
    else:
        rows = Rows(run.data / "rows" / "val", verify=False)
        prompts = held_out_openings(rows, model.tokenizer, config.eval.sample_prompts)
    tokens = min(config.eval.sample_tokens, config.model.seq_len // 2)
    turns = {}
    text = [f"# Samples: {stage}", "", "Temperature in bold; tool calls in brackets.", ""]
    for name, params in (("before", before), ("after", model.params)):
        model.engine.load(params)
        turns[name] = samples(model.engine, prompts, chat, tokens, config.eval.sample_temperatures)
        text += [f"## {name.title()}", "", samples_markdown(turns[name])]
    write_json(run.stage(stage) / "samples.json", turns)
    atomic_write(run.stage(stage) / "samples.md", "\n".join(text))


def _line(scores: Scores) -> str:
    if "accuracy" in scores or "centred" in scores:
        low, high = scores["interval"]
        beside = "".join(f", {name} {found['metric']:.1%}" for name, found in scores.get("readings", {}).items())
        cropped = f", {scores['cropped']} cropped" if scores.get("cropped") else ""
        return f"{scores['metric']:.1%} of {scores['n']} (95 %: {low:.1%} to {high:.1%}){beside}{cropped}"
    return f"{bits(scores)}  perplexity {scores['perplexity']:.1f} on {scores['n']} rows"


class _Passing(Model):
    """A model on its way: its decisions are not kept."""

    def keep(self, name: str, decisions: Iterable[dict[str, Any]]) -> None:
        pass


def spot_checks(config: Config, run: RunDir, tokenizer: Tokenizer, stage: str, cases: int) -> list[Evaluator]:
    """An evaluator for `train.loop`: `exam/NAME` for the exams of `eval.exams` whose data is at hand, `cases` questions
    each, and `chatcore` where its five are among them. None for 0 cases. An exam without data is said once."""
    silent: set[str] = set()

    def asked(model: Model, task: Task, optional: bool) -> float | None:
        try:
            if isinstance(task, WrittenTask | ChoiceTask):
                indices = capped(len(task.examples()), cases)
                if not indices:
                    raise DataError("no questions")
                exam = model.written if isinstance(task, WrittenTask) else model.choice
                return exam(task, indices)["metric"]  # type: ignore[arg-type]
        except DataError as error:
            if not (optional and isinstance(error, MissingData)):
                say(f"  {task.name} is not asked during training: {error}", style="yellow")
            silent.add(task.name)
        return None

    def evaluate(state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        params = jax.tree.map(hosts.gathered, state.params)

        def work() -> dict[str, float]:
            model = _Passing(config, run, stage, params, tokenizer)
            scores: dict[str, dict[str, float]] = {}
            for task, optional in exam_tasks(config):
                if task.name not in silent and (metric := asked(model, task, optional)) is not None:
                    scores[task.name] = {"metric": metric, "chance": task.chance}
            mean = chat_core(scores)
            found = {f"exam/{name}": score["metric"] for name, score in scores.items()}
            return found | ({} if mean is None else {"chatcore": mean})

        yield from hosts.on_first(work).items()

    return [evaluate] if cases else []
