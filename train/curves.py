"""The curves of a training: thinned out from `metrics.jsonl`, drawn, and sent to trackers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
RL_FIGURES = ("reward", "right", "length", "endless", "kl", "preferred", "margin")  # and pass@k
PANELS = {  # kind of picture -> curve -> title; a kind is drawn where its first curve is there
    "loss": {"loss": "training loss (nats per token)", "val_bpb": "held-out bits per byte"},
    "rl": {
        "reward": "mean reward",
        "length": "tokens per answer",
        "kl": "KL to the start (nats per token)",
        "preferred": "held-out pairs, share preferred",
    },
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
Log = Callable[[int, Mapping[str, Any]], None]  # (step, name -> value); only numbers are logged


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


class TensorBoard:
    """Event files in the run's `tensorboard/<stage>/`; steps after the checkpoint are hidden when they come again.

    Written at once and by this thread: tensorboardX's own keeps steps for minutes, and blocks for ever on a full disk.
    """

    def __init__(self, config: Config, directory: Path, done: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._events, self._summaries = event_pb2, summary_pb2
        folder = directory.parent / "tensorboard" / directory.name
        again = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if again:
            self._write(done, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._events.Event(step=step, wall_time=time.time(), **content))
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pairs = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self._summaries.Summary(value=pairs))

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `train.wandb` for every stage, the same one after a resume.

    Whatever goes wrong with it is reported once, and training goes on without it.
    """

    key, title = "wandb", "Weights & Biases"

    def __init__(self, config: Config, directory: Path, done: int):
        self._run: Any = None
        run_dir, stage = directory.parent, directory.name
        identity = run_dir / self.key / f"{stage}.id"
        with self._tolerated():
            if not identity.exists():
                atomic_write(identity, secrets.token_hex(8))
            self._run = self._init(
                run_dir,
                identity.read_text(encoding="utf-8"),
                project=getattr(config.train, self.key),
                name=f"{run_dir.resolve().name}/{stage}",
                group=run_dir.resolve().name,
                config=flatten(config),
                resume="allow",
            )

    def _init(self, run_dir: Path, identity: str, **settings: Any) -> Any:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)
        run = wandb.init(id=identity, dir=str(run_dir), settings=quiet, **settings)
        # its own counter refuses the steps that come again after a resume
        run.define_metric("*", step_metric="step")
        return run

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def _finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # trackio prints what it does
                yield
        except Exception as error:  # of its service, its helper process, the network: it has many kinds
            self._run = None
            say(f"  {self.title}: {first_line(error)}; the training goes on without it", style="yellow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None:
            with self._tolerated():
                self._log(step, values)

    def close(self, failed: bool) -> None:
        if self._run is not None:
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                self._finish(failed)


class Trackio(WeightsAndBiases):
    """The same in the project `train.trackio`, which trackio keeps on this machine unless its own settings say else."""

    key, title = "trackio", "trackio"

    def _init(self, run_dir: Path, identity: str, **settings: Any) -> Any:
        import trackio

        settings["name"] += f"-{identity[:6]}"  # it knows runs by their names, and two run directories may share one
        return trackio.init(embed=False, **settings)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def _finish(self, failed: bool) -> None:
        import trackio

        trackio.finish()  # not the run's own `finish`, which trackio would repeat at exit


TRACKERS: dict[str, tuple[str, Any]] = {  # key of `train` -> its module, its class
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "trackio": ("trackio", Trackio),
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
    kinds = [kind for key, (_, kind) in TRACKERS.items() if write and getattr(config.train, key)]
    open_trackers = [kind(config, directory, done) for kind in kinds]

    def log(step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float) and name != "step"}
        for tracker in open_trackers:
            tracker.log(step, numbers)

    failed = True
    try:
        yield log
        failed = False
    finally:
        for tracker in open_trackers:
            tracker.close(failed)
