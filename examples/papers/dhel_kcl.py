"""DHEL and KCL (Koromilas et al. 2024): batch sizes and temperatures, rank and uniformity, against InfoNCE, NT-Xent and DCL.

    python -m examples.papers.dhel_kcl --help

All batch sizes take as many steps, so that a small one sees fewer images, and what is compared is the loss at that size.
DHEL is taken as the authors' code has it (form "joint": one alignment, the energies of both views in full) and with half of each
view's energy ("symmetric"), whose pull and push weigh as InfoNCE's do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastcl import functional, metrics

from ..figure import DEGENERATE, KNN, LINEAR, STYLE
from ..images import Images
from ..training import CAMERA, embed
from .cells import USUAL, Cell, Paper, Record, schedule
from .command import main
from .pictures import errors, legend, rows_of_dots
from .results import Summary

BATCHES = (16, 64, 256)
TEMPERATURES, WIDTHS, WEIGHTS = (0.05, 0.1, 0.2, 0.5, 1.0), (0.5, 1.0, 2.0, 4.0), (1.0, 3.0, 16.0, 55.0)
COLOURS = {
    "InfoNCE": "black",
    "NT-Xent": "#8c8c8c",
    "DCL": DEGENERATE,
    "DHEL": KNN,
    "symmetric DHEL": "#6fb2e6",
    "KCL": LINEAR,
}
DRAWN = (8, 32, 128, 400)  # rows of a batch, out of one set of embeddings, of which a loss is taken
VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "InfoNCE": lambda u, v: functional.info_nce(u, v, temperature=0.2),
    "DHEL": lambda u, v: functional.dhel(u, v, temperature=0.2),
    "KCL": lambda u, v: functional.kcl(u, v, t=2.0, gamma=3.0),
}


def softmax(part: str, name: str, temperature: float, **changes: Any) -> Cell:
    cell = {"InfoNCE": "InfoNCELoss", "NT-Xent": "NTXentLoss", "DCL": "DCLLoss", "DHEL": "DHELLoss"}[name]
    return Cell(part, f"{name}, tau {temperature:g}", cell, {"temperature": temperature}, **changes)


def halved(temperature: float, **changes: Any) -> Cell:
    settings = {"temperature": temperature, "form": "symmetric"}
    return Cell("DHEL, half of each view", f"symmetric DHEL, tau {temperature:g}", "DHELLoss", settings, **changes)


def kcl(part: str, t: float, gamma: float, **changes: Any) -> Cell:
    return Cell(part, f"KCL, t {t:g}, gamma {gamma:g}", "KCLLoss", {"t": t, "gamma": gamma}, **changes)


def contenders(part: str, **changes: Any) -> list[Cell]:
    return [softmax(part, name, 0.2, **changes) for name in ("InfoNCE", "NT-Xent", "DCL", "DHEL")] + [
        kcl(part, 2.0, 3.0, **changes)
    ]


def all_cells() -> list[Cell]:
    cells = []
    for size in BATCHES:
        cells += contenders(f"batch size {size}", schedule=schedule(batch_size=size))
    for name in ("InfoNCE", "DCL", "DHEL"):
        cells += [softmax("temperature, batch size 64", name, tau) for tau in TEMPERATURES if tau != 0.2]
    cells += [halved(tau) for tau in (0.1, 0.2, 0.5)] + [
        halved(0.2, schedule=schedule(batch_size=size)) for size in (16, 256)
    ]
    cells += [kcl("width and weight of KCL", t, 3.0) for t in WIDTHS if t != 2.0]
    cells += [kcl("width and weight of KCL", 2.0, gamma) for gamma in WEIGHTS if gamma != 3.0]
    longer: dict[str, Any] = {"part": "800 steps", "schedule": schedule(800)}
    cells += [softmax(name=name, temperature=0.2, **longer) for name in ("InfoNCE", "DHEL")]
    cells += [kcl(t=2.0, gamma=gamma, **longer) for gamma in (3.0, 16.0)]
    for size in (32, 128):
        part = f"Fashion-MNIST, batch size {size}"
        cells += [
            c
            for c in contenders(part, schedule=schedule(100, size, "fashion-mnist"), data="fashion-mnist")
            if c.loss != "DCLLoss"
        ]
    return cells


def measure(model: nn.Module, images: Images, cell: Cell, seed: int) -> Record:
    """How the cosines differ from those of uniform directions; of InfoNCE's rows also what losses come to on batches of them."""
    generator = torch.Generator().manual_seed(seed + 1)
    x, y = (embed(model, CAMERA(images.test, generator)) for _ in range(2))
    record: Record = {"wasserstein": metrics.wasserstein_uniformity(x)}
    if cell.title == "InfoNCE, tau 0.2" and cell.data == "digits":
        for name, value in VALUES.items():
            record[f"values {name}"] = [_mean_value(value, x, y, size, generator) for size in DRAWN]
    return record


