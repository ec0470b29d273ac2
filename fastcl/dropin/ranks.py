"""Rows of other processes, with the gradients that each library expects to flow back to them.

Shards are of equal size: row i of rank k is row k n + i of the gathered rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..distributed.derivatives import first_derivatives
from ..distributed.shards import Summed
from ..distributed.wire import Wire
from ..precision import full_precision, stacked


def initialised() -> bool:
    """Whether torch.distributed runs."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The rank of this process, 0 where torch.distributed does not run."""
    return dist.get_rank() if initialised() else 0


def world_size() -> int:
    """The number of processes, 1 where torch.distributed does not run."""
    return dist.get_world_size() if initialised() else 1


def require(own: int, world: int) -> None:
    """The rank and the world that a caller names are those that run.

    Raises:
        ValueError: they are not.
    """
    if (rank(), world_size()) != (own, world):
        raise ValueError(
            f"world_size: expected torch.distributed's rank {rank()} of {world_size()}, got rank {own} of {world}; "
            "call torch.distributed.init_process_group first, or pass its rank and size"
        )


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, without gradient."""
    return stacked(*_all_gather(rows.detach()))


def gathered_with_own(rows: Tensor) -> Tensor:
    """The rows of all ranks; only this rank's own carry gradient, and it stays here."""
    shards = _all_gather(rows.detach())
    shards[rank()] = rows
    return stacked(*shards)


def gathered_own_first(rows: Tensor) -> Tensor:
    """This rank's rows, with gradient, then those of the other ranks in their order, without."""
    shards = _all_gather(rows.detach())
    del shards[rank()]
    return stacked(rows, *shards)


def gathered_with_gradient(rows: Tensor) -> Tensor:
    """The rows of all ranks; the gradients of all ranks flow back to where the rows came from, and add up there."""
    return stacked(*_Gather.apply(rows))


def _all_gather(rows: Tensor) -> list[Tensor]:
    wire = Wire(None)
    return list(wire.gathered((rows,), [rows.shape[0]] * wire.world)[0].chunk(wire.world))


class _Gather(torch.autograd.Function):
    """torch.distributed.nn.all_gather, which is deprecated; the sum by all_reduce, which every backend has."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(_all_gather(rows))

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        with full_precision(upstream[0].device):
            together = torch.stack(upstream)
        return Wire(None).summed(together)[rank()]


class _Shift(torch.autograd.Function):
    """Send rows `step` ranks on, and receive those from `step` ranks back; gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, step: int) -> Tensor:
        ctx.step = step
        return _shift(rows, step)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return _shift(upstream[0], -ctx.step), None


def _shift(rows: Tensor, step: int) -> Tensor:
    return Wire(None).shift((rows,), step, rows.shape[0])()[0]


def others(rows: Tensor, route: str) -> Iterator[Tensor]:
    """The rows of every other rank, one shard after the other, with gradients that flow back to their ranks.

    Args:
        rows: (n, d), this rank's rows.
        route: "shift" passes shards around the ring, "bidir" both ways round it; "gather" holds all of them at once.
    """
    world = world_size()
    if route == "gather":
        shards = _Gather.apply(rows)
        yield from (shards[k] for k in range(world) if k != rank())
        return
    steps = (1, -1) if route == "bidir" else (1,)
    passing = [rows for _ in steps]
    for hop in range(world - 1):
        way = hop % len(steps)
        passing[way] = _Shift.apply(passing[way], steps[way])
        yield passing[way]


def summed(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rank and rows of every shard in turn, this rank's included, each by a sum in which only its owner is not zero.

    This rank's own shard must be used as it comes from here: the sum's backward is a collective that all ranks take part in.
    """
    for k in range(world_size()):
        yield k, Summed.apply(Wire(None), rows * float(rank() == k))
