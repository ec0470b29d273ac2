"""Distances, kernels and inner products: alignment and uniformity, KCL, spectral, MINC, alpha-divergences."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .pairwise import add, dot, negatives, reduced, sqdist, unit

Groups = Sequence[int] | None


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, normalize: bool = True, reduction: str = "mean") -> Tensor:
    """|x_i - y_i|^alpha (Wang and Isola 2020, section 4.1)."""
    x, y = (unit(x), unit(y)) if normalize else (x, y)
    return reduced([sqdist(x[i], y[i]) ** (alpha / 2) for i in range(len(x))], reduction)


def uniformity(x: Tensor, *, t: float = 2.0, normalize: bool = True, groups: Groups = None) -> Tensor:
    """log of the mean over pairs i != j of e^{-t |x_i - x_j|^2} (Wang and Isola 2020, section 4.1)."""
    x = unit(x) if normalize else x
    keep, n = negatives(groups), len(x)
    terms = [torch.exp(-t * sqdist(x[i], x[j])) for i in range(n) for j in range(n) if keep(i, j)]
    return torch.log(add(terms, x) / max(1, len(terms)))


def align_uniform(
    x: Tensor,
    y: Tensor,
    *,
    alpha: float = 2.0,
    t: float = 2.0,
    weight: float = 1.0,
    normalize: bool = True,
    groups: Groups = None,
) -> Tensor:
    """alignment + weight (uniformity(x) + uniformity(y)) / 2."""
    spread = (
        uniformity(x, t=t, normalize=normalize, groups=groups) + uniformity(y, t=t, normalize=normalize, groups=groups)
    ) / 2
    return alignment(x, y, alpha=alpha, normalize=normalize) + weight * spread


def spread_out(
    x: Tensor,
    *,
    mean_weight: float = 1.0,
    second_moment_weight: float = 1.0,
    normalize: bool = True,
    groups: Groups = None,
) -> Tensor:
    """w_1 M_1^2 + w_2 max(0, M_2 - 1/d), the moments of x_i.x_j over pairs i != j (Zhang et al. 2017)."""
    x = unit(x) if normalize else x
    keep, n = negatives(groups), len(x)
    s = [dot(x[i], x[j]) for i in range(n) for j in range(n) if keep(i, j)]
    first, second = (add(terms, x) / max(1, len(s)) for terms in (s, [t * t for t in s]))
    return mean_weight * first**2 + second_moment_weight * (second - 1 / x.shape[1]).clamp(min=0)


# The kernels of the code of Koromilas et al. 2024: (energy K_U, alignment K_A) as functions of d^2 and t.
# The log kernel's 1/2 stands in the energy and not in the alignment, as in the authors' code.
KERNELS: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]] = {
    "gaussian": (lambda d2, t: torch.exp(-t * d2), lambda d2, t: torch.exp(-t * d2)),
    "log": (lambda d2, t: -0.5 * torch.log(1 + t * d2), lambda d2, t: -torch.log(1 + t * d2)),
    "imq": (lambda d2, t: t / torch.sqrt(t * t + d2), lambda d2, t: t / torch.sqrt(t * t + d2)),
    "riesz": (lambda d2, t: _riesz(d2, t), lambda d2, t: _riesz(d2, t)),
    "gaussian_riesz": (lambda d2, t: _riesz(d2, t), lambda d2, t: torch.exp(-2.0 * d2)),
}


def _riesz(d2: Tensor, t: float) -> Tensor:
    return math.copysign(1.0, t) * torch.sqrt(d2) ** (-t)


def kcl(
    u: Tensor,
    v: Tensor,
    *,
    kernel: str = "gaussian",
    t: float = 2.0,
    gamma: float = 16.0,
    normalize: bool = True,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """-2 K_A(u_i, v_i) + gamma (E_u + E_v), E the mean of K_U over the other rows (Koromilas et al. 2024).

    With groups each row's energy is scaled so that the mean of the rows is the mean over the pairs kept.
    """
    u, v = (unit(u), unit(v)) if normalize else (u, v)
    energy, align = KERNELS[kernel]
    n, keep = len(u), negatives(groups)
    pairs = max(1, sum(keep(i, j) for i in range(n) for j in range(n)))
    rows = []
    for i in range(n):
        spread = add([energy(sqdist(z[i], z[j]), t) for z in (u, v) for j in range(n) if keep(i, j)], u)
        rows.append(-2 * align(sqdist(u[i], v[i]), t) + gamma * spread * n / pairs)
    return reduced(rows, reduction)


def _clipped(rows: Tensor, mu: float) -> Tensor:
    """Rows of norm at least sqrt(mu) brought to sqrt(mu)."""
    norms = [torch.linalg.vector_norm(row) for row in rows]
    return torch.stack([r if s < math.sqrt(mu) else math.sqrt(mu) * r / s for r, s in zip(rows, norms, strict=True)])


def spectral(
    u: Tensor,
    v: Tensor,
    *,
    mu: float = 1.0,
    estimator: str = "unbiased",
    normalize: bool = False,
    groups: Groups = None,
    reduction: str = "mean",
    clip_norms: bool = True,
) -> Tensor:
    """(1/mu) [-2 u_i.v_i + mean_j (u_i.v_j)^2] (HaoChen et al. 2021, algorithm 1); unbiased leaves j = i out.

    `clip_norms=False` is the plain form on raw rows.
    """
    u, v = (unit(u), unit(v)) if normalize else (u, v)
    u, v = (_clipped(u, mu), _clipped(v, mu)) if clip_norms else (u, v)
    n, keep = len(u), negatives(groups)
    chosen = [[j for j in range(n) if keep(i, j) or (estimator == "biased" and i == j)] for i in range(n)]
    pairs = max(1, sum(len(row) for row in chosen))
    rows = []
    for i in range(n):
        squares = add([dot(u[i], v[j]) ** 2 for j in chosen[i]], u)
        rows.append((-2 * dot(u[i], v[i]) + squares * n / pairs) / mu)
    return reduced(rows, reduction)


def second_moment(u: Tensor, v: Tensor) -> Tensor:
    """Lambda = mean of z z^T over the rows of both views (the "auxiliary statistic" of MINC), d x d."""
    return sum((torch.outer(z, z) for z in [*u, *v]), u.new_zeros(u.shape[1], u.shape[1])) / (2 * len(u))


def minc(
    u: Tensor,
    v: Tensor,
    statistic: Tensor,
    *,
    gha: bool = False,
    mu: float | None = None,
    target_u: Tensor | None = None,
    target_v: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """-2 <z, sg(z'_target)> + 2 <z, sg(T z)>, the mean over both views' rows, T = tril(Lambda) or Lambda.

    Its gradient is the MINC direction (arXiv 2504.16667): power iteration, deflated as in Sanger 1989 (GHA).
    """
    u, v = (unit(u), unit(v)) if normalize else (u, v)
    tu = u if target_u is None else unit(target_u) if normalize else target_u
    tv = v if target_v is None else unit(target_v) if normalize else target_v
    u, v, tu, tv = (x if mu is None else _clipped(x, mu) for x in (u, v, tu, tv))
    tu, tv = tu.detach(), tv.detach()
    matrix = (statistic.tril() if gha else statistic).detach()
    terms = []
    for i in range(len(u)):
        for z, partner in ((u[i], tv[i]), (v[i], tu[i])):
            deflation = torch.stack([dot(row, z) for row in matrix]).detach()
            terms.append(-2 * dot(z, partner) + 2 * dot(z, deflation))
    return add(terms, u) / len(terms)


def minc_value(u: Tensor, v: Tensor, statistic: Tensor) -> Tensor:
    """-2 mean <u_i, v_i> + mean <z, Lambda z>: the value that is reported beside the surrogate."""
    quadratic = [dot(z, torch.stack([dot(row, z) for row in statistic])) for z in [*u, *v]]
    return -2 * add([dot(a, b) for a, b in zip(u, v, strict=True)], u) / len(u) + add(quadratic, u) / (2 * len(u))


def f_mi_alpha(
    u: Tensor,
    v: Tensor,
    *,
    alpha: float = 2.0,
    eps: float = 1e-3,
    normalize: bool = False,
    groups: Groups = None,
    reduction: str = "mean",
) -> Tensor:
    """-f'(s_ii) + mean_j (s_ij f'(s_ij) - f(s_ij)), f the alpha-divergence of order a, s clamped at eps.

    f(u) = (u^a - a u + a - 1) / (a (a - 1)): f' = (s^{a-1} - 1) / (a - 1), s f' - f = (s^a - 1) / a.
    """
    u, v = (unit(u), unit(v)) if normalize else (u, v)
    n, keep = len(u), negatives(groups)

    def slope(s: Tensor) -> Tensor:
        return torch.log(s) if alpha == 1 else (s ** (alpha - 1) - 1) / (alpha - 1)

    def conjugate(s: Tensor) -> Tensor:
        return torch.log(s) if alpha == 0 else (s**alpha - 1) / alpha

    def clamped(a: Tensor, b: Tensor) -> Tensor:
        s = dot(a, b)
        return s.new_tensor(eps) if s < eps else s

    pairs = max(1, sum(keep(i, j) for i in range(n) for j in range(n)))
    rows = []
    for i in range(n):
        spread = add([conjugate(clamped(u[i], v[j])) for j in range(n) if keep(i, j)], u)
        rows.append(-slope(clamped(u[i], v[i])) + spread * n / pairs)
    return reduced(rows, reduction)
