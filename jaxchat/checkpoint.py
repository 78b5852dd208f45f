"""Orbax checkpoints: parameters, optimizer and a few facts, saved asynchronously, complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
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

from jaxchat import distributed as hosts
from jaxchat.errors import DataError
from jaxchat.log import quiet_libraries, say
from jaxchat.run_dir import CHECKSUMS, RunDir, damage, require_format, write_checksums
from jaxchat.train_state import TrainState

FORMAT = 1
TIMES = ("_CHECKPOINT_METADATA",)  # when Orbax began and ended; it is written once more at the very end
RECORDS = {"base": "pretrain"}  # stages that `stages.json` has under another name than their folder


class Checkpoints:
    """Checkpoints `<directory>/<step>/` of one training stage: the last, and those at multiples of `keep_every`."""

    def __init__(self, directory: str | Path, keep_last: int = 2, keep_every: int = 0):
        self.directory = Path(directory).resolve()
        self._saving: int | None = None
        self._begin = 0.0
        self.seconds: list[float] = []  # from the beginning of a save to its last byte, of every save
        seal = ocp.AsyncOptions(post_finalization_callback=self._seal)
        with quiet_libraries():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep_last,
                    keep_period=keep_every or None,
                    enable_async_checkpointing=True,
                    async_options=seal,
                ),
                item_names=("params", "opt_state", "meta"),
            )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Copy the state out and write it in the background; a save that is still running is waited for."""
        items = {
            "params": ocp.args.StandardSave(state.params),  # type: ignore[call-arg]
            "opt_state": ocp.args.StandardSave(state.opt_state),  # type: ignore[call-arg]
            "meta": ocp.args.JsonSave(meta | {"format": FORMAT, "step": step}),  # type: ignore[call-arg]
        }
        if state.opt_state is None:  # a model from elsewhere
            del items["opt_state"]
        with quiet_libraries(), _full_disk(self.directory):
            self._manager.wait_until_finished()
            self._saving, self._begin = step, time.perf_counter()
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _seal(self) -> None:
        """Write the checksums of a checkpoint just before it gets its name, so that they are there when it is."""
        if hosts.index() == 0:
            for folder in self.directory.glob(f"{self._saving}*"):
                mine = folder.name == str(self._saving) or folder.name.startswith(f"{self._saving}.")  # being written
                if mine and folder.is_dir() and not (folder / CHECKSUMS).exists():
                    write_checksums(folder, TIMES)
        self.seconds.append(time.perf_counter() - self._begin)

    def restore(self, like: TrainState, go_back: bool = True) -> tuple[TrainState, dict[str, Any]]:
        """The newest whole checkpoint, laid out like `like` (arrays or shapes with shardings), and its facts.

        One that is damaged is said and put aside, if there is another before it and it may `go_back`; else `DataError`.
        One that came from elsewhere without an optimizer keeps the one of `like`.
        """
        step = hosts.on_first(lambda: self._newest_whole(go_back))
        with quiet_libraries():
            self._manager.reload()

        def abstract(tree: Any) -> Any:
            return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)

        try:
            with quiet_libraries():
                found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
                meta = dict(found["meta"])
                require_format(meta, FORMAT, self.directory / str(step))
                wanted = {"params": ocp.args.StandardRestore(abstract(like.params))}  # type: ignore[call-arg]
                if "imported" not in meta:
                    wanted["opt_state"] = ocp.args.StandardRestore(abstract(like.opt_state))  # type: ignore[call-arg]
                found = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except DataError:
            raise
        except Exception as error:  # Orbax and TensorStore raise all kinds
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise  # the device is full, the checkpoint is not to blame
            raise DataError(f"{self.directory / str(step)}: cannot be restored ({_first_line(error)})") from error
        step_array = jax.device_put(np.int32(step), like.step.sharding)
        optimizer = like.opt_state if "imported" in meta else found["opt_state"]
        return TrainState(found["params"], optimizer, step_array), meta

    def _newest_whole(self, go_back: bool) -> int:
        """Its step; what is newer and damaged gets a name that is no step."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        faults: dict[int, str] = {}
        for step in steps:
            fault = damage(self.directory / str(step))
            if fault is None:
                for bad, reason in faults.items():
                    say(f"  {self.directory / str(bad)}: {reason}; put aside, going on from {step}", style="yellow")
                    shutil.rmtree(self.directory / f"damaged_{bad}", ignore_errors=True)
                    os.replace(self.directory / str(bad), self.directory / f"damaged_{bad}")
                return step
            faults[step] = fault
            if not go_back:
                break
        if not faults:
            raise DataError(f"{self.directory}: no complete checkpoint")
        step, fault = next(iter(faults.items()))
        alone = ", and there is no whole one before it" if go_back else ""
        raise DataError(
            f"{self.directory / str(step)}: {fault}{alone}; restore the folder from a copy, or delete "
            f"{self.directory} to train that stage from its start"
        )

    def wait(self) -> None:
        """Until the running save is durable."""
        with _full_disk(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with quiet_libraries():
            self._manager.close()


def restore_params(directory: str | Path, verify: bool = True) -> tuple[Any, dict[str, Any]]:
    """(parameters as host arrays, facts) of the newest checkpoint of a stage; `DataError` if there is none.

    `verify`: prove its files by their checksums first; off where the caller proves the parameters themselves.
    """
    directory = Path(directory).resolve()
    steps = sorted((int(p.name) for p in directory.glob("*") if p.name.isdigit()), reverse=True)
    if not steps:
        raise DataError(f"{directory}: no checkpoint; train it first")
    path = directory / str(steps[0])
    if verify and (fault := damage(path, ("params/", "meta/"))):
        raise DataError(f"{path}: {fault}; restore the folder from a copy, or delete it and run the stage again")
    try:
        alone = this_process()
        with (
            quiet_libraries(),
            contextlib.closing(ocp.StandardCheckpointer(multiprocessing_options=alone)) as reader,
        ):
            like = jax.tree.map(
                lambda m: np.zeros(m.shape, m.dtype), dict(reader.metadata(path / "params").item_metadata.tree)
            )
            params = reader.restore(path / "params", like)
        json_handler = ocp.JsonCheckpointHandler()
        with contextlib.closing(ocp.Checkpointer(json_handler, multiprocessing_options=alone)) as reader:
            meta = reader.restore(path / "meta")
            require_format(meta, FORMAT, path)
    except DataError:
        raise
    except Exception as error:  # Orbax and TensorStore raise all kinds
        raise DataError(f"{path}: cannot be read ({_first_line(error)})") from error
    return params, meta


def this_process() -> ocp.options.MultiprocessingOptions:
    """For Orbax: of several processes this one alone reads or writes, so it must wait for no other."""
    return ocp.options.MultiprocessingOptions(
        primary_host=hosts.index(), active_processes={hosts.index()}, barrier_sync_key_prefix=f"alone{hosts.index()}"
    )


def save_params(directory: str | Path, step: int, params: Any, meta: dict[str, Any]) -> None:
    """A checkpoint of parameters alone, for a model from elsewhere; `meta` must hold "imported"."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(step, TrainState(params, None, jnp.int32(step)), meta)
    checkpoints.wait()
    checkpoints.close()


