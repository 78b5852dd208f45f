"""How a stage's training went besides its loss: gradient norm, learning rate and speed, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = (
    ("grad_norm", "gradient norm", "#6a3d9a"),
    ("lr_mult", "learning rate (of the full one)", "#2a7f4f"),
    ("tokens_per_second", "tokens per second", "#1f5a94"),
)


def dynamics_plot(records: Sequence[dict[str, Any]], picture: Path, title: str) -> None:
    """Draw the records of `metrics.jsonl` over tokens, one panel a quantity; steps without a value leave a gap."""
    tokens = [record["tokens"] / 1e6 for record in records]
    figure = Figure(figsize=(11, 3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, label, color) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        values = [float("nan") if record[key] is None else record[key] for record in records]
        axis.plot(tokens, values, color=color, linewidth=0.9)
        axis.set(xlabel="million tokens", title=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(picture)
