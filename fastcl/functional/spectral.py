"""Spectral contrastive learning, and its incremental form."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import batch, transforms
from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive
from ..equation.masks import Mask
from ..equation.names import Backend, Estimator, Reduction
from ..equation.pairs import Square
from ..equation.problem import accumulation_dtype
from ..precision import narrow_product, on_tensor_cores, product, stacked
from .energy import Pairs, Potential, visits
from .gram import PlainSpectral, ordinary
from .matching import one_pass_dot, row_dot
from .reduction import at_least, check_reduction, reduced
from .rows import (
    Tangent,
    check_backend,
    normalize_rows,
    own_pairs_left_out,
    plain_norms,
    plain_tangent,
    tangent,
    unit_rows,
    views,
)


@over_ranks
def spectral(
    u: Tensor,
    v: Tensor,
    *,
    mu: Positive = 1.0,
    estimator: Estimator = "unbiased",
    groups: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """The spectral contrastive loss, of rows clipped to norm sqrt(mu).

        L = (1 / mu) [ -2 mean_i <u_i, v_i> + mean_{i != j} <u_i, v_j>^2 ]

    Negatives are pairs across the views; "biased" counts i = j among them. The sweep goes through d x d matrices where that is
    cheaper (forward and backward: n > 4d / 3), exactly.

    Source: HaoChen et al. 2021 (arXiv 2106.04156), algorithm 1, and the authors' code for the clipping and for 1 / mu.

    Args:
        u: (n, d) floating, n >= 2 (1 for "biased"), the first views.
        v: (n, d), dtype of u, the second views.
        mu: the largest squared norm > 0; longer rows are scaled down to it (the gradient is that of the scaling).
        estimator: "unbiased" (pairs i != j) or "biased" (all pairs).
        groups: (n,) int64, one group per row: pairs of equal groups are no negatives (the "biased" i = j stays).
        normalize: whether to scale rows to unit length first, before they are clipped.
        reduction: "mean", "sum" or "none" (n values: the row's own terms, its energy being its row sum over
            n - 1, with groups over the mean number of pairs of a row).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes, names or values that do not fit, or too few rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> u = torch.eye(4)
        >>> round(float(fastcl.functional.spectral(u, u)), 4)
        -2.0
    """
    check_reduction(reduction)
    checks.positive_number("mu", mu)
    u, v = views(u, v, normalize, ("u", "v"))
    at_least(2 if estimator == "unbiased" else 1, u, "spectral")
    largest = checks.scalar("mu", mu, u)
    biased = estimator == "biased"
    general = partial(_general, mu=largest, biased=biased, groups=groups, reduction=reduction, backend=backend)
    if groups is not None or reduction == "none" or batch.beyond_this_process():
        return general(u, v)
    found = ordinary(u, v, largest, biased, backend)
    if found is None:
        return general(u, v)
    mean: Tensor = PlainSpectral.apply(u, v, largest, found, partial(general, reduction="mean"))
    return mean if reduction == "mean" else mean * u.shape[0]


def _general(
    u: Tensor, v: Tensor, mu: Tensor, biased: bool, groups: Tensor | None, reduction: Reduction, backend: Backend | None
) -> Tensor:
    """The loss of any rows: three parts, each with its gradients."""
    u, v = clip_norms(u, mu.sqrt()), clip_norms(v, mu.sqrt())
    mask = Mask("all") if biased and groups is None else own_pairs_left_out(groups, u)
    squares = Pairs(u, v, mask, reduction=reduction, backend=backend).energy(Potential(Square()))
    s = one_pass_dot(u, v)
    if biased and groups is not None:  # the mask left i = j out: n more pairs
        n, others = batch.count(s), batch.total(visits(u, v, mask))
        squares = (squares * others + n * reduced(s.square(), reduction, "spectral")) / (others + n)
    return (squares - 2.0 * reduced(s, reduction, "spectral")) / mu


def clip_norms(x: Tensor, limit: Tensor) -> Tensor:
    """Rows of norm `limit` or more brought to it, with the gradient of that; the others as they are. In the dtype of x."""
    if not x.shape[1]:
        return x
    if transforms.active():
        return torch.where(_norms(x) < limit, x, (_units(x)[0] * limit).to(x.dtype))
    clipped: Tensor = _ClipNorms.apply(x, limit)
    return clipped


def _units(x: Tensor) -> tuple[Tensor, Tensor]:
    """unit_rows of rows that are longer than the limit, however short that is."""
    return unit_rows(x, torch.finfo(torch.promote_types(x.dtype, torch.float32)).tiny)


class _ClipNorms(torch.autograd.Function):
    """x_i, or limit x_i / |x_i| where |x_i| >= limit; saves x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(x, limit)

        def carefully() -> Tensor:
            return torch.where(_norms(x) < limit, x, _units(x)[0].mul_(limit).to(x.dtype))

        plain = plain_norms(x)
        if plain is None or limit < 2.0**-60:
            return carefully()
        return plain.otherwise(x * torch.where(plain.norm < limit, 1.0, limit / plain.norm), carefully)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        x, limit = ctx.saved_tensors
        g = upstream[0].to(limit.dtype)

        def carefully() -> Tangent:
            unit, norm = _units(x)
            clipped = ~(_norms(x) < limit)
            return tangent(g, unit, clipped, torch.where(clipped, norm / limit, 1.0))

        plain = None if torch.is_grad_enabled() else plain_norms(x)
        if plain is not None and limit > 2.0**-60:
            clipped = ~(plain.norm < limit)
            found = plain_tangent(g, x, plain, torch.where(clipped, limit / plain.norm, 1.0), clipped)
            if found is not None and (found[1].every or not ctx.needs_input_grad[1]):
                rows = found[1].otherwise(found[0].rows, lambda: carefully().rows)
                return rows, found[0].radial.sum() if ctx.needs_input_grad[1] else None
        careful = carefully()
        return careful.rows.to(x.dtype), _total(careful) if ctx.needs_input_grad[1] else None


