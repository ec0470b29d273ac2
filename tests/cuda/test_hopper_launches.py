"""Single launches of the Hopper kernels: right in any cut and schedule, what they count and refuse, and mistakes in them caught.

Counts are those of executed PTX under tools/ptxemu, and of the machine code that ptxas makes. No time is claimed from them.
"""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastcl.backends import reference
from fastcl.backends.cuda.hopper import grid
from fastcl.equation.problem import Problem
from tests.triton.problems import error, problem
from tools import ptxemu
from tools.ptxemu import nvcc
from tools.ptxemu.stats import Stats

from . import fused_launching as fused
from . import hopper_launching as hopper
from .emulation import EVERYTHING
from .fused_launching import CSRC, Launcher, RefusedError, Weights, exact_weights
from .hopper_launching import Shape, few

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
_NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which mmap names from Python 3.13 on


@pytest.fixture(scope="module")
def launch() -> Launcher:
    return Launcher(few())


def clip_problem(n: int, m: int | None, d: int = 128, mask: str = "all", **more: object) -> Problem:
    return problem(n, m, d, mask=mask, columns=m is not None, dtype=BF16, **more)  # type: ignore[arg-type]


def weights_of(p: Problem, close: bool = True, columns: bool = True) -> Weights:
    """Upstream gradients of both sides, and the reference of reductions that lie close (or count as far apart)."""
    r, c = reference.rows(p)
    assert c is not None
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(p.n, generator=generator), torch.randn(p.m, generator=generator)
    if not columns:
        return Weights(g, None, r.float(), None)
    return Weights(g, h, r.float(), c.float(), torch.tensor([r.mean().item(), float(close)]))


def wrong_rows(launch: Launcher, p: Problem, shape: Shape = Shape()) -> float:  # noqa: B008
    """The largest relative error of r and c; infinite where one is and the truth is not."""
    r, c, _, _ = hopper.rows(launch, p, shape)
    true_r, true_c = reference.rows(p)
    assert c is not None and true_c is not None
    if not (r.isfinite().all() and c.isfinite().all()):
        return float("inf")
    return max(error(r, true_r), error(c, true_c))


def wrong_weights(launch: Launcher, p: Problem, shape: Shape = Shape(1)) -> float:  # noqa: B008
    """The largest error of W, W 1 and W^T 1."""
    w = weights_of(p)
    exact, found = exact_weights(p, w), hopper.weigh(launch, p, w, shape, sums=True)
    assert found.w_rows is not None and found.w_cols is not None
    plain = hopper.weigh(launch, p, w, shape)
    pairs = [
        (found.weights, exact.T),
        (plain.weights, exact.T),
        (found.w_rows, exact.sum(1)),
        (found.w_cols, exact.sum(0)),
    ]
    if not all(got.isfinite().all() for got, _ in pairs):
        return float("inf")
    return max(error(got, want) / (1.0 if got.ndim == 2 else 1e-3) for got, want in pairs)


def wrong_sweep(launch: Launcher, p: Problem, shape: Shape) -> float:
    w, wy = weights_of(p), torch.zeros(p.n, p.x.shape[1])
    hopper.weigh(launch, p, w, shape, wy=wy)
    assert p.y is not None
    return error(wy, exact_weights(p, w) @ p.y.double()) if wy.isfinite().all() else float("inf")


# x resident in blocks of 256 and of 128, and streamed.
WIDTHS = [128, 640, 832]


@pytest.mark.parametrize("d", WIDTHS)
def test_forward_counts(launch: Launcher, d: int) -> None:
    """Exactly the products of whole tiles, one exponential a pair, no bank conflict."""
    n, m = 256, 256 if d > 128 else 1024
    _, _, doubtful, stats = hopper.rows(launch, clip_problem(n, m, d))
    assert not doubtful
    assert stats.mma_flops == 2 * n * m * d
    assert stats.mufu <= 1.03 * n * m
    assert stats.bank_conflicts == 0


@pytest.mark.parametrize("d", [128, 320])
def test_weights_counts(launch: Launcher, d: int) -> None:
    """One exponential a pair where the reductions lie close or one side has all the weight, two elsewhere."""
    n, m = 256, 256
    p = clip_problem(n, m, d)
    for weights, exponentials in ((weights_of(p), 1), (weights_of(p, False), 2), (weights_of(p, columns=False), 1)):
        stats = hopper.weigh(launch, p, weights).stats
        assert stats.mma_flops == 2 * n * m * d
        assert stats.mufu <= 1.01 * exponentials * n * m
        assert stats.bank_conflicts == 0


