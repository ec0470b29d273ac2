"""The strip form: torch's matrix products on tiles in a bounded workspace, Triton epilogues between them. Deterministic.

    dot = x[tile] y[tile]^T   ->  strip_reduce   ->  r, c
    dot = x[tile] y[tile]^T   ->  strip_weights  ->  W Y, W^T X, W 1, W^T 1

A sum knows its weights at once, and a tile as wide as the matrix knows its rows' normalisers: there value and gradients
come from one sweep, 3 products of 2 n m d flops instead of 4. With x itself only tiles on and right of the diagonal are
formed: half of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..backends.reference import outer_form
from ..equation.problem import Gradients, Problem, Wanted
from ..equation.reductions import merge
from . import tuning
from .launching import STRIP_OPTIONS, pair_slope, pair_value, present, softmax_reference, vectors
from .sides import Sides, Sums, contiguous_rows, weight_unit
from .strip_kernels import merge_partials, strip_reduce, strip_weights

# Beyond this side a tile's products gain nothing: W Y of 8192 x 512 already fills an H100 with blocks of 128 x 256.
LARGEST_SIDE = 8192
# Under this many rows the products of a strip as wide as the matrix, W Y and W^T X, cost more than a second sweep.
ONE_SWEEP_ROWS = 2048
MOST_BLOCKS = 65535  # along the second dimension of a grid
_ALIGN = 16


class Tile(NamedTuple):
    """Rows [i0, i1) against columns [j0, j1), their dot products in the workspace, one row every `pitch` elements."""

    i0: int
    i1: int
    j0: int
    j1: int
    dot: Tensor
    pitch: int

    @property
    def rows(self) -> tuple[int, int]:
        return self.i0, self.i1

    @property
    def cols(self) -> tuple[int, int]:
        return self.j0, self.j1

    @property
    def on_diagonal(self) -> bool:
        return self.i0 == self.j0

    def view(self, workspace: Tensor) -> Tensor:
        rows = self.i1 - self.i0
        return workspace[: rows * self.pitch].view(rows, self.pitch)[:, : self.j1 - self.j0]


class Strip:
    """The tiles of one problem, one after the other in one workspace, and the kernels that follow on each."""

    def __init__(self, p: Problem, workspace_bytes: int, full_width: bool = False) -> None:
        self.p, self.sides = p, Sides(p)
        self.x, self.y = contiguous_rows(self.sides.x), contiguous_rows(self.sides.y)
        self.tile_rows, self.tile_cols = tile_shape(p, workspace_bytes, full_width)
        elements = self.tile_rows * _padded(self.tile_cols)
        self.dot = p.scale.new_empty(elements)
        self.weights = self.dot if p.x.dtype == torch.float32 else p.x.new_empty(elements)
        # The float16 weights of a sum: exact ones take the place of the logits, and are rounded when the largest is known.
        self.in_units = p.x.dtype == torch.float16 and p.reduce == "sum"
        self.arguments = vectors(self.sides)

    def __iter__(self) -> Iterator[Tile]:
        s = self.sides
        for i0 in range(0, s.n, self.tile_rows):
            i1 = min(s.n, i0 + self.tile_rows)
            for j0 in range(i0 if s.symmetric else 0, s.m, self.tile_cols):
                j1 = min(s.m, j0 + self.tile_cols)
                tile = Tile(i0, i1, j0, j1, self.dot, _padded(j1 - j0))
                product(self.x[i0:i1], self.y[j0:j1].T, tile.view(self.dot))
                yield tile

    def reduce(self, tile: Tile, rows: State | None, cols: State | None) -> None:
        """Merge the tile's reductions into those of its rows and columns."""
        assert rows is not None
        block = tuning.epilogue(tuning.STRIP_REDUCE) | STRIP_OPTIONS
        blocks_m, blocks_n = _blocks(tile, block)
        row_parts = rows.parts(blocks_n, tile.i1 - tile.i0)
        col_parts = cols.parts(blocks_m, tile.j1 - tile.j0) if cols is not None else row_parts
        strip_reduce[(blocks_n, blocks_m)](
            S=tile.dot, ROWS=row_parts, COLS=col_parts, PAIR=pair_value(self.sides), COLUMNS=cols is not None,
            **self._place(tile), **self.arguments, **block,
        )  # fmt: skip
        rows.merge(row_parts, blocks_n, tile.i0, tile.i1)
        if cols is not None:
            cols.merge(col_parts, blocks_m, tile.j0, tile.j1)

    def accumulate(self, tile: Tile, weighting: Weighting, sums: Sums, value: State | None = None) -> None:
        """Turn the tile into weights and add its part to the four sums (and the row sums of f to `value`)."""
        block = tuning.epilogue(tuning.STRIP_WEIGHTS) | STRIP_OPTIONS
        blocks_m, blocks_n = _blocks(tile, block)
        mirrored = self.sides.symmetric and not tile.on_diagonal
        w_rows, w_cols = sums.w_rows, sums.w_rows if mirrored else sums.w_cols
        if self.in_units and self.p.operand == "sqdist":
            w_rows = w_cols = None  # those of the rounded weights, below
        row_sums, col_sums, values = (
            None if into is None else State(self.p, sums=into) for into in (w_rows, w_cols, value and value.sum)
        )
        row_parts, col_parts, value_parts = (
            self.p.scale if state is None else state.parts(count, size)
            for state, count, size in (
                (row_sums, blocks_n, tile.i1 - tile.i0),
                (col_sums, blocks_m, tile.j1 - tile.j0),
                (values, blocks_n, tile.i1 - tile.i0),
            )
        )
        strip_weights[(blocks_n, blocks_m)](
            S=tile.dot, W=tile.dot if self.in_units else self.weights, ROWS=row_parts, COLS=col_parts, VALUES=value_parts,
            PAIR=pair_value(self.sides), SLOPE=pair_slope(self.sides), ROW_SUMS=row_sums is not None,
            COL_SUMS=col_sums is not None, VALUE=values is not None,
            **weighting.arguments(self.p.scale), **self._place(tile), **self.arguments, **block,
        )  # fmt: skip
        if row_sums is not None:
            row_sums.merge(row_parts, blocks_n, tile.i0, tile.i1)
        if col_sums is not None:
            col_sums.merge(col_parts, blocks_m, tile.j0, tile.j1)
        if values is not None:
            values.merge(value_parts, blocks_n, tile.i0, tile.i1, factor=2.0 if mirrored else 1.0)
        self._multiply(tile, sums, mirrored)

    def _multiply(self, tile: Tile, sums: Sums, mirrored: bool) -> None:
        w = tile.view(self.weights)
        unit = self._round(tile, w) if self.in_units else None
        into, w_cols = (sums.wy, sums.w_rows) if mirrored else (sums.wtx, sums.w_cols)
        if unit is not None and self.p.operand == "sqdist":
            # diag(W 1) X - W Y cancels: both terms take the same rounded weights.
            for rows, dim, (start, stop) in ((sums.w_rows, 1, tile.rows), (w_cols, 0, tile.cols)):
                if rows is not None:
                    rows[start:stop].addcmul_(w.sum(dim, dtype=rows.dtype), unit)
        if sums.wy is not None:
            add_product(sums.wy[tile.i0 : tile.i1], w, self.y[tile.j0 : tile.j1], unit)
        if into is not None:
            add_product(into[tile.j0 : tile.j1], w.T, self.x[tile.i0 : tile.i1], unit)

    def _round(self, tile: Tile, w: Tensor) -> Tensor:
        """Exact weights to float16 ones in a unit that is returned: their largest then is 2^14, 38 bits over the smallest."""
        exact = tile.view(self.dot)
        unit = torch.linalg.vector_norm(exact, float("inf")).mul_(2.0**-14).clamp_(1e-30, 1e30).nan_to_num_(1.0)
        torch.div(exact, unit, out=w)
        return unit

    def _place(self, tile: Tile) -> dict[str, int]:
        return {
            "i0": tile.i0, "j0": tile.j0, "n": tile.i1, "m": tile.j1, "diff": self.sides.diff, "pitch": tile.pitch,
            "rows_pitch": tile.i1 - tile.i0, "cols_pitch": tile.j1 - tile.j0,
        }  # fmt: skip


