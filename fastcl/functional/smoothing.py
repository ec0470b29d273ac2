"""Label smoothing in closed form: LSE_j z_ij - (1 - eps) p_i - eps mean_j z_ij, whose mean needs no sweep."""

from __future__ import annotations

from torch import Tensor

from .. import batch
from ..backends import choice
from ..batch import pair_reduce
from ..equation import checks
from ..equation.masks import Mask, across_groups
from .energy import visits
from .rows import leading


def share(name: str, value: float) -> float:
    """A number in [0, 1]."""
    if not 0.0 <= checks.real(name, value) <= 1.0:
        raise ValueError(f"{name}: expected a share in [0, 1], got {value}")
    return value


def exchanged(mask: Mask) -> Mask:
    """The mask with x and y exchanged."""
    if mask.group_x is None or mask.group_y is None:
        return mask
    return across_groups(mask.group_y, mask.group_x)


def mean_logit(
    x: Tensor, y: Tensor, p: Tensor | None, scale: float | Tensor, mask: Mask | None, backend: str | None
) -> Tensor:
    """The mean of scale <x_i, y_j> over the pairs that the mask visits in each row, and of p_i, which it does not; without a mask
    over all rows of y.

    Args:
        x: (n, d).
        y: (m, d).
        p: (k,) the logits of the first k rows' positives, for k values; None for n values.
        scale: a number or a tensor with one element.
        mask: of the other pairs.
        backend: what the objective was called with.
    """
    where = choice.of_closed_form(backend)
    k = x.shape[0] if p is None else p.shape[0]
    if mask is None or p is None or mask.kind == "off_diagonal":  # p_i is then the one pair that row i leaves out
        total = pair_reduce(x, y, scale=scale, reduce="sum", mask="all", backend=where)
        return leading(total, k) / max(batch.count(y), 1)
    total = pair_reduce(x, y, scale=scale, reduce="sum", mask=mask, backend=where)
    return (leading(total, k) + p) / (leading(visits(x, y, mask), k) + 1.0)
