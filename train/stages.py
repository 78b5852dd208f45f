"""The stages of a run, in order: what each reads, what it makes, and whether its record still fits.

A stage is keyed by its inputs: the configuration keys it reads and the digests of the stages before it. Unchanged and
done, it does nothing. Changed, a cheap stage (exams, report, export) runs again and a trained one refuses, naming the
keys. `stages.json` has the record of every stage from its start on, so the same command resumes at any moment.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat import __version__, distributed
from jaxchat.config import ADDED, KEYS, REMOVED, Config, build, flatten, is_derived, load_config, to_toml
from jaxchat.errors import UsageError, first_line
from jaxchat.interop.html_page import write_html
from jaxchat.interop.huggingface import write_hf
from jaxchat.interop.initial import read_init
from jaxchat.interop.trained import load_trained, write_orbax
from jaxchat.log import keep_messages, note, say
from jaxchat.optimizer import make_schedule
from jaxchat.run_dir import RECORD_FORMAT, TRAINED, RunDir, atomic_write, saved_steps, write_json
from jaxchat.sharding import make_mesh
from jaxchat.tasks.base import identity_digest
from jaxchat.tasks.from_file import digest_of
from jaxchat.train_state import check_attention

from . import evaluate, prepare, pretrain, report, rl, sft
from .curves import check_trackers
from .doctor import commit, hardware, peak_rss, versions
from .targets import usd

SHARED_SECONDS = 60.0  # until the other processes must see what process 0 wrote
FORMATS: dict[str, Callable[..., dict[str, Any]]] = {"orbax": write_orbax, "hf": write_hf, "html": write_html}
Record = dict[str, Any]  # of one stage in `stages.json`


def run_export(config: Config, run: RunDir) -> dict[str, Any]:
    """Export the furthest trained model to `export/<format>/`; facts: what each holds, digest."""
    model, facts = load_trained(run, dtype=config.export.dtype), {}
    new = run.root / ".export.new"  # the old ones stay until these are whole
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name in config.export.formats:
        try:
            facts[name] = FORMATS[name](model, new / name)
        except UsageError as error:  # it cannot hold the model, which is no reason to go without the others
            say(f"  {name} left out: {error}", style="yellow")
            continue
        say(f"  {run.export / name}: {facts[name]['bytes'] / 1e6:,.0f} MB of {facts[name]['dtype']}")
    shutil.rmtree(run.export, ignore_errors=True)
    os.replace(new, run.export)
    return facts | {"stage": model.stage, "digest": hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()}


@dataclass(frozen=True)
class Stage:
    """`run(config, run_dir)` returns facts for the record, `digest` or `params_sha256` among them."""

    name: str
    run: Callable[[Config, RunDir], dict[str, Any]]
    reads: tuple[str, ...]  # configuration keys, or sections that end in a dot
    needs: tuple[str, ...]  # stages whose digests are inputs
    outputs: tuple[str, ...]  # paths inside the run directory that must exist when done; <step>: a complete checkpoint
    trained: bool = False  # refuses changed inputs instead of running again
    uses: tuple[str, ...] = ()  # stages whose digests are inputs where they are done, but which need not be
    check: Callable[[Config], None] = lambda config: None  # of settings and data, before anything runs
    # reads all its data: before anything runs, and once there is a tokenizer, before anything is trained
    ready: Callable[[Config, RunDir], None] = lambda config, run: None
    wanted: Callable[[Config], bool] = lambda config: True  # False: this configuration goes without it
    external_inputs: Callable[[Config], str] = lambda config: ""  # what it reads outside the run
    joint: bool = False  # by all processes together; the others by process 0, while the rest waits

    def missing(self, run: RunDir) -> list[str]:
        """Return the outputs that are not there."""

        def exists(path: str) -> bool:
            if not path.endswith("/<step>"):
                return (run.root / path).exists()
            return bool(saved_steps((run.root / path).parent))

        return [path for path in self.outputs if not exists(path)]


# fmt: off
STAGES = (
    Stage("tokenizer", prepare.run_tokenizer, prepare.READS, (), ("tokenizer/tokenizer.json",), trained=True),
    Stage("prepare", prepare.run, ("data.", "model.seq_len"), ("tokenizer",), prepare.OUTPUTS, trained=True,
          wanted=lambda config: config.train.steps != 0),
    Stage("pretrain", pretrain.run, ("seed", "model.", "train.", "optim."), ("prepare",), ("base/<step>",),
          trained=True, joint=True),
    Stage("sft", sft.run, ("seed", "sft."), ("pretrain",), ("sft/<step>",), trained=True, joint=True, check=sft.check,
          ready=sft.ready, wanted=lambda config: bool(config.sft.mixture), external_inputs=identity_digest),
    Stage("rl", rl.run, ("seed", "rl."), ("sft",), ("rl/<step>",), trained=True, joint=True, check=rl.check,
          ready=rl.ready, wanted=lambda config: bool(config.rl.environment and config.sft.mixture),
          external_inputs=lambda config: digest_of([config.rl.environment])),
    Stage("eval", evaluate.run, ("eval.", "tasks.", "serve.min_p"), ("pretrain",), ("eval/base.json",),
          uses=("sft", "rl"), check=evaluate.check, external_inputs=evaluate.external_inputs),
    Stage("report", report.run, (), ("eval",), ("report.md", "report.json")),
    Stage("export", run_export, ("export.",), ("pretrain",), ("export",), uses=("sft", "rl", "report"),
          wanted=lambda config: bool(config.export.formats)),
)
# fmt: on
NAMES = tuple(stage.name for stage in STAGES)
HORIZON = ("train.steps", "train.token_ratio")  # may be raised, then pretraining goes on
TAKEN_OVER = ("model.", "train.init", "train.steps")  # what decides stages that come from `train.init` as they are


def named_stages(only: str | None, start: str | None) -> set[str]:
    """Return the names of `--stages a,b` or `--from a`; all of them without either. `UsageError` for an unknown one."""
    names = [name.strip() for name in only.split(",") if name.strip()] if only else list(NAMES)
    for name in [*names, *([start] if start else [])]:
        if name not in NAMES:
            raise UsageError(f"stage {name!r} is unknown; stages: {', '.join(NAMES)}")
    return {name for name in names if not start or NAMES.index(name) >= NAMES.index(start)}


def select(only: str | None, start: str | None) -> list[Stage]:
    """Return the stages of `--stages a,b` or `--from a` with those they need; all of them without either.

    Needed stages that are done already are only checked for changed settings.
    """
    wanted = named_stages(only, start)
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    return [stage for stage in STAGES if stage.name in wanted]


# Whether a record still fits


def reads(names: Sequence[str], key: str) -> bool:
    """Return whether a key that decides results is one of the names or in one of the sections."""
    named = any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)
    return named and not (key in KEYS and KEYS[key].free)


def stage_inputs(stage: Stage, config: Config, records: dict[str, Record]) -> dict[str, Any]:
    """Return the configuration keys and digests that decide what the stage produces."""
    names = stage.reads if config.train.steps or stage.name not in ("tokenizer", "pretrain") else TAKEN_OVER
    inputs = {key: value for key, value in flatten(config).items() if reads(names, key)}
    if external := stage.external_inputs(config):
        inputs[f"{stage.name}.files"] = external
    for need in (*stage.needs, *stage.uses):
        if records.get(need, {}).get("status") == "done":
            inputs[f"{need}.digest"] = records[need]["facts"]["digest"]
        elif need in stage.needs and STAGES[NAMES.index(need)].wanted(config):
            raise UsageError(f"stage {stage.name}: needs stage {need} first; run --stages {need},{stage.name}")
    record = records.get(stage.name, {})
    if "imported" in record:  # its weights came from elsewhere: only what they are must agree
        inputs = {key: inputs.get(key) for key in record["inputs"]}
    return json.loads(json.dumps(inputs))


def changed_inputs(record: Record, inputs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (value then, value now) of the inputs that differ from a record's.

    A key that is newer than the record had its default then. A key that does not exist any more is ignored where the
    record has the only behaviour that there is now.
    """
    given = {
        key: value
        for key, value in record["inputs"].items()
        if not (key in KEYS and KEYS[key].free) and not (key in REMOVED and value == REMOVED[key])
    }
    before = json.loads(json.dumps(flatten(Config()))) | ADDED | given
    keys = sorted(given.keys() | inputs.keys())
    return {key: (before.get(key), inputs.get(key)) for key in keys if before.get(key) != inputs.get(key)}


