"""The fused form of backend="cuda": its schedule, and its kernels' PTX as compiled for sm_80 and sm_90, under tools/ptxemu.

A passing run is right, without a race, an access out of bounds or misaligned, a missing wait, or a read of what nobody wrote;
other schedules of warps and blocks give the same bits. What single launches count and refuse is in test_fused_launches.py.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import fastcl
from fastcl.backends import choice, reference
from fastcl.equation.problem import Problem, Wanted
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

from .emulation import EVERYTHING, emulated

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    """What to run: an architecture, and the arguments of problems.problem."""

    arch: int
    n: int
    m: int | None
    d: int
    dtype: torch.dtype = BF16
    pair: str = "identity"
    operand: str = "dot"
    mask: str = "off_diagonal"
    bias: bool = False

    def problem(self) -> Problem:
        p = problem(
            self.n, self.m, self.d, operand=self.operand, pair=self.pair, mask=self.mask, bias=self.bias,
            columns=self.m is not None, dtype=self.dtype,
        )  # fmt: skip
        if self.dtype == F32:
            # Rows that tf32 holds exactly, as bfloat16 holds its own: what is measured is the kernel, not the input's rounding.
            for rows in (p.x, p.y):
                if rows is not None:
                    rows.view(torch.int32).bitwise_and_(~0x1FFF)
        return p

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"sm{self.arch}-{self.n}x{self.m or 'self'}x{self.d}-{kind}-{self.operand}-{self.pair}-{self.mask}"


# Several row blocks and column tiles, ragged in n, m and d; every dtype, operand, mask and kind of side once.
SUBSET = [
    Case(80, 300, 150, 100, bias=True),
    Case(80, 140, 270, 128, F32, mask="across_groups"),
    Case(80, 270, None, 33, F16),
    Case(80, 130, 140, 64, operand="sqdist", bias=True, mask="within_groups"),
    Case(80, 270, None, 72, F32, pair="exp", operand="sqdist"),
    Case(80, 140, 150, 136, F16, mask="all"),
    Case(80, 140, 150, 136, pair="softplus", mask="all"),
    Case(80, 140, 700, 64, mask="two_diagonals"),
    Case(80, 400, None, 16, mask="two_diagonals"),
]


def everything() -> list[Case]:
    cases = []
    for arch in (80, 90):
        for dtype, widths in ((BF16, (64, 128, 200, 256)), (F16, (64, 256)), (F32, (32, 100, 128))):
            for d in widths:
                cases.append(Case(arch, 140, 270, d, dtype, bias=True))
                cases.append(Case(arch, 270, None, d, dtype, pair="identity" if dtype == F16 else "softplus"))
            for pair in PAIRS if dtype != F16 else ():
                cases.append(Case(arch, 140, 150, 64, dtype, pair=pair, mask="all", bias=True))
                cases.append(Case(arch, 150, None, 64, dtype, pair=pair))
        for mask in (*MASKS, "two_diagonals"):
            for operand in ("dot", "sqdist"):
                cases.append(Case(arch, 140, 270, 64, operand=operand, mask=mask))
                cases.append(Case(arch, 400, None, 64, pair="exp", operand=operand, mask=mask))
        cases += [Case(arch, n, m, 64) for n, m in ((1, 1), (1, 129), (129, 1), (127, 128), (128, 129))]
        cases += [Case(arch, 40, 50, d) for d in (1, 7, 17)]
    return cases


CASES = SUBSET + [case for case in everything() if case not in SUBSET] if EVERYTHING else SUBSET


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch):
    """The fused form, float32 as tf32, and torch's precision put back."""
    monkeypatch.setenv("FASTCL_CUDA", "fused")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def serving(p: Problem) -> object:
    return choice.choose("cuda", p.x.device, p.x.dtype)[1]


