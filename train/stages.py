"""The stages of a run, in order; what each reads; and the record that lets a command be repeated safely.

A stage is keyed by its inputs: the configuration keys it reads and the digests of the stages before it. Unchanged and
done, it does nothing. Changed, a cheap stage (exams, report) runs again and a trained one refuses, naming the keys.
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
from pathlib import Path
from typing import Any

from jaxchat import __version__
from jaxchat import distributed as hosts
from jaxchat.config import KEYS, REMOVED, Config, flatten, load_config, to_toml
from jaxchat.errors import UsageError
from jaxchat.interop.huggingface import write_hf
from jaxchat.interop.orbax_export import write_orbax
from jaxchat.interop.trained import Trained, load_trained
from jaxchat.log import say
from jaxchat.run_dir import RECORD_FORMAT, RunDir, atomic_write, sync_directory, write_json
from jaxchat.sharding import make_mesh
from jaxchat.tasks.files import identity_digest
from jaxchat.train_state import check_attention

from . import evaluate, prepare, pretrain, report, rl, sft
from .doctor import commit, hardware, peak_rss, versions
from .trackers import check_trackers

# One stage: what it reads and needs, what it leaves, and whether that still fits its record in `stages.json`.


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


def stage_inputs(stage: Stage, config: Config, records: dict[str, Any]) -> dict[str, Any]:
    """Configuration keys and digests that decide what the stage produces."""
    inputs: dict[str, Any] = {}
    for key, value in flatten(config).items():
        if among(stage.reads, key) and not KEYS[key].free:
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


def among(names: Sequence[str], key: str) -> bool:
    """Whether a key is one of the names, or begins with one that ends with a dot or an underscore."""
    return any(key == name or (name.endswith((".", "_")) and key.startswith(name)) for name in names)


def changed_inputs(record: dict[str, Any], inputs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(value then, value now) of the inputs that differ from a record's. A setting that is new since then had its
    default."""
    given = {
        key: value
        for key, value in record["inputs"].items()
        if not (key in KEYS and KEYS[key].free) and not (key in REMOVED and value == REMOVED[key])
    }
    before = json.loads(json.dumps(flatten(Config()))) | given
    keys = sorted(given.keys() | inputs.keys())
    return {key: (before.get(key), inputs.get(key)) for key in keys if before.get(key) != inputs.get(key)}


def refuse_changes(stage: Stage, record: dict[str, Any], inputs: dict[str, Any], run: RunDir) -> None:
    changed = changed_inputs(record, inputs)
    if text := ", ".join(f"{key} ({before!r} -> {now!r})" for key, (before, now) in changed.items()):
        advice = "take them back, or choose another --run-dir"
        raise UsageError(f"stage {stage.name}: {run.root} was made with other settings: {text}; {advice}")


def complete(stage: Stage, run: RunDir) -> bool:
    missing = [path for path, there in zip(stage.outputs, made(stage, run), strict=True) if not there]
    if missing:
        say(f"{stage.name:<10} recorded as done, but {', '.join(missing)} is missing: running it again")
    return not missing


def made(stage: Stage, run: RunDir) -> list[bool]:
    """For each output, whether it is there."""
    found = []
    for path in stage.outputs:
        folder = run.root / path.removesuffix("/<step>")
        steps = path.endswith("/<step>")
        found.append(any(p.name.isdigit() for p in folder.glob("*")) if steps else folder.exists())
    return found


# Stage export: the furthest trained model in `export/`, in the formats that other people load.


FORMATS: dict[str, Callable[[Trained, Path], dict[str, Any]]] = {"orbax": write_orbax, "hf": write_hf}