def unfinished(config: Config, run: RunDir) -> list[str]:
    """Return the stages of this configuration that are not done, or no longer fit their inputs, in order."""
    records, names = run.records(), list[str]()
    for stage in STAGES:
        record = records.get(stage.name, {})
        done = record.get("status") == "done" and not stage.missing(run)
        if done and not stage.trained:
            stale = {*stage.needs, *stage.uses} & set(names)
            done = not stale and not changed_inputs(record, stage_inputs(stage, config, records))
        if not done and stage.wanted(config):
            names.append(stage.name)
    return names


# Running


def run_stages(config: Config, run: RunDir, stages: Sequence[Stage], reasons: dict[str, str]) -> None:
    """Run what is not done yet, in order. Of several processes the first decides and keeps the records."""
    stages = [stage for stage in stages if stage.wanted(config)]
    settings = json.loads(json.dumps([flatten(config), [stage.name for stage in stages]]))
    if distributed.index() > 0:
        _follow(config, run, settings)
        return
    distributed.broadcast(settings)
    with run.lock():
        records = run.records()
        names = unfinished(config, run)
        left = [stage for stage in stages if stage.name in names]
        for stage in stages:
            if stage in left:
                stage.check(config)
            if stage.name == "pretrain" and config.train.init and stage.missing(run):
                read_init(config)  # whole and of this model, before any text is read
            if "imported" in records.get(stage.name, {}):
                _refuse_training(stage, config, run)
        if any(stage.joint for stage in left):
            check_trackers(config)
            check_attention(config, make_mesh(config.mesh))
        if "tokenizer" in names:  # nothing can be tokenized yet, but all can be read
            for stage in left:
                stage.ready(config, run)
        try:
            for stage in stages:
                while stage.joint and left:  # before the first training
                    left.pop(0).ready(config, run)
                _run_stage(stage, config, run, records, reasons)
        except BaseException as error:
            note(first_line(error), ended="failed")
            raise
        else:
            note("the stages are done", ended="done")
        finally:
            keep_messages(None)
    distributed.broadcast(None)


