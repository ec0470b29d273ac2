"""What the figures of the papers share: means with their spread, over a setting or as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from ..figure import KNN, LINEAR
from .results import Summary


def errors(axes: Axes, x: Sequence[float], line: Sequence[Summary], label: str, colour: str, style: str = "-") -> None:
    """The kNN accuracy over a setting."""
    mean, spread = [100 * one.mean("knn") for one in line], [100 * one.spread("knn") for one in line]
    axes.errorbar(x, mean, spread, label=label, color=colour, linestyle=style, marker="o", markersize=4, capsize=2)
    axes.set_ylabel("kNN accuracy, %")


def level(axes: Axes, one: Summary | None) -> None:
    """A dotted line at the accuracy of what is compared with."""
    if one is not None:
        axes.axhline(100 * one.mean("knn"), color="black", linestyle=":", linewidth=1.2)


def legend(axes: Axes, fontsize: int = 9, loc: Any = "best") -> None:
    """Where there is something to explain: matplotlib warns of an empty one."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=loc, frameon=False, fontsize=fontsize)


def rows_of_dots(axes: Axes, line: Sequence[Summary], title: str) -> None:
    """The accuracies of both classifiers, a row for each cell."""
    places = [-float(k) for k in range(len(line))]
    for name, colour, label in (("knn", KNN, "nearest neighbours"), ("linear", LINEAR, "linear probe")):
        mean, spread = [100 * one.mean(name) for one in line], [100 * one.spread(name) for one in line]
        axes.errorbar(mean, places, xerr=spread, fmt="o", color=colour, label=label, markersize=5)
    axes.set_yticks(places, [one.cell.title for one in line])
    axes.grid(axis="x", color="#e6e6e6")
    axes.set(xlabel="accuracy, %", title=title)
    legend(axes, 8)
