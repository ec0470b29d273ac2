"""Tensor maps and bulk stores: boxes in every swizzle and over every edge against plain loops; additions; what must be waited for."""

import itertools

import numpy as np
import pytest

from tools.ptxemu import (
    Deadlock,
    LaunchError,
    Misaligned,
    MissingWait,
    Module,
    OutOfBounds,
    SharedRace,
    TensorMap,
    Uninitialized,
)

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 p1)
{
  .reg .pred %p<8>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
  .shared .align 8 .b8 bar[8]; .shared .align 1024 .b8 buf[32768];
  ld.param.u64 %rd1, [p1]; mov.b64 %rd2, map; cvta.param.u64 %rd3, %rd2;
  mov.u32 %r1, %tid.x; mov.u32 %r10, bar; mov.u32 %r11, buf; setp.eq.u32 %p1, %r1, 0;
"""
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; fence.mbarrier_init.release.cluster; bar.sync 0;\n"
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0; @!%p2 bra W;\n"


def coordinates(c):
    return "{" + ", ".join(map(str, c)) + "}"


def load(c, n, tx=None):
    return (
        f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {n if tx is None else tx};"
        f"@%p1 cp.async.bulk.tensor.{len(c)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r11], [%rd3, {coordinates(c)}], [%r10];\n"
    )


def words(n, inward):
    """n bytes of shared memory to (or from) p1, a word a thread and turn."""
    move = (
        "ld.global.u32 %r22, [%rd5]; st.shared.u32 [%r21], %r22;"
        if inward
        else "ld.shared.u32 %r22, [%r21]; st.global.u32 [%rd5], %r22;"
    )
    return f"mov.u32 %r20, %r1; setp.ge.u32 %p4, %r20, {n // 4}; @%p4 bra E; L: shl.b32 %r21, %r20, 2; cvt.u64.u32 %rd4, %r21; add.s64 %rd5, %rd4, %rd1; add.u32 %r21, %r21, %r11; {move} add.u32 %r20, %r20, 64; setp.lt.u32 %p3, %r20, {n // 4}; @%p3 bra L; E:\n"


def run(body, tensor_map, image, **kw):
    kw.setdefault("max_instructions", 3_000_000)
    return Module(HEAD + body + "ret;\n}\n").launch("k", 1, 64, 0, [tensor_map, image], **kw)


def place(box, element, swizzle):
    """Offset in shared memory of every element of a box, whose first dimension is the innermost."""
    out = np.zeros(box[::-1], np.int64)
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    for index in itertools.product(*(range(b) for b in box[::-1])):
        a = 0
        for k in range(len(box)):
            a = a * box[::-1][k] + index[k]
        a *= element
        out[index] = a ^ ((a >> 7 & mask) << 4)
    return out


def expected_box(x, c, box, fill):
    out = np.full(box[::-1], fill, x.dtype)
    for index in itertools.product(*(range(b) for b in box[::-1])):
        at = tuple(i + o for i, o in zip(index, c[::-1]))
        if all(0 <= a < s for a, s in zip(at, x.shape)):
            out[index] = x[at]
    return out


CASES = [
    # shape (outermost first), box, swizzle, coordinates (innermost first)
    ((40, 96), (64, 16), 128, (0, 0)),
    ((40, 96), (64, 16), 128, (64, 32)),
    ((40, 96), (32, 24), 64, (-8, -3)),
    ((40, 96), (16, 40), 32, (88, 5)),
    ((40, 96), (96, 8), 0, (8, 36)),
    ((13, 72), (64, 16), 128, (64, 0)),
    ((13, 72), (8, 3), 0, (200, 0)),
    ((5, 9, 40), (32, 4, 3), 64, (16, 7, 3)),
    ((5, 9, 40), (16, 5, 2), 128, (0, 2, -1)),
    ((256,), (64,), 0, (224,)),
]


@pytest.mark.parametrize("shape,box,swizzle,c", CASES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_load(rng, shape, box, swizzle, c, dtype):
    size = np.dtype(dtype).itemsize
    if swizzle and box[0] * size > swizzle:
        box = (box[0] // 2, *box[1:])
    x = rng.standard_normal(shape).astype(dtype)
    n = int(np.prod(box)) * size
    image = np.zeros(-(-n // 256) * 64, np.uint32)
    place_of = place(box, size, swizzle)
    for nan in (False, True):
        for seed in (0, 1):
            run(INIT + load(c, n) + WAIT + words(n, False), TensorMap(x, box, swizzle, nan_fill=nan), image, seed=seed)
            got = np.frombuffer(image.tobytes(), np.uint8)
            got = np.stack([got[place_of + k] for k in range(size)], -1).copy().view(dtype)[..., 0]
            want = expected_box(x, c, box, np.nan if nan else 0)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape,box,swizzle,c", CASES)
@pytest.mark.parametrize("add", [False, True])
def test_store_and_add(rng, shape, box, swizzle, c, add):
    if swizzle and box[0] * 4 > swizzle:
        box = (box[0] // 2, *box[1:])
    x = rng.integers(-9, 9, shape).astype(np.float32)
    before = x.copy()
    n = int(np.prod(box)) * 4
    image = np.zeros(-(-n // 256) * 64, np.float32)
    values = rng.integers(-9, 9, box[::-1]).astype(np.float32)
    image[place(box, 4, swizzle) // 4] = values
    op, kind = ("cp.reduce.async.bulk.tensor", "add.tile") if add else ("cp.async.bulk.tensor", "tile")
    body = (
        words(n, True)
        + "fence.proxy.async.shared::cta; bar.sync 0;"
        + f"@%p1 {op}.{len(c)}d.global.shared::cta.{kind}.bulk_group [%rd3, {coordinates(c)}], [%r11];"
        + "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;\n"
    )
    want = before.copy()
    for index in itertools.product(*(range(b) for b in box[::-1])):
        at = tuple(i + o for i, o in zip(index, c[::-1]))
        if all(0 <= a < s for a, s in zip(at, x.shape)):
            want[at] = values[index] + (before[at] if add else 0)
    for seed in (0, 1):
        x[...] = before
        run(body, TensorMap(x, box, swizzle), image, seed=seed)
        np.testing.assert_array_equal(x, want)
    with pytest.raises(SharedRace):
        run(body.replace("fence.proxy.async.shared::cta;", ""), TensorMap(x, box, swizzle), image)
    with pytest.raises(MissingWait):
        run(body.replace("@%p1 cp.async.bulk.wait_group.read 0;", ""), TensorMap(x, box, swizzle), image)
    with pytest.raises(MissingWait):  # the buffer is written again too early
        run(
            body.replace("@%p1 cp.async.bulk.wait_group.read 0;", "bar.sync 0; st.shared.u32 [%r11], %r1;"),
            TensorMap(x, box, swizzle),
            image,
        )


ONE = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p1, .param .u64 p2)
{
  .reg .pred %p<8>; .reg .b32 %r<40>; .reg .b64 %rd<20>; .shared .align 128 .b8 buf[512];
  ld.param.u64 %rd1, [p1]; ld.param.u64 %rd2, [p2]; mov.u32 %r1, %tid.x; mov.u32 %r11, buf; setp.eq.u32 %p1, %r1, 0;
  shl.b32 %r2, %r1, 2; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd1, %rd3; ld.global.u32 %r3, [%rd4]; add.u32 %r4, %r11, %r2; st.shared.u32 [%r4], %r3;
  fence.proxy.async.shared::cta; bar.sync 0;
  @%p1 {op} [%rd2], [%r11], {n};
  @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;
  ret;
}
"""


@pytest.mark.parametrize(
    "dtype,type_", [(np.float32, "f32"), (np.uint32, "u32"), (np.float16, "noftz.f16"), (np.uint64, "u64")]
)
def test_one_dimensional_stores_and_additions(rng, dtype, type_):
    x, y = (rng.integers(0, 99, 512 // np.dtype(dtype).itemsize).astype(dtype) for _ in range(2))
    for op, want in (
        ("cp.async.bulk.global.shared::cta.bulk_group", x.copy()),
        (f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{type_}", x + y),
    ):
        out = y.copy()
        for ctas in (1, 3):
            out[...] = y
            Module(ONE.replace("{op}", op).replace("{n}", "512")).launch(
                "k", ctas, 128, 0, [x, out], global_racecheck=ctas == 1 or "reduce" in op
            )
            np.testing.assert_array_equal(out, want if "reduce" not in op else (y + ctas * x).astype(dtype))
    with pytest.raises(Misaligned):
        Module(ONE.replace("{op}", op).replace("{n}", "8")).launch("k", 1, 128, 0, [x, y])
    with pytest.raises(OutOfBounds):
        Module(ONE.replace("{op}", op).replace("{n}", "512")).launch("k", 1, 128, 0, [x, y[:8].copy()])


def test_what_is_refused(rng):
    x = rng.standard_normal((32, 64)).astype(np.float16)
    image = np.zeros(1024, np.uint32)
    good = INIT + load((0, 0), 2048) + WAIT + words(2048, False)
    m = TensorMap(x, (64, 16), 128)
    run(good, m, image)
    with pytest.raises((MissingWait, SharedRace, Uninitialized)):
        run(good.replace(WAIT, ""), m, image)
    with pytest.raises(Deadlock):
        run(INIT + load((0, 0), 2048, tx=4096) + WAIT, m, image)
    with pytest.raises(LaunchError):  # three coordinates, a map of two
        run(INIT + load((0, 0, 0), 2048) + WAIT, m, image)
    with pytest.raises(Misaligned):
        run(good.replace("[%r11], [%rd3", "[%r11+64], [%rd3"), m, image)
    with pytest.raises(LaunchError):
        run(good, bytes(128), image)
    with pytest.raises(OutOfBounds):  # a map of more than the tensor holds
        run(good, TensorMap(x[:8].copy(), (64, 16), 128, dims=(64, 32)), image)
    for bad in (
        TensorMap(x, (128, 16), 128),  # a row wider than the swizzle
        TensorMap(x, (64, 257), 128),
        TensorMap(x[:, :60].copy(), (32, 8), 64),  # strides of 120 bytes
        TensorMap(x, (4, 8), 0),  # rows of 8 bytes
        TensorMap(x.view(np.uint16), (64, 16), 128, nan_fill=True),
    ):
        with pytest.raises(ValueError, match="refuses this map"):
            bad.encode(4096)


def test_labels_belong_to_their_braces():
    """Inline assembly that is used twice defines its labels twice."""
    out = np.zeros(2, np.uint32)
    block = "{ .reg .pred q; mov.u32 %r20, 0; T: add.u32 %r20, %r20, 1; setp.lt.u32 q, %r20, {n}; @q bra T; }"
    body = "".join(
        block.replace("{n}", str(n)) + f"@%p1 st.global.u32 [%rd1+{4 * k}], %r20;" for k, n in enumerate((3, 5))
    )
    x = np.zeros((8, 64), np.float16)
    run(body, TensorMap(x, (64, 8), 128), out)
    assert out.tolist() == [3, 5]
