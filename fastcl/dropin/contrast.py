"""A shard's rows against the rows of all shards: the cross entropy whose labels are offset, in O(n d) memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import transforms
from ..equation import checks
from ..equation.intrinsics import softplus
from ..equation.masks import off_diagonal
from ..equation.problem import accumulation_dtype
from ..functional.matching import row_dot
from ..functional.rows import times
from ..ops import pair_reduce, pair_total
from ..precision import full_precision, product

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
    checks.some_rows("x", x)
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
    dtype = torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(x_t.dtype))
    sides = (t.to(dtype) for t in (x, y, x_t, y_t))
    arguments = (*sides, checks.scalar("dist_logit_scale", scale_t, x_t).to(dtype))
    expected: Tensor = _expected(*arguments) if transforms.active() else _Expected.apply(*arguments)
    return (r - times(scale, expected.to(r.dtype))).mean()


def _expected(x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale: Tensor) -> Tensor:
    """What _Expected gives, all at once, for a transform of torch.func."""
    return (torch.softmax(product(x_t, y_t.T) * scale, 1) * product(x, y.T)).sum(1)


class _Expected(torch.autograd.Function):
    """e_i = sum_j q_ij <x_i, y_j>, q_i the softmax over j of t_ij = a <x_t_i, y_t_j>, in blocks of rows that share two buffers.

    With g the upstream gradient, that of <x_i, y_j> is g_i q_ij, and that of t_ij is g_i q_ij (<x_i, y_j> - e_i).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale: Tensor) -> Tensor:
        expected = x.new_empty(x.shape[0])
        for rows, q, s in _blocks(x, y, x_t, y_t, scale):
            torch.sum(s.mul_(q), 1, out=expected[rows])
        ctx.save_for_backward(x, y, x_t, y_t, scale, expected)
        return expected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        x, y, x_t, y_t, scale, expected = ctx.saved_tensors
        dx, dy, dx_t, dy_t, dscale = (torch.zeros_like(t) for t in (x, y, x_t, y_t, scale))
        with full_precision(x.device):
            for rows, q, s in _blocks(x, y, x_t, y_t, scale):
                q.mul_(upstream[0][rows, None])
                torch.mm(q, y, out=dx[rows])
                dy.addmm_(q.T, x[rows])
                s.sub_(expected[rows, None]).mul_(q)
                torch.mm(s, y_t, out=dx_t[rows])
                dy_t.addmm_(s.T, x_t[rows])
            dscale += (dx_t * x_t).sum()
        return dx, dy, dx_t * scale, dy_t * scale, dscale


def _blocks(x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their q and their <x_i, y_j>, in buffers that the next block overwrites."""
    (n, _), m = x.shape, y.shape[0]
    size = max(1, min(n, BLOCK // max(m, 1)))
    teacher, student = x.new_empty(2, size, m)
    with full_precision(x.device):
        for start in range(0, n, size):
            rows = slice(start, min(n, start + size))
            q, s = teacher[: rows.stop - start], student[: rows.stop - start]
            torch.mm(x_t[rows], y_t.T, out=q)
            q.mul_(scale).sub_(q.amax(1, keepdim=True)).exp_()
            q.div_(q.sum(1, keepdim=True))
            torch.mm(x[rows], y.T, out=s)
            yield rows, q, s
