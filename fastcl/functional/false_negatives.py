"""Likely false negatives, told by a margin over the similarity of the positive: a pair above it is no negative.

absolute   s_ij <= s_ii + margin          relative   s_ij <= s_ii + margin |s_ii|
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from ..equation import checks
from ..equation.masks import Mask, at_most
from ..equation.names import MarginStrategy
from .rows import leading, times


def check_margin(margin: float | None, **without: object) -> None:
    """Nothing beside a margin that none of its pairs is told apart for.

    Args:
        margin: of the call.
        without: arguments that go with no margin, by name; None or 0 where they were not given.
    """
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
) -> Mask:
    """The mask without the pairs whose logit is above that of their row's positive, or of their column's, by more than the margin.

    Args:
        mask: of the negatives.
        margin: in units of the similarity, or of its size; None for the mask as it is.
        strategy: "absolute" or "relative".
        similarity: (k,) of row i and column i with their positives; rows and columns beyond have none, and no limit.
        sizes: how many rows there are, and columns; None where columns have no limit, or are the rows.
        scale, shift: from a similarity to its logit.
    """
    if margin is None:
        return mask
    s = similarity.detach()
    highest = s + margin * (s.abs() if strategy == "relative" else torch.ones_like(s))
    limit = (times(scale, highest) + checks.scalar("shift", shift, s)).detach()
    of_rows, of_cols = (None if size is None else _fitted(limit, size) for size in sizes)
    return at_most(of_rows, of_cols, mask=mask)


def _fitted(limit: Tensor, size: int) -> Tensor:
    more = size - limit.shape[0]
    return F.pad(limit, (0, more), value=float("inf")) if more > 0 else leading(limit, size)
