"""From one call of an objective with `group=` to the union of the ranks' rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import batch, loss_scaling, transforms
from ..equation.arguments import declared
from ..equation.checks import is_dtensor
from . import at_once, dtensors, in_graph
from .agreement import Call, agree, bound, named
from .derivatives import first_derivatives
from .ranks import Ranks, check_settings, process_group
from .shards import Shards
from .wire import Wire

P = ParamSpec("P")
R = TypeVar("R")


def over_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """An objective that takes group=; its body need not know.

    Its arguments are checked by their annotations first. Without a group the body then runs as it is.
    """
    checked = named(declared(function))
    name = in_graph.named(checked)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(map(is_dtensor, args)) or any(map(is_dtensor, kwargs.values())):
            return dtensors.over_placement(named(call), bound(function, args, kwargs))
        ranks = Ranks.of(kwargs.get("group"))
        if ranks is None:
            if batch.beyond_this_process():
                # A part of an objective over ranks, which is scaled as a whole, by what all ranks agree on: shards of different
                # sizes would divide by different powers what their sums then mix.
                return checked(*args, **kwargs)
            return loss_scaling.scaled(checked, args, kwargs)
        if name is not None and in_graph.traced() and in_graph.one_number(kwargs):
            answer: Any = in_graph.called(name, args, kwargs, ranks, rounding((*args, *kwargs.values())))
            if answer is not None:
                return answer
        return _over_ranks(checked, args, kwargs, ranks)

    return call


@torch._disable_dynamo  # torch.compiler.disable imports torch._dynamo at once, which takes longer than torch itself
def _over_ranks(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ranks: Ranks) -> Any:
    answer, gradients = of_union(function, args, kwargs, ranks)
    return at_once.attached(Wire(process_group(ranks.group)), answer, gradients) if gradients else answer


def of_union(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ranks: Ranks,
    in_one_call: bool = False,
) -> tuple[Any, at_once.Gradients]:
    """The answer of a call for the union of the ranks' rows; with its gradients where one of the ranks asks for them `in_one_call`.

    Then all send the same messages in the same order, whichever of them run a graph of torch.compile. Otherwise the answer has its
    gradients by autograd, and there are none beside it.
    """
    wire = Wire(process_group(ranks.group))
    shards, rows, given = None, None, (args, kwargs)
    if wire.world == 1:
        check_settings(ranks.settings)
    else:
        call = Call(function, args, kwargs, ranks.settings | {"autocast": rounding((*args, *kwargs.values()))})
        with transforms.set_aside():
            layouts, in_one_call = agree(wire, call, in_one_call)
        shards, given = Shards(wire, layouts, ranks.strategy), ((), call.arguments)
        rows = max((sum(layout) for layout in layouts), default=0)

    def answer(args: tuple[Any, ...], kwargs: dict[str, Any], wide: dict[int, Tensor] | None = None) -> Any:
        if shards is None:
            return loss_scaling.scaled(function, args, kwargs, wide=wide)
        with batch.over(shards):
            found = loss_scaling.scaled(function, args, kwargs, rows, shards.largest, wide)
        return found if ranks.gradient == "ddp" else shared(found, wire.world)

    if not in_one_call:
        return answer(*given), {}
    return at_once.with_gradients(answer, *given, rows, None if shards is None else shards.largest)


def rounding(values: tuple[Any, ...]) -> str:
    """The dtype that autocast makes of these rows here, or off: rows travel in it as bytes, which do not say what they are."""
    rows = next((v for v in values if isinstance(v, Tensor)), None)
    device = "cpu" if rows is None else rows.device.type
    # What is asked last torch.compile of 2.10 cannot ask.
    served = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not (served and torch.is_autocast_enabled(device)):
        return "off"
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def shared(answer: Any, world: int) -> Any:
    """Whatever all ranks hold alike (numbers, not rows) with its gradient over world."""
    if isinstance(answer, tuple):
        return type(answer)(*(shared(part, world) for part in answer))
    return _Share.apply(answer, world) if answer.dim() == 0 else answer


def evened(number: Tensor, group: Any) -> Tensor:
    """A number that all ranks of `group=` hold alike, with the mean of their gradients on each: a bound asks for its sign.

    Either convention stays as it is, since the sum over ranks does.
    """
    if group is None or (isinstance(group, Ranks) and group.group is None) or not number.requires_grad:
        return number  # here, where torch.compile and torch.export see it
    if in_graph.traced():
        answer: Tensor = torch.ops.fastcl.evened(number, in_graph.group_name(group))
        return answer
    return _evened(number, group)


@torch._disable_dynamo
def _evened(number: Tensor, group: Any) -> Tensor:
    ranks = Ranks.of(group)
    assert ranks is not None
    wire = Wire(process_group(ranks.group))
    same: Tensor = number if wire.world == 1 else _Even.apply(wire, number)
    return same


class _Even(torch.autograd.Function):
    """The number as it is, the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, number: Tensor) -> Tensor:
        ctx.wire = wire
        return number.view_as(number)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        return None, ctx.wire.mean(upstream[0])


class _Share(torch.autograd.Function):
    """The value as it is, its gradient over world."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: int) -> Tensor:
        ctx.world = world
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] / ctx.world, None
