"""The fused form: no workspace beyond O(n + m), and the same bits in every run.

    fused_rows                                   r and c: 1 product of 2 n m d flops, half with x itself
    fused_gradient x against y                   W Y:     2
    fused_gradient y against x                   W^T X:   2

so that rows and columns take 5 products where the strip form takes 4.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ..backends.sides import Sides, Sums
from ..backends.tiles import State, Weighting, from_rows, weight_unit, weighting
from ..equation.problem import Gradients, Problem, Wanted
from ..precision import dot_precision
from . import tuning
from .fused_kernels import fused_gradient, fused_rows, merge_columns
from .launching import FUSED_OPTIONS, difference, pair_slope, pair_value, prepared, present, vectors, weight_arguments
from .reductions import FAINT

_ALIGN = 16
_MERGED = 128  # columns that one program of merge_columns joins


class Fused:
    """The operands of one problem as the fused kernels take them."""

    def __init__(self, p: Problem) -> None:
        self.p, self.sides = p, Sides(p, p.x.dtype)
        self.x = aligned(self.sides.x)
        self.y = self.x if p.y is None else aligned(self.sides.y)
        self.d = self.x.shape[1]
        self.precision = dot_precision(p.x)
        self.arch = tuning.architecture(p.x.device)
        self.kind = tuning.kind_of(p.x.dtype, self.precision)

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """r, and c when asked (it is r with x itself)."""
        p, s = self.p, self.sides
        r = State.of(p, s.n)
        c = r if s.symmetric else State.of(p, s.m) if p.columns else None
        lse = r.top is not None
        tile = tuning.rows_tiles(self.arch, self.kind, self.d)[0]
        self._reduce(r, c, tile, shared=lse, far=far(s) if lse else None)
        if lse:
            # Whether that lost a row or a column says the device alone: the second launch returns at once where it did not.
            redo = faint(p, r.sum if c is None or c is r else torch.cat((r.sum, c.sum)))
            self._reduce(r, c, tile, shared=False, redo=redo)
        return r.result(), c.result() if p.columns and c is not None else None

    def _reduce(
        self, r: State, c: State | None, tile: tuning.RowsTile, *, shared: bool, far: Tensor | None = None,
        redo: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One launch of fused_rows, and the columns of its programs joined."""
        p, s, absent = self.p, self.sides, self.p.scale
        config = tile._asdict() | FUSED_OPTIONS
        programs = min(triton.cdiv(s.n, config["BM"]), tuning.programs(p.x.device))
        shape = (programs, s.m) if c is not None else (1,)
        col_sum = p.scale.new_zeros(shape)
        col_top = p.scale.new_full(shape, float("-inf")) if redo is not None else col_sum
        both = {
            "COL_TOP": col_top, "COL_SUM": col_sum, "A": p.scale, "B": p.shift, "FAR": present(far, absent),
            "REDO": present(redo, absent), "LSE": r.top is not None, "SHARED": shared, "SQDIST": p.operand == "sqdist",
        }  # fmt: skip
        fused_rows[(programs,)](
            X=self.x, Y=self.y, TOP=present(r.top, r.sum), SUM=r.sum, n=s.n, m=s.m, d=self.d, diff=difference(p),
            sx=self.x.stride(0), sy=self.y.stride(0), columns_pitch=s.m, EVEN=self.d % config["BD"] == 0, PAIR=pair_value(s),
            COLUMNS=c is not None, SYMMETRIC=s.symmetric, PRECISION=self.precision, **vectors(s) | both, **config,
        )  # fmt: skip
        if c is not None:
            merge_columns[(triton.cdiv(s.m, _MERGED),)](
                TOP=present(c.top, c.sum), SUM=c.sum, programs=programs, size=s.m, pitch=s.m, BLOCK=_MERGED, JOIN=s.symmetric,
                **both, **FUSED_OPTIONS,
            )  # fmt: skip

    def sweep(self, weights: Weighting, sums: Sums, swapped: bool, values: Tensor | None = None) -> None:
        """One sweep of fused_gradient: x against y, or (swapped) y against x; `values` (n,) receives the row sums of f."""
        p, s = self.p, self.sides
        x, y, n, m, diff = self.x, self.y, s.n, s.m, difference(p)
        wy, w_rows = sums.wy, sums.w_rows
        if swapped:
            x, y, n, m, diff, weights = y, x, m, n, -diff, weights.swapped()
            wy, w_rows = sums.wtx, sums.w_cols
        # That of rows of no width has no address, and the kernel stores its padding.
        wy = p.scale.new_empty(n, self.d) if wy is None or wy.shape[1] == 0 else wy
        tile = tuning.gradient_tiles(self.arch, self.kind, p.reduce, self.d)[0]
        # Which of the two says the device alone: both are launched, and one returns at once.
        for close in (True, False) if weights.reference is not None else (True,):
            served = tile if close else tuning.TWO_EXPONENTIALS.get((self.arch, tile), tile)
            config = served._asdict() | FUSED_OPTIONS
            grid = (triton.cdiv(n, config["BM"]), triton.cdiv(self.d, config["PART"]))
            even = self.d % config["PART"] == 0 and self.d % config["BD"] == 0
            fused_gradient[grid](
                X=x, Y=y, WY=wy, W_ROWS=present(w_rows, p.scale), VALUES=present(values, p.scale), n=n, m=m, d=self.d,
                diff=diff, sx=x.stride(0), sy=y.stride(0), swy=self.d, EVEN=even, PAIR=pair_value(s), SLOPE=pair_slope(s),
                ROW_SUMS=w_rows is not None, VALUE=values is not None, CLOSE=close, PRECISION=self.precision,
                **weight_arguments(weights, p.scale), **vectors(s, swapped), **config,
            )  # fmt: skip


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked, in one sweep."""
    if p.n == 0 or p.m == 0:
        return State.of(p, p.n).result(), State.of(p, p.m).result() if p.columns else None
    return Fused(p).rows()


def holds_gradients(p: Problem) -> bool:
    """Whether weights can be stored in 16 bits before the tile's largest is known: those of a float16 sum cannot."""
    return p.x.dtype != torch.float16 or p.reduce == "logsumexp"


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None,
    values: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>: a sweep for each side. `values` (n,) receives the row sums of f on the way."""
    fused = Fused(p)
    sums, unit = Sums(fused.sides, wanted, width=fused.d), None
    if p.n and p.m:
        unit = weight_unit(p, g, h if p.y is not None else g)
        by = prepared(weighting(p, r, c, g, h, unit))
        if sums.wy is not None or sums.w_rows is not None or values is not None:
            fused.sweep(by, sums, swapped=False, values=values)
        if p.y is not None and (sums.wtx is not None or sums.w_cols is not None):
            fused.sweep(by, sums, swapped=True)
    return sums.gradients(dtype or p.x.dtype, unit)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """Value and gradients of the total form; a sum takes its value from the gradient's own sweep."""
    if p.reduce == "sum" and outer == "sum" and any(wanted):
        r, ones = p.scale.new_zeros(p.n), p.scale.new_ones(p.n)
        grads = gradients(p, r, None, ones, None, wanted, p.dtype, r)
        return r.sum(dtype=torch.float64).to(p.dtype), grads, None
    return from_rows(p, rows(p)[0], positive, outer, wanted, partial(gradients, p))


