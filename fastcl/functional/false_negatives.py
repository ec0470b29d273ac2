"""Likely false negatives, told by a margin over the similarity of the positive: a pair above it is no negative.

absolute   s_ij <= s_ii + margin          relative   s_ij <= s_ii + margin |s_ii|

s is the loss's own similarity, or that of guides: rows of another model, as in GISTEmbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..equation import checks
from ..equation.masks import Mask, at_most
from ..equation.names import MarginStrategy
from ..equation.problem import accumulation_dtype
from ..precision import stacked
from .matching import row_dot
from .rows import leading, normalize_rows, times

Guide = Sequence[Tensor]  # (s, t): rows of the two views


class Guides(NamedTuple):
    """Guides of rows and of columns, None where these are the rows; the similarity of each positive by them, and its rounding."""

    x: Tensor
    y: Tensor | None
    similarity: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, guide: Guide | None, x: Tensor, y: Tensor, normalize: bool) -> Guides | None:
        """Those of two views: checked, of unit length where asked, without gradient."""
        if guide is None:
            return None
        checks.pair_of_matrices("guide[0]", guide[0], "guide[1]", guide[1])
        for i, (own, rows, of) in enumerate(zip(guide, (x, y), ("the first view", "the second view"), strict=True)):
            if own.shape[0] != rows.shape[0]:
                raise ValueError(f"guide[{i}]: expected one row for each of {of}, {rows.shape[0]}, got {own.shape[0]}")
        s, t = (own.detach().to(accumulation_dtype(x.dtype)) for own in guide)
        s, t = (normalize_rows(s), normalize_rows(t)) if normalize else (s, t)
        k = min(s.shape[0], t.shape[0])
        own, other = leading(s, k), leading(t, k)
        return cls(s, t, row_dot(own, other), own.norm(dim=1) * other.norm(dim=1) * rounding(own))

    def stacked(self, symmetric: bool = True) -> Guides:
        """Of both views stacked with themselves; else of the first with both."""
        assert self.y is not None
        both = stacked(self.x, self.y)
        x, y = (both, None) if symmetric else (self.x, both)
        return Guides(x, y, self.similarity.repeat(2), self.rounding.repeat(2))

    def own(self) -> tuple[Guides, Guides]:
        """Of each view with itself."""
        assert self.y is not None
        return self._replace(y=None), self._replace(x=self.y, y=None)


def rounding(rows: Tensor) -> float:
    """How far products of such unit rows round apart: what comes twice in a batch has the similarity that is the limit."""
    root: float = rows.shape[1] ** 0.5
    return (8.0 + 2.0 * root) * torch.finfo(rows.dtype).eps


def check_margin(margin: float | None, guide: Guide | None = None, **without: object) -> None:
    """Nothing beside a margin that none of its pairs is told apart for, and no guide without one.

    Args:
        margin: of the call.
        guide: of the call, two matrices.
        without: arguments that go with no margin, by name; None or 0 where they were not given.
    """
    if guide is not None:
        if not isinstance(guide, (tuple, list)) or len(guide) != 2:
            raise TypeError(
                f"guide: expected two tensors, of the rows of either view, got {type(guide).__name__}; pass (s, t)"
            )
        if margin is None:
            raise ValueError(
                "guide: expected false_negative_margin beside it, by how much its similarity may exceed the positive's, got "
                "none; pass 0.0"
            )
    for name, given in without.items():
        absent = given is None or (isinstance(given, Real) and given == 0)
        if margin is not None and not absent:
            raise ValueError(
                f"{name}: expected none beside false_negative_margin, whose pairs stand against one positive of each row; "
                "leave one of them out"
            )


def spared(
    mask: Mask,
    margin: float | None,
    strategy: MarginStrategy,
    similarity: Tensor,
    sizes: tuple[int, int | None],
    scale: float | Tensor,
    shift: float | Tensor = 0.0,
    guides: Guides | None = None,
) -> Mask:
    """The mask without the pairs whose logit is above that of their row's positive, or of their column's, by more than the margin.

    Args:
        mask: of the negatives.
        margin: in units of the similarity, or of its size; None for the mask as it is.
        strategy: "absolute" or "relative".
        similarity: (k,) of row i and column i with their positives; rows and columns beyond have none, and no limit.
        sizes: how many rows there are, and columns; None where columns have no limit, or are the rows.
        scale, shift: from a similarity to its logit.
        guides: those whose similarities stand in place of the logits, and of `similarity`.
    """
    if margin is None:
        return mask
    s = similarity.detach() if guides is None else leading(guides.similarity, similarity.shape[0])
    highest = s + margin * (s.abs() if strategy == "relative" else torch.ones_like(s))
    if guides is None:
        limit = (times(scale, highest) + checks.scalar("shift", shift, s)).detach()
    else:
        limit = highest + leading(guides.rounding, highest.shape[0])
    of_rows, of_cols = (None if size is None else _fitted(limit, size) for size in sizes)
    guide = None if guides is None else guides.x if guides.y is None else (guides.x, guides.y)
    return at_most(of_rows, of_cols, guide=guide, mask=mask)


def _fitted(limit: Tensor, size: int) -> Tensor:
    more = size - limit.shape[0]
    return F.pad(limit, (0, more), value=float("inf")) if more > 0 else leading(limit, size)
