"""The numbers of every case: by a formula, so that a failing case is a script of a few lines without a seed."""

import torch
from torch import Tensor


def rows(n: int, d: int, k: int = 0) -> Tensor:
    """(n, d) float64 in [-1, 1), without structure: integers below 2^32, mixed, the same on every machine."""
    t = torch.arange(n * d) + 1000003 * k
    for _ in range(2):
        t = (t ^ (t >> 16)) * 73244475 % 2**32
    return ((t ^ (t >> 16)).double() / 2**31 - 1.0).view(n, d)
