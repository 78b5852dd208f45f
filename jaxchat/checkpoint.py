"""Orbax checkpoints: parameters, optimizer and a few facts, saved asynchronously, complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxchat import distributed
from jaxchat.errors import DataError, first_line
from jaxchat.log import say
from jaxchat.run_dir import CHECKSUMS, TRAINED, RunDir, damage, require_format, saved_steps, write_checksums
from jaxchat.train_state import TrainState

FORMAT = 1
TIMES = ("_CHECKPOINT_METADATA",)  # when Orbax began and ended; it is written once more at the very end
RESTORE = "restore the folder from a copy, or delete it and run the stage again"
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's and Grain's: what fails raises, and we report that


class Checkpoints:
    """Checkpoints `<directory>/<step>/` of one training stage: the last, and those at multiples of `keep_every`."""

    def __init__(self, directory: str | Path, keep_last: int = 2, keep_every: int = 0):
        self.directory = Path(directory).resolve()
        self._saving, self._begin = 0, 0.0
        self.seconds: list[float] = []  # from the beginning of a save to its last byte, of every save
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_last,
                keep_period=keep_every or None,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
            item_names=("params", "opt_state", "meta"),
        )

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Copy the state and write it in the background, after a save that is still running.

        Without an optimizer's state (a model from elsewhere) only the parameters are saved.
        """
        items = {
            "params": ocp.args.StandardSave(state.params),  # type: ignore[call-arg]
            "meta": ocp.args.JsonSave(meta | {"format": FORMAT, "step": step}),  # type: ignore[call-arg]
        }
        if state.opt_state is not None:
            items["opt_state"] = ocp.args.StandardSave(state.opt_state)  # type: ignore[call-arg]
        self.wait()
        self._saving, self._begin = step, time.perf_counter()
        with _readable_errors(self.directory):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _write_checksums(self) -> None:
        """Write a checkpoint's checksums just before it gets its name, so that they are there when it is."""
        if distributed.index() == 0:
            for folder in (self.directory / str(self._saving), *self.directory.glob(f"{self._saving}.*")):
                if folder.is_dir() and not (folder / CHECKSUMS).exists():
                    write_checksums(folder, TIMES)
        self.seconds.append(time.perf_counter() - self._begin)

    def restore(self, like: TrainState, go_back: bool = True) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest whole checkpoint, laid out like `like` (arrays, or shapes with shardings), and its facts.

        A damaged one is reported and renamed where an older one is whole and `go_back` allows it; else `DataError`.
        One from elsewhere, without an optimizer, keeps the optimizer of `like`.
        """
        step = distributed.on_first(lambda: self._newest_whole(go_back))
        path = self.directory / str(step)

        def abstract(tree: Any) -> Any:
            return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))  # type: ignore[call-arg]

        with _readable_errors(path):
            self._manager.reload()
            meta = dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
            require_format(meta, FORMAT, path)
            items = {"params": abstract(like.params)}
            if "imported" not in meta:
                items["opt_state"] = abstract(like.opt_state)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        optimizer = like.opt_state if "imported" in meta else restored["opt_state"]
        return TrainState(restored["params"], optimizer, jax.device_put(np.int32(step), like.step.sharding)), meta

    def _newest_whole(self, go_back: bool) -> int:
        """Return its step; what is newer and damaged gets a name that is no step."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise DataError(f"{self.directory}: no complete checkpoint")
        faults: dict[int, str] = {}
        for step in steps if go_back else steps[:1]:
            if fault := damage(self.directory / str(step)):
                faults[step] = fault
                continue
            for bad, reason in faults.items():
                path, aside = self.directory / str(bad), self.directory / f"damaged_{bad}"
                say(f"  {path}: {reason}; renamed to {aside.name}, going on from {step}", style="yellow")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            return step
        alone = ", and there is no whole one before it" if go_back else ""
        raise DataError(f"{self.directory / str(steps[0])}: {faults[steps[0]]}{alone}; {RESTORE}")

    def wait(self) -> None:
        """Wait until the running save is durable."""
        with _readable_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def save_params(directory: str | Path, step: int, params: Any, meta: dict[str, Any]) -> None:
    """Save parameters without an optimizer, for a model from elsewhere; `meta` must hold "imported"."""
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.save(step, TrainState(params, None, jnp.int32(step)), meta)
        checkpoints.wait()


