"""What a loss alone costs, forward and backward: fastcl beside what one would write in PyTorch, eager and compiled.

Times are taken in turn, one of each, and their medians compared, so that a machine which others use disturbs all alike. Memory
is the peak of a process of its own: `python -m examples.loss_cost` measures one loss in one way and prints the bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl import functional

WAYS = ("fastcl", "eager", "compile")
TEMPERATURE, BETA, ALPHA = 0.07, 1.0, 40.0
Loss = Callable[[Tensor, Tensor], Tensor]


def eager_info_nce(x: Tensor, y: Tensor) -> Tensor:
    x, y = F.normalize(x), F.normalize(y)
    return F.cross_entropy(x @ y.T / TEMPERATURE, torch.arange(x.shape[0]))


def eager_clip(x: Tensor, y: Tensor) -> Tensor:
    x, y = F.normalize(x), F.normalize(y)
    logits, own = x @ y.T / TEMPERATURE, torch.arange(x.shape[0])
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def eager_f_micl(x: Tensor, y: Tensor) -> Tensor:
    """KL. By a matrix product and not by torch.pdist, which the paper suggests and which takes longer."""
    x, y = F.normalize(x), F.normalize(y)
    n = x.shape[0]
    u = torch.exp(2 * BETA * (x @ x.T - 1))
    positive = 1 - BETA * (x - y).square().sum(1).mean()
    return ALPHA * (u.sum() - u.diagonal().sum()) / (n * (n - 1)) - positive


@dataclass(frozen=True)
class Measured:
    """One loss, by fastcl and by PyTorch."""

    title: str
    fastcl: Callable[..., Tensor]
    eager: Loss

    def by(self, way: str, backend: str | None) -> Loss:
        if way == "fastcl":
            return lambda x, y: self.fastcl(x, y, backend=backend)
        return self.eager if way == "eager" else torch.compile(self.eager, dynamic=False)


def kl(x: Tensor, y: Tensor, backend: str | None) -> Tensor:
    loss = functional.f_micl(x, y, divergence="kl", beta=BETA, alpha=ALPHA, backend=backend)
    assert isinstance(loss, Tensor)
    return loss


MEASURED = {
    "info_nce": Measured(
        "InfoNCE",
        lambda x, y, backend: functional.info_nce(x, y, temperature=TEMPERATURE, backend=backend),
        eager_info_nce,
    ),
    "clip": Measured(
        "CLIP", lambda x, y, backend: functional.clip(x, y, logit_scale=1 / TEMPERATURE, backend=backend), eager_clip
    ),
    "f_micl": Measured("f-MICL KL", kl, eager_f_micl),
}


@dataclass(frozen=True)
class Cost:
    """Of one loss in one way: median seconds and peak bytes; None where it could not be measured, with the reason."""

    loss: str
    way: str
    seconds: float | None
    peak: int | None
    why: str = ""


def once(loss: Loss, rows: tuple[Tensor, Tensor]) -> float:
    """Value and gradients of both views; the seconds that they took."""
    x, y = (t.detach().requires_grad_() for t in rows)
    start = time.perf_counter()
    loss(x, y).backward()
    return time.perf_counter() - start


def rows_of(n: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    return x, x + torch.randn(n, d, generator=generator)


def seconds(name: str, ways: tuple[str, ...], n: int, d: int, backend: str | None, rounds: int) -> dict[str, float]:
    """The median time of each way, taken in turn after one unmeasured run of each."""
    rows = rows_of(n, d)
    losses = {way: MEASURED[name].by(way, backend) for way in ways}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way in ways:
            spent = once(losses[way], rows)
            if turn:
                taken[way].append(spent)
    return {way: statistics.median(values) for way, values in taken.items()}


def peak(name: str, way: str, n: int, d: int, backend: str | None) -> tuple[int | None, str]:
    """The peak memory that a fresh process needs for it beyond its inputs, or None and why it failed."""
    command = [sys.executable, "-m", "examples.loss_cost", name, way, str(n), str(d), *([backend] if backend else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return int(json.loads(done.stdout.splitlines()[-1])), ""


def measure(
    names: tuple[str, ...],
    ways: tuple[str, ...],
    n: int,
    d: int,
    backend: str | None,
    rounds: int,
    report: Callable[[str], None],
) -> list[Cost]:
    """Time and memory of each loss in each way; `report` is told what is next. A way that fails for memory is not timed.

    Memory is measured two processes at a time: unlike time, it does not ask who else runs, and most of it is waiting for imports
    and a compiler.
    """

    def memory(one: tuple[str, str]) -> tuple[int | None, str]:
        report(f"memory of {MEASURED[one[0]].title}, {one[1]}")
        return peak(*one, n, d, backend)

    every = [(name, way) for name in names for way in ways]
    with ThreadPoolExecutor(max_workers=2) as pool:
        peaks = dict(zip(every, pool.map(memory, every), strict=True))
    costs = []
    for name in names:
        measured = MEASURED[name]
        report(f"time of {measured.title}")
        able = tuple(way for way in ways if peaks[name, way][0] is not None)
        taken = seconds(name, able, n, d, backend, rounds)
        costs += [Cost(measured.title, way, taken.get(way), *peaks[name, way]) for way in ways]
    return costs


def grown(name: str, way: str, n: int, d: int, backend: str | None) -> int:
    """Bytes by which value and gradients of one loss raise this process's peak, beyond its inputs.

    A run on few rows comes first and loads what is loaded once. Compiled code is measured at its second run on these rows: what
    the compiler needs is no part of it.
    """
    loss = MEASURED[name].by(way, backend)
    rows = rows_of(n, d)
    once(loss, rows if way == "compile" else rows_of(256, d))
    before = forget_peak()
    once(loss, rows)
    return resident_peak() - before


def forget_peak() -> int:
    """Where the peak starts from, bytes: on Linux what is held now, elsewhere the most that was ever held."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # see proc(5)
    return resident_peak()


def resident_peak() -> int:
    """The most memory that this process has held, bytes."""
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.loss_cost", description=grown.__doc__)
    parser.add_argument("loss", choices=MEASURED)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("n", type=int, help="rows of each view")
    parser.add_argument("d", type=int, help="width of a row")
    parser.add_argument("backend", nargs="?", help="of fastcl")
    arguments = parser.parse_args()
    print(json.dumps(grown(arguments.loss, arguments.way, arguments.n, arguments.d, arguments.backend)))


if __name__ == "__main__":
    main()
