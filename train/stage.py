"""One stage: what it reads and needs, what it leaves, and whether that still fits its record in `stages.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.paths import RunDir
from jaxchat.toml import flatten

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
    "train.keep_every",
    "train.eval_",
    "train.sample_every",
    "train.loss_chunk",
    "train.remat",
    "train.scan_unroll",
    "train.max_bad_steps",
    "train.allow_slow",
    "train.tensorboard",
    "train.wandb",
    "sft.eval_every",
    "sft.exam_cases",
    "rl.eval_",
    "rl.checkpoint_every",
    "rl.slots",
    "eval.batch_rows",
)


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
        if among(stage.reads, key) and not among(FREE_KEYS, key):
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
    given = {key: value for key, value in record["inputs"].items() if not among(FREE_KEYS, key)}
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
