"""Single launches of the fused kernels: what they count, what they refuse, and that mistakes in them are caught.

Counts are those of executed PTX under tools/ptxemu. They bound nothing but themselves: no time is claimed from them.
"""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastcl.backends import reference
from fastcl.equation.problem import Problem
from tests.triton.problems import error, problem
from tools import ptxemu

from . import fused_launching as fused
from .emulation import EVERYTHING
from .fused_launching import CSRC, Launcher, RefusedError, Shape, Weights, exact_weights, few, gradient

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
_NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which mmap names from Python 3.13 on


@pytest.fixture(scope="module")
def launch() -> Launcher:
    return Launcher(few())


def clip_problem(n: int, m: int, d: int = 128, mask: str = "all", **more: object) -> Problem:
    return problem(n, m, d, mask=mask, columns=True, dtype=BF16, **more)  # type: ignore[arg-type]


def weights_of(p: Problem, close: bool) -> Weights:
    """Upstream gradients of both sides, and the reference of reductions that lie close (or count as far apart)."""
    r, c = reference.rows(p)
    assert c is not None
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(p.n, generator=generator), torch.randn(p.m, generator=generator)
    return Weights(g, h, r.float(), c.float(), torch.tensor([r.mean().item(), float(close)]))


def wrong_rows(launch: Launcher, p: Problem, shape: Shape = Shape()) -> float:  # noqa: B008
    """The largest relative error of r and c; infinite where one is and the truth is not."""
    r, c, _ = fused.rows(launch, p, shape)
    true_r, true_c = reference.rows(p)
    assert c is not None and true_c is not None
    if not (r.isfinite().all() and c.isfinite().all()):
        return float("inf")
    return max(error(r, true_r), error(c, true_c))


def wrong_gradient(launch: Launcher, p: Problem) -> float:
    weights = weights_of(p, close=True)
    w = exact_weights(p, weights)
    assert p.y is not None
    return max(
        error(gradient(launch, p, weights)[0], w @ p.y.double()),
        error(gradient(launch, p, weights, swapped=True)[0], w.T @ p.x.double()),
    )


def test_forward_counts(launch: Launcher) -> None:
    """The matrix work of one product, 1.05 exponentials a pair, no bank conflict, no sector that is not needed."""
    n, m, d = 256, 1024, 128
    for shape in (Shape(2), Shape(2, resident=True)):
        _, _, stats = fused.rows(launch, clip_problem(n, m, d), shape)
        assert stats.mma_flops == 2 * n * m * d
        assert stats.mufu <= 1.06 * n * m
        assert stats.bank_conflicts == 0
        assert not stats.uncoalesced_by_site()


def test_gradient_counts(launch: Launcher) -> None:
    """Two products, one exponential a pair where the reductions lie close (two elsewhere), no conflict, no spare sector."""
    n, m, d = 256, 512, 128
    p = clip_problem(n, m, d)
    for close in (True, False):
        _, _, stats = gradient(launch, p, weights_of(p, close))
        assert stats.mma_flops == 4 * n * m * d
        assert stats.mufu == (1 if close else 2) * n * m
        assert stats.bank_conflicts == 0
        assert not stats.uncoalesced_by_site()


def test_a_sum_has_its_value_without_another_product(launch: Launcher) -> None:
    """The row sums of f from the gradient's sweep: its two products, one exponential of softplus more, W Y to the same bits."""
    p = problem(256, 512, 128, pair="softplus", mask="all", dtype=BF16)
    ones, values = torch.ones(p.n), torch.empty(p.n)
    weights = Weights(ones, None, None, None)
    without, with_values = (gradient(launch, p, weights, values=each) for each in (None, values))
    assert error(values, reference.rows(p)[0]) < 1e-6
    assert torch.equal(with_values[0], without[0]) and torch.equal(with_values[1], without[1])
    assert with_values[2].mma_flops == without[2].mma_flops == 4 * p.n * p.m * 128
    assert with_values[2].mufu <= without[2].mufu + p.n * p.m
    assert with_values[2].bank_conflicts == 0


@pytest.mark.parametrize("mask", ["off_diagonal", "across_groups"])
def test_biases_distances_and_groups_add_no_conflict(launch: Launcher, mask: str) -> None:
    p = clip_problem(256, 384, 64, mask, operand="sqdist", bias=True)
    _, _, forward = fused.rows(launch, p)
    _, _, backward = gradient(launch, p, weights_of(p, close=True))
    for stats in (forward, backward):
        assert stats.bank_conflicts == 0, stats.conflicts_by_site()[:3]


def test_half_a_chunk_of_d_is_half_the_work(launch: Launcher) -> None:
    p = clip_problem(128, 128, 64)
    assert fused.rows(launch, p)[2].mma_flops == 2 * 128 * 128 * 64
    assert gradient(launch, p, weights_of(p, close=True))[2].mma_flops == 4 * 128 * 128 * 64


def test_x_with_itself_visits_half_the_tiles(launch: Launcher) -> None:
    n, d = 1024, 64
    p = problem(n, None, d, dtype=BF16)
    r, _, stats = fused.rows(launch, p, Shape(3))
    assert error(r, reference.rows(p)[0]) < 1e-6
    tiles = n // 128
    assert stats.mma_flops == 2 * 128 * 128 * d * tiles * (tiles + 1) // 2


