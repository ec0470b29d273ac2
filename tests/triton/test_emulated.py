"""The backend's real PTX for sm_80 and sm_90, executed under tools/ptxemu at the tiles of tuning.py, against float64.

A passing run is right, without a race (of blocks, or of a block's warps in shared or global memory), an access out of bounds
or misaligned, a read of what nobody wrote, or a missing wait; where determinism is promised, other schedules of warps and
blocks give the same bits.
"""

from __future__ import annotations

import mmap
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from fastcl.triton_kernels import fused, strip, tuning

import fastcl
from fastcl import triton_kernels
from fastcl.backends import reference
from fastcl.backends.tiles import State
from fastcl.equation.pairs import PairFunction
from fastcl.equation.problem import Problem
from tests.engine.test_digits import SMOOTH, check_digits
from tools import ptxemu
from tools.ptxemu import triton as ptxemu_triton

from .emulation import EVERYTHING, emulated
from .problems import (
    MARGINS,
    MASKS,
    PAIRS,
    Largest,
    all_wanted,
    check_margin,
    check_rows_and_gradients,
    check_total,
    error,
    problem,
    upstream,
)

_NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which mmap names from Python 3.13 on
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    """What to run: a form on an architecture, and the arguments of problems.problem."""

    form: str
    arch: int
    n: int
    m: int | None
    d: int
    dtype: torch.dtype = BF16
    pair: str = "identity"
    operand: str = "dot"
    mask: str = "off_diagonal"
    bias: bool = False
    precision: str = "ieee"
    of: str = ""  # limits of logits, or guides

    def problem(self) -> Problem:
        p = problem(
            self.n, self.m, self.d, operand=self.operand, pair=self.pair, mask=self.mask, bias=self.bias,
            columns=True, dtype=self.dtype, **({self.of: True} if self.of else {}),
        )  # fmt: skip
        if self.precision == "tf32":
            # Rows that tf32 holds exactly, as bfloat16 holds its own: what is measured is the kernel, not the input's rounding.
            for rows in (p.x, p.y):
                if rows is not None:
                    rows.view(torch.int32).bitwise_and_(~0x1FFF)
        return p

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") if self.dtype != F32 else self.precision
        of = self.of and f"-{self.of}"
        return (
            f"{self.form}-sm{self.arch}-{self.n}x{self.m or 'self'}x{self.d}-{kind}-{self.operand}-{self.pair}-{self.mask}{of}"
        )


# Several row blocks and column tiles of every kind, ragged in n and m; the kernels that everyone runs first.
SUBSET = [
    Case("strip", 80, 200, 300, 128, bias=True),
    Case("fused", 80, 300, 280, 128),
    Case("fused", 90, 300, 150, 128),
    Case("fused", 80, 300, None, 64, F16),
    Case("fused", 80, 200, 150, 128, pair="softplus"),
    Case("strip", 90, 150, None, 64, pair="softplus"),
    Case("fused", 80, 200, 150, 72, F32, pair="exp", operand="sqdist", precision="tf32"),
    Case("fused", 80, 40, 50, 40, F32, precision="ieee", mask="across_groups"),
    Case("strip", 80, 140, 700, 16, mask="two_diagonals"),
    Case("fused", 80, 140, 700, 64, mask="two_diagonals"),
    Case("fused", 80, 400, None, 16, mask="two_diagonals"),
    Case("strip", 80, 150, 220, 64, bias=True, of="limits"),
    Case("fused", 80, 150, None, 64, F16, pair="softplus", of="limits"),
    Case("strip", 80, 150, 220, 64, bias=True, of="guides"),
    Case("fused", 80, 150, None, 64, F16, pair="softplus", of="guides"),
]


def widths(arch: int, kind: str) -> list[int]:
    """A d for each tuning entry: full, ragged, and one that is looped."""
    tiles = tuning.ROWS[f"sm_{arch}"][kind]
    kept = [tile.BD for tile in tiles if tile.KEEP]
    return sorted({*kept, *(d - 24 for d in kept), 640 if kind == "half" else 200, 1, 17})


