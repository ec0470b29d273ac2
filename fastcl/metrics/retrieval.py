"""Retrieval: does each row find its match."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..equation import checks
from ..equation.arguments import declared, integer, kind_of
from ..equation.problem import accumulation_dtype
from ..functional.matching import row_dot
from ..precision import full_precision
from ..progress import bar
from .sweep import all_finite, at_least, tiles, unit_rows


class RetrievalAccuracy(NamedTuple):
    """Top-k accuracies, k to share: y found from x, and x found from y."""

    x_to_y: dict[int, float]
    y_to_x: dict[int, float]


@declared
def retrieval_accuracy(
    x: Tensor,
    y: Tensor,
    *,
    k: Sequence[int] = (1, 5, 10),
    matches: Tensor | None = None,
    normalize: bool = True,
    progress: bool = False,
) -> RetrievalAccuracy:
    """Recall at k of matching rows, in both directions from one sweep.

        x to y: the share of i for which one of {s_ij : y_j matches x_i} is among the k largest of s_i1 .. s_im
        y to x: the share of j for which s_ij, x_i the match of y_j, is among the k largest of s_1j .. s_nj,   s_ij = <x_i, y_j>

    With several captions y an image x, `matches` says whose each caption is, and an image counts once one of its captions is found,
    as is usual for COCO and Flickr30k (Faghri et al. 2018, arXiv 1707.05612). Similarities within rounding of the best match tie
    with it: sqrt(d) eps times the mean |x| |y| of both pairs, in float32 (float64 for float64 input). Of a tie each order is
    equally likely, and the share is its expectation: collapsed rows of one match each score k / n, not 1.

    Args:
        x: (n, d) floating, n >= 1.
        y: (m, d), dtype of x, m >= 1; m = n without `matches`.
        k: which k, each >= 1.
        matches: (m,) int64, the row of x that each row of y matches, or -1 for a row of y that matches nothing, which is found
            wrongly only. Rows that match nothing have no term in the shares. None: y_i matches x_i.
        normalize: whether to scale rows to unit length first.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        Two dictionaries from k to a share between 0 and 1.

    Raises:
        ValueError: for shapes or values that do not fit, no rows, or no matches.
        TypeError: for unsupported or mixed dtypes.
        ImportError: for progress without tqdm.

    Examples:
        >>> fastcl.metrics.retrieval_accuracy(torch.eye(4), torch.eye(4), k=(1,)).x_to_y
        {1: 1.0}
    """
    checks.pair_of_matrices("x", x, "y", y)
    n, m = at_least(1, x), y.shape[0]
    if matches is None and m != n:
        raise ValueError(
            f"y: expected one row for each row of x, {n}, got {m}; pass matches=, the row of x that each row of y matches"
        )
    if isinstance(k, str) or not isinstance(k, Iterable):
        raise TypeError(f"k: expected a sequence of integers, got {kind_of(k)}; pass for instance k=(1, 5)")
    if not (k := tuple(integer("k", at, least=1) for at in k)):
        raise ValueError("k: expected at least one integer >= 1, got none; pass for instance k=(1,)")
    owner = torch.arange(n, device=x.device) if matches is None else _checked(matches, n, y)
    x, y = (unit_rows(rows) if normalize else _at_most_one(rows) for rows in (x, y))
    if not (all_finite(x) and all_finite(y)):
        nothing = dict.fromkeys(k, math.nan)
        return RetrievalAccuracy(nothing, dict(nothing))
    # Half of a tie's margin is the match's, half that of the pair that it meets; where rows have one length, all is the match's.
    tie = _tie(x)
    part = tie if normalize else 0.5 * tie
    norm_x, norm_y = (
        rows.new_ones(len(rows)) if normalize else torch.linalg.vector_norm(rows, dim=1) for rows in (x, y)
    )
    matched, match = owner >= 0, owner.clamp(min=0)
    own = torch.where(matched, row_dot(x[match], y), -math.inf)  # of each row of y with its match
    own_margin = (part * norm_x[match] * norm_y).clamp(min=2.0**-100)  # equal ones tie, at 0 too
    best = own.new_full((n,), -math.inf).scatter_reduce(0, match, own, "amax")
    margin = own.new_zeros(n).scatter_reduce(0, match, torch.where(own == best[match], own_margin, 0.0), "amax")
    # How many similarities are above the best match, or not below it: of each row of x, and of each row of y.
    of_x, of_y = (
        torch.zeros(2, n, dtype=torch.int64, device=x.device),
        torch.zeros(2, m, dtype=torch.int64, device=x.device),
    )
    with torch.no_grad(), full_precision(x.device), bar("retrieval accuracy", n * m, "pair", progress) as shown:
        for a, b in tiles(n, m):
            s = x[a] @ y[b].T
            for i, sign in enumerate((1.0, -1.0)):
                less = s if normalize else s.addr(norm_x[a], norm_y[b], alpha=-sign * part)
                of_x[i, a] += _count_greater(less, (best[a] + sign * margin[a])[:, None], 1)
                of_y[i, b] += _count_greater(less, (own[b] + sign * own_margin[b])[None, :], 0)
            shown.update(s.numel())
    among = matched & (
        own >= best[match] - (0.5 * tie / part) * (own_margin + margin[match])
    )  # the matches that tie with the best
    ties = torch.bincount(owner[among], minlength=n)
    found = ((*of_x[:, ties > 0], ties[ties > 0]), (*of_y[:, matched], torch.ones_like(owner[matched])))
    return RetrievalAccuracy(*({at: _share_within(at, *counts) for at in k} for counts in found))


def _tie(rows: Tensor) -> float:
    """By how much similarities of unit rows may differ and yet tie."""
    return math.sqrt(max(rows.shape[1], 1)) * torch.finfo(rows.dtype).eps


def _checked(matches: Tensor, n: int, y: Tensor) -> Tensor:
    """The row of x of each row of y, int64."""
    checks.groups("matches", matches, y.shape[0], "y", y)
    least, most = (int(v) for v in matches.aminmax()) if matches.numel() else (-1, -1)
    if least < -1 or most >= n:
        raise ValueError(f"matches: expected rows of x, 0 to {n - 1}, or -1 for none, got {least} to {most}")
    if most < 0:
        raise ValueError("matches: expected at least 1 row of y that matches a row of x, got none")
    return matches


def _share_within(k: int, better: Tensor, better_or_tied: Tensor, matches: Tensor) -> float:
    """The expected share of rows with a match among the first k, where `matches` of the tied are matches.

    Of t tied rows, u of them matches, q are among the first k: all miss with probability C(t - u, q) / C(t, q).
    """
    t, u = torch.maximum(better_or_tied - better, matches).double(), matches.double()
    q = (k - better).double().clamp(min=0.0).minimum(t)
    missed = torch.exp(_log_factorial(t - u) - _log_factorial(t - u - q) - _log_factorial(t) + _log_factorial(t - q))
    one_match = 1.0 - q / t  # the same without logarithms
    return float((1.0 - torch.where(u == 1.0, one_match, torch.where(q > t - u, 0.0, missed))).mean())


def _log_factorial(n: Tensor) -> Tensor:
    return torch.lgamma(n.clamp(min=0.0) + 1.0)


def _count_greater(s: Tensor, threshold: Tensor, dim: int) -> Tensor:
    # A step made by multiplying and clamping takes 0.35 ns a pair on one core, a comparison and the sum of its booleans 2.1.
    return (s - threshold).mul_(2.0**100).clamp_(0.0, 1.0).sum(dim).long()


def _at_most_one(rows: Tensor) -> Tensor:
    """Rows over the length of the longest: no similarity changes its rank."""
    rows = rows.detach().to(accumulation_dtype(rows.dtype))
    if not rows.numel():
        return rows
    largest = rows.abs().max().clamp(min=torch.finfo(rows.dtype).tiny)
    rows = rows / largest
    return rows / torch.linalg.vector_norm(rows, dim=1).max().clamp(min=torch.finfo(rows.dtype).tiny)
