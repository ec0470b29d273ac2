"""Functions of one's own, trained on images beside KL and JS: two pair functions, and a divergence that is not one of the nine.

    python -m examples.own_functions --help

Each stands below in one `def`. Training starts at once, in PyTorch; the CPU's kernels take over when the function is compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastcl
from fastcl.backends import choice
from fastcl.equation.intrinsics import log, pow, sigmoid
from fastcl.pairs import PairFunction

from .figure import KNN, LINEAR, STYLE
from .images import Images, load
from .objectives import Entry, f_micl
from .training import Quality, Schedule, assess, train, untrained

EPOCHS, BATCH = 30.0, 256


@dataclass(frozen=True)
class StudentT(PairFunction, name="student_t"):
    """(1 + z / nu)^(-(nu + 1) / 2) of a squared distance z: the kernel of t-SNE, with tails that the Gaussian has not."""

    nu: float

    @staticmethod
    def value(z: Any, nu: Any) -> Any:
        return pow(1.0 + z / nu, -0.5 * (nu + 1.0))


@dataclass(frozen=True)
class Logistic(PairFunction, name="logistic"):
    """1 / (1 + e^((z - at) / width)): pairs near `at` push most, and those far beyond hardly."""

    at: float
    width: float

    @staticmethod
    def value(z: Any, at: Any, width: Any) -> Any:
        return sigmoid((at - z) / width)


def lin(u: Any) -> Any:
    """Lin's K divergence, of p from the mean of p and q: one half of JS."""
    return u * log(2.0 * u / (1.0 + u)) + 0.5 * (1.0 - u)


class AlignAndPush(nn.Module):
    """mean |x_i - y_i|^2 + weight log mean_{i != j} f(|x_i - x_j|^2), of both views: alignment and uniformity, with any f."""

    def __init__(self, pair: PairFunction, weight: float, backend: str | None = None) -> None:
        super().__init__()
        self.pair, self.weight, self.backend = pair, weight, backend

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        x, y = F.normalize(u), F.normalize(v)
        means = [self.push(rows) / (len(rows) * (len(rows) - 1)) for rows in (x, y)]
        return (x - y).square().sum(1).mean() + self.weight * 0.5 * sum(mean.log() for mean in means)

    def push(self, rows: Tensor) -> Tensor:
        settings: Any = {"operand": "sqdist", "reduce": "sum", "mask": "off_diagonal", "backend": self.backend}
        return fastcl.pair_total(rows, outer="sum", pair=self.pair, **settings)


STUDENT, LOGISTIC, LIN = StudentT(1.0), Logistic(0.5, 0.5), fastcl.Divergence("lin", lin)
OBJECTIVES = {
    "KL": Entry("f-MICL KL", f_micl("kl")),
    "JS": Entry("f-MICL JS", f_micl("js")),
    "Lin": Entry("f-MICL Lin, own", partial(fastcl.losses.FMICLLoss, divergence=LIN, alpha=5.0)),
    "Student": Entry("Student-t, own", partial(AlignAndPush, STUDENT, 2.0)),
    "logistic": Entry("logistic, own", partial(AlignAndPush, LOGISTIC, 2.0)),
}
# What each pushes apart by, as a function of the squared distance; e^-z is the Gaussian similarity.
POTENTIALS: dict[str, Callable[[Tensor], Tensor]] = {
    "KL": lambda z: torch.exp(-z),
    "JS": lambda z: torch.log1p(torch.exp(-z)),
    "Lin": lambda z: LIN.pair.f(-z),
    "Student": STUDENT.f,
    "logistic": LOGISTIC.f,
}


