"""Every check: a kernel that violates it must fail with the right exception, its repaired twin must pass."""

import numpy as np
import pytest

from tools import ptxemu
from tools.ptxemu import (
    Deadlock,
    Divergence,
    GlobalRace,
    LaunchError,
    Misaligned,
    MissingWait,
    OutOfBounds,
    ReadOnly,
    SharedRace,
    Trap,
    Uninitialized,
    UninitializedRegister,
)

from .launching import launch, ptx

INDEX = "mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1;"
SMEM = ".shared .align 16 .b8 buf[1024];"
ADDR = "mov.u32 %r10, buf; shl.b32 %r11, %r1, 2; add.u32 %r12, %r10, %r11;"  # own word of buf


def zeros(n=64):
    return np.zeros(n, np.uint32)


def fails(exc, body, args, good=None, **kw):
    with pytest.raises(exc) as e:
        launch(body, args, **kw)
    if good is not None:
        launch(good, args, **kw)
    return e.value


def test_global_bounds_and_report():
    e = fails(
        OutOfBounds,
        INDEX + "\n    ld.global.u32 %r20, [%rd11+4];",
        [zeros(32)],
        INDEX + "ld.global.u32 %r20, [%rd11];",
    )
    assert e.thread == [31, 0, 0] and e.cta == [0, 0, 0] and "ld.global.u32 %r20, [%rd11+4];" in e.text and e.line > 5
    assert "argument 0, byte 128 of 128" in str(e)
    fails(OutOfBounds, INDEX + "st.global.u32 [%rd11+-4], %r1;", [zeros(32)])
    fails(OutOfBounds, INDEX + "red.global.add.u32 [%rd11+128], %r1;", [zeros(32)])
    a, b = np.zeros(64, np.uint32), zeros(32)
    fails(OutOfBounds, INDEX + "st.global.u32 [%rd11+128], %r1;", [b, a])  # never lands in the neighbour
    launch(INDEX + "st.global.u32 [%rd11+128], %r1;", [a[:32]])  # the storage of a view is registered whole
    fails(OutOfBounds, "mov.u64 %rd5, 0; ld.global.u32 %r20, [%rd5];", [b])


def test_shared_and_local_bounds():
    fails(
        OutOfBounds,
        ADDR + "st.shared.u32 [%r12+900], %r1;",
        [zeros()],
        ADDR + "st.shared.u32 [%r12+896], %r1;",
        shared=SMEM,
    )
    fails(
        OutOfBounds,
        "mov.u64 %rd10, d; st.shared.u32 [%rd10+16], %r1;",
        [zeros()],
        shared=".extern .shared .align 16 .b8 d[];",
        shared_bytes=16,
    )
    fails(
        OutOfBounds,
        "st.local.u32 [loc+16], %r1;",
        [zeros()],
        "st.local.u32 [loc+12], %r1;",
        shared=".local .align 4 .b8 loc[16];",
    )
    fails(
        OutOfBounds,
        ADDR
        + "mov.u32 %r20, 5; mov.u32 %r21, %r20; mov.u32 %r22, %r20; mov.u32 %r23, 1; shl.b32 %r24, %r1, 4; add.u32 %r24, %r24, %r10; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r24+768];",
        [zeros()],
        shared=SMEM,
    )


def test_alignment():
    fails(
        Misaligned,
        "add.s64 %rd11, %rd1, 4; ld.global.v2.u32 {%r20, %r21}, [%rd11];",
        [zeros()],
        "ld.global.v2.u32 {%r20, %r21}, [%rd1+8];",
    )
    fails(Misaligned, "st.global.u32 [%rd1+2], 0;", [zeros()])
    fails(
        Misaligned,
        "mov.u32 %r10, buf; st.shared.v4.u32 [%r10+8], {%r1, %r1, %r1, %r1};",
        [zeros()],
        shared=SMEM,
    )
    fails(
        Misaligned,
        "mov.u32 %r10, buf; cp.async.cg.shared.global [%r10], [%rd1+8], 16; cp.async.wait_all;",
        [zeros()],
        shared=SMEM,
        block=1,
    )


RACE = (
    ADDR
    + "st.shared.u32 [%r12], %r1; {} xor.b32 %r13, %r11, 128; add.u32 %r14, %r10, %r13; ld.shared.u32 %r20, [%r14];"
)


