"""The numbers of every case: by a formula, so that a failing case is a script of a few lines without a seed."""

import torch
from torch import Tensor


def rows(n: int, d: int, k: int = 0) -> Tensor:
    """(n, d) float64 in (-1, 1), without structure."""
    return (
        (torch.sin(12.9898 * torch.arange(n * d, dtype=torch.float64) + 78.233 * (k + 1)) * 43758.5453)
        .frac()
        .view(n, d)
    )