def restore_params(directory: str | Path, verify: bool = True, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Return (parameters as host arrays, facts) of a stage's newest checkpoint; `DataError` if there is none.

    `step`: take this one. `verify`: check its files by their checksums first; off where the caller checks the
    parameters themselves.
    """
    directory = Path(directory).resolve()
    steps = saved_steps(directory)
    if not steps or step not in (None, *steps):
        raise DataError(f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; train it first")
    path = directory / str(steps[-1] if step is None else step)
    if verify and (fault := damage(path, ("params/", "meta/"))):
        raise DataError(f"{path}: {fault}; {RESTORE}")
    alone = this_process()
    with _readable_errors(path):
        with contextlib.closing(ocp.StandardCheckpointer(multiprocessing_options=alone)) as reader:
            tree = dict(reader.metadata(path / "params").item_metadata.tree)
            params = reader.restore(path / "params", jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), tree))
        with contextlib.closing(ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=alone)) as reader:
            meta = reader.restore(path / "meta")
    require_format(meta, FORMAT, path)
    return params, meta


def this_process() -> ocp.options.MultiprocessingOptions:
    """Return Orbax options for reading or writing by this process alone, waiting for no other."""
    i = distributed.index()
    return ocp.options.MultiprocessingOptions(primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"alone{i}")


def trained_params(run: RunDir, stage: str) -> Any:
    """Return a stage's parameters as host arrays; `DataError` where they differ from its record."""
    record = recorded(run, stage)
    hashed = record.get("status") == "done" and "params_sha256" in record
    params, _ = restore_params(run.stage(stage), verify=not hashed)
    check_recorded(run, stage, params)
    return params


def check_recorded(run: RunDir, stage: str, params: Any) -> None:
    """Raise `DataError` where `params` are not those that the finished stage recorded. All processes must call it."""
    record = recorded(run, stage)
    known = record.get("params_sha256") if record.get("status") == "done" else None
    # imported weights may be recorded in 16 bits, of which training makes float32 without a loss
    kinds = (None, "bfloat16", "float16") if "imported" in record else (None,)
    versions = (params if kind is None else jax.tree.map(lambda p, k=kind: p.astype(k), params) for kind in kinds)
    if known and known not in map(params_sha256, versions):
        raise DataError(
            f"{run.stage(stage)}: its newest checkpoint is damaged (the SHA-256 of its parameters is not the recorded "
            f"one); {RESTORE}"
        )


def recorded(run: RunDir, stage: str) -> dict[str, Any]:
    """Return the record of a trained stage in `stages.json`; empty where there is none."""
    return run.records().get(TRAINED[stage], {})


def params_sha256(params: Any) -> str:
    """Return the SHA-256 over all parameters: names, shapes, dtypes and bytes, in sorted order.

    Parameters that are split over processes are gathered one by one; all processes must call it.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {".".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in leaves}
    for name in sorted(named):
        array = distributed.gathered(named[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turn what Orbax and TensorStore raise for a checkpoint or for a full disk into a `DataError`."""
    try:
        yield
    except (DataError, jax.errors.JaxRuntimeError):  # the latter: of a device, the checkpoint is not to blame
        raise
    except Exception as error:
        if any(sign in str(error) for sign in ("No space left", "ENOSPC", "Disk quota exceeded")):
            raise DataError(
                f"{path}: no room on the disk for a checkpoint; the one before is whole. Make room and give the same "
                "command again"
            ) from error
        raise DataError(f"{path}: {damage(path) or f'Orbax failed ({first_line(error)})'}; {RESTORE}") from error
