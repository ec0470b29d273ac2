"""Reductions that need no sweep over pairs, for every backend but the definition.

identity with sum, O(n d):       sum_j z_ij     = a <x_i, s> + b m + ...,                     s = sum_j y_j
square on dot, O(n d^2) (Gram):  sum_j z_ij^2   = a^2 x_i^T G x_i + 2ab <x_i, s> + b^2 m,     G = Y^T Y

The first adds up what the mask visits; the second takes all pairs, minus those of the diagonal. The Gram form is taken where it
is cheaper, forward + backward, n = m > 4d/3, and, where no device is waited for, unless a diagonal would take the digits with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..equation.problem import Gradients, Problem, Wanted
from ..precision import narrow_product, on_tensor_cores
from .row_dot import row_dot
from .sides import Sides, Sums, is_known, may_hold_nan
from .visits import Visits, parts, shifted

SHARE = 2.0  # the most that a row may have of the others' squared norms, times d: then its pair with itself costs two bits


def gram_is_cheaper(n: int, m: int, d: int) -> bool:
    """Whether two d x d matrices, products of n and of m rows, take less than the n x m pairs and their gradients."""
    return 3 * n * m > 2 * d * (n + m)


def squares_of(norm: Tensor) -> tuple[Tensor, Tensor]:
    """The largest |y_i|^2 and the sum of all, in float64; 0 of no rows."""
    wide = norm.double().flatten()
    return F.pad(wide, (0, 1)).amax().square(), wide.square().sum()


def balanced(largest: Tensor, total: Tensor, d: int) -> bool:
    """Whether a row's pair with itself can be taken out of what d x d matrices give: of what `squares_of` says.

    Where directions are spread the other pairs of row i are |x_i|^2 sum_{j != i} |y_j|^2 / d, and its own is |x_i|^2 |y_i|^2. Not
    of rows that are NaN, or whose norms are beyond the dtype.
    """
    return bool(largest * d <= SHARE * (total - largest)) and bool(total.isfinite())


def keeps_digits(p: Problem, squares: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether d x d matrices serve rows of these squared norms, those of `squares_of` of each side.

    They, and products with them, are to stay far from the ends of float32, and no row may be all that there is in them: neither
    could its pair with itself be taken out then, nor would rows that stand at a right angle to it keep a digit. Nor out of an
    infinite sum.
    """
    z = abs(float(p.scale.detach())) * math.prod(float(largest) for largest, _ in squares) ** (1.0 / len(squares))
    if not (z + abs(float(p.shift.detach()))) ** 2 * max(p.n, p.m) < 0.1 * torch.finfo(p.dtype).max:
        return False
    if p.dtype != torch.float64 and not all(bool((largest > 2.0**-60) & (largest < 2.0**60)) for largest, _ in squares):
        return False
    return all(balanced(*square, p.x.shape[1]) for square in squares)


def _as_right(p: Problem) -> bool:
    """Whether it keeps the digits of a sweep: asked of the rows where no device is waited for."""
    if not is_known(p.x):
        return True
    sides = (p.x,) if p.y is None else (p.x, p.y)
    norms = (torch.linalg.vector_norm(rows.detach(), dim=1, dtype=p.dtype) for rows in sides)
    return keeps_digits(p, list(map(squares_of, norms)))


def applies(p: Problem) -> bool:
    """Whether this problem has a closed form that is cheaper than a sweep, and as right."""
    if p.reduce != "sum" or p.mask.limited:
        return False
    if p.pair.name == "identity":
        return True
    plain = p.mask.kind in ("all", "off_diagonal") and not p.mask.period
    gram = p.pair.name == "square" and p.operand == "dot" and plain
    gram = gram and p.bias_x is None and p.bias_y is None and gram_is_cheaper(p.n, p.m, p.x.shape[1])
    return gram and _as_right(p)


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked."""
    form = _form(p)
    return form.rows(), form.columns() if p.columns else None


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>."""
    return _form(p).gradients(g, h, wanted).gradients(dtype or p.x.dtype)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """The sum of all rows (the only outer form that a sum has) and its gradients."""
    form = _form(p)
    value, sums = form.total(wanted)
    return value.to(p.dtype), sums.gradients(p.dtype), None


