"""sm_90: wgmma descriptors of every swizzle and both major orders against numpy; mbarrier and bulk copies. See also test_triton.py."""

import numpy as np
import pytest

from tools import ptxemu
from tools.ptxemu import Deadlock, MissingWait, SharedRace, Uninitialized

from .launching import launch
from .test_matrix import bf16, from_bf16

SWIZZLE = {
    16: (0, 0),
    32: (3, 1),
    64: (2, 3),
    128: (1, 7),
}  # row width in bytes -> descriptor code, address bits


def layout(width, rows, K, mn_major):
    """Byte offset of element (row, k) of a 16-bit operand, with the strides used here, and the descriptor without its address.
    From the canonical layouts of the PTX ISA: 8-row (or 8-k) groups of 'width' bytes per row, 16-byte chunks XORed with address bits 7-9."""
    code, mask = SWIZZLE[width]
    r, k = np.meshgrid(np.arange(rows), np.arange(K), indexing="ij")
    if not mn_major:
        if width == 16:
            leading, stride = rows * 16, 128
            off = (k // 8) * leading + (r // 8) * stride + (r % 8) * 16 + (k % 8) * 2
        else:
            leading, stride = 16, 8 * width
            off = (r // 8) * stride + (r % 8) * width + k * 2
    else:
        per = width // 2
        if width == 16:
            stride, leading = 128 * (K // 8), 128
            off = (r // 8) * stride + (k // 8) * leading + (k % 8) * 16 + (r % 8) * 2
        else:
            leading, stride = 8 * width * (K // 8), 8 * width
            off = (r // per) * leading + (r % per) * 2 + (k // 8) * stride + (k % 8) * width
    off = off ^ ((off >> 7 & mask) << 4)
    return off, (leading >> 4) << 16 | (stride >> 4) << 32 | code << 62


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "ta,tb,from_regs",
    [(0, 0, False), (0, 1, False), (1, 0, False), (1, 1, False), (0, 0, True), (0, 1, True)],
)
def test_wgmma_bf16(rng, width, ta, tb, from_regs):
    N, K = 64, 16
    A, B, C = (
        from_bf16(bf16(rng.standard_normal((64, K)))),
        from_bf16(bf16(rng.standard_normal((K, N)))),
        rng.standard_normal((64, N)).astype(np.float32),
    )
    image = np.zeros(16384, np.uint8)
    offs, descs = [], []
    for base, mat, t in ((0, A, ta), (8192, B.T, tb)):
        off, d = layout(width, 64, K, t)
        words = image.view(np.uint16)
        words[(base + off) // 2] = bf16(mat)
        descs.append(d | base >> 4)
        offs.append(off)
    lane = np.arange(128)
    g, q, w = lane % 32 // 4, lane % 4, lane // 32
    place = [(16 * w + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * q + i % 2) for i in range(N // 2)]
    acc = np.stack([C[p] for p in place])  # [register][thread]
    ca = bf16(A).astype(np.uint32)
    regs = np.stack(
        [
            ca[16 * w + g + 8 * (r % 2), 2 * q + 8 * (r // 2)]
            | ca[16 * w + g + 8 * (r % 2), 2 * q + 1 + 8 * (r // 2)] << 16
            for r in range(4)
        ]
    )
    out = np.zeros((2, N // 2, 128), np.float32)
    body = "mov.u32 %r10, buf; mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1; cvt.u32.u64 %r11, %rd10; add.u32 %r11, %r11, %r10;"
    body += "".join(f"ld.global.b32 %r12, [%rd11+{512 * i}]; st.shared.b32 [%r11+{512 * i}], %r12;" for i in range(32))
    body += "add.s64 %rd12, %rd10, %rd2; add.s64 %rd13, %rd10, %rd3; add.s64 %rd14, %rd10, %rd4;"
    body += "".join(f"ld.global.b32 %r{40 + i}, [%rd12+{512 * i}];" for i in range(32)) + "".join(
        f"ld.global.b32 %r{30 + i}, [%rd13+{512 * i}];" for i in range(4)
    )
    body += f"fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd20, {descs[0]}; mov.b64 %rd21, {descs[1]}; setp.eq.u32 %p1, %r1, %r1; setp.ne.u32 %p2, %r1, %r1;"
    d = "{" + ", ".join(f"%r{40 + i}" for i in range(32)) + "}"
    a, tail = ("{%r30, %r31, %r32, %r33}", f"{tb}") if from_regs else ("%rd20", f"{ta}, {tb}")
    for k, p in enumerate(("%p1", "%p2")):  # accumulate, then overwrite with the negated product
        body += f"wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {d}, {a}, %rd21, {p}, {'1' if k == 0 else '-1'}, 1, {tail}; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
        body += "".join(f"st.global.b32 [%rd14+{512 * (32 * k + i)}], %r{40 + i};" for i in range(32))
    launch(body, [image, acc, regs, out], block=128, arch="sm_90a", shared=".shared .align 1024 .b8 buf[16384];")
    for k, want in enumerate((C + A.astype(np.float64) @ B, -(A.astype(np.float64) @ B))):
        w_ = np.stack([want[p] for p in place])
        assert np.abs(out[k] - w_).max() < 4e-6, (k, np.abs(out[k] - w_).max())


BAR = "mov.u32 %r10, bar; mov.u32 %r11, buf; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r10], {}; fence.mbarrier_init.release.cluster; bar.sync 0; mov.u32 %r14, %laneid; shl.b32 %r15, %r14, 2; add.u32 %r15, %r15, %r11;"
SHARED = ".shared .align 8 .b8 bar[8]; .shared .align 128 .b8 buf[512];"
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0; @!%p2 bra W;"


def test_mbarrier_orders_producer_and_consumer():
    """Warp 1 writes and arrives, warp 0 waits and reads."""
    out = np.zeros(64, np.uint32)
    body = (
        BAR.replace("{}", "32")
        + """setp.lt.u32 %p3, %r1, 32; @%p3 bra C; st.shared.u32 [%r15], %r1; {arrive} bra END;
C: {wait} ld.shared.u32 %r20, [%r15]; mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1; st.global.u32 [%rd11], %r20; END: """
    )
    good = body.replace("{arrive}", "mbarrier.arrive.shared::cta.b64 %rd20, [%r10];").replace("{wait}", WAIT)
    kw = dict(block=64, arch="sm_90", shared=SHARED)
    for seed in (0, 1, 2):
        launch(good, [out], seed=seed, **kw)
        assert (out[:32] == np.arange(32, 64)).all()
    for seed in (0, 1, 2):
        with pytest.raises((SharedRace, Uninitialized)):
            launch(
                body.replace("{arrive}", "mbarrier.arrive.shared::cta.b64 %rd20, [%r10];").replace("{wait}", ""),
                [out],
                seed=seed,
                **kw,
            )
    with pytest.raises(Deadlock):
        launch(body.replace("{arrive}", "").replace("{wait}", WAIT), [out], **kw)
    with pytest.raises((SharedRace, Uninitialized)):  # the object is used before its initialisation is ordered
        launch(good.replace("bar.sync 0;", ""), [out], seed=1, **kw)
    early = body.replace(
        "st.shared.u32 [%r15], %r1; {arrive}",
        "mbarrier.arrive.shared::cta.b64 %rd20, [%r10]; st.shared.u32 [%r15], %r1;",
    ).replace("{wait}", WAIT)
    with pytest.raises((SharedRace, Uninitialized)):
        launch(early, [out], **kw)


def test_lanes_that_poll_let_others_of_their_warp_go_on():
    """Lane 0 arrives where the others, who come first in the program, wait for it."""
    out = np.zeros(32, np.uint32)
    body = (
        BAR.replace("{}", "1")
        + WAIT.join(["@%p1 bra A;", "bra E; A: mbarrier.arrive.shared::cta.b64 %rd20, [%r10]; E: "])
        + "mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1; st.global.u32 [%rd11], %r1;"
    )
    for seed in (0, 1, 2):
        launch(body, [out], arch="sm_90", shared=SHARED, seed=seed)
        assert (out == np.arange(32)).all()


def test_bulk_copy():
    x, out = np.arange(128, dtype=np.uint32), np.zeros(64, np.uint32)
    body = (
        BAR.replace("{}", "1")
        + """@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {tx}; @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r11], [%rd1], 256, [%r10];
    {wait} shl.b32 %r16, %r1, 2; add.u32 %r16, %r16, %r11; ld.shared.u32 %r20, [%r16]; mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd2; st.global.u32 [%rd11], %r20;"""
    )
    kw = dict(block=64, arch="sm_90", shared=SHARED)
    for seed in (0, 1):
        launch(body.replace("{tx}", "256").replace("{wait}", WAIT), [x, out], seed=seed, **kw)
        assert (out == x[:64]).all()
    for seed in (0, 1, 2):
        with pytest.raises((MissingWait, SharedRace, Uninitialized)):
            launch(body.replace("{tx}", "256").replace("{wait}", ""), [x, out], seed=seed, **kw)
    with pytest.raises(MissingWait):  # the issuing warp itself
        launch(body.replace("{tx}", "256").replace("{wait}", ""), [x, out], **{**kw, "block": 32})
    with pytest.raises((MissingWait, SharedRace, Uninitialized)):  # only warp 0 waits
        launch(
            body.replace("{tx}", "256").replace("{wait}", "setp.ge.u32 %p3, %r1, 32; @%p3 bra R;" + WAIT + "R:"),
            [x, out],
            initcheck=False,
            **kw,
        )
    with pytest.raises(Deadlock):
        launch(body.replace("{tx}", "512").replace("{wait}", WAIT), [x, out], **kw)
    with pytest.raises(ptxemu.OutOfBounds):
        launch(body.replace("{tx}", "256").replace("{wait}", WAIT), [x[:40].copy(), out], **kw)