def test_shared_races():
    e = fails(
        SharedRace,
        RACE.replace("{}", ""),
        [zeros()],
        RACE.replace("{}", "bar.sync 0;"),
        shared=SMEM,
        block=64,
        initcheck=False,
    )
    assert "st.shared.u32" in str(e) and "ld.shared.u32" in str(e)  # both instructions are named
    with pytest.raises((SharedRace, Uninitialized)):  # with the initialisation check, whichever comes first
        launch(RACE.replace("{}", ""), [zeros()], shared=SMEM, block=64)
    launch(RACE.replace("{}", "").replace("128", "64"), [zeros()], shared=SMEM, block=64)  # within a warp
    war = (
        ADDR
        + "st.shared.u32 [%r12], 1; bar.sync 0; xor.b32 %r13, %r11, 128; add.u32 %r14, %r10, %r13; ld.shared.u32 %r20, [%r14]; {} st.shared.u32 [%r12], 2;"
    )
    fails(SharedRace, war.replace("{}", ""), [zeros()], war.replace("{}", "bar.sync 0;"), shared=SMEM, block=64)
    one_way = (
        ADDR
        + """st.shared.u32 [%r12], 1; bar.sync 0; mov.u32 %r13, %warpid; setp.eq.u32 %p1, %r13, 1; @%p1 ld.shared.u32 %r20, [%r12+-128]; {} @!%p1 st.shared.u32 [%r12], 2;"""
    )
    for named in ("", "bar.sync 1, 64;"):  # with epochs, and with vector clocks
        launch(named + one_way.replace("{}", "bar.sync 0;"), [zeros()], shared=SMEM, block=64)
        seen = [
            str(fails(SharedRace, named + one_way.replace("{}", ""), [zeros()], shared=SMEM, block=64, seed=s))
            for s in range(12)
        ]
        assert any("a read of warp 1" in t for t in seen) and any(
            "a write of warp 0" in t for t in seen
        )  # found in either order
    waw = "mov.u32 %r10, buf; mov.u32 %r13, %warpid; st.shared.u32 [%r10], %r13;"
    fails(SharedRace, waw, [zeros()], shared=SMEM, block=64)
    same = "mov.u32 %r10, buf; st.shared.u32 [%r10], 7;"
    launch(same, [zeros()], shared=SMEM, block=64)
    fails(SharedRace, same, [zeros()], shared=SMEM, block=64, strict_same_value=True)
    fails(
        SharedRace, "mov.u32 %r10, buf; st.shared.u32 [%r10], %r1;", [zeros()], shared=SMEM
    )  # lanes of one instruction
    launch(
        "mov.u32 %r10, buf; atom.shared.exch.b32 %r20, [%r10], %r1;",
        [zeros()],
        shared=SMEM,
        block=64,
        initcheck=False,
    )
    mixed = "mov.u32 %r10, buf; st.shared.u32 [%r10], 0; {} atom.shared.add.u32 %r20, [%r10], %r1;"
    fails(
        SharedRace,
        mixed.replace("{}", ""),
        [zeros()],
        mixed.replace("{}", "bar.sync 0;"),
        shared=SMEM,
        block=64,
    )
    launch(RACE.replace("{}", ""), [zeros()], shared=SMEM, block=64, racecheck=False, initcheck=False)


def test_subword_races_are_precise():
    """Two warps share words but not bytes; then they do share them."""
    halves = "mov.u32 %r10, buf; mov.u32 %r13, %warpid; shl.b32 %r13, %r13, 1; mov.u32 %r14, %laneid; shl.b32 %r15, %r14, 2; add.u32 %r16, %r15, %r13; add.u32 %r16, %r16, %r10; cvt.u16.u32 %h1, %r1; st.shared.u16 [%r16], %h1;"
    launch(halves, [zeros()], shared=SMEM, block=64)
    fails(
        SharedRace,
        halves.replace("shl.b32 %r13, %r13, 1;", "mov.u32 %r13, 0;"),
        [zeros()],
        shared=SMEM,
        block=64,
    )
    after = halves + "{} sub.u32 %r16, %r16, %r13; ld.shared.u32 %r20, [%r16];"
    fails(
        SharedRace,
        after.replace("{}", ""),
        [zeros()],
        after.replace("{}", "bar.sync 0;"),
        shared=SMEM,
        block=64,
        initcheck=False,
    )


