"""Softmax objectives of two views: a positive against a log-sum-exp of negatives. The positive never enters the reduction.

softplus(r_i - p_i) = LSE_{all j} z_ij - z_ii,   r_i = LSE_{j != i} z_ij,   p_i = z_ii

Row i of one side matches row i of the other; rows beyond are negatives only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import pair_reduce, pair_total
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive
from .aligned import aligned_views
from .rows import (
    check_reduction,
    inverse,
    leading,
    negatives_of_each,
    own_pairs_left_out,
    reduced,
    reduced_total,
    softplus,
    stacked,
    times,
)


@over_ranks
def info_nce(
    x: Tensor,
    y: Tensor,
    *,
    temperature: Positive = 0.07,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
    group: Group | None = None,
    gradient: str = "ddp",
    strategy: str = "auto",
) -> Tensor:
    """InfoNCE, one direction: each row of x finds its row of y among all rows of y.

        L = mean_i [ LSE_j s_ij / tau - s_ii / tau ],   s_ij = <x_i, y_j>

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4.

    Args:
        x: (n, d) floating, the anchors.
        y: (m, d) with m >= n, dtype of x; y_i is the positive of x_i, rows beyond n are negatives only.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        groups: (m,) int64, one group per row of y (the first n also name the rows of x): equal groups are no negatives.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which the rows are spread, a process group or one dimension of a DeviceMesh; None for this process.
        gradient: "ddp", right where DistributedDataParallel averages over ranks (world times the gradient), or "exact".
        strategy: "auto", "gather" or "ring": how rows of other ranks come here; see fastcl.distributed.

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
    a = inverse("temperature", temperature)
    x, y, s = aligned_views(x, y, normalize, same_rows=False)
    n, m = x.shape[0], y.shape[0]
    if m < n:
        raise ValueError(f"y: expected at least one row for each row of x, {n}, got {m}; y_i is the positive of x_i")
    mask = negatives_of_each(groups, x, y)
    p = times(a, s)
    if reduction == "none":
        r = pair_reduce(x, y, scale=a, mask=mask, backend=backend)
        assert isinstance(r, Tensor)
        return softplus(r - p)
    total = pair_total(x, y, outer="contrast", positive=p, scale=a, mask=mask, backend=backend)
    return reduced_total(total, x, reduction, "info_nce")


@over_ranks
def clip(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: Positive,
    pairs: int | None = None,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
    group: Group | None = None,
    gradient: str = "ddp",
    strategy: str = "auto",
) -> Tensor:
    """CLIP: InfoNCE in both directions, rows and columns from one sweep.

        L = mean_{i < k} [ (LSE_{j < m} z_ij + LSE_{j < n} z_ji) / 2 - z_ii ],   z_ij = logit_scale <x_i, y_j>

    The first k rows of x and y match; rows beyond them are negatives of the other side (hard captions, as in NegCLIP) and have no
    term of their own. Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; Yuksekgonul et al. 2022 (arXiv 2210.01936).

    Args:
        x: (n, d) floating, for instance image features.
        y: (m, d), dtype of x; for i < k, y_i is the positive of x_i.
        logit_scale: the factor itself (not its logarithm), 1 / tau; a number > 0 or a tensor with one element (may want gradients).
        pairs: k, how many rows match, 0 to min(n, m); None for min(n, m). Smaller where both sides have further negatives.
        groups: (max(n, m),) int64, one group for row i of x and row i of y: rows of equal groups are no negatives of each other.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (k values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which the rows are spread, a process group or one dimension of a DeviceMesh; None for this process.
            Each rank has n, m and k of its own.
        gradient: "ddp", right where DistributedDataParallel averages over ranks (world times the gradient), or "exact".
        strategy: "auto", "gather" or "ring": how rows of other ranks come here; see fastcl.distributed.

    Returns:
        A scalar, or (k,) for "none"; float32 (float64 for float64 input).

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
    """
    check_reduction(reduction)
    a = checks.positive_number("logit_scale", logit_scale)
    x, y, s = aligned_views(x, y, normalize, same_rows=False)
    k = _matching(pairs, x, y)
    p = times(a, leading(s, k))
    # A row beyond the pairs leaves out the row of its own index, which is beyond them too: neither has a term.
    r, c = pair_reduce(x, y, scale=a, mask=negatives_of_each(groups, x, y), columns=True, backend=backend)
    return reduced(0.5 * (softplus(leading(r, k) - p) + softplus(leading(c, k) - p)), reduction, "clip")


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
def nt_xent(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Positive = 0.5,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
    group: Group | None = None,
    gradient: str = "ddp",
    strategy: str = "auto",
) -> Tensor:
    """NT-Xent (SimCLR): each of the 2n rows finds its other view among the 2n - 1 others.

        L = mean_{i <= 2n} [ LSE_{k != i} s_ik / tau - s_ip(i) / tau ],   s over z = [u; v], p(i) the other view of i

    Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1; the authors' TensorFlow code returns twice this mean.

    Args:
        u: (n, d) floating, the first views.
        v: (n, d), dtype of u, the second views.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        groups: (n,) int64, one group per pair of views: rows of equal groups are no negatives of each other.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (2n values, those of u first).
        backend: see fastcl.pair_reduce.
        group: the ranks over which the rows are spread, a process group or one dimension of a DeviceMesh; None for this process.
        gradient: "ddp", right where DistributedDataParallel averages over ranks (world times the gradient), or "exact".
        strategy: "auto", "gather" or "ring": how rows of other ranks come here; see fastcl.distributed.

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
    u, v, s = aligned_views(u, v, normalize, ("u", "v"))
    z = stacked(u, v)
    p = times(a, s).repeat(2)
    mask = own_pairs_left_out(groups, z, views=2)
    if reduction == "none":
        r = pair_reduce(z, scale=a, mask=mask, backend=backend)
        assert isinstance(r, Tensor)
        return softplus(r - p)
    total = pair_total(z, outer="contrast", positive=p, scale=a, mask=mask, backend=backend)
    return reduced_total(total, z, reduction, "nt_xent")
