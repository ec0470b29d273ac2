"""The definition: the n x m matrix of z in float64, by plain PyTorch, differentiable twice. For tests and for small problems.

z_ij = a * u(x_i, y_j) + b + bx_i + by_j,   u = <x_i, y_j> or |x_i - y_j|^2
r_i  = REDUCE_{j in M(i)} f(z_ij)           c_j the column twin
w_ij = f'(z_ij) (g_i e_ij + h_j k_ij),      e = k = 1 for sum; e_ij = exp(z_ij - r_i), k_ij = exp(z_ij - c_j) for logsumexp
dot:    dX = a W Y                          dY = a W^T X
sqdist: dX = 2a (diag(W 1) X - W Y)         dY = 2a (diag(W^T 1) Y - W^T X)
da = <W, U>   db = <W, 1>   dbx = W 1   dby = W^T 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..equation.intrinsics import softplus
from ..equation.masks import Mask
from ..equation.problem import Gradients, Problem, Wanted


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: the reference runs wherever PyTorch has float64."""
    return "the mps device has no float64; use backend='blocked'" if device.type == "mps" else None


def visited(mask: Mask, rows: Tensor, cols: Tensor) -> Tensor | None:
    """The boolean block M[rows, cols] for index vectors `rows` and `cols`; None when every pair is visited."""
    if mask.kind == "off_diagonal":
        if mask.period:
            return ((rows + mask.row_offset)[:, None] - (cols + mask.col_offset)[None, :]) % mask.period != 0
        return (rows + mask.row_offset)[:, None] != (cols + mask.col_offset)[None, :]
    if mask.kind == "all":
        return None
    assert mask.group_x is not None
    group_y = mask.group_x if mask.group_y is None else mask.group_y
    same = mask.group_x[rows][:, None] == group_y[cols][None, :]
    return same if mask.kind == "within_groups" else ~same


def within(p: Problem, z: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor | None]:
    """The block of z, NaN where a limit is, and which of its pairs are visited, by their indices and by their logits or guides."""
    keep = visited(p.mask, rows, cols)
    of_rows, of_cols = p.limits
    limits = [] if of_rows is None else [of_rows[rows][:, None].to(z.dtype)]
    limits += [] if of_cols is None else [of_cols[cols][None, :].to(z.dtype)]
    for limit in limits:
        z = z + torch.where(torch.isnan(limit), limit, 0.0)
    guides = p.guides
    decides = z if guides is None else guides[0][rows].to(z.dtype) @ guides[1][cols].to(z.dtype).T
    for limit in limits:
        counts = ~(decides > limit)
        keep = counts if keep is None else keep & counts
    return z, keep


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked: differentiable by autograd as often as one likes."""
    _, z, keep = _matrix(p)
    r = _reduce(p, z, keep, dim=1).to(p.dtype)
    return r, _reduce(p, z, keep, dim=0).to(p.dtype) if p.columns else None


def total_value(p: Problem, positive: Tensor | None, outer: str) -> Tensor:
    """The value of the total form, of unrounded rows: differentiable as often as one likes."""
    _, z, keep = _matrix(p)
    r = _reduce(p, z, keep, dim=1)
    return outer_value(outer, r, None if positive is None else positive.double()).to(p.dtype)


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>, by the formulas above; r and c may be those of a larger whole than this problem's pairs."""
    u, z, keep = _matrix(p)
    w = _weights(p, z, keep, r, c, g.double(), None if h is None else h.double())
    return _gradients(p, u, w, wanted, dtype or p.x.dtype)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """The value of the total form and its gradients for an upstream gradient of 1."""
    u, z, keep = _matrix(p)
    r = _reduce(p, z, keep, dim=1)
    value, g, dpositive = outer_form(outer, r, None if positive is None else positive.double())
    w = _weights(p, z, keep, r, None, g, None)
    return (
        value.to(p.dtype),
        _gradients(p, u, w, wanted, p.dtype),
        dpositive if dpositive is None else dpositive.to(p.dtype),
    )


