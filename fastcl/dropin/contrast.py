"""A shard's rows against the rows of all shards: the cross entropy whose labels are offset, in O(n d) memory."""

from __future__ import annotations

from torch import Tensor

from ..equation.masks import off_diagonal
from ..functional.rows import row_dot, softplus, times
from ..ops import pair_reduce, pair_total


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
