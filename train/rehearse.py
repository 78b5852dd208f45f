"""`--rehearse`: every stage of a tier on this machine with its real shapes and few steps, to find in minutes what would
end or spoil the whole run, and to say what it will take.

The stages are those of the real run, in a run directory of their own; the configuration only tells them to do less.
What cannot be had (no network, a data set that is missing) is replaced by made-up text and listed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxchat.attention import trusted_backend
from jaxchat.chat import render
from jaxchat.config import Config
from jaxchat.data import hub
from jaxchat.data.files import find_files
from jaxchat.data.hub import COMPRESSION
from jaxchat.data.loader import THREADS, Batches
from jaxchat.data.packing import Rows
from jaxchat.data.shards import cores
from jaxchat.data.sources import Unit, parse
from jaxchat.engine import Engine
from jaxchat.engine.loading import batch_rows
from jaxchat.errors import DataError, InterruptedRun, JaxchatError
from jaxchat.log import read_metrics, say
from jaxchat.run_dir import RunDir, read_json
from jaxchat.sharding import batch_devices, make_mesh, micro_batch
from jaxchat.tasks.base import GeneratedTask, Task, WrittenTask
from jaxchat.tasks.files import TaskFiles
from jaxchat.tasks.registry import TASKS, get_task, parse_mixture_entry
from jaxchat.tokenizer import TRAIN_CHARS, Tokenizer
from jaxchat.train_state import compute_dtype

from . import evaluate, pretrain, rl, sft
from .doctor import hardware, peak_rss, unused_accelerator
from .preflight import LONGEST_HOURS
from .stages import Stage, run_stages
from .targets import chip_of

# A rehearsal on the terminal.


GIB = 2**30
console = Console(highlight=False, markup=False)


def show(result: dict[str, Any]) -> None:
    """Print the measurements, what the run will take, and what would go wrong, to standard output."""
    m = result["measured"]
    for rows, title in ((measurements(m), f"{result['tier']}, rehearsed in {result['rehearsal_seconds']:.0f} s"),):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
    console.print(_forecast(result))
    if result["made_up"]:
        console.print("made up: " + "; ".join(result["made_up"]), soft_wrap=True)
    if result["directory"]:
        console.print(f"kept: {result['directory']}", soft_wrap=True)
    for problem in result["problems"]:
        console.print(f"WRONG  {problem['stage']}, {problem['kind']}: {problem['text']}", soft_wrap=True)
    console.print("nothing would go wrong" if result["ok"] else f"{len(result['problems'])} things would go wrong")


def measurements(m: dict[str, Any]) -> dict[str, str]:
    """A line for everything that was measured."""
    machine, rows = m["machine"], {}
    rows["devices"] = f"{machine['devices']} x {machine['device']} ({machine['platform']})"
    rows["attention"] = m["attention"]["backend"]
    if m["peak_memory_bytes"]:
        of = "the process" if machine["platform"] == "cpu" else "the fullest device"
        rows["peak memory"] = f"{m['peak_memory_bytes'] / GIB:.2f} GiB, {of}"
    for name in ("pretrain", "sft", "rl"):
        if name in m:
            rows |= _training(name, m[name])
    if found := m.get("pretrain"):
        rows["checkpoint"] = (
            f"{found['checkpoint_bytes'] / 1e6:,.0f} MB, {found['checkpoint_seconds']:.2f} s to write, of which "
            f"training waits {found['save_seconds']:.2f} s; {found['restore_seconds']:.2f} s to restore"
        )
        rows["loader"] = f"{found['loader_seconds'] * 1e3:,.1f} ms a batch"
    for stage, exams in m.get("eval", {}).get("exams", {}).items():
        cells = [f"{name} {exam['n'] / max(1e-9, exam['again_seconds']):,.3g}" for name, exam in exams.items()]
        rows[f"exams of {stage}"] = ", ".join(cells) + " a second"
    if answer := m.get("answer"):
        rows["one answer"] = (
            f"{answer['tokens']} tokens in {answer['seconds']:.2f} s, {answer['load_seconds']:.2f} s to load the model"
        )
    return rows


def _training(name: str, found: dict[str, Any]) -> dict[str, str]:
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    beside = ""
    if name == "rl":
        beside = f", of which {found['rollout_seconds']:.3g} s make {found['answers']} answers"
    return {
        name: f"{found['step_seconds']:.3g} s a step{beside}, {found['tokens_per_second']:,.0f} tokens/s{mfu}; "
        f"compiled in {found['compile_seconds']:.1f} s; {found['steps']:,} steps"
    }


def _forecast(result: dict[str, Any]) -> Table:
    table = Table(title="the whole run", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("stage", "time", "disk", "USD"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    table.add_column("how")
    for name, stage in result["stages"].items():
        table.add_row(name, _time(stage["seconds"]), _size(stage["disk_bytes"]), _usd(stage["usd"]), stage["how"])
    total = result["total"]
    table.add_row("all", _time(total["seconds"]), _size(total["disk_bytes"]), _usd(total["usd"]), "")
    return table


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _usd(dollars: float | None) -> str:
    return "?" if dollars is None else f"{dollars:.2f}"


# What a rehearsal says of the whole run: seconds, disk and dollars of every stage, and what would go wrong.
#
# Arithmetic alone, on what `rehearse.py` has measured; each function says what it multiplies and why. Download is not
# counted anywhere: its speed is not measured.


Measured = dict[str, Any]
LIVE = 0.5  # share of RL's groups that have right and wrong answers; the rehearsal makes all of them so


def forecast(config: Config, measured: Measured) -> dict[str, dict[str, Any]]:
    """Of every stage that was rehearsed: `seconds`, `disk_bytes`, `usd` (None: no price known) and `how`."""
    parts = {
        "tokenizer": (tokenizer_seconds, "seconds x text that the BPE sees / sample; at most"),
        "prepare": (prepare_seconds, "seconds x text / sample; download not counted"),
        "pretrain": (pretrain_seconds, "start + compile + steps + evaluations + saves + samples"),
        "sft": (sft_seconds, "rendering x conversations / rehearsed + as pretrain"),
        "rl": (rl_seconds, f"start + compile + steps of {LIVE:.0%} live groups + pass@k; answers as long as SFT's"),
        "eval": (eval_seconds, "compile + batches of every exam of every model; answers as long as SFT's"),
        "report": (report_seconds, "seconds x documents searched / rehearsed; at most"),
        "export": (lambda config, m: m["export"]["seconds"], "as rehearsed"),
    }
    disk, found = disk_bytes(config, measured), {}
    for name, (seconds, how) in parts.items():
        if name in measured:
            spent = float(seconds(config, measured))
            found[name] = {
                "rehearsed_seconds": measured[name]["seconds"],
                "seconds": spent,
                "disk_bytes": disk.get(name, 0),
                "usd": usd(measured["machine"], spent),
                "how": how,
            }
    return found


def usd(machine: dict[str, Any], seconds: float) -> float | None:
    """Devices x hours x the price of one; 0 on CPUs, None where the device has no price here."""
    if machine["platform"] == "cpu":
        return 0.0
    chip = chip_of(machine["device"])
    return None if chip is None else machine["devices"] * seconds / 3600 * chip.price


def text_ratio(measured: Measured) -> float:
    """Text of the run over text of the rehearsal."""
    return measured["text"]["bytes"] / max(1, measured["text"]["sample_bytes"])


def tokenizer_seconds(config: Config, m: Measured) -> float:
    """Counting words grows with the text; merging grows less, so this is a bound."""
    seen, sample = (min(TRAIN_CHARS, m["text"][key]) for key in ("bytes", "sample_bytes"))
    return m["tokenizer"]["seconds"] * (1.0 if config.tokenizer.path else max(1.0, seen / max(1, sample)))


def prepare_seconds(config: Config, m: Measured) -> float:
    """Tokenizing and packing read every byte once."""
    work = m["prepare"]["tokenize_seconds"] + m["prepare"]["pack_seconds"]
    return max(0.0, m["prepare"]["seconds"] - work) + work * text_ratio(m)


def loop_seconds(m: Measured, steps: int, compile_share: float) -> float:
    """What every training has: its start, the first step's compiling and the steps."""
    return m["fixed_seconds"] + compile_share * m["compile_seconds"] + steps * m["step_seconds"]


