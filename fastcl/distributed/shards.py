"""The union of the ranks' rows, during one call of an objective: how many rows it has, sums over it, pairs of it.

Sums over ranks are made of everybody's own sum, gathered and added in rank order: the same bits on every rank. Their gradient is
the sum of the upstream gradients of all ranks, since what follows a sum may differ from rank to rank (fastcl.distributed).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.closed_form import keeps_digits, squares_of
from ..backends.reference import outer_value
from ..backends.sides import is_known
from ..backends.visits import all_but_one
from ..equation import checks
from ..equation.intrinsics import softplus
from ..equation.names import Strategy
from ..equation.problem import Problem
from ..ops import problem
from ..precision import product
from . import pairs, totals
from .derivatives import first_derivatives
from .visits import Tour
from .wire import Wire

GATHER_LIMIT = 2**28  # bytes of gathered rows a rank, above which strategy "auto" takes the ring


def checked(x: Tensor, y: Tensor | None, arguments: dict[str, Any]) -> tuple[Problem, str]:
    """The problem and the backend of a call of pair_reduce, checked as there."""
    arguments = dict(arguments)
    backend = arguments.pop("backend", None)
    return problem(x, y, **arguments), "auto" if backend is None else backend


@dataclass(frozen=True)
class Shards:
    """The union of the rows of all ranks; fastcl.batch.Union is what it answers.

    Args:
        wire: the ranks.
        layouts: for each tensor of rows of the call, how many rows each rank has.
        strategy: "auto", "gather" or "ring".
    """

    wire: Wire
    layouts: tuple[tuple[int, ...], ...]
    strategy: Strategy = "auto"

    def sizes(self, rows: int, device: torch.device) -> tuple[int, ...]:
        """How many rows each rank has of a tensor that has `rows` here.

        Rows of a formula are those of an argument, views of them stacked, or those that match in two arguments. Where
        that does not tell on every rank which they are (all ranks know all layouts, hence agree on that), the ranks ask each other.
        """
        alike = max(map(self.layouts.count, self.layouts), default=1)  # no more views than arguments of as many rows
        stacked = {tuple(views * n for n in layout) for layout in self.layouts for views in range(1, max(2, alike) + 1)}
        stacked |= {tuple(map(min, *two)) for two in combinations(self.layouts, 2)}
        if all(len({layout[k] for layout in stacked}) == len(stacked) for k in range(self.wire.world)):
            for layout in stacked:
                if layout[self.wire.rank] == rows:
                    return layout
            raise AssertionError(f"{rows} rows are those of no argument: {sorted(stacked)}")
        return tuple(self.wire.everywhere(torch.tensor([rows], device=device)).view(-1).tolist())

    def count(self, x: Tensor) -> int:
        """Rows of the union."""
        return sum(self.sizes(x.shape[0], x.device))

    def first(self, x: Tensor) -> int:
        """The index of the first of this rank's rows."""
        return sum(self.sizes(x.shape[0], x.device)[: self.wire.rank])

    def total(self, values: Tensor) -> Tensor:
        """The sum over all rows of the union."""
        mine = values.sum(dtype=torch.float64)
        return _Everywhere.apply(self.wire, mine).sum().to(values.dtype)

    def log_total(self, values: Tensor) -> Tensor:
        """The log-sum-exp over all rows of the union."""
        mine = outer_value("pooled", values.double(), None)
        return outer_value("pooled", _Everywhere.apply(self.wire, mine), None).to(values.dtype)

    def softmax(self, values: Tensor) -> Tensor:
        """Over all rows of the union, of own rows."""
        wide = values.double()
        return torch.exp(wide - self.log_total(wide)).to(values.dtype)

    def largest(self, value: Tensor) -> Tensor:
        """The largest of the ranks' numbers."""
        return self.wire.everywhere(value).amax()

    def summed(self, matrix: Tensor) -> Tensor:
        """The sum of the ranks' matrices."""
        result: Tensor = Summed.apply(self.wire, matrix)
        return result

    def pair_reduce(self, x: Tensor, y: Tensor | None = None, **arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Own rows against all rows of the union."""
        p, backend = checked(x, y, arguments)
        if self._through_sums(p):
            return self._of_sums(p).to(p.dtype)
        r, c = pairs.rows_of(self._tour(p), p, backend)
        return (r, c) if p.columns else r

    def pair_total(
        self, x: Tensor, y: Tensor | None = None, *, outer: str, positive: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """outer(r) over all rows of the union."""
        p, backend = checked(x, y, arguments)
        checks.outer(outer, p.reduce, positive, x)
        assert not p.columns
        if self._through_sums(p):
            return self.total(self._of_sums(p)).to(p.dtype)
        tour = self._tour(p)
        if totals.applies(tour, p, outer):
            share = totals.share_of(tour, p, backend, outer, positive)
            return _Everywhere.apply(self.wire, share).sum().to(p.dtype)
        r, _ = pairs.rows_of(tour, p, backend)
        if positive is not None:
            r = softplus(r - positive.to(r.dtype))
        return self.log_total(r) if outer == "pooled" else self.total(r)

    def _tour(self, p: Problem) -> Tour:
        rows = self.sizes(p.n, p.x.device)
        columns = None if p.y is None else self.sizes(p.m, p.x.device)
        of_columns = (p.x,) if p.mask.guide_x is None else (p.x, p.mask.guide_x)  # as wide as they are
        bytes_gathered = sum(columns or rows) * sum(t.shape[1] * t.element_size() for t in of_columns)
        ring = self.strategy == "ring" or (self.strategy == "auto" and bytes_gathered > GATHER_LIMIT)
        return Tour(self.wire, rows, columns, ring)

    def _through_sums(self, p: Problem) -> bool:
        """Whether it needs no pairs, and is as right without: where no device is waited for, all ranks look at all rows' norms."""
        if not _needs_no_pairs(p) or p.pair.name == "identity" or not is_known(p.x):
            return _needs_no_pairs(p)
        mine = [torch.stack(squares_of(torch.linalg.vector_norm(side.detach(), dim=1))) for side in _sides(p)]
        squares = [(r[:, 0].amax(), r[:, 1].sum()) for r in self.wire.everywhere(torch.stack(mine)).unbind(1)]
        return keeps_digits(p, squares)

    def _of_sums(self, p: Problem) -> Tensor:
        return self._linear(p) if p.pair.name == "identity" else self._gram(p)

    def _linear(self, p: Problem) -> Tensor:
        """identity with sum: everything is a sum of visited rows; in float64, since there may be many."""
        x, y = (side.double() for side in _sides(p))
        if p.operand == "sqdist":
            centre = self.summed(y.detach().sum(0)) / max(self.count(y), 1)
            x, y = x - centre, y - centre
        visited = self._visited(p, torch.cat([y, y.square().sum(1, keepdim=True), y.new_ones(y.shape[0], 1)], 1))
        norms, counts = visited[:, -2], visited[:, -1]
        u = (x * visited[:, :-2]).sum(1)
        if p.operand == "sqdist":
            u = counts * x.square().sum(1) + norms - 2.0 * u
        return torch.where(counts > 0.0, p.scale * u + p.shift * counts, 0.0)  # whatever a row is that visits nothing

    def _visited(self, p: Problem, q: Tensor) -> Tensor:
        """For each row of x the sum of the rows of q, of all ranks, that it visits: never of all, minus what it does not."""
        ranks: Tensor = _Everywhere.apply(self.wire, q.sum(0))
        if p.mask.kind == "all":
            return ranks.sum(0).expand(p.n, -1)
        partners = min(p.n, q.shape[0])
        here = torch.cat([all_but_one(q)[:partners], q.sum(0).expand(p.n - partners, -1)])
        return here + all_but_one(ranks)[self.wire.rank]

    def _gram(self, p: Problem) -> Tensor:
        """square on dot: everything goes through a d x d matrix."""
        x, y = _sides(p)
        a, b, m = p.scale, p.shift, self.count(y)
        gram, s = self.summed(product(y.T, y)), self.summed(y.sum(0))
        # Never a^2, which leaves the range where z does not.
        r = a * (product(x, a * gram) * x).sum(1) + 2.0 * b * (a * (x * s).sum(1)) + b * b * m
        return r - _diagonal(p, x, y).square()


def _needs_no_pairs(p: Problem) -> bool:
    """Whether it is made of sums of rows, or of a d x d matrix: nothing is left out but the pair of a row with its own partner."""
    plain = p.mask.kind == "all" or (p.mask.kind == "off_diagonal" and p.mask.row_offset == p.mask.col_offset)
    if p.reduce != "sum" or not plain or p.mask.limited or p.columns or p.bias_x is not None or p.bias_y is not None:
        return False
    return p.pair.name == "identity" or (p.pair.name == "square" and p.operand == "dot")


def _sides(p: Problem) -> tuple[Tensor, Tensor]:
    x = p.x.to(p.dtype)
    return x, x if p.y is None else p.y.to(p.dtype)


def _diagonal(p: Problem, x: Tensor, y: Tensor) -> Tensor:
    """z of the pairs that are left out, one for each row; 0 for a row without one."""
    if p.mask.kind == "all":
        return x.new_zeros(x.shape[0])
    n = min(x.shape[0], y.shape[0])
    u = (x[:n] * y[:n]).sum(1) if p.operand == "dot" else (x[:n] - y[:n]).square().sum(1)
    return F.pad(p.scale * u + p.shift, (0, x.shape[0] - n))


class _Everywhere(torch.autograd.Function):
    """The small tensor of every rank; gradients of all ranks come home and add up, in rank order."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, values: Tensor) -> Tensor:
        ctx.wire = wire
        return wire.everywhere(values)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        wire, g = ctx.wire, upstream[0]
        parts = [(of_rank.unsqueeze(0),) for of_rank in g]
        return None, torch.cat([of for (of,) in wire.home(parts, [1] * wire.world, (g[:1],))]).sum(0)


class Summed(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, matrix: Tensor) -> Tensor:
        ctx.wire = wire
        return wire.summed(matrix)

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        return None, ctx.wire.summed(upstream[0])


__all__ = ["GATHER_LIMIT", "Shards", "checked"]
