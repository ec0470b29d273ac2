"""Several views of each sample at once: one positive term that all pairs of views share, not a loss for each pair of views."""

from __future__ import annotations

from functools import reduce
from itertools import combinations

from torch import Tensor

from .. import batch
from ..batch import pair_reduce
from ..distributed import Group, over_ranks
from ..distributed.agreement import ROWS
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.intrinsics import softplus
from ..equation.names import Backend, Reduction
from ..equation.pairs import LOG_2
from ..equation.reductions import merge
from ..precision import stacked
from .decoupled import free_energies
from .matching import row_dot
from .reduction import at_least, check_reduction, reduced
from .rows import inverse, normalize_rows, own_pairs_left_out, times

MOST = ROWS - 1  # views that ranks agree on, beside groups


@over_ranks
def mv_info_nce(
    *views: Tensor,
    temperature: Positive = 0.1,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """MV-InfoNCE: InfoNCE of V views, whose positive is the sum over all pairs of views and whose negatives are all other samples.

        L = mean_i [ log sum_l sum_{(m, j) != (l, i)} e^{<u_i^l, u_j^m> / tau} - log sum_{l != m} e^{<u_i^l, u_i^m> / tau} ]

    The first sum holds the second: a row is softplus(r_i - p_i), with r_i of the other samples' rows alone.

    Source: Koromilas et al. 2025 (arXiv 2507.06979), and the authors' code.

    Args:
        views: V >= 2 matrices (n, d) floating, of one dtype: row i of each is a view of sample i.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        groups: (n,) int64, one group per sample: samples of equal groups are no negatives of each other.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for fewer than two views, shapes or values that do not fit, or a mean over no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.mv_info_nce(x, x, x, temperature=0.5)), 4)
        0.4756
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    rows = _checked(views, normalize)
    z = stacked(*rows)
    r = pair_reduce(z, scale=a, mask=own_pairs_left_out(groups, z, views=len(rows)), backend=backend)
    losses = softplus(_log_sum(r.chunk(len(rows))) - (LOG_2 + _log_sum(_aligned(rows, a))))
    return reduced(losses, reduction, "mv_info_nce")


@over_ranks
def mv_dhel(
    *views: Tensor,
    temperature: Positive = 0.3,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """MV-DHEL: alignment over all pairs of V views, and an energy of each view by itself, in a tile of its own.

        L = mean_i [ -log sum_{l < m} e^{<u_i^l, u_i^m> / tau} + sum_l LSE_{j != i} <u_i^l, u_j^l> / tau ]

    With two views it is DHEL's joint form.

    Source: Koromilas et al. 2025 (arXiv 2507.06979), and the authors' code.

    Args:
        views: V >= 2 matrices (n, d) floating, n >= 2, of one dtype: row i of each is a view of sample i.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        groups: (n,) int64, one group per sample: samples of equal groups are no negatives of each other.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input). Without any negative it is -inf.

    Raises:
        ValueError: for fewer than two views, shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.mv_dhel(x, x, x, temperature=0.5)), 4)
        0.1972
    """
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    rows = _checked(views, normalize)
    at_least(2, rows[0], "mv_dhel")
    mask = own_pairs_left_out(groups, rows[0])
    loss = -reduced(_log_sum(_aligned(rows, a)), reduction, "mv_dhel")
    for x in rows:
        loss = loss + free_energies(x, None, a, mask, reduction, 1, backend)
    return loss


def _checked(views: tuple[Tensor, ...], normalize: bool) -> list[Tensor]:
    """The views, of one shape and dtype, normalised when asked."""
    if len(views) == 1 and isinstance(views[0], Tensor) and views[0].dim() == 3:
        shape = tuple(views[0].shape)
        raise ValueError(f"views: expected each as an argument of its own, got one tensor of shape {shape}; unpack it, *views")
    first = checks.matrix("views[0]", views[0]) if views else None
    if first is None or len(views) < 2:
        raise ValueError(f"views: expected at least 2, got {len(views)}; pass each as an argument of its own")
    if batch.beyond_this_process() and len(views) > MOST:
        raise ValueError(f"views: expected at most {MOST} over ranks, got {len(views)}; leave group out, or pass fewer")
    for k, other in enumerate(views[1:], 1):
        checks.pair_of_matrices("views[0]", first, f"views[{k}]", other, same_rows=True)
    return [normalize_rows(x) if normalize else x for x in views]


def _aligned(rows: list[Tensor], a: float | Tensor) -> list[Tensor]:
    """a <u_i^l, u_i^m> of every pair of views."""
    return [times(a, row_dot(u, v)) for u, v in combinations(rows, 2)]


def _log_sum(terms: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The log-sum-exp of terms, row by row."""
    return reduce(merge, terms)