class Linear(Sides):
    """f = identity: everything is a sum of visited rows."""

    def __init__(self, p: Problem) -> None:
        super().__init__(p, in_unit=True)
        self.visits = Visits(p)

    @cached_property
    def weighed(self) -> tuple[Tensor, Tensor]:
        """x and y as gradients weigh them: 0 for a row of NaN that no pair visits."""
        x = _where_visited(self.x, self.y, self.visits.across)
        return x, x if self.symmetric else _where_visited(self.y, self.x, self.visits.back)

    def _along(self, back: bool, dtype: torch.dtype) -> Tensor:
        """The sums of x's rows, of y's with `back`."""
        p, visit = self.p, self.visits.back if back else self.visits.across
        rows = ((self.x, self.norm_x, p.bias_x), (self.y, self.norm_y, p.bias_y))
        (x, norm_x, own), (y, norm_y, other) = reversed(rows) if back else rows
        x, y = x.to(dtype), y.to(dtype)
        count = visit(y.new_ones(y.shape[0]))
        visited = self.visits.read(y, None, back)
        u = torch.cat([(x[part] * visited(part)).sum(1) for part in parts(x)] or [x.new_empty(0)])
        if norm_x is not None and norm_y is not None:
            u = count * norm_x + visit(norm_y.to(dtype)) - 2.0 * u
        if not is_known(u):  # which is in range where it may be looked at
            most = torch.finfo(dtype).max
            u = torch.where(self.scale == 0.0, u.clamp(-most, most), u)
        result = self.scale * u + p.shift * count
        if own is not None:
            result = result + own * count
        if other is not None:
            result = result + visit(other)
        return torch.where(count > 0.0, result, 0.0)  # whatever a row is that visits nothing

    def _in_range(self, back: bool) -> Tensor:
        """The same, in float64 where terms are beyond the dtype, since their sums may not be."""
        found = self._along(back, self.p.dtype)
        if found.dtype == torch.float64 or not is_known(found) or bool(found.isfinite().all()):
            return found
        return self._along(back, torch.float64)

    def rows(self) -> Tensor:
        return self._in_range(False).to(self.p.dtype)

    def columns(self) -> Tensor:
        return self._in_range(True).to(self.p.dtype)

    def total(self, wanted: Wanted) -> tuple[Tensor, Sums]:
        """The sum of all rows, and the four sums of its gradients."""
        return self._in_range(False).sum(dtype=torch.float64), self.gradients(self.x.new_ones(self.p.n), None, wanted)

    def gradients(self, g: Tensor, h: Tensor | None, wanted: Wanted) -> Sums:
        """W = M o (g 1^T + 1 h^T)."""
        sums, across, back = Sums(self, wanted), self.visits.across, self.visits.back
        if self.p.y is None:
            h = g
        ones_x, ones_y = self.x.new_ones(self.p.n), self.y.new_ones(self.p.m)
        if sums.wy is not None:
            self._weigh(sums.wy, self.y, g, h, False)
        if sums.wtx is not None and self.p.y is not None:
            self._weigh(sums.wtx, self.x, h, g, True)
        if sums.w_rows is not None:
            sums.w_rows.copy_(g * across(ones_y) if h is None else g * across(ones_y) + across(h))
        if sums.w_cols is not None and self.p.y is not None:
            sums.w_cols.copy_(back(g) if h is None else back(g) + h * back(ones_x))
        return sums

    def _weigh(self, out: Tensor, rows: Tensor, own: Tensor | None, others: Tensor | None, back: bool) -> None:
        """Add (M o (own 1^T + 1 others^T)) rows, of M^T with `back`."""
        for left, right in ((own, None), (None, others)):
            if left is None and right is None:
                continue
            visited = self.visits.read(rows, right, back)
            for part in parts(out):
                if left is None:
                    out[part] += visited(part)
                else:
                    out[part].addcmul_(left[part, None], visited(part))


def _where_visited(rows: Tensor, others: Tensor, visit: Callable[[Tensor], Tensor]) -> Tensor:
    if not is_known(rows) or not may_hold_nan(rows):
        return rows
    return torch.where(visit(others.new_ones(others.shape[0])).unsqueeze(1) > 0.0, rows, 0.0)


