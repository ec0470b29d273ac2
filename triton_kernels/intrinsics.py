"""The named intrinsics that pair functions are written in, for Triton; their meaning is that of fastcl/equation/intrinsics.py.

Every body is plain arithmetic that Triton's interpreter runs too: no inline assembly, no libdevice.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(z):
    return tl.exp2(z * LOG2E)


@triton.jit
def log(z):
    return tl.log2(z) * LN2


@triton.jit
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1, right to 1.5e-7 of itself, where log(1 + e) in float32 loses every digit of a small e.

    A Chebyshev fit of degree 9 to log(1 + e) / e: ten multiply-adds, where lg2.approx is off by 1e-7 absolutely and
    tl.log takes twenty instructions.
    """
    p = -0.00317605701
    p = p * e + 0.0195425272
    p = p * e - 0.0563736128
    p = p * e + 0.105436238
    p = p * e - 0.152696671
    p = p * e + 0.196632743
    p = p * e - 0.249516163
    p = p * e + 0.333297105
    p = p * e - 0.499998926
    p = p * e + 0.999999995
    return p * e


@triton.jit
def log1p(z):
    """Where 1 + z rounds, log(1 + z) z / ((1 + z) - 1) takes the rounding out again (Goldberg, theorem 4)."""
    one_z = 1.0 + z
    rounded = one_z - 1.0
    exact = rounded == 0.0
    corrected = log(one_z) * (z / tl.where(exact, 1.0, rounded))
    return tl.where(exact, z, tl.where(one_z == float("inf"), one_z, corrected))


@triton.jit
def sigmoid(z):
    e = exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e * inverse, inverse)


@triton.jit
def softplus(z):
    return maximum(z, 0.0) + log1p_unit(exp(-tl.abs(z)))


@triton.jit
def rsqrt(z):
    return tl.rsqrt(z)


@triton.jit
def pow(z, exponent):
    """z^exponent for z >= 0."""
    return tl.exp2(exponent * tl.log2(z))


@triton.jit
def maximum(z, bound):
    return tl.maximum(z, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(z, bound):
    return tl.minimum(z, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def select_less(a, b, when_less, otherwise):
    return tl.where(a < b, when_less, otherwise)
