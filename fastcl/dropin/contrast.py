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
    x: Tensor, y: Tensor, offset: int, scale: float | Tensor, x_t: Tensor, y_t: Tensor, scale_t: float | Tensor
) -> Tensor:
    """mean_i [ LSE_j z_ij - sum_j q_ij z_ij ], z_ij = scale <x_i, y_j>, q_i the softmax over j of scale_t <x_t_i, y_t_j>.

    Both are taken less the logit of the row with its own, which a sharp teacher and a student that agrees with it are all about.

    Args:
        x: (n, d), the student's rows.
        y: (m, d), what they are compared with.
        offset: index within y of the row that belongs to x_0.
        scale: a number or a tensor with one element.
        x_t: (n, e), the teacher's rows.
        y_t: (m, e).
        scale_t: a number or a tensor with one element.
    """
    apart = cross_entropy(x, y, offset, scale)
    dtype = torch.promote_types(accumulation_dtype(x.dtype), accumulation_dtype(x_t.dtype))
    x, y, x_t, y_t, scale_t = (t.to(dtype) for t in (x, y, x_t, y_t, checks.scalar("dist_logit_scale", scale_t, x_t)))
    of = _expected if transforms.active() else _Expected.apply
    expected: Tensor = of(x, y, x_t, y_t, scale_t, offset)
    return apart - times(scale, expected.to(apart.dtype)).mean()


def _expected(x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale: Tensor, offset: int) -> Tensor:
    """What _Expected gives, all at once, for a transform of torch.func."""
    own = torch.arange(x.shape[0], device=x.device)[:, None] + offset
    s = product(x, y.T)
    q = torch.softmax(product(x_t, y_t.T) * scale, 1).scatter(1, own, 0.0)
    return (q * (s - s.gather(1, own))).sum(1)


class _Expected(torch.autograd.Function):
    """e_i = sum_j q_ij s_ij, q_i the softmax over j of t_ij = a <x_t_i, y_t_j>, s_ij = <x_i, y_j - y_{offset + i}>, in blocks of
    rows that share two buffers.

    With g the upstream gradient, that of <x_i, y_j> is g_i q_ij, for the row's own less their sum: minus that of all others. That
    of t_ij is g_i q_ij (s_ij - e_i).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale: Tensor, offset: int) -> Tensor:
        apart = transforms.watched()
        blocks = _blocks(x, y, x_t, y_t, scale, offset, apart)
        expected = torch.cat([(s * q if apart else s.mul_(q)).sum(1) for _, q, s in blocks])
        ctx.save_for_backward(x, y, x_t, y_t, scale, expected)
        ctx.offset = offset
        return expected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, x_t, y_t, scale, expected = ctx.saved_tensors
        g, of_teacher = upstream[0].unsqueeze(1), any(ctx.needs_input_grad[2:5])
        # Of batched gradients g alone is several: nothing that is not can take it in.
        plus = Tensor.addmm if transforms.of_gradients() else Tensor.addmm_
        dx: list[Tensor] = []
        dx_t: list[Tensor] = []
        dy, dy_t = torch.zeros_like(y), torch.zeros_like(y_t)
        with full_precision(x.device):
            for rows, q, s in _blocks(x, y, x_t, y_t, scale, ctx.offset):
                if of_teacher:
                    s.sub_(expected[rows, None]).mul_(q)
                    dx_t.append(g[rows] * torch.mm(s, y_t))
                    dy_t = plus(dy_t, s.T, g[rows] * x_t[rows])
                own = q.diagonal(ctx.offset + rows.start)
                own.zero_().sub_(q.sum(1))
                dx.append(g[rows] * torch.mm(q, y))
                dy = plus(dy, q.T, g[rows] * x[rows])
        if not of_teacher:
            return torch.cat(dx), dy, None, None, None, None
        of_rows = torch.cat(dx_t)
        return torch.cat(dx), dy, of_rows * scale, dy_t * scale, (of_rows * x_t).sum(), None


def _blocks(
    x: Tensor, y: Tensor, x_t: Tensor, y_t: Tensor, scale: Tensor, offset: int, apart: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their q and their s, in buffers that the next block overwrites; `apart`: in tensors of their own, kept."""
    (n, _), m = x.shape, y.shape[0]
    size = max(1, min(n, BLOCK // max(m, 1)))
    teacher, student = (x, x) if apart else x.new_empty(2, size, m)
    with full_precision(x.device):
        for start in range(0, n, size):
            rows = slice(start, min(n, start + size))
            own = offset + start
            if apart:
                s = torch.mm(x[rows], y.T)
                yield rows, torch.softmax(torch.mm(x_t[rows], y_t.T) * scale, 1), s - s.diagonal(own)[:, None]
                continue
            q, s = teacher[: rows.stop - start], student[: rows.stop - start]
            torch.mm(x_t[rows], y_t.T, out=q)
            q.mul_(scale).sub_(q.amax(1, keepdim=True)).exp_()
            q.div_(q.sum(1, keepdim=True))
            torch.mm(x[rows], y.T, out=s)
            s.sub_(s.diagonal(own).clone()[:, None])
            yield rows, q, s
