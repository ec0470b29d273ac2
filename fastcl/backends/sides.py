"""What the backends in Python share: the two sides of a problem, and the gradients that follow from four sums.

W Y (n, d)   W^T X (m, d)   W 1 (n,)   W^T 1 (m,)
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from .. import transforms
from ..equation.masks import Mask
from ..equation.problem import Gradients, Problem, Wanted
from . import units
from .reference import centre


class Sides:
    """x and y as they are multiplied; for sqdist both minus a common centre, with their squared norms.

    |x - y|^2 from norms and products would lose what the rows have in common. Rows of 16 bits stay so where their products are
    exact in float32; everything else is in the accumulation dtype.
    """

    def __init__(self, p: Problem, dtype: torch.dtype | None = None, in_unit: bool = False) -> None:
        """dtype: that of the rows, the accumulation dtype unless told; in_unit: whether rows are brought to units."""
        self.p, self.symmetric = p, p.y is None
        self.n, self.m, self.d = p.n, p.m, p.x.shape[1]
        dtype = dtype or p.dtype
        x = p.x.to(dtype)
        y = x if p.y is None else p.y.to(dtype)
        if p.operand == "sqdist" and self.m:
            middle = centre(x, y) if dtype == p.dtype else _exact_centre(x, y)
            x, y = x - middle, y if p.y is None else y - middle
        self.units: units.Units | None = None
        self.scale = p.scale
        # u may leave the range where z does not: rows of 1e20 with a scale of 1e-37.
        known = in_unit and all(map(is_known, (p.scale, x, y)))
        if in_unit:
            self.units = units.of_rows(p, x, y) if known else units.of_scale(p.scale)
        self._place(x, y)
        if known and self.units is None and not self._fits():
            self.units = units.of_rows(p, x, y, usual=False)
            self._place(x, y)
        self.guides: tuple[Tensor, Tensor] | None = None
        self.marks_limited = False  # whether, where there are limits, the backend itself makes the weight of a z of NaN NaN
        if p.mask.limited:
            self._mark_limits()

    def _place(self, x: Tensor, y: Tensor) -> None:
        """The rows in their units, with what follows from them."""
        if self.units is not None:
            self.scale = units.without(self.p.scale, self.units)
            x, y = x * self.units[0], y if self.symmetric else y * self.units[1]
        self.x = _multipliable(x)
        self.y = self.x if self.symmetric else _multipliable(y)
        self.norm_x = self.norm_y = None
        if self.p.operand == "sqdist":
            self.norm_x = _squared_norms(self.x, self.p.dtype)
            self.norm_y = self.norm_x if self.symmetric else _squared_norms(self.y, self.p.dtype)

    def _fits(self) -> bool:
        """Whether u is within the dtype: |x - y|^2 wherever the squared norms are, a dot product by the largest elements. Sums of
        dot products are of rows alone, which are summed in float64 where that tells."""
        if self.p.operand == "dot":
            if self.p.reduce == "sum" and self.p.pair.name == "identity":
                return True
            bound = self.d * math.prod(map(units.largest, (self.x, self.y)))
            return bound < torch.finfo(self.p.dtype).max / 8.0
        norms = [norm for norm in (self.norm_x, self.norm_y) if norm is not None]
        return all(bool((norm < torch.finfo(norm.dtype).max / 8.0).all()) for norm in norms)

    def _mark_limits(self) -> None:
        """Rows are NaN where their limit is: of what it has a say in, nothing is known."""
        of_rows, of_cols = self.p.limits
        self.guides = self.p.guides
        if of_rows is not None:
            self.x = torch.where(torch.isnan(of_rows)[:, None], of_rows[:, None].to(self.x.dtype), self.x)
        if self.symmetric:
            self.y = self.x
        elif of_cols is not None:
            self.y = torch.where(torch.isnan(of_cols)[:, None], of_cols[:, None].to(self.y.dtype), self.y)

    @cached_property
    def weighed(self) -> tuple[Tensor, Tensor]:
        """x and y as gradients weigh them: 0 where a weight of 0, of a pair that is left out, would meet NaN.

        Those that do meet the row have a weight of NaN. Asked of the values where no device is waited for; elsewhere NaN reaches
        all gradients that share a product with it.
        """
        p = self.p
        if not ((p.mask.kind != "all" or p.mask.limited) and is_known(p.scale) and (p.marks_nan or self.marks_limited)):
            return self.x, self.y
        x = _apart(self.x)
        return x, x if self.symmetric else _apart(self.y)

    def vectors(self, swapped: bool = False, mask: Mask | None = None) -> tuple[Tensor | None, ...]:
        """Norms of x and of y, biases, groups, as kernels read them: dense. swapped: with the roles of x and y exchanged."""
        p, mask = self.p, mask or self.p.mask
        group_y = mask.group_x if mask.group_y is None else mask.group_y
        pairs = ((self.norm_x, self.norm_y), (p.bias_x, p.bias_y), (mask.group_x, group_y))
        given = [v for pair in pairs for v in (reversed(pair) if swapped else pair)]
        return tuple(None if v is None else v.contiguous() for v in given)


class Sums:
    """The four sums, those that the wanted gradients need, and the gradients.

    With x itself W^T X is W Y and W^T 1 is W 1: each pair is gathered in both of its roles.
    """

    def __init__(self, sides: Sides, wanted: Wanted, width: int | None = None, filled: bool = True) -> None:
        """width: that of the rows in memory, d unless told; filled: whether W Y and W^T X begin with zeros."""
        self.sides, self.wanted = sides, wanted
        zeros = sides.p.scale.new_zeros
        new = zeros if filled else sides.p.scale.new_empty
        sqdist, width = sides.p.operand == "sqdist", width or sides.d
        wy = wanted.x or (wanted.scale and not wanted.y)
        ones = wanted.shift or wanted.bias_x or (sqdist and (wanted.x or wanted.scale))
        self.wy = new((sides.n, width))[:, : sides.d] if wy else None
        self.w_rows = zeros(sides.n) if ones else None
        self.wtx, self.w_cols = self.wy, self.w_rows
        if not sides.symmetric:
            ones = wanted.bias_y or (sqdist and (wanted.y or wanted.scale))
            self.wtx = new((sides.m, width))[:, : sides.d] if wanted.y else None
            self.w_cols = zeros(sides.m) if ones else None

    def scale_(self, factor: Tensor) -> None:
        """Multiply all that was gathered so far."""
        gathered = (self.wy, self.w_rows) if self.sides.symmetric else (self.wy, self.w_rows, self.wtx, self.w_cols)
        for sums in gathered:
            if sums is not None:
                sums.mul_(factor)

    def gradients(self, dtype: torch.dtype, unit: Tensor | None = None) -> Gradients:
        """Read reference.py's header: the same four sums, the same formulas, dX and dY formed in place.

        The gathered weights are in `unit`. With x itself each pair was gathered twice, and what is no row takes one half.
        """
        if unit is not None:
            self.scale_(unit)
        s, wanted = self.sides, self.wanted
        half = 0.5 if s.symmetric else 1.0
        da = half * self._scale_gradient() if wanted.scale else None  # before the sums are overwritten
        db = half * self.w_rows.sum() if wanted.shift and self.w_rows is not None else None
        return Gradients(
            x=self._finish(self.wy, self.w_rows, 0, dtype) if wanted.x else None,
            y=self._finish(self.wtx, self.w_cols, 1, dtype) if wanted.y else None,
            scale=da,
            shift=db,
            bias_x=self.w_rows if wanted.bias_x else None,
            bias_y=self.w_cols if wanted.bias_y else None,
        )

    def _scale_gradient(self) -> Tensor:
        """<W, U> without U: <x, W Y> row by row, and the norms that go with it."""
        s = self.sides
        x, y = s.weighed
        rows, sums = (x, self.wy) if self.wy is not None else (y, self.wtx)
        assert sums is not None
        found = (rows * sums).sum()
        if is_known(found) and not bool(found.isfinite()):  # of terms beyond the dtype, whose sum may not be
            found = _weighed(sums.double(), rows.double())
        if s.norm_x is not None and s.norm_y is not None:
            assert self.w_rows is not None and self.w_cols is not None
            norms = sum(_weighed(w, n) for w, n in ((self.w_rows, s.norm_x), (self.w_cols, s.norm_y)))
            found = norms - 2.0 * found
        return (found if s.units is None else units.without(found, s.units)).to(sums.dtype)

    def _finish(self, sums: Tensor | None, weights: Tensor | None, side: int, dtype: torch.dtype) -> Tensor:
        """a W Y, or 2a (diag(W 1) X - W Y); of the other side a W^T X, ..."""
        assert sums is not None
        s = self.sides
        if s.p.operand == "sqdist":
            assert weights is not None
            sums.addcmul_(weights[:, None], s.weighed[side], value=-1.0).mul_(-2.0)
        return sums.mul_(s.p.scale if s.units is None else s.p.scale / s.units[1 - side]).to(dtype)


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    """<w, v>, of which nothing that no pair visits is part: a row or a squared norm may be infinite or NaN there."""
    return torch.where(weights == 0.0, 0.0, weights * values).sum()


def _apart(rows: Tensor) -> Tensor:
    """The rows themselves, or with 0 in place of those that hold a NaN."""
    if not may_hold_nan(rows):
        return rows
    return torch.where(rows.isnan().any(1, keepdim=True), 0.0, rows)


def may_hold_nan(rows: Tensor) -> bool:
    """Whether one may, from one sum: also where there are infinities of both signs, or rows whose sums are."""
    return bool(rows.sum().isnan())


def is_known(values: Tensor) -> bool:
    """Whether they may be looked at: no device is waited for."""
    return values.device.type == "cpu" and transforms.values_are_stored(values)


def _exact_centre(x: Tensor, y: Tensor) -> Tensor:
    """The centre of rows of 16 bits, and 0 in the columns where that would round a row.

    A row within a factor of two of the centre loses nothing (Sterbenz), and only a cloud that is far from the origin for its
    size needs it. A rounded row would be off by 2^-9 of itself, which no centre is worth. A row that is not finite has no say.
    """
    middle = centre(x, y)
    exact = torch.ones_like(middle, dtype=torch.bool)
    for rows in (x,) if x is y else (x, y):
        difference = rows.float() - middle.float()
        exact &= (((rows - middle).float() == difference) | ~difference.isfinite()).all(0)
    return torch.where(exact, middle, 0.0)


def _multipliable(rows: Tensor) -> Tensor:
    """The rows themselves where they or their columns are unit-strided, as matrix products take them; otherwise a copy."""
    return rows if 1 in rows.stride() else rows.contiguous()


def _squared_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()