@pytest.mark.parametrize("mask", ["off_diagonal", "across_groups"])
def test_biases_distances_and_groups_add_no_conflict(launch: Launcher, mask: str) -> None:
    p = clip_problem(256, 128, 64, mask, operand="sqdist", bias=True)
    assert hopper.rows(launch, p)[3].bank_conflicts == 0
    assert hopper.weigh(launch, p, weights_of(p), sums=True).stats.bank_conflicts == 0


def test_x_with_itself_visits_half_the_tiles(launch: Launcher) -> None:
    n, d = 1024, 64
    p = clip_problem(n, None, d, "off_diagonal")
    for shape in (Shape(3), Shape(2, 3)):
        r, _, _, stats = hopper.rows(launch, p, shape)
        assert error(r, reference.rows(p)[0]) < 1e-6
        assert stats.mma_flops == 2 * 256 * 256 * d * 4 * 5 // 2


@pytest.mark.parametrize(("ctas", "splits"), [(1, 1), (3, 1), (2, 2), (3, 4), (1, 7)])
def test_any_cut_into_ctas_and_splits(launch: Launcher, ctas: int, splits: int) -> None:
    """Blocks and tiles that do not divide, more splits than tiles: the sums of one order, whoever has them."""
    p = clip_problem(600, 200, 72, "off_diagonal")
    assert wrong_rows(launch, p, Shape(ctas, splits)) < 1e-6
    assert wrong_weights(launch, p, Shape(ctas, splits)) < 8e-3


@pytest.mark.parametrize("size", [(1, 1, 8), (257, 63, 200), (130, 65, 768), (140, 129, 800)])
def test_ragged_sizes_in_two_schedules(size: tuple[int, int, int]) -> None:
    for mask, more in (("off_diagonal", {}), ("all", {"scale": -30.0})):
        p = clip_problem(*size, mask, **more) if size != (1, 1, 8) else clip_problem(*size)
        first, other = (hopper.rows(Launcher(few(), seed), p, Shape(2, 2)) for seed in (0, 7))
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])  # type: ignore[arg-type]
        assert max(error(got, want, 1.0) for got, want in zip(first[:2], reference.rows(p), strict=True)) < 2e-6  # type: ignore[arg-type]
        if size[2] <= 768:
            assert wrong_weights(Launcher(few()), p) < 8e-3


def read_by_boxes(stats: Stats) -> int:
    """Bytes that the copy engine read from global memory, those for two CTAs counted once."""
    return sum(
        site.bytes
        for site in stats.sites
        if site.opcode.startswith("cp.async.bulk.tensor") and "mbarrier" in site.opcode
    )


@pytest.mark.parametrize(("d", "shape", "turns"), [(640, Shape(2), (1, 1)), (832, Shape(1, 2), (2, 1))])
def test_a_cluster_reads_once_what_both_of_its_ctas_take(
    launch: Launcher, d: int, shape: Shape, turns: tuple[int, int]
) -> None:
    """y beside two resident blocks of x; x for two times two tiles of y where it streams. Alone, a CTA reads either twice."""
    n, m = 256, 512
    p = clip_problem(n, m, d)
    for stats in (hopper.rows(launch, p, shape)[3], hopper.weigh(launch, p, weights_of(p), shape).stats):
        assert stats.ctas_per_cluster == 2
        assert stats.mma_flops == 2 * n * m * d
        assert stats.bank_conflicts == 0
        assert read_by_boxes(stats) == 2 * d * (turns[0] * n + turns[1] * m)
    alone = hopper.rows(launch, p, Shape(1))[3]
    assert alone.ctas_per_cluster == 1
    assert read_by_boxes(alone) == 2 * d * (4 * n + m if d > 768 else n + 2 * m)


