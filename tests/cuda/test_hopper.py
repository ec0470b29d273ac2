"""The Hopper form of backend="cuda": its schedule, and its kernels' PTX as compiled for sm_90a, under tools/ptxemu.

A passing run is right, without a race, an access out of bounds or misaligned, a missing wait or fence, or a read of what nobody
wrote; other schedules of warps and blocks give the same bits. What single launches count and refuse is in test_hopper_launches.py.
Plain runs take a log-sum-exp in bfloat16, which compiles in seconds; make test-gpu-emulated takes everything.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch

from bench.gpu_timing import by_torchs_products
from fastcl.backends import choice, reference
from fastcl.equation.masks import Mask
from fastcl.equation.problem import Problem, Wanted
from tests.objectives.cases import CASES as LOSSES
from tests.objectives.cases import Case as Loss
from tests.triton.problems import (
    MASKS,
    PAIRS,
    all_wanted,
    check_rows_and_gradients,
    check_total,
    error,
    problem,
    upstream,
)

from .emulation import EVERYTHING, Session, emulated
from .hopper_launching import few
from .test_losses import check_loss

F16, BF16 = torch.float16, torch.bfloat16


class Case(NamedTuple):
    """The arguments of problems.problem."""

    n: int
    m: int | None
    d: int
    dtype: torch.dtype = BF16
    pair: str = "identity"
    operand: str = "dot"
    mask: str = "off_diagonal"
    bias: bool = False

    def problem(self) -> Problem:
        return problem(
            self.n, self.m, self.d, operand=self.operand, pair=self.pair, mask=self.mask, bias=self.bias,
            columns=self.m is not None, dtype=self.dtype,
        )  # fmt: skip

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.n}x{self.m or 'self'}x{self.d}-{kind}-{self.operand}-{self.pair}-{self.mask}"


# Ragged in n, m and d; every mask, operand and kind of side once.
SUBSET = [
    Case(300, 150, 100, bias=True),
    Case(270, None, 33),
    Case(130, 140, 64, operand="sqdist", bias=True, mask="within_groups"),
    Case(140, 150, 264, mask="all"),
    Case(140, 700, 33, mask="two_diagonals"),
    Case(400, None, 33, mask="two_diagonals"),
]


def everything() -> list[Case]:
    cases = []
    for dtype in (BF16, F16):
        for d in (1, 7, 64, 200, 256, 264, 400, 512, 600, 768, 776, 1024):
            cases += [Case(140, 270, d, dtype), Case(270, None, d, dtype, bias=True)]
        for pair in PAIRS:
            cases += [
                Case(140, 150, 64, dtype, pair, mask="all", bias=True),
                Case(150, None, 64, dtype, pair),
                Case(140, 150, 72, dtype, pair, "sqdist"),
                Case(140, 150, 800, dtype, pair, mask="all"),
            ]
        for mask in (*MASKS, "two_diagonals"):
            for operand in ("dot", "sqdist"):
                for d in (64, 768, 800):
                    cases.append(Case(140, 270, d, dtype, operand=operand, mask=mask, bias=True))
                    cases.append(Case(400, None, d, dtype, "exp", operand, mask))
        cases += [Case(n, m, 64, dtype) for n, m in ((1, 1), (1, 129), (257, 1), (255, 64), (256, 65))]
    return cases


CASES = SUBSET + (everything() if EVERYTHING else [])


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA", "hopper")


def emulated_hopper(seed: int = 0):
    return emulated(90, seed, None if EVERYTHING else few())


def serving(p: Problem):
    return choice.choose("cuda", p.x.device, p.x.dtype)[1]


def only_hopper(session: Session) -> bool:
    return bool(session.names) and all(name.startswith("hopper") or name == "fused_factors" for name in session.names)


def answers(p: Problem, seed: int) -> list[torch.Tensor]:
    """Rows and gradients of one run in the schedule of `seed`."""
    up = upstream(p)
    with emulated_hopper(seed):
        r, c = serving(p).rows(p)
        grads = serving(p).gradients(p, r, c, up.g, up.h, all_wanted(p))
    return [t for t in (r, c, *grads) if t is not None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_and_the_same_in_every_schedule(case: Case) -> None:
    p = case.problem()
    with emulated_hopper() as session:
        check_rows_and_gradients(p, serving(p))
        for outer in ("sum",) if p.reduce == "sum" else ("contrast", "pooled") if EVERYTHING else ():
            check_total(p, outer, serving(p))
        assert only_hopper(session)
    if EVERYTHING or case.m is None:
        first, other = (answers(p, seed) for seed in (0, 7))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def test_strips_of_a_small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips, the triangle's on and off the diagonal."""
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.01")
    for p in (problem(300, 270, 32, columns=True, dtype=BF16), problem(300, None, 32, dtype=BF16)):
        with emulated_hopper() as session:
            check_rows_and_gradients(p, serving(p))
            assert session.names.count("hopper_weights") >= 3


