"""Curves for those who watch from elsewhere: TensorBoard and Weights & Biases, off unless the configuration asks."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxchat.config import Config, flatten
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.run_dir import atomic_write

Log = Callable[[int, Mapping[str, Any]], None]  # (step, name -> number); None and text are passed over


def check_trackers(config: Config) -> None:
    """`UsageError` for a tracker that the configuration names and that is not installed: before a run, not in it."""
    for key, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(config.train, key) and importlib.util.find_spec(module) is None:
            raise UsageError(f"train.{key}: {module} is not installed; run pip install -e '.[{key}]', or leave it off")


@contextlib.contextmanager
def trackers(config: Config, directory: Path, done: int, write: bool) -> Iterator[Log]:
    """Log every record of the training in `directory` (a stage's, in a run's), which goes on after `done` steps.

    `write`: of several processes that train together only one may.
    """
    logs: list[Log] = []
    with contextlib.ExitStack() as stack:
        if write and config.train.tensorboard:
            logs.append(stack.enter_context(_tensorboard(directory, done)))
        if write and config.train.wandb:
            logs.append(stack.enter_context(_wandb(config, directory)))

        def log(step: int, values: Mapping[str, Any]) -> None:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            for one in logs:
                one(step, numbers)

        yield log


@contextlib.contextmanager
def _tensorboard(directory: Path, done: int) -> Iterator[Log]:
    """Event files in the run's `tensorboard/<stage>/`; steps after the checkpoint are hidden when they come again.

    Written at once and by this thread: tensorboardX's own keeps steps for minutes, and blocks for ever on a full disk.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder = directory.parent / "tensorboard" / directory.name
    again = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    if again:
        writer.write_event(Event(step=done, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def log(step: int, values: Mapping[str, Any]) -> None:
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if name != "step"]
        writer.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=found)))
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(config: Config, directory: Path) -> Iterator[Log]:
    """A run of the project `train.wandb` for every stage, the same one after a resume.

    Whatever goes wrong with it is reported once, and training goes on without it.
    """
    run: Any = None

    @contextlib.contextmanager
    def tolerated() -> Iterator[None]:
        nonlocal run
        try:
            yield
        except Exception as error:  # of its service, its helper process, the network: it has many kinds
            run = None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(f"  Weights & Biases: {reason}; the training goes on without it", style="yellow")

    def log(step: int, values: Mapping[str, Any]) -> None:
        if run is not None:
            with tolerated():
                run.log({**values, "step": step})

    with tolerated():
        run = _wandb_run(config, directory)
    exit_code = 1
    try:
        yield log
        exit_code = 0
    finally:
        if run is not None:
            with contextlib.suppress(Exception):
                run.finish(exit_code=exit_code)


def _wandb_run(config: Config, directory: Path) -> Any:
    import wandb

    run_dir, stage = directory.parent, directory.name
    identity = run_dir / "wandb" / f"{stage}.id"
    if not identity.exists():
        atomic_write(identity, secrets.token_hex(8))
    run = wandb.init(
        project=config.train.wandb,
        id=identity.read_text(encoding="utf-8"),
        name=f"{run_dir.resolve().name}/{stage}",
        group=run_dir.resolve().name,
        dir=str(run_dir),
        config=flatten(config),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="step")  # its own counter refuses the steps that come again after a resume
    return run
