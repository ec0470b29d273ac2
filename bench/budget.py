"""A total time, divided among cases by weight: what one case leaves goes to those after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping


class Budget:
    """Seconds for everything; each case is told its allowance when it begins."""

    def __init__(
        self, seconds: float, weights: Mapping[str, float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds, self.clock = seconds, clock
        self.start = clock()
        self.waiting = dict(weights)

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.start)

    def begin(self, name: str) -> float:
        """Seconds that this case may take: its part of what is left."""
        part = self.waiting[name] / sum(self.waiting.values())
        del self.waiting[name]
        return self.left * part


def affordable(
    estimates: Mapping[str, float], seconds: float, first: str, warm: Container[str] = ()
) -> tuple[list[str], int]:
    """The methods of which a warm-up and one round fit, and how many rounds do; the slowest goes first, but never `first`.

    Those that are `warm` need no warm-up.
    """
    kept = list(estimates)

    def costs() -> tuple[float, float]:
        return sum(estimates[name] for name in kept), sum(estimates[name] for name in kept if name not in warm)

    while len(kept) > 1 and sum(costs()) > seconds:
        kept.remove(max((name for name in kept if name != first), key=lambda name: estimates[name]))
    each, once = costs()
    return kept, max(1, int((seconds - once) / each) if each else 1)