def run(images: Images, schedule: Schedule, seeds: int, backend: str | None) -> dict[str, list[Quality]]:
    """Each objective from each seed, with one progress bar for all."""
    found: dict[str, list[Quality]] = {name: [] for name in OBJECTIVES}
    total = schedule.steps(images) * seeds * len(OBJECTIVES)
    with tqdm(total=total, unit="step", mininterval=0.1 if sys.stderr.isatty() else 10.0, dynamic_ncols=True) as bar:
        for seed in range(seeds):
            for name, entry in OBJECTIVES.items():
                bar.set_description(f"{entry.title}, seed {seed}", refresh=False)
                settings = Schedule(schedule.epochs, schedule.batch_size, schedule.dim, seed=seed)
                model, _, _ = train(images, entry, settings, backend, lambda _: bar.update() and None)
                found[name].append(assess(model, images, seed))
    return found


def draw(path: Path, before: Quality, found: dict[str, list[Quality]], about: str) -> None:
    """Left how hard each pushes a pair at a distance, right what its embeddings are worth."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4), layout="constrained")
        figure.suptitle(about, fontsize=10)
        left, right = figure.subplots(1, 2)
        z = torch.linspace(0.0, 4.0, 200, dtype=torch.float64)
        for name, potential in POTENTIALS.items():
            force = -torch.gradient(potential(z), spacing=(z,))[0]
            left.plot(z, force / force.max(), label=OBJECTIVES[name].title, ls="-" if name in ("KL", "JS") else "--")
        left.set(xlabel="squared distance of a pair", title="How hard it is pushed (largest: 1)")
        left.legend(frameon=False)
        for colour, what, label in ((KNN, "knn", "nearest neighbours"), (LINEAR, "linear", "linear probe")):
            for k, name in enumerate(found):
                values = [100 * getattr(q, what) for q in found[name]]
                right.plot(values, [k] * len(values), "o", color=colour, label=label if k == 0 else None)
            right.axvline(100 * getattr(before, what), color=colour, ls=":", lw=1)
        right.set_yticks(range(len(found)), [OBJECTIVES[name].title for name in found])
        right.set(xlabel="accuracy, % (dotted: untrained)", title="What the embeddings are worth, one point a seed")
        right.invert_yaxis()
        right.legend(frameon=False)
        figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.own_functions", description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="passes over the digits (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each objective (default: %(default)s)")
    parser.add_argument("--backend", choices=choice.NAMES, help="of fastcl (default: the best for this machine)")
    parser.add_argument("--output", type=Path, default=Path("out/own_functions"), help="folder (default: %(default)s)")
    chosen = parser.parse_args(argv)
    images, source = load("digits")
    schedule = Schedule(chosen.epochs, BATCH)
    before = assess(untrained(images, schedule.dim, 0), images, 0)
    found = run(images, schedule, chosen.seeds, chosen.backend)
    about = f"{source}: {schedule.steps(images)} steps of {BATCH} images, 10 labels a class, distorted held-out images"
    print(f"{about}\n{'':18}{'kNN':>15}{'linear':>15}{'uniformity':>12}  served by")
    for name, qualities in found.items():
        columns = [[100 * getattr(q, what) for q in qualities] for what in ("knn", "linear")]
        shown = "".join(f"{np.mean(c):9.1f} ± {np.std(c):3.1f}" for c in columns)
        served = choice.choose(chosen.backend, torch.device("cpu"), torch.float32, pair_of(name))[0]
        print(f"{OBJECTIVES[name].title:18}{shown}{np.mean([q.uniformity for q in qualities]):12.2f}  {served}")
    chosen.output.mkdir(parents=True, exist_ok=True)
    draw(chosen.output / "own_functions.png", before, found, about)
    records = {name: [asdict(q) for q in qualities] for name, qualities in found.items()}
    (chosen.output / "own_functions.json").write_text(json.dumps({"about": about, "trained": records}, indent=1) + "\n")
    return 0


def pair_of(name: str) -> PairFunction:
    """What its negatives are summed by."""
    own: dict[str, PairFunction] = {"Lin": LIN.pair, "Student": STUDENT, "logistic": LOGISTIC}
    return own.get(name, fastcl.pairs.Exp())


if __name__ == "__main__":
    sys.exit(main())
