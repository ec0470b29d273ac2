"""Clusters: their registers, barrier.cluster, mapa and arrivals at another CTA's mbarrier, copies to several CTAs; against plain loops,
and what is left out of them seen in some schedule."""

import pathlib

import numpy as np
import pytest

from tools.ptxemu import (
    Deadlock,
    Divergence,
    GlobalRace,
    LaunchError,
    MissingWait,
    Module,
    OutOfBounds,
    SharedRace,
    TensorMap,
    Uninitialized,
    Unsupported,
    nvcc,
)

from .launching import needs_nvcc

HEAD = """.version 8.7
.target {arch}
.address_size 64
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 p1) {attributes}
{
  .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<60>; .reg .b64 %rd<20>;
  .shared .align 8 .b8 full[8]; .shared .align 8 .b8 empty[8]; .shared .align 128 .b8 buf[4096];
  ld.param.u64 %rd1, [p1]; mov.b64 %rd2, map; cvta.param.u64 %rd3, %rd2;
  mov.u32 %r1, %tid.x; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %clusterid.x; mov.u32 %r4, %cluster_nctarank; mov.u32 %r5, %ctaid.x;
  mov.u32 %r10, full; mov.u32 %r11, empty; mov.u32 %r12, buf; setp.eq.u32 %p1, %r1, 0;
"""
START = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;\n"
END = "barrier.cluster.arrive; barrier.cluster.wait;\n"
COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"


def wait(name, barrier, parity):
    return f"{name}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [{barrier}], {parity}; @!%p2 bra {name};\n"


def run(body, out, grid, cluster, block=64, x=None, box=(32, 4), arch="sm_90a", attributes="", **kw):
    kw.setdefault("max_instructions", 3_000_000)
    x = np.zeros((8, 32), np.uint32) if x is None else x
    text = HEAD.replace("{arch}", arch).replace("{attributes}", attributes) + body + "ret;\n}\n"
    return Module(text).launch("k", grid, block, 0, [TensorMap(x, box), out], cluster=cluster, **kw)


def seen(body, errors, *args, seeds=8, **kw):
    """Every schedule that ends in an error ends in one of these, and one does."""
    wrong = 0
    for seed in range(seeds):
        try:
            run(body, *args, seed=seed, **kw)
        except errors:
            wrong += 1
    assert wrong, "no schedule saw it"


REGISTERS = [
    "%cluster_ctarank", "%cluster_nctarank", "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_nctaid.x",
    "%cluster_nctaid.y", "%clusterid.x", "%clusterid.y", "%nclusterid.x", "%nclusterid.y", "%is_explicit_cluster",
]  # fmt: skip


