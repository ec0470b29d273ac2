"""InfoNCE whose logits are log-odds of the cosine: nothing to tune, and gradients that vanish with alignment alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import pair_reduce
from ..distributed import Group, over_ranks
from ..equation.arguments import PositiveReal
from ..equation.names import Backend, Reduction
from ..equation.pairs import Power
from .aligned import aligned_views
from .energy import visits
from .matching import row_dot, row_sqdist
from .reduction import check_reduction, reduced
from .rows import every_row_matched, leading, negatives_of_each, plain_number


@over_ranks
def temperature_free_info_nce(
    x: Tensor,
    y: Tensor,
    *,
    eps: PositiveReal = 1e-6,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """Temperature-free InfoNCE: the logit of a cosine s is 2 artanh(s) = log((1 + s) / (1 - s)), without a temperature.

        L = mean_i log(1 + (1 - s_ii) / (1 + s_ii) sum_{j != i} (1 + s_ij) / (1 - s_ij))

    The odds of a pair are 2 / (1 - s) - 1, so that one sum over pairs serves; a normalised positive's 1 - s is formed from
    differences, and exact for aligned rows. 1 - s, and a positive's 1 + s, are taken as at least eps, with gradient 0 below.

    Source: Kim & Kim 2025 (arXiv 2501.17683).

    Args:
        x: (n, d) floating, the anchors.
        y: (m, d) with m >= n, dtype of x; y_i is the positive of x_i, rows beyond n are negatives only.
        eps: the least 1 - s, and the least 1 + s of a positive, a number > 0; each value makes a graph of torch.compile.
        groups: (m,) int64, one group per row of y (the first n also name the rows of x): equal groups are no negatives.
        normalize: whether to scale rows to unit length first; without, they have it already.
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
        >>> round(float(fastcl.functional.temperature_free_info_nce(x + 0.5 * x.roll(1, 1), x)), 4)
        0.229
    """
    check_reduction(reduction)
    least = plain_number("eps", eps, positive=True)
    x, y, aligned = aligned_views(x, y, normalize, same_rows=False)
    every_row_matched(x, y)
    mask = negatives_of_each(groups, x, y)
    own = leading(y, x.shape[0])
    pair: dict[str, Any] = {"pair": Power(-1.0, least), "reduce": "sum", "mask": mask, "backend": backend}
    if normalize:
        # 1 - s of unit rows is half of their squared distance, which near ones keep the digits of, and 1 + s that of opposed ones.
        # Rows of zeros have no length.
        of_x, of_y = (_from_unit(rows) for rows in (x, y))
        lacking = of_x + leading(of_y, x.shape[0])
        away, opposed = (0.5 * row_sqdist(x, other) + lacking for other in (own, -own))
        inverse = pair_reduce(x, y, operand="sqdist", scale=0.5, bias_x=of_x, bias_y=of_y, **pair)
    else:
        away, opposed = 1.0 - aligned, 1.0 + aligned
        inverse = pair_reduce(x, y, scale=-1.0, shift=1.0, **pair)
    odds = (2.0 * inverse - visits(x, y, mask)).clamp(min=0.0)
    # Of rows that are no unit rows the product of the other two may be beyond the dtype, and odds 0.
    odds = odds / opposed.clamp(min=least)
    return reduced(torch.log1p(away.clamp(min=least) * odds), reduction, "temperature_free_info_nce")


def _from_unit(rows: Tensor) -> Tensor:
    """(1 - |x_i|^2) / 2 of rows that normalising left shorter; else 0, to which the others are unit rows."""
    squared = row_dot(rows, rows)
    return torch.where(squared < 1.0 - 16.0 * torch.finfo(rows.dtype).eps, 0.5 * (1.0 - squared), 0.0)
