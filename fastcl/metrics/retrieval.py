"""Retrieval: does each row find its match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..equation import checks
from ..equation.problem import accumulation_dtype
from ..functional.rows import row_dot
from .sweep import all_finite, at_least, bar, tiles, unit_rows


class RetrievalAccuracy(NamedTuple):
    """Top-k accuracies, k to share: y found from x, and x found from y."""

    x_to_y: dict[int, float]
    y_to_x: dict[int, float]


def retrieval_accuracy(
    x: Tensor, y: Tensor, *, k: Sequence[int] = (1, 5, 10), normalize: bool = True, progress: bool = False
) -> RetrievalAccuracy:
    """Recall at k of matching rows, in both directions from one sweep.

        x to y: the share of i for which s_ii is among the k largest of s_i1 .. s_in,   s_ij = <x_i, y_j>

    Similarities within rounding of s_ii, sqrt(d) eps max |x| max |y|, tie with it, in float32 (float64 for float64 input); of a
    tie each order is equally likely, and the share is its expectation: collapsed rows score k / n, not 1.

    Args:
        x: (n, d) floating, n >= 1.
        y: (n, d), dtype of x; y_i matches x_i.
        k: which k, each >= 1.
        normalize: whether to scale rows to unit length first.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        Two dictionaries from k to a share between 0 and 1.

    Raises:
        ValueError: for shapes or values that do not fit, or no rows.
        TypeError: for unsupported or mixed dtypes.
        ImportError: for progress without tqdm.
    """
    checks.pair_of_matrices("x", x, "y", y, same_rows=True)
    n = at_least(1, x)
    if not k or min(k) < 1:
        raise ValueError(f"k: expected numbers >= 1, got {tuple(k)}")
    x, y = (unit_rows(rows) if normalize else _at_most_one(rows) for rows in (x, y))
    match, tie = row_dot(x, y), math.sqrt(x.shape[1]) * torch.finfo(x.dtype).eps
    if not all_finite(match):
        nothing = dict.fromkeys(k, math.nan)
        return RetrievalAccuracy(nothing, dict(nothing))
    above, below = match + tie, match - tie
    counts = torch.zeros(4, n, dtype=torch.int64, device=x.device)  # x to y: better, better or tied; the same of y to x
    with torch.no_grad(), bar("retrieval accuracy", n * n, "pair", progress) as shown:
        for a, b in tiles(n):
            s = x[a] @ y[b].T
            counts[0, a] += _count_greater(s, above[a, None], 1)
            counts[1, a] += _count_greater(s, below[a, None], 1)
            counts[2, b] += _count_greater(s, above[None, b], 0)
            counts[3, b] += _count_greater(s, below[None, b], 0)
            shown.update(s.numel())
    return RetrievalAccuracy(*({at: _share_within(at, *counts[i : i + 2]) for at in k} for i in (0, 2)))


def _share_within(k: int, better: Tensor, better_or_tied: Tensor) -> float:
    """The expected share of matches among the first k; a match ties with itself."""
    tied = (better_or_tied - better).clamp(min=1).double()
    return float(((k - better).double() / tied).clamp(0.0, 1.0).mean())


def _count_greater(s: Tensor, threshold: Tensor, dim: int) -> Tensor:
    # A step made by multiplying and clamping takes 0.35 ns a pair on one core, a comparison and the sum of its booleans 2.1.
    return (s - threshold).mul_(2.0**100).clamp_(0.0, 1.0).sum(dim).long()


def _at_most_one(rows: Tensor) -> Tensor:
    """Rows over the length of the longest: no similarity changes its rank."""
    rows = rows.detach().to(accumulation_dtype(rows.dtype))
    largest = rows.abs().max().clamp(min=torch.finfo(rows.dtype).tiny)
    rows = rows / largest
    return rows / torch.linalg.vector_norm(rows, dim=1).max().clamp(min=torch.finfo(rows.dtype).tiny)