def trained_params(run: RunDir, stage: str) -> Any:
    """What a stage has made, as host arrays; `DataError` where they are not what it recorded when it was done."""
    record = recorded(run, stage)
    proved = record.get("status") == "done" and "params_sha256" in record
    params, _ = restore_params(run.stage(stage), verify=not proved)
    check_recorded(run, stage, params)
    return params


def check_recorded(run: RunDir, stage: str, params: Any) -> None:
    """`DataError` where `params` are not those that the finished stage recorded. All processes must ask."""
    record = recorded(run, stage)
    known = record.get("params_sha256", "") if record.get("status") == "done" else ""
    if known and known != params_sha256(params):
        raise DataError(
            f"{run.stage(stage)}: its newest checkpoint is damaged (the SHA-256 of its parameters is not the recorded "
            "one); restore the folder from a copy, or delete it and run the stage again"
        )


def recorded(run: RunDir, stage: str) -> dict[str, Any]:
    """What `stages.json` says of a trained stage; nothing where there is no such file."""
    return run.records().get(RECORDS.get(stage, stage), {})


def params_sha256(params: Any) -> str:
    """SHA-256 over all parameters: names, shapes, dtypes and bytes, in sorted order.

    Parameters that are spread over processes come together one by one; all processes must ask.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {".".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in leaves}
    for name in sorted(named):
        array = hosts.gathered(named[name])
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def discard(directory: str | Path) -> None:
    """Remove a stage's checkpoints (before a run from scratch)."""
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _full_disk(directory: Path) -> Iterator[None]:
    """A save that had no room, of whatever kind Orbax raises, as what it is."""
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in ("No space left", "ENOSPC", "Disk quota exceeded")):
            raise
        raise DataError(
            f"{directory}: no room on the disk for a checkpoint; the one before is whole. Make room, and the same "
            "command goes on from it"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
