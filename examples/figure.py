"""The results as one picture: how each loss fell, what the embeddings are worth, and what a loss costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .loss_cost import Cost
from .training import Quality, Trained

KNN, LINEAR, BASELINE, DEGENERATE = "#1f6fb4", "#e07b28", "#8c8c8c", "#b03060"
WAY_COLOURS = {"fastcl": KNN, "eager": "#b8b8b8", "compile": "#7a7a7a"}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
}


def draw(
    path: Path,
    heading: str,
    untrained: Quality,
    trained: list[Trained],
    degenerate: set[str],
    costs: list[Cost],
    rows: str,
) -> None:
    """Write the picture.

    Args:
        path: of the PNG.
        heading: what was trained on what.
        untrained: the quality before training.
        trained: one for each objective.
        degenerate: titles of those of which the paper predicts that they degenerate.
        costs: of the loss alone, may be empty.
        rows: what the costs were measured on.
    """
    with matplotlib.rc_context(STYLE):
        columns = min(5, max(1, len(trained)))
        lines = math.ceil(len(trained) / columns)
        height = max(1.1 * lines + 0.6, 0.24 * len(trained) + 1.4, 4.0)
        figure = Figure(
            figsize=(16, height + (3.0 if costs else 0.0)), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
        )
        figure.suptitle(heading, fontweight="bold", fontsize=12)
        parts = figure.subfigures(
            2 if costs else 1, 1, height_ratios=[height, 2.7] if costs else [height], squeeze=False
        )
        left, right = parts[0, 0].subfigures(1, 2, width_ratios=[1.25, 1.0])
        _curves(left, lines, columns, trained, degenerate)
        _accuracies(right.subplots(), untrained, trained, degenerate)
        if costs:
            _costs(parts[1, 0], costs, rows)
        figure.savefig(path, dpi=120)


def _curves(figure: SubFigure, lines: int, columns: int, trained: list[Trained], degenerate: set[str]) -> None:
    """One small panel for each objective, since their scales have nothing in common."""
    figure.suptitle("Loss at each step (every panel has its own scale)", fontsize=10)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axes, one in zip(panels.flat, trained, strict=False):
        colour = DEGENERATE if one.title in degenerate else KNN
        axes.plot(range(1, len(one.losses) + 1), one.losses, color=colour, linewidth=1.2)
        axes.set_title(one.title, color=colour if one.title in degenerate else "black")
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="y", nbins=3)
    for axes in list(panels.flat)[len(trained) :]:
        axes.axis("off")


def _accuracies(axes: Axes, untrained: Quality, trained: list[Trained], degenerate: set[str]) -> None:
    places = np.arange(len(trained))[::-1]
    for name, colour, label in (("knn", KNN, "nearest neighbours"), ("linear", LINEAR, "linear probe")):
        values = [100 * getattr(one.quality, name) for one in trained]
        axes.scatter(values, places, color=colour, s=30, label=label, zorder=3)
        before = 100 * getattr(untrained, name)
        axes.axvline(before, color=colour, linestyle=":", linewidth=1.4, label=f"untrained, {label}")
    axes.set_yticks(places, [one.title for one in trained])
    for tick, one in zip(axes.get_yticklabels(), trained, strict=True):
        tick.set_color(DEGENERATE if one.title in degenerate else "black")
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy on distorted held-out images, %")
    axes.set_title(
        "Worth of the embeddings (red: the paper predicts that these degenerate)", fontweight="normal", fontsize=10
    )
    axes.legend(
        fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.14 - 0.6 / len(trained)), ncols=4, frameon=False
    )


def _costs(figure: SubFigure, costs: list[Cost], rows: str) -> None:
    figure.suptitle(f"The loss alone, forward and backward, {rows}", fontsize=10)
    time, memory = figure.subplots(1, 2)
    _bars(time, costs, [None if c.seconds is None else 1e3 * c.seconds for c in costs], "time, ms", "{:.0f} ms")
    _bars(memory, costs, [None if c.peak is None else c.peak / 2**20 for c in costs], "peak memory, MiB", "{:.0f} MiB")
    time.legend(fontsize=8, frameon=False)


def _bars(axes: Axes, costs: list[Cost], values: list[float | None], label: str, shown: str) -> None:
    names, ways = list(dict.fromkeys(c.loss for c in costs)), list(dict.fromkeys(c.way for c in costs))
    height = 0.8 / len(ways)
    for k, way in enumerate(ways):
        kept = [(names.index(c.loss), value) for c, value in zip(costs, values, strict=True) if c.way == way]
        places = [-place + 0.4 - (k + 0.5) * height for place, value in kept if value is not None]
        present = [value for _, value in kept if value is not None]
        title = {"fastcl": "fastcl", "eager": "PyTorch, eager", "compile": "torch.compile"}[way]
        bars = axes.barh(places, present, 0.9 * height, color=WAY_COLOURS[way], label=title)
        axes.bar_label(bars, [shown.format(value) for value in present], padding=3, fontsize=8)
    axes.set_yticks([-k for k in range(len(names))], names)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
