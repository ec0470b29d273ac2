"""The one op beyond one process: own rows of x against the rows of y of every rank, and home with the results.

    r_i = REDUCE over all ranks' j          c_j = REDUCE over all ranks' i          (own i, own j)

Each visit (visits.py) is one call of the engine's op; partial results merge, which is all that this rests on. In the backward
the visits are made again with g and r of own rows, and h and c travelling with the columns: a normaliser of the whole batch
makes each visit's gradients those of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..equation.masks import Mask
from ..equation.problem import DIFFERENTIABLE, TENSORS, Gradients, Problem, pack, unpack
from ..equation.reductions import merge
from .derivatives import first_derivatives
from .visits import Tour, Visit
from .wire import Columns

BESIDE = ("group", "limit", "guide")  # what of a mask belongs to rows, each of rows of x and of y
MASKING = tuple(f"{name}_{side}" for side in "xy" for name in BESIDE)
GRADIENTS = Gradients._fields


@dataclass(frozen=True)
class Plan:
    """A packed problem without its tensors, and the tour that solves it."""

    tour: Tour
    rest: tuple[Any, ...]
    backend: str


class PairReduce(torch.autograd.Function):
    """(r, c) of own rows and own columns; c is empty where it is not wanted."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        r, c = Sweep(plan, tensors).reduce()
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
        p = unpack((*tensors, *plan.rest))
        self.plan = plan
        self.p = replace(p, x=p.x.detach().contiguous(), scale=p.scale.detach(), shift=p.shift.detach())
        self.same = p.y is None  # x meets itself

    def columns(self, *more: Tensor) -> Columns:
        """What travels: y with its bias, groups, limits and guides, and what else it needs. Told apart again by `arguments`."""
        return tuple(t.detach().contiguous() for t in (*self._own(1), *more) if t is not None)

    def _own(self, side: int) -> tuple[Tensor | None, ...]:
        """Rows of x (0) or columns (1) with their bias, groups, limits and guides."""
        p, side = self.p, 0 if self.same else side
        beside = (getattr(p.mask, f"{name}_{'xy'[side]}") for name in BESIDE)
        return ((p.x, p.y)[side], (p.bias_x, p.bias_y)[side], *beside)

    def arguments(self, visit: Visit, columns: Columns) -> tuple[tuple[Any, ...], Columns]:
        """The op's arguments for a visit, and what came beside them."""
        came, alone = iter(columns), self.same and visit.own
        x, bias_x, *of_x = (None if t is None else t[visit.start : visit.stop] for t in self._own(0))
        y, bias_y, *of_y = (None if t is None else next(came) for t in self._own(1))
        assert x is not None
        if alone:
            y, of_y = None, [None for _ in BESIDE]
        both = (self.p.columns or self.same) and not alone
        masking: dict[str, Any] = dict(zip(MASKING, (*of_x, *of_y), strict=True))
        mask = self._mask(visit)._replace(**masking)
        return pack(replace(self.p, x=x, y=y, bias_x=bias_x, bias_y=bias_y, mask=mask, columns=both)), tuple(came)

    def _mask(self, visit: Visit) -> Mask:
        """For a visit: self-pairs are on the diagonal of own rows and own columns, wherever those stand."""
        mask, tour = self.p.mask, self.plan.tour
        if mask.kind != "off_diagonal":
            return mask
        before = visit.before(tour.wire.rank)
        if before is None or visit.start >= tour.sizes[tour.wire.rank]:
            return mask._replace(kind="all")
        return mask._replace(row_offset=mask.row_offset + before)

    def _blank(self, rows: int) -> Tensor:
        nothing = float("-inf") if self.p.reduce == "logsumexp" else 0.0
        return self.p.x.new_full((rows,), nothing, dtype=self.p.dtype)

    def _merged(self, a: Tensor, b: Tensor) -> Tensor:
        return merge(a, b) if self.p.reduce == "logsumexp" else a + b

    def reduce(self) -> tuple[Tensor, Tensor]:
        """r and c."""
        plan = self.plan
        r = self._blank(self.p.n)
        both = self.p.columns or self.same

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
        if self.same:
            return self._merged(r, results[0]), r.new_empty(0)
        return r, results[0] if self.p.columns else r.new_empty(0)

    def gradients(self, r: Tensor, c: Tensor, g: Tensor, h: Tensor, wanted: list[bool]) -> list[Tensor | None]:
        """Of x, y, scale, shift, bias_x, bias_y: of <g, r> + <h, c> summed over ranks."""
        plan, x, dtype = self.plan, self.p.x, self.p.dtype
        here = {name: torch.zeros_like(x, dtype=dtype) for name in ("x",) if wanted[0]}
        here |= {name: self.p.scale.new_zeros(()) for name, w in zip(("scale", "shift"), wanted[2:4], strict=True) if w}
        if wanted[4]:
            here["bias_x"] = r.new_zeros(r.shape)
        if self.same:  # the columns' gradient is x's too, and both normalisers are r
            wanted, c, h = [wanted[0], wanted[0], *wanted[2:4], False, False], r, g
        home = [name for name in ("y", "bias_y") if wanted[GRADIENTS.index(name)]]
        several = plan.tour.wire.world > 1  # visits, whose parts add up before they are rounded to rows of 16 bits

        def work(visit: Visit, columns: Columns) -> Columns:
            arguments, normalisers = self.arguments(visit, columns)
            rows = slice(visit.start, visit.stop)
            beside = normalisers if arguments[-1] else (c.new_empty(0), h.new_empty(0))
            asked = [w and not (i == 1 and arguments[1] is None) for i, w in enumerate(wanted)]
            given = (r[rows], beside[0], g[rows], beside[1], asked, several, plan.backend)
            found = dict(zip(GRADIENTS, torch.ops.fastcl.pair_reduce_backward(*arguments, *given), strict=True))
            for name, total in here.items():
                (total[rows] if total.dim() else total).add_(found[name])
            return tuple(found[name].to(dtype) for name in home) if arguments[1] is not None else ()

        def blank(rows: int) -> Columns:
            shapes = {"y": (rows, x.shape[1]), "bias_y": (rows,)}
            return tuple(r.new_zeros(shapes[name]) for name in home)

        def join(a: Columns, b: Columns) -> Columns:
            return tuple(s + t for s, t in zip(a, b, strict=True))

        columns = self.columns(c, h) if self.p.columns or self.same else self.columns()
        answer = here | dict(zip(home, plan.tour.make(columns, work, blank, join), strict=True))
        if self.same and "y" in answer:
            answer["x"] += answer.pop("y")
        answer |= {name: answer[name].to(x.dtype) for name in ("x", "y") if name in answer}
        return [answer.get(name) for name in GRADIENTS]


def rows_of(tour: Tour, p: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(r, c) of a checked problem; x and y cast as autocast would."""
    plan, tensors = parted(tour, p, backend)
    with torch.autocast(p.x.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = PairReduce.apply(plan, *tensors)
    return found


def parted(tour: Tour, p: Problem, backend: str) -> tuple[Plan, tuple[Any, ...]]:
    """The plan, and the tensors in the op's order; x and y as autocast would have them."""
    device = p.x.device.type
    if torch.is_autocast_enabled(device) and p.x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        p = replace(p, x=p.x.to(dtype), y=None if p.y is None else p.y.to(dtype))
    packed = pack(p)
    return Plan(tour, packed[TENSORS:], backend), packed[:TENSORS]