def _run_stage(stage: Stage, config: Config, run: RunDir, records: dict[str, Record], reasons: dict[str, str]) -> None:
    """Run one stage, unless it is done, with its record in `stages.json` from the start on."""
    inputs, previous, missing = stage_inputs(stage, config, records), records.get(stage.name), stage.missing(run)
    changed = changed_inputs(previous, inputs) if previous else {}
    done = previous is not None and previous["status"] == "done"
    extended = stage.name == "pretrain" and not missing and is_extension(changed)
    if previous and stage.trained and (done or len(missing) < len(stage.outputs)):
        if changed and not extended:
            text = ", ".join(f"{key} ({before!r} -> {now!r})" for key, (before, now) in changed.items())
            advice = "take them back, or choose another --run-dir"
            raise UsageError(f"stage {stage.name}: {run.root} was made with other settings: {text}; {advice}")
        inputs = previous["inputs"] | {key: inputs[key] for key in changed}  # a newer setting stays absent
    if previous and done and not changed and not missing:
        say(f"{stage.name:<10} done ({previous['seconds']:.0f} s), nothing to do")
        return
    if done and missing:
        say(f"{stage.name:<10} recorded as done, but {', '.join(missing)} is missing: running it again")
    if not run.config.exists() or load_config(run.config) != config:  # else the file keeps its reasons
        atomic_write(run.config, to_toml(config, reasons))
    resumed = previous if previous and (extended or (not done and not changed)) else {}  # its times go on
    begin, spent = time.perf_counter(), resumed.get("seconds", 0.0)
    records[stage.name] = record = {
        "format": RECORD_FORMAT,
        "status": "running",
        "start": resumed.get("start") or _now(),
        "end": None,
        "seconds": spent,
        "version": __version__,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "inputs": inputs,
        "inputs_digest": hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
        "facts": {},
    } | ({"extended": resumed["extended"]} if "extended" in resumed else {})
    if previous and extended:
        record["extended"] = [*record.get("extended", []), extend(config, run, records, changed["train.steps"][0])]
    write_json(run.stages, records)
    keep_messages(run.messages)
    wanted = [stage.name for stage in STAGES if stage.wanted(config)]
    note(stage=stage.name, stages=wanted, usd_per_hour=usd(hardware(), 3600))
    say(f"{stage.name:<10} {'goes on' if resumed else 'starts'}", style="bold")
    distributed.broadcast([stage.name, record["start"]])
    try:
        facts = stage.run(config, run)
    except BaseException:
        record["seconds"] = spent + time.perf_counter() - begin
        if len(stage.missing(run)) == len(stage.outputs):
            del records[stage.name]  # it made nothing, so a mended command is not refused
        if records:
            write_json(run.stages, records)
        else:
            keep_messages(None)
            for path in (run.stages, run.config, run.messages):
                path.unlink(missing_ok=True)
        raise
    seconds = spent + time.perf_counter() - begin
    record |= {"status": "done", "end": _now(), "seconds": seconds, "peak_rss_bytes": peak_rss(), "facts": facts}
    if "imported" in facts:
        record["imported"] = facts.pop("imported")
    if "params_sha256" in facts:
        record["params_sha256"] = facts["digest"] = facts["params_sha256"]
    write_json(run.stages, records)
    say(f"{stage.name:<10} done in {seconds:.0f} s")


