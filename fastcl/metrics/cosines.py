"""The distribution of cosines against that of uniform directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..equation import checks
from ..equation.arguments import declared, integer
from ..precision import full_precision
from ..progress import bar
from .sweep import all_finite, at_least, triangle_tiles, unit_rows


@declared
def wasserstein_uniformity(x: Tensor, *, bins: int = 1 << 16, progress: bool = False) -> float:
    """How far the cosines of all pairs are from those of uniformly distributed directions.

        W_1 = int_{-1}^{1} |F(c) - F_d(c)| dc

    F is the distribution of <x_i, x_j>, i < j, of unit rows; F_d that of two independent uniform directions, (1 + c) / 2
    being Beta((d - 1) / 2, (d - 1) / 2). F is read off a histogram, exact at its edges and linear between them, so that the
    result is within 1.001 / bins of the exact distance (1.5e-5 by default), besides the rounding of the cosines themselves.
    Source: the metric of Koromilas et al. 2024 (arXiv 2405.18045), with the closed form for their random draws.

    Args:
        x: (n, d) floating, n >= 2, d >= 2.
        bins: of the histogram, 2 to 2^20.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        A number >= 0.

    Raises:
        ValueError: for shapes or values that do not fit.
        TypeError: for unsupported dtypes.
        ImportError: for progress without tqdm.

    Examples:
        >>> collapsed, spread = torch.ones(8, 4), torch.cat([torch.eye(4), -torch.eye(4)])
        >>> fastcl.metrics.wasserstein_uniformity(collapsed) > fastcl.metrics.wasserstein_uniformity(spread)
        True
    """
    n, d = at_least(2, checks.matrix("x", x)), x.shape[1]
    if d < 2:
        raise ValueError(
            f"x: expected at least 2 columns, got {d}: on a line there is no uniform distribution of directions"
        )
    integer("bins", bins, least=2, most=1 << 20)
    x = unit_rows(x)
    if not all_finite(x):
        return math.nan
    reach = 1.001  # rounding may carry a cosine past 1
    count = torch.zeros(bins, dtype=torch.int64, device=x.device)
    # Cosines come out of the product as bin numbers: middle + c bins / (2 reach).
    middle, per_cosine = x.new_full((1, 1), 0.5 * bins), 0.5 * bins / reach
    with (
        torch.no_grad(),
        full_precision(x.device),
        bar("wasserstein uniformity", n * (n - 1) // 2, "pair", progress) as shown,
    ):
        for a, b in triangle_tiles(n):
            index = torch.addmm(middle, x[a], x[b].T, alpha=per_cosine).to(torch.int32)
            # The tile on the diagonal holds each of its pairs twice, and each row with itself.
            own = index.flatten() if a != b else index[_upper(index.shape[0], x.device)]
            count += torch.bincount(own, minlength=bins)
            shown.update(own.shape[0])
    edges = torch.linspace(-reach, reach, bins + 1, dtype=torch.float64, device="cpu")
    distribution = torch.cat([edges.new_zeros(1), count.cpu().cumsum(0)]) / (n * (n - 1) // 2)
    return _absolute_area(distribution - _uniform_cosine_cdf(edges, d), 2.0 * reach / bins)


def _upper(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places i < j of a square tile."""
    i, j = torch.triu_indices(n, n, offset=1, device=device)
    return i, j


def _uniform_cosine_cdf(c: Tensor, d: int) -> Tensor:
    """P(<x, y> <= c) for independent uniform directions in d dimensions: an integral of a power of the sine.

    J_m(theta) = int_0^theta sin^m = ((m - 1) J_{m-2}(theta) - cos theta sin^{m-1} theta) / m,  F(c) = 1 - J(arccos c) / J(pi)
    with m = d - 2. Going up divides errors, as it does J itself: the result is right to some 1e-15.
    """
    theta = torch.arccos(c.clamp(-1.0, 1.0))
    sine, cosine = theta.sin(), theta.cos()
    m = d % 2
    integral, whole = (theta, math.pi) if m == 0 else (1.0 - cosine, 2.0)
    power = sine.clone() if m == 0 else sine.square()
    while m < d - 2:
        m += 2
        integral, whole = ((m - 1) * integral - cosine * power) / m, (m - 1) * whole / m
        power = power * sine.square()
    return 1.0 - integral / whole


def _absolute_area(difference: Tensor, width: float) -> float:
    """The integral of |f|, f given at equidistant points and linear between them."""
    left, right = difference[:-1], difference[1:]
    ends = left.abs() + right.abs()
    crossing = left * right < 0
    area = torch.where(crossing, (left.square() + right.square()) / torch.where(crossing, ends, 1.0), ends)
    return float(0.5 * width * area.sum())
