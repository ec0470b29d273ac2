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
    """Points, and the fits as dashed lines: a n^2 + b n against n, a straight line against d."""
    points = results["points"]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.5))
    methods = [m for m in dict.fromkeys(p["method"] for p in points) if m != TOWERS]
    for method in methods:
        for axis, what, unit in zip(axes, ("seconds", "peak_bytes"), (1e3, 1e-6), strict=False):
            pairs = fits.curve(points, method, what)
            law = fits.fit(pairs)
            label = method if law is None else f"{method}: n^{law.exponent:.2f}"
            _line(axis, pairs, unit, method, label)
            if law is not None:
                n = numpy.geomspace(max(pairs[0][0], fits.FROM / 4), pairs[-1][0], 64)
                axis.plot(n, [unit * law.at(m) for m in n], "--", color=COLOURS.get(method), linewidth=1)
        _line(axes[2], fits.curve(points, method, "seconds", "d"), 1e3, method, method)
    n_of_widths = next((p["n"] for p in points if p["against"] == "d"), 0)
    titles = (
        ("ms against n, dashed: a n² + b n", "n"),
        ("peak MB against n, dashed: a n² + b n", "n"),
        (f"ms against d, n = {n_of_widths:,}", "d"),
    )
    for axis, (title, name) in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel=name, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    _save(figure, path)


def _line(axis: Axes, pairs: Sequence[tuple[float, float]], unit: float, method: str, label: str) -> None:
    if pairs:
        axis.plot(
            [p[0] for p in pairs],
            [unit * p[1] for p in pairs],
            "o",
            color=COLOURS.get(method),
            markersize=5,
            label=label,
        )


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