def everything() -> list[Case]:
    cases = []
    for arch in (80, 90):
        for form in ("strip", "fused"):
            for dtype, kind in ((BF16, "half"), (F16, "half"), (F32, "tf32"), (F32, "ieee")):
                precision = kind if dtype == F32 else "ieee"
                for d in widths(arch, kind):
                    cases.append(Case(form, arch, 140, 270, d, dtype, bias=True, precision=precision))
                    cases.append(Case(form, arch, 270, None, d, dtype, pair="softplus", precision=precision))
            for mask in MASKS:
                for operand in ("dot", "sqdist"):
                    cases.append(Case(form, arch, 140, 270, 64, pair="identity", operand=operand, mask=mask))
                    cases.append(Case(form, arch, 270, None, 64, pair="exp", operand=operand, mask=mask))
            cases += [Case(form, arch, 140, 150, 64, pair=pair) for pair in PAIRS]
            limited = product((150, None), ("identity", "exp"), ("limits", "guides"))
            cases += [Case(form, arch, 140, m, 64, pair=pair, of=of) for m, pair, of in limited]
            cases += [Case(form, arch, n, m, 64) for n, m in ((1, 1), (1, 129), (129, 1), (127, 128), (128, 129))]
    return cases


CASES = SUBSET + [case for case in everything() if case not in SUBSET] if EVERYTHING else SUBSET


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch):
    """A workspace of several tiles, and torch's float32 precision put back."""
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.2")
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_and_the_same_in_every_schedule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_TRITON", case.form)
    torch.backends.cuda.matmul.fp32_precision = case.precision
    p = case.problem()
    if case.form == "fused" and tuning.unfenced(f"sm_{case.arch}", tuning.kind_of(p.x.dtype, case.precision)):
        with emulated(case.arch), pytest.raises(ValueError, match="upgrade Triton"):
            triton_kernels.rows(p)
        return
    with emulated(case.arch, warp_racecheck=True) as session:
        check_rows_and_gradients(p, triton_kernels)
        assert session.stats, "no kernel ran"
        for outer in ("sum",) if p.reduce == "sum" else ("contrast", "pooled") if EVERYTHING else ("contrast",):
            check_total(p, outer, triton_kernels)
    first, *others = (answers(p, case.arch, seed) for seed in (0, 7, 23))
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def answers(p: Problem, arch: int, seed: int) -> list[torch.Tensor]:
    """Rows and gradients of one run in the schedule of `seed`."""
    up = upstream(p)
    with emulated(arch, seed):
        r, c = triton_kernels.rows(p)
        grads = triton_kernels.gradients(p, r, c, up.g, up.h, all_wanted(p))
    return [t for t in (r, c, *grads) if t is not None]


