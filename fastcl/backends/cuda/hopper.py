"""The Hopper form: tiles by wgmma, weights in strips of a bounded workspace, and their products for the gradients.

hopper_rows      r and c                                    1 product of 2 n m d flops, half with x itself
hopper_weights   the weights of a strip, W 1 and W^T 1      1, and one more for the unit of a float16 sum
hopper_sweep     the weights of a strip, and W Y            2: a plain log-sum-exp to d = 256
hopper_product   W Y or W^T X of a strip                    1 each, but for W Y after a sweep

so that rows and columns take the 4 products that they count, and a sum's total form 3, its value coming with its weights.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...equation.problem import Gradients, Problem, Wanted
from ..sides import Sides, Sums
from ..tiles import Weighting, from_rows, unit_of, weight_unit, weighting
from ..workspace import default_workspace, workspace
from . import launches
from .launches import Facts, equation

SHARED_BYTES = 232448  # of one CTA
LEAST_PERIOD = 256 + 64  # of a mask: one of its diagonals at most meets the rows of x and of y of a tile
# Up to this d a strip of weights stays in the L2 cache; from there on its products hide that it does not.
CACHED_D, CACHED_BYTES = 256, 24 << 20


def holds(p: Problem, facts: Facts) -> bool:
    """Whether the kernels were built and hold the problem: rows of two bytes, on compute capability 9.0."""
    fits = (
        facts.capability == (9, 0)
        and facts.shared_bytes >= SHARED_BYTES
        and p.x.dtype in (torch.float16, torch.bfloat16)
    )
    return fits and 1 <= p.n <= 1 << 29 and 1 <= p.m <= 1 << 29 and hasattr(launches.ops, "hopper_rows")


def readable(t: Tensor) -> Tensor:
    """Rows as the copy engine reads them: 16-byte aligned, no two of them the same memory, d a multiple of 8."""
    width = max(8, -(-t.shape[1] // 8) * 8)
    fits = t.shape[1] == width and t.stride(1) == 1 and t.stride(0) >= width and t.stride(0) % 8 == 0
    if fits and t.data_ptr() % 16 == 0:
        return t
    to = t.new_zeros((t.shape[0], width))
    to[:, : t.shape[1]] = t
    return to


class Grid(NamedTuple):
    """CTAs along x, and splits of y."""

    ctas: int
    splits: int


def grid(n: int, m: int, block: int, multiprocessors: int, clusters: str | None = None) -> Grid:
    """As few idle turns as can be, then few CTAs, whose columns take a line of memory each. `clusters`: of which there is an even
    number, where there are two at all, so that two of them share what streams: "ctas", "splits" or neither."""
    blocks, tiles = -(-n // block), -(-m // 128)
    best, least = Grid(1, 1), math.inf
    for ctas in range(min(blocks, multiprocessors), 0, -1):
        splits = min(tiles, multiprocessors // ctas)
        if clusters == "ctas" and ctas % 2 and blocks > 1:
            continue
        if clusters == "splits" and splits > 1:
            splits -= splits % 2
        # A block of x is waited for, as long as two tiles of 128 rows take; a CTA's line of columns may cost a thousandth.
        cost = (-(-blocks // ctas) * (-(-tiles // splits) + 2)) * (1 + 0.001 * ctas)
        if cost < least:
            least, best = cost, Grid(ctas, splits)
    return best


class Operands:
    """The operands of one problem as the kernels take them."""

    def __init__(self, p: Problem) -> None:
        self.p, self.sides = p, Sides(p, p.x.dtype)
        s, d = self.sides, p.x.shape[1]
        self.x = readable(s.x)
        self.y = self.x if s.symmetric else readable(s.y)
        s.x, s.y = self.x[:, :d], self.y[:, :d]
        self.multiprocessors = max(1, launches.facts_of(p.x.device).multiprocessors)
        self.equation = equation(s)
        self.terms = p.operand == "sqdist" or p.bias_x is not None or p.bias_y is not None
        self.groups = p.mask.kind.endswith("groups")

    def general(self, sums: bool) -> bool:
        """More than a log-sum-exp of scale * <x, y> + shift: tiles of 128 rows, whose accumulators leave registers for it."""
        return self.p.reduce == "sum" or sums or self.terms or self.groups

    def block(self, weights: bool, sums: bool) -> int:
        """Rows of x of a tile, as launch.h has them: those that stay in shared memory, or others where x is streamed too."""
        d = self.x.shape[1]
        if self.general(sums):
            return 128
        if weights:
            return 256 if d <= 256 or d > 768 else 128
        return 256 if d <= 384 or d > 768 else 192 if d <= 512 else 128

    def clusters(self, weights: bool, sums: bool) -> str | None:
        """What two CTAs share, as launch.h has it: y's rows beside 128 rows of x that stay, or x where it streams as well."""
        d = self.x.shape[1]
        return "splits" if d > 768 else "ctas" if d > 256 and self.block(weights, sums) == 128 else None

    def grid(self, n: int, m: int, weights: bool, sums: bool) -> Grid:
        return grid(n, m, self.block(weights, sums), self.multiprocessors, self.clusters(weights, sums))

    def bound(self) -> Tensor:
        """The reference of a log-sum-exp, as HopperTiles has it. Where it is no number every sum is doubtful."""
        p, s = self.p, self.sides
        of_x, of_y = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float32).amax() for t in (s.x, s.y))
        z = p.scale.abs() * of_x * of_y if p.operand == "dot" else p.scale.clamp(min=0.0) * (of_x + of_y).square()
        for bias in (p.bias_x, p.bias_y):
            z = z if bias is None else z + bias.amax()
        return z.mul(math.log2(math.e)).sub_(60.0).ceil_()

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """r, and c when asked."""
        p, s, empty, lse = self.p, self.sides, self.p.scale.new_empty, self.p.reduce == "logsumexp"
        block = self.block(False, False)
        ctas, splits = self.grid(s.n, s.m, False, False)
        row_parts, col_parts = empty((splits, s.n)), empty((ctas, s.m)) if p.columns or s.symmetric else None
        reference, doubtful = self.bound() if lse else None, p.scale.new_zeros(1, dtype=torch.int32)
        launches.ops.hopper_rows(
            *self.equation, self.x, self.y, 0, 0, ctas, splits, s.symmetric, False, reference, row_parts, col_parts,
            *(None,) * 8,
        )  # fmt: skip
        sizes = (splits, ctas, block if s.symmetric else 0, lse, reference, p.shift)
        r, c = empty(s.n), empty(s.m) if p.columns else None
        merges: list[tuple[object, ...]] = [(row_parts, col_parts if s.symmetric else None, *sizes, r, doubtful)]
        if c is not None:
            merges.append((None, col_parts, *sizes, c, doubtful))
        for merge in merges:
            launches.ops.hopper_merge(*merge)
        if lse:
            self._replace_doubtful(merges, doubtful)
        return r, c

    def _replace_doubtful(self, merges: list[tuple[object, ...]], doubtful: Tensor) -> None:
        """The same reductions with a maximum for each tile, by the kernels of sm_80, in place of those that merge finds doubtful.

        They read the flag on the device: nobody waits, and where it is not set they do nothing.
        """
        s, empty = self.sides, self.p.scale.new_empty
        blocks, tiles = -(-s.n // 128), -(-s.m // 128)
        ctas = min(blocks, 16)
        splits = -(-tiles // -(-tiles // min(max(self.multiprocessors // ctas, 1), tiles)))
        row_parts = empty((splits, s.n, 2))
        col_parts = empty((ctas, s.m, 2)) if self.p.columns or s.symmetric else None
        launches.ops.hopper_careful(
            *self.equation, self.x, self.y, ctas, splits, row_parts, col_parts, s.symmetric, False, 3, doubtful
        )
        for merge in merges:
            rows = merge[0] is not None
            careful = (row_parts if rows else None, col_parts if s.symmetric or not rows else None)
            launches.ops.hopper_replace(*merge, *careful, splits, ctas)


def cut(tiles: int, k: int, multiprocessors: int) -> int:
    """How many splits a product's sum of k terms is cut into, where its tiles are fewer than multiprocessors: of 512 at least."""
    return max(1, min(multiprocessors // tiles, k // 512))


def add_product(out: Tensor, w: Tensor, z: Tensor, unit: Tensor | None, transposed: bool, multiprocessors: int) -> None:
    """out += unit A z: A is the strip w, or its transpose. Parts of several splits, a tile a multiprocessor, add up in order."""
    columns, k = out.shape[1], z.shape[0]
    blocks = -(-out.shape[0] // 128)
    splits = cut((blocks + (blocks > 1 and blocks % 2)) * -(-columns // (256 if columns > 128 else 128)), k, multiprocessors)
    parts = out if splits == 1 else out.new_empty((splits, *out.shape))
    launches.ops.hopper_product(w, transposed, z, unit, splits, parts)
    if splits > 1:
        out.add_(parts.sum(0))


class Strips:
    """The weights of one problem, strip by strip in one workspace, and what follows on each."""

    def __init__(self, o: Operands, sums: Sums, by: Weighting) -> None:
        self.o, self.sums, self.p = o, sums, o.p
        p, s, d = o.p, o.sides, o.sides.d
        by = launches.prepared(by)
        self.both = p.reduce == "logsumexp" and by.g is not None and by.h is not None
        self.reference = by.reference
        self.factors = launches.factors(p, s.n, s.m, by)
        # What a strip takes is its weights alone, in the rows' dtype.
        elements = workspace(default_workspace(p)) // p.x.itemsize
        if d <= CACHED_D:
            elements = min(elements, CACHED_BYTES // p.x.itemsize)
        side = max(256, math.isqrt(elements) // 256 * 256)
        self.rows = min(s.n, self._longer(elements, side, s.m))
        self.cols = self.rows if s.symmetric else min(s.m, self._longer(elements, side, s.n))
        # A sweep keeps W Y of its block of x: it needs a block for half of the multiprocessors at least, and takes strips as high
        # as one for each.
        general = o.general(sums.w_rows is not None or sums.w_cols is not None)
        enough = d <= 256 and 2 * -(-s.n // 128) >= o.multiprocessors
        self.sweeps = not s.symmetric and sums.wy is not None and not general and enough
        if self.sweeps:
            self.rows = min(s.n, 128 * o.multiprocessors)
            self.cols = min(s.m, max(64, elements // self.rows // 64 * 64))
        self.weights = p.x.new_empty(self.cols * _pitch(self.rows))

    @staticmethod
    def _longer(elements: int, side: int, others: int) -> int:
        """The side of a strip; longer where the other one is short."""
        return max(side, elements // max(256, others) // 256 * 256) if others < side else side

    def accumulate(self, value: Tensor | None = None) -> None:
        """Add every strip's part to the four sums, and the sum of f to `value`."""
        s = self.o.sides
        for i in range(0, s.n, self.rows):
            for j in range(i if s.symmetric else 0, s.m, self.cols):
                self._add(slice(i, min(s.n, i + self.rows)), slice(j, min(s.m, j + self.cols)), value)

    def _add(self, rows: slice, cols: slice, value: Tensor | None) -> None:
        p, o, s, sums = self.p, self.o, self.o.sides, self.sums
        own = not (s.symmetric and rows.start == cols.start)  # x with itself: both orders of a pair on the diagonal
        w_cols, wtx = (sums.w_cols, sums.wtx) if own else (None, None)
        x, y = o.x[rows], o.y[cols]
        n, m, empty = len(x), len(y), p.scale.new_empty
        summed = sums.w_rows is not None or w_cols is not None or value is not None
        ctas, splits = o.grid(n, m, True, summed)
        if self.sweeps:
            ctas, splits = min(-(-n // 128), o.multiprocessors), 1
        row_parts, col_parts = (empty((splits, n)), empty((ctas, m))) if summed else (None, None)
        values = empty((ctas, m)) if value is not None else None
        w = self.weights.as_strided((m, n), (_pitch(n), 1))  # transposed
        before = (
            *o.equation, x, y, rows.start, cols.start, ctas, splits, False, self.both, self.reference, row_parts, col_parts,
            values, *self.factors,
        )  # fmt: skip
        unit = None
        if p.x.dtype == torch.float16 and p.reduce == "sum":
            # To know the largest weight takes a product more.
            peaks = empty((8 * splits, ctas))
            launches.ops.hopper_weights(*before, None, peaks, None, None)
            unit = unit_of(peaks.amax())
        if self.sweeps:
            assert sums.wy is not None
            launches.ops.hopper_sweep(*before, unit, None, w, sums.wy[rows])
        else:
            launches.ops.hopper_weights(*before, unit, None, w, None)
        for into, parts in (
            (None if sums.w_rows is None else sums.w_rows[rows], row_parts),
            (None if w_cols is None else w_cols[cols], col_parts),
        ):
            if into is not None and parts is not None:
                into.add_(parts.sum(0) if unit is None else parts.sum(0).mul_(unit))
        if value is not None and values is not None:
            value.add_(values.sum(dtype=torch.float64), alpha=2.0 if s.symmetric and own else 1.0)
        if sums.wy is not None and not self.sweeps:
            add_product(sums.wy[rows], w, y, unit, True, o.multiprocessors)
        if wtx is not None:
            add_product(wtx[cols], w, x, unit, False, o.multiprocessors)


def _pitch(rows: int) -> int:
    return -(-rows // 8) * 8


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked, in one sweep."""
    return Operands(p).rows()


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>, strip by strip."""
    o = Operands(p)
    sums, unit = Sums(o.sides, wanted), None
    if any(wanted):
        unit = weight_unit(p, g, h if p.y is not None else g)
        Strips(o, sums, weighting(p, r, c, g, h, unit)).accumulate()
    return sums.gradients(dtype or p.x.dtype, unit)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """Value and gradients of the total form; a sum takes its value from the sweep of its weights."""
    if p.reduce != "sum" or not any(wanted):
        return from_rows(p, rows(p)[0], positive, outer, wanted, partial(gradients, p))
    o = Operands(p)
    sums = Sums(o.sides, wanted)
    value, ones = p.scale.new_zeros((), dtype=torch.float64), p.scale.new_ones(p.n)
    Strips(o, sums, weighting(p, ones, None, ones, None, None)).accumulate(value)
    return value.to(p.dtype), sums.gradients(p.dtype), None
