"""u(x_i, y_j) of rows that match: each with its own, or listed pairs.

Of many rows it is formed and differentiated part by part, so that neither gathered rows nor their differences are held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..backends.row_dot import in_one_pass
from ..backends.visits import PART, parts
from ..equation.problem import accumulation_dtype

PART_OF_PAIRS = 2**17  # of rows that are copied: larger copies are given back when freed, and fault at each call
PART_ELSEWHERE = 2**25  # numbers of a part; on a GPU each costs launches


class _RowDot(torch.autograd.Function):
    """<x_i, y_i> in one pass, where x * y would be written and read again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        product: Tensor = torch.ops.fastcl.cpu_row_dot(x, y)
        return product

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        g, (of_x, of_y) = upstream[0].unsqueeze(1), ctx.needs_input_grad
        return (g * y if of_x else None), (g * x if of_y else None)


def one_pass_dot(x: Tensor, y: Tensor) -> Tensor:
    """row_dot for losses that take less time in their products than in passes over rows."""
    if in_one_pass(x, y) and x.shape == y.shape:
        product: Tensor = _RowDot.apply(x, y)
        return product
    return row_dot(x, y)


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in the accumulation dtype."""
    return _of_pairs(x, y, None, None, False)


def row_sqdist(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_i|^2 in the accumulation dtype, from differences."""
    return _of_pairs(x, y, None, None, True)


def pair_dot(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """<x_i, y_j> of listed pairs in the accumulation dtype."""
    return _of_pairs(x, y, i, j, False)


def _of_pairs(x: Tensor, y: Tensor, i: Tensor | None, j: Tensor | None, squared: bool) -> Tensor:
    many = transforms.values_are_here() and len(_parts(x, i)) > 1  # sizes of an exported program are symbols
    found: Tensor = _OfPairs.apply(x, y, i, j, squared) if many else _plainly(x, y, i, j, squared)
    return found


def _plainly(x: Tensor, y: Tensor, i: Tensor | None, j: Tensor | None, squared: bool) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    a, b = (rows.to(dtype) if of is None else rows.to(dtype).index_select(0, of) for rows, of in ((x, i), (y, j)))
    return ((a - b).square() if squared else a * b).sum(1)


def _parts(x: Tensor, i: Tensor | None) -> list[slice]:
    here = PART if i is None else min(PART, PART_OF_PAIRS)
    return list(parts(x, None if i is None else len(i), here if x.device.type == "cpu" else PART_ELSEWHERE))


class _OfPairs(torch.autograd.Function):
    """The same part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, i: Tensor | None, j: Tensor | None, squared: bool) -> Tensor:
        ctx.save_for_backward(x, y, i, j)
        ctx.squared = squared
        found = [_plainly(_of(part, x, i), _of(part, y, j), None, None, squared) for part in _parts(x, i)]
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, i, j = ctx.saved_tensors
        g, (of_x, of_y) = upstream[0].unsqueeze(1), ctx.needs_input_grad[:2]
        recorded = torch.is_grad_enabled() or transforms.of_gradients()
        sums = [g.new_zeros(rows.shape) if of else None for rows, of in ((x, of_x), (y, of_y))]
        for part in (slice(None),) if recorded else _parts(x, i):
            a, b = _of(part, x, i).to(g.dtype), _of(part, y, j).to(g.dtype)
            along = 2.0 * (a - b) if ctx.squared else None
            for k, (of, other) in enumerate(((i, b), (j, a))):
                total = sums[k]
                if total is None:
                    continue
                slope = other if along is None else along if k == 0 else -along
                sums[k] = _added(total, part, of, g[part] * slope, in_place=not recorded)
        dx, dy = (None if t is None else t.to(rows.dtype) for t, rows in zip(sums, (x, y), strict=True))
        return dx, dy, None, None, None


def _of(part: slice, rows: Tensor, index: Tensor | None) -> Tensor:
    """The rows of a part."""
    return rows[part] if index is None else rows.index_select(0, index[part])


def _added(total: Tensor, part: slice, index: Tensor | None, rows: Tensor, in_place: bool) -> Tensor:
    """The sum of what each row got, with that of a part."""
    if in_place:
        if index is None:
            total[part].copy_(rows)
        else:
            total.index_add_(0, index[part], rows)
        return total
    return rows if index is None else total.index_add(0, index[part], rows)