def _mean_value(
    value: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, size: int, generator: torch.Generator
) -> float:
    """Over random batches of so many rows, 4000 rows in all."""
    total, rounds = 0.0, 4000 // size
    for _ in range(rounds):
        kept = torch.randperm(len(x), generator=generator)[:size]
        total += value(x[kept], y[kept]).item() / rounds
    return total


def draw(found: Sequence[Summary], path: Path) -> None:
    """Six panels: accuracy and rank by batch size and by temperature, the value of a loss by batch size, the other data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 10), layout="constrained")
        batch, temperature, values, rank, spread, fashions = figure.subplots(2, 3).flat
        for name, colour in COLOURS.items():
            line = [
                one
                for size in BATCHES
                for one in found
                if one.cell.part == f"batch size {size}" and _family(one) == name
            ]
            sizes = [one.cell.schedule.batch_size for one in line]
            errors(batch, sizes, line, name, colour)
            _course(rank, sizes, line, "effective_rank", colour)
        for name in ("InfoNCE", "DCL", "DHEL", "symmetric DHEL", "KCL"):
            line = sorted((one for one in found if _swept(one, name)), key=_width)
            errors(temperature, [_width(one) for one in line], line, name, COLOURS[name])
            _course(spread, [_width(one) for one in line], line, "uniformity", COLOURS[name])
        for axes in (batch, rank):
            axes.set_xscale("log")
            axes.set_xticks(BATCHES, list(map(str, BATCHES)), minor=False)
            axes.set_xticks([], minor=True)
        batch.set(xlabel="batch size, 200 steps each", title="Accuracy by batch size")
        rank.set(
            xlabel="batch size, 200 steps each",
            ylabel="effective rank of 64",
            title="Dimensions used",
        )
        temperature.set(
            xscale="log", xlabel="temperature, for KCL 1 / (2 t)", title="Accuracy by temperature, batch size 64"
        )
        spread.set(
            xscale="log",
            xlabel="temperature, for KCL 1 / (2 t)",
            ylabel="uniformity",
            title="Uniformity (lower: more uniform)",
        )
        _values(values, found)
        for axes in (batch, temperature):
            legend(axes)
        rows = [one for one in found if one.cell.data == "fashion-mnist"]
        rows_of_dots(fashions, rows, "Fashion-MNIST: batch size 32, then 128")
        figure.savefig(path, dpi=100)


def _family(one: Summary) -> str:
    return one.cell.title.split(",")[0]


def _usual(one: Summary, name: str) -> bool:
    """At tau = 0.2, or t = 2 and gamma = 3."""
    usual = {"temperature": 0.2}.items() <= one.cell.settings.items() or one.cell.settings == {"t": 2.0, "gamma": 3.0}
    return usual and _family(one) == name


def _width(one: Summary) -> float:
    return float(one.cell.settings.get("temperature") or 0.5 / one.cell.settings["t"])


def _swept(one: Summary, name: str) -> bool:
    return _family(one) == name and one.cell.schedule == USUAL and one.cell.settings.get("gamma", 3.0) == 3.0


def _course(axes: Axes, x: Sequence[float], line: Sequence[Summary], name: str, colour: str) -> None:
    mean, deviation = [one.mean(name) for one in line], [one.spread(name) for one in line]
    axes.errorbar(x, mean, deviation, color=colour, marker="o", markersize=4, capsize=2)


def _values(axes: Axes, found: Sequence[Summary]) -> None:
    """The mean value of each loss on batches of the same rows, less its value on the largest."""
    one = next((one for one in found if one.cell.part == "batch size 64" and one.values("values KCL")), None)
    for name in VALUES if one else ():
        courses = torch.tensor(one.values(f"values {name}"), dtype=torch.float64) if one else torch.empty(0)
        axes.plot(DRAWN, (courses.mean(0) - courses.mean(0)[-1]).tolist(), marker="o", color=COLOURS[name], label=name)
    axes.set(
        xscale="log",
        xlabel="rows of a batch",
        ylabel="mean loss, less that of 400 rows",
        title="The same rows, cut into batches",
    )
    legend(axes)


def remarks(found: Sequence[Summary]) -> str:
    """Markdown: the mean value of each loss on batches of the same rows."""
    one = next((one for one in found if one.cell.part == "batch size 64" and one.values("values KCL")), None)
    if one is None:
        return ""
    lines = [
        "| mean loss on batches of the same rows | " + " | ".join(map(str, DRAWN)) + " |",
        "|---|" + "---:|" * len(DRAWN),
    ]
    for name in VALUES:
        courses = torch.tensor(one.values(f"values {name}"), dtype=torch.float64).mean(0)
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in courses.tolist()) + " |")
    return "\n".join(lines)


PAPER = Paper("dhel_kcl", "DHEL and KCL", tuple(all_cells()), measure, draw, remarks)

if __name__ == "__main__":
    sys.exit(main([PAPER]))