def test_named_barriers_order_only_their_warps():
    body = (
        ADDR
        + """setp.ge.u32 %p1, %r1, 64; @%p1 bra OTHER; st.shared.u32 [%r12], %r1; bar.sync 1, 64; xor.b32 %r13, %r11, 128; add.u32 %r14, %r10, %r13; ld.shared.u32 %r20, [%r14]; bra END;
OTHER: {} END: """
    )
    launch(body.replace("{}", "mov.u32 %r20, 0;"), [zeros()], shared=SMEM, block=128)
    fails(
        SharedRace,
        body.replace("{}", "ld.shared.u32 %r20, [%r10];").replace("END: ", "END:"),
        [zeros()],
        shared=SMEM,
        block=128,
        seed=3,
        initcheck=False,
    )
    produce = (
        ADDR
        + """mov.u32 %r15, %warpid; setp.ne.u32 %p1, %r15, 0; @%p1 bra CONSUMER; st.shared.u32 [%r12], %r1; {} bra END;
CONSUMER: bar.sync 2, 64; mov.u32 %r14, %laneid; shl.b32 %r14, %r14, 2; add.u32 %r14, %r14, %r10; ld.shared.u32 %r20, [%r14]; END: """
    )
    launch(produce.replace("{}", "bar.arrive 2, 64;"), [zeros()], shared=SMEM, block=64)
    early = produce.replace("st.shared.u32 [%r12], %r1; {}", "bar.arrive 2, 64; st.shared.u32 [%r12], %r1;")
    fails(SharedRace, early, [zeros()], shared=SMEM, block=64, initcheck=False)


def test_uninitialised_memory():
    fails(
        Uninitialized,
        ADDR + "ld.shared.u32 %r20, [%r12];",
        [zeros()],
        ADDR + "st.shared.u32 [%r12], 0; ld.shared.u32 %r20, [%r12];",
        shared=SMEM,
    )
    launch(ADDR + "ld.shared.u32 %r20, [%r12];", [zeros()], shared=SMEM, initcheck=False)
    x = zeros(32)
    with pytest.raises(Uninitialized):
        launch(INDEX + "ld.global.u32 %r20, [%rd11];", [x], uninitialized=[x])
    with pytest.raises(Uninitialized):
        launch(INDEX + "red.global.add.u32 [%rd11], 1;", [x], uninitialized=[x])
    launch(
        INDEX + "st.global.u32 [%rd11], 1; ld.global.u32 %r20, [%rd11]; red.global.add.u32 [%rd11], 1;",
        [x],
        uninitialized=[x],
    )
    fails(UninitializedRegister, "add.u32 %r20, %r21, 1;", [x])
    fails(UninitializedRegister, "setp.eq.u32 %p2, %r1, 3; @%p2 mov.u32 %r21, 0; add.u32 %r20, %r21, 1;", [x])
    fails(UninitializedRegister, "@%p3 mov.u32 %r21, 0;", [x])
    launch("add.u32 %r20, %r21, 1;", [x], registers=False)
    out = np.zeros(2, np.float32)  # unchecked, an unwritten register is a NaN
    launch(
        "st.global.f32 [%rd1], %f9; cvt.rn.f32.f64 %f1, %fd3; st.global.f32 [%rd1+4], %f1;",
        [out],
        block=1,
        registers=False,
    )
    assert np.isnan(out).all()


LEFT_OUT = (
    INDEX + "setp.lt.u32 %p2, %r1, 4; @%p2 ld.global.u32 %r21, [%rd11]; {between} add.u32 %r23, %r22, %r21; {use}"
)
SHUFFLED = "shfl.sync.bfly.b32 %r22, %r21, 2, 31, -1;"