def _blocks(tile: Tile, block: dict[str, Any]) -> tuple[int, int]:
    """Blocks of rows and blocks of columns."""
    return triton.cdiv(tile.i1 - tile.i0, block["BM"]), triton.cdiv(tile.j1 - tile.j0, block["BN"])


class State:
    """A running reduction of the rows or of the columns: a sum, or the top and sum of a log-sum-exp."""

    def __init__(self, p: Problem, size: int = 0, sums: Tensor | None = None) -> None:
        self.like = p.scale
        self.lse = sums is None and p.reduce == "logsumexp"
        self.sum = p.scale.new_zeros(size) if sums is None else sums
        self.top = p.scale.new_full((size,), float("-inf")) if self.lse else self.sum

    def parts(self, count: int, size: int) -> Tensor:
        return self.like.new_empty((2 if self.lse else 1, count, size))

    def merge(self, parts: Tensor, count: int, start: int, stop: int, factor: float = 1.0) -> None:
        size, block = stop - start, 128
        merge_partials[(triton.cdiv(size, block),)](
            parts,
            self.top[start:stop],
            self.sum[start:stop],
            count,
            size,
            size,
            factor,
            BLOCK=block,
            LSE=self.lse,
            **STRIP_OPTIONS,
        )

    def result(self) -> Tensor:
        return self.top + torch.log(self.sum) if self.lse else self.sum