@pytest.mark.parametrize(
    ("n", "m", "d", "shape"),
    [(300, 150, 640, Shape(2, 2)), (650, None, 520, Shape(2, 3)), (300, 150, 776, Shape(2, 4)), (600, None, 776, Shape(1, 2))],
)  # fmt: skip
def test_clusters_at_ragged_sizes(n: int, m: int | None, d: int, shape: Shape) -> None:
    """Blocks and tiles that one of two CTAs does not have, more splits than tiles, the triangle: the same bits in any schedule."""
    p = clip_problem(n, m, d, "off_diagonal")
    true = reference.rows(p)
    found = [hopper.rows(Launcher(few(), seed), p, shape) for seed in (0, 3, 7)]
    for r, c, _, stats in found:
        assert stats.ctas_per_cluster == 2
        assert error(r, true[0], 1.0) < 2e-6
        assert torch.equal(r, found[0][0])
        if c is not None and found[0][1] is not None and true[1] is not None:
            assert error(c, true[1], 1.0) < 2e-6
            assert torch.equal(c, found[0][1])
    if m is None:
        return
    w = weights_of(p)
    strips = [hopper.weigh(Launcher(few(), seed), p, w, shape) for seed in (0, 7)]
    assert error(strips[0].weights, exact_weights(p, w).T) < 8e-3
    assert torch.equal(strips[0].weights, strips[1].weights)


@pytest.mark.parametrize("clusters", ["ctas", "splits"])
def test_a_grid_has_pairs_for_clusters(clusters: str) -> None:
    for n, m in ((65536, 65536), (65536, 300), (300, 65536), (129, 129), (100, 4000), (4000, 100)):
        g = grid(n, m, 128, 132, clusters)
        of, most = (g.ctas, -(-n // 128)) if clusters == "ctas" else (g.splits, -(-m // 128))
        assert of % 2 == 0 or most == 1 or g.ctas > 66, (n, m, g)
        assert g.ctas * g.splits <= 132
        assert n < 65536 or m < 65536 or g.ctas * g.splits >= 128


def test_a_corner_of_the_matrix(launch: Launcher) -> None:
    """A strip takes its rows of the vectors, and the diagonal where it crosses the strip."""
    p = clip_problem(300, 200, 64, "off_diagonal", bias=True)
    w = weights_of(p)
    found = hopper.weigh(launch, p, w, Shape(2, 2), sums=True, corner=(70, 290, 64, 180))
    exact = exact_weights(p, w)[70:290, 64:180]
    assert error(found.weights, exact.T) < 5e-3
    assert error(found.w_rows, exact.sum(1)) < 1e-5 and error(found.w_cols, exact.sum(0)) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 128), (260, 330, 200), (1, 1, 8), (513, 65, 72)])
def test_the_sweep_adds_its_product_beside_its_weights(n: int, m: int, d: int) -> None:
    """The strip of hopper_weights and W Y of those very weights, over odd and even counts of tiles and several blocks a CTA."""
    p = clip_problem(n, m, d, "off_diagonal" if n > 1 else "all")
    for weights in (weights_of(p), weights_of(p, close=False), weights_of(p, columns=False)):
        results = []
        for seed in (0, 7):
            wy = torch.ones(n, d)
            results.append((hopper.weigh(Launcher(few(), seed), p, weights, Shape(2), wy=wy).weights, wy))
        (strip, wy), (other, again) = results
        assert torch.equal(strip, other)
        assert torch.equal(wy, again)
        assert error(strip, exact_weights(p, weights).T) < 5e-3
        assert p.y is not None
        assert error(wy - 1, strip.double().T @ p.y.double(), 1.0) < 2e-6


def test_the_sweep_counts(launch: Launcher) -> None:
    """Two products and one exponential a pair."""
    n, m, d = 256, 256, 128
    p = clip_problem(n, m, d)
    stats = hopper.weigh(launch, p, weights_of(p), wy=torch.zeros(n, d)).stats
    assert stats.mma_flops == 4 * n * m * d
    assert stats.mufu <= 1.01 * n * m
    assert stats.bank_conflicts == 0


def test_small_sums_are_doubtful(launch: Launcher) -> None:
    """A row far under the bound, and one that nothing visits, set the flag; rows of any one length do not."""
    p = clip_problem(140, 70)
    assert not hopper.rows(launch, p)[2]
    assert not hopper.rows(launch, clip_problem(140, 70, scale=100.0))[2]
    p.x[3] *= 1e-3
    p.scale.fill_(1000.0)
    assert hopper.rows(launch, p)[2]


def test_offsets_past_two_to_the_31(launch: Launcher) -> None:
    """Rows 2^25 elements apart: from the 64th on their elements lie past 2^31. Only the pages of the rows exist."""
    n, stride = 70, 1 << 25
    reserved = mmap.mmap(-1, n * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    p = clip_problem(n, 50, 128)
    x = torch.frombuffer(reserved, dtype=BF16).as_strided((n, 128), (stride, 1))
    x.copy_(p.x)
    far = Problem(**{**p.__dict__, "x": x})
    in_place = Launcher(few(), in_place=(x,))
    for mine, theirs in zip(hopper.rows(in_place, far)[:2], hopper.rows(launch, p)[:2], strict=True):
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]


