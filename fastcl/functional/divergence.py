"""f-MICL: mutual information by any f-divergence, with the f-Gaussian or the cosine similarity (Lu et al. 2023).

    L = -mean_i f'(u_ii) + alpha mean_{i != j} psi(u_ij),   psi = f* o f',   u = mu exp(-beta |x - y|^2)

With the Gaussian all is written in l = log u = log mu - beta |x - y|^2, so that no u underflows, and psi becomes
terms  c * F(p l + q)  of one pair function F each, plus  c1 * l + c0  in closed form. With the cosine the critic is
s = <x, y> itself, and f*(s) is written in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, get_args, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.arguments import Positive, PositiveReal
from ..equation.divergence import LEAST, Divergence
from ..equation.intrinsics import expm1, softplus
from ..equation.names import Backend, DivergenceName, Negatives, Operand, Reduction, Similarity
from ..equation.pairs import LOG_2, CosineJS, Exp, Power, SigmoidSquared, Softplus, Square
from ..equation.problem import accumulation_dtype
from .aligned import aligned_views
from .at_once import Whole, at_once
from .energy import Pairs, Potential
from .reduction import at_least, check_reduction, reduced
from .rows import logarithm, own_pairs_left_out, times
from .uniformity import log_mean_gaussian

ITSELF = Potential(linear=1.0)
EPS = 1e-6  # how near to the edge of a conjugate's domain a cosine may come

DIVERGENCES = get_args(DivergenceName)
# The critic grows as e^{-rate l}; that of Tsallis at 1 - q.
RATES = {"sh": 0.5, "rkl": 1.0, "neyman": 2.0, "jeffrey": 1.0}


@dataclass(frozen=True)
class Critic(Potential):
    """A potential that is 0 at 0, where its constant leaves no digit of it; `exact` is the same function, which keeps them."""

    exact: Callable[[Tensor], Tensor] = torch.Tensor.clone

    def __call__(self, v: Tensor) -> Tensor:
        return self.exact(v)


def _of_js(l: Tensor) -> Tensor:
    """log 2 - log(1 + e^-l) = -log(1 + (e^-l - 1) / 2)"""
    near = -torch.log1p(0.5 * torch.expm1(-l.clamp(-1.0, 1.0)))
    return torch.where(l.abs() < 1.0, near, LOG_2 - softplus(-l))


def _of_vlc(l: Tensor) -> Tensor:
    """1 - 4 sigmoid(-l)^2 = (1 - 2 sigmoid(-l)) (1 + 2 sigmoid(-l)); far from 0 in the small sigmoid, whose slope has digits."""
    near = l.clamp(-1.0, 1.0)
    near = torch.tanh(0.5 * near) * (1.0 + 2.0 * torch.sigmoid(-near))
    below, above = torch.sigmoid(l.clamp(max=-1.0)), torch.sigmoid(-l.clamp(min=1.0))
    far = torch.where(l < 0.0, 4.0 * below * (2.0 - below) - 3.0, 1.0 - 4.0 * above * above)
    return torch.where(l.abs() < 1.0, near, far)


class Composition(NamedTuple):
    """The critic of the positives and the potential of the negatives of a similarity, as functions of v = l or s."""

    critic: Callable[[Tensor], Tensor]
    psi: Potential


class FMICLTerms(NamedTuple):
    """The loss and its two parts: loss = -positive + alpha * negative, each exact where alpha drowns the sum in float32."""

    loss: Tensor
    positive: Tensor
    negative: Tensor


def gaussian_divergence(name: str | Divergence, q: float | None) -> Composition:
    """The divergence in l = log u (fmicl table, derived: VLC is the composition of the paper's own f* and f')."""
    if isinstance(name, Divergence):
        return Composition(name.critic, Potential(name.pair))
    if name == "tsallis":
        assert q is not None
        ratio = q / (q - 1.0)
        return Composition(Potential(Exp(), ratio, slope=q - 1.0), Potential(Exp(), slope=q))
    table = {
        "kl": Composition(Potential(linear=1.0, constant=1.0), Potential(Exp())),
        "js": Composition(
            Critic(Softplus(), -1.0, slope=-1.0, constant=LOG_2, exact=_of_js), Potential(Softplus(), constant=-LOG_2)
        ),
        "pearson": Composition(lambda l: 2.0 * expm1(l), Potential(Exp(), slope=2.0, constant=-1.0)),
        "sh": Composition(lambda l: -expm1(-0.5 * l), Potential(Exp(), slope=0.5, constant=-1.0)),
        "vlc": Composition(
            Critic(SigmoidSquared(), -4.0, slope=-1.0, constant=1.0, exact=_of_vlc),
            Potential(SigmoidSquared(), 4.0, constant=-1.0),
        ),
        "rkl": Composition(Potential(Exp(), -1.0, slope=-1.0), Potential(linear=1.0, constant=-1.0)),
        "neyman": Composition(lambda l: -expm1(-2.0 * l), Potential(Exp(), -2.0, slope=-1.0, constant=2.0)),
        "jeffrey": Composition(lambda l: l - expm1(-l), Potential(Exp(), linear=1.0, constant=-1.0)),
    }
    return table[name]


def cosine_divergence(name: str | Divergence, q: float | None) -> Composition:
    """f*(s) for s = <x, y>, clamped EPS inside its domain; the critic is s itself."""
    if isinstance(name, Divergence):
        if name.of_cosine is None:
            raise ValueError(
                f"divergence: {name.name!r} has no conjugate, which similarity='cosine' needs; pass conjugate= to fastcl.Divergence"
            )
        return Composition(ITSELF, Potential(name.of_cosine))
    if name in ("jeffrey", "rkl") or (name == "tsallis" and q is not None and q < 1.0):
        why = "has no closed conjugate" if name == "jeffrey" else "has a conjugate that is infinite for s >= 0"
        raise ValueError(
            f"divergence: {name!r} {why}; use similarity='gaussian'" + (" or q > 1" if name == "tsallis" else "")
        )
    if name == "tsallis":
        assert q is not None
        return Composition(ITSELF, Potential(Power(q / (q - 1.0), EPS), slope=(q - 1.0) / q))
    table = {
        "kl": Composition(ITSELF, Potential(Exp(), offset=-1.0)),
        "js": Composition(ITSELF, Potential(CosineJS(EPS))),
        "pearson": Composition(ITSELF, Potential(Square(), slope=0.5, offset=1.0, constant=-1.0)),
        "sh": Composition(ITSELF, Potential(Power(-1.0, EPS), slope=-1.0, offset=1.0, constant=-1.0)),
        "vlc": Composition(ITSELF, Potential(Power(0.5, EPS), -4.0, -1.0, 1.0, linear=-1.0, constant=4.0)),
        "neyman": Composition(ITSELF, Potential(Power(0.5, EPS), -2.0, -1.0, 1.0, constant=2.0)),
    }
    return table[name]


class _Options(TypedDict, total=False):
    """For type checkers: what f_micl takes beside rows and return_terms."""

    divergence: DivergenceName | Divergence
    similarity: Similarity
    beta: float | Tensor
    mu: float | Tensor
    alpha: float | Tensor
    negatives: Negatives
    q: float | None
    groups: Tensor | None
    normalize: bool
    reduction: Reduction
    backend: Backend | None
    group: Group | None


@overload
def f_micl(x: Tensor, y: Tensor, *, return_terms: Literal[False] = False, **options: Unpack[_Options]) -> Tensor: ...
@overload
def f_micl(x: Tensor, y: Tensor, *, return_terms: Literal[True], **options: Unpack[_Options]) -> FMICLTerms: ...
@overload
def f_micl(x: Tensor, y: Tensor, *, return_terms: bool, **options: Unpack[_Options]) -> Tensor | FMICLTerms: ...
@over_ranks
def f_micl(
    x: Tensor,
    y: Tensor,
    *,
    divergence: DivergenceName | Divergence = "kl",
    similarity: Similarity = "gaussian",
    beta: Positive = 1.0,
    mu: Positive = 1.0,
    alpha: float | Tensor = 40.0,
    negatives: Negatives = "xx",
    q: PositiveReal | None = None,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    return_terms: bool = False,
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor | FMICLTerms:
    """f-MICL: a lower bound of the f-mutual information of two views.

        L = -mean_i f'(u_ii) + alpha mean_{i != j} f*(f'(u_ij)),   u = mu exp(-beta |x - y|^2)
        L = -mean_i s_ii + alpha mean_{i != j} f*(s_ij),           s = <x, y>   (similarity="cosine")

    Source: Lu et al. 2023 (arXiv 2402.10150), eq. objective_sample and table 1. The table's composition for VLC is misprinted;
    f* o f' of its own f* and f' is what is computed here. With mu = 1, alpha absorbs the kernel's constant. Divergences that grow
    with 1 / u ("sh", "rkl", "neyman", "jeffrey", "tsallis" with q < 1) are worked out in a wider dtype where that may be large: for
    a large beta, one in a tensor, or rows that are not normalised. A value or gradient beyond the range of its dtype is infinite.

    Args:
        x: (n, d) floating, n >= 2.
        y: (n, d), dtype of x; y_i is the positive of x_i.
        divergence: "kl", "js", "pearson", "sh", "tsallis", "vlc", "rkl", "neyman" or "jeffrey", or a fastcl.Divergence of your own.
            The paper shows that rkl and neyman fail; with similarity="cosine", rkl and jeffrey raise.
        similarity: "gaussian", or "cosine": s is clamped 1e-6 inside the domain of f*, where that has an edge.
        beta: inverse width 1 / (2 sigma^2) > 0 of the Gaussian, a number or a tensor with one element.
        mu: constant > 0 of the Gaussian, a number or a tensor with one element.
        alpha: weight of the negatives, a number or a tensor with one element.
        negatives: "xx" (pairs of x, the paper's), "xx+yy" (mean of both views) or "xy" (across the views).
        q: order of "tsallis", > 0 and not 1 (> 1 for the cosine); for no other divergence.
        groups: (n,) int64, one group per row: pairs of equal groups are no negatives.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values: the row's own terms, its energy being its row sum over
            n - 1, with groups over the mean number of pairs of a row).
        return_terms: whether to return (loss, positive, negative) with loss = -positive + alpha * negative. In float32 a weight
            such as 409600 drowns the positive in the loss's last digits; its gradient is right all the same.
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none", float32 (float64 for float64 input); with return_terms an FMICLTerms of three such.

    Raises:
        ValueError: for shapes, names or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.f_micl(x, x, divergence="kl", alpha=1.0)), 4)  # e^-2 - 1
        -0.8647
        >>> loss, positive, negative = fastcl.functional.f_micl(x, x, divergence="pearson", return_terms=True)
        >>> round(float(negative), 4)
        -0.9817
    """
    check_reduction(reduction)
    if not isinstance(divergence, Divergence):
        checks.one_of("divergence", divergence, DIVERGENCES)
    _check_order(divergence, q)
    checks.number("alpha", alpha)
    gaussian = similarity == "gaussian"
    for name, value in (("beta", beta), ("mu", mu)):
        if not gaussian and (isinstance(value, Tensor) or value != 1.0):
            raise ValueError(
                f"{name}: expected its default 1.0 with similarity='cosine', which has no {name}; leave it out"
            )
    scale, shift = (-checks.positive_number("beta", beta), _log("mu", mu, x)) if gaussian else (1.0, 0.0)
    d = gaussian_divergence(divergence, q) if gaussian else cosine_divergence(divergence, q)
    checks.pair_of_matrices("x", x, "y", y, same_rows=True)
    dtype = accumulation_dtype(x.dtype)
    if gaussian:
        wide = _working_dtype(divergence, q, beta, mu, normalize, x.dtype)
        x, y = (rows.to(torch.promote_types(rows.dtype, wide)) for rows in (x, y))
    operand: Operand = "sqdist" if gaussian else "dot"
    if isinstance(d.critic, Potential) and not isinstance(alpha, Tensor):
        whole = Whole(negatives, operand=operand, negatives=d.psi, positives=d.critic.negated())
        energy = alpha / (max(1, x.shape[0] - 1) * (2 if negatives == "xx+yy" else 1))
        loss = at_once(
            whole, x, y, scale, shift, normalize=normalize, reduction=reduction, backend=backend, energy=energy,
            unless=(groups, return_terms or None),
        )  # fmt: skip
        if loss is not None:
            return loss
    x, y, s = aligned_views(x, y, normalize, operand=operand)
    at_least(2, x, "f_micl")
    v = times(scale, s) + checks.scalar("mu", shift, x)
    pairs = [(x, y)] if negatives == "xy" else [(x, None), (y, None)] if negatives == "xx+yy" else [(x, None)]
    mask = own_pairs_left_out(groups, x)
    energies = [Pairs(a, b, mask, operand, scale, shift, reduction, backend).energy(d.psi) for a, b in pairs]
    negative = energies[0] if len(energies) == 1 else 0.5 * (energies[0] + energies[1])
    positive = reduced(d.critic(v), reduction, "f_micl")
    loss = checks.scalar("alpha", alpha, x) * negative - positive
    return FMICLTerms(loss.to(dtype), positive.to(dtype), negative.to(dtype)) if return_terms else loss.to(dtype)


@over_ranks
def f_micl_dv(
    x: Tensor,
    y: Tensor,
    *,
    beta: Positive = 1.0,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """f-MICL for KL after the Donsker-Varadhan shift: the weight alpha at its optimum for each batch.

        L = mean_i beta |x_i - y_i|^2 + log mean_{i != j} exp(-beta |x_i - x_j|^2)

    Source: Lu et al. 2023 (arXiv 2402.10150), the Donsker-Varadhan objective.

    Args:
        x: (n, d) floating, n >= 2; its pairs are the negatives.
        y: (n, d), dtype of x; y_i is the positive of x_i.
        beta: inverse width > 0 of the Gaussian, a number or a tensor with one element.
        groups: (n,) int64, one group per row: pairs of equal groups are no negatives.
        normalize: whether to scale rows to unit length first.
        reduction: "mean" only: the logarithm has no rows.
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(fastcl.functional.f_micl_dv(x, x, beta=1.0)), 4)
        -2.0
    """
    check_reduction(reduction, has_rows=False, objective="f_micl_dv")
    beta = checks.positive_number("beta", beta)
    x, y, s = aligned_views(x, y, normalize, operand="sqdist")
    at_least(2, x, "f_micl_dv")
    aligned = reduced(times(beta, s), reduction, "f_micl_dv")
    return aligned + log_mean_gaussian(x, beta, groups, backend)


def _working_dtype(
    divergence: str | Divergence,
    q: float | None,
    beta: float | Tensor,
    mu: float | Tensor,
    normalize: bool,
    dtype: torch.dtype,
) -> torch.dtype:
    """A dtype with room above the largest power of 1 / u: float32 up to e^30, float16 none; float64 ends at e^700.

    Unit rows are at most 2 apart. How far others are, and what a tensor holds, is not known here.
    """
    own = isinstance(divergence, Divergence)  # of which u itself is formed, and u^2 f''(u)
    if own:
        dtype = torch.promote_types(dtype, torch.float32)
    rate = 1.0 if own else 1.0 - q if divergence == "tsallis" and q is not None else RATES.get(str(divergence), 0.0)
    if rate <= 0.0:
        return dtype
    if not normalize or isinstance(beta, Tensor) or isinstance(mu, Tensor):
        return torch.float64
    log = rate * (4.0 * beta - math.log(mu))
    if own and log > -LEAST:
        raise ValueError(
            f"beta: expected at most {(math.log(mu) - LEAST) / 4.0:.4g} with {divergence}, got {beta}: beyond, u is no number of "
            "float64; use a narrower Gaussian, or one of f_micl's own divergences"
        )
    if own and mu > 1e3:  # u^4 would leave float32 soon
        return torch.float64
    return torch.float64 if log > 30.0 else torch.promote_types(dtype, torch.float32) if log > 2.0 else dtype


def _check_order(divergence: str | Divergence, q: float | None) -> None:
    if divergence != "tsallis":
        if q is not None:
            raise ValueError(f"q: expected None for divergence={divergence!r}, got {q}; only 'tsallis' has an order")
        return
    if q is None:
        raise ValueError(
            "q: expected the order of 'tsallis', a number > 0 and not 1, got None; pass for instance q=1.5"
        )
    if not (checks.positive_number("q", q) and q != 1.0):
        raise ValueError("q: expected a number > 0 and not 1, got 1.0; its limit is divergence='kl'")


def _log(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    return logarithm(checks.positive_number(name, value), x)
