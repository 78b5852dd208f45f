"""The curves of a training: thinned out from `metrics.jsonl`, drawn, and sent to trackers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxchat.config import Config, flatten
from jaxchat.errors import UsageError, first_line, install_command
from jaxchat.log import read_metrics, say
from jaxchat.run_dir import atomic_write

POINTS = 500  # of one curve, at most; metrics.jsonl has every step
RL_FIGURES = {  # and pass@k
    "reward": "mean reward",
    "right": "accuracy",
    "length": "tokens per answer",
    "endless": "truncated",
    "kl": "KL to the start (nats per token)",
    "preferred": "held-out pairs, share preferred",
    "margin": "held-out pairs, margin",
}
PANELS = {  # kind of picture -> curve -> title; a kind is drawn where its first curve is there
    "loss": {"loss": "training loss (nats per token)", "val_bpb": "held-out bits per byte"},
    "rl": {key: RL_FIGURES[key] for key in ("reward", "length", "kl", "preferred")},
    "dynamics": {
        "grad_norm": "gradient norm",
        "lr_mult": "learning rate (of the full one)",
        "tokens_per_second": "tokens per second",
    },
}
COLORS, INK = ["#1f5a94", "#c2571a", "#2a7f4f", "#b3203a", "#6a3d9a"], "#23272f"
STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)

Steps = Sequence[dict[str, Any]]  # records of metrics.jsonl
Curves = dict[str, list[list[Any]]]  # name -> points [x, value]; a value is None where the step was not finite
Log = Callable[[int, Mapping[str, Any]], Any]  # (step, name -> value); only numbers are logged
Finish = Callable[[bool], Any]  # whether the training failed
Begin = Callable[[Path, str, dict[str, Any]], tuple[Log, Finish]]  # (run directory, id, settings of a new run)


def curves(steps: Steps) -> Curves:
    """Return at most `POINTS` + 1 points of every curve: [tokens, value], for RL's figures [step, value]."""
    points: Curves = {}
    figures = rl_figures(steps)
    for key in ("loss", "val_bpb", *PANELS["dynamics"], *figures):
        line = [[r["step" if key in figures else "tokens"], r[key]] for r in steps if key in r]
        points[key] = [*line[: -1 : -(-len(line) // POINTS)], line[-1]] if line else []
    return points


def rl_figures(steps: Steps) -> list[str]:
    """Return the names of reinforcement learning's figures in the records, pass@k last."""
    names = {key for record in steps for key in record}
    return [key for key in RL_FIGURES if key in names] + _passes(names)


def _passes(names: Any) -> list[str]:
    return sorted((name for name in names if name.startswith("pass@")), key=lambda name: (len(name), name))


def kinds(points: Curves) -> list[str]:
    """Return the pictures that the curves suffice for: "loss", "rl", "dynamics"; none without any loss."""
    if all(value is None for _, value in points.get("loss", ())):
        return []
    return [kind for kind, panels in PANELS.items() if points.get(next(iter(panels)))]


def draw(points: Curves, kind: str, title: str) -> Figure:
    """Return one picture of the curves: a panel for each, and one for all pass@k; missing values leave a gap."""
    panels = {name: [key] for key, name in PANELS[kind].items() if points.get(key)}
    if kind == "rl" and (passes := _passes(points)):
        panels["evaluations"] = passes
    scale, x_label = (1, "step") if kind == "rl" else (1e6, "million tokens")
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4 if kind == "loss" else 3), dpi=120, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for i, (axis, (name, keys)) in enumerate(zip(axes, panels.items(), strict=True)):
            for j, key in enumerate(keys):
                x, y = np.array(points[key], float).T
                rare = len(x) < len(points["loss"])
                look = {"color": f"C{i + j}" if len(keys) == 1 else f"C{j}", "label": key, "markersize": 3}
                if key == "loss":  # each point faintly, and a running mean
                    axis.plot(x / scale, y, alpha=0.4, linewidth=0.7, **look)
                    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
                    width = max(1, len(y) // 25)
                    x, y = x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid")
                axis.plot(x / scale, y, "o-" if rare else "-", linewidth=1.4 if key == "loss" else 1, **look)
            axis.set(title=name, xlabel=x_label)
            axis.grid(alpha=0.2)
            if kind != "loss" and axis.dataLim.y0 >= 0:  # a margin of DPO may be negative
                axis.set_ylim(bottom=0)
            if len(keys) > 1:
                axis.legend()
        figure.suptitle(title)
    return figure


def plot(metrics: str | Path, kind: str, picture: str | Path, title: str) -> None:
    """Draw one kind of picture of a `metrics.jsonl`; nothing where its curves do not suffice."""
    points = curves(read_metrics(metrics))
    if kind in kinds(points):
        draw(points, kind, title).savefig(picture)


# TensorBoard, Weights & Biases and trackio, off unless the configuration asks


@contextlib.contextmanager
def tensorboard(config: Config, directory: Path, done: int) -> Iterator[Log]:
    """Write event files to the run's `tensorboard/<stage>/`, at once and by this thread.

    tensorboardX's own thread keeps steps for minutes, and blocks for ever on a full disk. A resumed file hides the
    steps after the checkpoint, which come again.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder = directory.parent / "tensorboard" / directory.name
    again = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def write(step: int, **content: Any) -> None:
        writer.write_event(Event(step=step, wall_time=time.time(), **content))
        writer.flush()

    def log(step: int, values: Mapping[str, float]) -> None:
        pairs = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        write(step, summary=Summary(value=pairs))

    if again:
        write(done, session_log=SessionLog(status=SessionLog.START))
    with contextlib.closing(writer):
        yield log


@contextlib.contextmanager
def service(key: str, title: str, begin: Begin, config: Config, directory: Path, done: int) -> Iterator[Log]:
    """Log to a run of the project `train.wandb` or `train.trackio` for every stage, the same one after a resume.

    Whatever goes wrong with it is reported once, and training goes on without it.
    """
    run_dir, stage, works = directory.parent, directory.name, True
    identity = run_dir / key / f"{stage}.id"

    def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal works
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # trackio prints what it does
                return function(*arguments) if works else None
        except Exception as error:  # of its service, its helper process, the network: it has many kinds
            works = False
            say(f"  {title}: {first_line(error)}; the training goes on without it", style="yellow")

    def start() -> Any:
        if not identity.exists():
            atomic_write(identity, secrets.token_hex(8))
        project, group = getattr(config.train, key), run_dir.resolve().name
        settings = {"project": project, "group": group, "name": f"{group}/{stage}", "config": flatten(config)}
        return begin(run_dir, identity.read_text(encoding="utf-8"), settings | {"resume": "allow"})

    begun: Any = attempt(start) or (None, None)
    log, finish = begun
    failed = True
    try:
        yield lambda step, values: attempt(log, step, values)
        failed = False
    finally:
        attempt(finish, failed)


def begin_wandb(run_dir: Path, identity: str, settings: dict[str, Any]) -> tuple[Log, Finish]:
    import wandb

    quiet = wandb.Settings(console="off", silent=True)
    run = wandb.init(id=identity, dir=str(run_dir), settings=quiet, **settings)
    run.define_metric("*", step_metric="step")  # its own counter refuses the steps that come again after a resume
    return lambda step, values: run.log({**values, "step": step}), lambda failed: run.finish(exit_code=int(failed))


def begin_trackio(run_dir: Path, identity: str, settings: dict[str, Any]) -> tuple[Log, Finish]:
    """Begin a run that trackio keeps on this machine unless its own settings say else."""
    import trackio

    settings["name"] += f"-{identity[:6]}"  # it knows runs by their names, and two run directories may share one
    run = trackio.init(embed=False, **settings)
    # not the run's own `finish`, which trackio would repeat at exit
    return lambda step, values: run.log(dict(values), step=step), lambda failed: trackio.finish()


TRACKERS: dict[str, tuple[str, Callable[[Config, Path, int], AbstractContextManager[Log]]]] = {
    # key of `train` -> its module, what opens it
    "tensorboard": ("tensorboardX", tensorboard),
    "wandb": ("wandb", functools.partial(service, "wandb", "Weights & Biases", begin_wandb)),
    "trackio": ("trackio", functools.partial(service, "trackio", "trackio", begin_trackio)),
}


def check_trackers(config: Config) -> None:
    """Raise `UsageError` for a tracker that the configuration names and that is not installed."""
    for key, (module, _) in TRACKERS.items():
        if getattr(config.train, key) and importlib.util.find_spec(module) is None:
            raise UsageError(f"train.{key}: {module} is not installed; run {install_command(key)}, or leave it off")
    if config.train.wandb:
        import wandb
        from requests.utils import get_netrc_auth  # where `wandb login` keeps the key

        settings = wandb.setup().settings
        if settings.mode == "online" and not (settings.api_key or get_netrc_auth(settings.base_url)):
            raise UsageError("train.wandb: nobody is logged in; run wandb login, or set WANDB_MODE=offline")


@contextlib.contextmanager
def trackers(config: Config, directory: Path, done: int, write: bool) -> Iterator[Log]:
    """Log every record of the training in `directory` (a stage's, in a run's), which goes on after `done` steps.

    `write`: of several processes that train together only one may.
    """
    opened = [tracker for key, (_, tracker) in TRACKERS.items() if write and getattr(config.train, key)]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tracker(config, directory, done)) for tracker in opened]

        def log(step: int, values: Mapping[str, Any]) -> None:
            numbers = {name: v for name, v in values.items() if isinstance(v, int | float) and name != "step"}
            for one in logs:
                one(step, numbers)

        yield log
