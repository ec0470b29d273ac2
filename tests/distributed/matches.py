"""Ranks of which some have more rows of x, some of y, and some of both than match, against one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from fastcl import Ranks, functional

from .shards import distance, random

D = 6
ROWS, COLUMNS = [5, 3, 4, 2], [7, 2, 4, 1]
PAIRS: dict[str, list[int] | None] = {"shorter side": None, "fewer": [4, 1, 0, 1]}


def whole(shards: list[Tensor], pairs: list[int]) -> Tensor:
    """The rows of all ranks that match, then those that do not."""
    both = list(zip(shards, pairs, strict=True))
    return torch.cat([*(t[:k] for t, k in both), *(t[k:] for t, k in both)])


def clip(pairs: str, strategy: str, reduction: str, rank: int, world: int) -> float:
    """Value and gradients of own rows, over the tolerance."""
    rows, columns = ROWS[:world], COLUMNS[:world]
    given = PAIRS[pairs]
    k = list(map(min, rows, columns)) if given is None else given[:world]
    sides = [[t.requires_grad_() for t in random(sum(n), D, seed=i).split(n)] for i, n in enumerate((rows, columns))]
    want = functional.clip(
        *(whole(side, k) for side in sides), logit_scale=10.0, pairs=sum(k), reduction=reduction
    )  # fmt: skip
    truth = torch.autograd.grad(want.sum(), [side[rank] for side in sides])
    own = [side[rank].detach().requires_grad_() for side in sides]
    got = functional.clip(
        *own, logit_scale=10.0, pairs=None if given is None else k[rank], reduction=reduction,
        group=Ranks(dist.group.WORLD, "exact", strategy),
    )  # fmt: skip
    found = torch.autograd.grad(got.sum(), own)
    mine = want.split(k)[rank] if reduction == "none" else want
    return max(distance(a, b) for a, b in zip((got, *found), (mine, *truth), strict=True))


CHECKS: dict[str, Callable[[int, int], float]] = {
    f"clip, pairs of the {pairs}, {strategy}, {reduction}": partial(clip, pairs, strategy, reduction)
    for pairs in PAIRS
    for strategy in ("gather", "ring")
    for reduction in ("mean", "none")
}