def repeated(times: list[float], count: int, scale: float, compile_share: float) -> float:
    """`count` repetitions of something whose first time compiles and whose last does not."""
    if not times or not count:
        return 0.0
    return max(0.0, times[0] - times[-1]) * compile_share + count * times[-1] * scale


def pretrain_seconds(config: Config, m: Measured) -> float:
    """Evaluations by their rows; saves by the time that they hold up the steps."""
    train, found, share = config.train, m["pretrain"], m["compile_share"]
    evaluations = len(marks(train.steps, train.eval_every, train.steps))
    rows = min(train.eval_rows, max(1, round(m["prepare"]["val_rows"] * text_ratio(m))))
    samples = train.steps // train.sample_every if train.sample_every else 0
    return (
        loop_seconds(found, train.steps, share)
        + repeated(found["timings"].get("validate", []), evaluations, rows / found["eval_rows"], share)
        + repeated(found["timings"].get("sample", []), samples, 1.0, share)
        + saves(train.steps, train.eval_every, train.checkpoint_every, train.sample_every) * found["save_seconds"]
    )


def sft_seconds(config: Config, m: Measured) -> float:
    """As pretraining; the rows are rendered from every conversation first, and exams are asked on the way."""
    sft, found, share = config.sft, m["sft"], m["compile_share"]
    steps = found["steps"]
    evaluations = len(marks(steps, sft.eval_every, steps))
    rows = min(config.train.eval_rows, max(1, round(found["val_rows"] * found["ratio"])))
    questions = sft.exam_cases / found["exam_cases"] if found["exam_cases"] else 0.0
    return (
        found["rows_seconds"] * found["ratio"]
        + loop_seconds(found, steps, share)
        + repeated(found["timings"].get("validate", []), evaluations, rows / found["eval_rows"], share)
        + repeated(found["timings"].get("evaluate", []), evaluations, questions, share)
        + saves(steps, sft.eval_every, config.train.checkpoint_every) * found["save_seconds"]
    )


