"""The stages of a run, in order; what each reads; and the record that lets a command be repeated safely.

A stage is keyed by its inputs: the configuration keys it reads and the digests of the stages before it. Unchanged and
done, it does nothing. Changed, a cheap stage (exams, report) runs again and a trained one refuses, naming the keys.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat import hosts
from jaxchat.config import Config, load_config
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.paths import RunDir, atomic_write, read_json, write_json
from jaxchat.tasks.files import identity_digest
from jaxchat.toml import flatten, to_toml
from train import evaluate, prepare, pretrain, report, rl, sft, tokenizer
from train.machine import commit, hardware, peak_rss, versions

# Keys that change how fast or how often, never what is computed (beyond float rounding).
FREE_KEYS = (
    "mesh.",
    "serve.",
    "data.engine",
    "data.workers",
    "data.cache_dir",
    "data.mirror",
    "train.device_batch_rows",
    "train.checkpoint_every",
    "train.keep_last",
    "train.eval_",
    "train.sample_every",
    "train.loss_chunk",
    "train.remat",
    "train.scan_unroll",
    "train.max_bad_steps",
    "sft.eval_every",
    "sft.exam_cases",
    "rl.eval_",
    "rl.checkpoint_every",
    "rl.slots",
)
SHARED_SECONDS = 60.0  # until what process 0 wrote must be seen by the others


@dataclass(frozen=True)
class Stage:
    """`run(config, run_dir)` returns facts for the record, `digest` among them; `outputs` must exist when done."""

    name: str
    run: Callable[[Config, RunDir], dict[str, Any]]
    reads: tuple[str, ...]  # configuration keys, or prefixes that end in a dot
    needs: tuple[str, ...]  # stages whose digests are inputs
    outputs: tuple[str, ...]  # paths inside the run directory; <step> stands for a complete checkpoint
    trained: bool  # refuses changed inputs instead of running again
    uses: tuple[str, ...] = ()  # stages whose digests are inputs where they are done, but which need not be
    check: Callable[[Config], None] = lambda config: None  # of settings, before anything runs
    wanted: Callable[[Config], bool] = lambda config: True  # False: this configuration goes without it
    looks: Callable[[Config], str] = lambda config: ""  # what it finds outside the run, an input too
    joint: bool = False  # by all processes together; the others by process 0, while the rest waits


STAGES = (
    Stage("tokenizer", tokenizer.run, tokenizer.READS, (), ("tokenizer/tokenizer.json",), True),
    Stage("prepare", prepare.run, ("data.", "model.seq_len"), ("tokenizer",), prepare.OUTPUTS, True),
    Stage(
        "pretrain",
        pretrain.run,
        ("seed", "model.", "train.", "optim."),
        ("prepare",),
        ("base/<step>",),
        True,
        joint=True,
    ),
    Stage(
        "sft",
        sft.run,
        ("seed", "sft."),
        ("pretrain",),
        ("sft/<step>",),
        True,
        check=sft.check,
        looks=identity_digest,
        wanted=lambda config: bool(config.sft.mixture),
        joint=True,
    ),
    Stage(
        "rl",
        rl.run,
        ("seed", "rl."),
        ("sft",),
        ("rl/<step>",),
        True,
        check=rl.check,
        wanted=lambda config: bool(config.rl.environment and config.sft.mixture),
        joint=True,
    ),
    Stage(
        "eval",
        evaluate.run,
        ("eval.", "tasks."),
        ("pretrain",),
        ("eval/base.json",),
        False,
        uses=("sft", "rl"),
        check=evaluate.check,
        looks=evaluate.looks,
    ),
    Stage("report", report.run, (), ("eval",), ("report.md", "report.json"), False),
)
NAMES = tuple(stage.name for stage in STAGES)


def select(only: str | None, start: str | None) -> list[Stage]:
    """The stages of `--stages a,b` or `--from a`, and those that they need; all of them without either.

    What is needed and done already does nothing but make sure that the settings still are those it was made with.
    `UsageError` names an unknown stage.
    """
    names = list(NAMES)
    if only:
        names = [name.strip() for name in only.split(",") if name.strip()]
    for name in [*names, *([start] if start else [])]:
        if name not in NAMES:
            raise UsageError(f"stage {name!r} is unknown; stages: {', '.join(NAMES)}")
    if start:
        names = [name for name in names if NAMES.index(name) >= NAMES.index(start)]
    wanted = set(names)
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    return [stage for stage in STAGES if stage.name in wanted]


def run_stages(config: Config, run: RunDir, stages: Sequence[Stage], reasons: dict[str, str]) -> None:
    """Run what is not done yet, in order; every stage's record is in `stages.json` from its start on.

    Of several processes the first decides and keeps the records.
    """
    stages = [stage for stage in stages if stage.wanted(config)]
    hosts.check_same([flatten(config), [stage.name for stage in stages]])
    if hosts.index() > 0:
        _follow(config, run)
        return
    with run.lock():
        records = load_records(run)
        for stage in stages:
            stage.check(config)
        for stage in stages:
            inputs = stage_inputs(stage, config, records)
            record = records.get(stage.name)
            if record and stage.trained and (record["status"] == "done" or any(_made(stage, run))):
                _refuse_changes(stage, record, inputs, run)
            if record and record["status"] == "done" and record["inputs"] == inputs and _complete(stage, run):
                say(f"{stage.name:<10} done ({record['seconds']:.0f} s), nothing to do")
                continue
            _save_config(config, run, reasons)
            _run_one(stage, config, run, records, inputs)
    hosts.tell(None)


def _follow(config: Config, run: RunDir) -> None:
    """What the other processes do: train along, wait for process 0 in everything else."""
    while told := hosts.hear():
        name, start = told
        stage = STAGES[NAMES.index(name)]
        if stage.joint:
            end = time.monotonic() + SHARED_SECONDS
            while load_records(run).get(name, {}).get("start") != start:  # network file systems show a file late
                if time.monotonic() > end:
                    raise UsageError(
                        f"{run.root}: process {hosts.index()} does not see there what process 0 writes; "
                        "--run-dir must be on a file system that all share"
                    )
                time.sleep(0.5)
            stage.run(config, run)


def _save_config(config: Config, run: RunDir, reasons: dict[str, str]) -> None:
    """Write `config.toml`, but keep the file (and its reasons) where it says the same already."""
    if not run.config.exists() or load_config(run.config) != config:
        atomic_write(run.config, to_toml(config, reasons))


def load_records(run: RunDir) -> dict[str, Any]:
    """`stages.json`, or nothing for a new run."""
    return read_json(run.stages) if run.stages.exists() else {}


def stage_inputs(stage: Stage, config: Config, records: dict[str, Any]) -> dict[str, Any]:
    """Configuration keys and digests that decide what the stage produces."""
    inputs: dict[str, Any] = {}
    for key, value in flatten(config).items():
        if _among(stage.reads, key) and not _among(FREE_KEYS, key):
            inputs[key] = value
    inputs |= {f"{stage.name}.files": found} if (found := stage.looks(config)) else {}
    for need in stage.needs:
        done = records.get(need, {})
        if done.get("status") != "done":
            raise UsageError(f"stage {stage.name}: needs stage {need} first; run --stages {need},{stage.name}")
        inputs[f"{need}.digest"] = done["facts"]["digest"]
    for use in stage.uses:
        if records.get(use, {}).get("status") == "done":
            inputs[f"{use}.digest"] = records[use]["facts"]["digest"]
    return json.loads(json.dumps(inputs))


def _among(names: Sequence[str], key: str) -> bool:
    """Whether a key is one of the names, or begins with one that ends with a dot or an underscore."""
    return any(key == name or (name.endswith((".", "_")) and key.startswith(name)) for name in names)


def _refuse_changes(stage: Stage, record: dict[str, Any], inputs: dict[str, Any], run: RunDir) -> None:
    given = {key: value for key, value in record["inputs"].items() if not _among(FREE_KEYS, key)}
    before = json.loads(json.dumps(flatten(Config()))) | given  # a setting that is new since then had its default
    changed = [k for k in sorted(given.keys() | inputs.keys()) if before.get(k) != inputs.get(k)]
    if text := ", ".join(f"{k} ({before.get(k)!r} -> {inputs.get(k)!r})" for k in changed):
        advice = "take them back, or choose another --run-dir"
        raise UsageError(f"stage {stage.name}: {run.root} was made with other settings: {text}; {advice}")


def _complete(stage: Stage, run: RunDir) -> bool:
    missing = [path for path, made in zip(stage.outputs, _made(stage, run), strict=True) if not made]
    if missing:
        say(f"{stage.name:<10} recorded as done, but {', '.join(missing)} is missing: running it again")
    return not missing


def _made(stage: Stage, run: RunDir) -> list[bool]:
    """For each output, whether it is there."""
    found = []
    for path in stage.outputs:
        folder = run.root / path.removesuffix("/<step>")
        steps = path.endswith("/<step>")
        found.append(any(p.name.isdigit() for p in folder.glob("*")) if steps else folder.exists())
    return found


def _run_one(stage: Stage, config: Config, run: RunDir, records: dict[str, Any], inputs: dict[str, Any]) -> None:
    previous = records.get(stage.name, {})
    begin = time.perf_counter()
    resumed = previous.get("status") == "running" and previous.get("inputs") == inputs
    record: dict[str, Any] = {
        "status": "running",
        "start": previous["start"] if resumed else _now(),
        "end": None,
        "seconds": previous.get("seconds", 0.0) if resumed else 0.0,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "inputs": inputs,
        "inputs_digest": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
        "facts": {},
    }
    records[stage.name] = record
    write_json(run.stages, records)
    say(f"{stage.name:<10} {'goes on' if resumed else 'starts'}", style="bold")
    hosts.tell([stage.name, record["start"]])
    spent = record["seconds"]
    try:
        facts = stage.run(config, run)
    except BaseException:
        record["seconds"] = spent + time.perf_counter() - begin
        _keep_or_forget(stage, run, records)
        raise
    record |= {
        "status": "done",
        "end": _now(),
        "seconds": spent + time.perf_counter() - begin,
        "peak_rss_bytes": peak_rss(),
        "facts": facts,
    }
    if "params_sha256" in facts:
        record["params_sha256"] = facts["params_sha256"]
    write_json(run.stages, records)
    say(f"{stage.name:<10} done in {record['seconds']:.0f} s")


def _keep_or_forget(stage: Stage, run: RunDir, records: dict[str, Any]) -> None:
    """After a failure: a stage that has made nothing leaves no record, so that a mended command is not refused."""
    if not any(_made(stage, run)):
        del records[stage.name]
    if records:
        write_json(run.stages, records)
    else:
        run.stages.unlink(missing_ok=True)
        run.config.unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
