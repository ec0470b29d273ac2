"""What a loss over ranks costs: the bytes that a rank sends, how often it forms z, and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fastcl import Ranks, functional
from fastcl.distributed import wire

from .shards import random

AGREED = 144  # bytes that each rank sends of a call before all else


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this rank sends to others meanwhile: its part of an all-gather goes to each of them."""
    sent = [0]
    gather, exchange, send = wire._all_gather, dist.all_to_all_single, dist.batch_isend_irecv

    def all_gather(found: Tensor, mine: Tensor, group: Any = None) -> Any:
        sent[0] += mine.numel() * mine.element_size() * (dist.get_world_size(group) - 1)
        return gather(found, mine, group=group)

    def all_to_all(received: Tensor, given: Tensor, back: list[int], away: list[int], group: Any = None) -> Any:
        sent[0] += sum(n for k, n in enumerate(away) if k != dist.get_rank(group))
        return exchange(received, given, back, away, group=group)

    def batch_isend_irecv(operations: list[dist.P2POp]) -> Any:
        sent[0] += sum(p.tensor.numel() * p.tensor.element_size() for p in operations if p.op is dist.isend)
        return send(operations)

    with (
        mock.patch.object(wire, "_all_gather", all_gather),
        mock.patch.object(dist, "all_to_all_single", all_to_all),
        mock.patch.object(dist, "batch_isend_irecv", batch_isend_irecv),
    ):
        yield sent


def volume(strategy: str, rank: int, world: int) -> float:
    """The bytes of a step are those of docs/distributed.md."""
    n, others = 16, world - 1
    x, y = (random(n, 8, seed=s + rank, dtype=torch.float32).requires_grad_() for s in (0, 50))
    with counted() as sent:
        functional.clip(x, y, logit_scale=5.0, group=Ranks(dist.group.WORLD, strategy=strategy)).backward()
    rows, vector = n * 8 * 4, n * 4
    small = others * (AGREED + 8 + 8)  # the agreement; a sum, forward and backward
    if strategy == "gather":  # forward: y, and c home; backward: y with c and h, and dy home
        large = others * ((rows + vector) + (rows + 2 * vector + rows))
    else:  # as much, and each result one hop further, to come home
        large = others * (rows + rows + 2 * vector) + world * (vector + rows)
    if world == 1:
        large = small = 0
    assert sent[0] == large + small, f"expected {large} + {small} bytes, got {sent[0]}"
    return 0.0


TOTALS: dict[str, Callable[..., Tensor]] = {
    "info_nce": functional.info_nce,
    "siglip": partial(functional.siglip, logit_scale=5.0, logit_bias=-2.0),
    "f_micl": functional.f_micl,
}


class Ops(TorchDispatchMode):
    """Which of our ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastcl":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def one_sweep(name: str, strategy: str, rank: int, world: int) -> float:
    """Sums, and what is gathered with its positive known, form z once; rows go out once and gradients come home once."""
    n, d, others = 16, 8, world - 1
    x, y = (random(n, d, seed=s + rank, dtype=torch.float32).requires_grad_() for s in (0, 50))
    swept = name == "info_nce" and strategy == "ring"  # a row's normaliser is known at the end of the tour only
    with counted() as sent, Ops() as ops:
        TOTALS[name](x, y, group=Ranks(dist.group.WORLD, strategy=strategy)).backward()
    assert ("pair_reduce_backward" in ops.seen) == (swept and world > 1), ops.seen
    if swept or world == 1 or name == "f_micl":  # same view: half as much, and not as much on every rank
        return 0.0
    rows, sums = n * d * 4, 1 if name == "info_nce" else 2
    small = others * (AGREED + sums * (8 + 8))  # the agreement; each sum, forward and backward
    large = others * 2 * rows if strategy == "gather" else others * rows + world * rows  # y out, dy home
    assert sent[0] == large + small, f"expected {large} + {small} bytes, got {sent[0]}"
    return 0.0


def memory(strategy: str, rank: int, world: int) -> float:
    """Bytes of tensors held at the worst moment of a step, over those of one shard."""
    n, d = 512, 256
    x, y = (random(n, d, seed=s + rank, dtype=torch.float32).requires_grad_() for s in (0, 50))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        functional.clip(
            x, y, logit_scale=5.0, normalize=False, group=Ranks(dist.group.WORLD, strategy=strategy)
        ).backward()
    held = worst = 0
    for event in sorted(profile.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            worst = max(worst, held)
    return worst / (n * d * 4)


CHECKS: dict[str, Callable[[int, int], float]] = {
    **{f"volume, {strategy}": partial(volume, strategy) for strategy in ("gather", "ring")},
    **{f"memory, {strategy}": partial(memory, strategy) for strategy in ("gather", "ring")},
    **{f"one sweep, {name}, {s}": partial(one_sweep, name, s) for name in TOTALS for s in ("gather", "ring")},
}
