"""Supervised contrastive learning whose positives do not repel each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choice
from ..batch import pair_reduce
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.intrinsics import softplus
from ..equation.masks import across_groups, within_groups
from ..equation.names import Backend, Reduction
from ..precision import swept
from .energy import visits
from .matching import row_dot
from .reduction import check_reduction, reduced
from .rows import inverse, normalize_rows, times, wide_enough


@over_ranks
def sincere(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: Positive = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """SINCERE: each positive against the rows of other labels, not against the other positives.

        L = mean_i mean_{p in P(i)} [ log(e^{s_ip / tau} + sum_{n: other labels} e^{s_in / tau}) - s_ip / tau ]

    P(i) are the other rows of the label of i. With r_i the log-sum-exp of the other labels, a term is
    softplus(r_i - s_ip / tau): a second sweep, in which r is a bias of rows.
    An anchor without positives gives 0 and counts in the mean, as in sup_con.

    Source: Feeney & Hughes 2023 (arXiv 2309.14277).

    Args:
        z: (n, d) floating; several views are passed concatenated, each with its labels.
        labels: (n,) int64, one label per row; any values.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        normalize: whether to scale rows to unit length first.
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
        >>> round(float(fastcl.functional.sincere(z, labels, temperature=0.5)), 4)
        0.5944
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    checks.groups("labels", labels, checks.matrix("z", z).shape[0], "z", z)
    z = swept(normalize_rows(z) if normalize else z)
    positives = visits(z, None, within_groups(labels)) - 1.0  # the mask visits the row itself too
    r = pair_reduce(z, scale=a, mask=across_groups(labels), backend=backend)
    # Of no negatives it is a number that no logit is below, finite so that gradients are.
    r = torch.where(torch.isneginf(r), -0.125 * torch.finfo(r.dtype).max, r)
    # A row's own term is taken out again. Of unit rows it is the smallest of all; a row shorter than its positives has one that
    # may drown theirs, so that both are float64.
    x = z if normalize else wide_enough(z, a)
    name = choice.requested(backend)
    if name != "auto" and choice.reason(name, x.device, x.dtype) is not None:
        backend = "blocked"  # which has float64 on every device; Triton has not
    s = pair_reduce(
        x, x, pair="softplus", reduce="sum", scale=-a, bias_x=r, mask=within_groups(labels, labels), backend=backend
    )
    s = (s - softplus(r - times(a, row_dot(x, x)))).to(r.dtype)
    return reduced(torch.where(positives > 0, s / positives.clamp(min=1.0), 0.0), reduction, "sincere")
