"""Alignment and uniformity on the hypersphere (Wang & Isola 2020, arXiv 2005.10242)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import batch, transforms
from ..batch import pair_total
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive, PositiveReal
from ..equation.names import Backend, Reduction
from ..equation.problem import accumulation_dtype
from .energy import visits
from .matching import row_sqdist
from .reduction import at_least, check_reduction, reduced
from .rows import as_compiled, check_backend, normalize_rows, own_pairs_left_out, plain_number, views


@over_ranks
def alignment(
    x: Tensor,
    y: Tensor,
    *,
    alpha: PositiveReal = 2.0,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """Alignment: the mean distance of positives.

        L = mean_i |x_i - y_i|^alpha

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.2.

    Args:
        x: (n, d) floating.
        y: (n, d), dtype of x.
        alpha: the exponent, > 0. Below 2 the gradient at x_i = y_i is taken as 0.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce; alignment has no pairs to reduce and is the same on each.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.alignment(x, x.roll(1, 0))), 4)
        2.0
    """
    check_reduction(reduction)
    check_backend(backend)
    alpha = plain_number("alpha", alpha, positive=True)
    x, y = views(x, y, normalize)
    if alpha == 2.0:
        return reduced(row_sqdist(x, y), reduction, "alignment")
    exponent = as_compiled(alpha, x) if torch.compiler.is_compiling() else alpha
    return reduced(power_of_distance(x, y, exponent), reduction, "alignment")


def power_of_distance(x: Tensor, y: Tensor, exponent: float | Tensor) -> Tensor:
    """|x_i - y_i|^exponent in the accumulation dtype; where squares leave its range, of differences over their largest.

    Of its gradient an entry is 0 where x and y are equal, even if the slope of the power is infinite.
    """
    dtype = accumulation_dtype(x.dtype)
    difference = x.to(dtype) - y.to(dtype)
    difference = torch.where(difference == 0, 0.0, difference)
    if not x.shape[1]:
        return difference.sum(1)
    whole, limits = difference.detach(), torch.finfo(dtype)
    largest = torch.maximum(whole.amax(1, keepdim=True), -whole.amin(1, keepdim=True))
    inside = (largest > 2.0**12 * limits.tiny**0.5) & (largest < 0.5 * (limits.max / x.shape[1]) ** 0.5)
    plain = inside | (largest == 0) | ~(largest < math.inf)
    scale = torch.where(plain, 1.0, largest)
    squared, scale = (difference / scale).square().sum(1), scale.squeeze(1)
    same = squared == 0
    # The power of a scale below 1 may be 0 where that of a distance in it, 1 or more, is infinite: the two go together.
    distance = torch.where(same, 1.0, squared).sqrt() * scale.clamp(max=1.0)
    return torch.where(same, 0.0, distance**exponent * scale.clamp(min=1.0) ** exponent)


@over_ranks
def uniformity(
    x: Tensor,
    *,
    t: Positive = 2.0,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """Uniformity: the logarithm of the mean Gaussian potential of all pairs.

        L = log mean_{i != j} exp(-t |x_i - x_j|^2)

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.2.

    Args:
        x: (n, d) floating, n >= 2.
        t: the inverse width, > 0, a number or a tensor with one element.
        groups: (n,) int64, one group per row: pairs of equal groups are left out.
        normalize: whether to scale rows to unit length first.
        reduction: "mean" only: the logarithm has no rows.
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported dtypes.

    Examples:
        >>> round(float(fastcl.functional.uniformity(torch.eye(4), t=2.0)), 4)
        -4.0
    """
    check_reduction(reduction, has_rows=False, objective="uniformity")
    t = checks.positive_number("t", t)
    at_least(2, checks.matrix("x", x), "uniformity")
    if normalize:
        x = normalize_rows(x)
    return log_mean_gaussian(x, t, groups, backend)


@over_ranks
def align_uniform(
    x: Tensor,
    y: Tensor,
    *,
    alpha: PositiveReal = 2.0,
    t: Positive = 2.0,
    weight: float | Tensor = 1.0,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """Alignment plus the weighted uniformity of both views.

        L = mean_i |x_i - y_i|^alpha + weight (uniformity(x) + uniformity(y)) / 2

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.2 and figure 5.

    Args:
        x: (n, d) floating, n >= 2.
        y: (n, d), dtype of x.
        alpha: the exponent of the alignment, > 0.
        t: the inverse width of the potential, > 0, a number or a tensor with one element.
        weight: the weight of the uniformity, a number or a tensor with one element.
        groups: (n,) int64, one group per row: pairs of equal groups are left out of the uniformity.
        normalize: whether to scale rows to unit length first.
        reduction: "mean" only: the uniformity has no rows.
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.align_uniform(x, x)), 4)
        -4.0
    """
    check_reduction(reduction, has_rows=False, objective="align_uniform")
    alpha, t = plain_number("alpha", alpha, positive=True), checks.positive_number("t", t)
    x, y = views(x, y, normalize)
    at_least(2, x, "align_uniform")
    aligned = alignment(x, y, alpha=alpha, normalize=False)
    spread = log_mean_gaussian(x, t, groups, backend) + log_mean_gaussian(y, t, groups, backend)
    term = 0.5 * checks.scalar("weight", weight, spread) * spread
    return _plus(aligned, term) if transforms.active() else _Plus.apply(aligned, term)


def _plus(aligned: Tensor, term: Tensor) -> Tensor:
    """The sum. An alignment beyond its dtype is a number still, which a logarithm of no pairs, -inf, outweighs."""
    return torch.where(torch.isposinf(aligned) & torch.isneginf(term), term, aligned + term)


class _Plus(torch.autograd.Function):
    """That sum with the gradients of a sum: those of torch.where would be 0 times an infinite slope."""

    @staticmethod
    def forward(ctx: Any, aligned: Tensor, term: Tensor) -> Tensor:
        return _plus(aligned, term)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        return upstream[0], upstream[0]


def log_mean_gaussian(x: Tensor, t: float | Tensor, groups: Tensor | None, backend: str | None) -> Tensor:
    """log mean over the visited pairs of exp(-t |x_i - x_j|^2): the pooled form minus the logarithm of their number."""
    mask = own_pairs_left_out(groups, x)
    total = pair_total(x, outer="pooled", operand="sqdist", scale=-t, mask=mask, backend=backend)
    return total - batch.total(visits(x, None, mask)).clamp(min=1.0).log()
