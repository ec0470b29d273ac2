"""Global contrastive losses: each sample's normaliser is averaged over the batches that it was in, so that small batches are not
biased as the logarithm of a batch's own sum is.

    u_i <- (1 - gamma) u_i + gamma g_i,   g_i = mean_j e^{h_ij}          over the batch
    the gradient of tau log u_i is tau (dg_i) / u_i, u_i held fixed

All is in logarithms: g at a small temperature is within no dtype's range. fastcl.losses keeps u, one number for each sample.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import pair_reduce
from ..distributed import Group, over_ranks, own_values
from ..equation import checks
from ..equation.arguments import Positive, PositiveReal
from ..equation.names import Backend, Reduction
from ..equation.problem import accumulation_dtype
from .aligned import aligned_views
from .both_views import both_views
from .energy import visits
from .reduction import at_least, check_reduction, reduced
from .rows import inverse, log_of_rest, logarithm, negatives_of_each, times

LOG_2 = math.log(2.0)


class NormalizedLoss(NamedTuple):
    """A loss, and log u of its samples after it, without gradient: what the next call with the same samples takes."""

    loss: Tensor
    log_u: Tensor


@over_ranks
@own_values(2)
def sogclr(
    u: Tensor,
    v: Tensor,
    log_u: Tensor | None = None,
    *,
    gamma: PositiveReal = 0.9,
    temperature: Positive = 0.1,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_log_u: bool = False,
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor | NormalizedLoss:
    """SogCLR: two views of each sample, whose normaliser is averaged over batches; right for any batch size.

        L = mean_{i <= 2n} [ tau log u_i - s_ip(i) ],   u_i = (1 - gamma) u_old + gamma g_i,   g_i = mean_k e^{s_ik / tau}

    over z = [u; v], p(i) the other view of i, k the 2n - 2 rows of other samples. The gradient is that of the mean of
    tau sg(log u_i) + sg(tau) g_i / sg(u_i) - s_ip(i): u is held fixed. Both views start from their sample's u_old; its new one
    is the mean of theirs.

    Source: Yuan et al. 2022 (arXiv 2202.12387), algorithm 1 and the authors' code (Optimization-AI/SogCLR), whose printed value is
    another. A sample that was in no batch yet takes g_i whole.

    Args:
        u: (n, d) floating, the first views, n >= 2.
        v: (n, d), dtype of u, the second views.
        log_u: (n, 1) floating, log u_old of each sample, without gradient; -inf (or NaN) for one that is new. None where
            all are.
        gamma: the share of this batch in u, a number in (0, 1].
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        groups: (n,) int64, one group per pair of views: rows of equal groups are no negatives of each other.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (2n values, those of u first).
        return_log_u: whether to return (loss, log_u), log_u being the new one.
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (2n,) for "none"; float32 (float64 for float64 input). With return_log_u a NormalizedLoss.

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.sogclr(x, x)), 4)
        -1.0
        >>> loss, log_u = fastcl.functional.sogclr(x, x, torch.full((4, 1), 2.0), gamma=0.5, return_log_u=True)
        >>> log_u.shape, round(float(log_u[0]), 4)  # log((e^2 + 1) / 2)
        (torch.Size([4, 1]), 1.4338)
    """
    check_reduction(reduction)
    a, gamma = inverse("temperature", temperature), share_of_batch(gamma)
    u, v, s = aligned_views(u, v, normalize, ("u", "v"))
    at_least(2, u, "sogclr")
    old = earlier(log_u, u, "u", 1)[:, 0].repeat(2)
    views = both_views(u, v, groups, backend)
    (r,), visited = views.log_sum_exps(a), views.visits()
    log_g = torch.where(visited > 0.0, r - visited.clamp(min=1.0).log(), 0.0)
    new = averaged(log_g, visited, old, gamma)
    tau = checks.scalar("temperature", temperature, s)
    energy = tau * torch.where(new > -torch.inf, new, 0.0) + tau.detach() * relative(log_g, visited, new)
    losses = energy - s.repeat(2)
    loss = reduced(losses, reduction, "sogclr")
    n = u.shape[0]
    return NormalizedLoss(loss, (torch.logaddexp(new[:n], new[n:]) - LOG_2).unsqueeze(1)) if return_log_u else loss


@over_ranks
def fast_clip(
    x: Tensor,
    y: Tensor,
    log_u: Tensor | None = None,
    *,
    gamma: PositiveReal = 0.9,
    temperature: Positive = 0.07,
    rho: float | Tensor = 0.0,
    eps: PositiveReal = 1e-14,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_log_u: bool = False,
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor | NormalizedLoss:
    """FastCLIP: CLIP with a normaliser for each image and each text, averaged over batches; right for any batch size.

        L = mean_i tau [ log(eps + u_i) + log(eps + v_i) ] / 2 + rho tau,   u_i = (1 - gamma) u_old + gamma g_i
        g_i = mean_{j != i} e^{(s_ij - s_ii) / tau},   v_i likewise of s_ji;   s_ij = <x_i, y_j>

    The gradient of log(eps + u_i) is that of g_i / (eps + sg(u_i)): u is held fixed. A temperature that is learned comes with
    rho > 0 (FastCLIP-v3); one that is fixed is FastCLIP-v1, SogCLR of two modalities.

    Source: Wei et al. 2024 (arXiv 2407.01445), eq. RGCL-g and algorithm 1, and the authors' code (Optimization-AI/fast_clip), whose
    printed value is another. A sample that was in no batch yet takes g_i whole.

    Args:
        x: (n, d) floating, n >= 2, for instance image features.
        y: (n, d), dtype of x; y_i is the positive of x_i.
        log_u: (n, 2) floating, log u_old and log v_old of each sample, without gradient; -inf (or NaN) for one that is new. None
            where all are.
        gamma: the share of this batch in u and v, a number in (0, 1].
        temperature: tau > 0, a number or a tensor with one element (may want gradients).
        rho: the weight of the temperature, a number or a tensor with one element.
        eps: a number > 0, added to u and v.
        groups: (n,) int64, one group for row i of x and row i of y: rows of equal groups are no negatives of each other.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values).
        return_log_u: whether to return (loss, log_u), log_u being the new ones.
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input). With return_log_u a NormalizedLoss.

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.fast_clip(x, x, temperature=0.5)), 4)  # g = e^-2
        -1.0
    """
    check_reduction(reduction)
    a, gamma = inverse("temperature", temperature), share_of_batch(gamma)
    x, y, s = aligned_views(x, y, normalize)
    at_least(2, x, "fast_clip")
    old = earlier(log_u, x, "x", 2)
    mask = negatives_of_each(groups, x, y)
    r, c = pair_reduce(x, y, scale=a, mask=mask, columns=True, backend=backend)
    visited = visits(x, y, mask).unsqueeze(1)  # as many in a row as in the column of its index
    log_g = torch.stack([r, c], 1) - times(a, s).unsqueeze(1) - visited.clamp(min=1.0).log()
    log_g = torch.where(visited > 0.0, log_g, 0.0)
    new = averaged(log_g, visited, old, gamma)
    log_z = torch.logaddexp(new, torch.zeros_like(new) + logarithm(eps, x))
    tau = checks.scalar("temperature", temperature, s)
    losses = (tau * log_z + tau.detach() * relative(log_g, visited, log_z)).mean(1) + checks.scalar("rho", rho, s) * tau
    loss = reduced(losses, reduction, "fast_clip")
    return NormalizedLoss(loss, new) if return_log_u else loss


def share_of_batch(gamma: float) -> float:
    """gamma, in (0, 1]."""
    if gamma > 1.0:
        raise ValueError(f"gamma: expected the share of this batch, in (0, 1], got {gamma}")
    return gamma


def earlier(log_u: Tensor | None, x: Tensor, of: str, columns: int) -> Tensor:
    """(n, columns) the logarithms of the normalisers before this batch, in the accumulation dtype; -inf where there were none."""
    n, dtype = x.shape[0], accumulation_dtype(x.dtype)
    if log_u is None:
        return torch.full((n, columns), -torch.inf, dtype=dtype, device=x.device)
    checks.matrix("log_u", log_u)
    if log_u.shape != (n, columns):
        raise ValueError(
            f"log_u: expected shape ({n}, {columns}), the logarithms for each row of {of}, got {tuple(log_u.shape)}"
        )
    if log_u.device != x.device:
        raise ValueError(f"log_u: expected the device of {of}, {x.device}, got {log_u.device}; move it")
    # An average of weights (EMA, SWA) that takes buffers along makes NaN of -inf.
    return log_u.detach().to(dtype).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def averaged(log_g: Tensor, visited: Tensor, old: Tensor, gamma: float) -> Tensor:
    """log((1 - gamma) u + gamma g) without gradient: g whole where u is new, u as it was where there is no negative."""
    log_g = log_g.detach()
    if gamma < 1.0:
        mixed = torch.logaddexp(old + log_of_rest(gamma, log_g), log_g + logarithm(gamma, log_g))
        new = torch.where(old == -torch.inf, log_g, mixed)
    else:
        new = log_g
    return torch.where(visited > 0.0, new, old)


def relative(log_g: Tensor, visited: Tensor, log_z: Tensor) -> Tensor:
    """(g - sg(g)) / z, z without gradient: 0, with the derivatives of g / z, of every order."""
    held = log_g.detach()
    return torch.where(visited > 0.0, torch.exp(held - log_z), 0.0) * torch.expm1(log_g - held)
