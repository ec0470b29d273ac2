"""MINC: alpha, the averaged statistic, GHA, the target network, against spectral; and the stability of the loop, measured.

    python -m examples.papers.minc --help

The statistic's average (weight beta of the old) and the optimiser's momentum m are two lags in one loop. Linearised at its fixed
point, one mode of eigenvalue lambda is stable for steps eta = learning rate x kernel / (1 - m) with

    2 eta lambda < (1 - beta m) / (beta m);   without an average  eta lambda < (1 + m) / (1 - m)
    without momentum  eta lambda < (1 + beta) / (1 - beta), and for each pair of modes, by a continuous approximation,
    eta (lambda_k - lambda_i) < (1 - beta) / beta with GHA, eta (lambda_k - lambda_i)^2 / (lambda_k + lambda_i) without

`largest_step` measures that on an operator of seven modes, by running the loop itself from near its fixed point; the cells
"steps" measure it on the encoder, whose constant mode has lambda = 1 and the kernel |d mean_x phi(x) / d weights|^2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from ..figure import DEGENERATE, KNN, LINEAR, STYLE
from ..images import Images
from ..training import Schedule, encoder
from .cells import USUAL, Cell, Paper, Record, schedule
from .command import main
from .pictures import errors, legend, level, rows_of_dots
from .results import Summary

MOMENTUM = USUAL  # 200 steps of 64
PLAIN = replace(MOMENTUM, momentum=0.0)
STEPS = schedule(optimizer="sgd", constant=True)
LONG = schedule(600, learning_rate=5e-4)
FASHION = schedule(150, data="fashion-mnist")
LONGER = schedule(800)
LONGEST = schedule(3200, learning_rate=5e-4)
WIDE, WIDE_PLAIN = schedule(dim=512), schedule(dim=512, momentum=0.0)
WIDEST = schedule(100, 256, dim=1024)
LARS = {0.9: (3.0, 10.0, 20.0, 30.0), 0.0: (30.0, 100.0, 200.0)}  # by momentum, the rates for the spectral loss
CHOSEN = {0.9: 20.0, 0.0: 100.0}  # its best, which MINC takes
BEYOND = {  # of the last three panels: what the names of their parts begin with, and its label
    "Longer, rows clipped": {"800 steps": "800", "3,200 steps, each six times smaller": "3,200 small"},
    "LARS, 200 steps, rows clipped": {"LARS, momentum 0.9": "m 0.9", "LARS, no momentum": "m 0"},
    "Wider, rows clipped": {
        "d 512, momentum 0.9": "512",
        "d 512, no momentum": "512, m 0",
        "d 1,024, 100 steps of 256, momentum 0.9": "1,024",
    },
}
EMAS = (0.0, 0.5, 0.8, 0.95)
RATES = (3e-5, 1e-4, 2e-4, 5e-4)  # of SGD
MODES = np.array([1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1])


def minc(part: str, ema: float, gha: bool, how: Schedule, **changes: Any) -> Cell:
    """A cell of MINC; mu goes to its settings, the rest to the cell."""
    settings = {"ema": ema, "gha": gha} | ({"mu": changes.pop("mu")} if "mu" in changes else {})
    rate = changes.get("rate")
    title = f"EMA {ema:g}{', GHA' if gha else ''}{'' if rate is None else f', target {rate:g}'}"
    return Cell(part, title, "MINCLoss", settings, how, **changes)


def spectral(part: str, how: Schedule, **changes: Any) -> Cell:
    return Cell(part, "spectral, clipped", "SpectralLoss", {"mu": 4.0}, how, **changes)


def all_cells() -> list[Cell]:
    cells = []
    for name, how in (("AdamW, momentum 0.9", MOMENTUM), ("AdamW, no momentum", PLAIN)):
        cells += [minc(name, ema, gha, how) for gha in (False, True) for ema in EMAS]
    lagging = "AdamW, momentum 0.9, with a target"
    cells += [minc(lagging, ema, gha, MOMENTUM, rate=max(ema, 0.8)) for gha in (False, True) for ema in (0.8, 0.95)]
    cells += [minc(lagging, 0.8, True, MOMENTUM, rate=0.9), minc("AdamW, no momentum", 0.8, True, PLAIN, rate=0.9)]
    cells += contenders("rows clipped at norm 2", MOMENTUM)
    cells += [
        Cell("alpha, each batch its own statistic", f"alpha {alpha:g}", "FMIAlphaLoss", {"alpha": alpha}, MOMENTUM)
        for alpha in (1.0, 1.5, 2.0, 2.5, 3.0)
    ]
    for rate in RATES:
        how, part = replace(STEPS, learning_rate=rate), f"steps: SGD, momentum 0.9, rate {rate:g}"
        cells += [
            minc(part, 0.0, False, how),
            minc(part, 0.8, False, how),
            minc(part, 0.8, False, how, rate=0.8),
        ]
    cells += contenders("Fashion-MNIST, rows clipped at norm 2", FASHION, "fashion-mnist")
    cells += contenders("small steps, rows clipped at norm 2", LONG)[:4]
    return cells + beyond()


def beyond() -> list[Cell]:
    """What is nearer to how such losses are trained: longer, with LARS, and wider. Rows are clipped, but in one part."""
    cells = contenders("800 steps", LONGER)[:5]
    slow = contenders("3,200 steps, each six times smaller", LONGEST)
    cells += [slow[0], *slow[2:5]]  # EMA 0 is the spectral loss to a point, here and in each part that has both
    for m, rates in LARS.items():
        part = f"LARS, {f'momentum {m:g}' if m else 'no momentum'}"
        how = schedule(optimizer="lars", momentum=m)
        cells += [
            replace(spectral(part, replace(how, learning_rate=rate)), title=f"spectral, rate {rate:g}")
            for rate in rates
        ]
        cells += contenders(f"{part}, rate {CHOSEN[m]:g}", replace(how, learning_rate=CHOSEN[m]))[1:5]
    for part, how in (("d 512, momentum 0.9", WIDE), ("d 512, no momentum", WIDE_PLAIN)):
        cells += [*contenders(part, how)[:5], minc(part, 0.95, False, how, rate=0.95, mu=4.0)]
    cells.append(minc("d 512, no momentum", 0.95, False, WIDE_PLAIN, mu=4.0))
    free = "d 512, free norms, no momentum"
    cells += [minc(free, ema, False, WIDE_PLAIN) for ema in (0.0, 0.8, 0.95)]
    cells += [minc(free, ema, True, WIDE_PLAIN) for ema in EMAS]
    cells.append(minc(free, 0.8, True, WIDE_PLAIN, rate=0.9))
    few = contenders("d 1,024, 100 steps of 256, momentum 0.9", WIDEST)
    return [*cells, few[0], few[2], few[4]]


def contenders(part: str, how: Schedule, data: str = "digits") -> list[Cell]:
    """Rows clipped as for the spectral loss: this, MINC without an average, with it, and what is said to mend it."""
    where: dict[str, Any] = {"data": data, "mu": 4.0}
    return [
        spectral(part, how, data=data),
        minc(part, 0.0, False, how, **where),
        minc(part, 0.8, False, how, **where),
        minc(part, 0.8, True, how, **where),
        minc(part, 0.8, False, how, rate=0.8, **where),
        minc(part, 0.8, True, how, rate=0.9, **where),
    ]


def measure(model: nn.Module, images: Images, cell: Cell, seed: int) -> Record:
    """Of the cells that measure the step: the kernel of the constant mode, at the start and at the end."""
    if not cell.part.startswith("steps"):
        return {}
    return {
        "kernel": kernel(encoder(images.side, cell.schedule.dim, seed).train(), images),
        "kernel_trained": kernel(model.train(), images),
    }


def kernel(model: nn.Module, images: Images, coordinates: int = 8) -> float:
    """|d mean_x phi_k(x) / d weights|^2, the mean over some coordinates k: how far one step of rate 1 moves the mean of phi_k."""
    rows = model(images.train[:512]).mean(0)[:coordinates]
    weights = list(model.parameters())
    squares = [
        sum(float(g.square().sum()) for g in torch.autograd.grad(row, weights, retain_graph=True)) for row in rows
    ]
    return sum(squares) / len(squares)


def bound(ema: float, m: float, gha: bool) -> float:
    """The largest stable eta of the loop linearised at diag(MODES): of one mode, without momentum of two as well."""
    if m:
        return (1 - ema * m) / (2 * ema * m) if ema else (1 + m) / (1 - m)
    first, last = MODES.max(), MODES.min()
    pair = float(first - last if gha else (first - last) ** 2 / (first + last))
    return min((1 + ema) / (1 - ema), (1 - ema) / (ema * pair) if ema else 1.0)


@cache
def largest_step(ema: float, m: float, gha: bool, rate: float | None = None) -> float:
    """The largest eta below which the loop on diag(MODES) comes back to its fixed point: two grids, the finer 1% apart."""
    low, high = 1e-2, 1e2
    for points in (48, 24):
        etas = np.geomspace(low, high, points)
        unstable = np.flatnonzero(~returns(etas, ema, m, gha, rate))
        first = int(unstable[0]) if len(unstable) else points - 1
        low, high = float(etas[max(first - 1, 0)]), float(etas[first])
    return low


def returns(etas: Any, ema: float, m: float, gha: bool, rate: float | None, steps: int = 3000) -> Any:
    """For each eta whether a displacement of phi = W psi shrinks; the operator takes W to W diag(MODES), of W or of a target's W.

    It is measured on W^T W, which does not see a rotation of phi: without GHA that is free.
    """
    fixed = np.diag(MODES**0.5)
    start = fixed + 1e-4 * np.random.default_rng(0).standard_normal(fixed.shape)
    W = np.repeat(start[None], len(etas), axis=0)
    target, statistic, velocity = W.copy(), W @ W.swapaxes(1, 2), np.zeros_like(W)
    largest = []
    for _ in range(steps):
        statistic = ema * statistic + (1 - ema) * W @ W.swapaxes(1, 2)
        deflation = np.tril(statistic) if gha else statistic
        velocity = m * velocity + (W if rate is None else target) * MODES - deflation @ W
        W = np.clip(W + etas[:, None, None] * (1 - m) * velocity, -10.0, 10.0)
        if rate is not None:
            target = rate * target + (1 - rate) * W
        largest.append(np.abs(W.swapaxes(1, 2) @ W - np.diag(MODES)).max((1, 2)))
    course = np.array(largest)
    early, late = course[steps // 3 : 2 * steps // 3].max(0), course[2 * steps // 3 :].max(0)
    return (course.max(0) < 0.02) & ((late < 0.9 * early) | (late < 1e-9))


def remarks(found: Sequence[Summary]) -> str:
    """Markdown: the bound of the step, by the formula and on the operator; and where the encoder stands."""
    cells = [one for one in found if one.values("kernel")]
    if not cells:
        return ""
    lines = [
        "| largest stable eta, lambda_0 = 1 | full, formula | full, measured | GHA, formula | GHA, measured |",
        "|---|---:|---:|---:|---:|",
    ]
    for m in (0.9, 0.0):
        for ema in (0.0, 0.3, 0.5, 0.8, 0.9):
            pairs = [f"{bound(ema, m, gha):.3g} | {largest_step(ema, m, gha):.3g}" for gha in (False, True)]
            lines.append(f"| momentum {m:g}, EMA {ema:g} | " + " | ".join(pairs) + " |")
    for rate in (0.8, 0.9, 0.99):
        measured = [f" | {largest_step(0.8, 0.9, gha, rate):.3g}" for gha in (False, True)]
        lines.append(f"| momentum 0.9, EMA 0.8, target {rate:g} | " + " | ".join(measured) + " |")
    lines += [
        "",
        "| SGD, momentum 0.9, rate | eta lambda | EMA 0 | EMA 0.8 | EMA 0.8, target 0.8 |",
        "|---:|---:|---:|---:|---:|",
    ]
    for rate in RATES:
        line = [
            one for one in found if one.cell.schedule == replace(STEPS, learning_rate=rate) and one.values("kernel")
        ]
        if line:
            swings = [f"{one.mean('swing'):.3f} ± {one.spread('swing'):.3f}" for one in line]
            lines.append(f"| {rate:g} | {10 * rate * line[0].mean('kernel'):.3f} | " + " | ".join(swings) + " |")
    return "\n".join(lines)


def draw(found: Sequence[Summary], path: Path) -> None:
    """Nine panels: the average with and without momentum, alpha, the bound, small steps, other data, longer, LARS and wider."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(20, 15), layout="constrained")
        momentum, plain, alpha, stable, long, fashion, *more = figure.subplots(3, 3).flat
        best = next((one for one in found if one.cell.loss == "SpectralLoss" and one.cell.schedule == MOMENTUM), None)
        for axes, name, how in ((momentum, "momentum 0.9", MOMENTUM), (plain, "no momentum", PLAIN)):
            _averages(axes, found, how)
            level(axes, best)
            axes.set(xlabel="EMA of the statistic", title=f"AdamW, {name} (dotted: spectral, clipped, momentum 0.9)")
        line = [one for one in found if one.cell.loss == "FMIAlphaLoss"]
        errors(alpha, [one.cell.settings["alpha"] for one in line], line, "alpha-divergence", KNN)
        alpha.set(xlabel="alpha", title="The divergence, each batch its own statistic")
        level(alpha, best)
        _bounds(stable, found)
        rows_of_dots(
            long, [one for one in found if one.cell.schedule == LONG], "Small steps, rows clipped: 600 steps at 5e-4"
        )
        rows_of_dots(fashion, [one for one in found if one.cell.schedule == FASHION], "Fashion-MNIST, rows clipped")
        for axes, (title, parts) in zip(more, BEYOND.items(), strict=True):
            _by_part(axes, found, parts, title)
        figure.savefig(path, dpi=100)


