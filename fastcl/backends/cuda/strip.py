"""The strip form: the schedule of tiles.py, torch's matrix products, and two kernels between them.

dot = x[tile] y[tile]^T   ->  strip_reduce   ->  r, c
dot = x[tile] y[tile]^T   ->  strip_weights  ->  W Y, W^T X, W 1, W^T 1

With limits two others stand in their places, which the products of guides go to beside the dot products.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...equation.masks import on_tile
from ...equation.problem import Gradients, Problem, Wanted
from ..tiles import State, Tile, Tiles, Weighting
from . import launches
from .launches import equation

BLOCK_ROWS, BLOCK_COLS = 64, 128  # of the kernels
LEAST_PERIOD = 1  # of a mask: each tile is told which of its diagonals meets it
MOST_BLOCKS = 65535  # along the second dimension of a grid


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked, in one sweep."""
    return Strip(p).rows()


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>, in one sweep that forms the dot products again."""
    return Strip(p).gradients(r, c, g, h, wanted, dtype)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """Value and gradients of the total form: one sweep where weights are known in time, two otherwise."""
    return Strip(p).total(positive, outer, wanted)


class Strip(Tiles):
    """The operations on a tile; half-precision rows stay 16 bits wide, since their products are exact in float32."""

    most_cols = MOST_BLOCKS * BLOCK_COLS

    def __init__(self, p: Problem) -> None:
        super().__init__(p, p.x.dtype)
        self.sides.marks_limited = p.mask.limited
        self.limits = tuple(None if t is None else t.contiguous() for t in p.limits)
        self.everywhere = None if p.mask.period else equation(self.sides)

    def equation_on(self, tile: Tile) -> tuple[Any, ...]:
        """What z is and which pairs count on a tile: of several diagonals the one that meets it, or groups where more do."""
        if self.everywhere is not None:
            return self.everywhere
        mask = on_tile(self.p.mask, range(tile.i0, tile.i1), range(tile.j0, tile.j1))
        return self.grouped if mask is None else equation(self.sides, mask=mask)

    @cached_property
    def grouped(self) -> tuple[Any, ...]:
        return equation(self.sides, mask=self.p.told_by_groups().mask)

    def reduce(self, tile: Tile, columns: bool) -> tuple[Tensor, Tensor | None]:
        rows, cols = self.parts(tile, BLOCK_ROWS, BLOCK_COLS, True, columns, 2 if self.p.reduce == "logsumexp" else 1)
        assert rows is not None
        op = launches.ops.strip_reduce_limited if self.p.mask.limited else launches.ops.strip_reduce
        op(*self.equation_on(tile), tile.dot, tile.i0, tile.j0, rows, cols, *self.at_most(tile))
        return rows, cols

    def weigh(
        self, tile: Tile, by: Weighting | None, rows: bool, cols: bool, value: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        row_parts, col_parts = self.parts(tile, BLOCK_ROWS, BLOCK_COLS, rows, cols)
        values, _ = self.parts(tile, BLOCK_ROWS, BLOCK_COLS, value, False)
        weights = tile.dot if self.in_units else tile.weights
        op = launches.ops.strip_weights_limited if self.p.mask.limited else launches.ops.strip_weights
        op(
            *self.equation_on(tile), tile.dot, tile.i0, tile.j0, *(by or self.ones), weights, row_parts, col_parts, values,
            *self.at_most(tile),
        )  # fmt: skip
        return weights, row_parts, col_parts, values

    def at_most(self, tile: Tile) -> tuple[Tensor | None, ...]:
        """The limits, and the products of guides that they are on; nothing where there are none."""
        return (*self.limits, tile.guided) if self.p.mask.limited else ()

    def join(self, parts: Tensor, state: State, factor: float = 1.0) -> None:
        launches.ops.merge_parts(parts, state.top, state.sum, factor)

    def prepared(self, by: Weighting) -> Weighting:
        return by if self.p.mask.limited else launches.prepared(by)
