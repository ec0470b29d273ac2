"""How many dimensions rows use: effective rank (RankMe) and the rank of the covariance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..equation import checks
from ..equation.arguments import declared
from ..progress import bar
from .sweep import all_finite, at_least, detached

RANKME_EPS = 1e-7


@declared
def effective_rank(x: Tensor, *, normalize: bool = False, progress: bool = False) -> float:
    """RankMe: the exponential of the entropy of the singular values.

        exp(-sum_k p_k log p_k),   p_k = sigma_k / sum_l sigma_l + 1e-7

    sigma are the singular values of x itself, not centred, from a QR decomposition block by block, in float64.
    Source: Garrido et al. 2023 (arXiv 2210.02885), eq. 1 and 2.

    Args:
        x: (n, d) floating, n >= 1.
        normalize: whether to scale rows to unit length first (the paper does not).
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        A number between 1 and about min(n, d); 0 where all of x is 0.

    Raises:
        ValueError: for shapes that do not fit, or no rows.
        TypeError: for unsupported dtypes.
        ImportError: for progress without tqdm.

    Examples:
        >>> round(fastcl.metrics.effective_rank(torch.eye(4)), 4)
        4.0
    """
    at_least(1, checks.matrix("x", x))
    sigma = _singular_values(detached(x, normalize), None, "effective rank", progress)
    if not all_finite(sigma):
        return math.nan
    largest = sigma.amax() if sigma.numel() else 0.0  # by which the sum of any rows is a number
    if largest == 0.0:
        return 0.0
    share = sigma / largest
    p = share / share.sum() + RANKME_EPS
    return float(torch.exp(-(p * p.log()).sum()))


@declared
def rank(x: Tensor, *, tol: float = 1e-5, normalize: bool = True, progress: bool = False) -> int | float:
    """How many directions the rows vary in: the eigenvalues of their covariance above a threshold.

        #{k : lambda_k > tol},   lambda the eigenvalues of sum_i (x_i - mean)(x_i - mean)^T / (n - 1)

    Source: the metric of Koromilas et al. 2024 (arXiv 2405.18045), whose code takes tol = 1e-5.

    Args:
        x: (n, d) floating, n >= 2.
        tol: the threshold, absolute, >= 0.
        normalize: whether to scale rows to unit length first.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        A number between 0 and min(n - 1, d).

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported dtypes.
        ImportError: for progress without tqdm.

    Examples:
        >>> fastcl.metrics.rank(torch.eye(4))
        3
    """
    n = at_least(2, checks.matrix("x", x))
    if not tol >= 0.0:
        raise ValueError(f"tol: expected a number >= 0, got {tol}")
    x = detached(x, normalize)
    mean = x.mean(0, keepdim=True, dtype=torch.float64)
    sigma = _singular_values(x, mean, "rank", progress)
    if not all_finite(sigma):
        return math.nan
    return min(int((sigma.square() / (n - 1) > tol).sum()), n - 1)  # of long rows what is 0 rounds to more than tol


def _singular_values(x: Tensor, mean: Tensor | None, name: str, progress: bool) -> Tensor:
    """Those of x (minus the mean), in float64, NaN where x is not finite: R of the rows so far takes their place."""
    n, d = x.shape
    r, step = x.new_empty((0, d), dtype=torch.float64), max(4 * d, 1024)
    with torch.no_grad(), bar(name, n, "row", progress) as shown:
        for start in range(0, n, step):
            block = x[start : start + step].double()
            block = block if mean is None else block - mean
            if not all_finite(block):
                return block.new_full((1,), math.nan)
            r = torch.linalg.qr(torch.cat([r, block]), mode="r").R
            shown.update(block.shape[0])
        return torch.linalg.svdvals(r)
