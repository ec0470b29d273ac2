"""The sigmoid objective: every pair is a binary decision of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.intrinsics import softplus
from ..equation.masks import Mask
from ..equation.names import Backend, MarginStrategy, Reduction
from ..equation.pairs import Softplus
from ..equation.problem import accumulation_dtype
from ..precision import rounded_once
from .aligned import aligned_views
from .at_once import Whole, at_once
from .energy import Potential
from .false_negatives import Guide, Guides, check_margin, spared
from .positives import Pairs, Positives, Side, between
from .reduction import PairTerm, check_reduction, reduced
from .rows import negatives_of_each, times

PAIRWISE = Whole(negatives=Potential(Softplus()), positives=Potential(Softplus(), slope=-1.0))


@over_ranks
def siglip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Positive,
    logit_bias: float | Tensor,
    positives: Positives | None = None,
    groups: Tensor | None = None,
    false_negative_margin: float | None = None,
    margin_strategy: MarginStrategy = "absolute",
    guide: Guide | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """SigLIP: a logistic loss of every pair, divided by n (not by n m).

        L = mean_{i < n} [ softplus(-z_ii) + sum_{j < m, j != i} softplus(z_ij) ],   z_ij = logit_scale <x_i, y_j> + logit_bias

    With `positives`, pairs (i, j) of weights w: mean_i [ sum_j w_ij softplus(-z_ij) + the same sum over all other pairs ].

    Source: Zhai et al. 2023 (arXiv 2303.15343), eq. 1; both scalars are learned there, from scale 10 and bias -10.

    Args:
        x: (n, d) floating, for instance image features.
        y: (m, d) with m >= n, dtype of x; y_i is the positive of x_i, rows beyond n are negatives only.
        logit_scale: the factor itself (not its logarithm) > 0, a number or a tensor with one element (may want gradients).
        logit_bias: a number or a tensor with one element (may want gradients).
        positives: (i, j) or (i, j, weights), as in info_nce: x_i matches y_j. Then m and n are any. In place of `groups`.
        groups: (m,) int64, one group per row of y (the first n also name the rows of x): equal groups are no negatives.
        false_negative_margin, margin_strategy, guide: see info_nce. A pair above the limit of either row is no negative of both.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.siglip(x, x, logit_scale=10.0, logit_bias=-10.0)), 4)
        0.6933
    """
    check_reduction(reduction)
    a, b = checks.positive_number("logit_scale", logit_scale), checks.number("logit_bias", logit_bias)
    check_margin(false_negative_margin, guide, positives=positives)
    loss = at_once(
        PAIRWISE, x, y, a, b, normalize=normalize, reduction=reduction, backend=backend,
        unless=(positives, groups, false_negative_margin),
    )  # fmt: skip
    if loss is not None:
        return loss
    if positives is not None:
        checks.pair_of_matrices("x", x, "y", y)
        with rounded_once(x.device):
            return _siglip_of_pairs(Pairs.of(positives, groups, x, y, normalize), a, b, reduction, backend)
    x, y, s = aligned_views(x, y, normalize, same_rows=False)
    n, m = x.shape[0], y.shape[0]
    if m < n:
        raise ValueError(
            f"y: expected at least one row for each row of x, {n}, got {m}; y_i is the positive of x_i: "
            "exchange x and y where x has rows that match nothing"
        )
    positive = softplus(-times(a, s) - checks.scalar("logit_bias", b, x))
    mask = spared(
        negatives_of_each(groups, x, y), false_negative_margin, margin_strategy, s, (n, m), a, b,
        guides=Guides.of(guide, x, y, normalize),
    )  # fmt: skip
    return reduced(_term(x, y, mask, a, b, positive, backend), reduction, "siglip")


def _term(
    x: Tensor, y: Tensor, mask: Mask, a: float | Tensor, b: float | Tensor, beside: Tensor, backend: str | None
) -> PairTerm:
    """log(1 + e^z) over the pairs of each row, and what the row has besides."""
    sweep = {"pair": "softplus", "reduce": "sum", "mask": mask, "scale": a, "shift": b, "backend": backend}
    return PairTerm(x, y, beside=beside, sweep=sweep)


def _siglip_of_pairs(pairs: Pairs, a: float | Tensor, b: float | Tensor, reduction: str, backend: str | None) -> Tensor:
    """SigLIP of listed positives; one that is visited all the same is taken out again, once."""
    dtype = accumulation_dtype(pairs.x.dtype)
    mask, hidden = between(pairs)
    pairs, p, backend = pairs.exact(a, hidden, backend)
    x, y = pairs.x, pairs.y
    z = p + checks.scalar("logit_bias", b, x)
    weight = pairs.weight.to(z.dtype)
    side = Side(pairs.i, x.shape[0], weight)
    visited = torch.where(hidden | pairs.repeated(), 0.0, softplus(z))
    losses = side.sum(weight * softplus(-z) - visited)
    return reduced(_term(x, y, mask, a, b, losses, backend), reduction, "siglip").to(dtype)
