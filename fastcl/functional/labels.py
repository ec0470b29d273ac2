"""Supervised contrastive learning: every row of the same label is a positive."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import batch
from ..backends import choice
from ..batch import pair_reduce
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.intrinsics import softplus
from ..equation.masks import across_groups, within_groups
from ..equation.names import Backend, Reduction
from ..equation.problem import accumulation_dtype
from ..precision import rounded_once
from .energy import visits
from .matching import pair_dot, row_dot
from .positives import counts, few, loss_of_few, may_be_counted, nearly_points, of_sweeps, within_classes
from .reduction import check_reduction, reduced
from .rows import beyond_range, inverse, times, wide_enough


@over_ranks
def sup_con(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 0.07,
    base_temperature: Positive = 0.07,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """SupCon, the form with the logarithm inside (L_out): each row finds all rows of its label.

        L = mean_i (tau / tau_0) [ LSE_{a != i} s_ia / tau - mean_{p in P(i)} s_ip / tau ],   P(i) = {p != i of the label of i}

    An anchor without positives gives 0 and counts in the mean, as in the authors' code. On a CPU few positives, 8 a row or 4,096 in
    all, have their logits formed apart from one sweep over negatives, O(n d) too: of near-duplicates no gradient is the difference
    of large numbers. More of them, and those over ranks, on a GPU, in a graph or under torch.func, are class sums, O(n d). There
    the positive of a row that has but one is left out of the sweep, which keeps the gradient accurate when its loss is small;
    several share the log-sum-exp, and such a row's loss is at least the log of their number: where classes are nearly points (one
    row in ten at a mean cosine of 0.75) a CPU takes both in float64, in twice the time; always in a graph and under torch.func,
    where it cannot look. Nor can a GPU: there pass rows in float64 at that stage, since float32 leaves of a gradient what is above
    1e-6 of its terms (bfloat16: 4e-3).

    Source: Khosla et al. 2020 (arXiv 2004.11362), eq. 2.

    Args:
        z: (n, d) floating; several views are passed concatenated, each with its labels.
        labels: (n,) int64, one label per row; any values.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        base_temperature: tau_0 > 0, a number or a tensor with one element.
        normalize: whether to scale rows to unit length first (the authors' code leaves that to its caller).
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported dtypes.

    Examples:
        >>> z, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
        >>> round(float(fastcl.functional.sup_con(z, labels, temperature=0.5, base_temperature=0.5)), 4)
        0.5944
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    checks.groups("labels", labels, checks.matrix("z", z).shape[0], "z", z)
    factor = checks.number("temperature / base_temperature", temperature / base_temperature, z)
    losses = _losses(z, labels, a, normalize, backend)
    if not batch.beyond_this_process() and beyond_range(losses, z):
        losses = _losses(z.double(), labels, a, normalize, choice.of_float64(backend, z)).to(losses.dtype)
    return reduced(times(factor, losses), reduction, "sup_con")


def _losses(z: Tensor, labels: Tensor, a: float | Tensor, normalize: bool, backend: str | None) -> Tensor:
    """Each row's loss, by whichever way is right for how many positives there are."""
    n, listed = z.shape[0], None
    if not batch.beyond_this_process() and may_be_counted(labels):
        listed = within_classes(labels, few(n, n) // 2)
    with rounded_once(z.device):
        z = of_sweeps(z, normalize)
        if listed is not None:
            return _of_few(z, labels, a, listed, backend)
        return _of_class_sums(z, labels, a, normalize, backend)


def _of_few(z: Tensor, labels: Tensor, a: float | Tensor, listed: tuple[Tensor, Tensor], backend: str | None) -> Tensor:
    """Each row's loss where positives are few and may be counted: of the logits of all of them, and a sweep over negatives."""
    i, j = listed
    p, index = times(a, pair_dot(z, z, i, j)).repeat(2), torch.cat([i, j])
    r = pair_reduce(z, scale=a, mask=across_groups(labels), backend=backend)
    return loss_of_few(r, p, index, counts(index, z.shape[0]))


def _of_class_sums(z: Tensor, labels: Tensor, a: float | Tensor, normalize: bool, backend: str | None) -> Tensor:
    """The same where positives are summed by label: O(n d), however many there are."""
    same = within_groups(labels)
    positives = visits(z, None, same) - 1.0  # the mask visits the row itself too
    some, single = positives > 0, positives == 1
    # A row's own term is taken out again. That of a long row drowns the others of its label: then both are float64.
    wide = z if normalize else wide_enough(z, a)
    s = pair_reduce(wide, scale=a, reduce="sum", mask=same, backend=choice.of_closed_form(backend))
    own = times(a, row_dot(wide, wide))
    mean = (s - own) / positives.clamp(min=1.0)
    if z.dtype != torch.float64 and nearly_points(mean, own, some):
        return _of_class_sums(z.double(), labels, a, normalize, choice.of_float64(backend, z)).to(
            accumulation_dtype(z.dtype)
        )
    r = pair_reduce(z, scale=a, mask=across_groups(_in_pairs(labels, single, z)), backend=backend)
    loss = r - mean.to(r.dtype)
    return torch.where(some, torch.where(single, softplus(loss), loss), 0.0)


def _in_pairs(labels: Tensor, single: Tensor, z: Tensor) -> Tensor:
    """Groups of which the two rows of a label that has no others are one, and every other row is one of its own.

    Rows are named by their index in the batch, a pair by that of its first row: a label's sum of indices, in float64, which
    is exact, gives away the other one.
    """
    index = batch.first(z) + torch.arange(z.shape[0], device=z.device)
    column = index.double()[:, None]
    both = pair_reduce(
        torch.ones_like(column), column, pair="identity", reduce="sum", mask=within_groups(labels, labels)
    )
    return torch.where(single, torch.minimum(index, both.long() - index), index)
