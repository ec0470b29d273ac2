"""What autograd is told about everything that goes through other ranks: one gradient at a time, and first derivatives only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

SECOND = (
    "fastcl: create_graph=True asks for second derivatives, which an objective over several ranks does not have on any backend "
    "(messages between ranks are outside autograd, so that they would be wrong); for these, gather the rows first and leave "
    "group= out, with backend='reference'"
)
BATCHED = (
    "fastcl: is_grads_batched=True, or vmap, asks for several gradients at once, which an objective over several ranks does not "
    "have; ask for one after the other, with retain_graph=True"
)


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that refuses what it would get wrong, before it sends anything.

    Not once_differentiable, which lets create_graph=True pass until the upstream gradient itself asks for a gradient.

    Raises:
        RuntimeError: for create_graph=True, and for batched upstream gradients.
    """

    @wraps(backward)
    def checked(ctx: Any, *upstream: Any) -> Any:
        refuse(upstream)
        return backward(ctx, *upstream)

    return checked


class Passed(torch.autograd.Function):
    """The value as it is; its gradient is what `change` makes of the upstream one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return value.view_as(value)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.change(upstream[0]), None


def refuse(upstream: Iterable[Any]) -> None:
    """Raise in a backward of these upstream gradients, unless it is one of first derivatives."""
    if torch.is_grad_enabled():
        raise RuntimeError(SECOND)
    if any(_batched(g) for g in upstream if isinstance(g, Tensor)):
        raise RuntimeError(BATCHED)


def _batched(g: Tensor) -> bool:
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g))  # vmap's, and is_grads_batched's
