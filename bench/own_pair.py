"""A copy of softplus under a name of one's own beside the one that is built in: forward and backward, in turns, processor time.

    python -m bench.own_pair

The goal is a ratio below 1.05. Medians of the rounds' own ratios, so that a neighbour on the machine slows both.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

import fastcl
from fastcl.equation.intrinsics import softplus
from fastcl.pairs import PairFunction

GOAL, ROUNDS, SECONDS = 1.05, 25, 0.1


class Copied(PairFunction, name="softplus_of_one's_own"):
    """f(z) = log(1 + e^z), whose slope is derived."""

    @staticmethod
    def value(z: Any) -> Any:
        return softplus(z)


def spent(x: torch.Tensor, y: torch.Tensor, pair: str | PairFunction, calls: int) -> float:
    began = time.process_time()
    for _ in range(calls):
        total = fastcl.pair_total(x, y, outer="sum", pair=pair, reduce="sum", scale=0.1, backend="cpu")
        torch.autograd.grad(total, (x, y))
    return time.process_time() - began


def main() -> None:
    own = Copied()
    for n, d in tqdm([(64, 64), (256, 128), (1024, 128), (4096, 128)], unit="size", leave=False):
        x, y = (torch.randn(n, d, requires_grad=True) for _ in range(2))
        calls = max(1, round(SECONDS / min(spent(x, y, pair, 1) for pair in ("softplus", own, "softplus"))))
        ratios = []
        for _ in range(ROUNDS):
            built_in, mine = (spent(x, y, pair, calls) for pair in ("softplus", own))
            ratios.append(mine / built_in)
        ratio = statistics.median(ratios)
        tqdm.write(f"n = {n:5}, d = {d:4}: {ratio:.3f} times the built-in, {'met' if ratio < GOAL else 'NOT met'}")


if __name__ == "__main__":
    main()
