"""A total time, divided among cases by weight: what one case leaves goes to those after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


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


def affordable(estimates: Mapping[str, float], seconds: float, first: str) -> tuple[list[str], int]:
    """The methods of which a warm-up and one round fit, slowest left out first but never `first`, and how many rounds fit."""
    kept = list(estimates)
    while len(kept) > 1 and 2 * sum(estimates[name] for name in kept) > seconds:
        kept.remove(max((name for name in kept if name != first), key=lambda name: estimates[name]))
    total = sum(estimates[name] for name in kept)
    return kept, max(1, int(seconds / total) - 1 if total else 1)