def test_many_rows_are_swept() -> None:
    """As many blocks as half of the multiprocessors: W Y stays in registers while the weights are stored."""
    p = problem(66 * 128 - 40, 70, 24, columns=True, dtype=BF16)
    p = Problem(**{**p.__dict__, "mask": Mask("off_diagonal", -3, 0)})
    wanted = Wanted(True, True, True, False, False, False)
    up = upstream(p)
    with emulated_hopper() as session:
        r, c = serving(p).rows(p)
        got = serving(p).gradients(p, r, c, up.g, up.h, wanted)
        assert "hopper_sweep" in session.names
        assert "hopper_weights" not in session.names
    truth = reference.gradients(p, r, c, up.g, up.h, wanted)
    for mine, theirs in zip(got[:2], truth[:2], strict=True):
        assert mine is not None and error(mine, theirs) < 8e-3


def test_rows_far_apart_are_done_again_with_maxima() -> None:
    """Rows 300 times apart: sums that lie far under the one reference are replaced, the others keep every bit."""
    p = problem(150, 140, 64, columns=True, scale=40.0, dtype=BF16)
    with emulated_hopper():
        before, _ = serving(p).rows(p)
        p.x[1:].mul_(torch.logspace(0, -2.5, 149)[:, None].bfloat16())
        p.x[0].mul_(3.0)
        r, _ = serving(p).rows(p)
        check_rows_and_gradients(p, serving(p))
    assert before.isfinite().all() and r.isfinite().all()


@pytest.mark.parametrize("scale", [-5.0, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    p = problem(140, 130, 64, columns=True, scale=scale, dtype=BF16)
    with emulated_hopper():
        check_rows_and_gradients(p, serving(p))


def test_a_row_and_a_column_with_nothing_left() -> None:
    """Log-sum-exp -inf, gradient 0."""
    p = problem(140, 150, 64, mask="within_groups", columns=True, dtype=BF16)
    assert p.mask.group_x is not None
    assert p.mask.group_y is not None
    p.mask.group_x[7], p.mask.group_y[130] = 5, 6
    with emulated_hopper():
        check_rows_and_gradients(p, serving(p))
        r, c = serving(p).rows(p)
    assert r[7] == float("-inf")
    assert c[130] == float("-inf")


def test_nan_in_gives_nan_out_and_nothing_else_does() -> None:
    p = problem(140, 150, 64, columns=True, dtype=BF16)
    p.x[3, 5] = float("nan")
    with emulated_hopper():
        r, c = serving(p).rows(p)
    assert r.isnan().nonzero().flatten().tolist() == [3]
    assert torch.equal(c.isnan(), torch.arange(150) != 3 + 2)


def test_infinity_in_a_bias_leaves_out_its_row() -> None:
    p = problem(140, 130, 64, columns=True, bias=True, dtype=BF16)
    assert p.bias_x is not None
    p.bias_x[5] = float("-inf")
    with emulated_hopper():
        check_rows_and_gradients(p, serving(p))


def test_rows_that_the_copy_engine_cannot_read_are_copied() -> None:
    """Transposed, expanded and offset rows."""
    for x in (
        torch.randn(24, 140).bfloat16().t(),
        torch.randn(1, 24).bfloat16().expand(140, 24),
        torch.randn(140, 25).bfloat16()[:, 1:],
    ):
        p = Problem(**{**problem(140, 130, 24, columns=True, dtype=BF16).__dict__, "x": x})
        with emulated_hopper():
            check_rows_and_gradients(p, serving(p))


@pytest.mark.parametrize(
    ("dtype", "arch", "form", "first"),
    [(BF16, 90, "auto", "hopper"), (BF16, 90, "strip", "strip"), (torch.float32, 90, "hopper", "strip")]
    + [(F16, 80, "hopper", "fused")] * EVERYTHING,
)
def test_which_problems_it_serves(
    dtype: torch.dtype, arch: int, form: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two bytes on compute capability 9.0, by itself and when asked; all others as before."""
    monkeypatch.setenv("FASTCL_CUDA", form)
    p = problem(20, 30, 64, columns=True, dtype=dtype)
    names: list[str] = []

    def note(name: str, words: list[int]) -> list[int] | None:
        names.append(name)
        return None

    with emulated(arch, library=None if arch == 80 else few()) as session:
        session.tamper = note
        serving(p).rows(p)
    assert names[0].startswith(first)


def test_the_day_of_the_card_times_torchs_products_beside_ours() -> None:
    p = problem(140, 70, 24, columns=True, dtype=BF16)
    up = upstream(p)
    with emulated_hopper() as session:
        r, c = serving(p).rows(p)
        gradients = partial(serving(p).gradients, p, r, c, up.g, up.h, Wanted(True, True, False, False, False, False))
        ours = gradients()
        assert session.names.count("hopper_product") == 2
        torchs = by_torchs_products(gradients)
        assert session.names.count("hopper_product") == 2
    for mine, theirs in zip(ours[:2], torchs[:2], strict=True):
        assert error(mine, theirs) < 1e-2


@pytest.mark.skipif(not EVERYTHING, reason="every loss takes every kernel: make test-gpu-emulated")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("loss", [case for case in LOSSES if case.backend], ids=lambda case: case.id)
def test_every_loss(loss: Loss, dtype: torch.dtype) -> None:
    with emulated_hopper() as session:
        check_loss(loss, 0, dtype)
    assert not any(name.startswith("strip") for name in session.names)
