"""The Triton backend: the pairwise reduction and its gradients on any GPU that Triton serves.

    z_ij = a u(x_i, y_j) + b + bx_i + by_j        r_i = REDUCE_{j in M(i)} f(z_ij)

Two forms, one answer: strip.py (torch's matrix products in a bounded workspace, Triton epilogues between them; the default)
and fused.py (no workspace beyond O(n + m)). pair_reduce.py picks; README.md here says what was proved, and how.
This module imports without Triton; only its kernels need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .availability import unavailable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..equation.problem import Gradients, Problem, Wanted

__all__ = ["gradients", "rows", "total", "unavailable"]


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r (n,), and c (m,) when p.columns, in the accumulation dtype."""
    from . import pair_reduce

    return pair_reduce.rows(p)


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>."""
    from . import pair_reduce

    return pair_reduce.gradients(p, r, c, g, h, wanted, dtype)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """The value of the total form, its gradients for an upstream gradient of 1, and that of the positives."""
    from . import pair_reduce

    return pair_reduce.total(p, positive, outer, wanted)
