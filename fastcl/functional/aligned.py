"""Two views whose rows of equal index match: their rows of unit length, and the operand of each matching pair.

For a few dozen rows most of a loss's time goes into the nodes of autograd, so that all of this is one where plain PyTorch looks on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.row_dot import in_one_pass
from ..equation import checks
from ..equation.names import Operand
from ..precision import stacked
from . import rows as passes
from .matching import row_dot, row_sqdist


def aligned_views(
    x: Tensor,
    y: Tensor,
    normalize: bool,
    names: tuple[str, str] = ("x", "y"),
    same_rows: bool = True,
    operand: Operand = "dot",
) -> tuple[Tensor, Tensor, Tensor]:
    """Two checked views, normalised when asked, and u(x_i, y_i) of the rows that both have, in the accumulation dtype."""
    checks.pair_of_matrices(names[0], x, names[1], y, same_rows)
    if normalize and x.shape[1] and in_one_pass(x, y):
        x, y, matching = _Aligned.apply(x, y, operand == "sqdist")
        return x, y, matching
    if normalize:
        x, y = passes.normalize_rows(x), passes.normalize_rows(y)
    k = min(x.shape[0], y.shape[0])
    of_pair = row_dot if operand == "dot" else row_sqdist
    return x, y, of_pair(passes.leading(x, k), passes.leading(y, k))


class _Aligned(torch.autograd.Function):
    """The same of float32 rows in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        u, v = torch.ops.fastcl.cpu_unit_rows(x), torch.ops.fastcl.cpu_unit_rows(y)
        ctx.squared, ctx.matching = squared, min(x.shape[0], y.shape[0])
        ctx.save_for_backward(x, y, u, v)
        # Else rows without a gradient would ask the pairs for one: half of a backward's products.
        ctx.mark_non_differentiable(*(t for t, of in zip((u, v), ctx.needs_input_grad, strict=False) if not of))
        a, b = u[: ctx.matching], v[: ctx.matching]
        if squared:
            a = b = a - b
        return u, v, torch.ops.fastcl.cpu_row_dot(a, b)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, u, v = ctx.saved_tensors
        passes.check_saved(torch.float32, x, y, u, v)
        of_u, of_v, g = upstream
        u, v = u[: ctx.matching], v[: ctx.matching]

        def of(rows: Tensor, of_unit: Tensor | None, own: Tensor, other: Tensor) -> Tensor | None:
            if g is not None:
                slope = 2.0 * (own - other) if ctx.squared else other
                of_unit = _added(of_unit, g.unsqueeze(1), slope, rows.shape[0])
            return None if of_unit is None else passes.gradient_of_unit(of_unit, rows)

        wanted = ctx.needs_input_grad
        return of(x, of_u, u, v) if wanted[0] else None, of(y, of_v, v, u) if wanted[1] else None, None


def _added(to: Tensor | None, factor: Tensor, rows: Tensor, n: int) -> Tensor:
    """to + factor * rows, where `to` may have more rows, or be absent."""
    k = rows.shape[0]
    if k == n:
        return factor * rows if to is None else torch.addcmul(to, factor, rows)
    longer = stacked(factor * rows, rows.new_zeros(n - k, rows.shape[1]))
    return longer if to is None else to + longer
