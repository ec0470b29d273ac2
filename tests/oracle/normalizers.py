"""SogCLR and FastCLIP: the normaliser of a sample, averaged over batches."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .pairwise import dot, lse, negatives, reduced, unit
from .softmax import _two_views

Groups = Sequence[int] | None
FEWEST = -1e29  # less than the logarithm of any sum


def _row(h: list[Tensor], old: float, gamma: float, tau: Tensor, eps: float, like: Tensor) -> Tensor:
    """tau log(eps + u), u = (1 - gamma) e^old + gamma g, g = mean e^h; the gradient to h is that of tau g / (eps + u)."""
    log_u = old
    if h:
        log_g = lse(h, like) - math.log(len(h))
        parts = [math.log(gamma) + log_g.item()] + ([math.log1p(-gamma) + old] if gamma < 1 else [])
        log_u = log_g.item() if old == -math.inf else lse([like.new_tensor(part) for part in parts], like).item()
    terms = ([] if log_u == -math.inf else [log_u]) + ([math.log(eps)] if eps else [])
    if not terms:
        return 0 * tau
    log_z = lse([like.new_tensor(t) for t in terms], like).item()
    value = tau * log_z
    return value + tau.detach() * (torch.exp(log_g - log_z) - math.exp(log_g.item() - log_z)) if h else value


def sogclr(
    u: Tensor,
    v: Tensor,
    log_u: Tensor | None = None,
    *,
    gamma: float = 0.9,
    temperature: Tensor | float = 0.1,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """tau log u_i - s_ip(i), u_i an average over batches of the mean e^{s_ik / tau} over other samples (2202.12387)."""
    z, partner, keep = _two_views(u, v, normalize, groups)
    tau, n, rows = torch.as_tensor(temperature, dtype=z.dtype), len(u), []
    for i in range(2 * n):
        old = -math.inf if log_u is None else float(log_u[i % n, 0])
        h = [dot(z[i], z[k]) / tau for k in range(2 * n) if keep(i, k) and k != partner[i]]
        rows.append(_row(h, old, gamma, tau, 0.0, z) - dot(z[i], z[partner[i]]))
    return reduced(rows, reduction)


def fast_clip(
    x: Tensor,
    y: Tensor,
    log_u: Tensor | None = None,
    *,
    gamma: float = 0.9,
    temperature: Tensor | float = 0.07,
    rho: Tensor | float = 0.0,
    eps: float = 1e-14,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """tau / 2 [log(eps + u_i) + log(eps + v_i)] + rho tau, of the means of e^{(s_ij - s_ii) / tau} both ways (2407.01445)."""
    (x, y), keep = (unit(x), unit(y)) if normalize else (x, y), negatives(groups)
    tau, rows = torch.as_tensor(temperature, dtype=x.dtype), []
    for i in range(len(x)):
        row = rho * tau
        for side, (a, b) in enumerate(((x, y), (y, x))):
            old = -math.inf if log_u is None else float(log_u[i, side])
            h = [(dot(a[i], b[j]) - dot(a[i], b[i])) / tau for j in range(len(b)) if keep(i, j)]
            row = row + _row(h, old, gamma, tau, eps, x) / 2
        rows.append(row)
    return reduced(rows, reduction)