class Weighting(NamedTuple):
    """What turns a tile into weights: upstream gradients of rows and columns, and their normalisers."""

    g: Tensor | None
    h: Tensor | None
    r: Tensor | None = None
    c: Tensor | None = None
    reference: Tensor | None = None

    def swapped(self) -> Weighting:
        """The same weights seen from the other side."""
        return Weighting(self.h, self.g, self.c, self.r, self.reference)

    def arguments(self, absent: Tensor) -> dict[str, object]:
        pointers = {"G": self.g, "H": self.h, "R": self.r, "C": self.c, "REFERENCE": self.reference}
        flags = {"HAS_G": self.g is not None, "HAS_H": self.h is not None}
        return {**{name: present(t, absent) for name, t in pointers.items()}, **flags}


def weighting(p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, unit: Tensor | None) -> Weighting:
    """The weighting of <g, r> + <h, c>, in `unit`; with x itself both roles are one vector."""
    if p.y is None:
        c, h = r, g
    if unit is not None:
        g, h = g / unit, None if h is None else h / unit
    # Autograd hands expanded vectors on; the kernels read one element after the other.
    r, c, g, h = (None if v is None else v.contiguous() for v in (r, c, g, h))
    assert r is not None
    if p.reduce == "sum":
        return Weighting(g, h)
    if g is None or h is None or c is None:
        return Weighting(g, h, r, c)
    reference, g, h = softmax_reference(r, c, g, h)
    return Weighting(g, h, r, c, reference)


def rows(p: Problem, workspace_bytes: int) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked, in one sweep."""
    strip = Strip(p, workspace_bytes)
    r = State(p, p.n)
    c = State(p, p.m) if p.columns and p.y is not None else None
    for tile in strip:
        strip.reduce(tile, r, (None if tile.on_diagonal else r) if p.y is None else c)
    result = r.result()
    return result, None if not p.columns else (result if c is None else c.result())


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, workspace_bytes: int
) -> Gradients:
    """The gradients of <g, r> + <h, c>, in one sweep that forms the dot products again."""
    return _gradients(p, r, c, g, h, wanted, workspace_bytes, p.x.dtype)


def _gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, workspace_bytes: int,
    dtype: torch.dtype,
) -> Gradients:  # fmt: skip
    if p.n == 0 or p.m == 0:
        return Sums(Sides(p), wanted).gradients(dtype)
    strip = Strip(p, workspace_bytes)
    sums = Sums(strip.sides, wanted)
    unit = weight_unit(p, g, h if p.y is not None else g)
    weights = weighting(p, r, c, g, h, unit)
    for tile in strip:
        strip.accumulate(tile, weights, sums)
    return sums.gradients(dtype, unit)


def total(
    p: Problem, positive: Tensor | None, outer: str, wanted: Wanted, workspace_bytes: int
) -> tuple[Tensor, Gradients, Tensor | None]:
    """Value and gradients of the total form: one sweep where weights are known in time, two otherwise."""
    if any(wanted) and p.n and p.m:
        if p.reduce == "sum" and outer == "sum":
            return _sum_in_one_sweep(p, wanted, workspace_bytes)
        if p.reduce == "logsumexp" and p.y is not None and _fits_full_width(p, workspace_bytes):
            return _rows_in_one_sweep(p, positive, outer, wanted, workspace_bytes)
    r, _ = rows(p, workspace_bytes)
    value, g, dpositive = outer_form(outer, r.double(), None if positive is None else positive.double())
    grads = Gradients()
    if any(wanted):
        grads = _gradients(p, r, None, g.to(p.dtype), None, wanted, workspace_bytes, p.dtype)
    return value.to(p.dtype), grads, None if dpositive is None else dpositive.to(p.dtype)


def _sum_in_one_sweep(p: Problem, wanted: Wanted, workspace_bytes: int) -> tuple[Tensor, Gradients, None]:
    strip = Strip(p, workspace_bytes)
    sums = Sums(strip.sides, wanted)
    r = State(p, p.n)
    ones = p.scale.new_ones(p.n)
    weights = weighting(p, ones, None, ones, None, None)
    for tile in strip:
        strip.accumulate(tile, weights, sums, value=r)
    return r.result().sum(dtype=torch.float64).to(p.dtype), sums.gradients(p.dtype), None


def _rows_in_one_sweep(
    p: Problem, positive: Tensor | None, outer: str, wanted: Wanted, workspace_bytes: int
) -> tuple[Tensor, Gradients, Tensor | None]:
    """Tiles as wide as the matrix: a tile's rows are reduced, their upstream gradient formed, and the tile turned into weights."""
    strip = Strip(p, workspace_bytes, full_width=True)
    sums = Sums(strip.sides, wanted)
    r = State(p, p.n)
    value = p.scale.new_full((), float("-inf") if outer == "pooled" else 0.0, dtype=torch.float64)
    dpositive = torch.zeros_like(positive, dtype=p.dtype) if positive is not None else None
    # Each g is a sigmoid or a softmax over rows: at most 1.
    unit = weight_unit(p, p.scale.new_ones(1), None)
    normaliser, upstream = p.scale.new_empty(p.n), p.scale.new_empty(p.n)
    for tile in strip:
        here = slice(tile.i0, tile.i1)
        strip.reduce(tile, r, None)
        normaliser[here] = r.top[here] + torch.log(r.sum[here])
        own = normaliser[here].double()
        part, g, dp = outer_form(outer, own, None if positive is None else positive[here].double())
        if dpositive is not None and dp is not None:
            dpositive[here] = dp.to(p.dtype)
        before, value = value, merge(value, part) if outer == "pooled" else value + part
        if outer == "pooled":
            # g is relative to the tile: bring it, and all that was gathered, to the running log-sum-exp.
            finite = torch.where(torch.isneginf(value), 0.0, value)
            g = torch.exp(own - finite)
            sums.scale_(torch.exp(before - finite).to(p.dtype))
        upstream[here] = g.to(p.dtype)
        strip.accumulate(tile, weighting(p, normaliser, None, upstream, None, unit), sums)
    return value.to(p.dtype), sums.gradients(p.dtype, unit), dpositive


