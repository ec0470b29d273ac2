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

from fastcl import functional
from tests.objectives.cases import CASES, Case

from .shards import LAYOUTS, cut, distance

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
    exact = _whole(case, index, (n, d), torch.float64, reduction)
    theirs = exact if dtype == torch.float64 else _whole(case, index, (n, d), dtype, reduction)
    leaves = case.rows_of(n, d, dtype)
    arguments = case.arguments(index, n, d, leaves[0]) | {"reduction": reduction}
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
    if "pairs" in mine:  # what the rows beyond are cut to, the last rank gets
        mine["pairs"] = sizes[rank]
    loss = getattr(functional, case.name)(
        *own, **(mine | scalars), group=dist.group.WORLD, strategy=how["strategy"], gradient=gradient
    )
    _first(loss).sum().backward()
    held = float(world) if gradient == "ddp" and reduction != "none" else 1.0
    errors = []
    if reduction == "none":
        errors.append(_rows_error(_first(loss), theirs[0], exact[0], sizes, rank, _rows_per_row(theirs[0], n, views)))
    else:
        errors.append(
            distance(_first(loss), theirs[0], exact[0], max(1.0, case.terms(arguments), float(exact[0].abs())))
        )
    for i, leaf in enumerate(own):
        if i in case.detached or theirs[1][i] is None:
            assert leaf.grad is None or not leaf.grad.any(), "a detached input got a gradient"
            continue
        ours = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / held
        wanted, truth = (cut(g[1][i], sizes, rank) for g in (theirs, exact))
        errors.append(distance(ours, wanted, truth, _largest(exact[1][i])))
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
    case: Case, index: int, size: tuple[int, int], dtype: torch.dtype, reduction: str
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    leaves = case.rows_of(*size, dtype)
    arguments = case.arguments(index, *size, leaves[0])
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


def _first(loss: Any) -> Tensor:
    return loss[0] if isinstance(loss, tuple) else loss


def _largest(t: Tensor) -> float:
    return max(float(t.abs().max()), 1e-3)


def _rows_per_row(rows: Tensor, n: int, views: int) -> int:
    return rows.shape[0] // (n * views)


def _rows_error(ours: Tensor, theirs: Tensor, exact: Tensor, sizes: list[int], rank: int, stacked: int) -> float:
    n = sum(sizes)
    parts = [
        (cut(theirs[k * n : (k + 1) * n], sizes, rank), cut(exact[k * n : (k + 1) * n], sizes, rank))
        for k in range(stacked)
    ]
    theirs, exact = (torch.cat(p) for p in zip(*parts, strict=True))
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
