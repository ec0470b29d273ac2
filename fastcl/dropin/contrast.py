"""A shard's rows against the rows of all shards: the cross entropy whose labels are offset, in O(n d) memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..equation import checks
from ..equation.masks import off_diagonal
from ..equation.problem import accumulation_dtype
from ..functional.rows import row_dot, softplus, times
from ..ops import pair_reduce, pair_total
from ..precision import product

BLOCK = 2**20  # entries of logits that are held at once, of a teacher and of a student


def positives(x: Tensor, y: Tensor, offset: int, scale: float | Tensor) -> Tensor:
    """The logit of each row of x with its own row of y, scale <x_i, y_{offset + i}>."""
    return times(scale, row_dot(x, y[offset : offset + x.shape[0]]))


def cross_entropy(x: Tensor, y: Tensor, offset: int, scale: float | Tensor) -> Tensor:
    """mean_i [ LSE_j z_ij - z_{i, offset + i} ], z_ij = scale <x_i, y_j>.

    Args:
        x: (n, d), the rows of one shard.
        y: (m, d), the rows of all shards, and any number of negatives after them.
        offset: index within y of the positive of x_0.
        scale: a number or a tensor with one element.
    """
    if x.shape[0] == 0:
        raise ValueError("expected at least 1 row, got 0: a mean over no rows; skip empty batches")
    p = positives(x, y, offset, scale)
    mask = off_diagonal(row_offset=offset)
    return pair_total(x, y, outer="contrast", positive=p, scale=scale, mask=mask) / x.shape[0]


def symmetric_cross_entropy(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """mean_i [ (LSE_j z_ij + LSE_j z_ji) / 2 - z_ii ] from one sweep; rows of y beyond those of x are negatives of x only.

    Args:
        x: (n, d), anchors.
        y: (m, d), m >= n.
        scale: a number or a tensor with one element.
    """
    p = positives(x, y, 0, scale)
    r, c = pair_reduce(x, y, scale=scale, mask=off_diagonal(), columns=True)
    return 0.5 * (softplus(r - p) + softplus(c[: x.shape[0]] - p)).mean()


def distillation(
    x: Tensor, y: Tensor, scale: float | Tensor, x_t: Tensor, y_t: Tensor, scale_t: float | Tensor
) -> Tensor:
    """mean_i [ LSE_j z_ij - sum_j q_ij z_ij ], z_ij = scale <x_i, y_j>, q_i the softmax over j of scale_t <x_t_i, y_t_j>.

    Args:
        x: (n, d), the student's rows.
        y: (m, d), what they are compared with.
        scale: a number or a tensor with one element.
        x_t: (n, e), the teacher's rows.
        y_t: (m, e).
        scale_t: a number or a tensor with one element.
    """
    r = pair_reduce(x, y, scale=scale)
    assert isinstance(r, Tensor)
    rows = max(1, BLOCK // max(y.shape[0], 1))
    parts = zip(x.split(rows), x_t.split(rows), strict=True)
    expected = [checkpoint(_expected, a, y, a_t, y_t, scale_t, use_reentrant=False) for a, a_t in parts]
    return (r - times(scale, torch.cat(expected))).mean()


def _expected(x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale_t: float | Tensor) -> Tensor:
    """sum_j q_ij <x_i, y_j>, of a block of rows."""
    wide, wide_t = accumulation_dtype(x.dtype), accumulation_dtype(x_t.dtype)
    teacher = product(x_t.to(wide_t), y_t.to(wide_t).T) * checks.scalar("dist_logit_scale", scale_t, x_t)
    return (teacher.softmax(1).to(wide) * product(x.to(wide), y.to(wide).T)).sum(1)
