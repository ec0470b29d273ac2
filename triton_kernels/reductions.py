"""Reductions on one tile: sum and log-sum-exp, their states, their merge, and the weights of their gradients.

A log-sum-exp is held as (top, sum): e^top * sum, with top some reference near the maximum; nothing is (-inf, 0). Differences
are taken before the change of base: z log2 e - r log2 e would round twice at the size of z, which at |z| = 1000 is 1e-4 of
every weight.
"""

import triton
import triton.language as tl

from .equation import load_side
from .intrinsics import exp, maximum

_NOTHING = tl.constexpr(float("-inf"))
# A row or column whose terms all lie this far under the tile's maximum has lost digits to underflow.
_FAINT_IN_TILE = tl.constexpr(2.0**-100)
# The same for whole rows and columns over one shared reference: what ex2 flushes to zero is under 2^-126 a term, and of
# 2^22 terms that sum to this or more it is under 2^-24.
FAINT = 2.0**-80
# e to this is the last normal float32: visited terms stay above zero, so that a sum of zero says that nothing was visited.
_LEAST = tl.constexpr(-87.0)
# The reference stays this close under the largest z that Cauchy and Schwarz allow: 2^31 terms of e^60 sum to under 2^118.
_ROOM = tl.constexpr(60.0)


@triton.jit
def reference_of(top):
    """top, or 0 where nothing was reduced: -inf minus -inf is NaN."""
    return tl.where(top == _NOTHING, 0.0, top)


@triton.jit
def only_where_present(rho, total):
    """The reference of sums over e^rho: rho, or -inf where nothing was added."""
    return tl.where(total == 0.0, _NOTHING, rho)


@triton.jit
def merge(top_1, sum_1, top_2, sum_2):
    """The log-sum-exp of a union of pairs from those of its two parts."""
    top = tl.maximum(top_1, top_2)
    safe = reference_of(top)
    return top, sum_1 * exp(top_1 - safe) + sum_2 * exp(top_2 - safe)


@triton.jit
def shared_reference(FAR, a, b, SQDIST: tl.constexpr):
    """One reference for every pair, from FAR: the largest norms of x and of y, and the largest bx + by.

    Orthogonal rows lie there, or those that are _ROOM under the largest z that the norms allow. NaN where the norms are so
    large that they say nothing.
    """
    far_x = tl.load(FAR)
    far_y = tl.load(FAR + 1)
    if SQDIST:
        middle = a * (far_x * far_x + far_y * far_y)
        high = tl.maximum(a * (far_x + far_y) * (far_x + far_y), 0.0)
    else:
        middle = 0.0
        high = tl.abs(a) * far_x * far_y
    bias = tl.load(FAR + 2)
    usable = (high - middle < 4.0 * _ROOM) & (tl.abs(b + bias) < 1e6)
    return tl.where(usable, tl.maximum(middle + b, high + b + bias - _ROOM), float("nan"))


@triton.jit
def terms(z, rho, SPARSE: tl.constexpr):
    """e^(z - rho), 0 where masked; SPARSE: masks that may leave a row without a pair."""
    if SPARSE:
        return tl.where(z == _NOTHING, 0.0, exp(maximum(z - rho, _LEAST)))
    else:
        return exp(z - rho)


@triton.jit
def push_rows(top, total, z):
    """A running log-sum-exp of rows with the rows of z: one exponential an element."""
    higher = tl.maximum(top, tl.max(z, 1))
    safe = reference_of(higher)
    return higher, total * exp(top - safe) + tl.sum(exp(z - safe[:, None]), 1)


@triton.jit
def rows_and_columns(z, BM: tl.constexpr, BN: tl.constexpr):
    """The log-sum-exps of the rows and of the columns of z from one exponential an element, relative to the tile's maximum.

    Where a row or a column lies so far under it that this would underflow, the tile is done again with a maximum for each.
    """
    peak = reference_of(tl.max(tl.max(z, 1), 0))
    e = exp(z - peak)
    row_sum = tl.sum(e, 1)
    col_sum = tl.sum(e, 0)
    row_top = tl.zeros((BM,), tl.float32) + peak
    col_top = tl.zeros((BN,), tl.float32) + peak
    if tl.minimum(tl.min(row_sum, 0), tl.min(col_sum, 0)) < _FAINT_IN_TILE:
        row_top = tl.max(z, 1)
        row_sum = tl.sum(exp(z - reference_of(row_top)[:, None]), 1)
        col_top = tl.max(z, 0)
        col_sum = tl.sum(exp(z - reference_of(col_top)[None, :]), 0)
    return row_top, row_sum, col_top, col_sum


@triton.jit
def load_normaliser(R, index, size, PRESENT: tl.constexpr):
    """r, but +inf where nothing was reduced: z - r is then -inf, and the weight exactly 0."""
    r = load_side(R, index, size, _NOTHING, PRESENT)
    if PRESENT:
        r = tl.where(r == _NOTHING, float("inf"), r)
    return r


@triton.jit
def softmax_weights(z, r, c, g, h, rho, close, HAS_G: tl.constexpr, HAS_H: tl.constexpr):
    """w_ij = g_i e^(z_ij - r_i) + h_j e^(z_ij - c_j), by one exponential where all r and c are close to rho.

    With every |r_i - rho|, |c_j - rho| < 28, w_ij = e^(z_ij - rho) (g_i e^(rho - r_i) + h_j e^(rho - c_j)): no factor
    passes 2^41, and what e^(z_ij - rho) flushes to 0 is under 2^-85 of its row and of its column. There g and h hold
    those factors (launching.softmax_reference), and r and c are not read.
    """
    if HAS_G and HAS_H:
        if close:
            w = exp(z - rho) * (g[:, None] + h[None, :])
        else:
            w = exp(z - r[:, None]) * g[:, None] + exp(z - c[None, :]) * h[None, :]
    elif HAS_G:
        w = exp(z - r[:, None]) * g[:, None]
    else:
        w = exp(z - c[None, :]) * h[None, :]
    return w


@triton.jit
def sum_weights(slope, g, h, HAS_G: tl.constexpr, HAS_H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """w_ij = f'(z_ij) (g_i + h_j)."""
    if HAS_G and HAS_H:
        w = slope * (g[:, None] + h[None, :])
    elif HAS_G:
        w = slope * g[:, None]
    else:
        w = slope * h[None, :]
    return tl.broadcast_to(w, (BM, BN))
