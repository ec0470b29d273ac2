"""How rows spread: alignment, uniformity, the energy of the negatives; all of them losses elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..equation import checks
from ..equation.arguments import Positive, declared
from ..equation.masks import off_diagonal
from ..equation.names import Backend
from ..equation.problem import accumulation_dtype
from ..equation.reductions import merge
from ..functional.rows import widest
from ..functional.uniformity import power_of_distance
from ..ops import pair_reduce, pair_total
from ..precision import full_precision
from ..progress import bar
from .sweep import at_least, blocks, detached, pairs_of_block, positive, ranges


@declared
def alignment(x: Tensor, y: Tensor, *, alpha: Positive = 2.0, normalize: bool = True) -> float:
    """The mean distance of positives.

        mean_i |x_i - y_i|^alpha

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.2.

    Args:
        x: (n, d) floating, n >= 1.
        y: (n, d), dtype of x.
        alpha: the exponent, > 0.
        normalize: whether to scale rows to unit length first.

    Returns:
        A number >= 0.

    Raises:
        ValueError: for shapes or values that do not fit, or no rows.
        TypeError: for unsupported or mixed dtypes.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> fastcl.metrics.alignment(x, x)
        0.0
    """
    checks.pair_of_matrices("x", x, "y", y, same_rows=True)
    alpha = positive("alpha", alpha)
    at_least(1, x)
    x, y = (detached(widest(rows), normalize) for rows in (x, y))  # unit rows in a half dtype would end what is near 0
    with torch.no_grad():
        return float(power_of_distance(x, y, alpha).mean())


@declared
def uniformity(
    x: Tensor, *, t: Positive = 2.0, normalize: bool = True, progress: bool = False, backend: Backend | None = None
) -> float:
    """The logarithm of the mean Gaussian potential of all pairs.

        log mean_{i < j} exp(-t |x_i - x_j|^2)

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.2.

    Args:
        x: (n, d) floating, n >= 2.
        t: the inverse width, > 0.
        normalize: whether to scale rows to unit length first.
        progress: whether to show a progress bar (needs tqdm).
        backend: see fastcl.pair_reduce.

    Returns:
        A number <= 0.

    Raises:
        ValueError: for shapes or values that do not fit, or fewer than 2 rows.
        TypeError: for unsupported dtypes.
        ImportError: for progress without tqdm.

    Examples:
        >>> round(fastcl.metrics.uniformity(torch.eye(4)), 4)
        -4.0
    """
    n, t = at_least(2, checks.matrix("x", x)), positive("t", t)
    x = detached(x, normalize)
    total = x.new_full((), -math.inf, dtype=torch.float64)
    arguments: dict[str, Any] = {"outer": "pooled", "operand": "sqdist", "scale": -t, "backend": backend}
    with torch.no_grad(), full_precision(x.device), bar("uniformity", n * (n - 1) // 2, "pair", progress) as shown:
        for own, later in blocks(x):
            twice = pair_total(own, mask="off_diagonal", **arguments).double()
            total = merge(total, twice - math.log(2.0))
            if later.shape[0]:
                total = merge(total, pair_total(own, later, **arguments).double())
            shown.update(pairs_of_block(own, later))
    return min(float(total) - math.log(n * (n - 1) / 2), 0.0)  # equal rows round to either side


@declared
def mean_log_sum_exp(
    x: Tensor,
    y: Tensor | None = None,
    *,
    temperature: Positive = 0.07,
    normalize: bool = True,
    progress: bool = False,
    backend: Backend | None = None,
) -> float:
    """The energy of the negatives, as it stands in the InfoNCE losses.

        mean_i LSE_{j != i} <x_i, y_j> / tau

    Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4; with y=None Koromilas et al. 2024 (arXiv 2405.18045), DHEL.

    Args:
        x: (n, d) floating.
        y: (m, d), m >= n, dtype of x; y_i, the positive of x_i, is left out. None for x itself.
        temperature: tau > 0.
        normalize: whether to scale rows to unit length first.
        progress: whether to show a progress bar (needs tqdm).
        backend: see fastcl.pair_reduce.

    Returns:
        A number.

    Raises:
        ValueError: for shapes or values that do not fit, or rows without a negative.
        TypeError: for unsupported or mixed dtypes.
        ImportError: for progress without tqdm.

    Examples:
        >>> round(fastcl.metrics.mean_log_sum_exp(torch.eye(4), temperature=0.5), 4)
        1.0986
    """
    n, y_rows = at_least(1, checks.matrix("x", x)), x
    if y is not None:
        checks.pair_of_matrices("x", x, "y", y)
        y_rows = detached(y, normalize)
    m = y_rows.shape[0]
    if m < max(n, 2):
        raise ValueError(f"expected at least {max(n, 2)} rows to compare with, got {m}; y_i is the positive of x_i")
    way: dict[str, Any] = {"scale": 1.0 / positive("temperature", temperature), "backend": backend}
    x = detached(x, normalize)
    pairs = n * m if y is not None else n * (n - 1) // 2
    with torch.no_grad(), full_precision(x.device), bar("mean log-sum-exp", pairs, "pair", progress) as shown:
        r = _own_log_sum_exp(x, way, shown) if y is None else _log_sum_exp(x, y_rows, way, shown)
    return float(r.double().mean())


def _log_sum_exp(x: Tensor, y: Tensor, way: dict[str, Any], shown: Any) -> Tensor:
    """LSE_{j != i} of x against y, block by block."""
    parts = []
    for start, stop in ranges(x.shape[0]):
        parts.append(_reduced(x[start:stop], y, mask=off_diagonal(row_offset=start), **way))
        shown.update((stop - start) * y.shape[0])
    return torch.cat(parts)


def _own_log_sum_exp(x: Tensor, way: dict[str, Any], shown: Any) -> Tensor:
    """LSE_{j != i}, each pair of different blocks formed once: a block's columns are later blocks' rows."""
    r = x.new_full((x.shape[0],), -math.inf, dtype=accumulation_dtype(x.dtype))
    start = 0
    for own, later in blocks(x):
        stop = start + own.shape[0]
        r[start:stop] = merge(r[start:stop], _reduced(own, None, mask="off_diagonal", **way))
        if later.shape[0]:
            across, down = pair_reduce(own, later, columns=True, **way)
            r[start:stop] = merge(r[start:stop], across)
            r[stop:] = merge(r[stop:], down)
        shown.update(pairs_of_block(own, later))
        start = stop
    return r


def _reduced(x: Tensor, y: Tensor | None, **way: Any) -> Tensor:
    r = pair_reduce(x, y, **way)
    return r