def tile_shape(p: Problem, workspace_bytes: int, full_width: bool = False) -> tuple[int, int]:
    """Rows and columns of a tile whose logits and weights fit the workspace, and its blocks a grid."""
    elements = workspace_bytes // _element_bytes(p)
    most = MOST_BLOCKS * min(tuning.STRIP_REDUCE[0], tuning.STRIP_WEIGHTS[0])
    if full_width:
        return max(1, min(p.n, elements // _padded(p.m), most)), max(1, p.m)
    elements = min(elements, LARGEST_SIDE**2)
    side = _whole(int(elements**0.5))
    if p.y is None:
        return side, side
    rows = min(max(1, p.n), side)
    cols = _whole(elements // rows)
    if p.m < cols:
        rows = max(1, min(p.n, elements // _padded(p.m), most))
    return rows, cols


def default_workspace(p: Problem) -> int:
    """Bytes: 96 MB, or half as much again as the float32 gradients of x and y take, which stand beside it.

    The larger the tile, the fuller its products and the fewer launches: CLIP's gradient at 65,536 x 512 has 1,024 tiles of
    2048 x 2048, or 64 of 8192 x 8192.
    """
    return max(96 << 20, 6 * p.x.shape[1] * (p.n + p.m))


def _fits_full_width(p: Problem, workspace_bytes: int) -> bool:
    return tile_shape(p, workspace_bytes, full_width=True)[0] >= min(p.n, ONE_SWEEP_ROWS) and (
        _padded(p.m) * min(p.n, ONE_SWEEP_ROWS) * _element_bytes(p) <= workspace_bytes
    )


def _element_bytes(p: Problem) -> int:
    """Float32 logits, and weights beside them unless they can take their place."""
    return 4 if p.x.dtype == torch.float32 else 4 + p.x.element_size()


def _whole(side: int) -> int:
    """A side of whole blocks of a matrix product, or of vectors where it is too short for that."""
    return max(_ALIGN, side // 1024 * 1024 or side // _ALIGN * _ALIGN)


def _padded(cols: int) -> int:
    return max(_ALIGN, -(-cols // _ALIGN) * _ALIGN)


def _widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a product in float32, wider (exactly) where 16-bit ones have none.

    Only CUDA multiplies them into float32, and not where a setting of torch's lets float16 accumulate in itself.
    """
    serves = a.is_cuda and torch.version.hip is None
    if serves and not (a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation):
        return a, b
    return a.float(), b.float()


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b in float32."""
    a, b = _widened(a, b)
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor, unit: Tensor | None = None) -> None:
    """out += unit a b in float32, unit being one number, or None for 1."""
    a, b = _widened(a, b)
    if unit is not None:
        part = torch.empty_like(out)
        product(a, b, part)
        out.addcmul_(part, unit)
    elif a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        # addmm takes no 16-bit operands beside a float32 sum; baddbmm, which adds in place where out is its summand, does.
        sum_ = out[None]
        torch.baddbmm(sum_, a[None], b[None], out_dtype=torch.float32, out=sum_)
