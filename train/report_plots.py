"""The pictures of a report card: PNGs in `plots/`, and the same as SVG in light and dark for the page."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxchat.paths import RunDir
from train.plots import loss_plot
from train.report_exams import STAGE_TITLES

PANELS = (
    ("grad_norm", "gradient norm", "C4"),
    ("lr_mult", "learning rate (of the full one)", "C2"),
    ("tokens_per_second", "tokens per second", "C0"),
)
RL_PANELS = (
    ("reward", "mean reward", "C0"),
    ("length", "tokens per answer", "C4"),
    ("kl", "KL to the start (nats per token)", "C2"),
)
POINTS = 1500  # of one curve in a picture, at most
COLORS = {
    "light": (["#1f5a94", "#c2571a", "#2a7f4f", "#b3203a", "#6a3d9a"], "#23272f", "#ffffff"),
    "dark": (["#7db3e8", "#f0a063", "#6fcf97", "#f08a9a", "#b79ae6"], "#d7dce5", "#171a21"),
}


@dataclass(frozen=True)
class Plot:
    """`path` of the PNG inside the run directory; `svg` by theme."""

    path: str
    svg: dict[str, bytes]


def theme(name: str) -> Any:
    """Matplotlib's settings in the colors of a theme. Texts of an SVG stay text, in the reader's own font."""
    colors, ink, paper = COLORS[name]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return {
        "axes.prop_cycle": cycler(color=colors),
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "legend.facecolor": paper,
        "axes.spines.top": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "jaxchat",
    } | dict.fromkeys(inked, ink)


def draw(run: RunDir, metrics: dict[str, list[dict[str, Any]]]) -> dict[str, list[Plot]]:
    """Draw `plots/`, by stage, from the records of `metrics.jsonl`."""
    drawn: dict[str, list[Plot]] = {}
    run.plots.mkdir(parents=True, exist_ok=True)
    for stage, steps in metrics.items():
        if not any(record.get("loss") is not None for record in steps):
            continue
        title, source = STAGE_TITLES[stage], run.stage(stage) / "metrics.jsonl"
        pictures: dict[str, Callable[[Any], None]] = {}
        if all("tokens" in record for record in steps):
            pictures["loss"] = functools.partial(loss_plot, source, title=title)
        if any("reward" in record for record in steps):
            pictures["rl"] = functools.partial(rl_plot, steps, title=title)
        if all(key in record for record in steps for key, _, _ in PANELS):
            pictures["dynamics"] = functools.partial(dynamics_plot, steps, title=title)
        drawn[stage] = [_plot(run, f"{stage}_{name}.png", paint) for name, paint in pictures.items()]
    return drawn


def _plot(run: RunDir, name: str, paint: Callable[[Any], None]) -> Plot:
    out, path = io.BytesIO(), run.plots / name
    with rc_context(theme("light")):
        paint(path)
    with rc_context(theme("light") | {"savefig.format": "svg", "savefig.transparent": True}):
        paint(out)
    light = re.sub(rb"<metadata>.*?</metadata>", b"", out.getvalue(), flags=re.S)  # it holds the date
    return Plot(path.relative_to(run.root).as_posix(), {"light": light, "dark": _darkened(light)})


def _darkened(svg: bytes) -> bytes:
    """The same picture in the dark theme's colors."""
    (colors, *others), (dark, *dark_others) = COLORS["light"], COLORS["dark"]
    for old, new in zip([*colors, *others], [*dark, *dark_others], strict=True):
        svg = svg.replace(old.encode(), new.encode())
    return svg


def dynamics_plot(records: Sequence[dict[str, Any]], picture: Any, title: str) -> None:
    """Draw the records of `metrics.jsonl` over tokens, one panel a quantity; steps without a value leave a gap.

    `picture`: a path, or a file to write to.
    """
    _panels(records, PANELS, picture, title)


def rl_plot(records: Sequence[dict[str, Any]], picture: Any, title: str) -> None:
    """Reward, length of the answers, KL where there is one, and pass@k of the evaluations, over steps."""
    _panels(records, [panel for panel in RL_PANELS if any(panel[0] in r for r in records)], picture, title, "step")


def _panels(
    records: Sequence[dict[str, Any]],
    panels: Sequence[tuple[str, str, str]],
    picture: Any,
    title: str,
    over: str = "tokens",
) -> None:
    records = records[:: -(-len(records) // POINTS)] if over == "tokens" else records
    at = [record["tokens"] / 1e6 if over == "tokens" else record["step"] for record in records]
    passes = sorted({key for record in records for key in record if key.startswith("pass@")}, key=lambda k: (len(k), k))
    figure = Figure(figsize=(11, 3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + bool(passes), squeeze=False)[0]
    for axis, (key, label, color) in zip(axes, panels, strict=False):
        values = [float("nan") if record.get(key) is None else record[key] for record in records]
        seldom = over == "step" and any(key not in record for record in records)
        axis.plot(at, values, "o" if seldom else "-", color=color, linewidth=0.9, markersize=4)
        axis.set(title=label)
        axis.set_ylim(bottom=0)
    for key in passes:
        points = [(place, record[key]) for place, record in zip(at, records, strict=True) if key in record]
        axes[-1].plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=key)
        axes[-1].set(title="evaluations")
        axes[-1].legend()
    for axis in axes:
        axis.set(xlabel="million tokens" if over == "tokens" else "step")
        axis.grid(alpha=0.2)
    figure.suptitle(title)
    figure.savefig(picture)