def with_settings_of(run: RunDir, given: Config) -> Config:
    """Return a configuration of a pretraining that is or becomes longer with the run's values for what is left open.

    A longer horizon would derive another weight decay, batch and amount of text. Others are returned unchanged.
    """
    if not run.config.exists():
        return given
    before, now = flatten(load_config(run.config)), flatten(given)
    record = run.records().get("pretrain", {})
    begun = before | record.get("inputs", {})  # config.toml has the new horizon before the record has
    if "extended" not in record and not any(now[key] > begun[key] for key in HORIZON):
        return given
    sections = ("model.", "data.", "train.", "optim.")
    kept = {key for key, value in now.items() if key.startswith(sections) and is_derived(value)} - {"train.steps"}
    return build(now | {key: before[key] for key in kept})


def is_extension(changed: dict[str, tuple[Any, Any]]) -> bool:
    """Return whether the inputs differ in more `train.steps` alone."""
    before, now = changed.get("train.steps", (0, 0))
    return before < now and changed.keys() <= set(HORIZON)


def extend(config: Config, run: RunDir, records: dict[str, Record], before: int) -> dict[str, Any]:
    """Set aside what later stages trained on `before` steps of pretraining; returns the entry for `extended`."""
    folders = {name: folder for folder, name in TRAINED.items()}
    step, schedule = saved_steps(run.stage("base"))[-1], make_schedule(config)
    later = STAGES[NAMES.index("pretrain") + 1 :]
    again = [stage.name for stage in later if stage.name in records]
    for stage in later:
        if stage.trained and stage.name in records:
            del records[stage.name]
            folder, aside = run.stage(folders[stage.name]), run.root / f"{folders[stage.name]}_{before}"
            run.eval(folder.name).unlink(missing_ok=True)
            if folder.exists():
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
                say(f"  {folder} is kept as {aside.name}")
    say(
        f"pretrain   is extended from {before:,} to {config.train.steps:,} steps and goes on from step {step:,}; the "
        f"rate follows the schedule of the new length: {float(schedule(step)):.3f} of the full one at first"
    )
    if again:
        say(f"  out of date, to be done again: {', '.join(again)}")
    return {"from": step, "planned": before}


def _refuse_training(stage: Stage, config: Config, run: RunDir) -> None:
    """Raise `UsageError` for changed settings that an imported stage would have been trained with: without effect."""
    before, now = flatten(load_config(run.config)), flatten(config)
    own = ("train.steps", "train.token_ratio") if stage.name == "pretrain" else (f"{stage.name}.",)
    if changed := [key for key in now if reads(own, key) and before.get(key) != now[key]]:
        raise UsageError(
            f"stage {stage.name}: {run.root} has imported weights there, which {', '.join(changed)} cannot change; "
            f"take it back, or train them in a new run: --init {run.root} --run-dir NEW"
        )


def _follow(config: Config, run: RunDir, settings: Any) -> None:
    """Run the stages on a process other than 0: train with it, wait for it in everything else."""
    if distributed.receive() != settings:
        raise UsageError(
            f"process {distributed.index()} was started with other settings than process 0; give all the same command"
        )
    while message := distributed.receive():
        name, start = message
        stage, end = STAGES[NAMES.index(name)], time.monotonic() + SHARED_SECONDS
        while stage.joint and run.records().get(name, {}).get("start") != start:  # network file systems are late
            if time.monotonic() > end:
                raise UsageError(
                    f"{run.root}: process {distributed.index()} does not see there what process 0 writes; "
                    "--run-dir must be on a file system that all share"
                )
            time.sleep(0.5)
        if stage.joint:
            stage.run(config, run)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
