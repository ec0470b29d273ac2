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
def expm1(z):
    """e^z - 1; between -1/2 and 1/2, where the difference loses digits, z + z^2 p(z), a Chebyshev fit right to 3e-8."""
    p = 1.99448744e-4 * z + 1.3982186e-3
    p = p * z + 8.33323614e-3
    p = p * z + 0.0416657912
    p = p * z + 0.166666668
    p = p * z + 0.500000012
    return tl.where(tl.abs(z) < 0.5, z * z * p + z, exp(z) - 1.0)


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
    """log(1 + z). From -1/2 to 1, where lg2.approx is off by 1e-7 absolutely, 2 atanh(z / (2 + z)).

    With s = z / (2 + z) it is z - s (z - R), R = 2/3 s^2 + 2/5 s^4 + ..., of which a Chebyshev fit is right to 4e-7; a hundredth
    of the result is R's.
    """
    s = z / (2.0 + z)
    square = s * s
    p = 0.26851498 * square + 0.282366198
    p = p * square + 0.400075606
    p = p * square + 0.666666403
    return tl.where(tl.abs(z - 0.25) <= 0.75, z - s * (z - square * p), log(1.0 + z))


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
