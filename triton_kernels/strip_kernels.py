"""The epilogues of the strip form: kernels over one tile of dot products that a matrix product left in the workspace.

Each program reads a block of the tile, reduces it, and leaves partial results in a row of its own; merge_partials joins
them in a fixed order, so that every result has the same bits in any schedule.
"""

import triton
import triton.language as tl

from .equation import at_most, load_side, logits, mask_tile
from .reductions import load_normaliser, merge, push_rows, rows_and_columns, softmax_weights, sum_weights

_SIZES = ("i0", "j0", "n", "m", "diff", "period", "rows_pitch", "cols_pitch")


@triton.jit
def _tile_logits(
    S, i, j, i0, j0, n, m, pitch, NX, NY, BX, BY, A, B,
    SQDIST: tl.constexpr, HAS_BX: tl.constexpr, HAS_BY: tl.constexpr,
):  # fmt: skip
    """z on the block of rows i and columns j (global indices) of the tile that begins at (i0, j0)."""
    # The pitch is a multiple of 16 and so bounds whole vectors; what lies between m and the pitch is masked as a value.
    offsets = (i - i0).to(tl.int64)[:, None] * pitch + (j - j0)[None, :]
    dot = tl.load(S + offsets, mask=(i < n)[:, None] & (j - j0 < pitch)[None, :], other=0.0)
    nx = load_side(NX, i, n, 0.0, SQDIST)
    ny = load_side(NY, j, m, 0.0, SQDIST)
    bx = load_side(BX, i, n, 0.0, HAS_BX)
    by = load_side(BY, j, m, 0.0, HAS_BY)
    return logits(dot, tl.load(A), tl.load(B), nx, ny, bx, by, SQDIST, HAS_BX, HAS_BY), offsets


@triton.jit
def _deciding(D, z, offsets, i, j, j0, n, pitch, HAS_GUIDE: tl.constexpr):
    """What limits are on: the products of guides, a second tile laid out as that of dot products, or z."""
    if HAS_GUIDE:
        return tl.load(D + offsets, mask=(i < n)[:, None] & (j - j0 < pitch)[None, :], other=0.0)
    else:
        return z


