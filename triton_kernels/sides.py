"""The two sides of a problem as the kernels multiply them, and the gradients that follow from four sums.

    W Y (n, d)   W^T X (m, d)   W 1 (n,)   W^T 1 (m,)

Half-precision operands stay 16 bits wide: their products are exact in float32. For sqdist both sides are taken about a common
centre, as pair_reduce promises: |x - y|^2 from norms and products loses what they have in common.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted

# Weights are stored as float16 with their largest near 2^12: four bits of room above it for the sum of two roles and for
# a bound that rounding passes, 26 below it before the smallest subnormal.
_FLOAT16_TOP = 2.0**-12


class Sides:
    """x and y as matrices, their squared norms for sqdist, and the sizes that every kernel takes."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.n, self.m, self.d = p.n, p.m, p.x.shape[1]
        self.symmetric = p.y is None
        x, y = p.x, p.x if p.y is None else p.y
        self.norm_x = self.norm_y = None
        if p.operand == "sqdist":
            if self.m:
                centre = y.mean(0) if x.dtype == torch.float32 else _exact_centre(x, y)
                x, y = x - centre, y - centre
            self.norm_x = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square()
            self.norm_y = self.norm_x
        self.x, self.y = x, x if p.y is None else y
        if p.operand == "sqdist" and not self.symmetric:
            self.norm_y = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32).square()

    @property
    def diff(self) -> int:
        """row_offset - col_offset, clamped to what can meet: n and m are below 2^31."""
        bound = 2**31 - 1
        return max(-bound, min(bound, self.p.mask.row_offset - self.p.mask.col_offset))

    def far(self) -> Tensor:
        """(the largest norm of x, of y, the largest bx + by): what bounds every logit, by Cauchy and Schwarz."""
        largest = [_largest_norm(self.x, self.norm_x), _largest_norm(self.y, self.norm_y)]
        bias = torch.zeros_like(largest[0])
        for each in (self.p.bias_x, self.p.bias_y):
            bias = bias if each is None else bias + each.amax()
        return torch.stack((*largest, bias))

    @property
    def groups(self) -> tuple[Tensor | None, Tensor | None]:
        mask = self.p.mask
        return mask.group_x, mask.group_x if mask.group_y is None else mask.group_y


class Sums:
    """The four sums, those that the wanted gradients need, and the gradients."""

    def __init__(self, sides: Sides, wanted: Wanted, width: int | None = None) -> None:
        """width: that of the rows in memory, d unless told."""
        self.sides, self.wanted = sides, wanted
        new = sides.p.scale.new_zeros
        sqdist = sides.p.operand == "sqdist"
        self.needs_wy = wanted.x or (wanted.scale and not wanted.y)
        self.needs_wtx = wanted.y and not sides.symmetric
        self.needs_rows = wanted.shift or wanted.bias_x or (sqdist and (wanted.x or wanted.scale))
        self.needs_cols = not sides.symmetric and (wanted.bias_y or (sqdist and (wanted.y or wanted.scale)))
        width = width or sides.d
        self.wy = new((sides.n, width))[:, : sides.d] if self.needs_wy else None
        self.wtx = new((sides.m, width))[:, : sides.d] if self.needs_wtx else None
        self.w_rows = new(sides.n) if self.needs_rows else None
        self.w_cols = new(sides.m) if self.needs_cols else None

    @property
    def gathered(self) -> list[Tensor]:
        return [s for s in (self.wy, self.wtx, self.w_rows, self.w_cols) if s is not None]

    def scale_(self, factor: Tensor) -> None:
        """Multiply all that was gathered so far."""
        for sums in self.gathered:
            sums.mul_(factor)

    def gradients(self, dtype: torch.dtype, unit: Tensor | None = None) -> Gradients:
        """The gradients by the formulas of the catalogue; the gathered weights are in `unit`."""
        if unit is not None:
            self.scale_(unit)
        s, wanted = self.sides, self.wanted
        half = 0.5 if s.symmetric else 1.0  # with x itself each pair was gathered in both of its roles
        return Gradients(
            scale=half * self._scale_gradient() if wanted.scale else None,
            shift=half * self.w_rows.sum() if wanted.shift and self.w_rows is not None else None,
            x=self._finish(self.wy, self.w_rows, s.x, dtype) if wanted.x else None,
            y=self._finish(self.wtx, self.w_cols, s.y, dtype) if wanted.y else None,
            bias_x=self.w_rows if wanted.bias_x else None,
            bias_y=self.w_cols if wanted.bias_y else None,
        )

    def _scale_gradient(self) -> Tensor:
        """<W, U> without U: <x, W Y> row by row, and the norms that go with it."""
        s = self.sides
        rows, sums = (s.x, self.wy) if self.wy is not None else (s.y, self.wtx)
        assert sums is not None
        inner = (rows * sums).sum()
        if s.p.operand == "dot":
            return inner
        w_cols = self.w_rows if s.symmetric else self.w_cols
        assert self.w_rows is not None and w_cols is not None and s.norm_x is not None and s.norm_y is not None
        return self.w_rows @ s.norm_x + w_cols @ s.norm_y - 2.0 * inner

    def _finish(self, sums: Tensor | None, weights: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """a W Y, or 2a (diag(W 1) X - W Y); a sum of the other role is not needed again, but W Y is by the scale."""
        assert sums is not None
        if self.sides.p.operand == "sqdist":
            assert weights is not None
            sums = (rows * weights[:, None]).sub_(sums).mul_(2.0)
        return (sums * self.sides.p.scale).to(dtype)


def _exact_centre(x: Tensor, y: Tensor) -> Tensor:
    """The mean of y in 16 bits, and 0 in the columns where that would round a row.

    A row within a factor of two of the mean loses nothing (Sterbenz), and only a cloud that is far from the origin for its
    size needs the centre. A rounded row would be off by 2^-9 of itself, which no centre is worth.
    """
    centre = y.mean(0, dtype=torch.float32).to(y.dtype)
    exact = torch.ones_like(centre, dtype=torch.bool)
    for rows in (x,) if x is y else (x, y):
        exact &= ((rows - centre).float() == rows.float() - centre.float()).all(0)
    return torch.where(exact, centre, 0.0)


def _largest_norm(rows: Tensor, squared: Tensor | None) -> Tensor:
    if squared is not None:
        return squared.amax().sqrt()
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).amax()


def contiguous_rows(t: Tensor) -> Tensor:
    """t itself where its rows or its columns are unit-strided, as matrix products take it; otherwise a copy."""
    return t if 1 in t.stride() else t.contiguous()


def weight_unit(p: Problem, g: Tensor, h: Tensor | None) -> Tensor | None:
    """What the float16 weights of a log-sum-exp are divided by, so that they neither overflow nor vanish; None for others.

    Such a weight is at most max |g| + max |h|: no softmax passes 1. No bound serves a sum, whose slope may be of any size far
    from every pair; its unit is the largest weight of each tile (strip.py).
    """
    if p.x.dtype != torch.float16 or p.reduce == "sum" or p.n == 0 or p.m == 0:
        return None
    top = g.abs().amax() + (h.abs().amax() if h is not None else 0.0)
    return (top * _FLOAT16_TOP).clamp(1e-30, 1e30).nan_to_num(1.0)