def rl_seconds(config: Config, m: Measured) -> float:
    """Sampling by tokens: a trained model ends its answers as SFT's end, the rehearsal's writes on to the limit.

    An evaluation is its answers, and what it takes beside them: compiling, the KL divergence.
    """
    rl, found, share = config.rl, m["rl"], m["compile_share"]
    per_answer = found["rollout_seconds"] / found["answers"]
    shorter = min(1.0, found["expected_length"] / max(1.0, found["length"]))
    step = found["rollout_seconds"] * shorter + found["update_seconds"] * LIVE
    answers = min(rl.eval_prompts, found["exam_questions"]) * rl.eval_samples
    beside = [max(0.0, spent - per_answer * found["eval_answers"]) for spent in found["timings"].get("evaluate", [])]
    evaluations = len(marks(found["steps"], rl.eval_every, found["steps"]))
    first, later = (beside[0], beside[-1]) if beside else (0.0, 0.0)
    return (
        loop_seconds(found | {"step_seconds": step}, found["steps"], share)
        + (first + later) * share
        + (1 + evaluations) * answers * per_answer * shorter
        + saves(found["steps"], rl.eval_every, rl.checkpoint_every) * found["save_seconds"]
    )


def eval_seconds(config: Config, m: Measured) -> float:
    """Every exam's batches at the second batch's pace, and what the first took longer: compiling, loading."""
    found = m["eval"]
    exams = [exam for exams in found["exams"].values() for exam in exams.values()]
    rehearsed = sum(exam["seconds"] + exam["again_seconds"] for exam in exams)
    return max(0.0, found["seconds"] - rehearsed) + sum(exam_seconds(exam, m["compile_share"]) for exam in exams)


def exam_seconds(exam: dict[str, Any], compile_share: float) -> float:
    """`shorter`: tokens of an answer that is expected over those of the rehearsal's."""
    first = max(0.0, exam["seconds"] - exam["again_seconds"]) * compile_share
    return first + exam["again_seconds"] * exam["questions"] / max(1, exam["n"]) * exam["shorter"]


def report_seconds(config: Config, m: Measured) -> float:
    """The search for the exams' text in the training text reads `eval.overlap_documents` documents."""
    limit, documents = config.eval.overlap_documents, m["prepare"]["documents"]
    wanted = documents * text_ratio(m)
    searched = wanted if limit < 0 else min(limit, wanted)
    return m["report"]["seconds"] * max(1.0, searched / max(1, documents))


def marks(steps: int, every: int, last: int) -> set[int]:
    """Step counts at which something that comes `every` so many steps (0: never), and at the `last`, is due."""
    return {*range(every, steps + 1, every)} | {last} if every > 0 else {last}


def saves(steps: int, *every: int) -> int:
    """Checkpoints that a training writes: before every evaluation and sample, and where they are due by themselves."""
    return len(set().union(*(marks(steps, each, steps) for each in every)))