def _by_part(axes: Axes, found: Sequence[Summary], parts: dict[str, str], title: str) -> None:
    """The cells of several parts in one panel, each with its part's label; parts by what their names begin with."""
    line = [
        Summary(replace(one.cell, title=f"{label}: {one.cell.title}"), one.records)
        for part, label in parts.items()
        for one in found
        if one.cell.part.startswith(part)
    ]
    rows_of_dots(axes, line, title)


def _averages(axes: Axes, found: Sequence[Summary], how: Schedule) -> None:
    free = [one for one in found if one.cell.schedule == how and one.cell.loss == "MINCLoss"]
    free = [one for one in free if "mu" not in one.cell.settings]
    lines = {
        "full": (KNN, "-", [one for one in free if one.cell.rate is None and not one.cell.settings["gha"]]),
        "GHA": (DEGENERATE, "-", [one for one in free if one.cell.rate is None and one.cell.settings["gha"]]),
        "full, target": (KNN, "--", [one for one in free if one.cell.rate and not one.cell.settings["gha"]]),
        "GHA, target": (
            DEGENERATE,
            "--",
            [one for one in free if one.cell.rate in (0.8, 0.95) and one.cell.settings["gha"]],
        ),
        "GHA, target 0.9": (LINEAR, "--", [one for one in free if one.cell.rate == 0.9]),
    }
    for label, (colour, style, line) in lines.items():
        if line:
            errors(axes, [one.cell.settings["ema"] for one in line], line, label, colour, style)
    legend(axes)