def test_what_a_guarded_load_leaves_out_may_be_computed_with_but_not_used():
    """Triton 3.6 reduces what four lanes loaded in all 32 of a warp, and lets the four store the result."""
    x = np.arange(32, dtype=np.uint32)
    launch(LEFT_OUT.format(between=SHUFFLED, use="@%p2 st.global.u32 [%rd11], %r23;"), [x])
    assert x[:5].tolist() == [2, 4, 2, 4, 4]
    used = [
        "st.global.u32 [%rd11], %r23;",
        "st.global.u32 [%rd11], %r21;",
        "@!%p2 ld.global.u32 %r24, [%rd11]; st.global.u32 [%rd11], %r23;",  # of another register
        "mul.wide.u32 %rd12, %r23, 0; add.s64 %rd12, %rd12, %rd11; st.global.u32 [%rd12], %r1;",
        "setp.eq.u32 %p3, %r23, 0; @%p3 st.global.u32 [%rd11], %r1;",
        "setp.eq.u32 %p3, %r23, 0; @%p3 bra END; END:",
        "setp.eq.u32 %p3, %r23, 0; vote.sync.any.pred %p5, %p3, -1;",
        "redux.sync.add.u32 %r24, %r23, -1;",
        "add.cc.u32 %r24, %r23, 1;",
        "red.global.add.u32 [%rd11], %r23;",
        "shfl.sync.idx.b32 %r24, %r1, %r23, 31, -1;",
        "mov.u32 %r24, 1; mov.u32 %r24, %r23; st.global.u32 [%rd11], %r24;",  # written over
    ]
    for use in used:
        e = fails(UninitializedRegister, LEFT_OUT.format(between=SHUFFLED, use=use), [zeros()])
        assert "left out" in str(e) and e.thread[0] >= 4, use
    # Lane 2 reads lane 4, which has loaded nothing; and a register that no load names is not let off.
    apart = LEFT_OUT.format(between=SHUFFLED.replace("2, 31", "4, 31"), use="@%p2 st.global.u32 [%rd11], %r23;")
    assert fails(UninitializedRegister, apart, [zeros()]).thread == [0, 0, 0]
    fails(UninitializedRegister, LEFT_OUT.format(between="mov.u32 %r22, %r25;", use=""), [zeros()])
    launch(LEFT_OUT.format(between="@!%p2 mov.u32 %r21, 0; mov.u32 %r22, %r21;", use=used[0]), [x])


def test_read_only():
    x = zeros(32)
    with pytest.raises(ReadOnly):
        launch(INDEX + "st.global.u32 [%rd11], 1;", [x], readonly=[x])
    with pytest.raises(ReadOnly):
        launch(INDEX + "red.global.add.u32 [%rd11], 1;", [x], readonly=[x])
    launch(INDEX + "ld.global.u32 %r20, [%rd11];", [x], readonly=[x])


def test_cp_async_waits():
    copy = "mov.u32 %r10, buf; shl.b32 %r11, %r1, 4; add.u32 %r12, %r10, %r11; mul.wide.u32 %rd10, %r1, 16; add.s64 %rd11, %rd10, %rd1; cp.async.cg.shared.global [%r12], [%rd11], 16; cp.async.commit_group;"
    x = zeros(256)
    wait = "cp.async.wait_group 0;"
    own = copy + "{} ld.shared.u32 %r20, [%r12];"
    fails(MissingWait, own.replace("{}", ""), [x], own.replace("{}", wait), shared=SMEM)
    other = copy + "{} xor.b32 %r13, %r11, 512; add.u32 %r14, %r10, %r13; ld.shared.u32 %r20, [%r14];"
    fails(
        MissingWait,
        other.replace("{}", "bar.sync 0;"),
        [x],
        other.replace("{}", wait + "bar.sync 0;"),
        shared=SMEM,
        block=64,
    )
    with pytest.raises((SharedRace, MissingWait, Uninitialized)):
        launch(other.replace("{}", wait), [x], shared=SMEM, block=64)
    fails(MissingWait, own.replace("{}", "st.shared.u32 [%r12], 0;"), [x], shared=SMEM)
    fails(MissingWait, copy, [x], copy + wait, shared=SMEM)  # still in flight at exit


def test_divergence():
    half = "setp.lt.u32 %p1, %r1, 16; "
    e = fails(
        Divergence,
        half + "@%p1 shfl.sync.bfly.b32 %r20, %r1, 1, 31, -1;",
        [zeros()],
        "shfl.sync.bfly.b32 %r20, %r1, 1, 31, -1;",
    )
    assert "predicated off" in str(e)
    both = (
        half
        + "@%p1 bra L; shfl.sync.bfly.b32 %r20, %r1, 1, 31, {}; bra END; L: shfl.sync.bfly.b32 %r20, %r1, 1, 31, {}; END: "
    )
    e = fails(Divergence, both.format(-1, -1), [zeros()], both.format(0xFFFF0000, 0xFFFF))
    assert "wait for other lanes" in str(e)
    launch(
        half + "@%p1 bra L; bra END; L: shfl.sync.bfly.b32 %r20, %r1, 1, 31, -1; END: ", [zeros()]
    )  # exited threads are not waited for
    fails(
        Divergence, half + "@!%p1 bra END; shfl.sync.bfly.b32 %r20, %r1, 16, 31, 65535; END: ", [zeros()]
    )  # reads a lane outside
    fails(Divergence, "shfl.sync.bfly.b32 %r20, %r1, 1, 31, 65535;", [zeros()])  # executed by non-members
    fails(Divergence, half + "@%p1 bar.sync 0;", [zeros()], block=64)
    fails(Divergence, half + "@%p1 bra L; bar.sync 0; bra END; L: bar.sync 0; END: ", [zeros()], block=64)
    launch(half + "@%p1 bra L; mov.u32 %r20, 1; L: bar.sync 0;", [zeros()], block=64)  # reconverges
    launch(half + "@%p1 ret; bar.sync 0;", [zeros()], block=64)  # exited threads do not count
    mma = "mov.u32 %r20, 0; mov.f32 %f1, 0f00000000; {} mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f1,%f1,%f1}, {%r20,%r20,%r20,%r20}, {%r20,%r20}, {%f1,%f1,%f1,%f1};"
    launch(mma.replace("{}", ""), [zeros()])
    fails(Divergence, half + mma.replace("{}", "@%p1"), [zeros()])
    fails(Divergence, half + mma.replace("{}", "@%p1 ret;"), [zeros()])
    fails(Divergence, mma.replace("{}", ""), [zeros()], block=48)
    fails(Divergence, half + mma.replace("{}", "@!%p1 bra END;") + " END: ", [zeros()])


