"""The figures: bars of every case, and time and memory against n and d with their fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from . import fits
from .scaling import TOWERS

COLOURS = {"fastcl": "tab:blue", "eager": "tab:red", "torch.compile": "tab:orange", "chunked recompute": "tab:green"}


def cases(results: dict[str, Any], path: Path) -> None:
    """Time and memory of every method, one row of bars for each case."""
    found = results["cases"]
    if not found:
        return
    figure, axes = pyplot.subplots(len(found), 2, figsize=(11, 1.9 * len(found)), squeeze=False)
    for row, result in zip(axes, found, strict=True):
        measured = {name: m for name, m in result["methods"].items() if "median" in m}
        colours = ["tab:blue" if name == "fastcl" else "lightgray" for name in measured]
        bars = (
            ("ms", [1e3 * m["median"] for m in measured.values()]),
            ("peak MB", [(m.get("peak_bytes") or 0) / 1e6 for m in measured.values()]),
        )
        for axis, (unit, values) in zip(row, bars, strict=True):
            axis.barh(list(measured), values, color=colours)
            axis.invert_yaxis()
            axis.set_title(f"{result['case']}: {unit}", fontsize=9)
            axis.tick_params(labelsize=7)
    _save(figure, path)


def scaling(results: dict[str, Any], path: Path) -> None:
    """Points, and dashed the fits a n^2 + b n; above against n, below against d."""
    points = results["points"]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8))
    at = {
        "n": next((p["d"] for p in points if p["against"] == "n"), 0),
        "d": next((p["n"] for p in points if p["against"] == "d"), 0),
    }
    for row, against, other in zip(axes, ("n", "d"), ("d", "n"), strict=True):
        for axis, what, unit, name in zip(row, ("seconds", "peak_bytes"), (1e3, 1e-6), ("ms", "peak MB"), strict=True):
            for method in [m for m in dict.fromkeys(p["method"] for p in points) if m != TOWERS]:
                _curve(axis, fits.curve(points, method, what, against), unit, method, against)
            dashed = ", dashed: a n² + b n" if against == "n" else ""
            axis.set_title(f"{name} against {against}, {other} = {at[against]:,}{dashed}", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_xlabel(against)
            axis.grid(alpha=0.3, which="both", linewidth=0.4)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    _save(figure, path)


def _curve(axis: Axes, pairs: Sequence[tuple[float, float]], unit: float, method: str, against: str) -> None:
    """One method's points, and its law in the legend."""
    if not pairs:
        return
    law = fits.fit(list(pairs), fits.FROM if against == "n" else 0)
    label = method if law is None else f"{method}: {against}^{law.exponent:.2f}"
    colour = COLOURS.get(method)
    axis.plot([p[0] for p in pairs], [unit * p[1] for p in pairs], "o", color=colour, markersize=5, label=label)
    if law is not None and against == "n":
        n = numpy.geomspace(max(pairs[0][0], fits.FROM / 4), pairs[-1][0], 64)
        axis.plot(n, [unit * law.at(m) for m in n], "--", color=colour, linewidth=1)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
