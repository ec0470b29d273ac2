"""The strip form: the schedule of fastcl/backends/tiles.py, torch's matrix products, and two Triton kernels between them.

dot = x[tile] y[tile]^T   ->  strip_reduce   ->  r, c
dot = x[tile] y[tile]^T   ->  strip_weights  ->  W Y, W^T X, W 1, W^T 1
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ..backends.tiles import State, Tile, Tiles, Weighting
from ..equation.problem import Problem
from . import tuning
from .launching import (
    STRIP_OPTIONS,
    difference,
    limits,
    pair_slope,
    pair_value,
    prepared,
    present,
    vectors,
    weight_arguments,
)
from .strip_kernels import merge_partials, strip_reduce, strip_weights

MOST_BLOCKS = 65535  # along the second dimension of a grid
_MERGED = 128  # rows or columns that one program of merge_partials joins


class Strip(Tiles):
    """The operations on a tile; half-precision rows stay 16 bits wide, since their products are exact in float32."""

    most_rows = MOST_BLOCKS * min(tuning.STRIP_REDUCE[0], tuning.STRIP_WEIGHTS[0])

    def __init__(self, p: Problem) -> None:
        super().__init__(p, p.x.dtype)
        self.sides.marks_limited = p.mask.limited
        self.arguments = vectors(self.sides) | limits(p) | {"diff": difference(p), "PAIR": pair_value(self.sides)} | STRIP_OPTIONS
        self.slope = pair_slope(self.sides)
        self.reducing, self.weighing = tuning.epilogue(tuning.STRIP_REDUCE), tuning.epilogue(tuning.STRIP_WEIGHTS)

    def reduce(self, tile: Tile, columns: bool) -> tuple[Tensor, Tensor | None]:
        blocks_m, blocks_n = _blocks(tile, self.reducing)
        planes = 2 if self.p.reduce == "logsumexp" else 1
        row_parts, col_parts = self.parts(tile, self.reducing["BM"], self.reducing["BN"], True, columns, planes)
        assert row_parts is not None
        strip_reduce[(blocks_n, blocks_m)](
            S=tile.dot, ROWS=row_parts, COLS=present(col_parts, row_parts), COLUMNS=columns,
            **self._place(tile), **self.arguments, **self.reducing,
        )  # fmt: skip
        return row_parts, col_parts

    def weigh(
        self, tile: Tile, by: Weighting | None, rows: bool, cols: bool, value: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        blocks_m, blocks_n = _blocks(tile, self.weighing)
        block = self.weighing["BM"], self.weighing["BN"]
        parts = (*self.parts(tile, *block, rows, cols), self.parts(tile, *block, value, False)[0])
        row_parts, col_parts, values = (present(each, self.p.scale) for each in parts)
        weights = tile.dot if self.in_units else tile.weights
        strip_weights[(blocks_n, blocks_m)](
            S=tile.dot, W=weights, ROWS=row_parts, COLS=col_parts, VALUES=values, SLOPE=self.slope,
            ROW_SUMS=rows, COL_SUMS=cols, VALUE=value,
            **weight_arguments(by or self.ones, self.p.scale), **self._place(tile), **self.arguments, **self.weighing,
        )  # fmt: skip
        return weights, *parts

    def join(self, parts: Tensor, state: State, factor: float = 1.0) -> None:
        _, count, size = parts.shape
        merge_partials[(triton.cdiv(size, _MERGED),)](
            parts, present(state.top, state.sum), state.sum, count, size, size, factor, BLOCK=_MERGED,
            LSE=state.top is not None, **STRIP_OPTIONS,
        )  # fmt: skip

    def prepared(self, by: Weighting) -> Weighting:
        return prepared(by)

    def _place(self, tile: Tile) -> dict[str, Any]:
        return {
            "i0": tile.i0, "j0": tile.j0, "n": tile.i1, "m": tile.j1, "pitch": tile.dot.stride(0),
            "D": present(tile.guided, self.p.scale), "rows_pitch": tile.i1 - tile.i0, "cols_pitch": tile.j1 - tile.j0,
        }  # fmt: skip


def _blocks(tile: Tile, block: dict[str, Any]) -> tuple[int, int]:
    """Blocks of rows and blocks of columns."""
    return triton.cdiv(tile.i1 - tile.i0, block["BM"]), triton.cdiv(tile.j1 - tile.j0, block["BN"])
