"""The one op beyond one process: own rows of x against the rows of y of every rank, and home with the results.

    r_i = REDUCE over all ranks' j          c_j = REDUCE over all ranks' i          (own i, own j)

Each visit (visits.py) is one call of the engine's op; partial results merge, which is all that this rests on. In the backward
the visits are made again with g and r of own rows, and h and c travelling with the columns: a normaliser of the whole batch
makes each visit's gradients those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..equation.masks import Mask
from ..equation.problem import DIFFERENTIABLE, Problem, accumulation_dtype
from ..equation.reductions import merge
from .derivatives import first_derivatives
from .visits import Tour, Visit
from .wire import Columns

MASKING = (
    "group_x",
    "group_y",
    "limit_x",
    "limit_y",
    "guide_x",
    "guide_y",
)  # what of a mask belongs to rows, in the op's order
GRADIENTS = ("x", "y", "scale", "shift", "bias_x", "bias_y")  # the order of the op's differentiable arguments


@dataclass(frozen=True)
class Plan:
    """A problem without its tensors, and the tour that solves it."""

    tour: Tour
    mask: Mask
    operand: str
    pair: str
    constants: tuple[float, ...]
    reduce: str
    columns: bool
    backend: str

    @property
    def same(self) -> bool:
        """Whether x meets itself."""
        return self.tour.columns is None

    def mask_of(self, visit: Visit) -> tuple[int, int, str]:
        """Offsets and kind: self-pairs are on the diagonal of own rows and own columns, wherever those stand."""
        kind, rank = self.mask.kind, self.tour.wire.rank
        if kind != "off_diagonal":
            return 0, 0, kind
        before = visit.before(rank)
        if before is None or visit.start >= self.tour.sizes[rank]:
            return 0, 0, "all"
        return self.mask.row_offset + before, self.mask.col_offset, kind


class PairReduce(torch.autograd.Function):
    """(r, c) of own rows and own columns; c is empty where it is not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        bias_x: Tensor | None,
        bias_y: Tensor | None,
        *masking: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tensors = (x, y, scale, shift, bias_x, bias_y, *masking)
        sweep = Sweep(plan, tensors)
        r, c = sweep.reduce()
        ctx.plan, ctx.present = plan, [t is not None for t in tensors]
        ctx.save_for_backward(*(t for t in tensors if t is not None), r, c)
        return r, c

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        tensors = tuple(next(saved) if present else None for present in ctx.present)
        r, c = saved
        wanted = list(ctx.needs_input_grad[1 : 1 + DIFFERENTIABLE])
        gradients = Sweep(ctx.plan, tensors).gradients(r, c, g.contiguous(), h.contiguous(), wanted)
        return (None, *gradients, *(None for _ in MASKING))