def test_biases_of_both_sides_make_one_logit_in_both_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """At biases of 1e6 y's gradient was off by a tenth of it, since z of y against x rounded apart from z of x against y."""
    monkeypatch.setenv("FASTCL_TRITON", "fused")
    p = problem(66, 70, 64, bias=True, columns=True, dtype=BF16, scale=1e6)
    assert p.bias_x is not None and p.bias_y is not None
    p.bias_x.mul_(1e7), p.bias_y.mul_(1e7), p.shift.fill_(3e5)
    up, truths = upstream(p), []
    exact = {name: t.double() for name, t in vars(p).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    for of, backend, wide in ((p, triton_kernels, False), (replace(p, **exact), reference, True)):
        with emulated(80):
            r, c = backend.rows(of)  # type: ignore[attr-defined]
            g, h = (None if t is None else t.double() if wide else t for t in (up.g, up.h))
            truths.append(backend.gradients(of, r, c, g, h, all_wanted(p)))  # type: ignore[attr-defined]
    got, truth = truths
    assert error(got.x, truth.x) < 8e-3
    assert error(got.y, truth.y) < 8e-3


@pytest.mark.parametrize("arch", [80, 90] if EVERYTHING else [80])
@pytest.mark.parametrize("form", ["strip", "fused"])
def test_rows_far_apart_take_the_guarded_path(arch: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 100 times apart: tiles are done again with a maximum for each row and column, weights with two exponentials."""
    monkeypatch.setenv("FASTCL_TRITON", form)
    p = problem(200, 150, 128, columns=True, scale=4.0, dtype=BF16)
    p.x.mul_(torch.logspace(0, 2, 200)[:, None].bfloat16())
    with emulated(arch):
        check_rows_and_gradients(p, triton_kernels)


@pytest.mark.parametrize("m", [400, None])
def test_guides_take_no_more_memory_than_tiles(m: int | None) -> None:
    """Of the pairs' matrix, 0.64 MB, no tensor of the call is more than a part: both tiles share the workspace."""
    p = problem(400, m, 16, dtype=BF16, columns=m is not None, guides=True)
    up = upstream(p)
    with emulated(80), Largest() as largest:
        r, c = triton_kernels.rows(p)
        triton_kernels.gradients(p, r, c, up.g, up.h, all_wanted(p))
        triton_kernels.total(replace(p, columns=False), None, "pooled", all_wanted(p))
    assert largest.bytes <= 0.2 * 2**20


@pytest.mark.parametrize("dtype", [F16, BF16] if EVERYTHING else [BF16], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", MARGINS if EVERYTHING else ["clip", "nt_xent"])
def test_losses_with_a_margin(name: str, guided: bool, dtype: torch.dtype) -> None:
    with emulated(80) as session:
        check_margin(name, "triton", dtype, guided, "relative")
        assert session.stats


@pytest.mark.parametrize("form", ["strip", "fused"] if EVERYTHING else ["strip"])
@pytest.mark.parametrize(
    ("pair", "low", "high"), SMOOTH if EVERYTHING else SMOOTH[:1], ids=lambda p: getattr(p, "name", "")
)
def test_digits_near_zeros(
    form: str, pair: PairFunction, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCL_TRITON", form)
    with emulated(80):
        check_digits(pair, low, high, "triton", F32)


@pytest.mark.parametrize("form", ["strip", "fused"] if EVERYTHING else ["strip"])
def test_a_public_loss_end_to_end(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fastcl.functional.clip with backend="triton", forward and backward, every kernel as compiled for sm_80."""
    monkeypatch.setenv("FASTCL_TRITON", form)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(150, 64, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    scale = torch.tensor(14.0, requires_grad=True)
    with emulated(80) as session:
        loss = fastcl.functional.clip(x, y, logit_scale=scale, backend="triton")
        loss.backward()
        assert session.stats
    exact = [t.detach().double().requires_grad_() for t in (x, y, scale)]
    truth = fastcl.functional.clip(exact[0], exact[1], logit_scale=exact[2], backend="reference")
    truth.backward()
    # bfloat16 rows, normalised in float32 and rounded again: 2^-8 of an element, and that times the scale in a logit.
    assert abs(loss.item() - truth.item()) < 14.0 * 2**-8
    for mine, theirs in zip((x, y, scale), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert error(mine.grad, theirs.grad) < 3e-2


def test_column_state_without_barriers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument itself: a program's next row block reads the columns that other warps left; barriers order the two."""
    p = problem(520, 100, 64, columns=True, dtype=BF16)
    monkeypatch.setitem(ptxemu_triton._state, "modules", {})
    monkeypatch.setattr(ptxemu_triton, "Module", lambda text: ptxemu.Module(text.replace("bar.sync \t0;", "")))
    with emulated(80, warp_racecheck=True, racecheck=False, initcheck=False), pytest.raises(ptxemu.GlobalRace):
        fused.rows(p)


def test_memory_left_unwritten_is_noticed() -> None:
    """The instrument itself: a kernel that reads what nobody wrote is a fault."""
    p = problem(40, 50, 16, dtype=BF16)
    with emulated(80):
        unwritten = p.scale.new_empty(2, 2, 50)
        with pytest.raises(ptxemu.Uninitialized):
            strip.Strip(p).join(unwritten, State.of(p, 50))


def test_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2^25 elements apart: from the 64th on their elements lie past 2^31. Only the pages of the rows exist."""
    n, stride = 70, 1 << 25
    reserved = mmap.mmap(-1, n * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    p = problem(n, 50, 128, dtype=BF16, columns=True)
    x = torch.frombuffer(reserved, dtype=BF16).as_strided((n, 128), (stride, 1))
    x.copy_(p.x)
    monkeypatch.setattr(ptxemu.module, "DeviceMemory", _in_place(x))
    monkeypatch.setenv("FASTCL_TRITON", "fused")
    with emulated(80) as session:
        check_rows_and_gradients(p.__class__(**{**p.__dict__, "x": x}), triton_kernels)
        assert session.stats


def _in_place(huge: torch.Tensor) -> type[ptxemu.module.DeviceMemory]:
    """Device memory in which one tensor stays where it is: its gigabytes of nothing need no copy."""

    class InPlace(ptxemu.module.DeviceMemory):  # type: ignore[misc]
        def address(self, x: torch.Tensor) -> int:
            storage = huge.untyped_storage()
            if x.untyped_storage().data_ptr() != storage.data_ptr():
                return int(super().address(x))
            self.lib.ptxemu_memory_add(self.handle, storage.data_ptr(), storage.nbytes())
            return x.data_ptr()

    return InPlace
