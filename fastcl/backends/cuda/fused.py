"""The fused form: no workspace beyond O(n + m) for each CTA, the same bits in every run.

fused_rows       r and c: 1 product of 2 n m d flops, half with x itself
fused_gradient   W Y, and a sum's value where asked: 2, and with the sides exchanged W^T X: 2

so that rows and columns take 5 products where the strip form takes 4, and a sum in the total form 4 where it takes 3 (5 where d is
over 128); nothing of size n x m is written.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...equation.problem import Gradients, Problem, Wanted
from ...precision import dot_precision
from ..sides import Sides, Sums
from ..tiles import Weighting, from_rows, weight_unit, weighting
from . import launches
from .launches import Facts, equation

TILE = 128  # rows of a block, columns of a tile
LEAST_PERIOD = 2 * TILE  # of a mask: one of its diagonals at most meets a block
VALUES_MOST = 128  # d of rows whose sums of f fit beside their gradients


def holds(p: Problem, facts: Facts, gradients: bool) -> bool:
    """Whether the kernels hold the problem at all: its dtype (float32 as tf32, where torch's setting allows that), and its d."""
    return holds_rows(p.x, p.reduce, facts, gradients)


def holds_rows(x: Tensor, reduce: str, facts: Facts, gradients: bool) -> bool:
    """Whether they hold any problem of such rows."""
    d, tf32 = x.shape[1], x.dtype == torch.float32
    if facts.capability < (8, 0) or x.dtype == torch.float64 or (tf32 and dot_precision(x) != "tf32"):
        return False
    if _rows_shared(x.dtype, d, False, 2, reduce == "logsumexp") > facts.shared_bytes:
        return False
    if not gradients:
        return True
    # A sum's float16 weights need a unit that only the strip form finds, once a tile is there.
    if x.dtype == torch.float16 and reduce == "sum":
        return False
    # W Y fits the registers of one CTA; from 12.0 on the kernels that need more than 99 KB are not compiled.
    widest = 128 if tf32 or facts.capability >= (12, 0) else 256
    return d <= widest and _gradient_shared(x.dtype, d) <= facts.shared_bytes


# The shared memory of the kernels, which refuse to run where fused.h has it otherwise.


def _rows_shared(dtype: torch.dtype, d: int, resident: bool, stages: int, logsumexp: bool) -> int:
    side, part = TILE * 128, 8 if logsumexp else 4
    ring = stages * (side if resident else 2 * side)
    kept = -(-d * dtype.itemsize // 128) * side if resident else 0
    return ring + kept + 2 * TILE * 16 + 6 * TILE * part


def _gradient_shared(dtype: torch.dtype, d: int) -> int:
    wide = dtype == torch.float32
    chunks, cols, side = 4 if wide or d > 128 else 2, 32 if wide else 64, TILE * 128
    return chunks * side + 2 * cols * (chunks * 128 + 8) + (0 if wide else side) + (TILE + cols) * 16


def stages_of(dtype: torch.dtype, d: int, logsumexp: bool, shared_bytes: int) -> tuple[bool, int]:
    """The kept rows and stages that shared memory holds; every device that these kernels run on holds the last ones."""
    for resident, stages in ((True, 3), (True, 2), (False, 3)):
        if _rows_shared(dtype, d, resident, stages, logsumexp) <= shared_bytes:
            return resident, stages
    return False, 2


def aligned(t: Tensor) -> Tensor:
    """Rows as 16-byte asynchronous copies can read them; float32 ones rounded to tf32, in a copy."""
    unit = 16 // t.element_size()
    width = max(unit, -(-t.shape[1] // unit) * unit)
    fits = t.shape[1] == width and t.stride(1) == 1 and t.stride(0) >= width and t.stride(0) % unit == 0
    if fits and t.data_ptr() % 16 == 0 and t.dtype != torch.float32:
        return t
    to = t.new_empty((t.shape[0], width))
    launches.ops.fused_pack(t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous(), to)
    return to


class Fused:
    """The operands of one problem as the fused kernels take them. What the products multiply is what norms and gradients see."""

    def __init__(self, p: Problem) -> None:
        self.p, self.sides = p, Sides(p, p.x.dtype)
        s, d = self.sides, p.x.shape[1]
        self.x = aligned(s.x)
        self.y = self.x if s.symmetric else aligned(s.y)
        s.x, s.y = self.x[:, :d], self.y[:, :d]
        if p.operand == "sqdist" and p.x.dtype == torch.float32:
            s.norm_x = s.x.square().sum(1)
            s.norm_y = s.norm_x if s.symmetric else s.y.square().sum(1)

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """r, and c when asked."""
        p, s, facts = self.p, self.sides, launches.facts_of(self.p.x.device)
        lse, empty = p.reduce == "logsumexp", p.scale.new_empty
        blocks, tiles = -(-s.n // TILE), -(-s.m // TILE)
        ctas = min(blocks, facts.multiprocessors)
        # Few rows: several CTAs share a row block.
        splits = -(-tiles // -(-tiles // min(max(facts.multiprocessors // ctas, 1), tiles)))
        width = 2 if lse else 1
        row_parts = empty((splits, s.n, width))
        col_parts = empty((ctas, s.m, width)) if p.columns or s.symmetric else None
        stages = stages_of(self.x.dtype, self.x.shape[1], lse, facts.shared_bytes)
        launches.ops.fused_rows(
            *equation(s), self.x, self.y, ctas, splits, row_parts, col_parts, s.symmetric, *stages
        )  # fmt: skip
        r, c = empty(s.n), empty(s.m) if p.columns else None
        merged = (splits, ctas, s.symmetric, lse)
        launches.ops.fused_merge(row_parts, col_parts if s.symmetric else None, *merged, r)
        if c is not None:
            launches.ops.fused_merge(None, col_parts, *merged, c)
        return r, c

    def sweep(
        self, by: Weighting, swapped: bool, into: Tensor | None, row_sums: Tensor | None, values: Tensor | None = None
    ) -> None:
        """W Y, or swapped W^T X, with rows as wide as those of x in memory.

        row_sums receives W 1 or W^T 1 where it is there, and `values` the sums of f over the rows of that side.
        """
        x, y = (self.y, self.x) if swapped else (self.x, self.y)
        wy = self.p.scale.new_empty(x.shape) if into is None else into.as_strided(x.shape, (x.shape[1], 1))
        factors = launches.factors(self.p, len(x), len(y), by.swapped() if swapped else by)
        launches.ops.fused_gradient(*equation(self.sides, swapped), x, y, *factors, wy, row_sums, values)

    def sweeps(self, by: Weighting, sums: Sums, valued: bool = False) -> Tensor | None:
        """The sweep of each side that has sums; valued: the first one's sums of f over its rows."""
        p, values = self.p, None
        for swapped, into, row_sums in ((False, sums.wy, sums.w_rows), (True, sums.wtx, sums.w_cols)):
            if (into is None and row_sums is None) or (swapped and p.y is None):
                continue
            part = p.scale.new_empty(p.m if swapped else p.n) if valued and values is None else None
            self.sweep(by, swapped, into, row_sums, part)
            values = part if values is None else values
        return values


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked, in one sweep."""
    return Fused(p).rows()


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>: a sweep for each side."""
    fused = Fused(p)
    sums, unit = Sums(fused.sides, wanted, width=fused.x.shape[1], filled=False), None
    if any(wanted):
        unit = weight_unit(p, g, h if p.y is not None else g)
        by = launches.prepared(weighting(p, r, c, g, h, unit))
        fused.sweeps(by, sums)
    return sums.gradients(dtype or p.x.dtype, unit)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """Value and gradients of the total form; a sum of narrow rows takes its value from their first sweep."""
    if p.reduce == "sum" and any(wanted) and p.x.shape[1] <= VALUES_MOST:
        fused, ones = Fused(p), p.scale.new_ones(p.n)
        sums = Sums(fused.sides, wanted, width=fused.x.shape[1], filled=False)
        values = fused.sweeps(weighting(p, ones, None, ones, None, None), sums, valued=True)
        assert values is not None
        return values.sum(dtype=torch.float64).to(p.dtype), sums.gradients(p.dtype), None
    return from_rows(p, rows(p)[0], positive, outer, wanted, partial(gradients, p))
