"""The equation on one tile, shared by every kernel:

z_ij = a u(x_i, y_j) + b + bx_i + by_j        u = <x_i, y_j> or |x_i - y_j|^2,  j in M(i)
"""

import triton
import triton.language as tl

from .intrinsics import maximum

# Farther than any tile is wide: a diagonal that far away does not cross the tile.
_FAR = tl.constexpr(1 << 20)


@triton.jit
def load_side(P, index, size, other, PRESENT: tl.constexpr):
    """A vector that belongs to rows or columns, or a zero that costs nothing where there is none."""
    if PRESENT:
        return tl.load(P + index, mask=index < size, other=other)
    else:
        return 0.0


@triton.jit
def logits(dot, a, b, nx, ny, bx, by, SQDIST: tl.constexpr, HAS_BX: tl.constexpr, HAS_BY: tl.constexpr):
    """z from a tile of dot products and the vectors of its rows and columns."""
    u = dot
    if SQDIST:
        # The norms and the product round apart: a distance below 0 is 0.
        u = maximum(nx[:, None] + ny[None, :] - 2.0 * dot, 0.0)
    # Biases first: z of a pair is then one number, whichever of its rows is x, and no normaliser is off by what it rounds to.
    if HAS_BX and HAS_BY:
        z = u * a + ((0.5 * b + bx)[:, None] + (0.5 * b + by)[None, :])
    elif HAS_BX:
        z = u * a + (b + bx)[:, None]
    elif HAS_BY:
        z = u * a + (b + by)[None, :]
    else:
        z = u * a + b
    return z


@triton.jit
def visited(i0, j0, n, m, shift, gx, gy, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr):
    """M on the tile at (i0, j0), edges of the matrix included; shift: the column that its first row leaves out."""
    ii = tl.arange(0, BM)
    jj = tl.arange(0, BN)
    keep = (ii < n - i0)[:, None] & (jj < m - j0)[None, :]
    if MASK == "off_diagonal" or MASK == "off_diagonals":
        keep = keep & ((ii + shift)[:, None] != jj[None, :])
    if MASK == "across_groups":
        keep = keep & (gx[:, None] != gy[None, :])
    if MASK == "within_groups":
        keep = keep & (gx[:, None] == gy[None, :])
    return keep


@triton.jit
def mask_tile(t, i0, j0, n, m, diff, period, gx, gy, fill, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr):
    """t where M visits the pair, fill elsewhere. A branch: tiles inside the matrix and off the diagonals pay nothing.

    off_diagonals: that at diff and those a period from there, of which one at most crosses a tile.
    """
    far = diff.to(tl.int64) + i0 - j0
    if MASK == "off_diagonals":
        far += tl.where(far >= BN, -period, tl.where(far <= -BM, period, 0))
    shift = tl.minimum(tl.maximum(far, -_FAR), _FAR).to(tl.int32)
    crossed = (i0 + BM > n) | (j0 + BN > m)
    if MASK == "off_diagonal" or MASK == "off_diagonals":
        crossed = crossed | ((shift > -BM) & (shift < BN))
    if MASK == "across_groups" or MASK == "within_groups":
        t = tl.where(visited(i0, j0, n, m, shift, gx, gy, BM, BN, MASK), t, fill)
    else:
        if crossed:
            t = tl.where(visited(i0, j0, n, m, shift, gx, gy, BM, BN, MASK), t, fill)
    return t


@triton.jit
def at_most(t, decides, lx, ly, fill, HAS_LX: tl.constexpr, HAS_LY: tl.constexpr):
    """t where z, or what else decides, is at most the limits of its row and column, else fill; NaN is above none."""
    if HAS_LX:
        t = tl.where(decides > lx[:, None], fill, t)
    if HAS_LY:
        t = tl.where(decides > ly[None, :], fill, t)
    return t