def test_deadlocks():
    e = fails(
        Deadlock,
        "mov.u32 %r10, %warpid; setp.eq.u32 %p1, %r10, 0; @%p1 bra L; bar.sync 1, 96; L: bar.sync 0;",
        [zeros()],
        block=64,
    )
    assert "warp 0" in str(e) and "warp 1" in str(e)
    fails(
        Deadlock,
        "L: ld.volatile.global.u32 %r20, [%rd1]; setp.eq.u32 %p1, %r20, 0; @%p1 bra L;",
        [zeros()],
        max_instructions=100000,
    )


def test_global_races():
    one = "st.global.u32 [%rd1], %r2;"  # the CTA index
    fails(GlobalRace, one, [zeros()], grid=4, block=1)
    launch("st.global.u32 [%rd1], 5;", [zeros()], grid=4, block=1)
    fails(GlobalRace, "st.global.u32 [%rd1], 5;", [zeros()], grid=4, block=1, strict_same_value=True)
    launch("red.global.add.u32 [%rd1], 5;", [zeros()], grid=4, block=1)
    fails(GlobalRace, "red.global.add.u32 [%rd1], 5; ld.global.u32 %r20, [%rd1];", [zeros()], grid=4, block=1)
    neighbour = INDEX + "st.global.u32 [%rd11], %r1; ld.global.u32 %r20, [%rd11+{}];"
    fails(GlobalRace, neighbour.replace("{}", "4"), [zeros(129)], grid=4)
    launch(neighbour.replace("{}", "0"), [zeros(129)], grid=4)
    launch(
        INDEX.replace("4;", "2;", 1) + "cvt.u16.u32 %h1, %r1; st.global.u16 [%rd11], %h1;",
        [zeros()],
        grid=5,
        block=9,
    )  # neighbours share words, not halfwords
    launch(one, [zeros()], grid=4, block=1, global_racecheck=False)
    for seed in (0, 1, 2):
        last = """mul.wide.u32 %rd10, %r2, 4; add.s64 %rd11, %rd10, %rd2; st.global.u32 [%rd11], %r2; {} atom.global.add.u32 %r20, [%rd1], 1; setp.ne.u32 %p1, %r20, 3; @%p1 ret; {}
        ld.global.u32 %r21, [%rd2]; ld.global.u32 %r22, [%rd2+12]; add.u32 %r21, %r21, %r22; st.global.u32 [%rd3], %r21;"""
        out = zeros(1)
        launch(
            last.replace("{}", "membar.gl;"), [zeros(1), zeros(4), out], grid=4, block=1, seed=seed
        )  # the "last block" pattern
        assert out[0] == 3
        fails(GlobalRace, last.replace("{}", ""), [zeros(1), zeros(4), out], grid=4, block=1, seed=seed)


def test_grid_barrier_makes_progress():
    body = """membar.gl; atom.global.add.u32 %r20, [%rd1], 1; L: ld.acquire.gpu.global.u32 %r21, [%rd1]; setp.lt.u32 %p1, %r21, 6; @%p1 bra L;
    mul.wide.u32 %rd10, %r2, 4; add.s64 %rd11, %rd10, %rd2; st.global.u32 [%rd11], %r21;"""
    for seed in (0, 1):
        out = zeros(6)
        launch(body, [zeros(1), out], grid=6, block=1, seed=seed)
        assert (out == 6).all()


