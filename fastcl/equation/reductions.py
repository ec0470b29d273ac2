"""Reductions merge: those of two disjoint sets of pairs combine into that of their union."""

from __future__ import annotations

import torch
from torch import Tensor

from .intrinsics import softplus


def merge(r1: Tensor, r2: Tensor) -> Tensor:
    """The log-sum-exp of a union of pairs, from the log-sum-exps of its two disjoint parts.

        r = log(e^r1 + e^r2)

    Shards, queues and accumulated blocks rest on it. Where both parts are -inf (nothing visited) the result is -inf and both
    gradients are 0, while torch.logaddexp gives NaN gradients there.

    Args:
        r1: any shape, floating; log-sum-exps of the first part.
        r2: the same shape (or broadcastable) and dtype; log-sum-exps of the second part.

    Returns:
        The merged log-sum-exps, differentiable.

    Raises:
        TypeError: if either is not a floating-point tensor.

    Examples:
        >>> x, y = torch.eye(4), torch.eye(4)
        >>> near, far = fastcl.pair_reduce(x, y[:1]), fastcl.pair_reduce(x, y[1:])
        >>> torch.allclose(fastcl.merge(near, far), fastcl.pair_reduce(x, y))
        True
    """
    for name, r in (("r1", r1), ("r2", r2)):
        if not isinstance(r, Tensor) or not r.is_floating_point():
            raise TypeError(
                f"merge: expected {name} to be a floating-point tensor, got {getattr(r, 'dtype', type(r).__name__)}"
            )
    empty = torch.isneginf(r1) & torch.isneginf(r2)
    merged = logaddexp(torch.where(empty, 0.0, r1), torch.where(empty, 0.0, r2))
    return torch.where(empty, float("-inf"), merged)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), of which one may be -inf.

    torch's second derivative is NaN where they are more than 88 apart, by way of e^88. Of equals the first is the larger one, so
    that their derivatives are those of a sum: torch.maximum's would halve both, and take the second one away.
    """
    first = a >= b
    larger, smaller = torch.where(first, a, b), torch.where(first, b, a)
    return larger + softplus(smaller - torch.where(torch.isposinf(larger), torch.finfo(larger.dtype).max, larger))
