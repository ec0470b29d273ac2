"""Kernel contrastive learning: alignment and energy by one kernel, with no logarithm around them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ..distributed import Group, over_ranks
from ..equation import checks
from ..equation.names import Backend, KernelName, Reduction
from ..equation.pairs import Exp, Log1p, Power, Rsqrt1p
from ..equation.problem import accumulation_dtype
from .aligned import aligned_views
from .energy import Pairs, Potential
from .reduction import at_least, check_reduction, reduced
from .rows import own_pairs_left_out, plain_number, times

KERNELS = get_args(KernelName)
FLOOR = 4.0  # of a Riesz kernel's squared distance, in units of the rounding of a sum of two unit norms


class Kernel(NamedTuple):
    """K_U as a potential of scale |x - y|^2, and K_A as a function of |x - y|^2."""

    energy: Potential
    scale: float | Tensor
    alignment: Callable[[Tensor], Tensor]


@over_ranks
def kcl(
    u: Tensor,
    v: Tensor,
    *,
    kernel: KernelName = "gaussian",
    t: float | Tensor = 2.0,
    gamma: float | Tensor = 16.0,
    groups: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """KCL: kernel contrastive learning, whose expectation does not depend on the batch size.

        L = -2 mean_i K_A(u_i, v_i) + gamma (E(u) + E(v)),   E(x) = mean_{i != j} K_U(x_i, x_j)

        gaussian         K = e^{-t d^2},  d = |x - y|
        log              K_U = -log(1 + t d^2) / 2,  K_A = -log(1 + t d^2)
        imq              K = t / sqrt(t^2 + d^2)
        riesz            K = sign(t) d^{-t}
        gaussian_riesz   K_U = sign(t) d^{-t},  K_A = e^{-2 d^2}

    As in the authors' code: the log kernel's 1/2 stands in the energy alone (so its gamma counts half), and gaussian_riesz
    aligns at t = 2 whatever t is. Riesz kernels clamp d^2 at 4 eps of the accumulation dtype (4.8e-7 in float32), where d^2
    itself is rounded, with gradient 0 below; where powers at that distance leave the rows' dtype, all is worked out in a wider
    one. With kernel="riesz" and t > 0 the alignment -2 d^{-t} is unbounded below (but for the clamp): a warning says so once;
    gaussian_riesz is what is meant.

    Source: Koromilas et al. 2024 (arXiv 2405.18045), and the authors' code for the kernels' constants.

    Args:
        u: (n, d) floating, n >= 2, the first views.
        v: (n, d), dtype of u, the second views.
        kernel: "gaussian", "log", "imq", "riesz" or "gaussian_riesz".
        t: the kernel's parameter, > 0, a number or a tensor with one element; for the Riesz kernels any number but 0,
            of which each value makes a graph of torch.compile.
        gamma: weight of the energies, a number or a tensor with one element.
        groups: (n,) int64, one group per row: pairs of equal groups are left out of the energies.
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none" (n values: the row's own terms, its energies being its row sums over
            n - 1, with groups over the mean number of pairs of a row).
        backend: see fastcl.pair_reduce.
        group: the ranks over which rows are spread, a process group, a dimension of a DeviceMesh or fastcl.Ranks; None for none.

    Returns:
        A scalar, or (n,) for "none"; float32 (float64 for float64 input).

    Raises:
        ValueError: for shapes, names or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported or mixed dtypes, or a tensor where the kernel needs a number.

    Examples:
        >>> u = torch.eye(4)
        >>> round(float(fastcl.functional.kcl(u, u, t=2.0)), 4)
        -1.4139
    """
    check_reduction(reduction)
    k = _kernel(kernel, t, u)
    checks.pair_of_matrices("u", u, "v", v, same_rows=True)
    dtype = accumulation_dtype(u.dtype)
    if "riesz" in kernel:
        wide = _working_dtype(t, u.dtype)
        u, v = (x.to(torch.promote_types(x.dtype, wide)) for x in (u, v))
    u, v, s = aligned_views(u, v, normalize, ("u", "v"), operand="sqdist")
    at_least(2, u, "kcl")
    weight = checks.scalar("gamma", gamma, u)
    mask = own_pairs_left_out(groups, u)
    energies = [
        Pairs(x, None, mask, "sqdist", k.scale, reduction=reduction, backend=backend).energy(k.energy) for x in (u, v)
    ]
    loss = weight * (energies[0] + energies[1]) - 2.0 * reduced(k.alignment(s), reduction, "kcl")
    return loss.to(dtype)


def _kernel(name: str, t: float | Tensor, rows: Tensor) -> Kernel:
    checks.one_of("kernel", name, KERNELS)
    if name in ("riesz", "gaussian_riesz"):
        return _riesz(name, plain_number("t", t), rows)
    t = checks.positive_number("t", t)
    if name == "gaussian":
        return Kernel(Potential(Exp()), -t, lambda d2: torch.exp(times(-t, d2)))
    if name == "log":
        return Kernel(Potential(Log1p(), coefficient=-0.5), t, lambda d2: -torch.log1p(times(t, d2)))
    inverse = checks.number("1 / t^2", (1.0 / t) * (1.0 / t), checks.matrix("u", rows))
    return Kernel(Potential(Rsqrt1p()), inverse, lambda d2: torch.rsqrt(1.0 + times(inverse, d2)))


def _riesz(name: str, t: float, rows: Tensor) -> Kernel:
    if t == 0.0:
        raise ValueError("t: expected a number other than 0 for a Riesz kernel, got 0; its limit is kernel='log'")
    floor = _floor(checks.matrix("u", rows).dtype)
    sign = 1.0 if t > 0 else -1.0
    energy = Potential(Power(-0.5 * t, floor), coefficient=sign)
    if name == "gaussian_riesz":
        return Kernel(energy, 1.0, lambda d2: torch.exp(-2.0 * d2))
    if t > 0 and not torch.compiler.is_compiling():
        _warn_unbounded()
    return Kernel(energy, 1.0, lambda d2: sign * torch.where(d2 < floor, floor, d2) ** (-0.5 * t))


def _floor(dtype: torch.dtype) -> float:
    return FLOOR * torch.finfo(accumulation_dtype(dtype)).eps


def _working_dtype(t: Any, dtype: torch.dtype) -> torch.dtype:
    """A dtype that holds the slope of d^{-t} at the floor, and 2^28 times that."""
    log = (0.5 * t + 1.0) * -math.log2(_floor(dtype)) + 28.0 if isinstance(t, (int, float)) and t > 0 else 0.0
    enough = [wide for wide in (dtype, torch.float32) if log <= math.log2(torch.finfo(wide).max)]
    return torch.promote_types(dtype, enough[0]) if enough else torch.float64


@cache
def _warn_unbounded() -> None:
    warnings.warn(
        "kcl: kernel='riesz' with t > 0 is unbounded below: its alignment -2 d^{-t} goes to -inf as positives meet (clamped at "
        "d^2 = 4 eps); use kernel='gaussian_riesz', or t < 0",
        stacklevel=5,
    )