def test_trap_and_launch_errors():
    fails(Trap, "setp.eq.u32 %p1, %r1, 7; @%p1 trap;", [zeros()])
    with pytest.raises(LaunchError):
        launch("", [zeros()], block=2048)
    with pytest.raises(LaunchError):
        launch("", [zeros()], shared_bytes=170000)
    with pytest.raises(TypeError):
        ptxemu.Module(ptx("", 2)).launch("k", 1, 32, 0, [zeros()])
    with pytest.raises(ptxemu.SyntaxFault):
        ptxemu.Module(".version 8.0\n.target sm_80\n???")
    m = ptxemu.Module(ptx("bra NOWHERE;"))
    assert "NOWHERE" in m.broken["k"]


def test_source_lines():
    text = ptx(".loc 1 42 7\n" + INDEX + "\n.loc 1 43 1\nld.global.u32 %r20, [%rd11+4];").replace(
        ".visible", '.file 1 "kernel.cu"\n.visible', 1
    )
    with pytest.raises(OutOfBounds) as e:
        ptxemu.Module(text).launch("k", 1, 32, 0, [zeros(32)] * 3)
    assert e.value.source == "kernel.cu:43" and "kernel.cu:43" in str(e.value)


def test_order_independence_probe():
    out = np.zeros(1, np.float32)
    good, bad = "red.global.add.u32 [%rd1], %r1;", "atom.global.exch.b32 %r20, [%rd1], %r1;"

    def go(body):
        def run(seed):
            out[:] = 0
            launch(body, [out], grid=8, block=64, seed=seed)

        return run

    ptxemu.assert_order_independent(go(good), lambda: out)
    with pytest.raises(AssertionError, match="depends on the schedule"):
        ptxemu.assert_order_independent(go(bad), lambda: out)


def test_same_seed_same_result():
    x = np.random.default_rng(0).standard_normal(2048).astype(np.float32)
    results = []
    for seed in (0, 0, 7, 7, 8):
        out = np.zeros(1, np.float32)
        launch(
            "mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1; ld.global.f32 %f1, [%rd11]; red.global.add.f32 [%rd2], %f1;",
            [x, out],
            grid=32,
            block=64,
            seed=seed,
        )
        results.append(float(out[0]))
    assert results[0] == results[1] and results[2] == results[3] and len(set(results)) > 1


def test_approx_noise_stays_within_bounds():
    x = np.linspace(-10, 10, 32).astype(np.float32)
    exact, noisy = np.zeros(32, np.float32), np.zeros(32, np.float32)
    body = "mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd1; ld.global.f32 %f1, [%rd11]; ex2.approx.f32 %f2, %f1; add.s64 %rd12, %rd10, %rd2; st.global.f32 [%rd12], %f2;"
    launch(body, [x, exact])
    launch(body, [x, noisy], approx_noise=True)
    d = np.abs(exact.view(np.int32) - noisy.view(np.int32))
    assert d.max() <= 2 and d.max() > 0


def test_races_between_warps_of_one_cta_in_global_memory():
    at = "mul.wide.s32 %rd20, %r1, 4; add.s64 %rd21, %rd1, %rd20; xor.b32 %r3, %r1, 32; mul.wide.s32 %rd20, %r3, 4; add.s64 %rd22, %rd1, %rd20;"
    cases = (
        at + "st.global.u32 [%rd21], %r1; {} ld.global.u32 %r20, [%rd22];",  # a read after a write
        at + "ld.global.u32 %r20, [%rd22]; {} st.global.u32 [%rd21], %r1;",  # a write after a read
        at + "st.global.u32 [%rd21], %r1; {} st.global.u32 [%rd22], %r1;",
        at + "bar.sync 1, 64; st.global.u32 [%rd21], %r1; {} ld.global.u32 %r20, [%rd22];",  # with vector clocks
    )
    for body in cases:
        for seed in range(4):
            e = fails(
                GlobalRace,
                body.replace("{}", ""),
                [zeros()],
                body.replace("{}", "bar.sync 0;"),
                block=64,
                warp_racecheck=True,
                seed=seed,
            )
            assert "of this CTA, and no barrier orders them" in str(e)
        launch(body.replace("{}", ""), [zeros()], block=64)  # only where it is asked for
    launch("red.global.add.u32 [%rd1], 5;", [zeros()], block=64, warp_racecheck=True)
    launch("st.global.u32 [%rd1], 5;", [zeros()], block=64, warp_racecheck=True)