def run_export(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `export/<format>/` anew; facts: what each holds, digest."""
    model, facts = load_trained(run, dtype=config.export.dtype), {}
    left = [run.export / name for name in FORMATS if name not in config.export.formats]
    for path in [*run.export.glob(".*"), *left]:  # what was killed half way, and what another setting had made
        shutil.rmtree(path, ignore_errors=True)
    for name in config.export.formats:
        folder, new, old = (run.export / part for part in (name, f".{name}.new", f".{name}.old"))
        facts[name] = FORMATS[name](model, new)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        sync_directory(run.export)
        shutil.rmtree(old, ignore_errors=True)
        say(f"  {folder}: {facts[name]['bytes'] / 1e6:,.0f} MB of {facts[name]['dtype']}")
    return facts | {"stage": model.stage, "digest": hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()}


def check(config: Config) -> None:
    """Raise `UsageError` for a format that does not exist."""
    for name in config.export.formats:
        if name not in FORMATS:
            raise UsageError(f"export.formats: {name!r} is unknown; choose from {', '.join(FORMATS)}")


SHARED_SECONDS = 60.0  # until what process 0 wrote must be seen by the others


STAGES = (
    Stage("tokenizer", prepare.run_tokenizer, prepare.READS, (), ("tokenizer/tokenizer.json",), True),
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
    Stage(
        "export",
        run_export,
        ("export.",),
        ("pretrain",),
        ("export",),
        False,
        uses=("sft", "rl", "report"),
        check=check,
        wanted=lambda config: bool(config.export.formats),
    ),
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


def unfinished(config: Config, run: RunDir) -> list[str]:
    """Stages of this configuration that are not done, or no longer fit what they were made from, in order."""
    records, left = run.records(), list[str]()
    for stage in STAGES:
        record = records.get(stage.name, {})
        done = record.get("status") == "done"
        if done and not stage.trained:
            stale = {*stage.needs, *stage.uses} & set(left)
            done = not stale and not changed_inputs(record, stage_inputs(stage, config, records))
        if not done and stage.wanted(config):
            left.append(stage.name)
    return left


def remaining(config: Config, run: RunDir, stages: Sequence[Stage]) -> list[Stage]:
    """Return those of the stages that this configuration wants and that are not done, in order."""
    records = run.records()
    done = {stage.name for stage in stages if records.get(stage.name, {}).get("status") == "done"}
    return [s for s in stages if s.wanted(config) and not (s.name in done and all(made(s, run)))]


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
        records = run.records()
        for stage in stages:
            stage.check(config)
            if "imported" in records.get(stage.name, {}):
                _refuse_training(stage, config, run)
        done = [s for s in stages if records.get(s.name, {}).get("status") == "done" and complete(s, run)]
        if any(stage.joint and stage not in done for stage in stages):
            check_trackers(config)
            check_attention(config, make_mesh(config.mesh))
        for stage in stages:
            inputs = stage_inputs(stage, config, records)
            record = records.get(stage.name)
            if record and "imported" in record:  # its weights came from elsewhere: only what they are must agree
                inputs = {key: inputs.get(key) for key in record["inputs"]}
            if record and stage.trained and (record["status"] == "done" or any(made(stage, run))):
                refuse_changes(stage, record, inputs, run)
                inputs = record["inputs"]  # a setting that is new since then stays absent
            same = stage.trained or (record and not changed_inputs(record, inputs))  # a trained one was refused if not
            if record and record["status"] == "done" and same and complete(stage, run):
                say(f"{stage.name:<10} done ({record['seconds']:.0f} s), nothing to do")
                continue
            _save_config(config, run, reasons)
            _run_one(stage, config, run, records, inputs)
    hosts.broadcast(None)


def _refuse_training(stage: Stage, config: Config, run: RunDir) -> None:
    """What an imported stage would have been trained with cannot change any more, and is not ignored in silence."""
    before, now = flatten(load_config(run.config)), flatten(config)
    own = ("train.steps", "train.token_ratio") if stage.name == "pretrain" else (f"{stage.name}.",)
    if changed := [k for k in now if among(own, k) and not KEYS[k].free and before.get(k) != now[k]]:
        raise UsageError(
            f"stage {stage.name}: {run.root} has imported weights there, which {', '.join(changed)} cannot change; "
            "take it back, or import with --stage base to fine-tune them"
        )


def _follow(config: Config, run: RunDir) -> None:
    """What the other processes do: train along, wait for process 0 in everything else."""
    while message := hosts.receive():
        name, start = message
        stage = STAGES[NAMES.index(name)]
        if stage.joint:
            end = time.monotonic() + SHARED_SECONDS
            while run.records().get(name, {}).get("start") != start:  # network file systems show a file late
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


def _run_one(stage: Stage, config: Config, run: RunDir, records: dict[str, Any], inputs: dict[str, Any]) -> None:
    previous = records.get(stage.name, {})
    begin = time.perf_counter()
    same = stage.trained or (previous and not changed_inputs(previous, inputs))  # a trained one was refused if not
    resumed = previous.get("status") == "running" and same
    record: dict[str, Any] = {
        "format": RECORD_FORMAT,
        "status": "running",
        "start": previous["start"] if resumed else _now(),
        "end": None,
        "seconds": previous.get("seconds", 0.0) if resumed else 0.0,
        "version": __version__,
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
    hosts.broadcast([stage.name, record["start"]])
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
    if not any(made(stage, run)):
        del records[stage.name]
    if records:
        write_json(run.stages, records)
    else:
        run.stages.unlink(missing_ok=True)
        run.config.unlink(missing_ok=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