def answers(p: Problem, arch: int = 80, seed: int = 0) -> list[torch.Tensor]:
    """Rows and gradients of one run in the schedule of `seed`."""
    up = upstream(p)
    with emulated(arch, seed):
        backend = serving(p)
        r, c = backend.rows(p)
        grads = backend.gradients(p, r, c, up.g, up.h, all_wanted(p))
    return [t for t in (r, c, *grads) if t is not None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_and_the_same_in_every_schedule(case: Case) -> None:
    p = case.problem()
    with emulated(case.arch) as session:
        check_rows_and_gradients(p, serving(p))
        assert {"fused_rows", "fused_merge", "fused_factors", "fused_gradient"} <= set(session.names)
        assert not any(name.startswith("strip") for name in session.names)
        for outer in ("sum",) if p.reduce == "sum" else ("contrast", "pooled") if EVERYTHING else ():
            check_total(p, outer, serving(p))
    first, *others = (answers(p, case.arch, seed) for seed in ((0, 7, 23) if EVERYTHING else (0, 7)))
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize("arch", [80, 90] if EVERYTHING else [80])
def test_rows_far_apart_take_the_guarded_path(arch: int) -> None:
    """Rows 100 times apart: tiles are done again with a maximum for each row and column, weights with two exponentials."""
    p = problem(200, 150, 128, columns=True, scale=4.0, dtype=BF16)
    p.x.mul_(torch.logspace(0, 2, 200)[:, None].bfloat16())
    with emulated(arch):
        check_rows_and_gradients(p, serving(p))


@pytest.mark.parametrize("scale", [-5.0, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    p = problem(140, 130, 64, columns=True, scale=scale, dtype=BF16)
    with emulated():
        check_rows_and_gradients(p, serving(p))


def test_a_row_and_a_column_with_nothing_left() -> None:
    """Sum 0, log-sum-exp -inf, gradient 0."""
    for pair in ("identity", "exp"):
        p = problem(140, 150, 64, pair=pair, mask="within_groups", columns=True, dtype=BF16)
        assert p.mask.group_x is not None and p.mask.group_y is not None
        p.mask.group_x[7], p.mask.group_y[130] = 5, 6
        with emulated():
            check_rows_and_gradients(p, serving(p))
            r, c = serving(p).rows(p)  # type: ignore[attr-defined]
        nothing = float("-inf") if pair == "identity" else 0.0
        assert r[7] == nothing and c[130] == nothing


def test_nan_in_gives_nan_out_and_nothing_else_does() -> None:
    p = problem(140, 150, 64, columns=True, dtype=BF16)
    p.x[3, 5] = float("nan")
    with emulated():
        r, c = serving(p).rows(p)  # type: ignore[attr-defined]
    visited = torch.arange(150) != 3 + 2
    assert r.isnan().nonzero().flatten().tolist() == [3]
    assert torch.equal(c.isnan(), visited)


def test_a_public_loss_end_to_end() -> None:
    """fastcl.functional.clip with backend="cuda", forward and backward, every kernel as compiled for sm_80."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(150, 64, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    scale = torch.tensor(14.0, requires_grad=True)
    with emulated(80) as session:
        loss = fastcl.functional.clip(x, y, logit_scale=scale, backend="cuda")
        loss.backward()
        assert session.names.count("fused_gradient") == 2
    exact = [t.detach().double().requires_grad_() for t in (x, y, scale)]
    truth = fastcl.functional.clip(exact[0], exact[1], logit_scale=exact[2], backend="reference")
    truth.backward()
    # bfloat16 rows, normalised in float32 and rounded again: 2^-8 of an element, and that times the scale in a logit.
    assert abs(loss.item() - truth.item()) < 14.0 * 2**-8
    for mine, theirs in zip((x, y, scale), exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert error(mine.grad, theirs.grad) < 3e-2


def launched(p: Problem, arch: int = 80) -> tuple[set[str], set[str]]:
    """The forms that served the rows and the gradients of a problem."""
    up = upstream(p)
    with emulated(arch) as session:
        r, c = serving(p).rows(p)  # type: ignore[attr-defined]
        rows = len(session.names)
        serving(p).gradients(p, r, c, up.g, up.h, all_wanted(p))  # type: ignore[attr-defined]
        forms = ["fused" if name.startswith("fused") else "strip" for name in session.names]
    return set(forms[:rows]), set(forms[rows:])


FUSED, STRIP = {"fused"}, {"strip"}


@pytest.mark.parametrize(
    ("dtype", "d", "precision", "form", "rows", "gradients"),
    [
        (BF16, 256, "tf32", "fused", FUSED, FUSED),
        (BF16, 264, "tf32", "fused", FUSED, STRIP),
        (F32, 132, "tf32", "fused", FUSED, STRIP),
        (F32, 64, "ieee", "fused", STRIP, STRIP),
        (BF16, 64, "tf32", "auto", FUSED, FUSED),
        (BF16, 64, "tf32", "strip", STRIP, STRIP),
        (torch.float64, 64, "tf32", "fused", STRIP, STRIP),
        (F16, 64, "tf32", "fused", FUSED, FUSED),
    ],
)
def test_what_the_kernels_do_not_hold_goes_to_the_strip_form(
    dtype: torch.dtype,
    d: int,
    precision: str,
    form: str,
    rows: set[str],
    gradients: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTCL_CUDA", form)
    torch.backends.cuda.matmul.fp32_precision = precision
    assert launched(problem(20, 30, d, columns=True, dtype=dtype)) == (rows, gradients)


def test_float16_sums_have_their_gradients_in_the_strip_form() -> None:
    assert launched(problem(20, 30, 64, pair="softplus", columns=True, dtype=F16)) == (FUSED, STRIP)


@pytest.mark.parametrize(
    ("d", "wanted", "sweeps"),
    [(64, "xy", ["fused_gradient"] * 2), (64, "y", ["fused_gradient"]), (136, "x", ["fused_rows", "fused_gradient"])],
)
def test_a_sum_takes_its_value_from_its_first_sweep(d: int, wanted: str, sweeps: list[str]) -> None:
    """Where it is narrow: 4 products for both sides, 2 for one. Wider ones take one more."""
    p = problem(140, 150, d, pair="softplus", operand="sqdist", mask="across_groups", dtype=BF16)
    with emulated() as session:
        total = serving(p).total  # type: ignore[attr-defined]
        value, _, _ = total(p, None, "sum", Wanted("x" in wanted, "y" in wanted, False, False, False, False))
    assert [name for name in session.names if name in ("fused_rows", "fused_gradient")] == sweeps
    assert error(value, reference.rows(p)[0].sum()) < 1e-6


def test_another_form_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA", "neither")
    p = problem(20, 30, 16, columns=True, dtype=BF16)
    with (
        pytest.raises(ValueError, match="FASTCL_CUDA: expected strip, fused, hopper or auto, got 'neither'"),
        emulated(),
    ):
        serving(p).rows(p)  # type: ignore[attr-defined]
