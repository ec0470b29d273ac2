"""f-mutual information by an alpha-divergence: powers of similarities, of any order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import batch, transforms
from ..backends.sides import is_known
from ..distributed import Group, over_ranks
from ..equation.arguments import PositiveReal
from ..equation.intrinsics import expm1
from ..equation.names import Backend, Reduction
from ..equation.pairs import Log, Power
from ..equation.problem import accumulation_dtype
from .energy import Pairs, Potential
from .matching import row_dot
from .reduction import at_least, check_reduction, reduced
from .rows import own_pairs_left_out, plain_number, views

LEAST_ORDER = 1e-8  # but 0: (s^a - 1) / a is then as near to log s as its own rounding in float64
LARGEST_LOG = 960.0  # of a power of eps, to base 2: float64 ends at 1024, and sums over pairs need some of that


@over_ranks
def f_mi_alpha(
    u: Tensor,
    v: Tensor,
    *,
    alpha: float = 2.0,
    eps: PositiveReal = 1e-3,
    groups: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """f-mutual information by an alpha-divergence, with s = <u, v> as the estimated density ratio.

        L = -mean_i (s_ii^{a-1} - 1) / (a - 1) + mean_{i != j} (s_ij^a - 1) / a,   s clamped at eps
        a = 1:  -mean_i log s_ii + mean s_ij - 1        a = 0:  mean_i 1 / s_ii - 1 + mean log s_ij

    a = 2 is spectral / 2 + 1 / 2 (without its clipping) as long as no s is below eps. Orders above 2, and those at which powers of
    eps are large, are worked out in float64. A value beyond the range of its dtype is infinite, never NaN, with its sign.

    Source: arXiv 2504.16667 as far as it is public; the conjugates f*(f'(s)) = s f'(s) - f(s) are derived.

    Args:
        u: (n, d) floating, n >= 2, the first views.
        v: (n, d), dtype of u, the second views.
        alpha: the order a of the divergence, a number; 2 is Pearson's, 1 KL, 0 reverse KL.
        eps: the least s, > 0, a number; below it the gradient is 0. Each value of either makes a graph of torch.compile.
        groups: (n,) int64, one group per row: pairs of equal groups are no negatives.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values: the row's own terms, its energy being its row sum over
            n - 1, with groups over the mean number of pairs of a row).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes or values that do not fit, an order at which a power of eps leaves float64, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> u = torch.eye(4)
        >>> round(float(fastcl.functional.f_mi_alpha(u, u, alpha=2.0)), 4)
        -0.5
    """
    check_reduction(reduction)
    a, eps = plain_number("alpha", alpha), plain_number("eps", eps, positive=True)
    wide = _wide(a, eps)
    u, v = views(u, v, normalize, ("u", "v"))
    at_least(2, u, "f_mi_alpha")
    dtype = accumulation_dtype(u.dtype)
    u, v = (x.to(torch.float64) if wide else x for x in (u, v))
    u, v, shrunk, factor = _within_range(u, v, a)
    # L = factor * [ mean s^a / a - shrunk mean s^{a-1} / (a-1) ] + constants, s of the rows as they now are.
    s = row_dot(u, v)
    s = torch.where(s < eps * shrunk, eps * shrunk, s)
    pairs = Pairs(u, v, own_pairs_left_out(groups, u), reduction=reduction, backend=backend)
    if a == 0.0:
        energy = pairs.energy(Potential(Log(eps)))
    else:
        energy = pairs.energy(Potential(Power(a, eps), 1.0 / a)) - pairs.energy(Potential(constant=1.0 / a)) / factor
    if abs(a - 1.0) < 0.5:  # near 1 the difference of powers would keep few digits
        critic = s.log() if a == 1.0 else shrunk ** (a - 1.0) * expm1((a - 1.0) * (s / shrunk).log()) / (a - 1.0)
    else:
        critic = (s ** (a - 1.0) - shrunk ** (a - 1.0)) / (a - 1.0)
    grow = torch.mul if transforms.active() else _Grown.apply
    value: Tensor = grow(energy - reduced(shrunk * critic, reduction, "f_mi_alpha"), factor)
    return value.to(dtype)


def _wide(a: float, eps: float) -> bool:
    """Whether the powers need float64; an error where that is not enough."""
    log = max(a * math.log2(eps), (a - 2.0) * math.log2(eps))  # of the largest clamped power, and of the largest slope
    if log > LARGEST_LOG:
        raise ValueError(
            f"alpha: expected an order at which eps ** alpha and eps ** (alpha - 2) stay within float64, got alpha = {a:g} with "
            f"eps = {eps:g}; bring eps nearer to 1"
        )
    if 0.0 < abs(a) < LEAST_ORDER:
        raise ValueError(
            f"alpha: expected 0 or an order at least {LEAST_ORDER:g} from it, got {a:g}: (s^alpha - 1) / alpha has no digits left; "
            "pass alpha=0.0"
        )
    return a > 2.0 or log > 100.0 or 0.0 < abs(a) < 0.1


def _within_range(u: Tensor, v: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows such that a sum of s^a over all pairs stays within their dtype, 1 / sigma and sigma^a where s becomes s / sigma.

    Where it stays by itself sigma is 1 and the rows are as they were. Otherwise they are float64, where their lengths may be
    looked at, and where they may not, or float64 does not hold the sum, sigma is the least power of 2 that does (for the longest
    rows at an angle of 0), and the clamp of negatives stands at sigma eps: nothing that a sum near the largest number of its
    dtype could tell from eps. (Of long rows at right angles or opposed, whose sum is small, it tells.)
    """
    dtype = accumulation_dtype(u.dtype)
    one = torch.ones((), dtype=dtype, device=u.device)
    if a <= 1.0:
        return u, v, one, one
    n = torch.full((), batch.count(u), dtype=torch.float64, device=u.device)
    largest = (math.log2(torch.finfo(dtype).max) - 4.0 - 2.0 * n.log2()) / a  # s, as a logarithm to base 2
    lengths = [batch.largest(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)).log2() for x in (u, v)]
    excess = lengths[0] + lengths[1] - largest
    beyond = (excess > 0) & excess.isfinite()
    if is_known(beyond) and not beyond:  # a copy of either view would be kept to the backward
        return u, v, one, one
    if dtype == torch.float32 and is_known(beyond):
        return _within_range(u.to(torch.float64), v.to(torch.float64), a)
    by = [torch.where(beyond, (length - 0.5 * largest).ceil(), 0.0) for length in lengths]
    most = torch.finfo(dtype).max
    factor = torch.exp2(a * (by[0] + by[1])).clamp(max=most).to(dtype)
    small = [torch.exp2(-k).to(x.dtype) for x, k in zip((u, v), by, strict=True)]
    if transforms.active():
        u, v = u * small[0], v * small[1]
    else:
        large = [
            torch.exp2(a * (by[0] + by[1]) - k).clamp(max=most).to(x.dtype) for x, k in zip((u, v), by, strict=True)
        ]
        u, v = _Shrunk.apply(u, small[0], large[0]), _Shrunk.apply(v, small[1], large[1])
    return u, v, torch.exp2(-by[0] - by[1]).to(dtype), factor


class _Shrunk(torch.autograd.Function):
    """Rows times a factor, of which the gradient takes another: that of a value which _Grown multiplies later.

    A gradient meets its factor last, when what may cancel has cancelled: no infinity meets another.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, backward: Tensor) -> Tensor:
        ctx.save_for_backward(backward)
        return x * factor

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0] * ctx.saved_tensors[0], None, None


class _Grown(torch.autograd.Function):
    """A value times a factor that its gradient has elsewhere."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
        return value * factor

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None
