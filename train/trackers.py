"""Curves for those who watch from elsewhere: TensorBoard and Weights & Biases, off unless the configuration asks."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.paths import atomic_write
from jaxchat.toml import flatten

Log = Callable[[int, Mapping[str, Any]], None]  # (step, name -> number); None and text are passed over


def check_trackers(config: Config) -> None:
    """Raise `UsageError` where a tracker that the configuration names is not installed: before a run, not in it."""
    for key, wanted, module in (
        ("tensorboard", config.train.tensorboard, "tensorboardX"),
        ("wandb", bool(config.train.wandb), "wandb"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise UsageError(f"train.{key}: {module} is not installed; run pip install -e '.[{key}]', or leave it off")


@contextlib.contextmanager
def trackers(config: Config, directory: Path, done: int, write: bool) -> Iterator[Log]:
    """What gets every record of the training in `directory` (a stage's, in a run's), which goes on after `done` steps.

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
    """Event files in the run's `tensorboard/<stage>/`; steps after the checkpoint are hidden when they come again."""
    from tensorboardX import SummaryWriter

    place = directory.parent / "tensorboard" / directory.name
    writer = SummaryWriter(str(place), purge_step=done if place.exists() else None)

    def log(step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name != "step":
                writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(config: Config, directory: Path) -> Iterator[Log]:
    """A run of the project `train.wandb` for every stage, the same one after a resume. A service that cannot be reached
    is said, and training goes on without it."""
    import wandb

    run_dir, stage = directory.parent, directory.name
    kept = run_dir / "wandb" / f"{stage}.id"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, secrets.token_hex(8))
    try:
        run = wandb.init(
            project=config.train.wandb,
            id=kept.read_text(encoding="utf-8"),
            name=f"{run_dir.resolve().name}/{stage}",
            group=run_dir.resolve().name,
            dir=str(run_dir),
            config=flatten(config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        say(f"  Weights & Biases: {error}; the training goes on without it", style="yellow")
        yield lambda step, values: None
        return
    run.define_metric("*", step_metric="step")  # its own counter refuses the steps that come again after a resume
    try:
        yield lambda step, values: run.log({**values, "step": step})
    finally:
        run.finish()