def test_a_launch_that_the_copy_engine_cannot_serve_is_refused(launch: Launcher) -> None:
    def attempt(change: dict[str, object], **more: object) -> None:
        p = clip_problem(40, 50, 64)
        parts = torch.empty(1, 40), torch.empty(1, 50)
        given = {"ctas": 1, "splits": 1} | more
        launch(
            "hopper_rows", hopper.Tiles, fresh=parts, equation=fused.equation(p), sides=fused.sides(p) | change,
            reference=hopper.bound(p), row_parts=parts[0], col_parts=parts[1], **given,
        )  # fmt: skip

    attempt({})
    for change in (
        {"d": 72},
        {"x_stride": 68},
        {"n": 0},
        {"m": (1 << 31) - 100},
        {"x": torch.zeros(41 * 64, dtype=BF16)[1:]},
        {"dtype": 0},
    ):
        with pytest.raises(RefusedError):
            attempt(change)
    for more in ({"ctas": 2}, {"ctas": 0}, {"splits": 0}):
        with pytest.raises(RefusedError):
            attempt({}, **more)


class Mistake(NamedTuple):
    """One change of the source, and what it must lead to: a fault by name, or a wrong answer (None)."""

    what: str
    file: str
    right: str
    wrong: str
    fault: tuple[type[Exception], ...] | None
    weights: bool = False
    d: int = 128
    sweep: bool = False
    shape: Shape = Shape(1)

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


