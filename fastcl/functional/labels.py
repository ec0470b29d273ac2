"""Supervised contrastive learning: every row of the same label is a positive."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..batch import pair_reduce
from ..distributed import Group, over_ranks
from ..masks import within_groups
from .energy import visits
from .rows import check_reduction, inverse, normalize_rows, reduced, row_dot, times


@over_ranks
def sup_con(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
    group: Group | None = None,
    gradient: str = "ddp",
    strategy: str = "auto",
) -> Tensor:
    """SupCon, the form with the logarithm inside (L_out): each row finds all rows of its label.

        L = mean_i (tau / tau_0) [ LSE_{a != i} s_ia / tau - mean_{p in P(i)} s_ip / tau ],   P(i) = {p != i of the label of i}

    The sum over positives is a class sum, O(n d); one sweep serves the rest. An anchor without positives gives 0 and counts in
    the mean, as in the authors' code. The positives stay inside the log-sum-exp, since they share it: where every row has one
    positive alone, nt_xent is the same loss and keeps its gradient accurate when the loss is small.

    Source: Khosla et al. 2020 (arXiv 2004.11362), eq. 2.

    Args:
        z: (n, d) floating; several views are passed concatenated, each with its labels.
        labels: (n,) int64, one label per row; any values.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        base_temperature: tau_0 > 0, a number or a tensor with one element.
        normalize: whether to scale rows to unit length first (the authors' code leaves that to its caller).
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which the rows are spread, a process group or one dimension of a DeviceMesh; None for this process.
        gradient: "ddp", right where DistributedDataParallel averages over ranks (world times the gradient), or "exact".
        strategy: "auto", "gather" or "ring": how rows of other ranks come here; see fastcl.distributed.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported dtypes.
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    factor = temperature / checks.positive_number("base_temperature", base_temperature)
    checks.groups("labels", labels, checks.matrix("z", z).shape[0], "z", z)
    if normalize:
        z = normalize_rows(z)
    same = within_groups(labels)
    r = pair_reduce(z, scale=a, mask="off_diagonal", backend=backend)
    s = pair_reduce(z, scale=a, reduce="sum", mask=same, backend=backend)
    assert isinstance(r, Tensor) and isinstance(s, Tensor)
    positives = visits(z, None, same) - 1.0  # the mask visits the row itself too
    mean = (s - times(a, row_dot(z, z))) / positives.clamp(min=1.0)
    return reduced(times(factor, torch.where(positives > 0, r - mean, 0.0)), reduction, "sup_con")