@pytest.mark.parametrize("d", [8, 72, 320] if EVERYTHING else [72])
def test_stages_and_residency_change_no_bit(launch: Launcher, d: int) -> None:
    p = clip_problem(300, 400, d, "off_diagonal")
    first, *others = (
        fused.rows(launch, p, Shape(2, 1, resident, stages)) for resident in (False, True) for stages in (2, 3, 4)
        if resident or stages < 4 or d <= 72
    )  # fmt: skip
    assert error(first[0], reference.rows(p)[0]) < 1e-6
    for r, c, _ in others:
        assert torch.equal(r, first[0]) and torch.equal(c, first[1])


@pytest.mark.parametrize(("ctas", "splits"), [(1, 1), (3, 1), (2, 2), (3, 4)])
def test_any_cut_into_ctas_and_splits(launch: Launcher, ctas: int, splits: int) -> None:
    assert wrong_rows(launch, clip_problem(300, 400, 64, "off_diagonal"), Shape(ctas, splits)) < 1e-6


def test_offsets_past_two_to_the_31() -> None:
    """Rows 2^25 elements apart: from the 64th on their elements lie past 2^31. Only the pages of the rows exist."""
    n, stride = 70, 1 << 25
    reserved = mmap.mmap(-1, n * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    p = clip_problem(n, 50, 128)
    x = torch.frombuffer(reserved, dtype=BF16).as_strided((n, 128), (stride, 1))
    x.copy_(p.x)
    launch = Launcher(few(), in_place=(x,))
    far = Problem(**{**p.__dict__, "x": x})
    r, c, _ = fused.rows(launch, far)
    weights = weights_of(p, close=True)
    wy, w_rows, _ = gradient(launch, far, weights)
    wtx, _, _ = gradient(launch, far, weights, swapped=True)
    near = Launcher(few())
    for mine, theirs in zip((r, c), fused.rows(near, p)[:2], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip((wy, w_rows), gradient(near, p, weights)[:2], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(wtx, gradient(near, p, weights, swapped=True)[0])


def test_a_launch_that_16_byte_copies_cannot_serve_is_refused(launch: Launcher) -> None:
    def attempt(change: dict[str, object]) -> None:
        p = clip_problem(40, 50, 64)
        parts = torch.empty(2, 50, 2), torch.empty(1, 50, 2)
        launch(
            "fused_rows", fused.Rows, fresh=parts, equation=fused.equation(p), sides=fused.sides(p) | change, ctas=1, splits=1,
            row_parts=parts[0], col_parts=parts[1], stages=3,
        )  # fmt: skip

    attempt({})
    for change in (
        {"d": 60},
        {"x_stride": 68},
        {"n": 0},
        {"m": (1 << 31) - 100},
        {"x": torch.zeros(41 * 64, dtype=BF16)[1:]},
    ):
        with pytest.raises(RefusedError):
            attempt(change)


class Mistake(NamedTuple):
    """One change of the source, and what it must lead to: a fault by name, or a wrong answer (None)."""

    file: str
    right: str
    wrong: str
    fault: tuple[type[Exception], ...] | None
    gradient: bool = False

    def __str__(self) -> str:
        return f"{self.file}-{self.right.split('(')[0].strip().split(' ')[-1]}"


# Without a barrier a schedule may read before anything was written, or the accesses are a race in any.
UNORDERED = (ptxemu.SharedRace, ptxemu.Uninitialized)
MISTAKES = [
    Mistake("fused_rows.cuh", "__syncthreads();  // chunk k", "// chunk k", UNORDERED),
    Mistake("fused_rows.cuh", "copies_wait_for(p.stages);", "", (ptxemu.MissingWait,)),
    Mistake("tile.cuh", "return swizzled(row0 + (l & 15), l >> 4);", "return (row0 + (l & 15)) * 128 + (l >> 4 << 4);", None),
    Mistake("fused_equation.cuh", "col - row == left_out", "row - col == left_out", None),
    Mistake("fused_reductions.cuh", "    __syncthreads();\n    for (int c", "    for (int c", UNORDERED),
    Mistake("fused_reductions.cuh", "least >= 0x1p-84f &&", "", None),
    Mistake("fused_weights.cuh", "  __syncthreads();\n  const uint32_t left", "  const uint32_t left", UNORDERED, True),
    Mistake("fused_gradient.cuh", "    copies_wait<0>();\n", "", (ptxemu.MissingWait,), True),
    Mistake("fused_weights.cuh", "(transposed_lane() ^ at.wn * 32)", "transposed_lane()", None, True),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES if EVERYTHING else [MISTAKES[k] for k in (0, 7)], ids=str)
def test_a_mistake_is_caught(mistake: Mistake, tmp_path: Path) -> None:
    """A dropped barrier, a dropped wait, a wrong swizzle, a wrong mask, a guard that guards nothing."""
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("*.cpp", "*.cu"))
    changed = tmp_path / "csrc" / "cuda" / mistake.file
    text = changed.read_text()
    assert text.count(mistake.right) == 1, "the source has changed: change this test with it"
    changed.write_text(text.replace(mistake.right, mistake.wrong))
    launch = Launcher(few(tmp_path / "csrc"))
    p = clip_problem(140, 270, 128, "off_diagonal")
    if "84" in mistake.right:
        p.x.mul_(torch.logspace(0, 2, 140)[:, None].bfloat16())
    check = wrong_gradient if mistake.gradient else wrong_rows
    if mistake.fault is None:
        assert check(launch, p) > (1e-2 if mistake.gradient else 1e-5)  # right: 2e-3, by weights in bfloat16, and 1e-7
    else:
        with pytest.raises(mistake.fault):
            check(launch, p)