@triton.jit(do_not_specialize=_SIZES)
def strip_reduce(
    S, D, NX, NY, BX, BY, GX, GY, LX, LY, A, B, ROWS, COLS, i0, j0, n, m, diff, period, k0, k1, pitch, rows_pitch,
    cols_pitch,
    BM: tl.constexpr, BN: tl.constexpr, SQDIST: tl.constexpr, HAS_BX: tl.constexpr, HAS_BY: tl.constexpr,
    HAS_LX: tl.constexpr, HAS_LY: tl.constexpr, HAS_GUIDE: tl.constexpr, MASK: tl.constexpr, PAIR: tl.constexpr,
    LSE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The reductions of one tile: ROWS[plane, block of columns, row], COLS[plane, block of rows, column].

    The tile holds rows [i0, n) and columns [j0, m). Log-sum-exp has the planes top and sum, a sum has one.
    """
    # Blocks of columns along x: the other axes of a grid end at 65,535.
    bj = tl.program_id(0)
    bi = tl.program_id(1)
    i = i0 + bi * BM + tl.arange(0, BM)
    j = j0 + bj * BN + tl.arange(0, BN)
    z, offsets = _tile_logits(S, i, j, i0, j0, n, m, pitch, NX, NY, BX, BY, A, B, SQDIST, HAS_BX, HAS_BY)
    decides = _deciding(D, z, offsets, i, j, j0, n, pitch, HAS_GUIDE)
    gx = load_side(GX, i, n, 0, MASK == "across_groups" or MASK == "within_groups")
    gy = load_side(GY, j, m, 0, MASK == "across_groups" or MASK == "within_groups")
    lx = load_side(LX, i, n, 0.0, HAS_LX)
    ly = load_side(LY, j, m, 0.0, HAS_LY)
    row = ROWS + bj.to(tl.int64) * rows_pitch + i - i0
    col = COLS + bi.to(tl.int64) * cols_pitch + j - j0
    if LSE:
        z = at_most(z, decides, lx, ly, float("-inf"), HAS_LX, HAS_LY)
        z = mask_tile(z, i0 + bi * BM, j0 + bj * BN, n, m, diff, period, gx, gy, float("-inf"), BM, BN, MASK)
        row_plane = tl.num_programs(0).to(tl.int64) * rows_pitch
        col_plane = tl.num_programs(1).to(tl.int64) * cols_pitch
        if COLUMNS:
            row_top, row_sum, col_top, col_sum = rows_and_columns(z, BM, BN)
            tl.store(col, col_top, mask=j < m)
            tl.store(col + col_plane, col_sum, mask=j < m)
        else:
            nothing = tl.full((BM,), float("-inf"), tl.float32)
            row_top, row_sum = push_rows(nothing, tl.zeros((BM,), tl.float32), z)
        tl.store(row, row_top, mask=i < n)
        tl.store(row + row_plane, row_sum, mask=i < n)
    else:
        f = at_most(PAIR(z, k0, k1), decides, lx, ly, 0.0, HAS_LX, HAS_LY)
        f = mask_tile(f, i0 + bi * BM, j0 + bj * BN, n, m, diff, period, gx, gy, 0.0, BM, BN, MASK)
        tl.store(row, tl.sum(f, 1), mask=i < n)
        if COLUMNS:
            tl.store(col, tl.sum(f, 0), mask=j < m)


@triton.jit(do_not_specialize=_SIZES)
def strip_weights(
    S, D, W, NX, NY, BX, BY, GX, GY, LX, LY, A, B, R, C, G, H, REFERENCE, ROWS, COLS, VALUES,
    i0, j0, n, m, diff, period, k0, k1, pitch, rows_pitch, cols_pitch,
    BM: tl.constexpr, BN: tl.constexpr, SQDIST: tl.constexpr, HAS_BX: tl.constexpr, HAS_BY: tl.constexpr,
    HAS_LX: tl.constexpr, HAS_LY: tl.constexpr, HAS_GUIDE: tl.constexpr, MASK: tl.constexpr, PAIR: tl.constexpr,
    SLOPE: tl.constexpr, LSE: tl.constexpr, HAS_G: tl.constexpr, HAS_H: tl.constexpr, ROW_SUMS: tl.constexpr,
    COL_SUMS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """The weights w of one tile in the dtype of W, and when asked W 1, W^T 1 and the row sums of f, as partial results.

    W may be S itself where both are float32: a program reads its block before it writes it, and no other reads it.
    """
    # Blocks of columns along x: the other axes of a grid end at 65,535.
    bj = tl.program_id(0)
    bi = tl.program_id(1)
    i = i0 + bi * BM + tl.arange(0, BM)
    j = j0 + bj * BN + tl.arange(0, BN)
    z, offsets = _tile_logits(S, i, j, i0, j0, n, m, pitch, NX, NY, BX, BY, A, B, SQDIST, HAS_BX, HAS_BY)
    decides = _deciding(D, z, offsets, i, j, j0, n, pitch, HAS_GUIDE)
    gx = load_side(GX, i, n, 0, MASK == "across_groups" or MASK == "within_groups")
    gy = load_side(GY, j, m, 0, MASK == "across_groups" or MASK == "within_groups")
    lx = load_side(LX, i, n, 0.0, HAS_LX)
    ly = load_side(LY, j, m, 0.0, HAS_LY)
    g = load_side(G, i, n, 0.0, HAS_G)
    h = load_side(H, j, m, 0.0, HAS_H)
    if LSE:
        r = load_normaliser(R, i, n, HAS_G)
        c = load_normaliser(C, j, m, HAS_H)
        z = mask_tile(z, i0 + bi * BM, j0 + bj * BN, n, m, diff, period, gx, gy, float("-inf"), BM, BN, MASK)
        both: tl.constexpr = HAS_G and HAS_H
        rho = load_side(REFERENCE, 0, 1, 0.0, both)
        close = load_side(REFERENCE, 1, 2, 0.0, both)
        w = softmax_weights(z, r, c, g, h, rho, close > 0.0, HAS_G, HAS_H)
    else:
        w = sum_weights(SLOPE(z, k0, k1), g, h, HAS_G, HAS_H, BM, BN)
        w = mask_tile(w, i0 + bi * BM, j0 + bj * BN, n, m, diff, period, gx, gy, 0.0, BM, BN, MASK)
    # Of the weights, whatever z and its row's normaliser are.
    w = at_most(w, decides, lx, ly, 0.0, HAS_LX, HAS_LY)
    stored = w.to(W.dtype.element_ty)
    if (HAS_LX or HAS_LY) and not LSE:
        # The weight of a logit of NaN is NaN in W Y, where the row that it came from is 0, whatever the slope is there.
        stored = tl.where((z != z) & (w != 0.0), z, w).to(W.dtype.element_ty)
    tl.store(W + offsets, stored, mask=(i < n)[:, None] & (j - j0 < pitch)[None, :])
    if SQDIST:
        # diag(W 1) X - W Y cancels: both terms take the same rounded weights.
        w = w.to(W.dtype.element_ty).to(tl.float32)
    row = bj.to(tl.int64) * rows_pitch + i - i0
    if ROW_SUMS:
        tl.store(ROWS + row, tl.sum(w, 1), mask=i < n)
    if COL_SUMS:
        tl.store(COLS + bi.to(tl.int64) * cols_pitch + j - j0, tl.sum(w, 0), mask=j < m)
    if VALUE:
        f = at_most(PAIR(z, k0, k1), decides, lx, ly, 0.0, HAS_LX, HAS_LY)
        f = mask_tile(f, i0 + bi * BM, j0 + bj * BN, n, m, diff, period, gx, gy, 0.0, BM, BN, MASK)
        tl.store(VALUES + row, tl.sum(f, 1), mask=i < n)


@triton.jit(do_not_specialize=("count", "size", "pitch"))
def merge_partials(PARTS, TOP, SUM, count, size, pitch, factor, BLOCK: tl.constexpr, LSE: tl.constexpr):
    """Join PARTS[plane, 0..count, index] into the running state, in order: TOP and SUM of a log-sum-exp, or SUM."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.load(SUM + index, mask=inside, other=0.0)
    if LSE:
        top = tl.load(TOP + index, mask=inside, other=float("-inf"))
    at = PARTS + index
    plane = count.to(tl.int64) * pitch
    for _ in range(count):
        if LSE:
            part_top = tl.load(at, mask=inside, other=float("-inf"))
            part_sum = tl.load(at + plane, mask=inside, other=0.0)
            top, total = merge(top, total, part_top, part_sum)
        else:
            total += factor * tl.load(at, mask=inside, other=0.0)
        at += pitch
    tl.store(SUM + index, total, mask=inside)
    if LSE:
        tl.store(TOP + index, top, mask=inside)
