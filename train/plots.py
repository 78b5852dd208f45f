"""The curves of a training: thinned out from `metrics.jsonl`, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxchat.log import read_metrics

POINTS = 500  # of one curve, at most; metrics.jsonl has every step
RL_FIGURES = ("reward", "right", "length", "endless", "kl")  # and pass@k
DYNAMICS = {
    "grad_norm": "gradient norm",
    "lr_mult": "learning rate (of the full one)",
    "tokens_per_second": "tokens per second",
}
RL_PANELS = {"reward": "mean reward", "length": "tokens per answer", "kl": "KL to the start (nats per token)"}
COLORS, INK = ["#1f5a94", "#c2571a", "#2a7f4f", "#b3203a", "#6a3d9a"], "#23272f"
STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "svg.hashsalt": "jaxchat",  # the same picture has the same bytes
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)

Steps = Sequence[dict[str, Any]]  # records of metrics.jsonl
Curves = dict[str, list[list[Any]]]  # name -> points [x, value]; a value is None where the step was not finite


def curves(steps: Steps) -> Curves:
    """Return at most `POINTS` points of every curve: [tokens, value], for RL's figures [step, value]."""
    if not steps:
        return {}
    chosen = [*steps[: -1 : -(-len(steps) // POINTS)], steps[-1]]
    points: Curves = {"loss": [[r.get("tokens", r["step"]), r.get("loss")] for r in chosen]}
    points["val_bpb"] = [[r.get("tokens", r["step"]), r["val_bpb"]] for r in steps if "val_bpb" in r]
    for key in DYNAMICS:
        if all(key in r and "tokens" in r for r in steps):
            points[key] = [[r["tokens"], r[key]] for r in chosen]
    for key in rl_figures(steps):
        rare = any(key not in r for r in steps)  # measured at evaluations only
        points[key] = [[r["step"], r[key]] for r in (steps if rare else chosen) if key in r]
    return points


def rl_figures(steps: Steps) -> list[str]:
    """Return the names of reinforcement learning's figures in the records, pass@k last."""
    names = {key for record in steps for key in record}
    return [key for key in RL_FIGURES if key in names] + _passes(names)


def kinds(points: Curves) -> list[str]:
    """Return the pictures that the curves suffice for: "loss", "rl", "dynamics"; none without any loss."""
    if all(value is None for _, value in points.get("loss", ())):
        return []
    needed = {"loss": ("loss",), "rl": ("reward",), "dynamics": tuple(DYNAMICS)}
    return [kind for kind, names in needed.items() if all(name in points for name in names)]


def draw(points: Curves, kind: str, title: str) -> Figure:
    """Return one picture of the curves."""
    if kind == "loss":
        return _loss(points, title)
    if kind == "dynamics":
        return _panels(points, DYNAMICS, title)
    panels = {key: label for key, label in RL_PANELS.items() if key in points}
    return _panels(points, panels, title, _passes(points))


def save(figure: Figure, file: Any, svg: bool = False) -> None:
    """Write a picture as PNG, or as SVG without background."""
    settings: Any = {"format": "svg", "transparent": True, "metadata": {"Date": None}} if svg else {}
    with rc_context(STYLE):
        figure.savefig(file, **settings)


def plot(metrics: str | Path, kind: str, picture: str | Path, title: str) -> None:
    """Draw one kind of picture of a `metrics.jsonl`; nothing where its curves do not suffice."""
    points = curves(read_metrics(metrics))
    if kind in kinds(points):
        save(draw(points, kind, title), picture)


def _passes(names: Any) -> list[str]:
    return sorted((name for name in names if name.startswith("pass@")), key=lambda name: (len(name), name))


def _loss(points: Curves, title: str) -> Figure:
    """Training loss (faint: each point; strong: running mean) and held-out bits per byte over tokens."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        axis = figure.add_subplot()
        tokens, loss = zip(*((x / 1e6, y) for x, y in points["loss"] if y is not None), strict=True)
        axis.plot(tokens, loss, color="C0", alpha=0.4, linewidth=0.7)
        axis.plot(tokens, _running_mean(loss, 0.95), color="C0", linewidth=1.6, label="training loss (nats per token)")
        if points["val_bpb"]:
            right = axis.twinx()
            right.plot(*_axes(points["val_bpb"], 1e6), "o-", color="C1", markersize=3, linewidth=1.2)
            right.set_ylabel("held-out bits per byte", color="C1")
        axis.set(xlabel="million tokens", ylabel="nats per token", title=title)
        axis.grid(alpha=0.25)
        axis.legend(loc="upper right")
    return figure


def _panels(points: Curves, panels: dict[str, str], title: str, passes: Sequence[str] = ()) -> Figure:
    """One panel a curve, and one for all pass@k; values that are missing leave a gap."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3), dpi=120, layout="constrained")
        axes = figure.subplots(1, len(panels) + bool(passes), squeeze=False)[0]
        scale, label = (1, "step") if panels is not DYNAMICS else (1e6, "million tokens")
        for i, (key, name) in enumerate(panels.items()):
            rare = len(points[key]) < len(points["loss"])
            axes[i].plot(*_axes(points[key], scale), "o" if rare else "-", color=f"C{i}", linewidth=0.9, markersize=4)
            axes[i].set(title=name)
            axes[i].set_ylim(bottom=0)
        for key in passes:
            axes[-1].plot(*_axes(points[key], scale), "o-", markersize=3, linewidth=1.2, label=key)
        if passes:
            axes[-1].set(title="evaluations")
            axes[-1].legend()
        for axis in axes:
            axis.set(xlabel=label)
            axis.grid(alpha=0.2)
        figure.suptitle(title)
    return figure


def _axes(points: list[list[Any]], scale: float) -> tuple[list[float], list[float]]:
    return [x / scale for x, _ in points], [float("nan") if y is None else y for _, y in points]


def _running_mean(values: Sequence[float], decay: float) -> list[float]:
    """Exponential mean without the bias towards the first value."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(mean / weight)
    return smooth
