"""The fused form: dot products, pair function and reductions in one kernel, nothing of size n x m in memory.

fused_rows      r, and c as one partial result for each program, from one sweep
fused_gradient  W Y (and W 1) of a block of rows in registers, from a sweep that forms z again
"""

import triton
import triton.language as tl

from .equation import load_side, logits, mask_tile
from .reductions import (
    load_normaliser,
    merge,
    only_where_present,
    push_rows,
    rows_and_columns,
    shared_reference,
    softmax_weights,
    sum_weights,
    terms,
)

_SIZES = ("n", "m", "diff", "period", "columns_pitch")


@triton.jit
def _load_rows(T, index, size, stride, k, d, EVEN: tl.constexpr):
    """A tile of rows `index` and columns `k` of a matrix with unit column stride; EVEN: k never passes d."""
    at = T + index.to(tl.int64)[:, None] * stride + k[None, :]
    if EVEN:
        return tl.load(at, mask=(index < size)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(index < size)[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def _dot_tile(
    X, Y, i, j, n, m, d, sx, sy,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> on a tile, d in chunks of BD."""
    dot = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BD)
    for start in range(0, d, BD):
        x = _load_rows(X, i, n, sx, start + k, d, EVEN)
        y = _load_rows(Y, j, m, sy, start + k, d, EVEN)
        dot = tl.dot(x, tl.trans(y), dot, input_precision=PRECISION)
    return dot


@triton.jit
def _own_block(t, program, programs, SYMMETRIC: tl.constexpr):
    """The t-th block of a program. With x itself the first blocks have the longest rows: deal them there and back."""
    if SYMMETRIC:
        return t * programs + tl.where(t % 2 == 0, program, programs - 1 - program)
    else:
        return t * programs + program


@triton.jit(do_not_specialize=_SIZES)
def fused_rows(
    X, Y, NX, NY, BX, BY, GX, GY, A, B, FAR, REDO, TOP, SUM, COL_TOP, COL_SUM, n, m, d, diff, period, sx, sy, k0, k1,
    columns_pitch,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr,
    SQDIST: tl.constexpr, HAS_BX: tl.constexpr, HAS_BY: tl.constexpr, MASK: tl.constexpr, PAIR: tl.constexpr,
    LSE: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TOP, SUM (n,) of the rows; COL_TOP, COL_SUM[program, column] of the columns, initialised to nothing by the caller.

    SHARED: a log-sum-exp relative to one reference, which leaves COL_TOP alone; where that reference serves no pair, SUM is
    NaN. Without it, each tile has its own, and the launch returns at once unless REDO.
    SYMMETRIC: columns right of a row block stand for later rows too, and only those tiles are visited. BM % BN == 0.
    """
    if LSE and not SHARED:  # noqa: SIM102  decided at compile time, and what follows on the device
        if tl.load(REDO) == 0.0:
            return
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    a = tl.load(A)
    b = tl.load(B)
    rho = shared_reference(FAR, a, b, SQDIST) if SHARED else 0.0
    blocks = tl.cdiv(n, BM)
    grouped: tl.constexpr = MASK == "across_groups" or MASK == "within_groups"
    for t in range(0, tl.cdiv(blocks, programs)):
        i0 = _own_block(t, program, programs, SYMMETRIC) * BM
        i = i0 + tl.arange(0, BM)
        nx = load_side(NX, i, n, 0.0, SQDIST)
        bx = load_side(BX, i, n, 0.0, HAS_BX)
        gx = load_side(GX, i, n, 0, grouped)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32) + (rho - rho)
        if KEEP:
            kept = _load_rows(X, i, n, sx, tl.arange(0, BD), d, EVEN)
        first = i0 if SYMMETRIC else 0
        # A program's last block may lie past the end.
        last = tl.where((i0 < n) & (rho == rho), m, 0)
        for j0 in range(first, last, BN):
            j = j0 + tl.arange(0, BN)
            if KEEP:
                y = _load_rows(Y, j, m, sy, tl.arange(0, BD), d, EVEN)
                dot = tl.dot(kept, tl.trans(y), input_precision=PRECISION)
            else:
                dot = _dot_tile(X, Y, i, j, n, m, d, sx, sy, BM, BN, BD, EVEN, PRECISION)
            ny = load_side(NY, j, m, 0.0, SQDIST)
            by = load_side(BY, j, m, 0.0, HAS_BY)
            gy = load_side(GY, j, m, 0, grouped)
            z = logits(dot, a, b, nx, ny, bx, by, SQDIST, HAS_BX, HAS_BY)
            # The tiles on the diagonal hold each of their pairs in both orders already.
            inside = j < (tl.where(j0 >= i0 + BM, m, 0) if SYMMETRIC else m)
            column = program.to(tl.int64) * columns_pitch + j
            if LSE:
                z = mask_tile(z, i0, j0, n, m, diff, period, gx, gy, float("-inf"), BM, BN, MASK)
                if SHARED:
                    e = terms(z, rho, grouped)
                    total += tl.sum(e, 1)
                    if COLUMNS:
                        old_sum = tl.load(COL_SUM + column, mask=inside, other=0.0)
                        tl.store(COL_SUM + column, old_sum + tl.sum(e, 0), mask=inside)
                elif COLUMNS:
                    old_top = tl.load(COL_TOP + column, mask=inside, other=0.0)
                    old_sum = tl.load(COL_SUM + column, mask=inside, other=0.0)
                    row_top, row_sum, col_top, col_sum = rows_and_columns(z, BM, BN)
                    top, total = merge(top, total, row_top, row_sum)
                    col_top, col_sum = merge(old_top, old_sum, col_top, col_sum)
                    tl.store(COL_TOP + column, col_top, mask=inside)
                    tl.store(COL_SUM + column, col_sum, mask=inside)
                else:
                    top, total = push_rows(top, total, z)
            else:
                f = mask_tile(PAIR(z, k0, k1), i0, j0, n, m, diff, period, gx, gy, 0.0, BM, BN, MASK)
                total += tl.sum(f, 1)
                if COLUMNS:
                    old_sum = tl.load(COL_SUM + column, mask=inside, other=0.0)
                    tl.store(COL_SUM + column, old_sum + tl.sum(f, 0), mask=inside)
        if COLUMNS:
            # The next row block reads these columns back, through other threads perhaps.
            tl.debug_barrier()
        if LSE:
            tl.store(TOP + i, only_where_present(rho, total) if SHARED else top, mask=i < n)
        tl.store(SUM + i, total, mask=i < n)


@triton.jit(do_not_specialize=_SIZES)
def fused_gradient(
    X, Y, NX, NY, BX, BY, GX, GY, A, B, R, C, G, H, REFERENCE, WY, W_ROWS, VALUES, n, m, d, diff, period, sx, sy, swy,
    k0, k1,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr,
    SQDIST: tl.constexpr, HAS_BX: tl.constexpr, HAS_BY: tl.constexpr, MASK: tl.constexpr, PAIR: tl.constexpr,
    SLOPE: tl.constexpr, LSE: tl.constexpr, HAS_G: tl.constexpr, HAS_H: tl.constexpr, ROW_SUMS: tl.constexpr,
    VALUE: tl.constexpr, CLOSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WY[rows of this block, columns of this part] = W Y, and from the first part W 1 and the row sums of f.

    A part is PART columns of d, and KEEP says that one part is all of it: each tile of Y then serves both products. Every
    part of a wider d forms z again. Under log-sum-exp with g and h the launch whose CLOSE is not what REFERENCE says returns
    at once: in one kernel the branch would cost the inner loop 40 registers.
    """
    rho = load_side(REFERENCE, 0, 1, 0.0, (LSE and HAS_G) and HAS_H)
    # In pairs: Triton 3.3 refuses `a and b and c`.
    if (LSE and HAS_G) and HAS_H:  # noqa: SIM102  decided at compile time, and what follows on the device
        if (tl.load(REFERENCE + 1) > 0.0) != CLOSE:
            return
    # Row blocks along x: the other axes of a grid end at 65,535.
    i0 = tl.program_id(0) * BM
    part = tl.program_id(1)
    i = i0 + tl.arange(0, BM)
    k = part * PART + tl.arange(0, PART)
    a = tl.load(A)
    b = tl.load(B)
    grouped: tl.constexpr = MASK == "across_groups" or MASK == "within_groups"
    nx = load_side(NX, i, n, 0.0, SQDIST)
    bx = load_side(BX, i, n, 0.0, HAS_BX)
    gx = load_side(GX, i, n, 0, grouped)
    g = load_side(G, i, n, 0.0, HAS_G)
    r = load_normaliser(R, i, n, LSE and HAS_G)
    if KEEP:
        x = _load_rows(X, i, n, sx, k, d, EVEN)
    wy = tl.zeros((BM, PART), tl.float32)
    row_sums = tl.zeros((BM,), tl.float32)
    values = tl.zeros((BM,), tl.float32)
    for j0 in range(0, m, BN):
        j = j0 + tl.arange(0, BN)
        y = _load_rows(Y, j, m, sy, k, d, EVEN)
        if KEEP:
            dot = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            dot = _dot_tile(X, Y, i, j, n, m, d, sx, sy, BM, BN, BD, EVEN, PRECISION)
        ny = load_side(NY, j, m, 0.0, SQDIST)
        by = load_side(BY, j, m, 0.0, HAS_BY)
        gy = load_side(GY, j, m, 0, grouped)
        h = load_side(H, j, m, 0.0, HAS_H)
        z = logits(dot, a, b, nx, ny, bx, by, SQDIST, HAS_BX, HAS_BY)
        if LSE:
            z = mask_tile(z, i0, j0, n, m, diff, period, gx, gy, float("-inf"), BM, BN, MASK)
            c = load_normaliser(C, j, m, HAS_H)
            w = softmax_weights(z, r, c, g, h, rho, CLOSE, HAS_G, HAS_H)
        else:
            w = sum_weights(SLOPE(z, k0, k1), g, h, HAS_G, HAS_H, BM, BN)
            w = mask_tile(w, i0, j0, n, m, diff, period, gx, gy, 0.0, BM, BN, MASK)
            if VALUE:
                values += tl.sum(mask_tile(PAIR(z, k0, k1), i0, j0, n, m, diff, period, gx, gy, 0.0, BM, BN, MASK), 1)
        rounded = w.to(y.dtype)
        if ROW_SUMS:
            # diag(W 1) X - W Y cancels: both terms take the same rounded weights.
            row_sums += tl.sum(rounded.to(tl.float32) if SQDIST else w, 1)
        wy = tl.dot(rounded, y, wy, input_precision=PRECISION)
    at = WY + i.to(tl.int64)[:, None] * swy + k[None, :]
    tl.store(at, wy, mask=(i < n)[:, None] & (k < d)[None, :])
    if part == 0:
        if ROW_SUMS:
            tl.store(W_ROWS + i, row_sums, mask=i < n)
        if VALUE:
            tl.store(VALUES + i, values, mask=i < n)


@triton.jit(do_not_specialize=("programs", "size", "pitch"))
def merge_columns(
    COL_TOP, COL_SUM, A, B, FAR, REDO, TOP, SUM, programs, size, pitch,
    BLOCK: tl.constexpr, LSE: tl.constexpr, SHARED: tl.constexpr, JOIN: tl.constexpr, SQDIST: tl.constexpr,
):  # fmt: skip
    """Join the column state of every program, in order, into TOP and SUM; JOIN: with what stands there already."""
    if LSE and not SHARED:  # noqa: SIM102
        if tl.load(REDO) == 0.0:
            return
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    at = index.to(tl.int64)
    for _ in range(programs):
        part = tl.load(COL_SUM + at, mask=inside, other=0.0)
        if LSE and not SHARED:
            top, total = merge(top, total, tl.load(COL_TOP + at, mask=inside, other=float("-inf")), part)
        else:
            total += part
        at += pitch
    if SHARED:
        top = only_where_present(shared_reference(FAR, tl.load(A), tl.load(B), SQDIST), total)
    if JOIN:
        before = tl.load(SUM + index, mask=inside, other=0.0)
        if LSE:
            top, total = merge(tl.load(TOP + index, mask=inside, other=float("-inf")), before, top, total)
        else:
            total += before
    if LSE:
        tl.store(TOP + index, top, mask=inside)
    tl.store(SUM + index, total, mask=inside)
