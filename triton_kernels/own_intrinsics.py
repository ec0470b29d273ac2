"""Intrinsics for pair functions of a user's own, in place of those of intrinsics.py whose domain is narrower than PyTorch's."""

import triton
import triton.language as tl


@triton.jit
def pow(z, exponent):
    """z^exponent; of a negative z where the exponent is whole, with its sign where that is odd."""
    p = tl.zeros_like(z) + exponent
    power = tl.where(p == 0.0, 1.0, tl.exp2(p * tl.log2(tl.abs(z))))
    odd = tl.floor(0.5 * p) != 0.5 * p
    of_negative = tl.where(tl.floor(p) == p, tl.where(odd, -power, power), float("nan"))
    return tl.where(z < 0.0, of_negative, power)
