"""hopper_product: W Y and W^T X of a strip, right in any cut and schedule, what it counts, and mistakes in it caught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcl.backends.cuda.hopper import cut
from tests.triton.problems import error
from tools import ptxemu

from .emulation import EVERYTHING
from .fused_launching import Launcher, RefusedError
from .hopper_launching import few, multiply
from .test_hopper_launches import UNORDERED, Mistake, read_by_boxes, with_mistake

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16


def operands(m: int, n: int, d: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """A strip (m, n) in rows of a multiple of 8, and what its product takes, with NaN wherever nothing may be read."""
    generator = torch.Generator().manual_seed(m * n + d)

    def rows(count: int, width: int) -> Tensor:
        t = torch.full((count, -(-width // 8) * 8), float("nan"), dtype=BF16)
        t[:, :width] = torch.randn(count, width, generator=generator)
        return t[:, :width]

    return rows(m, n), rows(m if transposed else n, d)


def wrong(launch: Launcher, w: Tensor, z: Tensor, transposed: bool, splits: int = 1) -> float:
    found = multiply(launch, w, z, transposed, splits)[0]
    a = w.double().T if transposed else w.double()
    return error(found - 1, a @ z.double(), 1.0) if found.isfinite().all() else float("inf")


@pytest.fixture(scope="module")
def launch() -> Launcher:
    return Launcher(few())


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "d", "splits"),
    [
        (130, 300, 200, 1), (70, 129, 264, 1), (1, 1, 1, 1), (65, 100, 128, 1),
        (330, 410, 72, 3), (200, 390, 520, 2), (40, 600, 8, 9),
    ],
)  # fmt: skip
def test_any_size_and_cut_in_two_schedules(m: int, n: int, d: int, splits: int, transposed: bool) -> None:
    """Blocks of rows, columns and k that do not divide, one block and an odd number of them, splits with nothing to do."""
    w, z = operands(m, n, d, transposed)
    first, other = (multiply(Launcher(few(), seed), w, z, transposed, splits)[0] for seed in (0, 7))
    assert torch.equal(first, other)
    assert wrong(Launcher(few(), 3), w, z, transposed, splits) < 2e-6


@pytest.mark.parametrize("transposed", [True, False])
def test_the_unit_multiplies(launch: Launcher, transposed: bool) -> None:
    w, z = operands(140, 72, 40, transposed)
    plain, scaled = (multiply(launch, w, z, transposed, unit=unit)[0] - 1 for unit in (None, torch.tensor([0.25])))
    assert error(scaled, plain * 0.25) < 1e-6


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("d", [128, 512])
def test_counts(launch: Launcher, d: int, transposed: bool) -> None:
    """The products of whole tiles and no more, no bank conflict; z comes once for two blocks of rows, A for each 256 columns."""
    w, z = operands(256, 256, d, transposed)
    _, stats = multiply(launch, w, z, transposed)
    assert stats.ctas_per_cluster == 2
    assert stats.mma_flops == 2 * 256 * 256 * d
    assert stats.bank_conflicts == 0
    assert read_by_boxes(stats) == 2 * (256 * d + 256 * 256 * -(-d // 256))


def test_splits_fill_the_multiprocessors_with_parts_worth_a_tile() -> None:
    assert cut(6, 16896, 132) == 22
    assert cut(132, 16896, 132) == cut(200, 1 << 20, 132) == 1
    assert cut(1, 600, 132) == cut(1, 100, 132) == 1
    assert cut(1, 1 << 20, 132) == 132


def test_what_the_copy_engine_cannot_read_is_refused(launch: Launcher) -> None:
    w, z = operands(40, 48, 16, True)
    multiply(launch, w, z, True)
    for change in (
        {"pitch": 40},
        {"pitch": 52},
        {"z_stride": 20},
        {"d": 8},
        {"m": 0},
        {"n": 1 << 30},
        {"splits": 0},
        {"dtype": 0},
    ):
        with pytest.raises(RefusedError):
            multiply(launch, w, z, True, **change)


MISTAKES = [
    Mistake("a stage free when one CTA of two has multiplied it", "product.cuh", "empty_at + 8 * s, 8 * peers)",
            "empty_at + 8 * s, 8)",
            (*UNORDERED, ptxemu.Divergence)),
    Mistake("a stage released while multiplied", "product.cuh", "      products_wait<1>();\n", "", UNORDERED),
    Mistake("accumulators read in flight", "product.cuh", "  products_wait<0>();\n", "", (ptxemu.MissingWait,)),
    Mistake("half of z awaited", "product.cuh", "expect(full, L::stage);", "expect(full, L::stage / 2);",
            (*UNORDERED, ptxemu.Deadlock)),
    Mistake("both halves of z to the same place", "product.cuh", "at + L::a_bytes + k * box_bytes", "at + L::a_bytes", UNORDERED),
    Mistake("the other consumer's rows", "product.cuh", "stage + at.me * box_bytes", "stage + (1 - at.me) * box_bytes", None),
    Mistake("one step of k for another", "product.cuh", "z + 128 * k, 1)", "z + 128 * (k ^ 1), 1)", None),
    Mistake("no meeting at the end", "product.cuh", "  meet_cluster();\n}", "}", (ptxemu.MissingWait, ptxemu.OutOfBounds)),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES if EVERYTHING else MISTAKES[:1], ids=str)
def test_a_mistake_is_caught(mistake: Mistake, tmp_path: Path) -> None:
    library = with_mistake(mistake, tmp_path)
    w, z = operands(600, 300, 200, True)

    def worst() -> float:
        return max(wrong(Launcher(library, seed), w, z, True) for seed in (0, 1, 2))

    if mistake.fault is None:
        assert worst() > 1e-3
    else:
        with pytest.raises(mistake.fault):
            worst()
