"""The command `rehearse`: run every stage of a tier with its real shapes and few steps, and predict the whole run.

The stages are those of the real run, in a run directory of their own. What cannot be had (no network, a data set that
is missing) is listed; missing text is made up, missing conversations are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
from rich.console import Console

from jaxchat.attention import trusted_backend
from jaxchat.config import Config, replaced
from jaxchat.data.shards import cores
from jaxchat.data.sources import interleaved, open_corpus
from jaxchat.engine import Engine
from jaxchat.engine.scoring import rows_at_once
from jaxchat.errors import DataError, InterruptedRun, first_line
from jaxchat.log import print_facts, read_metrics, say
from jaxchat.run_dir import RunDir, read_json, saved_steps
from jaxchat.sharding import batch_devices, make_mesh, micro_batch
from jaxchat.tasks import TASKS, get_task, parse_mixture_entry
from jaxchat.tasks.base import TaskFiles
from jaxchat.tokenizer import TRAIN_CHARS
from jaxchat.train_state import compute_dtype

from . import evaluate, pretrain, rl, sft
from .doctor import existing, hardware, memory_peak, unused_accelerator
from .plan import CONVERSATIONS, LONGEST_HOURS, UNKNOWN, check_room, disk_parts, text_bytes, used
from .stages import NAMES, Stage, run_stages
from .targets import usd

HALF = 4  # steps of pretraining before the save that the other half resumes from
STEADY_SECONDS, MOST_STEPS = 6.0, 32  # of the other half: short steps are repeated
SFT_STEPS, RL_STEPS = 8, 2
SAMPLE_BYTES, MOST_PARTS = 16_000_000, 8  # of text: so much for each core, at most
MOST_CONVERSATIONS = 30_000  # taken of a mixture
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
    place = directory.root.absolute()
    folder = Path(tempfile.mkdtemp(prefix=f"{place.name}-rehearsal-", dir=existing(place.parent)))
    try:
        rehearsal = Rehearsal(config, RunDir(folder), reasons)
        try:  # beside what the real run has written already
            check_room(config, directory, {stage.name for stage in stages})
        except DataError as error:
            rehearsal.problem("disk", "pretrain", error)
        for stage in stages:  # all data, of which the stages here take a part
            try:
                stage.check(config)
                stage.ready(config, rehearsal.run)
            except DataError as error:
                rehearsal.problem("data", stage.name, error)
        rehearsal.run_all(stages)
        result = rehearsal.result() | {"directory": str(folder) if keep else None}
    except (KeyboardInterrupt, InterruptedRun):
        left = f"{folder} is kept" if keep else "what it wrote is removed"
        raise InterruptedRun(f"rehearsal stopped by a signal; {left}") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    return result["ok"]


def run_pretrain(config: Config, run: RunDir) -> dict[str, Any]:
    """Train two halves with a save and a restore between; the second is long enough to measure the pace."""
    if config.train.steps == 0:
        return pretrain.run(config, run)
    pretrain.run(replaced(config, "train", eval_every=0, sample_every=0), run, HALF)
    steps = [record["step_seconds"] for record in read_metrics(run.stage("base") / "metrics.jsonl")]
    last = HALF + max(HALF, min(MOST_STEPS, int(STEADY_SECONDS / min(steps[1:] or steps))))
    middle = last // 2
    sample_every = middle if config.train.sample_every else 0
    return pretrain.run(replaced(config, "train", eval_every=middle, sample_every=sample_every), run, last)


class Rehearsal:
    """One rehearsal: the real configuration, the smaller one, what was measured and what went wrong.

    Of the figures of a stage, `run_seconds` are predicted: what the rehearsal took, and what the run does more often.
    """

    def __init__(self, config: Config, run: RunDir, reasons: dict[str, str]):
        self.config, self.run, self.reasons = config, run, reasons
        self.begin = time.perf_counter()
        self.mesh = make_mesh(config.mesh)
        self.batch_rows = micro_batch(config, batch_devices(self.mesh))[0]
        self.small = smaller(config, self.batch_rows, rows_at_once(config.model, config.eval.batch_rows, self.mesh))
        self.files = TaskFiles.of(config, download=True)
        self.problems: list[dict[str, str]] = []
        self.measured: Measured = {"machine": hardware()}
        self.text_ratio = self.sft_ratio = 1.0  # of the run over the rehearsal
        # stages that run otherwise than in the real run
        self.runs: dict[str, Callable[[Config, RunDir], dict[str, Any]]] = {
            "pretrain": run_pretrain,
            "sft": lambda config, run: sft.run(replaced(config, "sft", eval_every=SFT_STEPS // 2), run, SFT_STEPS),
            "rl": functools.partial(rl.run, limit=RL_STEPS),
            "eval": functools.partial(evaluate.run, one_batch=True),
        }

    def problem(self, kind: str, stage: str, error: object) -> None:
        """List what would go wrong, once."""
        text = first_line(error, 1000)
        if (found := {"kind": kind, "stage": stage, "text": text}) not in self.problems:
            self.problems.append(found)
            say(f"  {stage}: {text}", style="yellow")

    def run_all(self, stages: Sequence[Stage]) -> None:
        """Run and measure the stages in order; after a failure those that do not need the failed stage go on."""
        say("attention is compared with its reference")
        backend, why = trusted_backend(self.config.model, compute_dtype(self.config, self.mesh))
        self.measured["attention"] = {"backend": backend, "fallback": why}
        self.choose_text()
        failed: set[str] = set()
        for stage in stages:
            if stage.name == "sft":
                self.choose_conversations()
            missing = failed & set(stage.needs)
            if missing or not stage.wanted(self.small):  # nothing is left of the mixture
                say(f"{stage.name:<10} not rehearsed: it needs {', '.join(missing) or 'its data'}", style="yellow")
                failed.add(stage.name)
                continue
            small = dataclasses.replace(stage, run=self.runs.get(stage.name, stage.run))
            try:
                run_stages(self.small, self.run, [small], self.reasons)
            except Exception as error:  # whatever ends a stage here ends it in the run
                self.problem("data" if isinstance(error, DataError) else "failed", stage.name, error)
                failed.add(stage.name)
                continue
            record = self.run.records()[stage.name]
            figures = self.measure(stage.name, record["facts"], record["seconds"])
            self.measured[stage.name] = figures | {"seconds": record["seconds"]}
        if "pretrain" in self.measured:
            self.answer()
        self.compare()
        self.measured["peak_memory_bytes"] = memory_peak()

    # What the stages are given

    def choose_text(self) -> None:
        """Take the beginning of the text, all of it where it is little; made-up text where there is none."""
        data = dataclasses.replace(self.config.data, text_bytes=1)  # of the hub one file
        try:
            self.take_text("sample", interleaved(open_corpus(data), "all", 0.0))
        except (DataError, OSError) as error:
            kind = "hub" if "hf:" in data.source else "data"
            self.problem(kind, "prepare", error)
            self.take_text("made-up", made_up_documents(self.config.model.vocab_size), 1)

    def take_text(self, name: str, documents: Iterator[str], parts: int | None = None) -> None:
        """Train on the beginning of the documents, so much for each of `parts` (None: cores)."""
        folder, parts = self.run.root / "text" / name, parts or min(cores(), MOST_PARTS)
        limit = SAMPLE_BYTES * parts
        folder.mkdir(parents=True, exist_ok=True)
        size = 0
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(folder / f"{n:02d}.jsonl", "w", encoding="utf-8")) for n in range(parts)]
            for number, document in enumerate(documents):
                files[number % parts].write(json.dumps({"text": document}) + "\n")
                size += len(document.encode("utf-8", "replace"))
                if size >= limit:
                    break
        all_of_it = size < limit and "hf:" not in self.config.data.source
        whole = size if all_of_it else max(size, round(text_bytes(self.config)))
        self.small = replaced(self.small, "data", source=f"files:{folder}", encoding="auto", column="text")
        self.measured["text"] = {"sample_bytes": size, "bytes": whole}
        self.text_ratio = whole / max(1, size)

    def choose_conversations(self) -> None:
        """Take a small mixture whole and a share of a large one, without the data sets that are missing."""
        kept: list[tuple[str, int | None, int, int]] = []  # name, count if given, epochs, conversations
        for name, count, epochs in map(parse_mixture_entry, self.config.sft.mixture):
            try:
                if name in TASKS:
                    get_task(name, self.files).fetch()
                kept.append((name, count, epochs, count or CONVERSATIONS.get(name, UNKNOWN)[0]))
            except DataError as error:
                self.problem("data", "sft", error)
        share = min(1.0, MOST_CONVERSATIONS / max(1, sum(size * epochs for _, _, epochs, size in kept)))
        entries = []
        for name, count, epochs, size in kept:
            if share < 1 and (count is not None or name in CONVERSATIONS):  # what has no known size is taken whole
                count = max(1, round(size * share))
            entries.append(f"{name}{'' if count is None else f':{count}'}*{epochs}")
        self.sft_ratio = 1 / share
        # as many epochs more, so that the schedule has the real number of steps
        self.small = replaced(self.small, "sft", mixture=tuple(entries), epochs=self.config.sft.epochs / share)

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

    def compare(self) -> None:
        """List what the measurements say would go wrong."""
        if why := self.measured["attention"]["fallback"]:
            self.problem("attention", "pretrain", f"attention falls back to XLA's, which is slow: {why}")
        often, rl_often = self.config.train.checkpoint_every, self.config.rl.checkpoint_every
        for name, every in (("pretrain", often), ("sft", often), ("rl", rl_often)):
            m = {"steps": 0} | self.measured.get(name, {})
            if m["steps"] > every and (written := m["checkpoint_seconds"]) > (pause := every * m["step_seconds"]):
                self.problem("save", name, f"a save takes {written:.3g} s, the {every} steps between two {pause:.3g} s")

    # What they leave behind

    def measure(self, name: str, facts: dict[str, Any], seconds: float) -> Measured:
        """Return the figures of a stage that took `seconds`."""
        match name:
            case "pretrain" if self.config.train.steps:
                return self.measure_pretrain(facts, seconds)
            case "sft":
                return self.measure_sft(facts, seconds)
            case "rl":
                return self.measure_rl(facts, seconds)
            case "eval":
                return self.measure_eval(seconds)
        return {"run_seconds": seconds * self.growth(name)}

    def growth(self, name: str) -> float:
        """Return how many times longer than here the run reads text in a stage, at most."""
        text, records = self.measured["text"], self.run.records()
        if name == "tokenizer" and not self.config.tokenizer.path:  # merging grows less than counting words
            return max(1.0, min(TRAIN_CHARS, text["bytes"]) / max(1, min(TRAIN_CHARS, text["sample_bytes"])))
        if name == "report" and "prepare" in records:  # it searches documents for the exams' text
            limit, documents = self.config.eval.overlap_documents, records["prepare"]["facts"]["train"]["documents"]
            whole = documents * self.text_ratio
            return max(1.0, (whole if limit < 0 else min(limit, whole)) / max(1, documents))
        return self.text_ratio if name == "prepare" else 1.0  # the download is not counted

    def measure_loop(
        self, name: str, facts: dict[str, Any], seconds: float, steps: int, step_tokens: int, counts: dict[str, float]
    ) -> Measured:
        """Measure a training of `steps` steps; `counts`: how often the run saves, validates, evaluates and samples.

        The first of each of them, and the first step, compile; the last one says how long it takes from then on.
        """
        records, timings = read_metrics(self.run.stage(name) / "metrics.jsonl"), facts["timings"]
        step = median(record["step_seconds"] for record in records[1:] or records)
        mfu = [record["mfu"] for record in records[1:] if record.get("mfu") is not None]
        often = {kind: (count, timings[kind]) for kind, count in counts.items() if timings.get(kind)}
        more = sum((count - len(spent)) * spent[-1] for count, spent in often.values())
        newest = self.run.stage(name) / str(saved_steps(self.run.stage(name))[-1])
        return {
            "steps": steps,
            "rehearsed_steps": len(records),
            "step_seconds": step,
            "tokens_per_second": step_tokens / step,
            "mfu": median(mfu) if mfu else None,
            "checkpoint_seconds": max(timings["written"]),
            "checkpoint_bytes": used(newest),
            "run_seconds": max(0.0, seconds + more + (steps - len(records)) * step),
        }

    def measure_pretrain(self, facts: dict[str, Any], seconds: float) -> Measured:
        train = self.config.train
        rows = train.eval_rows / max(1, self.small.train.eval_rows)
        counts = {
            "save": times(train.steps, train.eval_every, train.checkpoint_every, train.sample_every),
            "validate": rows * times(train.steps, train.eval_every),
            "sample": train.steps // train.sample_every + 2 if train.sample_every else 0,
        }
        loop = self.measure_loop("base", facts, seconds, train.steps, train.batch_tokens, counts)
        return loop | {"restore_seconds": facts["timings"]["start"][0]}

    def measure_sft(self, facts: dict[str, Any], seconds: float) -> Measured:
        settings, steps = self.config.sft, facts["steps"]
        evaluations = times(steps, settings.eval_every)
        counts = {
            "save": times(steps, settings.eval_every, self.config.train.checkpoint_every),
            "validate": evaluations * self.config.train.eval_rows / max(1, self.small.train.eval_rows),
            "evaluate": evaluations * settings.exam_cases / max(1, self.small.sft.exam_cases),
        }
        rendering = (self.sft_ratio - 1) * facts["rows_seconds"]
        return self.measure_loop("sft", facts, seconds + rendering, steps, settings.batch_tokens, counts)

    def measure_rl(self, facts: dict[str, Any], seconds: float) -> Measured:
        config, steps, sampled = self.config.rl, facts["steps"], "preferred" not in facts  # not in DPO
        last = read_metrics(self.run.stage("rl") / "metrics.jsonl")[-1]
        answers, rollout = config.prompts * (config.samples if sampled else 2), last["rollout_seconds"]
        # a trained model ends its answers as SFT's end, the rehearsal's goes on to the limit
        expected = self.expected_length(config.environment, config.max_tokens)
        shorter = min(1.0, expected / max(1.0, last["length"])) if sampled else 1.0
        scale = shorter * config.eval_prompts / max(1, self.small.rl.eval_prompts)
        counts = {
            "save": times(steps, config.eval_every, config.checkpoint_every),
            "evaluate": scale * (1 + times(steps, config.eval_every)),
        }
        loop = self.measure_loop("rl", facts, seconds, steps, round(answers * last["length"]), counts)
        if sampled:
            less = rollout * (1 - shorter) + (last["step_seconds"] - rollout) * (1 - LIVE)
            loop["run_seconds"] = max(0.0, loop["run_seconds"] - (steps - RL_STEPS) * less)
        return loop | {"answers": answers, "rollout_seconds": rollout}

    def measure_eval(self, seconds: float) -> Measured:
        """Measure the exams: every batch takes as long as the second; the first also compiles and loads."""
        found: Measured = {"exams": {}, "run_seconds": seconds}
        for stage in evaluate.STAGES:
            if not self.run.eval(stage).exists():
                continue
            record = read_json(self.run.eval(stage))
            asked = {name: scores for name, scores in record["tasks"].items() if "again_seconds" in scores}
            asked |= {f"core: {name}": scores for name, scores in record["core_tasks"].items()}
            for name, why in record["not_run"].items():
                self.problem("data", "eval", f"{name}: {why}")
            rates = found["exams"].setdefault(stage, {})
            for name, scores in asked.items():
                again = scores["again_seconds"]
                rates[name] = {"questions_per_second": scores["n"] / max(1e-9, again)}
                found["run_seconds"] += (self.exam_batches(name, scores) - 2) * again  # it was asked twice
        return found | {"run_seconds": max(0.0, found["run_seconds"])}

    def exam_batches(self, name: str, scores: dict[str, Any]) -> float:
        """Return the work of a whole exam over that of the rehearsed batch."""
        if name == "bits_per_byte":
            return self.config.eval.rows / max(1, self.small.eval.rows)
        times = scores["questions"] / max(1, scores["n"])
        if "endless" in scores:  # a trained model ends its answers sooner
            most: int = get_task(name, self.files).max_tokens  # type: ignore[attr-defined]
            times *= self.expected_length(name, most) / most
        return times

    def expected_length(self, name: str, most: int) -> int:
        """Return the tokens of an answer to a task that the mixture teaches; else the most that one may have."""
        taught = {parse_mixture_entry(entry)[0] for entry in self.config.sft.mixture}
        return min(most, CONVERSATIONS.get(name, UNKNOWN)[1]) if name in taught else most

    def result(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        m, stages = self.measured, {}
        parts = disk_parts(self.config)
        for name in (name for name in NAMES if name in m):
            seconds = m[name]["run_seconds"]
            stages[name] = {
                "rehearsed_seconds": m[name]["seconds"],
                "seconds": seconds,
                "disk_bytes": sum(part.bytes for part in parts if part.stages[0] == name),
                "usd": usd(m["machine"], seconds),
            }
        seconds = sum(stage["seconds"] for stage in stages.values())
        dollars = [stage["usd"] for stage in stages.values()]
        if jax.default_backend() == "cpu" and seconds > LONGEST_HOURS * 3600 and not self.config.train.allow_slow:
            line = unused_accelerator() or "take a machine with a GPU or TPU"
            self.problem("slow", "pretrain", f"the run would take {seconds / 86400:,.0f} days on this CPU; {line}")
        return {
            "tier": self.config.tier,
            "ok": not self.problems,
            "problems": self.problems,
            "measured": m,
            "stages": stages,
            "total": {
                "seconds": seconds,
                "hours": seconds / 3600,
                "disk_bytes": sum(part.bytes for part in parts if set(part.stages) & stages.keys()),
                "usd": None if None in dollars else sum(d for d in dollars if d is not None),
            },
            "rehearsal_seconds": time.perf_counter() - self.begin,
        }


def times(steps: int, *every: int) -> int:
    """Return how often something is due that comes `every` so many steps (0: never), and at the last step."""
    return len({steps}.union(*(range(each, steps + 1, each) for each in every if each > 0)))


# Smaller settings and made-up text


def smaller(config: Config, batch_rows: int, exam_rows: int) -> Config:
    """Return the configuration of a rehearsal: shapes, mesh, batch and precision stay, everything counted shrinks.

    `batch_rows`: of a micro-batch; `exam_rows`: what `eval.batch_rows` comes to on this machine.
    """
    train, rl_, exam = config.train, config.rl, config.eval
    answers = min(rl_.slots, rl_.prompts * rl_.samples)
    questions = min(rl_.eval_prompts, max(1, answers // rl_.eval_samples))
    config = replaced(config, "data", val_source="")  # a part of the sample is held out instead
    # slow attention is listed as a problem, and the rest is rehearsed all the same
    changes = {"eval_rows": min(train.eval_rows, 2 * batch_rows), "allow_slow": True}
    config = replaced(config, "train", **changes, tensorboard=False, wandb="", trackio="")
    config = replaced(config, "sft", exam_cases=min(config.sft.exam_cases, exam_rows))
    config = replaced(config, "rl", eval_every=1, eval_prompts=questions)
    return replaced(config, "eval", batch_rows=exam_rows, rows=min(exam.rows, 2 * exam_rows))


def made_up_documents(vocabulary: int, words: int = 250) -> Iterator[str]:
    """Yield endless documents of invented words, frequent and rare as in real text; the same every time.

    There are so many different words that a tokenizer of that vocabulary can be trained on `SAMPLE_BYTES` of it.
    """
    rng = random.Random("rehearsal")
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    lexicon = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3 * vocabulary)})
    rng.shuffle(lexicon)
    weights = list(itertools.accumulate(1 / (rank + 20) for rank in range(len(lexicon))))  # Zipf's law
    while True:
        yield " ".join(rng.choices(lexicon, cum_weights=weights, k=words)).capitalize() + "."


# On the terminal

SHOWN = ("steps", "step_seconds", "tokens_per_second", "mfu", "checkpoint_bytes", "checkpoint_seconds",
         "restore_seconds")  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the measurements, what the run will take, and what would go wrong, to standard output."""
    rows: Measured = {}
    for name, found in result["measured"].items():
        if name == "eval":
            rows |= {f"exams_of_{stage}": exams for stage, exams in found["exams"].items()}
        elif name not in NAMES:
            rows[name] = found
        elif "step_seconds" in found:
            rows[name] = {key: found[key] for key in SHOWN if key in found}
    print_facts(rows, f"{result['tier']}, rehearsed in {result['rehearsal_seconds']:.0f} s")
    figures = ("seconds", "disk_bytes", "usd")
    stages = result["stages"] | {"all": result["total"]}
    print_facts({"the_whole_run": {name: {key: stage[key] for key in figures} for name, stage in stages.items()}})
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if result["directory"]:
        console.print(f"kept: {result['directory']}")
    for problem in result["problems"]:
        console.print(f"WRONG  {problem['stage']}, {problem['kind']}: {problem['text']}")
    console.print("nothing would go wrong" if result["ok"] else f"{len(result['problems'])} things would go wrong")
