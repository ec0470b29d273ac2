"""Matrix products of a tile: into place, added in place, in the dtype of their result whatever that of their operands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import on_tensor_cores

MIRRORED = 512  # rows at once


def _widened(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The operands of a product in the dtype of its result, wider (exactly) where 16-bit ones are not multiplied into that."""
    return (a, b) if on_tensor_cores(a) else (a.to(dtype), b.to(dtype))


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b in the dtype of out."""
    a, b = _widened(a, b, out.dtype)
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def mirror_(square: Tensor) -> None:
    """Below the diagonal what is above it: products of rows with themselves may round the two orders of a pair to either side of
    a limit, and each order's reductions are taken off both."""
    for i in range(0, square.shape[0], MIRRORED):
        here = slice(i, i + MIRRORED)
        square[here, :i] = square[:i, here].T
        square[here, here] = square[here, here].triu() + square[here, here].triu(1).T


def add_product(out: Tensor, a: Tensor, b: Tensor, unit: Tensor | None = None) -> None:
    """out += unit a b in the dtype of out, unit being one number, or None for 1."""
    a, b = _widened(a, b, out.dtype)
    if unit is not None:
        part = torch.empty_like(out)
        product(a, b, part)
        out.addcmul_(part, unit)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        # addmm takes no 16-bit operands beside a float32 sum; baddbmm, which adds in place where out is its summand, does.
        sum_ = out[None]
        torch.baddbmm(sum_, a[None], b[None], out_dtype=out.dtype, out=sum_)