# What is read or written too early is a race, or not there yet, in some schedule.
UNORDERED = (ptxemu.SharedRace, ptxemu.Uninitialized, ptxemu.MissingWait)
# A stage that is released too early shows where the ring comes round soon: at d = 768 it has four stages, sixteen at 128.
MISTAKES = [
    Mistake("wrong transaction count", "tiles.cuh",
            "full_at + 8 * slot, box_bytes);", "full_at + 8 * slot, box_bytes + 16);", (ptxemu.Deadlock,)),
    Mistake("no wait for the chunk", "tiles.cuh",
            "wait(bars + full_at + 8 * slot, phase);\n          products_fence();", "products_fence();", UNORDERED),
    Mistake("a stage released one warp early", "tiles.cuh",
            "empty_at + 8 * s, 4 * peers)", "empty_at + 8 * s, 4 * peers - 1)", UNORDERED, d=768),
    Mistake("a stage released while multiplied", "tiles.cuh", "            products_wait<1>();\n", "", UNORDERED, d=768),
    Mistake("accumulators read in flight", "tiles.cuh", "        products_wait<0>();\n", "", (ptxemu.MissingWait,)),
    Mistake("x overwritten", "tiles.cuh", "wait(bars + x_empty_at, (round & 1) ^ 1);", "", UNORDERED),
    # Without a wait at all nvcc selects between registers of which one is never written, and that is what is seen.
    Mistake("x not there", "tiles.cuh", "wait(bars + x_full_at, round & 1);", "wait(bars + x_full_at, (round & 1) ^ 1);",
            (*UNORDERED, ptxemu.Deadlock)),
    Mistake("scratch written while x is multiplied", "tiles.cuh",
            "      meet(3, 256);  // where x was", "      // where x was", UNORDERED),
    Mistake("wrong descriptor", "tiles.cuh", "a + 2 * k, x + 2 * k", "a + 2 * k, x + 2 * (k ^ 1)", None),
    Mistake("another swizzle", "start.cuh", "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_NONE", None),
    Mistake("the diagonal of the lower rows", "pairs.cuh", "c != v.self + 8 * h", "c != v.self", None),
    Mistake("columns not joined", "pairs.cuh", "first ? v : *to + v", "v", None),
    Mistake("no proxy fence before the store", "weights.cuh", "      stores_before_engine();\n", "", (ptxemu.SharedRace,), True),
    Mistake("stored before all have written", "weights.cuh",
            "stores_before_engine();\n      meet(4 + at.me, 128);", "stores_before_engine();", UNORDERED, True),
    Mistake("overwritten while the engine reads", "weights.cuh", "        if (leads) stores_read();\n", "", UNORDERED, True),
    Mistake("another staging swizzle", "weights.cuh",
            "(c % 8 + (at.lane >> 4) ^ (at.lane & 7))", "(c % 8 + (at.lane >> 4))", None, True),
    Mistake("weights overwritten while multiplied", "sweep.cuh", "wait(bars + L::w_empty_at + 8 * me, (staged++ & 1) ^ 1);",
            "staged++;",
            UNORDERED, sweep=True),
    Mistake("weights multiplied before they are there", "sweep.cuh",
            "wait(bars + L::w_full_at + 8 * h, (h ? pairs - (p.tiles & 1 ? round : 0) : pairs) & 1);", "", UNORDERED, sweep=True),
    Mistake("a tile of y free before its second product", "sweep.cuh", "barrier_init(bars + empty_at + 8 * s, 12)",
            "barrier_init(bars + empty_at + 8 * s, 8)", UNORDERED, sweep=True),
    Mistake("the next columns of weights", "sweep.cuh", "mn_major(staging + h * L::weights, box_bytes)",
            "mn_major(staging + h * L::weights, 0)", None, sweep=True),
    Mistake("a chunk free when one CTA of two has multiplied it", "tiles.cuh",
            "empty_at + 8 * s, 4 * peers)", "empty_at + 8 * s, 4)",
            (*UNORDERED, ptxemu.Divergence), d=768, shape=Shape(2)),
    Mistake("the own producer told for the other", "instructions.cuh", "if (lane < peers) arrive_at(at, lane);",
            "if (lane < peers) arrive(at);", UNORDERED, d=768, shape=Shape(2)),
    Mistake("no meeting at the start", "tiles.cuh",
            "  meet_cluster();\n  int slot", "  __syncthreads();\n  int slot", UNORDERED, d=768, shape=Shape(2)),
    Mistake("no meeting at the end", "tiles.cuh", "  work.end(p);\n  meet_cluster();", "  work.end(p);",
            (ptxemu.MissingWait, ptxemu.OutOfBounds), d=768, shape=Shape(2)),
    Mistake("the own half awaited alone", "tiles.cuh", "full_at + 8 * slot, box_bytes);", "full_at + 8 * slot, box_bytes / peers);",
            (*UNORDERED, ptxemu.Deadlock), d=768, shape=Shape(2)),
    Mistake("halves of x to the own CTA", "instructions.cuh", "static_cast<uint16_t>(3)", "static_cast<uint16_t>(1)",
            (*UNORDERED, ptxemu.Deadlock), d=832, shape=Shape(1, 2)),
    Mistake("the other's half of x to the same place", "streamed.cuh", "part * (NX / x_parts * 128)", "0", UNORDERED,
            d=832, shape=Shape(1, 2)),
    Mistake("x free when one CTA of two has multiplied it", "streamed.cuh", "empty_at + 8 * s, 8 * peers)", "empty_at + 8 * s, 8)",
            (*UNORDERED, ptxemu.Divergence), d=832, shape=Shape(1, 2)),
    Mistake("a turn of the other's alone not waited for", "streamed.cuh",
            "          wait(bars + full_at + 8 * slot, phase);\n          __syncwarp();", "          __syncwarp();",
            (*UNORDERED, ptxemu.Deadlock, ptxemu.Divergence), d=832, shape=Shape(1, 2)),
]  # fmt: skip


def with_mistake(mistake: Mistake, folder: Path) -> nvcc.HostLibrary:
    """The few launches, compiled from a copy of the sources with this change."""
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("*.cpp"))
    changed = folder / "csrc" / "cuda" / "sm_90a" / mistake.file
    text = changed.read_text()
    assert text.count(mistake.right) == 1, "the source has changed: change this test with it"
    changed.write_text(text.replace(mistake.right, mistake.wrong))
    return few(folder / "csrc")


@pytest.mark.parametrize("mistake", MISTAKES if EVERYTHING else [MISTAKES[2], MISTAKES[12], MISTAKES[-8]], ids=str)
def test_a_mistake_is_caught(mistake: Mistake, tmp_path: Path) -> None:
    library = with_mistake(mistake, tmp_path)
    p = clip_problem(300, 330, mistake.d, "off_diagonal")

    def worst() -> float:
        check = wrong_weights if mistake.weights else wrong_sweep if mistake.sweep else wrong_rows
        return max(check(Launcher(library, seed), p, mistake.shape) for seed in (0, 1, 2))

    if mistake.fault is None:
        assert worst() > (
            2e-2 if mistake.weights or mistake.sweep else 1e-4
        )  # right: 2e-3, by weights in bfloat16, and 1e-6
    else:
        with pytest.raises(mistake.fault):
            worst()
