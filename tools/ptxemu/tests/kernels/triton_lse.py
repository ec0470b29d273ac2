"""Triton kernels: row-wise log-sum-exp and its backward, and a kernel with many reductions."""

import triton.language as tl

import triton


@triton.jit
def lse_fwd(
    X,
    Y,
    LSE,
    N,
    M,
    inv_tau,
    sx,
    sy,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PREC: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, BD)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    for j in range(0, M, BN):
        rn = j + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for d in range(0, D, BD):
            x = tl.load(
                X + rm[:, None] * sx + (d + rd)[None, :],
                mask=(rm[:, None] < N) & ((d + rd)[None, :] < D),
                other=0.0,
            )
            y = tl.load(
                Y + rn[:, None] * sy + (d + rd)[None, :],
                mask=(rn[:, None] < M) & ((d + rd)[None, :] < D),
                other=0.0,
            )
            acc = tl.dot(x, tl.trans(y), acc, input_precision=PREC)
        s = tl.where(rn[None, :] < M, acc * (inv_tau * LOG2E), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)
        m = m_new
    tl.store(LSE + rm, (m + tl.log2(l)) / LOG2E, mask=rm < N)


@triton.jit
def lse_bwd(
    X,
    Y,
    LSE,
    G,
    DX,
    DY,
    N,
    M,
    inv_tau,
    sx,
    sy,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    x = tl.load(X + rm[:, None] * sx + rd[None, :], mask=rm[:, None] < N, other=0.0)
    lse = tl.load(LSE + rm, mask=rm < N, other=float("inf"))
    g = tl.load(G + rm, mask=rm < N, other=0.0)
    dx = tl.zeros((BM, D), tl.float32)
    for j in range(0, M, BN):
        rn = j + tl.arange(0, BN)
        y = tl.load(Y + rn[:, None] * sy + rd[None, :], mask=rn[:, None] < M, other=0.0)
        s = tl.dot(x, tl.trans(y), input_precision=PREC) * inv_tau
        p = tl.exp2((s - lse[:, None]) * LOG2E)
        p = tl.where(rn[None, :] < M, p, 0.0) * (g * inv_tau)[:, None]
        pc = p.to(x.dtype)
        dx = tl.dot(pc, y, dx, input_precision=PREC)
        dy = tl.dot(tl.trans(pc), x, input_precision=PREC)
        tl.atomic_add(DY + rn[:, None] * sy + rd[None, :], dy, mask=rn[:, None] < M, sem="relaxed")
    tl.store(DX + rm[:, None] * sx + rd[None, :], dx, mask=rm[:, None] < N)


@triton.jit
def misc(X, O, OI, N, B: tl.constexpr):
    r = tl.arange(0, B)
    x = tl.load(X + r, mask=r < N, other=-float("inf"))
    m = tl.max(x, 0)
    s = tl.sum(tl.exp(x - m), 0)
    tl.store(O, m + tl.log(s))
    tl.store(OI, tl.argmax(x, 0))
    tl.store(O + 8 + r, tl.cumsum(tl.where(r < N, x, 0.0), 0), mask=r < N)
    tl.store(O + 8 + B + r, tl.sort(x), mask=r < B)
    tl.store(
        O + 8 + 2 * B + r,
        tl.sigmoid(x) + tl.sqrt(tl.abs(x)) + tl.rsqrt(tl.abs(x) + 1) + tl.erf(x) + x / 3.0 + (r // 3) + (r % 5),
        mask=r < N,
    )
    h = tl.histogram((r % 16).to(tl.int32), 16)
    tl.atomic_add(OI + 2 + tl.arange(0, 16), h)


@triton.autotune(configs=[triton.Config({"B": b}, num_warps=w) for b in (32, 64) for w in (2, 4)], key=["N"])
@triton.jit
def add_one(X, O, N, B: tl.constexpr):
    r = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(O + r, tl.load(X + r, mask=r < N) + 1, mask=r < N)
