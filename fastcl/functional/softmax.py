"""Softmax objectives of two views: a positive against a log-sum-exp of negatives. The positive never enters the reduction.

softplus(r_i - p_i) = LSE_{all j} z_ij - z_ii,   r_i = LSE_{j != i} z_ij,   p_i = z_ii

Row i of one side matches row i of the other; rows beyond are negatives only. With `positives=` the pairs that match are listed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import pair_reduce, rows_and_columns
from ..distributed import Group, over_ranks, own_values
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.intrinsics import softplus
from ..equation.masks import across_groups
from ..equation.names import Backend, MarginStrategy, Reduction
from ..equation.problem import accumulation_dtype
from ..precision import rounded_once, stacked
from .aligned import aligned_views
from .at_once import Whole, at_once
from .false_negatives import Guide, Guides, check_margin, spared
from .positives import Pairs, Positives, Side, between, mean_over, some
from .reduction import PairTerm, check_reduction, reduced
from .rows import every_row_matched, inverse, leading, negatives_of_each, own_pairs_left_out, times
from .smoothing import exchanged, mean_logit, share

ONE_WAY = Whole(outer="contrast", reduce="logsumexp")
BOTH_WAYS = Whole(outer="contrast", reduce="logsumexp", columns=True)
STACKED = Whole("stacked", "contrast", "logsumexp")


@over_ranks
def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    temperature: Positive = 0.07,
    label_smoothing: float = 0.0,
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
    """InfoNCE, one direction: each row of x finds its row of y among all rows of y.

        L = mean_i [ LSE_j z_ij - (1 - eps) p_i - eps mean_j z_ij ],   z_ij = <x_i, y_j> / tau,   p_i = z_ii

    With `positives`, pairs (i, j) of weights w: p_i = sum_j w_ij z_ij / sum_j w_ij, and the mean is over rows that have one.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4; eps: Szegedy et al. 2016 (arXiv 1512.00567), section 7; several
    positives: Khosla et al. 2020 (arXiv 2004.11362), eq. 2.

    Args:
        x: (n, d) floating, the anchors.
        y: (m, d) with m >= n, dtype of x; y_i is the positive of x_i, rows beyond n are negatives only.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        label_smoothing: eps in [0, 1], the share of the target that is spread evenly over the pairs of the normaliser.
        positives: (i, j) or (i, j, weights), each of k elements: x_i matches y_j, i and j int64, within own rows also where these
            are spread over ranks; weights floating, >= 0, without gradient, None for 1. Then m and n are any, and a pair may be
            listed several times. None for row i with row i.
        groups: (m,) int64, one group per row of y (the first n also name the rows of x): equal groups are no negatives.
        false_negative_margin: by how much the similarity of another pair may exceed the positive's (before the scale:
            0.1 in Qwen3 Embedding, -0.05 where NV-Retriever keeps 0.05 below). A pair above is no
            negative of its row. Constant for the gradient; None keeps all.
        margin_strategy: "absolute", s_ij <= s_ii + margin, or "relative", s_ij <= s_ii + margin |s_ii| (-0.05 for 95%).
        guide: (s, t), rows of another model for the rows of either view, (n, k) and (m, k) floating, of any width: false negatives
            are told by their similarity in place of the loss's own (GISTEmbed). None for the loss's own.
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
        >>> round(float(fastcl.functional.info_nce(x, x, temperature=0.5)), 4)
        0.3408
    """
    check_reduction(reduction)
    a, eps = inverse("temperature", temperature), share("label_smoothing", label_smoothing)
    check_margin(false_negative_margin, guide, positives=positives, label_smoothing=eps)
    loss = at_once(
        ONE_WAY, x, y, a, normalize=normalize, reduction=reduction, backend=backend,
        unless=(positives, groups, false_negative_margin, eps or None),
    )  # fmt: skip
    if loss is not None:
        return loss
    if positives is not None:
        checks.pair_of_matrices("x", x, "y", y)
        with rounded_once(x.device):
            return _of_pairs(Pairs.of(positives, groups, x, y, normalize), a, eps, reduction, backend, "info_nce")[0]
    x, y, s = aligned_views(x, y, normalize, same_rows=False)
    every_row_matched(x, y)
    guides = Guides.of(guide, x, y, normalize)
    mask = spared(
        negatives_of_each(groups, x, y), false_negative_margin, margin_strategy, s, (x.shape[0], None), a, guides=guides
    )
    p = times(a, s)
    spread = eps * (p - mean_logit(x, y, p, a, mask, backend)) if eps else None
    term = PairTerm(x, y, p, beside=spread, sweep={"scale": a, "mask": mask, "backend": backend})
    return reduced(term, reduction, "info_nce")


def _of_pairs(
    pairs: Pairs,
    a: float | Tensor,
    eps: float,
    reduction: str,
    backend: str | None,
    objective: str,
    columns: bool = False,
) -> list[Tensor]:
    """InfoNCE of listed positives: the reduced losses of the rows of x, and with `columns` those of the rows of y."""
    if reduction == "mean":
        some(pairs, objective)
    dtype = accumulation_dtype(pairs.x.dtype)
    mask, hidden = between(pairs)
    pairs, p, backend = pairs.exact(a, hidden, backend)
    x, y = pairs.x, pairs.y
    sweep = {"scale": a, "mask": mask, "backend": backend}
    found = rows_and_columns(x, y, **sweep) if columns else [pair_reduce(x, y, **sweep)]
    parts = []
    for r, index, own, other in zip(found, (pairs.i, pairs.j), (x, y), (y, x), strict=False):
        side = Side(index, own.shape[0], pairs.weight)
        loss = side.cross_entropy(r, p, hidden)
        if eps:
            mean = mean_logit(own, other, None, a, None, backend)
            loss = loss + eps * torch.where(side.has(), side.mean(p) - mean, 0.0)
        parts.append(mean_over(loss, side, reduction).to(dtype))
    return parts


@over_ranks
def clip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Positive,
    label_smoothing: float = 0.0,
    pairs: int | None = None,
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
    """CLIP: InfoNCE in both directions, rows and columns from one sweep.

        L = mean_{i < k} [ (LSE_{j < m} z_ij + LSE_{j < n} z_ji) / 2 - z_ii ],   z_ij = logit_scale <x_i, y_j>

    The first k rows of x and y match; rows beyond them are negatives of the other side (hard captions, as in NegCLIP) and have no
    term of their own. With `label_smoothing` or `positives` each direction is that of info_nce; the mean of each is over the rows
    of its side that have positives, and L is half of their sum.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; Yuksekgonul et al. 2022 (arXiv 2210.01936).

    Args:
        x: (n, d) floating, for instance image features.
        y: (m, d), dtype of x; for i < k, y_i is the positive of x_i.
        logit_scale: the factor itself (not its logarithm), 1 / tau; a number > 0 or a tensor with one element (may want gradients).
        label_smoothing: eps in [0, 1], the share of the target that is spread evenly over the pairs of the normaliser.
        pairs: k, how many rows match, 0 to min(n, m); None for min(n, m). Smaller where both sides have further negatives.
        positives: (i, j) or (i, j, weights), as in info_nce: x_i matches y_j; in place of `pairs` and `groups`.
        groups: (max(n, m),) int64, one group for row i of x and row i of y: rows of equal groups are no negatives of each other.
        false_negative_margin, margin_strategy, guide: see info_nce. A pair above the limit of either row is no negative of both.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (k values; with `positives` n + m halves, those of x first).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.
            Each rank has n, m and k of its own.

    Returns:
        A scalar, or (k,) or (n + m,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no pairs.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> images, texts = torch.randn(256, 512, requires_grad=True), torch.randn(256, 512)
        >>> loss = fastcl.functional.clip(images, texts, logit_scale=100.0)
        >>> loss.backward()
        >>> images.grad.shape
        torch.Size([256, 512])
        >>> round(float(fastcl.functional.clip(torch.eye(4), torch.eye(4), logit_scale=10.0)), 6)  # log(1 + 3 / e^10)
        0.000136
        >>> captions = torch.eye(2).repeat_interleave(2, 0)  # two of each image
        >>> listed = torch.tensor([0, 0, 1, 1]), torch.arange(4)
        >>> round(float(fastcl.functional.clip(torch.eye(2), captions, logit_scale=10.0, positives=listed)), 4)
        0.3466
    """
    check_reduction(reduction)
    a, eps = checks.positive_number("logit_scale", logit_scale), share("label_smoothing", label_smoothing)
    check_margin(false_negative_margin, guide, positives=positives, label_smoothing=eps)
    loss = at_once(
        BOTH_WAYS, x, y, a, normalize=normalize, reduction=reduction, backend=backend,
        unless=(pairs, positives, groups, false_negative_margin, eps or None),
    )  # fmt: skip
    if loss is not None:
        return loss
    if positives is not None:
        checks.pair_of_matrices("x", x, "y", y)
        if pairs is not None:
            raise ValueError(
                f"pairs: expected None beside positives, which list what matches, got {pairs}; leave one of them out"
            )
        with rounded_once(x.device):
            listed = Pairs.of(positives, groups, x, y, normalize)
            halves = [0.5 * part for part in _of_pairs(listed, a, eps, reduction, backend, "clip", columns=True)]
        return torch.cat(halves) if reduction == "none" else halves[0] + halves[1]
    x, y, s = aligned_views(x, y, normalize, same_rows=False)
    k = _matching(pairs, x, y)
    p = times(a, leading(s, k))
    # A row beyond the pairs leaves out the row of its own index, which is beyond them too: neither has a term.
    sizes = x.shape[0], y.shape[0]
    mask = spared(
        negatives_of_each(groups, x, y), false_negative_margin, margin_strategy, leading(s, k), sizes, a,
        guides=Guides.of(guide, x, y, normalize),
    )  # fmt: skip
    # Before the sweep, so that their gradients are formed after it, whose memory is free again then: 6 n d instead of 8.
    means = (mean_logit(x, y, p, a, mask, backend), mean_logit(y, x, p, a, exchanged(mask), backend)) if eps else ()
    r, c = rows_and_columns(x, y, scale=a, mask=mask, backend=backend)
    losses = 0.5 * (softplus(leading(r, k) - p) + softplus(leading(c, k) - p))
    if means:
        losses = losses + eps * (p - 0.5 * sum(means))
    return reduced(losses, reduction, "clip")


def _matching(pairs: int | None, x: Tensor, y: Tensor) -> int:
    """How many rows match, checked."""
    most = min(x.shape[0], y.shape[0])
    if pairs is None:
        return most
    if isinstance(pairs, bool) or not isinstance(pairs, (int, torch.SymInt)):
        raise TypeError(f"pairs: expected None or an integer, got {type(pairs).__name__}; pass int(pairs)")
    if not 0 <= pairs <= most:
        raise ValueError(
            f"pairs: expected at most the rows of either side, 0 to {most}, got {pairs}; pass how many rows match"
        )
    return pairs


@over_ranks
@own_values(2)
def nt_xent(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Positive = 0.5,
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
    """NT-Xent (SimCLR): each of the 2n rows finds its other view among the 2n - 1 others.

        L = mean_{i <= 2n} [ LSE_{k != i} s_ik / tau - s_ip(i) / tau ],   s over z = [u; v], p(i) the other view of i

    With `positives` s_ip(i) is the weighted mean over the rows listed for row i, and L the mean over rows that have one.

    Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1; the authors' TensorFlow code returns twice this mean.

    Args:
        u: (n, d) floating, the first views.
        v: (n, d), dtype of u, the second views.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        positives: (i, k) or (i, k, weights), as in info_nce, of the 2n rows of z: z_k is a positive of z_i, k != i. Both (i, k) and
            (k, i) where each is one of the other; None for the other view. In place of `groups`.
        groups: (n,) int64, one group per pair of views: rows of equal groups are no negatives of each other.
        false_negative_margin, margin_strategy, guide: see info_nce. A pair above the limit of either row is no negative of both.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (2n values, those of u first).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (2n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> u, v = torch.eye(4), torch.eye(4)
        >>> round(float(fastcl.functional.nt_xent(u, v, temperature=0.5)), 4)  # log(1 + 6 / e^2)
        0.5944
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    check_margin(false_negative_margin, guide, positives=positives)
    loss = at_once(
        STACKED, u, v, a, normalize=normalize, reduction=reduction, backend=backend,
        unless=(positives, groups, false_negative_margin),
    )  # fmt: skip
    if loss is not None:
        return loss
    if positives is not None:
        checks.pair_of_matrices("u", u, "v", v, same_rows=True)
        with rounded_once(u.device):
            z = stacked(u, v)
            return _nt_xent_of_pairs(Pairs.of(positives, groups, z, z, normalize), a, reduction, backend)
    u, v, s = aligned_views(u, v, normalize, ("u", "v"))
    z = stacked(u, v)
    s = s.repeat(2)
    p = times(a, s)
    guides = Guides.of(guide, u, v, normalize)
    mask = spared(
        own_pairs_left_out(groups, z, views=2), false_negative_margin, margin_strategy, s, (z.shape[0], None), a,
        guides=guides and guides.stacked(),
    )  # fmt: skip
    term = PairTerm(z, None, p, sweep={"scale": a, "mask": mask, "backend": backend})
    return reduced(term, reduction, "nt_xent")


def _nt_xent_of_pairs(pairs: Pairs, a: float | Tensor, reduction: str, backend: str | None) -> Tensor:
    """NT-Xent of listed positives."""
    if reduction == "mean":
        some(pairs, "nt_xent")
    of, dtype = pairs.couples(), accumulation_dtype(pairs.x.dtype)
    hidden = of.index_select(0, pairs.i) == of.index_select(0, pairs.j)
    pairs, p, backend = pairs.exact(a, hidden, backend)
    r = pair_reduce(pairs.x, scale=a, mask=across_groups(of), backend=backend)
    side = Side(pairs.i, pairs.x.shape[0], pairs.weight)
    return mean_over(side.cross_entropy(r, p, hidden), side, reduction).to(dtype)
