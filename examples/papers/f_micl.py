"""f-MICL (Lu et al. 2023): divergences by similarities, alpha and beta, batch sizes, distances; and why it trails InfoNCE here.

    python -m examples.papers.f_micl --help

The weight alpha. At given rows the pull of the positives is in balance with the push of the negatives at

    alpha* = mean_i u_ii f''(u_ii) / mean_{i != j} u_ij^2 f''(u_ij)

the ratio of the slopes of the loss's two parts in log u; `balance` measures it. On the rows of an encoder trained by InfoNCE it
is 3 to 9 for all divergences at beta = 1, and 24 to 33 at beta = 2.5: the trials at ALPHAS are there. For KL it is the weight
that the Donsker-Varadhan shift finds by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastcl import functional

from ..figure import DEGENERATE, KNN, LINEAR, STYLE
from ..images import Images
from ..training import CAMERA, Schedule, embed
from .cells import USUAL, Cell, Paper, Record, schedule
from .command import main
from .pictures import errors, legend, level, rows_of_dots
from .results import Summary

DIGITS = USUAL  # 200 steps of 64
FASHION = schedule(150, data="fashion-mnist")
TAUS, BETAS = (0.1, 0.2, 0.5), (1.0, 2.5, 5.0)
BATCHES = (16, 64, 256)
ALPHAS = {1.0: 5.0, 2.5: 30.0, 5.0: 160.0}  # by beta
BINS = 40  # of distances, from 0 to 2
TITLES = {
    "kl": "KL", "js": "JS", "pearson": "Pearson", "sh": "SH", "tsallis": "Tsallis 3/2", "vlc": "VLC", "jeffrey": "Jeffrey",
    "rkl": "RKL", "neyman": "Neyman",
}  # fmt: skip
COSINE = {
    "kl": exp(1),
    "js": 1.0,
    "pearson": 1.0,
    "sh": 1.0,
    "tsallis": 3.0,
    "vlc": 1.0,
}  # 1 / f*'(0), of Tsallis infinite


def balance(x: Tensor, y: Tensor, divergence: str, beta: float) -> float:
    """alpha* of these rows: the constant mu of the Gaussian moves log u, and with it both parts of the loss."""

    def parts(mu: float) -> tuple[Tensor, Tensor]:
        q = 1.5 if divergence == "tsallis" else None
        terms: Any = functional.f_micl(x, y, divergence=divergence, beta=beta, mu=mu, q=q, return_terms=True)
        return terms.positive, terms.negative

    (high, high_negative), (low, low_negative) = parts(1.001), parts(0.999)
    return float((high - low) / (high_negative - low_negative))


def info_nce(part: str, tau: float, title: str = "", **changes: Any) -> Cell:
    return Cell(
        part, title or f"InfoNCE, tau {tau:g}", "InfoNCELoss", {"temperature": tau}, **({"schedule": DIGITS} | changes)
    )


def f_micl(part: str, divergence: str, alpha: float, beta: float = 1.0, title: str = "", **changes: Any) -> Cell:
    settings: dict[str, Any] = {"divergence": divergence, "alpha": alpha, "beta": beta}
    if divergence == "tsallis":
        settings["q"] = 1.5
    name = title or f"{TITLES[divergence]}, beta {beta:g}, alpha {alpha:g}"
    return Cell(part, name, "FMICLLoss", settings, **({"schedule": DIGITS} | changes))


def cosine(divergence: str, alpha: float) -> Cell:
    cell = f_micl("cosine similarity", divergence, alpha, title=f"{TITLES[divergence]}, cosine, alpha {alpha:.3g}")
    return replace(cell, settings=cell.settings | {"similarity": "cosine"})


def contenders(part: str, how: Schedule, data: str = "digits") -> list[Cell]:
    """InfoNCE, the paper's setting, and the balanced ones, under other circumstances."""
    where: dict[str, Any] = {"schedule": how, "data": data}
    weights = ((1.0, 40.0), (1.0, ALPHAS[1.0]), (2.5, ALPHAS[2.5]))
    return [info_nce(part, 0.2, **where)] + [f_micl(part, "kl", alpha, beta, **where) for beta, alpha in weights]


