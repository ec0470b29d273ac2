"""From one call of an objective with `group=` to the union of the ranks' rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import batch, loss_scaling, transforms
from ..equation.arguments import declared
from ..equation.checks import is_dtensor
from ..precision import full_precision
from . import at_once, dtensors, in_graph, spelling
from .agreement import Call, agree, bound, named
from .derivatives import Passed
from .ranks import Ranks, check_settings, process_group
from .shards import Shards
from .spelling import Spelt
from .wire import Wire

P = ParamSpec("P")
R = TypeVar("R")


def over_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """An objective that takes group=; its body need not know.

    Its arguments are checked by their annotations first. Without a group the body then runs as it is.
    """
    checked = named(declared(function))
    spelt = spelling.named(checked)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        args, kwargs = transforms.keepable((args, kwargs))
        if any(map(is_dtensor, args)) or any(map(is_dtensor, kwargs.values())):
            return dtensors.over_placement(named(call), bound(function, args, kwargs))
        ranks = Ranks.of(kwargs.get("group"))
        if ranks is None:
            if batch.beyond_this_process():
                # A part of an objective over ranks, which is scaled as a whole, by what all ranks agree on: shards of different
                # sizes would divide by different powers what their sums then mix.
                return checked(*args, **kwargs)
            return loss_scaling.scaled(spelt, args, kwargs)
        if in_graph.traced():
            answer: Any = in_graph.called(spelt, args, kwargs, ranks, rounding((*args, *kwargs.values())))
            if answer is not None:
                return answer
        return _over_ranks(spelt, args, kwargs, ranks)

    return call


@torch._disable_dynamo  # torch.compiler.disable imports torch._dynamo at once, which takes longer than torch itself
def _over_ranks(spelt: Spelt, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: Ranks) -> Any:
    union = Union(spelt, args, kwargs, ranks)
    if not union.asked:
        return union.answer(*union.given)
    if not union.one_number:
        found = at_once.made_again(union.parts, partial(_again, spelt, ranks, union.rounding), args, kwargs)
        return spelt.form(*found) if union.several else found[0]
    value, gradients = union.with_gradients()
    return at_once.attached(union.wire, value, gradients) if gradients else value


def _again(
    spelt: Spelt,
    ranks: Ranks,
    rounding: tuple[str, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: list[Tensor],
    upstream: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients of a call that is made anew, in a backward."""
    with rounded(*rounding):
        return Union(spelt, args, kwargs, ranks, asking=True).gradients(leaves, upstream)


class Union:
    """A call for the union of the ranks' rows, on which they have agreed.

    Where one of the ranks runs a graph of torch.compile, all send what its op sends, in the same order: the gradients of one
    number come with it (at_once.py), of anything else the backward makes the call again. Otherwise the answer has its gradients by
    autograd.

    Args:
        spelt: the objective.
        args, kwargs: of it.
        ranks: over which.
        asking: whether this rank runs a graph.
    """

    def __init__(
        self, spelt: Spelt, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: Ranks, asking: bool = False
    ) -> None:
        self.spelt, self.ranks, self.wire = spelt, ranks, Wire(process_group(ranks.group))
        self.given, self.asked = (args, kwargs), asking
        self.shards: Shards | None = None
        self.rows: int | None = None
        self.rounding = rounding((*args, *kwargs.values()))
        if self.wire.world == 1:
            check_settings(ranks.settings)
        else:
            call = Call(spelt.function, args, kwargs, ranks.settings | {"autocast": self.rounding[1]})
            with transforms.set_aside():
                layouts, self.asked = agree(self.wire, call, asking)
            self.shards, self.given = Shards(self.wire, layouts, ranks.strategy), ((), call.arguments)
            self.rows = max((sum(layout) for layout in layouts), default=0)
        self.one_number, self.several = spelt.one_number(self.given[1]), spelt.several(self.given[1])

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any], wide: dict[int, Tensor] | None = None) -> Any:
        """That of these arguments, in place of those given."""
        if self.shards is None:
            return loss_scaling.scaled(self.spelt, args, kwargs, wide=wide)
        with batch.over(self.shards):
            found = loss_scaling.scaled(self.spelt, args, kwargs, self.rows, self.shards.largest, wide)
        return found if self.ranks.gradient == "ddp" else shared(found, self.wire.world)

    def with_gradients(self) -> tuple[Tensor, at_once.Gradients]:
        """One number, and the gradient of each tensor that wants one."""
        rows = loss_scaling.rows_of(self.spelt, *self.given)
        most = (
            loss_scaling.largest_upstream(rows, self.given[1], self.rows)
            if any(map(loss_scaling.overflows, rows))
            else 1.0
        )
        return at_once.with_gradients(
            self.answer, *self.given, most, None if self.shards is None else self.shards.largest
        )

    def parts(self, leaves: dict[int, Tensor] | None = None) -> tuple[Tensor, ...]:
        """What the answer consists of, with tensors in the place of those of these ids."""
        answer = self.answer(*at_once.replaced(self.given, leaves or {}))
        if isinstance(answer, tuple) != self.several:
            expected = "a NamedTuple" if self.several else "a tensor"
            raise TypeError(
                f"{self.spelt.function.__name__}: expected {expected}, as its annotation says, got {type(answer).__name__}; "
                "annotate what it returns"
            )
        return tuple(answer) if self.several else (answer,)

    def gradients(self, leaves: list[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        """Of leaves that stand among the arguments."""
        return at_once.gradients_of(self.parts(), leaves, upstream)


def rounding(values: tuple[Any, ...]) -> tuple[str, str]:
    """The device of these rows, and the dtype that autocast makes of them there, or off: rows travel in it as bytes, which do not
    say what they are.
    """
    rows = next((v for v in values if isinstance(v, Tensor)), None)
    device = "cpu" if rows is None else rows.device.type
    # What is asked last torch.compile of 2.10 cannot ask.
    served = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not (served and torch.is_autocast_enabled(device)):
        return device, "off"
    return device, str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def rounded(device: str, dtype: str) -> AbstractContextManager[Any]:
    """Autocast as it was asked for: none where there was none, though a backward may stand within one."""
    return full_precision(torch.device(device)) if dtype == "off" else torch.autocast(device, getattr(torch, dtype))


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
    same: Tensor = number if wire.world == 1 else Passed.apply(number, wire.mean)
    return same


class _Share(torch.autograd.Function):
    """The value as it is, its gradient over world."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: int) -> Tensor:
        ctx.world = world
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] / ctx.world, None
