"""From the terms of rows to what an objective returns: their mean, their sum, or the terms themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from .. import batch, ops
from ..equation import checks
from ..equation.intrinsics import softplus
from ..equation.names import Reduction

REDUCTIONS = get_args(Reduction)


@dataclass(frozen=True)
class PairTerm:
    """A term of each row over its pairs, formed when `reduced` asks for it: row by row, or its total in one sweep.

        r_i + beside_i, or log(1 + e^(r_i - p_i)) + beside_i with a positive

    Args:
        x, y: as pair_reduce takes them.
        positive: (n,) p, the logit of each row's positive; None for the reductions themselves.
        beside: (n,) what each row has besides; None for nothing.
        sweep: the other arguments of pair_reduce.
        shared: whether y is every process's own rows of one batch; otherwise each has all of its columns itself.
    """

    x: Tensor
    y: Tensor | None
    positive: Tensor | None = None
    beside: Tensor | None = None
    sweep: dict[str, Any] = field(default_factory=dict)
    shared: bool = True

    def rows(self) -> Tensor:
        """(n,) of each row."""
        r = (batch if self.shared else ops).pair_reduce(self.x, self.y, **self.sweep)
        if self.positive is not None:
            r = softplus(r - self.positive)
        return r if self.beside is None else r + self.beside

    def total(self) -> Tensor:
        """Over all rows of the batch."""
        outer = "sum" if self.positive is None else "contrast"
        found = (batch if self.shared else ops).pair_total(
            self.x, self.y, outer=outer, positive=self.positive, **self.sweep
        )
        if not self.shared:
            found = batch.total(found)
        return found if self.beside is None else found + batch.total(self.beside)


def at_least(rows: int, x: Tensor, objective: str) -> None:
    """A mean needs something to be taken over."""
    n = batch.count(x)
    if n < rows:
        what = "row" if rows == 1 else "rows, or there is no pair of different rows"
        raise ValueError(f"{objective}: expected at least {rows} {what}, got {n}; skip empty batches")


def reduced(term: Tensor | PairTerm, reduction: str, objective: str) -> Tensor:
    """The term of each row of this process, or its sum or mean over the rows of the whole batch."""
    if isinstance(term, PairTerm):
        if reduction == "none":
            return term.rows()
        total, rows = term.total(), term.x
    else:
        if reduction == "none":
            return term
        total, rows = batch.total(term), term
    if reduction == "sum":
        return total
    at_least(1, rows, objective)
    return total / batch.count(rows)


def check_reduction(reduction: str, has_rows: bool = True, objective: str = "") -> str:
    """One of mean, sum, none; objectives without rows of their own refuse none (and sum, which would equal mean)."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    if not has_rows and reduction != "mean":
        raise ValueError(
            f"reduction: {objective} is one number, not a mean over rows; expected 'mean', got {reduction!r}"
        )
    return reduction