class Gram(Sides):
    """f = square on dot: everything goes through d x d matrices."""

    def __init__(self, p: Problem) -> None:
        self.narrow = on_tensor_cores(p.x)  # then rows are taken as they were given
        # float16 ends before a product of two leaves float32; bfloat16 does not, and keeps its digits in any unit.
        super().__init__(p, in_unit=not self.narrow or p.x.dtype == torch.bfloat16)
        self.given = [p.x, p.x if p.y is None else p.y]
        if self.narrow and self.units is not None:
            units = (torch.as_tensor(unit, dtype=p.x.dtype) for unit in self.units)
            self.given = [rows * unit for rows, unit in zip(self.given, units, strict=True)]
        self.offset = p.mask.row_offset - p.mask.col_offset
        self.diagonal = p.mask.kind == "off_diagonal"

    @cached_property
    def gram_y(self) -> Tensor:
        return self._moment(self.y)

    @cached_property
    def gram_x(self) -> Tensor:
        return self.gram_y if self.p.y is None else self._moment(self.x)

    def _given(self, rows: Tensor) -> Tensor:
        """x or y in the dtype that it was given in, where tensor cores multiply its 16-bit rows; else as it is."""
        if not self.narrow:
            return rows
        return self.given[0 if self.p.y is None or rows is self.x else 1]

    def _moment(self, rows: Tensor, weighted: Tensor | None = None) -> Tensor:
        """rows^T weighted, or rows^T rows."""
        given = self._given(rows)
        other = given if weighted is None else weighted
        return narrow_product(given.T, other) if self.narrow else given.T @ other

    def _times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """rows @ matrix, (d, d)."""
        given = self._given(rows)
        return narrow_product(given, matrix) if self.narrow else given @ matrix

    def _affine(self, row: Tensor, rows: Tensor, matrix: Tensor, out: Tensor) -> None:
        """out = rows @ matrix + row."""
        if self.narrow:
            torch.add(self._times(rows, matrix), row, out=out)
        else:
            torch.addmm(row, rows, matrix, out=out)

    @cached_property
    def sum_y(self) -> Tensor:
        return self.y.sum(0)

    @cached_property
    def sum_x(self) -> Tensor:
        return self.sum_y if self.p.y is None else self.x.sum(0)

    @cached_property
    def own_u(self) -> Tensor:
        """<x_i, y_i>"""
        return row_dot(self.x, self.y)

    @cached_property
    def own(self) -> Tensor:
        """z_ii"""
        return self.scale * self.own_u + self.p.shift

    def _moments(self) -> Tensor:
        """<G_x, G_y>, in float64.

        Of x with itself less what uniform directions have, t^2 / d of the trace t: the matrix product rounds each entry of the
        diagonal by eps of itself, and of near-uniform rows these are all that there is. The rows' own products say t.
        """
        gram_x, gram_y = self.gram_x.double(), self.gram_y.double()
        if self.p.y is not None or not self.d:
            return (gram_x * gram_y).sum()
        rest = gram_x - torch.diag(gram_x.diagonal().mean().expand(self.d))
        return self.own_u.sum(dtype=torch.float64).square() / self.d + rest.square().sum()

    def _left_out(self, x: Tensor, y: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """The partner y of each row on the left-out diagonal (0 where there is none), and its z (0 likewise)."""
        if offset == 0 and x.shape == y.shape:
            return y, self.own
        partner = shifted(y, x.shape[0], offset)
        z = self.scale * (x * partner).sum(1) + self.p.shift
        return partner, z * shifted(y.new_ones(y.shape[0]), x.shape[0], offset)

    def _along(self, x: Tensor, y: Tensor, gram_y: Tensor, offset: int) -> Tensor:
        a, b = self.scale, self.p.shift
        # Never a^2, which leaves the range where z does not: rows of 1e12 with a scale of 1e-24 have a z of 1.
        r = row_dot(self._times(x, a * gram_y), a * x) + 2.0 * b * (a * (x @ y.sum(0))) + b * b * y.shape[0]
        return r - self._left_out(x, y, offset)[1].square() if self.diagonal else r

    def rows(self) -> Tensor:
        return self._along(self.x, self.y, self.gram_y, self.offset)

    def columns(self) -> Tensor:
        return self._along(self.y, self.x, self.gram_x, -self.offset)

    def total(self, wanted: Wanted) -> tuple[Tensor, Sums]:
        """a^2 <G_x, G_y> + 2ab <s_x, s_y> + b^2 nm, less the diagonal's squares; and the four sums of its gradients."""
        a, b = self.scale.double(), self.p.shift.double()
        value = a * a * self._moments()
        value += 2.0 * a * b * (self.sum_x.double() * self.sum_y.double()).sum() + b * b * self.p.n * self.p.m
        if self.diagonal:
            value -= self._left_out(self.x, self.y, self.offset)[1].double().square().sum()
        sums = Sums(self, wanted, filled=False)
        # Both orders of a pair are visited where x meets itself.
        weight = 2.0 if self.p.y is not None else 4.0
        self._put(sums.wy, sums.w_rows, self.x, self.y, self.gram_y, self.sum_y, weight, self.offset)
        if self.p.y is not None:
            self._put(sums.wtx, sums.w_cols, self.y, self.x, self.gram_x, self.sum_x, weight, -self.offset)
        return value, sums

    def _put(
        self, wy: Tensor | None, ones: Tensor | None, x: Tensor, y: Tensor, gram_y: Tensor, s: Tensor, weight: float,
        offset: int,
    ) -> None:  # fmt: skip
        """W Y and W 1 for w_ij = weight z_ij; the other side's by an exchange of x and y."""
        if wy is None and ones is None:
            return
        a, b = self.scale, self.p.shift
        partner, z = self._left_out(x, y, offset) if self.diagonal else (y, y)
        if wy is not None:
            self._affine(weight * b * s, x, weight * a * gram_y, wy)
            if self.diagonal:
                wy.addcmul_(z[:, None], partner, value=-weight)
        if ones is not None:
            ones.copy_(weight * (a * (x @ s) + b * y.shape[0] - (z if self.diagonal else 0.0)))

    def _gather(
        self, x: Tensor, y: Tensor, gram_y: Tensor, g: Tensor | None, h: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor]:
        """W Y and W 1 for w_ij = 2 z_ij (g_i + h_j): also W^T X and W^T 1, with the two sides exchanged."""
        a, b = self.scale, self.p.shift
        partner, z = self._left_out(x, y, offset) if self.diagonal else (y, y)
        wy, ones = torch.zeros_like(x), x.new_zeros(x.shape[0])
        if g is not None:
            s = y.sum(0)
            self._affine(b * s, x, a * gram_y, wy)
            ones += g * (a * (x @ s) + b * y.shape[0])
            if self.diagonal:
                wy.addcmul_(z[:, None], partner, value=-1.0)
                ones -= g * z
            wy.mul_(g[:, None])
        if h is not None:
            hy = h[:, None] * y
            s = hy.sum(0)
            moment = a * self._moment(y, hy)
            (wy.add_(self._times(x, moment)) if self.narrow else wy.addmm_(x, moment)).add_(b * s)
            ones += a * (x @ s) + b * h.sum()
            if self.diagonal:
                z = z * shifted(h, x.shape[0], offset)
                wy.addcmul_(z[:, None], partner, value=-1.0)
                ones -= z
        return wy.mul_(2.0), ones.mul_(2.0)

    def gradients(self, g: Tensor, h: Tensor | None, wanted: Wanted) -> Sums:
        sums = Sums(self, wanted)
        h = g if self.p.y is None else h
        if sums.wy is not None or sums.w_rows is not None:
            self._keep((sums.wy, sums.w_rows), self._gather(self.x, self.y, self.gram_y, g, h, self.offset))
        if self.p.y is not None and (sums.wtx is not None or sums.w_cols is not None):
            self._keep((sums.wtx, sums.w_cols), self._gather(self.y, self.x, self.gram_x, h, g, -self.offset))
        return sums

    @staticmethod
    def _keep(wanted: tuple[Tensor | None, Tensor | None], found: tuple[Tensor, Tensor]) -> None:
        for into, value in zip(wanted, found, strict=True):
            if into is not None:
                into.copy_(value)


def _form(p: Problem) -> Linear | Gram:
    return Linear(p) if p.pair.name == "identity" else Gram(p)
