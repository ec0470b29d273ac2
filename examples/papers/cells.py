"""One cell of an experiment: a loss with its settings, trained by the trainer of the examples, judged, and its record."""

from __future__ import annotations

import importlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import losses

from ..images import Images, load
from ..objectives import Entry, TargetedMINC
from ..training import Schedule, assess, train

Record = dict[str, Any]
COUNTS = {"digits": 1397, "fashion-mnist": 60000}  # images to train on
SETTLED = 0.4  # the last share of the steps, over which the swing is taken


def schedule(steps: int = 200, batch_size: int = 64, data: str = "digits", **changes: Any) -> Schedule:
    """So many steps on the digits or Fashion-MNIST; the optimiser's momentum is 0.9 and stays so."""
    return Schedule(steps / (COUNTS[data] // batch_size), batch_size, **({"momentum": 0.9} | changes))


USUAL = schedule()


@dataclass(frozen=True)
class Cell:
    """What is trained.

    part: the experiment of the paper that it belongs to.
    loss: a class of fastcl.losses, and its settings.
    schedule: its seed is replaced by the run's.
    rate: of a target network, the weight of its old weights; None for none.
    data: "digits" or "fashion-mnist".
    """

    part: str
    title: str
    loss: str
    settings: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = USUAL
    rate: float | None = None
    data: str = "digits"

    def build(self, dim: int, backend: str | None) -> nn.Module:
        if self.loss != "MINCLoss":
            made: nn.Module = getattr(losses, self.loss)(backend=backend, **self.settings)
            return made
        if self.rate is None:
            return losses.MINCLoss(dim, backend=backend, **self.settings)
        return TargetedMINC(dim, backend, **({"mu": None} | self.settings))


@dataclass(frozen=True)
class Paper:
    """One paper's experiments.

    measure: what else is written into a cell's record: of the trained encoder, the images, the cell and the seed.
    draw: writes the figure, from the summaries of the cells' records, to a path.
    remarks: of these summaries, more tables in Markdown.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    measure: Callable[[nn.Module, Images, Cell, int], Record]
    draw: Callable[..., None]
    remarks: Callable[..., str] = lambda found: ""


class Watched(nn.Module):
    """An objective, and the mean squared norm of the rows that it was given at each step."""

    def __init__(self, objective: nn.Module, sizes: list[float]) -> None:
        super().__init__()
        self.objective, self.sizes = objective, sizes

    def forward(self, u: Tensor, v: Tensor) -> Any:
        self.sizes.append(u.detach().square().sum(1).mean().item())
        return self.objective(u, v)


@cache
def images_of(data: str) -> Images:
    return load(data)[0]


def run(paper: str, cell: Cell, seed: int, data: str) -> Record:
    """Train and judge one cell in this process.

    Args:
        paper: the module of this folder whose `measure` is taken.
        cell: what to train.
        seed: of weights, views and draws.
        data: as examples.images.load takes it.

    Returns:
        The cell, the seed, the quality (None where training left the finite numbers), the first and the last loss, the mean
        squared norm of the rows and its relative swing late in training, process seconds, and what the paper measures beside.
    """
    start, sizes = time.process_time(), list[float]()
    images = images_of(data)

    def build(dim: int, backend: str | None) -> nn.Module:
        return Watched(cell.build(dim, backend), sizes)

    targeted = cell.rate is not None
    entry = Entry(cell.title, build, sized=True, momentum=targeted, both=targeted, rate=cell.rate or 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MINCLoss: ema")  # to see what it warns of is the experiment
        model, course, _ = train(images, entry, replace(cell.schedule, seed=seed), None, lambda _: None)
    late = torch.tensor(sizes[-max(2, round(SETTLED * len(sizes))) :], dtype=torch.float64)
    record: Record = {"cell": asdict(cell), "seed": seed, "quality": None, "losses": [course[0], course[-1]]}
    if all(map(math.isfinite, course)) and all(bool(p.isfinite().all()) for p in model.parameters()):
        record["quality"] = asdict(assess(model, images, seed))
        record |= {"size": float(late.mean()), "swing": float(late.std() / late.mean())}
        record |= importlib.import_module(f".{paper}", __package__).PAPER.measure(model, images, cell, seed)
    record["seconds"] = time.process_time() - start
    return record