def all_cells() -> list[Cell]:
    one, weight = "InfoNCE and Donsker-Varadhan", "alpha for KL"
    cells = [info_nce(one, tau) for tau in TAUS]
    cells += [Cell(one, f"KL, DV, beta {beta:g}", "FMICLDVLoss", {"beta": beta}, DIGITS) for beta in BETAS]
    cells += [f_micl(weight, "kl", alpha) for alpha in (0.1, 1.0, 10.0, 20.0)]
    cells += [f_micl(weight, "kl", alpha, 2.5) for alpha in (5.0, 15.0, 150.0)]
    cells += [f_micl(weight, "kl", alpha, 5.0) for alpha in (30.0, ALPHAS[5.0])]
    cells += [f_micl("one alpha = 40, as in the paper", name, 40.0) for name in TITLES]
    cells += [f_micl("one alpha = 5", name, ALPHAS[1.0]) for name in TITLES]
    cells += [f_micl("one alpha = 30, beta = 2.5", name, ALPHAS[2.5], 2.5) for name in TITLES]
    cells += [cosine(name, alpha) for name, own in COSINE.items() for alpha in (40.0, own)]
    for size in (16, 256):
        cells += contenders(f"batch size {size}", schedule(batch_size=size))
    for how in (replace(DIGITS, learning_rate=1e-2), replace(DIGITS, optimizer="sgd", learning_rate=0.1)):
        name = "SGD" if how.optimizer == "sgd" else "AdamW"
        cells += contenders(f"optimiser: {name} {how.learning_rate:g}", how)
    cells += contenders("800 steps", schedule(800))
    fashion = contenders("Fashion-MNIST", FASHION, "fashion-mnist")
    where: dict[str, Any] = {"schedule": FASHION, "data": "fashion-mnist"}
    return cells + fashion + [f_micl("Fashion-MNIST", name, ALPHAS[2.5], 2.5, **where) for name in ("js", "sh", "vlc")]


def measure(model: nn.Module, images: Images, cell: Cell, seed: int) -> Record:
    """How far apart two copies of one held-out image are, and copies of two: counts in BINS, and how well the two part.

    parted: the probability that a dissimilar pair is farther apart than a similar one.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    x, y = (embed(model, CAMERA(images.test[:400], generator)) for _ in range(2))
    similar, dissimilar = (x - y).norm(dim=1), torch.pdist(x)
    below = torch.searchsorted(similar.sort().values, dissimilar).double().mean() / len(similar)
    counts = {
        name: torch.histc(distances, BINS, 0.0, 2.0).int().tolist()
        for name, distances in (("similar", similar), ("dissimilar", dissimilar))
    }
    return {**counts, "parted": float(below), "near": float(similar.mean()), "far": float(dissimilar.mean())}


def draw(found: Sequence[Summary], path: Path) -> None:
    """Six panels: the weight alpha, the temperature, the divergences, the batch size, the distances, the other data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10), layout="constrained")
        weight, temperature, batch, divergences, distances, fashion = figure.subplots(2, 3).flat
        best = max(
            (one for one in found if one.cell.loss == "InfoNCELoss" and one.cell.schedule == DIGITS),
            key=_knn,
            default=None,
        )
        level(weight, best)
        if best:
            divergences.axvline(100 * _knn(best), color="black", linestyle=":", linewidth=1.2)
        _by_weight(weight, found)
        _by_temperature(temperature, found)
        _by_batch(batch, found)
        _by_divergence(divergences, found)
        _by_distance(distances, found)
        rows_of_dots(
            fashion,
            [one for one in found if one.cell.part == "Fashion-MNIST"],
            "Fashion-MNIST, the settings from the digits",
        )
        figure.savefig(path, dpi=100)


def _knn(one: Summary) -> float:
    return one.mean("knn")


def _gaussian(found: Sequence[Summary], **settings: Any) -> list[Summary]:
    """f-MICL with the Gaussian on digits at the common schedule, with these settings."""
    kept = [one for one in found if one.cell.schedule == DIGITS and one.cell.loss == "FMICLLoss"]
    return [
        one for one in kept if settings.items() <= one.cell.settings.items() and "similarity" not in one.cell.settings
    ]


def _by_weight(axes: Axes, found: Sequence[Summary]) -> None:
    for beta, colour in zip(BETAS, (KNN, LINEAR, DEGENERATE), strict=True):
        line = sorted(_gaussian(found, divergence="kl", beta=beta), key=lambda one: one.cell.settings["alpha"])
        errors(axes, [one.cell.settings["alpha"] for one in line], line, f"KL, beta {beta:g}", colour)
        axes.axvline(ALPHAS[beta], color=colour, linewidth=1.0, linestyle=":")
    axes.set(xscale="log", xlabel="alpha (dotted: where pull and push balance)", title="The weight of the negatives")
    legend(axes)


