"""The spread-out regulariser: the first two moments of the similarities of different rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import batch
from ..batch import pair_total
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.names import Backend, Reduction
from .energy import visits
from .reduction import at_least, check_reduction
from .rows import normalize_rows, own_pairs_left_out


@over_ranks
def spread_out(
    x: Tensor,
    *,
    mean_weight: float | Tensor = 1.0,
    second_moment_weight: float | Tensor = 1.0,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """Spread-out (global orthogonal) regularisation: similarities of different rows as those of uniform directions.

        L = w_1 (mean_{i != j} s_ij)^2 + w_2 max(0, mean_{i != j} s_ij^2 - 1 / d),   s_ij = <x_i, x_j>

    Uniform directions have mean 0 and second moment 1 / d. Both are sums of rows and of d x d matrices where that is cheaper.

    Source: Zhang et al. 2017 (arXiv 1708.06320), here of all pairs of different rows of one view, as for EmbeddingGemma
    (Schechter Vera et al. 2025, arXiv 2509.20354).

    Args:
        x: (n, d) floating, n >= 2.
        mean_weight: w_1, a number or a tensor with one element.
        second_moment_weight: w_2, a number or a tensor with one element.
        groups: (n,) int64, one group per row: pairs of equal groups are left out.
        normalize: whether to scale rows to unit length first.
        reduction: "mean" only: moments have no rows.
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported dtypes.

    Examples:
        >>> round(float(fastcl.functional.spread_out(torch.ones(4, 2))), 4)
        1.5
    """
    check_reduction(reduction, has_rows=False, objective="spread_out")
    at_least(2, checks.matrix("x", x), "spread_out")
    if normalize:
        x = normalize_rows(x)
    mask = own_pairs_left_out(groups, x)
    pairs = batch.total(visits(x, None, mask)).clamp(min=1.0)
    # Sums in units of a power of two, in which those of squares are no larger than their mean.
    unit = torch.exp2(-torch.ceil(0.5 * pairs.log2()))
    sweep: dict[str, Any] = {"outer": "sum", "reduce": "sum", "mask": mask, "scale": unit, "backend": backend}
    first = pair_total(x, pair="identity", **sweep) / (pairs * unit)
    second = pair_total(x, pair="square", **sweep) / (pairs * unit.square())
    w_1, w_2 = (
        checks.scalar(name, w, first)
        for name, w in (("mean_weight", mean_weight), ("second_moment_weight", second_moment_weight))
    )
    # Of a moment that is beyond the dtype a weight of 0 takes nothing.
    moments = (first.square(), (second - 1.0 / max(x.shape[1], 1)).relu())
    w_1, w_2 = (
        w * torch.where(w == 0.0, m.clamp(max=torch.finfo(m.dtype).max), m)
        for w, m in zip((w_1, w_2), moments, strict=True)
    )
    return w_1 + w_2
