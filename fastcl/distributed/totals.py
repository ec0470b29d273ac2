"""The total forms beyond one process: value and gradients from one sweep, where a visit knows its own weights.

    sum_i r_i with reduce="sum"                                     any visits, since each pair stands for itself
    sum_i r_i, sum_i softplus(r_i - p_i) with reduce="logsumexp"    own rows that meet all columns at once: gathered, across views

Each visit is one call of the engine's total: z is formed once, where rows (pairs.py) form it again in the backward. Gradients of
the columns go home in the forward; the backward scales what was kept, and sends nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import derivatives
from ..equation.problem import DIFFERENTIABLE, TENSORS, Problem
from .derivatives import first_derivatives
from .pairs import Plan, Sweep, parted
from .visits import Tour, Visit
from .wire import Columns


def applies(tour: Tour, p: Problem, outer: str) -> bool:
    """Whether one sweep gives this total."""
    if p.bias_x is not None or p.bias_y is not None or outer == "pooled":
        return False
    return p.reduce == "sum" or not (p.y is None or tour.ring)


class PairTotal(torch.autograd.Function):
    """This rank's share of outer(r), float64: the visits that it makes. Shares add up over ranks, and so do gradients of shares.

    The upstream gradient is that of the sum over ranks, hence the same on every rank, as long as nothing but that sum is made of
    the share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        outer: str,
        wanted: tuple[bool, ...],
        positive: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        sweep = Sweep(plan, tensors)
        share, gradients = _visit(sweep, outer, positive, wanted)
        ctx.dtype, ctx.present = sweep.p.x.dtype, [t is not None for t in gradients]
        ctx.save_for_backward(*(t for t in gradients if t is not None))
        return share

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        found = iter(derivatives.scaled(upstream[0], ctx.saved_tensors))
        positive, *rows, scale, shift = (next(found) if present else None for present in ctx.present)
        rows = [None if t is None else t.to(ctx.dtype) for t in rows]
        return (None, None, None, positive, *rows, scale, shift, *(None for _ in range(TENSORS - DIFFERENTIABLE + 2)))


def _visit(
    sweep: Sweep, outer: str, positive: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The share, and the gradients of the sum of all shares: of own positive, x, y, and shares of those of scale and shift."""
    plan, x, dtype = sweep.plan, sweep.p.x, sweep.p.dtype
    share = x.new_zeros((), dtype=torch.float64)
    if sweep.same:  # the columns' gradient is x's too
        wanted = (wanted[0], wanted[0], *wanted[2:])
    shapes = {"x": x.shape, "scale": (), "shift": ()}
    here = {
        name: x.new_zeros(shapes[name], dtype=dtype)
        for name, w in zip(("x", "scale", "shift"), (wanted[0], *wanted[2:]), strict=True)
        if w
    }
    dpositive = None if positive is None else torch.zeros_like(positive)

    def work(visit: Visit, columns: Columns) -> Columns:
        arguments, _ = sweep.arguments(visit, columns)
        rows, alone = slice(visit.start, visit.stop), arguments[1] is None
        asked = [wanted[0], wanted[1] and not alone, *wanted[2:], False, False]
        value, *found = torch.ops.fastcl.pair_total(
            *arguments[:-1], False, None if positive is None else positive[rows], outer, asked, plan.backend
        )
        times = 2.0 if sweep.same and not alone else 1.0  # a visit of two shards with each other stands for both orders
        share.add_(value, alpha=times)
        for name, total in here.items():
            (total[rows] if total.dim() else total).add_(found[{"x": 0, "scale": 2, "shift": 3}[name]], alpha=times)
        if dpositive is not None:
            dpositive[rows] += found[-1]
        return (times * found[1],) if asked[1] else ()

    def blank(rows: int) -> Columns:
        return (x.new_zeros((rows, x.shape[1]), dtype=dtype),) if wanted[1] else ()

    results = plan.tour.make(sweep.columns(), work, blank, lambda a, b: (a[0] + b[0],))
    dy = results[0] if results else None
    if sweep.same and dy is not None:
        here["x"], dy = here["x"] + dy, None
    return share, [dpositive, here.get("x"), dy, here.get("scale"), here.get("shift")]


def share_of(tour: Tour, p: Problem, backend: str, outer: str, positive: Tensor | None) -> Tensor:
    """This rank's share of outer(r) of a checked problem; x and y cast as autocast would."""
    plan, tensors = parted(tour, p, backend)
    recording = torch.is_grad_enabled()
    wanted = tuple(recording and t is not None and t.requires_grad for t in tensors[:4])
    positive = None if positive is None else positive.to(p.dtype)
    with torch.autocast(p.x.device.type, enabled=False):
        share: Tensor = PairTotal.apply(plan, outer, wanted, positive, *tensors)
    return share