@pytest.mark.parametrize("cluster", [(2, 1), (1, 2), (2, 2), (4, 1), None])
def test_registers(cluster):
    body = "mov.u32 %r20, %ctaid.y; mov.u32 %r21, %nctaid.x; mad.lo.u32 %r20, %r20, %r21, %r5; mul.wide.u32 %rd4, %r20, 44; add.s64 %rd4, %rd4, %rd1;"
    body += "".join(f"mov.u32 %r22, {name}; st.global.u32 [%rd4+{4 * k}], %r22;" for k, name in enumerate(REGISTERS))
    for seed in (0, 3):
        out = np.zeros((4, 4, 11), np.uint32)
        run(body, out, (4, 4), cluster, block=1, seed=seed)
        cx, cy = cluster or (1, 1)
        for y in range(4):
            for x in range(4):
                rank = x % cx + y % cy * cx
                want = [rank, cx * cy, x % cx, y % cy, cx, cy, x // cx, y // cy, 4 // cx, 4 // cy, cluster is not None]
                assert out[y, x].tolist() == want


def multicast(ctas, bytes_=None, mask=None, waits=True, start=START):
    """Each CTA of a cluster brings 4 rows of 32 words, all of them take all; then they write what they have."""
    return (
        f"@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; fence.mbarrier_init.release.cluster; {start}"
        f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {bytes_ or 512 * ctas};"
        f"mad.lo.u32 %r20, %r2, 512, %r12; mad.lo.u32 %r21, %r3, %r4, %r2; shl.b32 %r21, %r21, 2; mov.b16 %h1, {mask or (1 << ctas) - 1};"
        f"@%p1 {COPY} [%r20], [%rd3, {{0, %r21}}], [%r10], %h1;\n"
        + (wait("W", "%r10", 0) if waits else "")
        + f"mul.wide.u32 %rd4, %r5, {512 * ctas}; add.s64 %rd4, %rd4, %rd1; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd4, %rd4, %rd5;"
        "shl.b32 %r22, %r1, 2; add.u32 %r22, %r22, %r12;"
        + "".join(f"ld.shared.u32 %r23, [%r22+{512 * k}]; st.global.u32 [%rd4+{512 * k}], %r23;" for k in range(ctas))
    )


@pytest.mark.parametrize("ctas", [2, 4])
def test_multicast(ctas):
    clusters = 3
    x = np.arange(clusters * ctas * 4 * 32, dtype=np.uint32).reshape(-1, 32)
    for seed in (0, 1, 2):
        out = np.zeros((clusters * ctas, ctas * 4, 32), np.uint32)
        stats = run(multicast(ctas), out, clusters * ctas, ctas, block=128, x=x, seed=seed)
        for cta in range(clusters * ctas):
            for row in range(ctas * 4):
                assert (out[cta, row] == x[cta // ctas * ctas * 4 + row]).all()
        # Each CTA reads its share from global memory, once for all.
        reads = [site for site in stats.sites if site.opcode.startswith("cp.async.bulk")]
        assert sum(site.bytes for site in reads) == x.nbytes


def test_multicast_mistakes():
    x = np.arange(2 * 4 * 32, dtype=np.uint32).reshape(-1, 32)
    out = np.zeros((2, 8, 32), np.uint32)
    args = (out, 2, 2, 128, x)
    seen(multicast(2, mask=7), OutOfBounds, *args)  # a CTA that the cluster does not have
    seen(multicast(2, mask=1), (Deadlock, OutOfBounds, MissingWait), *args)
    seen(multicast(2, bytes_=1040), Deadlock, *args)
    seen(multicast(2, bytes_=512), (MissingWait, SharedRace, Uninitialized, Deadlock, OutOfBounds), *args)
    seen(multicast(2, waits=False), (MissingWait, SharedRace, Uninitialized, OutOfBounds), *args)
    # The other CTA's barrier may not be there yet; a fence before a relaxed arrival is as good as a release.
    seen(multicast(2, start="bar.sync 0;"), (SharedRace, Uninitialized, OutOfBounds), *args)
    relaxed = START.replace(".release", ".relaxed")
    for seed in range(4):
        run(multicast(2, start=relaxed), *args, seed=seed)
    unfenced = multicast(2, start=relaxed).replace("fence.mbarrier_init.release.cluster;", "")
    seen(unfenced, (SharedRace, Uninitialized), *args)


# A ring of one stage over two CTAs: warp 0 of each brings half of a chunk to both, warp 1 adds up the chunks and tells both producers.
CHUNKS = 5
RING = (
    "@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; @%p1 mbarrier.init.shared::cta.b64 [%r11], 2; fence.mbarrier_init.release.cluster;\n"
    + START
    + "mov.u32 %r30, 0; mov.u32 %r31, 0; mov.b16 %h1, 3; setp.ge.u32 %p3, %r1, 32; @%p3 bra CONSUME; @!%p1 bra DONE;\n"
    "PRODUCE: and.b32 %r32, %r30, 1; xor.b32 %r32, %r32, 1;\n"
    + wait("WE", "%r11", "%r32")
    + "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 1024; mad.lo.u32 %r33, %r2, 512, %r12; shl.b32 %r34, %r30, 3; shl.b32 %r35, %r2, 2; add.u32 %r34, %r34, %r35;"
    f"{COPY} [%r33], [%rd3, {{0, %r34}}], [%r10], %h1;\n"
    f"add.u32 %r30, %r30, 1; setp.lt.u32 %p4, %r30, {CHUNKS}; @%p4 bra PRODUCE; bra DONE;\n"
    "CONSUME: and.b32 %r32, %r30, 1;\n"
    + wait("WF", "%r10", "%r32")
    + "mov.u32 %r40, %laneid; shl.b32 %r41, %r40, 2; add.u32 %r42, %r41, %r12;"
    + "".join(f"ld.shared.u32 %r43, [%r42+{128 * k}]; add.u32 %r31, %r31, %r43;" for k in range(8))
    + "bar.warp.sync -1; setp.lt.u32 %p5, %r40, 2; mapa.shared::cluster.u32 %r44, %r11, %r40;"
    "@%p5 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r44];\n"
    f"add.u32 %r30, %r30, 1; setp.lt.u32 %p4, %r30, {CHUNKS}; @%p4 bra CONSUME;\n"
    "mul.wide.u32 %rd4, %r5, 128; cvt.u64.u32 %rd5, %r41; add.s64 %rd4, %rd4, %rd5; add.s64 %rd4, %rd4, %rd1; st.global.u32 [%rd4], %r31;\n"
    "DONE: " + END
).replace("mapa.shared::cluster.u32 %r44, %r11, %r40;", "@%p5 mapa.shared::cluster.u32 %r44, %r11, %r40;")


def test_ring_of_a_cluster():
    x = np.random.default_rng(0).integers(0, 99, (CHUNKS * 8, 32)).astype(np.uint32)
    want = np.zeros(32, np.uint32)
    for row in x:
        want += row
    for seed in range(8):
        out = np.zeros((4, 32), np.uint32)
        run(RING, out, 4, 2, x=x, seed=seed)
        for got in out:
            assert (got == want).all()


MISTAKES = {
    "one CTA's release is enough": ("[%r11], 2;", "[%r11], 1;", (SharedRace, Divergence, MissingWait)),
    "both releases go to the own producer": ("mapa.shared::cluster.u32 %r44, %r11, %r40", "mov.u32 %r44, %r11", (SharedRace, MissingWait)),
    "a release that orders nothing": ("arrive.release.cluster", "arrive.relaxed.cluster", SharedRace),
    "released before it is read": (None, None, SharedRace),
    "half of the bytes expected": ("[%r10], 1024", "[%r10], 512", (MissingWait, SharedRace, Uninitialized, Deadlock, Divergence)),
    "too many bytes expected": ("[%r10], 1024", "[%r10], 1536", Deadlock),
    "to the own CTA alone": ("mov.b16 %h1, 3", "mov.b16 %h1, 1", (Deadlock, MissingWait)),
    "to a third CTA": ("mov.b16 %h1, 3", "mov.b16 %h1, 7", OutOfBounds),
    "to nobody": ("mov.b16 %h1, 3", "mov.b16 %h1, 0", OutOfBounds),
    "an end without the others": ("DONE: " + END, "DONE:", (MissingWait, OutOfBounds)),
    "an end that does not wait": ("barrier.cluster.wait;\n", "", (MissingWait, OutOfBounds)),
    "a start without the others": (START, "bar.sync 0;", (SharedRace, Uninitialized)),
    "the rank of no CTA": ("mapa.shared::cluster.u32 %r44, %r11, %r40", "mapa.shared::cluster.u32 %r44, %r11, 2", OutOfBounds),
    "an address of another CTA taken for the own": ("release.cluster.shared::cluster", "release.cluster.shared::cta", Unsupported),
    "a barrier of the other CTA that nobody made": (
        "%r44, %r11, %r40", "%r44, %r12, %r40", (Uninitialized, SharedRace, MissingWait),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_ring_are_seen(name):
    old, new, expected = MISTAKES[name]
    if old is None:
        start, end = (
            RING.index("mov.u32 %r40"),
            RING.index("add.u32 %r30, %r30, 1; setp.lt.u32 %p4, %r30, 5; @%p4 bra CONSUME"),
        )
        reading, telling = RING[start:end].split("bar.warp.sync -1;")
        text = RING[:start] + "mov.u32 %r40, %laneid; bar.warp.sync -1;" + telling + reading + RING[end:]
    else:
        assert RING.count(old) == 1, name
        text = RING.replace(old, new)
    x, out = np.ones((CHUNKS * 8, 32), np.uint32), np.zeros((2, 32), np.uint32)
    seen(text, expected, out, 2, 2, x=x)


def test_a_copy_to_the_other_cta():
    """Box and barrier there, by their mapped addresses; the barrier of a box is where the box is."""
    x = np.arange(8 * 32, dtype=np.uint32).reshape(8, 32)
    there = "xor.b32 %r20, %r2, 1; mapa.shared::cluster.u32 %r21, %r12, %r20; mapa.shared::cluster.u32 %r22, %r10, %r20; shl.b32 %r23, %r2, 2;"
    copy = COPY.replace(".multicast::cluster", "")
    body = (
        "@%p1 mbarrier.init.shared::cta.b64 [%r10], 1; fence.mbarrier_init.release.cluster;" + START + there
        + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 512;"
        + f"@%p1 {copy} [%r21], [%rd3, {{0, %r23}}], [%r22];\n" + wait("W", "%r10", 0)
        + "getctarank.shared::cluster.u32 %r24, %r21; mul.wide.u32 %rd4, %r5, 512; add.s64 %rd4, %rd4, %rd1; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd4, %rd4, %rd5;"
        "shl.b32 %r25, %r1, 2; add.u32 %r25, %r25, %r12; ld.shared.u32 %r26, [%r25]; add.u32 %r26, %r26, %r24; st.global.u32 [%rd4], %r26;"
    )  # fmt: skip
    for seed in range(4):
        out = np.zeros((2, 4, 32), np.uint32)
        run(body, out, 2, 2, block=128, x=x, seed=seed)
        for cta in range(2):
            assert (out[cta] == x[4 * (1 - cta) : 4 * (1 - cta) + 4] + (1 - cta)).all()
    seen(body.replace("[%r22];\n", "[%r10];\n"), OutOfBounds, out, 2, 2, 128, x)


def test_shared_memory_goes_with_its_cta():
    """In order, so that it is known who is first: an arrival after the end, and an end that does not know of an arrival."""
    begin = (
        "@%p1 mbarrier.init.shared::cta.b64 [%r10], 8; fence.mbarrier_init.release.cluster;" + START
        + "mapa.shared::cluster.u32 %r20, %r10, 1; setp.ne.u32 %p3, %r2, 0; mov.u32 %r21, 0; @%p3 bra B;\n"
    )  # fmt: skip
    arrive = "mbarrier.arrive.shared::cluster.b64 _, [%r20]; "
    loop = "{ L: add.u32 %r21, %r21, 1; setp.lt.u32 %p4, %r21, 50000; @%p4 bra L; }\n"
    out, kw = np.zeros(2, np.uint32), dict(grid=2, cluster=2, block=1)
    with pytest.raises(OutOfBounds, match="has exited"):
        run(begin + loop + arrive + "B: ", out, **kw)
    with pytest.raises(MissingWait, match="the CTA exits"):
        run(begin + arrive + "B: " + loop, out, **kw)
    for seed in range(4):
        run(begin + arrive + "B: " + END, out, seed=seed, **kw)


def handed_over(arrive, waits):
    """CTA 0 writes a word of global memory, CTA 1 reads it behind the barrier."""
    return (
        "setp.ne.u32 %p3, %r2, 0; mov.u32 %r20, 7; @!%p3 st.global.u32 [%rd1], %r20;"
        f"{arrive} {waits} @%p3 ld.global.u32 %r21, [%rd1]; @%p3 st.global.u32 [%rd1+4], %r21;"
    )


def test_the_barrier_orders_global_memory():
    out = np.zeros(2, np.uint32)
    kw = dict(grid=2, cluster=2, block=1)
    for seed in range(4):
        out[:] = 0
        run(handed_over("barrier.cluster.arrive;", "barrier.cluster.wait;"), out, seed=seed, **kw)
        assert out.tolist() == [7, 7]
    seen(handed_over("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait;"), GlobalRace, out, **kw)
    seen(handed_over("barrier.cluster.arrive;", ""), GlobalRace, out, **kw)


def test_who_arrives_at_the_barrier():
    out = np.zeros(2, np.uint32)
    kw = dict(grid=2, cluster=2, block=64)
    # Threads that have exited are not waited for.
    some = "setp.lt.u32 %p3, %r1, 40; @%p3 bra B; ret; B: " + END
    for seed in range(4):
        run(some + END, out, seed=seed, **kw)
    seen("barrier.cluster.arrive; barrier.cluster.arrive; barrier.cluster.wait;", Divergence, out, **kw)
    seen("barrier.cluster.wait;", Divergence, out, **kw)
    seen("setp.ne.u32 %p3, %r2, 0; @%p3 bra B; barrier.cluster.arrive; barrier.cluster.wait; ret; B: " + END + END + "L: bra L;",
         Deadlock, out, **kw, seeds=1, max_instructions=100_000)  # fmt: skip
    half = "setp.lt.u32 %p3, %r1, 16; @%p3 barrier.cluster.arrive.aligned; @!%p3 barrier.cluster.arrive; barrier.cluster.wait;"
    seen(half, Divergence, out, **kw)
    # Nobody arrives in the other CTA, which waits for something else.
    stuck = "setp.eq.u32 %p3, %r2, 0; @%p3 bra B; @%p1 mbarrier.init.shared::cta.b64 [%r10], 1; bar.sync 0;\n"
    seen(stuck + wait("W", "%r10", 0) + "B: " + END, Deadlock, out, **kw)


def test_what_is_refused():
    out = np.zeros(16, np.uint32)
    two = ".explicitcluster .reqnctapercluster 2, 1, 1"
    rank = "mul.wide.u32 %rd4, %r5, 4; add.s64 %rd4, %rd4, %rd1; @%p1 st.global.u32 [%rd4], %r2;"
    for cluster in (None, 2):
        out[:] = 9
        run(rank, out, 4, cluster, block=32, attributes=two)
        assert out[:4].tolist() == [0, 1, 0, 1]
    for error, grid, cluster, more in (
        (LaunchError, 4, 4, {"attributes": two}),
        (LaunchError, 3, 2, {}),
        (LaunchError, 16, 16, {}),
        (LaunchError, 2, 2, {"arch": "sm_80"}),
        (Unsupported, 4, 4, {"block": 512}),
    ):
        with pytest.raises(error):
            run(rank, out, grid, cluster, **{"block": 32, **more})
    with pytest.raises(OutOfBounds):
        run("mov.u32 %r20, 2; mapa.shared::cluster.u32 %r21, %r10, %r20;", out, 2, 2)
    # The other CTA's shared memory by generic loads.
    body = "mov.u32 %r20, 1; cvt.u64.u32 %rd4, %r12; cvta.shared.u64 %rd4, %rd4; mapa.u64 %rd4, %rd4, 1; ld.u32 %r21, [%rd4];"
    with pytest.raises(Unsupported):
        run(body, out, 2, 2)


@pytest.mark.slow
@needs_nvcc
def test_clusters_of_the_runtime():
    """Launches by __cluster_dims__ and by the attribute of cudaLaunchKernelEx."""
    library = nvcc.load_host_library(pathlib.Path(__file__).parent / "kernels" / "cluster_sm90.cu", arch="sm_90a")
    out = np.zeros(8, np.uint32)
    library.call("launch_own", out, 8)
    assert out.tolist() == [0, 1, 2, 3] * 2
    for cluster in (1, 2, 8):
        library.call("launch_any", out, 8, cluster)
        assert out.tolist() == [k % cluster for k in range(8)]
    invalid_configuration = 9  # cudaErrorInvalidConfiguration
    for ctas, cluster in ((8, 0), (8, 3), (16, 16)):
        assert library.call("launch_any", np.zeros(16, np.uint32), ctas, cluster) == invalid_configuration