class Sweep:
    """The visits of one problem: what each does with own rows and with the columns that came."""

    def __init__(self, plan: Plan, tensors: tuple[Tensor | None, ...]) -> None:
        self.plan = plan
        x, self.y, scale, shift, self.bias_x, self.bias_y, *masking = tensors
        self.group_x, self.group_y, self.limit_x, self.limit_y, self.guide_x, self.guide_y = masking
        assert x is not None and scale is not None and shift is not None
        self.x, self.scale, self.shift = x.detach().contiguous(), scale.detach(), shift.detach()
        self.dtype = accumulation_dtype(x.dtype)

    def columns(self, *more: Tensor) -> Columns:
        """What travels: y with its bias, groups, limits and guides, and what else it needs. Told apart again by `arguments`."""
        beside = self._beside()
        y = self.x if self.plan.same else self.y
        return tuple(t.detach().contiguous() for t in (y, self.bias_y, *beside, *more) if t is not None)

    def _beside(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Groups, limits and guides of own columns."""
        if self.plan.same:
            return self.group_x, self.limit_x, self.guide_x
        return self.group_y, self.limit_y, self.guide_y

    def arguments(self, visit: Visit, columns: Columns) -> tuple[tuple[Any, ...], Columns]:
        """The op's arguments for a visit, and what came beside them."""
        plan, rows = self.plan, slice(visit.start, visit.stop)
        own = (self.bias_x, self.group_x, self.limit_x, self.guide_x)
        bias_x, group_x, limit_x, guide_x = (None if t is None else t[rows] for t in own)
        came = iter(columns)
        y: Tensor | None = next(came)
        bias_y = None if self.bias_y is None else next(came)
        group_y, limit_y, guide_y = (None if t is None else next(came) for t in self._beside())
        alone = plan.same and visit.own
        if alone:
            y = group_y = limit_y = guide_y = None
        row_offset, col_offset, kind = plan.mask_of(visit)
        both = (plan.columns or plan.same) and not alone
        arguments = (
            self.x[rows], y, self.scale, self.shift, bias_x, bias_y, group_x, group_y, limit_x, limit_y, guide_x, guide_y,
            row_offset, col_offset, 0, kind, plan.operand, plan.pair, list(plan.constants), plan.reduce, both,
        )  # fmt: skip
        return arguments, tuple(came)

    def _blank(self, rows: int) -> Tensor:
        nothing = float("-inf") if self.plan.reduce == "logsumexp" else 0.0
        return self.x.new_full((rows,), nothing, dtype=self.dtype)

    def _merged(self, a: Tensor, b: Tensor) -> Tensor:
        return merge(a, b) if self.plan.reduce == "logsumexp" else a + b

    def reduce(self) -> tuple[Tensor, Tensor]:
        """r and c."""
        plan = self.plan
        r = self._blank(self.x.shape[0])
        both = plan.columns or plan.same

        def work(visit: Visit, columns: Columns) -> Columns:
            arguments, _ = self.arguments(visit, columns)
            here, there = torch.ops.fastcl.pair_reduce(*arguments, plan.backend)
            rows = slice(visit.start, visit.stop)
            r[rows] = self._merged(r[rows], here)
            return (there,) if arguments[-1] else ()

        results = plan.tour.make(
            self.columns(),
            work,
            blank=lambda rows: (self._blank(rows),) if both else (),
            join=lambda a, b: (self._merged(a[0], b[0]),),
        )
        if plan.same:
            return self._merged(r, results[0]), r.new_empty(0)
        return r, results[0] if plan.columns else r.new_empty(0)

    def gradients(self, r: Tensor, c: Tensor, g: Tensor, h: Tensor, wanted: list[bool]) -> list[Tensor | None]:
        """Of x, y, scale, shift, bias_x, bias_y: of <g, r> + <h, c> summed over ranks."""
        plan, d = self.plan, self.x.shape[1]
        here = {name: torch.zeros_like(self.x, dtype=self.dtype) for name in ("x",) if wanted[0]}
        here |= {name: self.scale.new_zeros(()) for name, w in zip(("scale", "shift"), wanted[2:4], strict=True) if w}
        if wanted[4]:
            here["bias_x"] = r.new_zeros(r.shape)
        if plan.same:  # the columns' gradient is x's too, and both normalisers are r
            wanted, c, h = [wanted[0], wanted[0], *wanted[2:4], False, False], r, g
        home = [name for name in ("y", "bias_y") if wanted[GRADIENTS.index(name)]]
        several = plan.tour.wire.world > 1  # visits, whose parts add up before they are rounded to rows of 16 bits

        def work(visit: Visit, columns: Columns) -> Columns:
            arguments, normalisers = self.arguments(visit, columns)
            rows = slice(visit.start, visit.stop)
            beside = normalisers if arguments[-1] else (c.new_empty(0), h.new_empty(0))
            asked = [w and not (i == 1 and arguments[1] is None) for i, w in enumerate(wanted)]
            found = dict(
                zip(
                    GRADIENTS,
                    torch.ops.fastcl.pair_reduce_backward(
                        *arguments, r[rows], beside[0], g[rows], beside[1], asked, several, plan.backend
                    ),
                    strict=True,
                )
            )
            for name, total in here.items():
                (total[rows] if total.dim() else total).add_(found[name])
            return tuple(found[name].to(self.dtype) for name in home) if arguments[1] is not None else ()

        def blank(rows: int) -> Columns:
            shapes = {"y": (rows, d), "bias_y": (rows,)}
            return tuple(r.new_zeros(shapes[name]) for name in home)

        columns = self.columns(c, h) if plan.columns or plan.same else self.columns()
        results = dict(
            zip(
                home,
                plan.tour.make(columns, work, blank, lambda a, b: tuple(s + t for s, t in zip(a, b, strict=True))),
                strict=True,
            )
        )
        if plan.same and "y" in results:
            here["x"] += results.pop("y")
        answer = here | results
        rows = {"x", "y"}
        return [
            None if name not in answer else answer[name].to(self.x.dtype) if name in rows else answer[name]
            for name in GRADIENTS
        ]


def pair_reduce(plan: Plan, p: Problem) -> tuple[Tensor, Tensor]:
    """(r, c) of a checked problem; x and y cast as autocast would."""
    x, y, masking = cast(p)
    with torch.autocast(p.x.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = PairReduce.apply(plan, x, y, p.scale, p.shift, p.bias_x, p.bias_y, *masking)
    return found


def cast(p: Problem) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """x and y as autocast would have them, and MASKING."""
    device = p.x.device.type
    x, y = p.x, p.y
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, y = x.to(dtype), None if y is None else y.to(dtype)
    mask = p.mask
    groups = (mask.group_x, mask.group_x if mask.group_y is None else mask.group_y)
    return x, y, (*groups, mask.limit_x, mask.limit_y, mask.guide_x, mask.guide_y)
