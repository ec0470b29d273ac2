"""The gradients of a loss over ranks with its value, before the upstream gradient is known: a number, whose multiples they are.

    dL/dx g = (dL/dx s) (mean of the ranks' g) / s

Messages are sent with the value, but for one number in the backward: the gradients are those of the sum over ranks of what
backward was called on, and the ranks' upstream gradients may differ. s is 1, or for float16 rows what loss_scaling lets pass, so
that nothing is rounded to 0 that a loss scale would have saved; gradients of float16 tensors are float32 until they are multiplied.

Of anything but one number the gradients are no multiples: its backward makes the call again, messages and all (`made_again`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .derivatives import first_derivatives
from .wire import Wire

Gradients: TypeAlias = dict[int, tuple[Tensor, Tensor]]  # by the id of a tensor it, and its gradient


def with_gradients(
    answer: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    most: float,
    agreed: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Gradients]:
    """The value of an answer, and the gradient of each tensor that wants one.

    Args:
        answer: of such arguments, and what loss_scaling knows as wide.
        args, kwargs: of it.
        most: the largest upstream gradient that it takes as it is.
        agreed: the largest of a number on every rank; None for this process alone.
    """
    tensors = wanting([*args, *kwargs.values()])
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
    halves = {key: t.detach().float().requires_grad_() for key, t in tensors.items() if t.dtype == torch.float16}

    wide = {id(leaves[key]): half for key, half in halves.items()}
    with _own_graph():
        value = answer(*replaced((args, kwargs), leaves), wide)
    if not value.requires_grad:
        return value, {key: (t, torch.zeros_like(t)) for key, t in tensors.items()}
    upstream = 2.0 ** math.floor(math.log2(most))
    asked = [*leaves.values(), *halves.values()]
    found = torch.autograd.grad(value, asked, torch.full_like(value, upstream), upstream > 1.0, allow_unused=True)
    if upstream > 1.0:  # what rows far shorter than 1 may not bear
        infinite = sum(((~g.isfinite()).any() for g in found if g is not None), start=torch.zeros_like(value))
        if infinite if agreed is None else agreed(infinite):
            upstream = 1.0
            found = torch.autograd.grad(value, asked, torch.full_like(value, upstream), allow_unused=True)
    gradients = {}
    for key, gradient in zip((*leaves, *halves), found, strict=True):
        if gradient is not None:
            gradients[key] = gradient if upstream == 1.0 else gradient / upstream
    return value.detach(), {key: (t, gradients.get(key, torch.zeros_like(t))) for key, t in tensors.items()}


def _own_graph() -> Any:
    """What is recorded within is kept as it is: a checkpoint around would make it again before its forward is over."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(list(value))


def wanting(values: list[Any]) -> dict[int, Tensor]:
    """The tensors that want a gradient, by their ids."""
    return {id(t): t for t in _tensors(values) if t.requires_grad and torch.is_grad_enabled()}


def replaced(
    given: tuple[tuple[Any, ...], dict[str, Any]], leaves: dict[int, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with tensors in the place of those of these ids."""

    def inside(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [inside(each) for each in value]
        return leaves.get(id(value), value)

    args, kwargs = given
    return tuple(map(inside, args)), {name: inside(each) for name, each in kwargs.items()}


def attached(wire: Wire, value: Tensor, gradients: Gradients) -> Tensor:
    """The value, which autograd gives these gradients."""
    tensors, found = zip(*gradients.values(), strict=True)
    answer: Tensor = _AtOnce.apply(wire, value, found, *tensors)
    return answer


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: Wire, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.wire, ctx.dtypes = wire, [t.dtype for t in tensors]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        factor = ctx.wire.mean(upstream[0].double())
        found = ((g * factor).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return (None, None, None, *found)


def gradients_of(parts: tuple[Tensor, ...], leaves: list[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Of each leaf, zeros where there is none."""
    asked = [(part, g) for part, g in zip(parts, upstream, strict=True) if part.requires_grad]
    found: Any = [None for _ in leaves]
    if asked:
        outputs, given = zip(*asked, strict=True)
        found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def made_again(
    parts: Callable[..., tuple[Tensor, ...]], again: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The parts of an answer, whose backward makes the call again, as the op of a graph does.

    Args:
        parts: of the answer, with leaves in the place of tensors of these ids.
        again: of such arguments, leaves and upstream gradients, the gradients of the leaves.
        args, kwargs: of the call.
    """
    values = [*args, *kwargs.values()]
    tensors = wanting(values)
    if not tensors:
        return parts({})
    # What wants no gradient (a queue, say) may be written over before the backward.
    kept = {id(t): t.detach().clone() for t in _tensors(values) if id(t) not in tensors}
    found: tuple[Tensor, ...] = _MadeAgain.apply(
        parts, again, replaced((args, kwargs), kept), [*tensors], *tensors.values()
    )
    return found


class _MadeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Any, again: Any, given: Any, ids: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.given, ctx.ids = again, given, ids
        ctx.save_for_backward(*tensors)
        with torch.enable_grad(), _own_graph():
            found = parts(dict(zip(ids, (t.detach().requires_grad_() for t in tensors), strict=True)))
        answer = tuple(part.detach().clone() for part in found)
        ctx.mark_non_differentiable(*(a for a, part in zip(answer, found, strict=True) if not part.requires_grad))
        return answer

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad(), _own_graph():
            found = ctx.again(*replaced(ctx.given, dict(zip(ctx.ids, leaves, strict=True))), leaves, upstream)
        return (None, None, None, None, *found)
