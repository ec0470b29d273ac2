"""The directional derivative of r and c, for every backend: one more sweep over blocks of rows, in plain PyTorch.

dz_ij = a du_ij + da u_ij + db + dbx_i + dby_j
du_ij = <dx_i, y_j> + <x_i, dy_j>                       (sqdist: 2 <x_i - y_j, dx_i - dy_j>)
dr_i  = sum_j w_ij dz_ij,   dc_j = sum_i w_ij dz_ij      w_ij = f'(z_ij); for logsumexp the softmax over j, and over i

Nothing is written in place, so that further transforms pass; a graph, where one asks for it, holds all blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..equation.problem import Problem
from . import reference

BLOCK = 1 << 22  # elements of a block of z


class _Side(NamedTuple):
    """Rows with their direction (None for 0), in the dtype of the sweep, and of both the part that sqdist needs."""

    x: Tensor
    dx: Tensor | None

    def squares(self) -> tuple[Tensor, Tensor | None]:
        """|x_i|^2 and its derivative."""
        return self.x.square().sum(1), None if self.dx is None else 2.0 * (self.x * self.dx).sum(1)


def rows(p: Problem, c: Tensor | None, directions: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """dr, and dc where c is given, for the directions of x, y, scale, shift, bias_x and bias_y; in float64 where there is any."""
    dtype = p.dtype if p.x.device.type == "mps" else torch.float64
    dx, dy, da, db, dbias_x, dbias_y = (None if t is None else t.to(dtype) for t in directions)
    x = p.x.to(dtype)
    y, dy = (x, dx) if p.y is None else (p.y.to(dtype), dy)
    if p.operand == "sqdist":
        centre = reference.centre(x, y)
        x, y = x - centre, y - centre
    # c itself is rounded to its dtype, beyond which exp(z - c) overflows: weights are relative to the largest z so far.
    top = x.new_full((p.m,), float("-inf"))
    others, step = torch.arange(p.m, device=x.device), max(1, BLOCK // max(1, p.m))
    found, weights, dc = [], x.new_zeros(p.m), x.new_zeros(p.m)
    for start in range(0, p.n, step):
        own = slice(start, min(p.n, start + step))
        u, du = _operand(p.operand, _Side(x[own], None if dx is None else dx[own]), _Side(y, dy))
        z, dz = p.scale.to(dtype) * u + p.shift.to(dtype), torch.zeros_like(u) if du is None else p.scale.to(dtype) * du
        for bias, direction, at in ((p.bias_x, dbias_x, (own, None)), (p.bias_y, dbias_y, (None, slice(None)))):
            z = z if bias is None else z + bias.to(dtype)[at]
            dz = dz if direction is None else dz + direction[at]
        dz = dz if da is None else dz + da * u
        dz = dz if db is None else dz + db
        z, keep = reference.within(p, z, torch.arange(own.start, own.stop, device=x.device), others)
        dz = dz if keep is None else torch.where(keep, dz, 0.0)
        if p.reduce == "sum":
            w = p.pair.df(z if keep is None else torch.where(keep, z, 1.0))
            found.append((w * dz).sum(1))
            dc = dc + (w * dz).sum(0)
            continue
        z = z if keep is None else torch.where(keep, z, float("-inf"))
        r = reference._reduce(p, z, keep, 1)
        w = torch.exp(z - torch.where(torch.isneginf(r), 0.0, r)[:, None])
        found.append(_mean((w * dz).sum(1), w.sum(1)))
        if c is not None:
            before, top = top, torch.maximum(top, z.detach().amax(0))
            level = torch.where(torch.isneginf(top), 0.0, top)
            w, shrunk = torch.exp(z - level), torch.exp(before - level)
            dc, weights = dc * shrunk + (w * dz).sum(0), weights * shrunk + w.sum(0)
    dr = torch.cat(found) if found else x.new_zeros(0)
    if c is None:
        return dr.to(p.dtype), None
    if p.reduce == "logsumexp":
        dc = _mean(dc, weights)
    return dr.to(p.dtype), dc.to(p.dtype)


def _mean(total: Tensor, weights: Tensor) -> Tensor:
    """Over the sum of weights, which is 1 but for the rounding of the log-sum-exp: beyond 1 / eps that takes them all."""
    return total / torch.where(weights > 0, weights, 1.0)


def _operand(operand: str, own: _Side, other: _Side) -> tuple[Tensor, Tensor | None]:
    """u and du of a block; None for 0."""
    u = own.x @ other.x.T
    du = None if own.dx is None else own.dx @ other.x.T
    if other.dx is not None:
        du = own.x @ other.dx.T if du is None else du + own.x @ other.dx.T
    if operand == "dot":
        return u, du
    (norm_x, dnorm_x), (norm_y, dnorm_y) = own.squares(), other.squares()
    u = (norm_x[:, None] + norm_y[None, :] - 2.0 * u).clamp(min=0.0)
    if du is not None:
        du = -2.0 * du
        du = du if dnorm_x is None else du + dnorm_x[:, None]
        du = du if dnorm_y is None else du + dnorm_y[None, :]
    return u, du
