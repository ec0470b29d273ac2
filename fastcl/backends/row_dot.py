"""<x_i, y_i>, row by row: in one pass by csrc/cpu/rows.cpp where it serves, where torch writes x * y and reads it again."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from ..precision import full_precision
from . import extension


def in_one_pass(*rows: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether the passes of csrc/cpu/rows.cpp serve these rows: in memory, and nothing is being traced or transformed.

    float64 stays with torch, so that the definition in it is torch's alone.
    """
    if extension.library is None or not transforms.values_are_here():
        return False
    for x in rows:
        plain = type(x) is Tensor or isinstance(x, torch.nn.Parameter)
        dense = x.layout == torch.strided and not x.is_nested
        if not (plain and dense and x.dtype in dtypes and x.device.type == "cpu" and x.dim() == 2):
            return False
    return True


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """(n,) of two (n, d), without a gradient of its own."""
    if in_one_pass(x, y) and x.shape == y.shape:
        product: Tensor = torch.ops.fastcl.cpu_row_dot(x, y)
        return product
    with full_precision(x.device):
        return torch.linalg.vecdot(x, y)
