"""The figures: bars of every case, and time and memory against n and d; logarithmic, with numbers and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import fits
from .report import where
from .scaling import TOWERS

COLOURS = {"fastcl": "tab:blue", "eager": "tab:red", "torch.compile": "tab:orange", "chunked recompute": "tab:green"}


def cases(results: dict[str, Any], path: Path) -> None:
    """Time and memory of every method, one row of bars for each case, as high as it has methods."""
    found = results["cases"]
    if not found:
        return
    heights = [len(result["methods"]) + 2 for result in found]
    figure, axes = pyplot.subplots(
        len(found), 2, figsize=(11, 0.24 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for row, result in zip(axes, found, strict=True):
        title = f"{result['case']}: {result['loss']}, n = {result['n']:,}, d = {result['d']}, {result.get('dtype', 'float32')}"
        for axis, key, unit, factor in zip(row, ("median", "peak_bytes"), ("ms", "peak MB"), (1e3, 1e-6), strict=True):
            _bars(axis, result["methods"], key, factor)
            axis.set_title(title if unit == "ms" else "", fontsize=9, loc="left")
            axis.set_xlabel(f"{unit}, logarithmic", fontsize=7, labelpad=1)
            axis.tick_params(labelsize=7)
    _save(figure, results, path)


def _bars(axis: Axes, methods: dict[str, Any], key: str, factor: float) -> None:
    """A bar with its number for each method, or the reason why there is none."""
    values = [factor * (m.get(key) or 0.0) if "median" in m else 0.0 for m in methods.values()]
    known = [value for value in values if value > 0.0] or [1.0]
    least = min(known) / 3.0
    bars = axis.barh(
        list(methods), [max(value, least) for value in values],
        color=["tab:blue" if name == "fastcl" else "lightgray" for name in methods],
    )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(least, 4.0 * max(known))
    axis.invert_yaxis()
    for bar, value, method in zip(bars, values, methods.values(), strict=True):
        bar.set_visible(value > 0.0)
        text = f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        shown, colour = (text, "black") if value > 0.0 else (_why_not(method), "tab:red")
        axis.text(
            bar.get_width() if value > 0.0 else least,
            bar.get_y() + 0.4,
            f" {shown}",
            va="center",
            fontsize=7,
            color=colour,
        )


def _why_not(method: dict[str, Any]) -> str:
    absent = method.get("absent", "")
    if " GB" in absent:
        return f"does not fit: {absent.partition(';')[0]}"
    return absent.partition(", ")[0] or next((what for what in ("failed", "cut") if what in method), "not measured")


def scaling(results: dict[str, Any], path: Path) -> None:
    """Points and their exponents; above against n, below against d. A cross marks the first size that did not fit."""
    points = results["points"]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    at = {
        "n": next((p["d"] for p in points if p["against"] == "n"), 0),
        "d": next((p["n"] for p in points if p["against"] == "d"), 0),
    }
    for row, against, other in zip(axes, ("n", "d"), ("d", "n"), strict=True):
        for axis, what, unit, name in zip(row, ("seconds", "peak_bytes"), (1e3, 1e-6), ("ms", "peak MB"), strict=True):
            for method in [m for m in dict.fromkeys(p["method"] for p in points) if m != TOWERS]:
                _curve(axis, fits.curve(points, method, what, against), unit, method, against)
            for cut in results.get("cut", []):
                if cut["against"] == against and "GB" in cut["why"]:
                    _unfit(axis, cut, fits.curve(points, cut["method"], what, against), unit, against)
            axis.set_title(f"CLIP, float32: {name} against {against}, {other} = {at[against]:,}", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.yaxis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1.0 else f"{value:g}")
            )
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel(against)
            axis.set_ylabel(name)
            axis.grid(alpha=0.3, which="both", linewidth=0.4)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    _save(figure, results, path)


def _curve(axis: Axes, pairs: Sequence[tuple[float, float]], unit: float, method: str, against: str) -> None:
    """One method's points, its exponent in the legend, and its last number."""
    if not pairs:
        return
    law = fits.fit(list(pairs), fits.FROM if against == "n" else 0)
    label = method if law is None else f"{method}: {against}^{law.exponent:.2f}"
    axis.plot(
        *zip(*[(n, unit * v) for n, v in pairs], strict=True),
        "o-",
        color=COLOURS.get(method),
        markersize=4,
        label=label,
    )
    n, value = pairs[-1]
    axis.annotate(
        f"{unit * value:,.0f}", (n, unit * value), (0, 6), textcoords="offset points", ha="center", fontsize=7
    )


def _unfit(axis: Axes, cut: dict[str, Any], pairs: Sequence[tuple[float, float]], unit: float, against: str) -> None:
    """A cross at the size that did not fit, at the height of the curve's end."""
    if pairs:
        place = (cut[against], unit * pairs[-1][1])
        axis.plot(*place, "x", color=COLOURS.get(cut["method"]), markersize=9, markeredgewidth=2)
        axis.annotate("does not fit", place, (0, -14), textcoords="offset points", ha="center", fontsize=7)


def _save(figure: Any, results: dict[str, Any], path: Path) -> None:
    """With a line that says what the figures hold for."""
    if "processor" in results.get("environment", {}):
        figure.supxlabel(where(results), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
