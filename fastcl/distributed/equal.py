"""Shards of one size on all ranks: gathered, summed or passed on, each by an op with its gradient, in and out of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from . import in_graph
from .derivatives import refuse
from .wire import Wire


def gathered(shard: Tensor) -> Tensor:
    """(world, *shard.shape) the shards of all ranks; their gradients go home, and add up there."""
    return _op("gather_shards")(shard, in_graph.group_name(dist.group.WORLD))


def summed(shard: Tensor) -> Tensor:
    """The sum of the shards of all ranks; its gradient is the sum of theirs."""
    return _op("sum_shards")(shard, in_graph.group_name(dist.group.WORLD))


def shifted(shard: Tensor, step: int) -> Tensor:
    """The shard of the rank `step` back, while this one goes as far on; gradients take the way back."""
    return _op("shift_shards")(shard, step, in_graph.group_name(dist.group.WORLD))


def _op(name: str) -> Callable[..., Tensor]:
    """The op, which stays outside a graph where that does not keep its place."""
    op: Callable[..., Tensor] = getattr(torch.ops.fastcl, name)
    return op if in_graph.traced() or not torch.compiler.is_compiling() else torch._disable_dynamo(op)


def _gather(shard: Tensor, group: str) -> Tensor:
    wire = Wire(in_graph.group_of(group))
    found = wire.gathered((shard,), [shard.shape[0]] * wire.world)[0]
    return found.view(wire.world, *shard.shape)


def _shift(shard: Tensor, step: int, group: str) -> Tensor:
    found = Wire(in_graph.group_of(group)).shift((shard,), step, shard.shape[0])()[0]
    return found.clone() if found is shard else found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, ctx.group = inputs
    ctx.step = inputs[1]


def _of_gathered(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    refuse([upstream])
    rank = dist.get_rank(in_graph.group_of(ctx.group))
    return torch.ops.fastcl.sum_shards(upstream, ctx.group)[rank], None


def _of_summed(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    refuse([upstream])
    return torch.ops.fastcl.sum_shards(upstream, ctx.group), None


def _of_shifted(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    refuse([upstream])
    return torch.ops.fastcl.shift_shards(upstream, -ctx.step, ctx.group), None, None


def _like(shard: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(shard, memory_format=torch.contiguous_format)


OPS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor], Callable[..., Any]]] = {
    "gather_shards": (
        "(Tensor shard, str group) -> Tensor",
        _gather,
        lambda shard, group: shard.new_empty((dist.get_world_size(in_graph.group_of(group)), *shard.shape)),
        _of_gathered,
    ),
    "sum_shards": (
        "(Tensor shard, str group) -> Tensor",
        lambda shard, group: Wire(in_graph.group_of(group)).summed(shard),
        _like,
        _of_summed,
    ),
    "shift_shards": ("(Tensor shard, int step, str group) -> Tensor", _shift, _like, _of_shifted),
}
library = in_graph.register([(name, *op[:3]) for name, op in OPS.items()], tuple(OPS))
for _name, _op_of in OPS.items():
    torch.library.register_autograd(f"fastcl::{_name}", _op_of[3], setup_context=_keep, lib=library)