def _total(found: Tangent) -> Tensor:
    """The sum of the radial parts: of the infinite ones alone, as equals, where there are any, and then infinite or 0."""
    infinite = found.scale.isinf()
    common = torch.where(found.scale == 1.0, 2.0**-32, 1.0) * found.radial
    common = torch.where(infinite.any() & ~infinite, 0.0, common)
    # A tensor of the dtype: as a Python number the end of float64's range is refused.
    largest = torch.full_like(common.sum(), torch.finfo(common.dtype).max)
    return common.sum() * torch.where(infinite.any(), largest, 2.0**32)


def _norms(x: Tensor) -> Tensor:
    """|x_i|, (n, 1), rounded as torch rounds it: of unit rows at mu = 1, that decides which are clipped."""
    return torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True, dtype=accumulation_dtype(x.dtype))


@over_ranks
def minc(
    u: Tensor,
    v: Tensor,
    statistic: Tensor,
    *,
    gha: bool = False,
    mu: Positive | None = None,
    target_u: Tensor | None = None,
    target_v: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """MINC: mutual information non-contrastive learning, each row against a statistic of all others. O(n d^2), no pairs.

        L = mean over z in [u; v] of  -2 <z, sg(z')> + 2 <z, sg(T z)>,   T = tril(statistic) with gha, else statistic

    z' is the other view of z (its target's where given), sg stops gradients, statistic = E[z z^T]. The gradient is what L is
    for, E[z' | x] - T z, the direction of a power iteration, which GHA deflates to ordered eigenvectors. T is not symmetric, so
    that this is the gradient of no function: fastcl.losses.MINCLoss reports a value beside it, and keeps the statistic.

    Source: arXiv 2504.16667 as far as it is public, and Sanger 1989 for GHA; scale and signs are derived (at the batch's own
    statistic, without gha and targets, the gradient is half that of the spectral loss over both views).

    Args:
        u: (n, d) floating, the first views.
        v: (n, d), dtype of u, the second views.
        statistic: (d, d) floating, the second moment of rows; used in the accumulation dtype, without gradient.
        gha: whether to deflate by its lower triangle (with the diagonal), the generalised Hebbian algorithm: the coordinates then
            come in the order of their eigenvalues, with the smaller steps that this takes.
        mu: the largest squared norm > 0 of a row, targets too, as in `spectral`; None leaves rows as they are.
        target_u: (n, d) or None, features of a target network for the first views; None takes u.
        target_v: (n, d) or None, the same for the second views.
        normalize: whether to scale rows, targets too, to unit length first.
        reduction: "mean" only.
        backend: see fastcl.pair_reduce; minc has no pairs to reduce and is the same on each.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, float32 (float64 for float64 input); its gradient is the MINC direction, its value says little.

    Raises:
        ValueError: for shapes that do not fit, or no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> u, v = torch.eye(4), torch.eye(4)
        >>> round(float(fastcl.functional.minc(u, v, torch.eye(4) / 4)), 4)
        -1.5
    """
    check_reduction(reduction, has_rows=False, objective="minc")
    check_backend(backend)
    checks.pair_of_matrices("u", u, "v", v, same_rows=True)
    at_least(1, u, "minc")
    _check_statistic(statistic, u)
    targets = [u if target_u is None else target_u, v if target_v is None else target_v]
    for name, target in zip(("target_u", "target_v"), targets, strict=True):
        checks.pair_of_matrices("u", u, name, target, same_rows=True)
    u, v, *targets = (_bounded(x, normalize, mu) for x in (u, v, *targets))
    loss = []
    for z, partner in ((u, targets[1]), (v, targets[0])):
        loss.append(row_dot(z, deflated(z.detach(), statistic, gha) - partner.detach()))
    return reduced(loss[0] + loss[1], reduction, "minc")


def _bounded(x: Tensor, normalize: bool, mu: float | Tensor | None) -> Tensor:
    """Rows normalised and clipped, as asked."""
    x = normalize_rows(x) if normalize else x
    return x if mu is None else clip_norms(x, checks.scalar("mu", mu, x).sqrt())


def deflated(z: Tensor, statistic: Tensor, gha: bool) -> Tensor:
    """(n, d) T z of each row, in the accumulation dtype whatever autocast says."""
    dtype = accumulation_dtype(z.dtype)
    t = statistic.detach().to(dtype)
    t = (t.tril() if gha else t).T
    return narrow_product(z, t) if on_tensor_cores(z) else product(z.to(dtype), t)


class Moment(NamedTuple):
    """Of a batch of two views: (d, d) the mean of z z^T over the rows of both, and the mean of <u_i, v_i>."""

    moment: Tensor
    aligned: Tensor


@over_ranks
def second_moment(
    u: Tensor,
    v: Tensor,
    target_u: Tensor | None = None,
    target_v: Tensor | None = None,
    *,
    width: int,
    training: bool = True,
    normalize: bool = False,
    mu: Positive | None = None,
    group: Group | None = None,
) -> Moment:
    """What MINC's statistic averages, in the accumulation dtype, of the rows of all ranks of the group.

    `training` says whether it will: the statistic of a rank that does otherwise than the others is no longer theirs.

    A rank may have no rows. Rows of another width than the statistic's are an error on every rank; targets, which it does not take
    in, are checked, so that a call that will fail moves no statistic.
    """
    for name, rows in (("v", v), ("target_u", target_u), ("target_v", target_v)):
        if name == "v" or rows is not None:
            checks.pair_of_matrices("u", u, name, rows, same_rows=True)
    if u.shape[1] != width:
        raise ValueError(f"u: expected rows of the statistic's width, d = {width}, got d = {u.shape[1]}")
    at_least(1, u, "minc")
    u, v = _bounded(u, normalize, mu), _bounded(v, normalize, mu)
    z, n = stacked(u, v).to(accumulation_dtype(u.dtype)), batch.count(u)
    return Moment(batch.summed(product(z.T, z)) / (2 * n), batch.total(row_dot(u, v)) / n)


def _check_statistic(statistic: Tensor, u: Tensor) -> None:
    checks.matrix("statistic", statistic)
    d = u.shape[1]
    if statistic.shape != (d, d):
        raise ValueError(
            f"statistic: expected shape ({d}, {d}), the second moment of rows, got {tuple(statistic.shape)}"
        )
    if statistic.device != u.device:
        raise ValueError(f"statistic: expected the device of u, {u.device}, got {statistic.device}; move it")
