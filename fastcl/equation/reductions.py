"""Reductions merge: those of two disjoint sets of pairs combine into that of their union."""

from __future__ import annotations

import torch
from torch import Tensor


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
    merged = torch.logaddexp(torch.where(empty, 0.0, r1), torch.where(empty, 0.0, r2))
    return torch.where(empty, float("-inf"), merged)
