"""The command `rehearse`: run every stage of a tier with its real shapes and few steps, and predict the whole run.

The stages are those of the real run, in a run directory of their own. What cannot be had (no network, a data set that
is missing) is replaced by made-up text and listed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jax
from rich.console import Console

from jaxchat.attention import trusted_backend
from jaxchat.chat import render
from jaxchat.config import Config
from jaxchat.data.loader import THREADS, Batches
from jaxchat.data.packing import Rows
from jaxchat.data.shards import cores
from jaxchat.data.sources import interleaved, open_corpus
from jaxchat.engine import Engine
from jaxchat.engine.loading import batch_rows
from jaxchat.errors import DataError, InterruptedRun, JaxchatError
from jaxchat.log import print_facts, read_metrics, say
from jaxchat.run_dir import RunDir, read_json
from jaxchat.sharding import batch_devices, make_mesh, micro_batch
from jaxchat.tasks.base import GeneratedTask, Task, TaskFiles, WrittenTask
from jaxchat.tasks.registry import TASKS, get_task, parse_mixture_entry
from jaxchat.tokenizer import TRAIN_CHARS, Tokenizer
from jaxchat.train_state import compute_dtype

from . import evaluate, pretrain, rl, sft
from .doctor import hardware, peak_rss, unused_accelerator
from .preflight import (
    CONVERSATIONS,
    LONGEST_HOURS,
    UNKNOWN,
    check_room,
    disk_parts,
    rl_steps,
    size_text,
    text_bytes,
    used,
)
from .report import text_table
from .stages import Stage, run_stages
from .targets import usd

HALF = 4  # steps of pretraining before the save that the other half resumes from
SFT_STEPS, RL_STEPS = 4, 2
STEADY_SECONDS = 6.0  # of steps to measure the pace with: short steps are repeated
MOST_STEPS = 32
SAMPLE_BYTES, MOST_PARTS = 16_000_000, 8  # of text: so much for each core, at most
WHOLE_MIXTURE, SOME_CONVERSATIONS = 30_000, 4_000  # up to which a mixture is rendered whole; taken of a larger one
STAND_IN = "word_problems"  # the environment of RL where the tier's own is missing
QUESTION = [{"role": "user", "content": "hello"}]
LIVE = 0.5  # share of RL's groups that have right and wrong answers; in the rehearsal all have

Measured = dict[str, Any]


def rehearse(
    config: Config, directory: RunDir, stages: Sequence[Stage], reasons: dict[str, str], keep: bool, as_json: bool
) -> bool:
    """Rehearse the stages beside `directory` and print what the whole run will take; whether nothing would go wrong.

    Everything written is removed at the end, also after an error or a signal, unless `keep`.
    Raises `UsageError` for a configuration that no stage would take, `InterruptedRun` after a signal.
    """
    stages = [stage for stage in stages if stage.wanted(config)]
    for stage in stages:
        with contextlib.suppress(DataError):  # listed when the stage meets it again
            stage.check(config)
    place = directory.root.absolute()
    new_parents = [p for p in place.parents if not p.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{place.name}-rehearsal-", dir=place.parent))
    try:
        rehearsal = Rehearsal(config, RunDir(folder), reasons)
        rehearsal.run_all(stages)
        result = rehearsal.result() | {"directory": str(folder) if keep else None}
    except (KeyboardInterrupt, InterruptedRun):
        left = f"{folder} is kept" if keep else "what it wrote is removed"
        raise InterruptedRun(f"rehearsal stopped by a signal; {left}") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process uses them by now
                for parent in new_parents:
                    parent.rmdir()
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    return result["ok"]


class Rehearsal:
    """One rehearsal: the real configuration, the smaller one, what was measured and what went wrong.

    Of a stage, `before_STAGE` chooses its data, `run_STAGE` replaces its run, and `measure_STAGE` returns its figures.
    """

    def __init__(self, config: Config, run: RunDir, reasons: dict[str, str]):
        self.config, self.run, self.reasons = config, run, reasons
        self.begin = time.perf_counter()
        self.mesh = make_mesh(config.mesh)
        self.batch_rows = micro_batch(config, batch_devices(self.mesh))[0]
        self.small = smaller(config, self.batch_rows, batch_rows(config.model, config.eval.batch_rows, self.mesh))
        self.files = TaskFiles.of(config, download=True)
        self.problems: list[dict[str, str]] = []
        self.made_up: list[str] = []
        self.measured: Measured = {"machine": hardware(), "compile_share": 1.0}

    def problem(self, kind: str, stage: str, error: object) -> None:
        """List what would go wrong, once."""
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = {"kind": kind, "stage": stage, "text": text}
        if found not in self.problems:
            self.problems.append(found)
            say(f"  {stage}: {text}", style="yellow")

    def run_all(self, stages: Sequence[Stage]) -> None:
        """Run and measure the stages in order; after a failure those that do not need the failed stage go on."""
        say("attention is compared with its reference")
        backend, why = trusted_backend(self.config.model, compute_dtype(self.config, self.mesh))
        self.measured["attention"] = {"backend": backend, "fallback": why}
        try:
            check_room(self.config, self.run, {stage.name for stage in stages})
        except DataError as error:
            self.problem("disk", "pretrain", error)
        self.choose_text()
        failed: set[str] = set()
        for stage in stages:
            getattr(self, f"before_{stage.name}", lambda: None)()
            if missing := failed & set(stage.needs):
                say(f"{stage.name:<10} not rehearsed: it needs {', '.join(sorted(missing))}", style="yellow")
                failed.add(stage.name)
            elif self.ran(dataclasses.replace(stage, run=getattr(self, f"run_{stage.name}", stage.run))):
                record = self.run.records()[stage.name]
                measure: Any = getattr(self, f"measure_{stage.name}", lambda facts, seconds: {})
                self.measured[stage.name] = {"seconds": record["seconds"]} | measure(record["facts"], record["seconds"])
            else:
                failed.add(stage.name)
        if "pretrain" in self.measured:
            self.answer()
        self.measured["peak_memory_bytes"] = peak_memory()

    def ran(self, stage: Stage) -> bool:
        """Run a stage; whether it came to its end. Text that is too little for it is replaced by made-up text."""
        try:
            run_stages(self.small, self.run, [stage], self.reasons)
            return True
        except Exception as error:  # whatever ends a stage here ends it in the run
            text = self.measured["text"]
            too_little = isinstance(error, DataError) and stage.name in ("tokenizer", "prepare")
            if not too_little or text["sample_bytes"] == text["bytes"] or self.made_up:
                self.problem("failed", stage.name, error)
            if not too_little or self.made_up:
                return False
        self.make_up_text("the text at hand is too little")
        return self.ran(stage)

    # What the stages are given

    def choose_text(self) -> None:
        """Take the beginning of the text, all of it where it is little; made-up text where there is none."""
        data, parts = dataclasses.replace(self.config.data, text_bytes=1), min(cores(), MOST_PARTS)  # 1: of one file
        folder = self.run.root / "text" / "sample"
        try:
            size = write_jsonl(folder, interleaved(open_corpus(data), "all", 0.0), "text", parts * SAMPLE_BYTES, parts)
        except (DataError, OSError) as error:
            self.problem("hub" if "hf:" in data.source else "data", "prepare", error)
            self.make_up_text(f"{data.source} cannot be had")
        else:
            whole = size if size < parts * SAMPLE_BYTES and "hf:" not in data.source else text_bytes(self.config)
            self.take_text(folder, size, max(size, round(whole)))

    def make_up_text(self, why: str) -> None:
        """Take made-up text, as much as a sample, with enough words for the vocabulary."""
        folder = self.run.root / "text" / "made-up"
        write_jsonl(folder, made_up_documents(SAMPLE_BYTES, self.config.model.vocab_size), "text", parts=cores())
        self.made_up.append(f"text ({why})")
        self.take_text(folder, SAMPLE_BYTES, max(SAMPLE_BYTES, round(text_bytes(self.config))))

    def take_text(self, folder: Path, sample_bytes: int, whole: int) -> None:
        """Train on the files of a folder; `whole`: bytes of the run's own text."""
        self.small = replaced(self.small, "data", source=f"files:{folder}")
        self.measured["text"] = {"sample_bytes": sample_bytes, "bytes": whole}

    def before_sft(self) -> None:
        """Take a small mixture whole and a share of a large one; made-up conversations for a missing data set."""
        entries, total, missing = [], 0, False
        for entry in self.config.sft.mixture:
            name, count, epochs = parse_mixture_entry(entry)
            known, tokens = CONVERSATIONS.get(name, UNKNOWN)
            total += (count or known) * epochs
            if name in TASKS and not isinstance(task := get_task(name, self.files), GeneratedTask):
                count = count or known
                try:
                    task.fetch()
                except DataError as error:
                    missing = True
                    self.problem("data", "sft", error)
                    self.made_up.append(f"conversations of {name}")
                    name = self.made_up_conversations(name, min(SOME_CONVERSATIONS, count), tokens)
            entries.append((name, count, epochs))
        share = min(1.0, SOME_CONVERSATIONS / max(1, total)) if missing or total > WHOLE_MIXTURE else 1.0
        mixture = []
        for name, count, epochs in entries:
            taken = count if share == 1.0 or count is None else max(1, round(count * share))
            mixture.append(f"{name}{'' if taken is None else f':{taken}'}*{epochs}")
        self.measured["sft_ratio"] = 1 / share
        # as many epochs more, so that the schedule has the real number of steps
        self.small = replaced(self.small, "sft", mixture=tuple(mixture), epochs=self.config.sft.epochs / share)

    def made_up_conversations(self, name: str, count: int, words: int) -> str:
        """Write a file of them; the entry of the mixture that names it."""
        texts = made_up_documents(count * words * 8, self.config.model.vocab_size, words)
        turns = ([{"role": "user", "content": t[: len(t) // 4]}, {"role": "assistant", "content": t}] for t in texts)
        folder = self.run.root / "text" / name
        write_jsonl(folder, itertools.islice(turns, count), "messages")
        return f"files:{folder}"

    def before_rl(self) -> None:
        """Take a generated task instead of an environment whose questions are missing."""
        try:
            rl.environment(self.config)
        except DataError as error:
            self.problem("data", "rl", error)
            self.made_up.append(f"questions of {self.config.rl.environment} for RL ({STAND_IN} instead)")
            steps = rl_steps(self.config)
            self.small = replaced(self.small, "rl", environment=STAND_IN, steps=steps, format_bonus=0.0)

    # What runs otherwise than in the real run

    def run_pretrain(self, config: Config, run: RunDir) -> dict[str, Any]:
        """Train two halves with a save and a restore between; the second is long enough to measure the pace."""
        begin = time.perf_counter()
        first = pretrain.run(replaced(config, "train", eval_every=0, sample_every=0), run, HALF)
        wall = time.perf_counter() - begin
        steps = [record["step_seconds"] for record in read_metrics(run.stage("base") / "metrics.jsonl")]
        last = HALF + max(HALF, min(MOST_STEPS, int(STEADY_SECONDS / min(steps[1:] or steps))))
        middle = last // 2
        sample_every = middle if config.train.sample_every else 0
        second = pretrain.run(replaced(config, "train", eval_every=middle, sample_every=sample_every), run, last)
        return second | {"first_wall": wall, "first_timings": first["timings"]}

    def run_sft(self, config: Config, run: RunDir) -> dict[str, Any]:
        """Train for `STEADY_SECONDS` by the pace of pretraining, with two evaluations."""
        pace = self.measured["pretrain"]["step_seconds"] * config.sft.batch_tokens / config.train.batch_tokens
        steps = max(SFT_STEPS, min(MOST_STEPS, int(STEADY_SECONDS / pace)))
        return sft.run(replaced(config, "sft", eval_every=steps // 2), run, steps)

    def run_rl(self, config: Config, run: RunDir) -> dict[str, Any]:
        """Train two steps."""
        return rl.run(config, run, RL_STEPS)

    def run_eval(self, config: Config, run: RunDir) -> dict[str, Any]:
        """Ask one batch of every exam, twice."""
        return evaluate.run(config, run, one_batch=True)

    def answer(self) -> None:
        """Let the engine answer once, as for whoever chats with the finished run."""
        begin = time.perf_counter()
        try:
            engine = Engine.from_pretrained(self.run.root, slots=1)
            loaded = time.perf_counter()
            tokens = min(32, self.config.model.seq_len // 2)
            result = engine.generate([engine.chat_request(QUESTION, max_tokens=tokens)])[0]
        except Exception as error:
            self.problem("failed", "answer", error)
            return
        seconds = {"load_seconds": loaded - begin, "seconds": time.perf_counter() - loaded}
        self.measured["answer"] = seconds | {"tokens": len(result.tokens)}

    # What they leave behind

    def measure_prepare(self, facts: dict[str, Any], seconds: float) -> Measured:
        spent = {key: facts[key] for key in ("tokenize_seconds", "pack_seconds")}
        return spent | {"documents": facts["train"]["documents"], "val_rows": facts["val"]["rows"]}

    def measure_loop(self, name: str, timings: dict[str, Any], wall: float, resumed: int | None = None) -> Measured:
        """Measure a training: its pace without the steps that compile, and everything beside the steps.

        `timings` and `wall` are of the steps before the one that it `resumed` at (None: of all).
        """
        records = read_metrics(self.run.stage(name) / "metrics.jsonl")
        spent = [record["step_seconds"] for record in records]
        steady = [record for i, record in enumerate(records) if i not in (0, resumed)] or records
        step = median(record["step_seconds"] for record in steady)
        mfu = [record["mfu"] for record in steady if record.get("mfu") is not None]
        beside = sum(sum(timings.get(key, [])) for key in ("save", "validate", "evaluate", "sample"))
        saved = max((p for p in self.run.stage(name).glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
        return {
            "rehearsed_steps": len(spent),
            "step_seconds": step,
            "tokens_per_second": self.config.train.batch_tokens / step,
            "mfu": median(mfu) if mfu else None,
            "compile_seconds": max(0.0, spent[0] - step),
            "fixed_seconds": max(0.0, wall - sum(spent[:resumed]) - beside),
            "save_seconds": timings["save"][-1],
            "checkpoint_seconds": max(timings["written"]),
            "checkpoint_bytes": used(saved),
            "timings": timings,
        }

    def measure_pretrain(self, facts: dict[str, Any], seconds: float) -> Measured:
        first, second = facts["first_timings"], facts["timings"]
        half = self.measure_loop("base", first, facts["first_wall"], HALF)
        timings = {key: first.get(key, []) + second.get(key, []) for key in second}
        again = read_metrics(self.run.stage("base") / "metrics.jsonl")[HALF]["step_seconds"]
        if half["compile_seconds"] > 0 and jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            # the real run reads programs from the cache, as the second half did
            share = (again - half["step_seconds"]) / half["compile_seconds"]
            self.measured["compile_share"] = min(1.0, max(0.0, share))
        rows = Rows(self.run.data / "rows" / "train", verify=False)
        batches = Batches(rows, *micro_batch(self.config, batch_devices(self.mesh)), self.config.seed)
        loading = []
        for number in range(HALF):
            begin = time.perf_counter()
            batches.batch(number)
            loading.append(time.perf_counter() - begin)
        train, val_rows = self.config.train, self.measured["prepare"]["val_rows"]
        run_rows = min(train.eval_rows, max(1, round(val_rows * text_ratio(self.measured))))
        scale = run_rows / min(self.small.train.eval_rows, val_rows)
        samples = train.steps // train.sample_every if train.sample_every else 0
        return half | {
            "steps": train.steps,
            "saves": times(train.steps, train.eval_every, train.checkpoint_every, train.sample_every),
            "beside": {"validate": (times(train.steps, train.eval_every), scale), "sample": (samples, 1.0)},
            "timings": timings,
            "save_seconds": timings["save"][-1],
            "checkpoint_seconds": max(timings["written"]),
            "restore_seconds": second["start"][0],
            "loader_seconds": min(loading) / THREADS,
        }

    def measure_sft(self, facts: dict[str, Any], seconds: float) -> Measured:
        loop = self.measure_loop("sft", facts["timings"], seconds - facts["rows_seconds"])
        settings, train, ratio = self.config.sft, self.config.train, self.measured["sft_ratio"]
        evaluations, val_rows = times(facts["steps"], settings.eval_every), facts["val"]["rows"]
        run_rows = min(train.eval_rows, max(1, round(val_rows * ratio)))
        scale = run_rows / max(1, min(self.small.train.eval_rows, val_rows))
        cases = settings.exam_cases / self.small.sft.exam_cases if settings.exam_cases else 0.0
        return loop | {
            "steps": facts["steps"],
            "saves": times(facts["steps"], settings.eval_every, train.checkpoint_every),
            "beside": {"validate": (evaluations, scale), "evaluate": (evaluations, cases)},
            "other_seconds": facts["rows_seconds"] * ratio,
            "val_rows": val_rows,
            "tokens_per_second": settings.batch_tokens / loop["step_seconds"],
        }

    def measure_rl(self, facts: dict[str, Any], seconds: float) -> Measured:
        loop, config = self.measure_loop("rl", facts["timings"], seconds), self.config.rl
        records = read_metrics(self.run.stage("rl") / "metrics.jsonl")
        # a step's answers are sampled before the step before is read, so the last one's seconds are its update alone
        last = records[-1]
        update, rollout = last["step_seconds"], last["rollout_seconds"]
        spent = sum(record["step_seconds"] - record["rollout_seconds"] for record in records)
        task = get_task(self.small.rl.environment, self.files)
        questions = len(task.examples()) if isinstance(task, WrittenTask) else 0
        answers = config.prompts * config.samples
        # a trained model ends its answers as SFT's end, the rehearsal's goes on to the limit
        shorter = min(1.0, self.expected_length(config.environment, config.max_tokens) / max(1.0, last["length"]))
        per_answer = rollout / answers
        small, whole = (min(c.rl.eval_prompts, questions) * config.eval_samples for c in (self.small, self.config))
        spent_evaluating = facts["timings"].get("evaluate", [])
        ends = spent_evaluating[:1] + spent_evaluating[-1:]  # the first compiles sampling, the last KL
        beside = sum(max(0.0, seconds - per_answer * small) for seconds in ends)
        sampling = (1 + times(facts["steps"], config.eval_every)) * whole * per_answer * shorter
        return loop | {
            "steps": facts["steps"],
            "saves": times(facts["steps"], config.eval_every, config.checkpoint_every),
            "beside": {},
            "other_seconds": beside * self.measured["compile_share"] + sampling,
            "answers": answers,
            "length": last["length"],
            "step_seconds": rollout + update,
            "run_step_seconds": rollout * shorter + update * LIVE,
            "rollout_seconds": rollout,
            "update_seconds": update,
            "compile_seconds": max(0.0, spent - len(records) * update),
            "tokens_per_second": answers * last["length"] / (rollout + update),
        }

    def measure_eval(self, facts: dict[str, Any], seconds: float) -> Measured:
        exams: dict[str, dict[str, Any]] = {}
        for stage in evaluate.STAGES:
            if not self.run.eval(stage).exists():
                continue
            record = read_json(self.run.eval(stage))
            asked = {name: scores for name, scores in record["tasks"].items() if "again_seconds" in scores}
            asked |= {f"core: {name}": scores for name, scores in record["core_tasks"].items()}
            exams[stage] = {name: self.measure_exam(name, scores) for name, scores in asked.items()}
            for name, why in record["not_run"].items():
                self.problem("data", "eval", f"{name}: {why}")
        return {"exams": exams}

    def measure_exam(self, name: str, scores: dict[str, Any]) -> Measured:
        """Seconds and sizes of one; `shorter`: tokens of an expected answer over those of a rehearsed one."""
        questions, count, shorter = scores["questions"], scores["n"], 1.0
        if name == "bits_per_byte":
            rows = [(scores["text"]["n"], self.measured["prepare"]["val_rows"] * text_ratio(self.measured))]
            if "conversations" in scores:
                whole = self.measured["sft"]["val_rows"] * self.measured["sft_ratio"]
                rows.append((scores["conversations"]["n"], whole))
            count = sum(n for n, _ in rows)
            questions = sum(min(self.config.eval.rows, max(1, round(n))) for _, n in rows)
        elif "endless" in scores:
            task: Any = get_task(name, TaskFiles.of(self.config, download=False))
            expected = self.expected_length(name, task.max_tokens)
            truncated = scores["endless"] / max(1, scores["n"])
            shorter = min(1.0, expected / max(1.0, truncated * task.max_tokens + (1 - truncated) * expected))
        seconds = {key: scores[key] for key in ("seconds", "again_seconds")}
        return seconds | {"n": count, "questions": questions, "shorter": shorter}

    def expected_length(self, name: str, most: int) -> float:
        """Tokens of an answer to a task, as the mixture teaches it; the most that one may have where it does not."""
        lengths = []
        if name in {parse_mixture_entry(entry)[0] for entry in self.config.sft.mixture}:
            tokenizer = Tokenizer.load(self.run.tokenizer)
            with contextlib.suppress(JaxchatError):
                task: Task = get_task(name, TaskFiles.of(self.config, download=False))
                for conversation in itertools.islice(task.train_conversations(200, self.config.seed), 200):
                    answers = sum(message["role"] == "assistant" for message in conversation)
                    lengths.append(sum(render(tokenizer, conversation)[1]) / max(1, answers))
        return min(float(most), fmean(lengths)) if lengths else float(most)

    def result(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        stages = forecast(self.config, self.measured)
        seconds = sum(stage["seconds"] for stage in stages.values())
        listed = self.problems + problems(self.config, self.measured)
        if jax.default_backend() == "cpu" and seconds > LONGEST_HOURS * 3600 and not self.config.train.allow_slow:
            line = unused_accelerator() or "take a machine with a GPU or TPU"
            text = f"the run would take {seconds / 86400:,.0f} days on this CPU; {line}"
            listed.append({"kind": "slow", "stage": "pretrain", "text": text})
        dollars = [stage["usd"] for stage in stages.values()]
        disk = sum(part.bytes for part in disk_parts(self.config) if set(part.stages) & stages.keys())
        total = None if None in dollars else sum(d for d in dollars if d is not None)
        return {
            "tier": self.config.tier,
            "ok": not listed,
            "problems": listed,
            "made_up": self.made_up,
            "measured": self.measured,
            "stages": stages,
            "total": {"seconds": seconds, "hours": seconds / 3600, "disk_bytes": disk, "usd": total},
            "rehearsal_seconds": time.perf_counter() - self.begin,
        }


# Made-up text and smaller settings


def smaller(config: Config, batch_rows: int, exam_rows: int) -> Config:
    """Return the configuration of a rehearsal: shapes, mesh, batch and precision stay, everything counted shrinks.

    `batch_rows`: of a micro-batch; `exam_rows`: what `eval.batch_rows` comes to on this machine.
    """
    train, rl_, exam = config.train, config.rl, config.eval
    answers = min(rl_.slots, rl_.prompts * rl_.samples)
    questions = min(rl_.eval_prompts, max(1, answers // rl_.eval_samples))
    config = replaced(config, "data", val_source="")  # a part of the sample is held out instead
    config = replaced(config, "train", eval_rows=min(train.eval_rows, 2 * batch_rows), tensorboard=False, wandb="")
    config = replaced(config, "sft", exam_cases=min(config.sft.exam_cases, exam_rows))
    config = replaced(config, "rl", eval_every=0, eval_prompts=questions)
    return replaced(config, "eval", batch_rows=exam_rows, rows=min(exam.rows, 2 * exam_rows))


def replaced(config: Config, section: str, **values: Any) -> Config:
    """Return the configuration with other values of one section."""
    changed: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **values)}
    return dataclasses.replace(config, **changed)


def write_jsonl(folder: Path, records: Iterator[Any], key: str, size: int | None = None, parts: int = 1) -> int:
    """Write `{key: record}` lines into `parts` files, at most `size` bytes of text or so; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{n:02d}.jsonl", "w", encoding="utf-8")) for n in range(parts)]
        for number, record in enumerate(records):
            line = json.dumps({key: record})
            files[number % parts].write(line + "\n")
            written += len(record.encode("utf-8", "replace")) if isinstance(record, str) else len(line)
            if size is not None and written >= size:
                break
    return written


def made_up_documents(size: int, vocabulary: int, words: int = 250) -> Iterator[str]:
    """Yield `size` bytes of invented words, frequent and rare as in real text; the same every time.

    There are so many different words that a tokenizer of that vocabulary can be trained on `SAMPLE_BYTES` of it.
    """
    rng = random.Random("rehearsal")
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    lexicon = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3 * vocabulary)})
    rng.shuffle(lexicon)
    weights = list(itertools.accumulate(1 / (rank + 20) for rank in range(len(lexicon))))  # Zipf's law
    written = 0
    while written < size:
        text = " ".join(rng.choices(lexicon, cum_weights=weights, k=words)).capitalize() + "."
        written += len(text)
        yield text


def peak_memory() -> int | None:
    """Return the peak bytes of the fullest device, of the process on a CPU; None where neither is known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=peak_rss())


# From the measurements to the whole run


def forecast(config: Config, measured: Measured) -> dict[str, dict[str, Any]]:
    """Return `seconds`, `disk_bytes`, `usd` (None: no price known) and `how` of every stage that was rehearsed."""

    def loop(name: str) -> Callable[[Config, Measured], float]:
        return lambda config, m: loop_seconds(m[name], m["compile_share"])

    hows = {
        "tokenizer": (tokenizer_seconds, "seconds x text that the BPE sees / sample; at most"),
        "prepare": (prepare_seconds, "seconds x text / sample; download not counted"),
        "pretrain": (loop("pretrain"), "start + compile + steps + evaluations + saves + samples"),
        "sft": (loop("sft"), "rendering x conversations / rehearsed + as pretrain"),
        "rl": (loop("rl"), f"start + compile + steps of {LIVE:.0%} live groups + pass@k; answers as long as SFT's"),
        "eval": (eval_seconds, "compile + batches of every exam of every model; answers as long as SFT's"),
        "report": (report_seconds, "seconds x documents searched / rehearsed; at most"),
        "export": (lambda config, m: m["export"]["seconds"], "as rehearsed"),
    }
    stages = {}
    for name, (seconds_of, how) in hows.items():
        if name in measured:
            seconds = float(seconds_of(config, measured))
            stages[name] = {
                "rehearsed_seconds": measured[name]["seconds"],
                "seconds": seconds,
                "disk_bytes": sum(part.bytes for part in disk_parts(config) if part.stages[0] == name),
                "usd": usd(measured["machine"], seconds),
                "how": how,
            }
    return stages


def text_ratio(m: Measured) -> float:
    """Return the text of the run over the text of the rehearsal."""
    return m["text"]["bytes"] / max(1, m["text"]["sample_bytes"])


def tokenizer_seconds(config: Config, m: Measured) -> float:
    """Counting words grows with the text; merging grows less, so this is a bound."""
    seen, sample = (min(TRAIN_CHARS, m["text"][key]) for key in ("bytes", "sample_bytes"))
    return m["tokenizer"]["seconds"] * (1.0 if config.tokenizer.path else max(1.0, seen / max(1, sample)))


def prepare_seconds(config: Config, m: Measured) -> float:
    """Tokenizing and packing read every byte once."""
    work = m["prepare"]["tokenize_seconds"] + m["prepare"]["pack_seconds"]
    return max(0.0, m["prepare"]["seconds"] - work) + work * text_ratio(m)


def loop_seconds(m: Measured, share: float) -> float:
    """Start, compiling, steps, saves, and what comes `beside` them: name of its timings -> (how often, scale).

    `share`: of the compile time that counts. The first timing of anything compiles, and the last does not.
    """
    step = m.get("run_step_seconds", m["step_seconds"])
    seconds = m["fixed_seconds"] + share * m["compile_seconds"] + m["steps"] * step + m["saves"] * m["save_seconds"]
    for name, (count, scale) in m["beside"].items():
        if count and (timings := m["timings"].get(name)):
            seconds += max(0.0, timings[0] - timings[-1]) * share + count * timings[-1] * scale
    return seconds + m.get("other_seconds", 0.0)


def eval_seconds(config: Config, m: Measured) -> float:
    """Every exam's batches at the second batch's pace, and what the first took longer: compiling, loading."""
    exams = [exam for exams in m["eval"]["exams"].values() for exam in exams.values()]
    rehearsed = sum(exam["seconds"] + exam["again_seconds"] for exam in exams)
    return max(0.0, m["eval"]["seconds"] - rehearsed) + sum(exam_seconds(exam, m["compile_share"]) for exam in exams)


def exam_seconds(exam: Measured, share: float) -> float:
    """`share`: of the compile time that counts."""
    first = max(0.0, exam["seconds"] - exam["again_seconds"]) * share
    return first + exam["again_seconds"] * exam["questions"] / max(1, exam["n"]) * exam["shorter"]


def report_seconds(config: Config, m: Measured) -> float:
    """The search for the exams' text in the training text reads `eval.overlap_documents` documents."""
    limit, documents = config.eval.overlap_documents, m["prepare"]["documents"]
    whole = documents * text_ratio(m)
    return m["report"]["seconds"] * max(1.0, (whole if limit < 0 else min(limit, whole)) / max(1, documents))


def times(steps: int, *every: int) -> int:
    """Return how often something is due that comes `every` so many steps (0: never), and at the last step."""
    return len({steps}.union(*(range(each, steps + 1, each) for each in every if each > 0)))


def problems(config: Config, m: Measured) -> list[dict[str, str]]:
    """Return what the measurements say would go wrong."""
    listed = []

    def add(kind: str, stage: str, text: str) -> None:
        listed.append({"kind": kind, "stage": stage, "text": text})

    if why := m["attention"]["fallback"]:
        add("attention", "pretrain", f"attention falls back to XLA's, which is slow: {why}")
    train = config.train.checkpoint_every
    for name, steps in (("pretrain", train), ("sft", train), ("rl", config.rl.checkpoint_every)):
        if name in m and times(m[name]["steps"], steps) > 1:
            between, written = steps * m[name]["step_seconds"], m[name]["checkpoint_seconds"]
            if written > between:
                add("save", name, f"a save takes {written:.3g} s, the {steps} steps between two saves {between:.3g} s")
    if "pretrain" in m and (loader := m["pretrain"]["loader_seconds"]) > (step := m["pretrain"]["step_seconds"]):
        add("loader", "pretrain", f"the loader needs {loader:.3g} s for a batch, a step takes {step:.3g} s")
    return listed


# On the terminal


def show(result: dict[str, Any]) -> None:
    """Print the measurements, what the run will take, and what would go wrong, to standard output."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    print_facts(measurements(result["measured"]), f"{result['tier']}, rehearsed in {result['rehearsal_seconds']:.0f} s")
    rows = [["the whole run", "time", "disk", "USD"]]
    for name, stage in (result["stages"] | {"all": result["total"]}).items():
        seconds, dollars = stage["seconds"], stage["usd"]
        spent = f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.0f} s"
        rows.append([name, spent, size_text(stage["disk_bytes"]), "?" if dollars is None else f"{dollars:.2f}"])
    console.print(text_table(rows))
    for name, stage in result["stages"].items():
        console.print(f"{name}: {stage['how']}", style="dim")
    if result["made_up"]:
        console.print("made up: " + "; ".join(result["made_up"]))
    if result["directory"]:
        console.print(f"kept: {result['directory']}")
    for problem in result["problems"]:
        console.print(f"WRONG  {problem['stage']}, {problem['kind']}: {problem['text']}")
    console.print("nothing would go wrong" if result["ok"] else f"{len(result['problems'])} things would go wrong")


def measurements(m: Measured) -> dict[str, str]:
    """Return a line for everything that was measured."""
    machine = m["machine"]
    rows = {"devices": f"{machine['devices']} x {machine['device']} ({machine['platform']})"}
    rows["attention"] = m["attention"]["backend"]
    if m["peak_memory_bytes"]:
        of = "the process" if machine["platform"] == "cpu" else "the fullest device"
        rows["peak memory"] = f"{m['peak_memory_bytes'] / 2**30:.2f} GiB, {of}"
    for name in ("pretrain", "sft", "rl"):
        if found := m.get(name):
            mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
            sampling = "" if name != "rl" else f" ({found['rollout_seconds']:.3g} s for {found['answers']} answers)"
            rows[name] = (
                f"{found['step_seconds']:.3g} s a step{sampling}, {found['tokens_per_second']:,.0f} tokens/s{mfu}; "
                f"compiled in {found['compile_seconds']:.1f} s; {found['steps']:,} steps"
            )
    if found := m.get("pretrain"):
        rows["checkpoint"] = (
            f"{found['checkpoint_bytes'] / 1e6:,.0f} MB, {found['checkpoint_seconds']:.2f} s to write, of which "
            f"training waits {found['save_seconds']:.2f} s; {found['restore_seconds']:.2f} s to restore"
        )
        rows["loader"] = f"{found['loader_seconds'] * 1e3:,.1f} ms a batch"
    for stage, exams in m.get("eval", {}).get("exams", {}).items():
        rates = [f"{name} {exam['n'] / max(1e-9, exam['again_seconds']):,.3g}" for name, exam in exams.items()]
        rows[f"exams of {stage}"] = ", ".join(rates) + " a second"
    if answer := m.get("answer"):
        rows["one answer"] = (
            f"{answer['tokens']} tokens in {answer['seconds']:.2f} s, {answer['load_seconds']:.2f} s to load the model"
        )
    return rows
