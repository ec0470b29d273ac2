"""Growth laws from the measured curves, and the two figures that users ask for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy

FROM = 4096  # below it, fixed costs bend the curves
GIGABYTES = (8, 16, 24, 80)
STEP_SIZES = (4096, 8192, 16384)
BYTES = 4
CLOSE = 0.05  # relative, root mean square


class Fit(NamedTuple):
    """value = square n^2 + linear n + fixed, the first two at least 0; and the exponent of a power law through the points."""

    square: float
    linear: float
    fixed: float
    exponent: float
    largest: int

    def at(self, n: float) -> float:
        return self.square * n * n + self.linear * n + self.fixed

    def inverse(self, value: float) -> float:
        """The n at which it reaches the value."""
        grown = value - self.fixed
        if self.square == 0.0:
            return grown / self.linear
        return (math.sqrt(self.linear**2 + 4.0 * self.square * grown) - self.linear) / (2.0 * self.square)


def curve(points: list[dict[str, Any]], method: str, what: str, against: str = "n") -> list[tuple[float, float]]:
    """(n or d, value) of one method, ascending."""
    return sorted(
        (p[against], p[what]) for p in points if p["method"] == method and p["against"] == against and p[what] > 0
    )


def fit(pairs: list[tuple[float, float]], start: float = FROM, fixed: bool = False) -> Fit | None:
    """Least squares in relative error over the points from `start` on (all, where fewer than three are).

    fixed: whether a constant, of either sign, takes part. Peaks have one: what an allocator holds beforehand or rounds up to;
    without it the growth of a few megabytes would be carried on to millions of rows. For the same reason one growing term is
    taken where it alone is CLOSE to every point, rather than two that follow the noise.
    """
    kept = [pair for pair in pairs if pair[0] >= start]
    kept = kept if len(kept) >= 3 else pairs
    if len(kept) < 2:
        return None
    n, value = (numpy.array(column, dtype=float) for column in zip(*kept, strict=True))
    terms = {"square": n * n / value, "linear": n / value, "fixed": 1.0 / value}
    free = ("fixed",) if fixed and len(kept) >= 4 else ()
    found = []
    for growing in (("linear",), ("square",), ("square", "linear")):
        chosen = [*growing, *free]
        solved, *_ = numpy.linalg.lstsq(
            matrix := numpy.stack([terms[name] for name in chosen], 1), numpy.ones_like(n), rcond=None
        )
        if (solved[: len(growing)] >= 0.0).all():
            missed = math.sqrt(float(numpy.square(matrix @ solved - 1.0).mean()))
            found.append((max(missed, CLOSE), dict(zip(chosen, map(float, solved), strict=True))))
    law = dict.fromkeys(terms, 0.0) | min(found, key=lambda f: f[0])[1]  # the first of those that are close
    exponent = float(numpy.polyfit(numpy.log(n), numpy.log(value), 1)[0])
    return Fit(law["square"], law["linear"], law["fixed"], exponent, int(n.max()))


class Largest(NamedTuple):
    method: str
    gigabytes: int
    n: int
    beyond: bool


def largest_batches(scaling: dict[str, Any]) -> list[Largest]:
    """The largest n whose loss fits: both inputs and what forward and backward add, by the fit of the peaks."""
    found = []
    points = scaling["points"]
    for method in dict.fromkeys(p["method"] for p in points if p["against"] == "n"):
        memory = fit(curve(points, method, "peak_bytes"), 0, fixed=True)
        if memory is None:
            continue
        d = next(p["d"] for p in points if p["method"] == method and p["against"] == "n")
        whole = memory._replace(linear=memory.linear + 2 * BYTES * d)
        for gigabytes in GIGABYTES:
            n = int(whole.inverse(gigabytes * 1e9))
            found.append(Largest(method, gigabytes, n, n > memory.largest))
    return found


class Saved(NamedTuple):
    n: int
    method: str
    loss: float
    ours: float
    rest: float

    @property
    def seconds(self) -> float:
        return self.loss - self.ours

    @property
    def share(self) -> float:
        """Of a step with that loss."""
        return self.seconds / (self.rest + self.loss)


def saved(scaling: dict[str, Any], towers: str) -> list[Saved]:
    """What fastcl takes off a step of two towers, at the sizes that both curves have."""
    points = scaling["points"]
    seconds = {(p["method"], p["n"]): p["seconds"] for p in points if p["against"] == "n"}
    methods = [
        m for m in dict.fromkeys(p["method"] for p in points if p["against"] == "n") if m not in ("fastcl", towers)
    ]
    return [
        Saved(n, method, seconds[method, n], seconds["fastcl", n], seconds[towers, n])
        for n in STEP_SIZES
        for method in methods
        if {(method, n), ("fastcl", n), (towers, n)} <= seconds.keys()
    ]
