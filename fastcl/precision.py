"""The library's own matrix products: in the dtype of their factors, whatever autocast says, forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import transforms


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast within, where there is any."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, and its gradients likewise: a backward may run under autocast too."""
    if transforms.active():
        with full_precision(a.device):
            return a @ b
    found: Tensor = _Product.apply(a, b)
    return found


class _Product(torch.autograd.Function):
    """a @ b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device):
            return a @ b

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (g,), (of_a, of_b) = ctx.saved_tensors, upstream, ctx.needs_input_grad
        return (product(g, b.T) if of_a else None), (product(a.T, g) if of_b else None)