def outer_form(outer: str, r: Tensor, positive: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The outer function of the rows: its value, its gradient g to r, and its gradient to the positives."""
    if outer == "sum":
        return r.sum(), torch.ones_like(r), None
    if outer == "contrast":
        assert positive is not None
        g = torch.sigmoid(r - positive)
        return outer_value(outer, r, positive), g, -g
    value = outer_value(outer, r, positive)
    empty = torch.isneginf(value)
    return value, torch.exp(r - torch.where(empty, 0.0, value)), None


def outer_value(outer: str, r: Tensor, positive: Tensor | None) -> Tensor:
    """sum_i r_i, sum_i softplus(r_i - p_i), or the log-sum-exp of all rows; differentiable."""
    if outer == "sum":
        return r.sum()
    if outer == "contrast":
        assert positive is not None
        return softplus(r - positive).sum()
    return _logsumexp(r, torch.isneginf(r), 0)


def _sides(p: Problem) -> tuple[Tensor, Tensor]:
    """x and y in float64, for sqdist about their centre: a cloud far from the origin would cancel in diag(W 1) X - W Y too."""
    x = p.x.double()
    y = x if p.y is None else p.y.double()
    if p.operand == "sqdist":
        middle = centre(x, y)
        x, y = x - middle, y - middle
    return x, y


def _matrix(p: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """u and z, (n, m) float64, and the mask."""
    x, y = _sides(p)
    u = x @ y.T
    if p.operand == "sqdist":
        u = ((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2.0 * u).clamp(min=0.0)
    if p.y is None:  # a product of matrices need not be symmetric to the last bit, which is 2e6 of a z of 1e22
        u = u.triu() + u.triu(1).T
    z = p.scale.double() * u + p.shift.double()
    if p.bias_x is not None:
        z = z + p.bias_x.double()[:, None]
    if p.bias_y is not None:
        z = z + p.bias_y.double()[None, :]
    index = torch.arange(max(p.n, p.m), device=x.device)
    return (u, *within(p, z, index[: p.n], index[: p.m]))


SAMPLED = 32  # rows of a side, of which the centre is the median: csrc/cpu/prepare.cpp takes the same


def centre(x: Tensor, y: Tensor) -> Tensor:
    """A point amid the rows: subtracting it keeps |x|^2 + |y|^2 - 2<x, y> accurate for a cloud far from the origin.

    The median of each column over a sample of both sides, always finite. A mean would go where one row of 1e6 pulls it,
    away from all others, and one NaN or infinity would make every row NaN. Of two middle ones it is the smaller, not their mean:
    where every other row is 1e6 long, the others keep their digits.
    """
    sides = (y,) if x is y else (x, y)
    rows = torch.cat([side.detach()[:: -(-side.shape[0] // SAMPLED) or 1] for side in sides])
    if not rows.shape[0]:
        return rows.new_zeros(rows.shape[1])
    rows = rows.sort(0).values  # NaN stands last
    lower, upper = rows[(rows.shape[0] - 1) // 2], rows[rows.shape[0] // 2]
    middle = torch.where(upper.abs() < lower.abs(), upper, lower)
    return torch.where(middle.isfinite(), middle, 0.0)


def _reduce(p: Problem, z: Tensor, keep: Tensor | None, dim: int) -> Tensor:
    if p.reduce == "logsumexp":
        masked = torch.isneginf(z) if keep is None else ~keep | torch.isneginf(z)
        return _logsumexp(z, masked, dim)
    f = p.pair.f(z if keep is None else torch.where(keep, z, 1.0))
    return (f if keep is None else torch.where(keep, f, 0.0)).sum(dim)


def _logsumexp(z: Tensor, masked: Tensor, dim: int) -> Tensor:
    """Log-sum-exp over what is not masked; -inf with gradient 0 where nothing is left (torch.logsumexp gives NaN there)."""
    empty = masked.all(dim, keepdim=True)
    filled = torch.where(masked, float("-inf"), z)
    safe = torch.where(empty, 0.0, filled)
    if z.shape[dim] == 0:
        return z.sum(dim) - float("inf")
    return torch.where(empty.squeeze(dim), float("-inf"), torch.logsumexp(safe, dim))


def _weights(
    p: Problem, z: Tensor, keep: Tensor | None, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None
) -> Tensor:
    if p.y is None:
        c, h = r, g
    if p.reduce == "sum":
        w = p.pair.df(z if keep is None else torch.where(keep, z, 1.0))
        w = w * (g[:, None] if h is None else g[:, None] + h[None, :])
        return w if keep is None else torch.where(keep, w, 0.0)
    z = z if keep is None else torch.where(keep, z, float("-inf"))
    w = torch.exp(z - _unrounded(r, _reduce(p, z, keep, 1))[:, None]) * g[:, None]
    if h is not None:
        assert c is not None
        w = w + torch.exp(z - _unrounded(c, _reduce(p, z, keep, 0))[None, :]) * h[None, :]
    return w if keep is None else torch.where(keep, w, 0.0)  # of a row whose r is NaN too


def _unrounded(given: Tensor, own: Tensor) -> Tensor:
    """The normaliser that was given, in float64 where it is this problem's own, rounded; 0 where nothing is left."""
    exact = torch.where(own.to(given.dtype) == given, own, given.double())
    return torch.where(torch.isneginf(exact), 0.0, exact)


def _weighed(w: Tensor, rows: Tensor) -> Tensor:
    """w @ rows, where a weight of 0, of a pair that is left out, takes nothing from a row with a NaN."""
    bad = rows.isnan().any(1)
    met = ((w != 0.0) & bad).any(1, keepdim=True)
    return torch.where(met, torch.nan, w @ torch.where(bad[:, None], 0.0, rows))


def _gradients(p: Problem, u: Tensor, w: Tensor, wanted: Wanted, dtype: torch.dtype) -> Gradients:
    """With y None, w_ij holds both roles of the unordered pair: dX is the total derivative, and scalars take one half."""
    a, (x, y) = p.scale.double(), _sides(p)
    u = torch.where(w == 0.0, 0.0, u)
    half = 0.5 if p.y is None else 1.0
    if p.operand == "dot":
        dx, dy = a * _weighed(w, y), a * _weighed(w.T, x)
    else:
        of_x, of_y = w.sum(1)[:, None], w.sum(0)[:, None]
        dx = 2.0 * a * (torch.where(of_x == 0.0, 0.0, of_x * x) - _weighed(w, y))
        dy = 2.0 * a * (torch.where(of_y == 0.0, 0.0, of_y * y) - _weighed(w.T, x))
    return Gradients(
        x=dx.to(dtype) if wanted.x else None,
        y=dy.to(dtype) if wanted.y else None,
        scale=(half * (w * u).sum()).to(p.dtype) if wanted.scale else None,
        shift=(half * w.sum()).to(p.dtype) if wanted.shift else None,
        bias_x=w.sum(1).to(p.dtype) if wanted.bias_x else None,
        bias_y=w.sum(0).to(p.dtype) if wanted.bias_y else None,
    )