def _bounds(axes: Axes, found: Sequence[Summary]) -> None:
    """The swing of |phi|^2 late in training over the step in units of the bound; below, the operator's own points."""
    cells = [one for one in found if one.values("kernel")]
    if not cells:
        return
    for ema, rate, colour, label in (
        (0.0, None, "black", "EMA 0"),
        (0.8, None, DEGENERATE, "EMA 0.8"),
        (0.8, 0.8, KNN, "EMA 0.8, target 0.8"),
    ):
        line = [one for one in cells if one.cell.settings["ema"] == ema and one.cell.rate == rate]
        steps = [one.cell.schedule.learning_rate * one.mean("kernel") / 0.1 for one in line]
        swing, spread = [one.mean("swing") for one in line], [one.spread("swing") for one in line]
        axes.errorbar(steps, swing, spread, marker="o", color=colour, label=f"{label}, the encoder")
    axes.axvline(bound(0.8, 0.9, False), color=DEGENERATE, linewidth=1.0, label="bound for EMA 0.8: the formula")
    axes.axvline(
        largest_step(0.8, 0.9, False), color=DEGENERATE, linewidth=1.0, linestyle="--", label="measured on 7 modes"
    )
    axes.axvline(
        largest_step(0.8, 0.9, False, 0.8), color=KNN, linewidth=1.0, linestyle="--", label="with the target, measured"
    )
    axes.axvline(bound(0.0, 0.9, False), color=LINEAR, linewidth=1.0, label="bound for EMA 0: the formula")
    axes.set(
        xscale="log", xlabel="eta lambda of the constant mode (SGD, momentum 0.9)", ylabel="relative swing of |phi|^2"
    )
    axes.set_title("The step that is stable")
    legend(axes, 7)


PAPER = Paper("minc", "MINC", tuple(all_cells()), measure, draw, remarks)

if __name__ == "__main__":
    sys.exit(main([PAPER]))
