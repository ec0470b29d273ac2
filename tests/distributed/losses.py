"""Every objective over ranks against one process with the whole batch: values, gradients, and every reduction.

The objectives and their inputs are those of tests/objectives/cases.py: a new one is found unasked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastcl import Ranks, functional
from tests.objectives.cases import CASES, Case

from .shards import LAYOUTS, TOLERANCE, cut, distance

D = 5
# In float32 a Riesz kernel, a power of d^2 = |x|^2 + |y|^2 - 2 <x, y>, is known to eps over its least d^2, which is 0.3 for rows 5
# wide: one process is up to 3.6e-6 from the truth there, shards up to 3.8e-6, and up to 2.9e-6 from each other (6 seeds, 3 ranks;
# 1.8e-6 and 2.5e-6 where a visit's rows and columns share a centre, so that it is not the centre of a shard that costs this).
# Rows 24 wide are further apart: 0.7e-6, 0.8e-6 and 0.6e-6.
RIESZ_WIDTH = 24
REPLICATED = ("statistic",)  # what every rank holds whole


def check(case: Case, index: int, dtype: torch.dtype, layout: str, how: dict[str, str], rank: int, world: int) -> float:
    """The error of this rank's value and gradients, over the tolerance."""
    sizes = LAYOUTS[layout](world)
    n = sum(sizes)
    views = 2 if case.inputs.__name__ == "both_views_at_once" else 1
    reduction = how.get("reduction", "mean")
    d = RIESZ_WIDTH if dtype == torch.float32 and "riesz" in _kernel(case, index) else D
    leaves = case.rows_of(n, d, dtype)
    arguments = case.arguments(index, n, d, leaves[0]) | {"reduction": reduction}
    local, given = None, arguments.get("positives")
    if given is not None:  # a row's positives are among the rows of its rank
        local = _within_ranks(given, sizes, [len(leaf) for leaf in leaves], case.name == "nt_xent")
    exact = _whole(case, index, (n, d), torch.float64, reduction, local)
    theirs = exact if dtype == torch.float64 else _whole(case, index, (n, d), dtype, reduction, local)
    scalars = _scalars(case, arguments, dtype)
    if views == 2:  # the whole batch of such a case is stacked; any cut of it will do
        sizes = [2 * size for size in sizes]
    queue = case.name == "moco"
    own = [leaf if queue and i == 2 else cut(leaf, sizes, rank) for i, leaf in enumerate(leaves)]
    if queue and how["strategy"] == "ring":
        own[2] = cut(leaves[2], [2] * world, rank)
        arguments["sharded_queue"] = True
    mine = {
        name: cut(value, sizes, rank) if isinstance(value, Tensor) and value.dim() and name not in REPLICATED else value
        for name, value in arguments.items()
    }
    gradient = how.get("gradient", "ddp")
    if local is not None:
        mine["positives"] = _of_rank(local, sizes, [len(leaf) for leaf in leaves], rank, case.name == "nt_xent")
    if "pairs" in mine:  # what the rows beyond are cut to, the last rank gets
        mine["pairs"] = sizes[rank]
    loss = getattr(functional, case.name)(
        *own, **(mine | scalars), group=Ranks(dist.group.WORLD, gradient, how["strategy"])
    )
    _first(loss).sum().backward()
    held = float(world) if gradient == "ddp" and reduction != "none" else 1.0
    errors = []
    if reduction == "none":
        blocks = [n * views] * (theirs[0].shape[0] // (n * views))
        if local is not None:
            blocks = [len(leaves[0])] * case.rows if case.rows == 1 or case.name == "nt_xent" else [*map(len, leaves)]
        errors.append(_rows_error(_first(loss), theirs[0], exact[0], sizes, rank, blocks))
    else:
        errors.append(
            distance(_first(loss), theirs[0], exact[0], max(1.0, case.terms(arguments), float(exact[0].abs())))
        )
    stored = 1.0
    if dtype == torch.float32 and "temperature" in scalars:
        # Between its parts a row's r is a float32, 1 / temperature in size: its rounding is a part of every weight. Hard negatives
        # have two, of (1 + beta) z and of beta z, and a gradient that is the difference of parts 1 + beta and beta times its size.
        beta = float(scalars["beta"].detach()) if "beta" in scalars else 0.0
        size = (1.0 + beta) * (1.0 + 2.0 * beta) / float(scalars["temperature"].detach())
        stored += 2.0**-24 / TOLERANCE[dtype] * size
    for i, leaf in enumerate(own):
        if i in case.detached or theirs[1][i] is None:
            assert leaf.grad is None or not leaf.grad.any(), "a detached input got a gradient"
            continue
        ours = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / held
        wanted, truth = (cut(g[1][i], sizes, rank) for g in (theirs, exact))
        errors.append(distance(ours, wanted, truth, _largest(exact[1][i]) * stored))
    for name, t in scalars.items():
        shared = t.grad / held
        dist.all_reduce(shared)
        scale = max(1.0, case.terms(arguments), float(exact[2][name].abs()))
        if name == "temperature":  # what is summed is z / temperature: at 0.1 terms of 100 for a gradient of 4
            scale /= min(1.0, float(t.detach()))
        errors.append(distance(shared, theirs[2][name], exact[2][name], scale))
    return max(errors)


def _kernel(case: Case, index: int) -> str:
    return str(case.grid[0 if index == len(case.grid) else index].get("kernel", ""))


def _whole(
    case: Case,
    index: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    reduction: str,
    positives: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    leaves = case.rows_of(*size, dtype)
    arguments = case.arguments(index, *size, leaves[0])
    if positives is not None:
        arguments["positives"] = positives
    scalars = _scalars(case, arguments, dtype)
    loss = _first(getattr(functional, case.name)(*leaves, **(arguments | scalars), reduction=reduction))
    loss.sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves], {name: t.grad for name, t in scalars.items()}


def _scalars(case: Case, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """One-element arguments as leaves, at the value of the arguments where they have one."""
    return {
        name: torch.tensor(float(arguments.get(name, value)), dtype=dtype, requires_grad=True)
        for name, value in case.scalars.items()
        if not (name in ("beta", "mu") and arguments.get("similarity") == "cosine")
    }


def _places(index: Tensor, sizes: list[int], rows: int, stacked: bool) -> tuple[Tensor, Tensor]:
    """The rank that has each row of the whole batch, as `cut` cuts it, and the row's index there; stacked: of two views."""
    ends = torch.tensor([*torch.tensor(sizes).cumsum(0).tolist()[:-1], rows])
    view, row = (index // rows, index % rows) if stacked else (torch.zeros_like(index), index)
    owner = torch.searchsorted(ends, row, right=True)
    own = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))
    return owner, view * own[owner] + row - (ends - own)[owner]


def _within_ranks(given: tuple[Tensor, ...], sizes: list[int], rows: list[int], stacked: bool) -> tuple[Tensor, ...]:
    owners = [_places(index, sizes, of, stacked)[0] for index, of in zip(given[:2], rows, strict=True)]
    return tuple(part[owners[0] == owners[1]] for part in given)


def _of_rank(given: tuple[Tensor, ...], sizes: list[int], rows: list[int], rank: int, stacked: bool) -> tuple[Any, ...]:
    (owner, i), (_, j) = (_places(index, sizes, of, stacked) for index, of in zip(given[:2], rows, strict=True))
    return tuple(part[owner == rank] for part in (i, j, *given[2:]))


def _first(loss: Any) -> Tensor:
    return loss[0] if isinstance(loss, tuple) else loss


def _largest(t: Tensor) -> float:
    return max(float(t.abs().max()), 1e-3)


def _rows_error(ours: Tensor, theirs: Tensor, exact: Tensor, sizes: list[int], rank: int, blocks: list[int]) -> float:
    """Of values that come in blocks, each of one side's rows."""
    own = [[cut(block, sizes, rank) for block in values.split(blocks)] for values in (theirs, exact)]
    theirs, exact = (torch.cat(parts) for parts in own)
    return distance(ours, theirs, exact, max(1.0, _largest(exact)) if len(exact) else 1.0)


def checks(world: int) -> dict[str, Callable[[int, int], float]]:
    """Every objective with every set of its arguments; strategies, layouts, reductions and dtypes take turns.

    The turns begin elsewhere for each world. The first set of arguments is tried in four turns, the others in one.
    """
    turns = cycle(
        (dtype, layout, {"strategy": strategy, "reduction": reduction, "gradient": gradient})
        for layout, dtype, reduction, gradient in (
            ("uneven", torch.float64, "mean", "ddp"),
            ("with an empty one", torch.float64, "mean", "exact"),
            ("uneven", torch.float32, "mean", "exact"),
            ("even", torch.float64, "sum", "ddp"),
            ("uneven", torch.float64, "none", "ddp"),
        )
        for strategy in ("gather", "ring")
    )
    for _ in range(3 * world):
        next(turns)
    found: dict[str, Callable[[int, int], float]] = {}
    for case in CASES:
        for index in case.sets() if world > 1 else range(1):
            for _ in range(4 if index == 0 and world > 1 else 1):
                dtype, layout, how = next(turns)
                if case.rows == 0 and how["reduction"] != "mean":
                    how = how | {"reduction": "mean"}
                name = ", ".join([case.id, str(index), layout, str(dtype).removeprefix("torch."), *how.values()])
                found[name] = partial(check, case, index, dtype, layout, how)
    return found
