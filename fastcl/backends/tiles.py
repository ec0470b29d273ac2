"""The schedule of the backends that go tile by tile, written once: who brings the operations on a tile, brings nothing else.

    product(tile)   the dot products of its rows and columns, in a bounded workspace
    reduce(tile)    parts of r and c
    weigh(tile)     W in the rows' dtype, with parts of W 1, of W^T 1 and of the sum of f
    join(parts)     parts added to a running reduction

A sum knows its weights at once, and a tile as wide as the matrix knows its rows' normalisers: there value and gradients come
from one sweep, 3 products of 2 n m d flops instead of 4. With x itself only the tiles on and right of the diagonal are formed,
and those on its right are gathered in both roles of their pairs: half of each. Deterministic, and no value is read on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted
from ..equation.reductions import merge
from .products import add_product, mirror_, product
from .reference import outer_form
from .sides import Sides, Sums, is_known
from .workspace import default_workspace, workspace

# Beyond this side a tile's products gain nothing: W Y of 8192 x 512 already fills an H100 with blocks of 128 x 256.
LARGEST_SIDE = 8192
# The float16 weights of a log-sum-exp have their largest near 2^12: four bits of room above it for the sum of two roles and for
# a bound that rounding passes, 26 below it before the smallest subnormal.
FLOAT16_TOP = 2.0**-12


class Tile(NamedTuple):
    """Rows [i0, i1) against columns [j0, j1): their dot products, and room for their weights, which may be the same memory.

    guided: the products of their guides, where limits are on these.
    """

    i0: int
    i1: int
    j0: int
    j1: int
    dot: Tensor
    weights: Tensor
    guided: Tensor | None = None

    @property
    def rows(self) -> slice:
        return slice(self.i0, self.i1)

    @property
    def cols(self) -> slice:
        return slice(self.j0, self.j1)


class State(NamedTuple):
    """A running reduction of the rows or of the columns: a sum, or the top and the sum of a log-sum-exp.

    Its parts are (planes, count, size) tensors: that many results for each index, planes (top, sum) or the sum alone.
    """

    sum: Tensor
    top: Tensor | None = None

    @classmethod
    def of(cls, p: Problem, size: int) -> State:
        """Nothing yet."""
        return cls(p.scale.new_zeros(size), p.scale.new_full((size,), -math.inf) if p.reduce == "logsumexp" else None)

    def at(self, start: int, size: int) -> State:
        """Those of a range."""
        here = slice(start, start + size)
        return State(self.sum[here], None if self.top is None else self.top[here])

    def result(self) -> Tensor:
        return self.sum if self.top is None else self.top + torch.log(self.sum)

    def rounding(self, given: Tensor) -> Tensor:
        """What a log-sum-exp that was given is above the exact one, where it is this one, rounded; 0 elsewhere."""
        assert self.top is not None
        exact = self.top.double() + torch.log(self.sum.double())
        above = (given.double() - exact).nan_to_num(0.0, 0.0, 0.0)
        return torch.where(self.result() == given, above, 0.0).to(given.dtype)


class Weighting(NamedTuple):
    """What turns a tile into weights: upstream gradients of rows and columns, and the normalisers of a log-sum-exp.

    reference: what a backend brings r and c to where they lie close together.
    """

    g: Tensor | None
    h: Tensor | None
    r: Tensor | None = None
    c: Tensor | None = None
    reference: Tensor | None = None

    def swapped(self) -> Weighting:
        """The same weights seen from the other side."""
        return Weighting(self.h, self.g, self.c, self.r, self.reference)


@contextmanager
def plain(p: Problem, least_period: int) -> Iterator[Problem]:
    """The problem as kernels on a GPU take it, on the device of x, without autograd and autocast: float32 sums stay that.

    least_period: of a mask of which the kernels look for the nearest diagonal; where they lie closer together groups say the same.
    """
    on_device = torch.cuda.device(p.x.device) if p.x.is_cuda else nullcontext()
    with torch.no_grad(), torch.autocast(p.x.device.type, enabled=False), on_device:
        yield p.told_by_groups() if p.mask.period < least_period else p


def weighting(p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, unit: Tensor | None) -> Weighting:
    """The weighting of <g, r> + <h, c>, in `unit`; with x itself both roles are one vector."""
    if p.y is None:
        c, h = r, g
    if unit is not None:
        g, h = g / unit, None if h is None else h / unit
    # Autograd hands expanded vectors on; the kernels read one element of p.dtype after the other.
    r, c, g, h = (None if v is None else v.to(p.dtype).contiguous() for v in (r, c, g, h))  # type: ignore[assignment]
    return Weighting(g, h) if p.reduce == "sum" else Weighting(g, h, r, c if h is not None else None)


def weight_unit(p: Problem, g: Tensor, h: Tensor | None) -> Tensor | None:
    """What the float16 weights of a log-sum-exp are divided by, so that they neither overflow nor vanish; None for others.

    Such a weight is at most max |g| + max |h|: no softmax passes 1. No bound serves a sum, whose slope may be of any size far
    from every pair; its unit is the largest weight of each tile (Tiles.rounded).
    """
    if p.x.dtype != torch.float16 or p.reduce == "sum" or p.n == 0 or p.m == 0:
        return None
    top = g.abs().amax() + (h.abs().amax() if h is not None else 0.0)
    return (top * FLOAT16_TOP).clamp(1e-30, 1e30).nan_to_num(1.0)


def unit_of(largest: Tensor) -> Tensor:
    """The unit of float16 weights of which this is the largest: 2^14 then, 38 bits over the smallest subnormal."""
    return largest.mul_(2.0**-14).clamp_(1e-30, 1e30).nan_to_num_(1.0)


class Tiles:
    """The tiles of one problem, one after the other in one workspace, and what follows on each."""

    align = 16  # elements of which the rows of a tile are a multiple in memory: 16 bytes of any dtype
    most_rows = most_cols = 1 << 62  # of a tile, by the grids of the kernels
    rows_in_unit = False  # whether rows are brought to units; of a product where no copy is made for nothing
    one_sweep_rows = 2048  # with fewer a tile as wide as the matrix makes products that cost more than a second sweep

    def __init__(self, p: Problem, dtype: torch.dtype | None = None) -> None:
        """dtype: that of the rows and of the weights, the accumulation dtype unless told."""
        self.p, self.sides = p, Sides(p, dtype, in_unit=self.rows_in_unit and (p.operand == "sqdist" or is_known(p.scale)))
        # The float16 weights of a sum: exact ones take the place of the dot products, and are rounded when the largest is known.
        self.in_units = self.sides.x.dtype == torch.float16 and p.reduce == "sum"
        self.dot = self.weights = self.guided = p.scale.new_empty(0)

    # ---- what a backend brings

    def product(self, tile: Tile) -> None:
        """The dot products of the tile, in its place."""
        product(self.sides.x[tile.rows], self.sides.y[tile.cols].T, tile.dot)
        if self.p.mask.limited and tile.guided is None and not self.has_own_columns(tile):
            mirror_(tile.dot)

    def reduce(self, tile: Tile, columns: bool) -> tuple[Tensor, Tensor | None]:
        """The parts of its rows, and of its columns where asked."""
        raise NotImplementedError

    def weigh(
        self, tile: Tile, by: Weighting | None, rows: bool, cols: bool, value: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Its weights, exact where self.in_units; and the parts of W 1, of W^T 1, and of the rows' sums of f where asked.

        by None: the weights of the sum of all r.
        """
        raise NotImplementedError

    def join(self, parts: Tensor, state: State, factor: float = 1.0) -> None:
        """Join the parts, a sum's times a factor, to a running reduction."""
        raise NotImplementedError

    def prepared(self, by: Weighting) -> Weighting:
        """The weighting as `weigh` reads it."""
        return by

    def held(self, g: Tensor, state: State, normaliser: Tensor) -> Tensor:
        """The upstream gradient of rows whose normaliser is this state's, rounded; what rounds makes weights larger or smaller."""
        return g

    # ---- what those with kernels share

    @cached_property
    def ones(self) -> Weighting:
        """The weighting of the sum of all r."""
        ones = self.p.scale.new_ones(self.p.n)
        return Weighting(ones, ones if self.sides.symmetric else None)

    def parts(
        self, tile: Tile, block_rows: int, block_cols: int, rows: bool, cols: bool, planes: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        """Room for the parts of a tile's rows and columns, where asked: one of each block."""
        n, m = tile.dot.shape
        new = self.p.scale.new_empty
        return (
            new((planes, -(-m // block_cols), n)) if rows else None,
            new((planes, -(-n // block_rows), m)) if cols else None,
        )

    # ---- the workspace

    @property
    def element_bytes(self) -> int:
        """Dot products, those of guides, and weights beside them unless they can take their place."""
        dots, rows = self.p.dtype.itemsize, self.sides.x.dtype
        return dots + (dots if self.p.mask.guided else 0) + (0 if rows == self.p.dtype else rows.itemsize)

    def default_workspace(self) -> int:
        return default_workspace(self.p)

    def padded(self, cols: int) -> int:
        return max(self.align, -(-cols // self.align) * self.align)

    def whole(self, side: int) -> int:
        """A side of whole blocks of a matrix product, or of vectors where it is too short for that."""
        return max(self.align, side // 1024 * 1024 or side // self.align * self.align)

    def shape(self, full_width: bool = False) -> tuple[int, int]:
        """Rows and columns of a tile that fits the workspace, and its blocks a grid."""
        n, m, elements = (
            max(1, self.sides.n),
            max(1, self.sides.m),
            workspace(self.default_workspace()) // self.element_bytes,
        )
        if not full_width:
            elements = min(elements, LARGEST_SIDE**2)
            side = self.whole(math.isqrt(elements))
            if self.sides.symmetric:
                return side, side
            rows = min(n, side)
            cols = min(self.most_cols, self.whole(elements // rows))
            if m >= cols:
                return rows, cols
        return max(1, min(n, elements // self.padded(m), self.most_rows)), m

    def fits_full_width(self) -> bool:
        """Whether tiles as wide as the matrix have enough rows."""
        rows, (height, m) = min(self.sides.n, self.one_sweep_rows), self.shape(full_width=True)
        return (
            m <= self.most_cols
            and height >= rows
            and self.padded(m) * rows * self.element_bytes <= workspace(self.default_workspace())
        )

    def sweep(self, full_width: bool = False) -> Iterator[Tile]:
        """Every tile that is formed, in order; each overwrites the one before."""
        s, (height, width) = self.sides, self.shape(full_width)
        elements = min(height, s.n) * self.padded(min(width, s.m))
        if self.dot.numel() < elements:
            self.dot = self.weights = self.p.scale.new_empty(elements)
            if s.x.dtype != self.p.dtype:
                self.weights = s.x.new_empty(elements)
            if s.guides is not None:
                self.guided = self.p.scale.new_empty(elements)
        for i0 in range(0, s.n, height):
            i1 = min(s.n, i0 + height)
            for j0 in range(i0 if s.symmetric else 0, s.m, width):
                j1 = min(s.m, j0 + width)
                tile = Tile(i0, i1, j0, j1, *(self.matrix(each, i1 - i0, j1 - j0) for each in (self.dot, self.weights)))
                if s.guides is not None:
                    tile = tile._replace(guided=self.matrix(self.guided, i1 - i0, j1 - j0))
                    self.guide(tile, *s.guides)
                self.product(tile)
                yield tile

    def guide(self, tile: Tile, of_rows: Tensor, of_cols: Tensor) -> None:
        """The products of the tile's guides, in their place."""
        assert tile.guided is not None
        product(of_rows[tile.rows], of_cols[tile.cols].T, tile.guided)
        if not self.has_own_columns(tile):
            mirror_(tile.guided)

    def matrix(self, workspace: Tensor, rows: int, cols: int) -> Tensor:
        return workspace.as_strided((rows, cols), (self.padded(cols), 1))

    def has_own_columns(self, tile: Tile) -> bool:
        """Whether its columns are gathered too: with x itself a tile on the diagonal has both orders of its pairs as rows."""
        return not (self.sides.symmetric and tile.i0 == tile.j0)

    # ---- rows, gradients, totals

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """r, and c when asked, in one sweep."""
        r, c = self.states(self.p.columns)
        result = r.result()
        return result, None if not self.p.columns else result if c is None or c is r else c.result()

    def states(self, columns: bool) -> tuple[State, State | None]:
        """The reductions of rows and, where asked or both are one, of columns, in one sweep."""
        p = self.p
        r = State.of(p, p.n)
        c = r if p.y is None else State.of(p, p.m) if columns else None
        for tile in self.sweep():
            self.add_reductions(tile, r, c if self.has_own_columns(tile) else None)
        return r, c

    def gradients(
        self, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
    ) -> Gradients:
        """The gradients of <g, r> + <h, c>, in one sweep that forms the dot products again; dx and dy in `dtype`, that of x."""
        p, sums, unit = self.p, Sums(self.sides, wanted), None
        if any(wanted) and p.n and p.m:
            unit = weight_unit(p, g, h if p.y is not None else g)
            by = self.prepared(weighting(p, r, c, g, h, unit))
            for tile in self.sweep():
                self.add_weights(tile, by, sums)
        return sums.gradients(dtype or p.x.dtype, unit)

    def total(self, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
        """Value and gradients of the total form: one sweep where weights are known in time, two otherwise."""
        p = self.p
        if any(wanted) and p.n and p.m:
            if p.reduce == "sum":
                return self._sum_in_one_sweep(wanted)
            if p.y is not None and self.fits_full_width():
                return self._rows_in_one_sweep(positive, outer, wanted)
        return from_rows(p, self.rows()[0], positive, outer, wanted, self.gradients)

    def _sum_in_one_sweep(self, wanted: Wanted) -> tuple[Tensor, Gradients, None]:
        p, sums = self.p, Sums(self.sides, wanted)
        r = State.of(p, p.n)
        for tile in self.sweep():
            self.add_weights(tile, None, sums, value=r)
        return r.sum.sum(dtype=torch.float64).to(p.dtype), sums.gradients(p.dtype), None

    def _rows_in_one_sweep(
        self, positive: Tensor | None, outer: str, wanted: Wanted
    ) -> tuple[Tensor, Gradients, Tensor | None]:
        """Tiles as wide as the matrix: their rows are reduced, the upstream gradient formed, and z turned into weights."""
        p, sums = self.p, Sums(self.sides, wanted)
        value = p.scale.new_full((), -math.inf if outer == "pooled" else 0.0, dtype=torch.float64)
        dpositive = None if positive is None else torch.zeros_like(positive, dtype=p.dtype)
        normaliser, upstream = p.scale.new_zeros(p.n), p.scale.new_empty(p.n)
        state = State.of(p, p.n)
        for tile in self.sweep(full_width=True):
            here = tile.rows
            self.add_reductions(tile, state, None)
            normaliser[here] = state.at(tile.i0, tile.i1 - tile.i0).result()
            own = normaliser[here].double()
            part, g, dp = outer_form(outer, own, None if positive is None else positive[here].double())
            if dpositive is not None and dp is not None:
                dpositive[here] = dp
            before, value = value, merge(value, part) if outer == "pooled" else value + part
            if outer == "pooled":
                # g is relative to the tile: bring it, and all that was gathered, to the running log-sum-exp.
                finite = torch.where(torch.isneginf(value), 0.0, value)
                g = torch.exp(own - finite)
                sums.scale_(torch.exp(before - finite).to(p.dtype))
            upstream[here] = self.held(g, state.at(tile.i0, tile.i1 - tile.i0), normaliser[here])
            # Of the tile's own g: rows far below their positives have sigmoids that a unit for all would end.
            unit = weight_unit(p, upstream[here], None)
            self.add_weights(tile, self.prepared(weighting(p, normaliser, None, upstream, None, unit)), sums, unit=unit)
        return value.to(p.dtype), sums.gradients(p.dtype), dpositive

    # ---- a tile's part of what runs

    def add_reductions(self, tile: Tile, r: State, c: State | None) -> None:
        """Join the tile's reductions to those of its rows and columns."""
        row_parts, col_parts = self.reduce(tile, c is not None)
        self.join(row_parts, r.at(tile.i0, tile.i1 - tile.i0))
        if c is not None and col_parts is not None:
            self.join(col_parts, c.at(tile.j0, tile.j1 - tile.j0))

    def add_weights(
        self, tile: Tile, by: Weighting | None, sums: Sums, value: State | None = None, unit: Tensor | None = None
    ) -> None:
        """Turn the tile into weights and add its part to the four sums, and the row sums of f to `value`.

        unit: that of the weights, where the sums are in another: in 1.
        """
        own = self.has_own_columns(tile)
        w_rows, w_cols, wtx = sums.w_rows, sums.w_cols if own else None, sums.wtx if own else None
        # diag(W 1) X - W Y cancels: both terms take the same rounded weights.
        rounded_sums = self.in_units and self.p.operand == "sqdist"
        rows, cols = (into is not None and not rounded_sums for into in (w_rows, w_cols))
        w, row_parts, col_parts, values = self.weigh(tile, by, rows, cols, value is not None)
        for into, parts, start in ((w_rows, row_parts, tile.i0), (w_cols, col_parts, tile.j0)):
            if into is not None and parts is not None:
                self.join(parts if unit is None else parts * unit, State(into).at(start, parts.shape[2]))
        if value is not None and values is not None:
            mirrored = self.sides.symmetric and own
            self.join(values, value.at(tile.i0, values.shape[2]), factor=2.0 if mirrored else 1.0)
        if self.in_units:
            w, unit = self.rounded(tile, w)
            for into, dim, there in ((w_rows, 1, tile.rows), (w_cols, 0, tile.cols)):
                if rounded_sums and into is not None:
                    into[there].addcmul_(w.sum(dim, dtype=into.dtype), unit)
        if sums.wy is not None:
            add_product(sums.wy[tile.rows], w, self.sides.weighed[1][tile.cols], unit)
        if wtx is not None:
            add_product(wtx[tile.cols], w.T, self.sides.weighed[0][tile.rows], unit)

    def rounded(self, tile: Tile, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Exact weights as float16 ones in a unit."""
        unit = unit_of(torch.linalg.vector_norm(exact, math.inf))
        return torch.div(exact, unit, out=tile.weights), unit


def from_rows(
    p: Problem, r: Tensor, positive: Tensor | None, outer: str, wanted: Wanted, gradients: Callable[..., Gradients]
) -> tuple[Tensor, Gradients, Tensor | None]:
    """The total form from its rows and, by a second sweep, gradients(r, c, g, h, wanted, dtype)."""
    value, g, dpositive = outer_form(outer, r.double(), None if positive is None else positive.double())
    grads = gradients(r, None, g.to(p.dtype), None, wanted, p.dtype) if any(wanted) else Gradients()
    return value.to(p.dtype), grads, None if dpositive is None else dpositive.to(p.dtype)
