"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxchat.log import read_metrics


def loss_plot(metrics: str | Path, picture: Any, title: str) -> None:
    """Draw training loss (faint: each step; strong: running mean) and held-out bits per byte over tokens.

    `picture`: a path, or a file to write to.
    """
    records = [r for r in read_metrics(metrics) if r.get("loss") is not None]
    if not records:
        return
    tokens = [r["tokens"] / 1e6 for r in records]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    loss = [r["loss"] for r in records]
    axis.plot(tokens, loss, color="C0", alpha=0.4, linewidth=0.7)
    axis.plot(tokens, _running_mean(loss, 0.95), color="C0", linewidth=1.6, label="training loss (nats per token)")
    scored = [r for r in records if "val_bpb" in r]
    if scored:
        right = axis.twinx()
        points = [r["tokens"] / 1e6 for r in scored], [r["val_bpb"] for r in scored]
        right.plot(*points, "o-", color="C1", markersize=3, linewidth=1.2)
        right.set_ylabel("held-out bits per byte", color="C1")
    axis.set(xlabel="million tokens", ylabel="nats per token", title=title)
    axis.grid(alpha=0.25)
    axis.legend(loc="upper right")
    figure.savefig(picture)


def _running_mean(values: list[float], decay: float) -> list[float]:
    """Exponential mean without the bias towards the first value."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(mean / weight)
    return smooth