def disk_bytes(config: Config, m: Measured) -> dict[str, int]:
    """Bytes by stage at the end: shards, rows, checkpoints that are kept, exports; `download` of the hub's files."""
    ratio, found = text_ratio(m), {}
    if m["text"].get("hub_bytes"):
        found["download"] = round(m["text"]["hub_bytes"] / COMPRESSION)
    if "prepare" in m:
        found["prepare"] = round(m["prepare"]["disk_bytes"] * ratio)
    for name in ("pretrain", "sft", "rl"):
        if name in m:
            train, steps = config.train, m[name]["steps"]
            every = config.rl.checkpoint_every if name == "rl" else train.checkpoint_every
            kept = min(train.keep_last, saves(steps, every)) + (steps // train.keep_every if train.keep_every else 0)
            found[name] = m[name]["checkpoint_bytes"] * kept
    if "sft" in m:
        found["sft"] += round(m["sft"]["rows_bytes"] * m["sft"]["ratio"])
    if "export" in m:
        found["export"] = m["export"]["disk_bytes"]
    return found


def most_disk(config: Config, m: Measured) -> int:
    """Bytes at the worst moment: everything, and a checkpoint that is being written before an old one goes."""
    writing = max((m[name]["checkpoint_bytes"] for name in ("pretrain", "sft", "rl") if name in m), default=0)
    return sum(disk_bytes(config, m).values()) + writing


def problems(config: Config, m: Measured) -> list[dict[str, str]]:
    """What the measurements say would go wrong; failures and missing data are listed by whoever met them."""
    found = []
    if m["attention"]["fallback"]:
        text = f"attention falls back to XLA's, which is slow: {m['attention']['fallback']}"
        found.append({"kind": "attention", "stage": "pretrain", "text": text})
    if (needed := most_disk(config, m)) > m["free_bytes"]:
        text = f"the run needs {needed / 1e9:,.3g} GB of disk, and {m['free_bytes'] / 1e9:,.3g} GB are free"
        found.append({"kind": "disk", "stage": "pretrain", "text": text})
    every = {"pretrain": config.train.checkpoint_every, "sft": config.train.checkpoint_every}
    for name, steps in (every | {"rl": config.rl.checkpoint_every}).items():
        if name not in m:
            continue
        if saves(m[name]["steps"], steps) < 2:
            continue
        between, written = steps * m[name]["step_seconds"], m[name]["checkpoint_seconds"]
        if written > between:
            text = f"a save takes {written:.3g} s, and {steps} steps between two saves take {between:.3g} s"
            found.append({"kind": "save", "stage": name, "text": text})
    loader = m.get("pretrain", {}).get("loader_seconds", 0.0)
    if loader > m.get("pretrain", {}).get("step_seconds", 0.0):
        text = f"the loader needs {loader:.3g} s for a batch, a step takes {m['pretrain']['step_seconds']:.3g} s"
        found.append({"kind": "loader", "stage": "pretrain", "text": text})
    return found


HALF = 4  # steps of pretraining before the save that the other half resumes from
SFT_STEPS, RL_STEPS = 4, 2
STEADY_SECONDS = 6.0  # of steps to take the pace from: short steps are repeated
MOST_STEPS = 32
SAMPLE_BYTES, MOST_PARTS = 16_000_000, 8  # of text: so much for each core, at most
FEW_CONVERSATIONS, CONVERSATIONS = 30_000, 4_000  # up to which a mixture is rendered whole; how many of a larger one
# Conversations of a training set that is not at hand, as published, and the words of a made-up one
PUBLISHED = {
    "smoltalk": (460_341, 600),
    "mmlu": (99_842, 80),
    "gsm8k": (7_473, 100),
    "arc_easy": (2_251, 50),
    "arc_challenge": (1_119, 50),
}
STAND_IN = "word_problems"  # the environment of RL where the tier's own is missing
QUESTION = [{"role": "user", "content": "hello"}]


def rehearse(
    config: Config, directory: RunDir, stages: Sequence[Stage], reasons: dict[str, str], keep: bool, as_json: bool
) -> bool:
    """Rehearse the stages beside `directory`, print what the whole run will take; whether nothing would go wrong.

    Everything written is removed at the end, also after an error or a signal, unless `keep`.
    Raises `UsageError` for a configuration that no stage would take, `InterruptedRun` after a signal.
    """
    for stage in stages:
        if stage.wanted(config):
            with contextlib.suppress(DataError):  # met again, and listed, by the stage
                stage.check(config)
    made_parents = [p for p in directory.root.absolute().parents if not p.exists()]
    directory.root.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{directory.root.name}-rehearsal-", dir=directory.root.absolute().parent))
    try:
        rehearsal = Rehearsal(config, RunDir(folder), reasons)
        rehearsal.work([stage for stage in stages if stage.wanted(config)])
        result = rehearsal.result() | {"directory": str(folder) if keep else None}
    except (KeyboardInterrupt, InterruptedRun):
        left = f"{folder} is kept" if keep else "what it wrote is removed"
        raise InterruptedRun(f"rehearsal stopped by a signal; {left}") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else's by now
                for parent in made_parents:
                    parent.rmdir()
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    return result["ok"]


class Rehearsal:
    """One rehearsal: the real configuration, the one that does less, what was measured and what went wrong."""

    def __init__(self, config: Config, run: RunDir, reasons: dict[str, str]):
        self.config, self.run, self.reasons = config, run, reasons
        self.mesh = make_mesh(config.mesh)
        self.batch_rows = micro_batch(config, batch_devices(self.mesh))[0]
        self.small = smaller(config, self.batch_rows, batch_rows(config.model, config.eval.batch_rows, self.mesh))
        self.begin = time.perf_counter()
        self.failed: set[str] = set()
        self.problems: list[dict[str, str]] = []
        self.made_up: list[str] = []
        self.measured: dict[str, Any] = {"machine": hardware(), "compile_share": 1.0}
        self.measured["free_bytes"] = shutil.disk_usage(run.root).free

    def problem(self, kind: str, stage: str, error: object) -> None:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = {"kind": kind, "stage": stage, "text": text}
        if found not in self.problems:
            self.problems.append(found)
            say(f"  {stage}: {text}", style="yellow")

    def work(self, stages: Sequence[Stage]) -> None:
        """Run them in order; a failure is listed, and what does not need that stage goes on."""
        say("attention is compared with its reference")
        model = self.config.model
        backend, why = trusted_backend(model, compute_dtype(self.config, self.mesh))
        self.measured["attention"] = {"backend": backend, "fallback": why}
        self._text()
        runs: dict[str, Callable[[Config, RunDir], dict[str, Any]]] = {
            "pretrain": self._pretrain,
            "sft": self._sft,
            "rl": lambda config, run: rl.run(config, run, RL_STEPS),
            "eval": functools.partial(evaluate.run, one_batch=True),
        }
        measures = {
            "prepare": self._measure_prepare,
            "pretrain": self._measure_pretrain,
            "sft": self._measure_sft,
            "rl": self._measure_rl,
            "eval": self._measure_eval,
            "export": self._measure_export,
        }
        for stage in stages:
            if stage.name == "sft":
                self._mixture()
            if stage.name == "rl":
                self._environment()
            if missing := self.failed & set(stage.needs):
                say(f"{stage.name:<10} not rehearsed: it needs {', '.join(sorted(missing))}", style="yellow")
                self.failed.add(stage.name)
                continue
            if self._ran(dataclasses.replace(stage, run=runs.get(stage.name, stage.run))):
                record = self.run.records()[stage.name]
                self.measured[stage.name] = {"seconds": record["seconds"]}
                if stage.name in measures:
                    self.measured[stage.name] |= measures[stage.name](record["facts"], record["seconds"])
        if "pretrain" in self.measured:
            self._answer()
        self.measured["peak_memory_bytes"] = peak_memory()

    def _ran(self, stage: Stage) -> bool:
        """Whether a stage ran to its end; text that is too little for the tokenizer or the rows gets made-up text."""
        for again in (False, True):
            try:
                run_stages(self.small, self.run, [stage], self.reasons)
                return True
            except Exception as error:  # whatever ends a stage here ends it in the run
                of_text = isinstance(error, DataError) and stage.name in ("tokenizer", "prepare") and not again
                if not of_text or self.measured["text"]["sample_bytes"] == self.measured["text"]["bytes"]:
                    self.problem("failed", stage.name, error)
                if not of_text:
                    break
                self._make_up_text("the text at hand is too little")
        self.failed.add(stage.name)
        return False

    # What the stages are given

    def _text(self) -> None:
        """Text at hand whole where it is little, else the beginning of each source; made up where there is none."""
        data, sizes = self.config.data, {"sample_bytes": 0, "bytes": 0, "hub_bytes": 0}
        self.measured["text"] = sizes
        sources = []
        try:
            for number, (source, share) in enumerate(parse(data.source)):
                name, found = self._source(source, share, self.run.root / "text" / str(number))
                sources.append(f"{share} {name}")
                for key, value in found.items():
                    sizes[key] += value
        except (DataError, OSError) as error:
            self.problem("hub" if "hf:" in data.source else "data", "prepare", error)
            self._make_up_text(f"{data.source} cannot be had")
            return
        if sources != [f"{share} {name}" for name, share in parse(data.source)]:
            source = " + ".join(sources) if len(sources) > 1 else sources[0].partition(" ")[2]
            self.small = replaced(self.small, "data", source=source)

    def _source(self, source: str, share: float, folder: Path) -> tuple[str, dict[str, int]]:
        """(the source to take, its sizes): itself where it is generated or little, else a sample in `folder`."""
        data, most = self.config.data, int(SAMPLE_BYTES * min(cores(), MOST_PARTS) * share)
        if source.startswith("hf:"):
            files = hub.fetch(source, 1, Path(data.cache_dir).expanduser() / "data", data.mirror)
            total = round(data.text_bytes * share) if data.text_bytes > 0 else sum(map(hub.text_size, files))
        elif source.startswith("files:"):
            files = find_files(source)
            total = sum(map(hub.text_size, files))
            if total <= most:
                return source, {"sample_bytes": total, "bytes": total}
        else:
            return source, {}
        size = write_sample(files, data.encoding, folder, most)
        sizes = {"sample_bytes": size, "bytes": max(size, total), "hub_bytes": total if source[:3] == "hf:" else 0}
        return f"files:{folder}", sizes

    def _make_up_text(self, why: str) -> None:
        """Made-up text for the rehearsal, as much as a sample, with words enough for the vocabulary."""
        folder, size = self.run.root / "text" / "made-up", SAMPLE_BYTES
        write_jsonl(folder, made_up_documents(size, self.config.model.vocab_size), "text", size, parts=cores())
        self.small = replaced(self.small, "data", source=f"files:{folder}")
        self.made_up.append(f"text ({why})")
        total = max(size, self.config.data.text_bytes, self.measured["text"]["bytes"])
        hub_bytes = total if "hf:" in self.config.data.source else 0
        self.measured["text"] = {"sample_bytes": size, "bytes": total, "hub_bytes": hub_bytes}

    def _mixture(self) -> None:
        """All conversations of a small mixture, a share of a large one; made-up ones for a data set that is missing."""
        counts: dict[str, float] = {}
        entries, missing, files = [], False, TaskFiles.of(self.config, download=True)
        for entry in self.config.sft.mixture:
            name, count, epochs = parse_mixture_entry(entry)
            known = PUBLISHED.get(name, (1_000, 100))
            if name in TASKS and not isinstance(get_task(name, files), GeneratedTask):
                try:
                    get_task(name, files).fetch()
                except DataError as error:
                    self.problem("data", "sft", error)
                    missing = True
                    self.made_up.append(f"conversations of {name}")
                    name = self._made_up_conversations(name, min(CONVERSATIONS, count or known[0]), known[1])
            counts[entry] = (count or known[0]) * epochs
            entries.append((name, count or (known[0] if name in PUBLISHED else count), epochs))
        share = min(1.0, CONVERSATIONS / max(1.0, sum(counts.values())))
        share = share if missing or sum(counts.values()) > FEW_CONVERSATIONS else 1.0
        mixture = []
        for name, count, epochs in entries:
            taken = count if share == 1.0 or count is None else max(1, round(count * share))
            mixture.append(f"{name}{'' if taken is None else f':{taken}'}*{epochs}")
        self.measured["sft_ratio"] = 1 / share
        epochs_of_steps = self.config.sft.epochs / share  # as many steps as the whole mixture makes
        self.small = replaced(self.small, "sft", mixture=tuple(mixture), epochs=epochs_of_steps)

    def _made_up_conversations(self, name: str, count: int, words: int) -> str:
        """A file of them, as an entry of the mixture."""
        texts = made_up_documents(count * words * 8, self.config.model.vocab_size, words)
        conversations = (
            [{"role": "user", "content": text[: len(text) // 4]}, {"role": "assistant", "content": text}]
            for text in itertools.islice(texts, count)
        )
        folder = self.run.root / "text" / name
        write_jsonl(folder, conversations, "messages")
        return f"files:{folder}"

    def _environment(self) -> None:
        """A generated task instead of an environment whose questions are missing."""
        try:
            rl.environment(self.config)
        except DataError as error:
            self.problem("data", "rl", error)
            name = self.config.rl.environment
            self.made_up.append(f"questions of {name} for RL ({STAND_IN} instead)")
            known = PUBLISHED.get(name, (1_000, 0))[0]
            steps = self.config.rl.steps
            steps = steps if steps > 0 else max(1, round(known / self.config.rl.prompts))
            self.small = replaced(self.small, "rl", environment=STAND_IN, steps=steps, format_bonus=0.0)

    # What is done otherwise than in the run

    def _pretrain(self, config: Config, run: RunDir) -> dict[str, Any]:
        """Two halves with a save and a restore between; the second is long enough to take the pace from."""
        begin = time.perf_counter()
        first = pretrain.run(replaced(config, "train", eval_every=0, sample_every=0), run, HALF)
        wall = time.perf_counter() - begin
        steps = [record["step_seconds"] for record in read_metrics(run.stage("base") / "metrics.jsonl")]
        step = min(steps[1:] or steps)
        last = HALF + max(HALF, min(MOST_STEPS, int(STEADY_SECONDS / step)))
        middle = last // 2
        sample_every = middle if config.train.sample_every else 0
        second = pretrain.run(replaced(config, "train", eval_every=middle, sample_every=sample_every), run, last)
        return second | {"first_wall": wall, "first_timings": first["timings"]}

    def _sft(self, config: Config, run: RunDir) -> dict[str, Any]:
        """So many steps that they take `STEADY_SECONDS`, to go by pretraining's pace; two evaluations."""
        pace = self.measured["pretrain"]["step_seconds"] * config.sft.batch_tokens / config.train.batch_tokens
        steps = max(SFT_STEPS, min(MOST_STEPS, int(STEADY_SECONDS / pace)))
        return sft.run(replaced(config, "sft", eval_every=steps // 2), run, steps)

    def _answer(self) -> None:
        """One answer from the engine, as whoever chats with the finished run gets it."""
        begin = time.perf_counter()
        try:
            engine = Engine.from_pretrained(self.run.root, slots=1)
            loaded = time.perf_counter()
            tokens = min(32, self.config.model.seq_len // 2)
            result = engine.generate([engine.chat_request(QUESTION, max_tokens=tokens)])[0]
        except Exception as error:
            self.problem("failed", "answer", error)
            return
        spent = time.perf_counter() - loaded
        self.measured["answer"] = {"load_seconds": loaded - begin, "seconds": spent, "tokens": len(result.tokens)}

    # What they leave behind

    def _measure_prepare(self, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        text, splits = self.measured["text"], (facts["train"], facts["val"])
        size = sum(split["bytes"] for split in splits)
        text["bytes"] += max(0, size - text["sample_bytes"])  # of sources that are read as they are
        text["sample_bytes"] = max(size, text["sample_bytes"])
        return {
            "tokenize_seconds": facts["tokenize_seconds"],
            "pack_seconds": facts["pack_seconds"],
            "bytes_per_token": size / max(1, sum(split["tokens"] for split in splits)),
            "documents": facts["train"]["documents"],
            "val_rows": facts["val"]["rows"],
            "disk_bytes": disk_usage(self.run.data),
        }

    def _measure_loop(
        self, name: str, timings: dict[str, list[float]], wall: float, resumed: int | None = None
    ) -> dict[str, Any]:
        """Of any training: its pace without the steps that compile, and everything beside the steps.

        `timings` and `wall` are of the steps before the one that it `resumed` at (None: of all).
        """
        records = read_metrics(self.run.stage(name) / "metrics.jsonl")
        spent = [record["step_seconds"] for record in records]
        compiled = (0, resumed)
        steady = [s for i, s in enumerate(spent) if i not in compiled] or spent
        step = statistics.median(steady)
        beside = ("save", "validate", "evaluate", "sample")
        counted = sum(spent[:resumed]) + sum(sum(timings.get(key, [])) for key in beside)
        mfu = [r["mfu"] for i, r in enumerate(records) if i not in compiled and r.get("mfu") is not None]
        saved = sorted((p for p in self.run.stage(name).glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
        return {
            "rehearsed_steps": len(spent),
            "step_seconds": step,
            "tokens_per_second": self.config.train.batch_tokens / step,
            "mfu": statistics.median(mfu) if mfu else None,
            "compile_seconds": max(0.0, spent[0] - step),
            "fixed_seconds": max(0.0, wall - counted),
            "save_seconds": timings["save"][-1],
            "checkpoint_seconds": max(timings["written"]),
            "checkpoint_bytes": disk_usage(saved[-1]),
            "timings": timings,
        }

    def _measure_pretrain(self, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        before, after = facts["first_timings"], facts["timings"]
        half = self._measure_loop("base", before, facts["first_wall"], HALF)
        timings = {key: before.get(key, []) + after.get(key, []) for key in after}
        spent = [r["step_seconds"] for r in read_metrics(self.run.stage("base") / "metrics.jsonl")]
        if half["compile_seconds"] > 0 and len(spent) > HALF:
            again = (spent[HALF] - half["step_seconds"]) / half["compile_seconds"]
            self.measured["compile_share"] = self._compile_share(again)
        rows = Rows(self.run.data / "rows" / "train", verify=False)
        batches = Batches(rows, *micro_batch(self.config, batch_devices(self.mesh)), self.config.seed)
        loading = []
        for number in range(HALF):
            begin = time.perf_counter()
            batches.batch(number)
            loading.append(time.perf_counter() - begin)
        return half | {
            "steps": self.config.train.steps,
            "eval_rows": min(self.small.train.eval_rows, self.measured["prepare"]["val_rows"]),
            "timings": timings,
            "save_seconds": timings["save"][-1],
            "checkpoint_seconds": max(timings["written"]),
            "restore_seconds": after["start"][0],
            "resumed_first_seconds": spent[HALF] if len(spent) > HALF else None,
            "loader_seconds": min(loading) / THREADS,
        }

    def _compile_share(self, again: float) -> float:
        """Share of the compile time that the real run will see: with a persistent cache it reads the programs that the
        rehearsal has compiled, as the resumed half did."""
        return min(1.0, max(0.0, again)) if jax.config.jax_compilation_cache_dir else 1.0  # type: ignore[attr-defined]

    def _measure_sft(self, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        found = self._measure_loop("sft", facts["timings"], seconds - facts["rows_seconds"])
        return found | {
            "steps": facts["steps"],
            "ratio": self.measured["sft_ratio"],
            "rows_seconds": facts["rows_seconds"],
            "rows_bytes": disk_usage(self.run.data / "sft"),
            "conversations": sum(facts["conversations"].values()),
            "val_rows": facts["val"]["rows"],
            "eval_rows": max(1, min(self.small.train.eval_rows, facts["val"]["rows"])),
            "exam_cases": self.small.sft.exam_cases,
            "tokens_per_second": self.config.sft.batch_tokens / found["step_seconds"],
        }

    def _measure_rl(self, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        found = self._measure_loop("rl", facts["timings"], seconds)
        records = read_metrics(self.run.stage("rl") / "metrics.jsonl")
        last, config = records[-1], self.config.rl
        # the answers of a step are made before the step before is read, so the last one's seconds are its update alone
        update, rollout = last["step_seconds"], last["rollout_seconds"]
        spent = sum(record["step_seconds"] - record["rollout_seconds"] for record in records)
        task = get_task(self.small.rl.environment, TaskFiles.of(self.config, download=True))
        questions = len(task.examples()) if isinstance(task, WrittenTask) else 0
        answers = config.prompts * config.samples
        return found | {
            "steps": facts["steps"],
            "answers": answers,
            "length": last["length"],
            "expected_length": self._expected_length(self.config.rl.environment, config.max_tokens),
            "step_seconds": rollout + update,
            "rollout_seconds": rollout,
            "update_seconds": update,
            "exam_questions": questions,
            "eval_answers": min(self.small.rl.eval_prompts, questions) * config.eval_samples,
            "compile_seconds": max(0.0, spent - len(records) * update),
            "tokens_per_second": answers * last["length"] / (rollout + update),
        }

    def _measure_eval(self, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        exams: dict[str, dict[str, Any]] = {}
        for stage in evaluate.STAGES:
            if not self.run.eval(stage).exists():
                continue
            record = read_json(self.run.eval(stage))
            core = {f"core: {name}": scores for name, scores in record["core_tasks"].items()}
            sat = {name: scores for name, scores in record["tasks"].items() if "again_seconds" in scores}
            exams[stage] = {name: self._exam(name, scores) for name, scores in (sat | core).items()}
            for name, why in record["not_run"].items():
                self.problem("data", "eval", f"{name}: {why}")
        return {"exams": exams}

    def _exam(self, name: str, scores: dict[str, Any]) -> dict[str, Any]:
        """Seconds and sizes of one; `shorter` as in `forecast.exam_seconds`."""
        questions, count, shorter = scores["questions"], scores["n"], 1.0
        if name == "bits_per_byte":
            text = self.measured["text"]
            whole = {"text": (self.measured["prepare"]["val_rows"], text["bytes"] / max(1, text["sample_bytes"]))}
            if "conversations" in scores:
                whole["conversations"] = (self.measured["sft"]["val_rows"], self.measured["sft_ratio"])
            count = sum(scores[kind]["n"] for kind in whole)
            limit = self.config.eval.rows
            questions = sum(min(limit, max(1, round(rows * ratio))) for rows, ratio in whole.values())
        elif "endless" in scores:
            task: Any = get_task(name, TaskFiles.of(self.config, download=False))
            expected = self._expected_length(name, task.max_tokens)
            endless = scores["endless"] / max(1, scores["n"])
            shorter = min(1.0, expected / max(1.0, endless * task.max_tokens + (1 - endless) * expected))
        times = {key: scores[key] for key in ("seconds", "again_seconds")}
        return times | {"n": count, "questions": questions, "shorter": shorter}

    def _measure_export(self, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        return {"disk_bytes": disk_usage(self.run.export)}

    @functools.cache  # noqa: B019  # one rehearsal a process
    def _expected_length(self, name: str, most: int) -> float:
        """Tokens of an answer to a task, as the mixture teaches it; the most that one may have where it does not."""
        if name not in {parse_mixture_entry(entry)[0] for entry in self.config.sft.mixture}:
            return float(most)
        tokenizer, lengths = Tokenizer.load(self.run.tokenizer), list[int]()
        try:
            task: Task = get_task(name, TaskFiles.of(self.config, download=False))
            for conversation in itertools.islice(task.train_conversations(200, self.config.seed), 200):
                answers = sum(message["role"] == "assistant" for message in conversation)
                lengths.append(round(sum(render(tokenizer, conversation)[1]) / max(1, answers)))
        except JaxchatError:
            return float(most)
        return min(float(most), statistics.mean(lengths)) if lengths else float(most)

    def result(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        stages = forecast(self.config, self.measured)
        listed = self.problems + problems(self.config, self.measured)
        seconds = sum(stage["seconds"] for stage in stages.values())
        if jax.default_backend() == "cpu" and seconds > LONGEST_HOURS * 3600 and not self.config.train.allow_slow:
            line = unused_accelerator() or "take a machine with a GPU or TPU"
            text = f"the run would take {seconds / 86400:,.0f} days on this CPU; {line}"
            listed.append({"kind": "slow", "stage": "pretrain", "text": text})
        dollars = [stage["usd"] for stage in stages.values()]
        return {
            "tier": self.config.tier,
            "ok": not listed,
            "problems": listed,
            "made_up": self.made_up,
            "measured": self.measured,
            "stages": stages,
            "total": {
                "seconds": seconds,
                "hours": seconds / 3600,
                "disk_bytes": most_disk(self.config, self.measured),
                "usd": None if None in dollars else sum(d for d in dollars if d is not None),
            },
            "rehearsal_seconds": time.perf_counter() - self.begin,
        }


def smaller(config: Config, batch_rows: int, exam_rows: int) -> Config:
    """The configuration of a rehearsal: shapes, mesh, batch and precision stay, everything that is counted shrinks.

    `batch_rows`: of a micro-batch; `exam_rows`: what `eval.batch_rows` comes to on this machine.
    """
    config = replaced(config, "eval", batch_rows=exam_rows)
    train, rl_, exam = config.train, config.rl, config.eval
    answers = min(rl_.slots, rl_.prompts * rl_.samples)
    config = replaced(config, "data", val_source="")  # a part of the sample is held out instead
    config = replaced(config, "train", eval_rows=min(train.eval_rows, 2 * batch_rows), tensorboard=False, wandb="")
    cases = min(config.sft.exam_cases, exam.batch_rows)
    config = replaced(config, "sft", exam_cases=cases)
    questions = min(rl_.eval_prompts, max(1, answers // rl_.eval_samples))
    config = replaced(config, "rl", eval_every=0, eval_prompts=questions)
    return replaced(config, "eval", rows=min(exam.rows, 2 * exam.batch_rows))


def replaced(config: Config, section: str, **values: Any) -> Config:
    """With other values of one section."""
    changed: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **values)}
    return dataclasses.replace(config, **changed)


def write_sample(files: Sequence[Path], encoding: str, folder: Path, size: int) -> int:
    """Write the first `size` bytes of text in these files as jsonl; how many there were."""
    documents = itertools.chain.from_iterable(Unit("", str(path), encoding).documents() for path in files)
    return write_jsonl(folder, documents, "text", size, min(cores(), MOST_PARTS))


def write_jsonl(folder: Path, records: Iterator[Any], key: str, size: int | None = None, parts: int = 1) -> int:
    """Write `{key: record}` lines into `parts` files until they hold `size` bytes of text; how many they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    written, files = 0, [open(folder / f"{n:02d}.jsonl", "w", encoding="utf-8") for n in range(parts)]
    try:
        for number, record in enumerate(records):
            line = json.dumps({key: record})
            files[number % parts].write(line + "\n")
            written += len(record.encode("utf-8", "replace")) if isinstance(record, str) else len(line)
            if size is not None and written >= size:
                break
    finally:
        for file in files:
            file.close()
    return written


def made_up_documents(size: int, vocabulary: int, words: int = 250) -> Iterator[str]:
    """Text of invented words, `words` in a document, frequent and rare as in real text; the same every time.

    So many different words that a tokenizer of that vocabulary can be trained on `SAMPLE_BYTES` of it.
    """
    rng = random.Random("rehearsal")
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    lexicon = list({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3 * vocabulary)})
    lexicon.sort()
    rng.shuffle(lexicon)
    weights = list(itertools.accumulate(1 / (rank + 20) for rank in range(len(lexicon))))  # Zipf's law
    written = 0
    while written < size:
        text = " ".join(rng.choices(lexicon, cum_weights=weights, k=words)).capitalize() + "."
        written += len(text)
        yield text


def disk_usage(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_memory() -> int | None:
    """Bytes of the fullest device, of the process on a CPU; None where neither is known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return max(peaks) if peaks else peak_rss()
