"""Negatives corrected for the positives among them, and weighted by their hardness, all in log space."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import batch
from ..distributed import Group, over_ranks, own_values
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.intrinsics import softplus
from ..equation.names import Backend, Reduction
from .aligned import aligned_views
from .both_views import both_views
from .reduction import check_reduction, reduced
from .rows import inverse, log_of_rest, logarithm, plain_number, times

LOG_HALF = -0.6931471805599453


@over_ranks
@own_values(2)
def debiased(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Positive = 0.5,
    tau_plus: float = 0.1,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """Debiased contrastive loss: the expected share of hidden positives is taken out of the negatives.

        L = mean_{i <= 2n} -log( e^{p_i} / (e^{p_i} + G_i) ),   p_i = s_ip(i) / tau,   s over z = [u; v], p(i) the other view
        G_i = max( (sum_k e^{s_ik / tau} - tau_plus K e^{p_i}) / (1 - tau_plus),  K e^{-1 / tau} ),   over the K = 2n - 2 negatives

    All is computed in log space. Where the floor holds, only the positive is trained.

    Source: Chuang et al. 2020 (arXiv 2007.00224), eq. 7 and 8.

    Args:
        u: (n, d) floating, the first views.
        v: (n, d), dtype of u, the second views.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        tau_plus: the prior probability that a negative is a hidden positive, a number in [0, 1).
        groups: (n,) int64, one group per pair of views: rows of equal groups are no negatives of each other.
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
        >>> u = torch.eye(4)
        >>> round(float(fastcl.functional.debiased(u, u, temperature=0.5, tau_plus=0.1)), 4)
        0.2115
    """
    return _debiased(u, v, temperature, tau_plus, 0.0, groups, normalize, reduction, "debiased", backend)


@over_ranks
@own_values(2)
def hard_negative(
    u: Tensor,
    v: Tensor,
    *,
    temperature: Positive = 0.5,
    tau_plus: float = 0.1,
    beta: float | Tensor = 1.0,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """Hard-negative contrastive loss: the debiased loss with negatives weighted by their own similarity.

        sum_k e^{s_ik / tau}  becomes  K sum_k w_k e^{s_ik / tau} / sum_k w_k,   w_k = e^{beta s_ik / tau}

    in fastcl.functional.debiased. Gradients flow through the weights. In log space the sum is
    log K + LSE_k (1 + beta) s_ik / tau - LSE_k beta s_ik / tau: two sweeps.

    Source: Robinson et al. 2021 (arXiv 2010.04592), eq. 4, and the authors' code.

    Args:
        u: (n, d) floating, the first views.
        v: (n, d), dtype of u, the second views.
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        tau_plus: the prior probability that a negative is a hidden positive, a number in [0, 1).
        beta: the hardness, a number >= 0 or a tensor with one element (may want gradients); 0 is the debiased loss.
        groups: (n,) int64, one group per pair of views: rows of equal groups are no negatives of each other.
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
        >>> u = torch.eye(4)
        >>> round(float(fastcl.functional.hard_negative(u, u, temperature=0.5, beta=1.0)), 4)
        0.2115
    """
    if not isinstance(checks.number("beta", beta), Tensor) and beta < 0:
        raise ValueError(f"beta: expected a number >= 0, got {beta}; 0 is the debiased loss")
    return _debiased(u, v, temperature, tau_plus, beta, groups, normalize, reduction, "hard_negative", backend)


def _debiased(
    u: Tensor,
    v: Tensor,
    temperature: Positive,
    tau_plus: float,
    beta: float | Tensor,
    groups: Tensor | None,
    normalize: bool,
    reduction: str,
    objective: str,
    backend: Backend | None,
) -> Tensor:
    check_reduction(reduction)
    a = inverse("temperature", temperature)
    if not 0.0 <= plain_number("tau_plus", tau_plus) < 1.0:
        raise ValueError(f"tau_plus: expected a probability in [0, 1), got {tau_plus}")
    u, v, s = aligned_views(u, v, normalize, ("u", "v"))
    views = both_views(u, v, groups, backend)
    p = times(a, s).repeat(2)
    # Without groups the mask leaves out the row and its partner; how many are left is known without asking.
    count = torch.full_like(p.detach(), 2.0 * batch.count(u) - 2.0) if groups is None else views.visits()
    some = count > 0
    # All relative to K e^p, so that what is rounded is a difference and not a logit: the mean of the negatives, and its floor.
    log_count = count.clamp(min=1.0).log()
    weighted = isinstance(beta, Tensor) or beta != 0.0
    r, *of_weights = (
        torch.where(some, r, 0.0) for r in views.log_sum_exps(*((a + beta * a, beta * a) if weighted else (a,)))
    )
    log_mean = r - (of_weights[0] if weighted else log_count) - p
    log_ratio = _log_corrected(log_mean, -checks.scalar("temperature", a, u) - p, tau_plus)
    known = some | p.isnan()  # without negatives the loss is 0, but of a positive that is NaN
    return reduced(softplus(torch.where(known, log_count + log_ratio, float("-inf"))), reduction, objective)


def _log_corrected(log_mean: Tensor, log_floor: Tensor, tau_plus: float) -> Tensor:
    """log max( (e^log_mean - tau_plus) / (1 - tau_plus), e^log_floor ), with a gradient to the larger alone.

    Asked for what is put in its place, so that NaN, of which no comparison holds, is not hidden.
    """
    if tau_plus > 0.0:
        log_prior, log_rest = _log_of_both(tau_plus, log_mean)
        t = log_prior - log_mean
        nothing = t >= 0
        log_mean = log_mean + _log1mexp(torch.where(nothing, -1.0, t)) - log_rest
        log_mean = torch.where(nothing, float("-inf"), log_mean)
    return torch.where(log_mean <= log_floor, log_floor, log_mean)


def _log_of_both(tau_plus: float, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """log tau_plus and log(1 - tau_plus), as `logarithm` takes them."""
    return logarithm(tau_plus, like), log_of_rest(tau_plus, like)


def _log1mexp(t: Tensor) -> Tensor:
    """log(1 - e^t) for t < 0, to full precision at either end."""
    near = t > LOG_HALF
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, t, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, t)))
    )