def _by_temperature(axes: Axes, found: Sequence[Summary]) -> None:
    nce = [one for one in found if one.cell.loss == "InfoNCELoss" and one.cell.part == "InfoNCE and Donsker-Varadhan"]
    shifted = [one for one in found if one.cell.loss == "FMICLDVLoss"]
    kl = [one for beta in BETAS for one in _gaussian(found, divergence="kl", beta=beta, alpha=ALPHAS[beta])]
    errors(axes, [one.cell.settings["temperature"] for one in nce], nce, "InfoNCE", "black")
    for line, label, colour in ((shifted, "KL, Donsker-Varadhan", LINEAR), (kl, "KL, alpha*", KNN)):
        errors(axes, [0.5 / one.cell.settings["beta"] for one in line], line, label, colour)
    axes.set(xscale="log", xlabel="temperature, for f-MICL 1 / (2 beta)", title="The width of the kernel")
    legend(axes)


def _by_batch(axes: Axes, found: Sequence[Summary]) -> None:
    for like, colour in zip(contenders("", DIGITS), ("black", DEGENERATE, LINEAR, KNN), strict=True):
        same = [one for one in found if one.cell.title == like.title and one.cell.data == "digits"]
        how = {schedule(batch_size=size): size for size in BATCHES}
        line = sorted((how[one.cell.schedule], k) for k, one in enumerate(same) if one.cell.schedule in how)
        errors(axes, [size for size, _ in line], [same[k] for _, k in line], like.title, colour)
    axes.set_xscale("log")
    axes.set_xticks(BATCHES, list(map(str, BATCHES)), minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="batch size, 200 steps each", title="The batch size")
    legend(axes)


def _by_divergence(axes: Axes, found: Sequence[Summary]) -> None:
    cosines = [one for one in found if one.cell.part == "cosine similarity"]
    groups: dict[str, tuple[str, list[Summary]]] = {
        "Gaussian, beta 1, alpha 40": (DEGENERATE, _gaussian(found, alpha=40.0, beta=1.0)),
        "Gaussian, beta 1, alpha 5": (LINEAR, _gaussian(found, alpha=ALPHAS[1.0], beta=1.0)),
        "Gaussian, beta 2.5, alpha 30": (KNN, _gaussian(found, alpha=ALPHAS[2.5], beta=2.5)),
        "cosine, alpha 40": ("#b8b8b8", [one for one in cosines if one.cell.settings["alpha"] == 40.0]),
        "cosine, alpha 1 / f*'(0)": ("#6a6a6a", [one for one in cosines if one.cell.settings["alpha"] != 40.0]),
    }
    places = {name: -k for k, name in enumerate(TITLES)}
    for shift, (label, (colour, kept)) in enumerate(groups.items()):
        where = [places[one.cell.settings["divergence"]] + 0.3 - 0.15 * shift for one in kept]
        width = [100 * one.spread("knn") for one in kept]
        axes.errorbar(
            [100 * _knn(one) for one in kept], where, xerr=width, fmt="o", color=colour, label=label, markersize=4
        )
    axes.set_yticks(list(places.values()), list(TITLES.values()))
    axes.set(xlabel="kNN accuracy, %", title="Divergences and similarities (dotted: InfoNCE)", ylim=(-11.2, 0.6))
    legend(axes, 7, "lower right")


def _by_distance(axes: Axes, found: Sequence[Summary]) -> None:
    shown = {
        "InfoNCE, tau 0.2": "black", "KL, beta 1, alpha 40": DEGENERATE, "KL, beta 2.5, alpha 30": KNN,
        "RKL, beta 1, alpha 40": "#6a6a6a",
    }  # fmt: skip
    middles = [2.0 * (k + 0.5) / BINS for k in range(BINS)]
    for title, colour in shown.items():
        one = next(
            (one for one in found if one.cell.title == title and one.cell.schedule == DIGITS and one.values("near")),
            None,
        )
        if one is None:
            continue
        for name, style in (("similar", "-"), ("dissimilar", ":")):
            counts = torch.tensor([record[name] for record in one.records if name in record], dtype=torch.float64).sum(
                0
            )
            label = f"{title}: parted {100 * one.mean('parted'):.1f}%" if style == "-" else None
            axes.plot(middles, (counts / counts.sum()).tolist(), style, color=colour, label=label)
    axes.set(xlabel="distance", ylabel="share of pairs", title="Similar pairs (solid) and dissimilar ones (dotted)")
    legend(axes, 7)


PAPER = Paper("f_micl", "f-MICL", tuple(all_cells()), measure, draw)

if __name__ == "__main__":
    sys.exit(main([PAPER]))
