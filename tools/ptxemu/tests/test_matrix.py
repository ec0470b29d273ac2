"""mma, ldmatrix, stmatrix, movmatrix, cp.async against layouts written down from the PTX ISA tables, and exact arithmetic."""

import numpy as np
import pytest

from tools import ptxemu

from .launching import launch

LANE = np.arange(32)
G, Q = LANE // 4, LANE % 4


def bf16(x):
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


def element_a(shape_k, size):
    """[(row, column)] of every element of the A fragment: [register][position in register] -> arrays over lanes (16 x K matrices)."""
    per = 4 // size
    regs = []
    for r in range(shape_k * size // 8):
        regs.append([(G + 8 * (r % 2), Q * per + i + 4 * per * (r // 2)) for i in range(per)])
    return regs


def element_b(shape_k, size):
    per = 4 // size
    return [[(Q * per + i + 4 * per * r, G) for i in range(per)] for r in range(shape_k * size // 16)]


ELEMENT_C = [(G + 8 * (r // 2), 2 * Q + r % 2) for r in range(4)]


def fragments(matrix, layout, size):
    """matrix of unsigned codes -> [registers, 32] uint32."""
    out = np.zeros((len(layout), 32), np.uint32)
    for r, reg in enumerate(layout):
        for i, (row, col) in enumerate(reg):
            out[r] |= matrix[row, col].astype(np.uint32) << np.uint32(8 * size * i)
    return out


def run_mma(shape, types, a, b, c, arch="sm_80", half_c=False, sat="", **kw):
    na, nb, nc = len(a), len(b), len(c)
    frag = np.concatenate([a, b, c]).astype(np.uint32)
    out = np.zeros((nc, 32), np.uint32)
    body = "mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1; add.s64 %rd12, %rd10, %rd2;"
    body += "".join(f"ld.global.b32 %r{20 + i}, [%rd11+{128 * i}];" for i in range(na + nb + nc))
    regs = lambda first, n: "{" + ", ".join(f"%r{first + i}" for i in range(n)) + "}"
    body += f"mma.sync.aligned.{shape}.row.col{sat}.{types} {regs(60, nc)}, {regs(20, na)}, {regs(20 + na, nb)}, {regs(20 + na + nb, nc)};"
    body += "".join(f"st.global.b32 [%rd12+{128 * i}], %r{60 + i};" for i in range(nc))
    launch(body, [frag, out], arch=arch, **kw)
    return out


def toward_zero(x):
    f = x.astype(np.float32)
    return np.where(np.abs(f.astype(np.float64)) > np.abs(x), np.nextafter(f, np.float32(0)), f)


FLOAT_FORMS = [
    ("m16n8k16", "bf16", 16, 2),
    ("m16n8k8", "bf16", 8, 2),
    ("m16n8k16", "f16", 16, 2),
    ("m16n8k8", "f16", 8, 2),
    ("m16n8k8", "tf32", 8, 4),
    ("m16n8k4", "tf32", 4, 4),
]


@pytest.mark.parametrize("shape,dtype,k,size", FLOAT_FORMS)
def test_mma_float(rng, shape, dtype, k, size):
    for scale in (1.0, 1e-3, 300.0):
        A, B, C = (
            rng.standard_normal((16, k)) * scale,
            rng.standard_normal((k, 8)),
            (rng.standard_normal((16, 8)) * scale).astype(np.float32),
        )
        if dtype == "bf16":
            ca, cb = bf16(A), bf16(B)
            A, B = from_bf16(ca).astype(np.float64), from_bf16(cb).astype(np.float64)
        elif dtype == "f16":
            ca, cb = A.astype(np.float16).view(np.uint16), B.astype(np.float16).view(np.uint16)
            A, B = A.astype(np.float16).astype(np.float64), B.astype(np.float16).astype(np.float64)
        else:
            ca, cb = A.astype(np.float32).view(np.uint32), B.astype(np.float32).view(np.uint32)
            A, B = (
                (v & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for v in (ca, cb)
            )  # the low 13 bits are ignored
        cf = np.stack([C[r, c].view(np.uint32) for r, c in ELEMENT_C])
        got = run_mma(
            shape,
            f"f32.{dtype}.{dtype}.f32",
            fragments(ca, element_a(k, size), size),
            fragments(cb, element_b(k, size), size),
            cf,
        )
        block = {2: 8, 4: 4}[size]
        D = C.astype(np.float64)
        for k0 in range(0, k, block):
            D = toward_zero(D + A[:, k0 : k0 + block] @ B[k0 : k0 + block]).astype(np.float64)
        want = np.stack([D[r, c] for r, c in ELEMENT_C]).astype(np.float32)
        g = got.view(np.float32)
        assert (np.abs(g - want) <= np.spacing(np.abs(want))).all() and (g == want).mean() > 0.98, (
            shape,
            dtype,
            scale,
        )
        exact = np.stack([(C + A @ B)[r, c] for r, c in ELEMENT_C])
        if scale == 1.0:  # truncation is biased toward zero, and rounding to nearest is closer
            near = run_mma(
                shape,
                f"f32.{dtype}.{dtype}.f32",
                fragments(ca, element_a(k, size), size),
                fragments(cb, element_b(k, size), size),
                cf,
                rounding="rn",
            ).view(np.float32)
            assert np.abs(near - exact).sum() < np.abs(g - exact).sum()


def test_mma_f16_accumulators(rng):
    A, B, C = (rng.standard_normal(s).astype(np.float16) for s in ((16, 16), (16, 8), (16, 8)))
    layout_c = [[(G + 8 * r, 2 * Q + i) for i in range(2)] for r in range(2)]
    got = run_mma(
        "m16n8k16",
        "f16.f16.f16.f16",
        fragments(A.view(np.uint16), element_a(16, 2), 2),
        fragments(B.view(np.uint16), element_b(16, 2), 2),
        fragments(C.view(np.uint16), layout_c, 2),
    )
    want = C.astype(np.float64) + A.astype(np.float64) @ B.astype(np.float64)
    for r in range(2):
        for i in range(2):
            g = ((got[r] >> 16 * i) & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
            w = want[layout_c[r][i]]
            assert np.abs(g - w).max() <= 2**-9 * np.abs(want).max()


@pytest.mark.parametrize("ta,tb", [("s8", "s8"), ("u8", "s8"), ("s8", "u8"), ("u8", "u8")])
@pytest.mark.parametrize("k", [16, 32])
def test_mma_int8(rng, ta, tb, k):
    dt = {"s8": np.int8, "u8": np.uint8}
    A, B = (
        rng.integers(np.iinfo(dt[t]).min, np.iinfo(dt[t]).max, s).astype(dt[t])
        for t, s in ((ta, (16, k)), (tb, (k, 8)))
    )
    C = rng.integers(-(10**6), 10**6, (16, 8)).astype(np.int32)
    got = run_mma(
        f"m16n8k{k}",
        f"s32.{ta}.{tb}.s32",
        fragments(A.view(np.uint8), element_a(k, 1), 1),
        fragments(B.view(np.uint8), element_b(k, 1), 1),
        np.stack([C[r, c].view(np.uint32) for r, c in ELEMENT_C]),
    )
    D = C + A.astype(np.int64) @ B.astype(np.int64)
    assert (got.view(np.int32) == np.stack([D[r, c] for r, c in ELEMENT_C])).all()


def test_mma_f64(rng):
    A, B, C = rng.standard_normal((8, 4)), rng.standard_normal((4, 8)), rng.standard_normal((8, 8))
    frag = np.stack([A[G, Q], B[Q, G], C[G, 2 * Q], C[G, 2 * Q + 1]])
    out = np.zeros((2, 32))
    launch(
        """mul.wide.u32 %rd10, %r1, 8; add.s64 %rd11, %rd10, %rd1; add.s64 %rd12, %rd10, %rd2; ld.global.f64 %fd1, [%rd11]; ld.global.f64 %fd2, [%rd11+256]; ld.global.f64 %fd3, [%rd11+512]; ld.global.f64 %fd4, [%rd11+768];
    mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd5, %fd6}, {%fd1}, {%fd2}, {%fd3, %fd4}; st.global.f64 [%rd12], %fd5; st.global.f64 [%rd12+256], %fd6;""",
        [frag, out],
    )
    D = C + A @ B
    assert np.abs(out - np.stack([D[G, 2 * Q], D[G, 2 * Q + 1]])).max() < 1e-14


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_stmatrix(rng, n, trans):
    tiles = rng.integers(0, 65536, (n, 8, 8)).astype(np.uint16)
    out, back = np.zeros((n, 32), np.uint32), np.zeros((n, 8, 8), np.uint16)
    regs = "{" + ", ".join(f"%r{20 + i}" for i in range(n)) + "}"
    words = n * 32
    body = """mov.u32 %r10, buf; mul.lo.u32 %r11, %r1, 4; add.u32 %r12, %r10, %r11; mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1;"""
    body += "".join(f"ld.global.b32 %r30, [%rd11+{128 * i}]; st.shared.b32 [%r12+{128 * i}], %r30;" for i in range(n))
    body += f"bar.warp.sync -1; and.b32 %r13, %r1, {8 * n - 1}; shl.b32 %r13, %r13, 4; add.u32 %r13, %r13, %r10; ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {regs}, [%r13];"
    body += "add.s64 %rd12, %rd10, %rd2;" + "".join(f"st.global.b32 [%rd12+{128 * i}], %r{20 + i};" for i in range(n))
    body += f"stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%r13+512], {regs}; bar.warp.sync -1; add.s64 %rd13, %rd10, %rd3;"
    body += "".join(
        f"ld.shared.b32 %r30, [%r12+{512 + 128 * i}]; st.global.b32 [%rd13+{128 * i}], %r30;" for i in range(n)
    )
    launch(body, [tiles, out, back], shared=".shared .align 16 .b8 buf[1024];", arch="sm_90")
    for k in range(n):
        t = tiles[k].T if trans else tiles[k]
        assert (out[k] == (t[G, 2 * Q].astype(np.uint32) | t[G, 2 * Q + 1].astype(np.uint32) << 16)).all()
    assert (back == tiles).all() and words


def test_movmatrix(rng):
    t = rng.integers(0, 65536, (8, 8)).astype(np.uint16)
    x, out = (
        (t[G, 2 * Q].astype(np.uint32) | t[G, 2 * Q + 1].astype(np.uint32) << 16),
        np.zeros(32, np.uint32),
    )
    launch(
        "mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1; ld.global.b32 %r20, [%rd11]; movmatrix.sync.aligned.m8n8.trans.b16 %r21, %r20; add.s64 %rd12, %rd10, %rd2; st.global.b32 [%rd12], %r21;",
        [x, out],
    )
    assert (out == (t.T[G, 2 * Q].astype(np.uint32) | t.T[G, 2 * Q + 1].astype(np.uint32) << 16)).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(rng, size):
    x, out = rng.integers(0, 2**32, 32 * size // 4, dtype=np.uint32), np.zeros(32 * size // 4, np.uint32)
    kind = "cg" if size == 16 else "ca"
    body = f"""mul.wide.u32 %rd10, %r1, {size}; add.s64 %rd11, %rd10, %rd1; cvt.u32.u64 %r10, %rd10; mov.u32 %r11, buf; add.u32 %r10, %r10, %r11;
    and.b32 %r12, %r1, 1; setp.eq.u32 %p1, %r12, 0; selp.u32 %r13, {size}, 0, %p1; {{}} add.s64 %rd12, %rd10, %rd2;"""
    body += "".join(
        f"ld.shared.b32 %r20, [%r10+{4 * i}]; st.global.b32 [%rd12+{4 * i}], %r20;" for i in range(size // 4)
    )
    shared = f".shared .align 16 .b8 buf[{32 * size}];"
    for wait in ("cp.async.wait_all;", "cp.async.commit_group; cp.async.wait_group 0;"):
        launch(
            body.replace("{}", f"cp.async.{kind}.shared.global [%r10], [%rd11], {size}; {wait}"),
            [x, out],
            shared=shared,
        )
        assert (out == x).all()
        launch(
            body.replace("{}", f"cp.async.{kind}.shared.global [%r10], [%rd11], {size}, %r13; {wait}"),
            [x, out],
            shared=shared,
        )  # src-size 0: zero fill
        assert (out.reshape(32, -1)[::2] == x.reshape(32, -1)[::2]).all() and (out.reshape(32, -1)[1::2] == 0).all()
    with pytest.raises(ptxemu.MissingWait):  # the second group is still in flight
        launch(
            body.replace(
                "{}",
                f"cp.async.{kind}.shared.global [%r10], [%rd11], {size}; cp.async.commit_group; cp.async.wait_group 1;",
            ),
            [x, out],
            shared=shared,
        )