def far(s: Sides) -> Tensor:
    """(the largest norm of x, of y, the largest bx + by): what bounds every logit, by Cauchy and Schwarz."""
    largest = [_largest_norm(s.x, s.norm_x), _largest_norm(s.y, s.norm_y)]
    bias = torch.zeros_like(largest[0])
    for each in (s.p.bias_x, s.p.bias_y):
        bias = bias if each is None else bias + each.amax()
    return torch.stack((*largest, bias))


def _largest_norm(rows: Tensor, squared: Tensor | None) -> Tensor:
    if squared is not None:
        return squared.amax().sqrt()
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).amax()


def aligned(t: Tensor) -> Tensor:
    """t itself where 16-byte asynchronous copies can read its rows; otherwise an O(n d) copy, padded with zero columns.

    A width or a row stride that is no multiple of 16 elements would leave the kernels with loads of single elements.
    """
    width = max(_ALIGN, -(-t.shape[1] // _ALIGN) * _ALIGN)
    if t.shape[1] == width and t.stride(1) == 1 and t.stride(0) % _ALIGN == 0 and t.data_ptr() % 16 == 0:
        return t
    padded = F.pad(t, (0, width - t.shape[1]))
    return padded if padded.is_contiguous() else padded.contiguous()


def faint(p: Problem, sums: Tensor) -> Tensor:
    """1 where a sum over the shared reference has lost digits to underflow, or has none; 0 where all serve."""
    lost = (sums < FAINT) | sums.isnan()
    if "groups" in p.mask.kind:
        lost &= sums != 0.0  # rows and columns without a pair
    return lost.any().to(sums.dtype)
