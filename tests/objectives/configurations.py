"""Configurations of unit rows at which objectives have closed-form values."""

from __future__ import annotations

import torch
from torch import Tensor


def simplex(m: int) -> Tensor:
    """The m vertices of the centred regular simplex, (m, m) float64 unit rows: <x_i, x_j> = -1 / (m - 1)."""
    rows = torch.eye(m, dtype=torch.float64) - 1.0 / m
    return rows / rows.norm(dim=1, keepdim=True)


def cross_polytope(d: int) -> Tensor:
    """The 2d rows +e_k, -e_k."""
    return torch.cat([torch.eye(d, dtype=torch.float64), -torch.eye(d, dtype=torch.float64)])


def two_clusters(m: int, d: int) -> Tensor:
    """m rows, half at a pole and half at its antipode: centred, and collapsed."""
    rows = torch.zeros(m, d, dtype=torch.float64)
    rows[:, 0] = 1.0
    rows[m // 2 :, 0] = -1.0
    return rows
