"""Rows of other processes, with the gradients that each library expects to flow back to them.

Shards are of equal size: row i of rank k is row k n + i of the gathered rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch import distributed as dist

from ..distributed import equal
from ..precision import stacked


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


def named(own: int, world: int) -> dict[str, bool]:
    """For all ranks to agree on: whether what a caller names is right, where `require` would raise on some of them alone."""
    return {"rank is torch.distributed's": (rank(), world_size()) == (own, world)}


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, without gradient."""
    return equal.gathered(rows.detach()).flatten(0, 1)


def gathered_with_own(rows: Tensor) -> Tensor:
    """The rows of all ranks; only this rank's own carry gradient, and it stays here."""
    shards = [*equal.gathered(rows.detach())]
    shards[rank()] = rows
    return stacked(*shards)


def gathered_own_first(rows: Tensor) -> Tensor:
    """This rank's rows, with gradient, then those of the other ranks in their order, without."""
    shards = [*equal.gathered(rows.detach())]
    del shards[rank()]
    return stacked(rows, *shards)


def gathered_with_gradient(rows: Tensor) -> Tensor:
    """The rows of all ranks; the gradients of all ranks flow back to where the rows came from, and add up there."""
    return equal.gathered(rows).flatten(0, 1)


def others(rows: Tensor, route: str) -> Iterator[Tensor]:
    """The rows of every other rank, one shard after the other, with gradients that flow back to their ranks.

    Args:
        rows: (n, d), this rank's rows.
        route: "shift" passes shards around the ring, "bidir" both ways round it; "gather" holds all of them at once.
    """
    world = world_size()
    if route == "gather":
        shards = equal.gathered(rows)
        yield from (shards[k] for k in range(world) if k != rank())
        return
    steps = (1, -1) if route == "bidir" else (1,)
    passing = [rows for _ in steps]
    for hop in range(world - 1):
        way = hop % len(steps)
        passing[way] = equal.shifted(passing[way], steps[way])
        yield passing[way]


def summed(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rank and rows of every shard in turn, this rank's included, each by a sum in which only its owner is not zero.

    This rank's own shard must be used as it comes from here: the sum's backward is a collective that all ranks take part in.
    """
    for k in range(world_size()):
        yield k, equal.summed(rows * float(rank() == k))
