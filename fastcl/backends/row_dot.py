"""<x_i, y_i>, row by row: in one pass by csrc/cpu/rows.cpp where it serves, where torch writes x * y and reads it again."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from ..precision import full_precision
from . import extension


def in_one_pass(*rows: Tensor) -> bool:
    """Whether fastcl::cpu_row_dot serves these rows: float32 in memory, and nothing is being traced or transformed.

    float64 stays with torch, so that the definition in it is torch's alone.
    """
    return (
        extension.library is not None
        and transforms.values_are_here()
        and all(type(x) is Tensor or isinstance(x, torch.nn.Parameter) for x in rows)
        and all(x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2 for x in rows)
        and all(x.stride(1) == 1 and x.shape == rows[0].shape for x in rows)
    )


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """(n,) of two (n, d), without a gradient of its own."""
    if in_one_pass(x, y):
        product: Tensor = torch.ops.fastcl.cpu_row_dot(x, y)
        return product
    with full_precision(x.device):
        return torch.linalg.vecdot(x, y)
