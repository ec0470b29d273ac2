"""The strip form of backend="cuda": its schedule, and its kernels' PTX as compiled for sm_80 and sm_90, under tools/ptxemu.

A passing run is right, without a race, an access out of bounds or misaligned, or a read of what nobody wrote; other schedules
of warps and blocks give the same bits.
"""

from __future__ import annotations

import re
from itertools import product
from typing import NamedTuple

import pytest
import torch

import fastcl
from fastcl.backends import choice, reference
from fastcl.equation.masks import Mask
from fastcl.equation.pairs import CosineJS, Log, PairFunction, Power
from fastcl.equation.problem import Problem
from tests.engine.test_digits import SMOOTH, check_digits
from tests.triton.problems import (
    MASKS,
    PAIRS,
    all_wanted,
    check_distances_far_from_the_origin,
    check_given_reductions,
    check_rows_and_gradients,
    check_total,
    error,
    problem,
    roundings,
    upstream,
)  # fmt: skip
from tools import ptxemu

from .emulation import EVERYTHING, emulated

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Case(NamedTuple):
    """What to run: an architecture, and the arguments of problems.problem."""

    arch: int
    n: int
    m: int | None
    d: int
    dtype: torch.dtype = F32
    pair: str = "identity"
    operand: str = "dot"
    mask: str = "off_diagonal"
    bias: bool = False
    of: str = ""  # limits of logits, or guides

    def problem(self) -> Problem:
        more = {self.of: True} if self.of else {}
        return problem(
            self.n, self.m, self.d, operand=self.operand, pair=self.pair, mask=self.mask, bias=self.bias,
            columns=self.m is not None, dtype=self.dtype, **more,
        )  # fmt: skip

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        of = self.of and f"-{self.of}"
        return f"sm{self.arch}-{self.n}x{self.m or 'self'}x{self.d}-{kind}-{self.operand}-{self.pair}-{self.mask}{of}"


# Several tiles, several blocks in a tile, ragged in n and m; every dtype, operand, mask and kind of side once.
SUBSET = [
    Case(80, 140, 270, 40, BF16, bias=True),
    Case(80, 150, 270, 24, F32, mask="across_groups"),
    Case(80, 270, None, 33, F16),
    Case(80, 130, 140, 17, F64, operand="sqdist", bias=True),
    Case(80, 270, None, 16, F16, pair="exp", operand="sqdist"),
    Case(80, 200, 150, 24, BF16, pair="softplus", mask="within_groups"),
    Case(80, 150, 140, 24, F32, pair="log1p", mask="all", bias=True),
    Case(80, 1, 1, 3),
    Case(80, 140, 700, 8, mask="two_diagonals"),
    Case(80, 140, 270, 40, BF16, bias=True, of="limits"),
    Case(80, 270, None, 33, F16, of="guides"),
    Case(80, 130, 140, 17, F64, operand="sqdist", bias=True, of="guides"),
    Case(80, 270, None, 16, F16, pair="exp", operand="sqdist", of="limits"),
    Case(80, 200, 150, 24, F32, pair="softplus", mask="within_groups", of="limits"),
    Case(80, 65, 129, 24, BF16, pair="power", mask="all", bias=True, of="guides"),
    Case(80, 140, 700, 8, mask="two_diagonals", of="guides"),
]


def everything() -> list[Case]:
    cases = []
    for arch in (80, 90):
        for dtype in (F64, F32, F16, BF16):
            for operand in ("dot", "sqdist"):
                for mask in MASKS:
                    cases.append(Case(arch, 140, 270, 20, dtype, operand=operand, mask=mask, bias=True))
                    cases.append(Case(arch, 270, None, 20, dtype, operand=operand, mask=mask))
                    cases.append(Case(arch, 140, 270, 20, dtype, operand=operand, mask=mask, bias=True, of="guides"))
                    cases.append(Case(arch, 270, None, 20, dtype, operand=operand, mask=mask, of="limits"))
            for pair in PAIRS:
                cases.append(Case(arch, 140, 150, 20, dtype, pair=pair, mask="all", bias=True))
                cases.append(Case(arch, 150, None, 20, dtype, pair=pair))
                cases.append(Case(arch, 140, 150, 20, dtype, pair=pair, mask="all", bias=True, of="limits"))
                cases.append(Case(arch, 150, None, 20, dtype, pair=pair, of="guides"))
        edges = ((1, 129), (129, 1), (63, 128), (64, 127), (65, 129), (2, 2))
        cases += [Case(arch, n, m, 8, of=of) for n, m in edges for of in ("", "limits", "guides")]
        cases += [Case(arch, 40, 50, d, BF16) for d in (1, 2, 7, 300)]
    return cases


CASES = SUBSET + [case for case in everything() if case not in SUBSET] if EVERYTHING else SUBSET


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace of several tiles."""
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.2")
    monkeypatch.setenv("FASTCL_CUDA", "strip")


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
        limited = "_limited" if case.of else ""
        assert {f"strip_reduce{limited}", f"strip_weights{limited}", "merge_parts"} == set(session.names)
        for outer in ("sum",) if p.reduce == "sum" else ("contrast", "pooled", "sum"):
            check_total(p, outer, serving(p))
    first, *others = (answers(p, case.arch, seed) for seed in ((0, 7, 23) if EVERYTHING else (0, 7)))
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_rows_far_apart_take_the_guarded_path(dtype: torch.dtype) -> None:
    """Rows 100 times apart: blocks are done again with a maximum for each row and column, weights with two exponentials."""
    p = problem(150, 140, 24, columns=True, scale=10.0, dtype=dtype)
    p.x.mul_(torch.logspace(0, 2, 150, dtype=dtype)[:, None])
    with emulated():
        if dtype == F32:
            check_rows_and_gradients(p, serving(p))
        # At |z| = 1000 the definition's own z are rounded by 1e-13: its float64 gradients are no truth, its rows are.
        for mine, truth in zip(serving(p).rows(p), reference.rows(p), strict=True):
            assert error(mine, truth) < (1e-15 if dtype == F64 else 1e-6)


def test_a_row_and_a_column_with_nothing_left() -> None:
    """Sum 0, log-sum-exp -inf, gradient 0: from both masks of groups."""
    for pair in ("identity", "exp"):
        p = problem(70, 80, 8, pair=pair, mask="within_groups", columns=True)
        p.mask.group_x[3], p.mask.group_y[5] = 17, 18
        with emulated():
            check_rows_and_gradients(p, serving(p))
            assert serving(p).rows(p)[0][3] == (float("-inf") if pair == "identity" else 0.0)


@pytest.mark.parametrize("pair", ["identity", "softplus"])
def test_nan_comes_out_where_it_goes_in_and_nowhere_else(pair: str) -> None:
    p = problem(70, 80, 8, pair=pair, mask="all", columns=True)
    p.x[3, 2] = float("nan")
    with emulated():
        r, c = serving(p).rows(p)
    assert r.isnan().nonzero().flatten().tolist() == [3]
    assert c.isnan().all()


def test_offsets_that_pass_sixty_four_bits() -> None:
    """row_offset - col_offset is clamped, not wrapped: the diagonal lies beyond all pairs."""
    p = problem(30, 40, 8, columns=True)
    every = p.__class__(**{**p.__dict__, "mask": Mask("all")})
    far = p.__class__(**{**p.__dict__, "mask": Mask("off_diagonal", 2**63 - 1, -(2**63 - 1))})
    with emulated():
        assert all(torch.equal(a, b) for a, b in zip(serving(p).rows(far), serving(p).rows(every), strict=True))


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_reduce(n: int, m: int) -> None:
    for pair in ("identity", "softplus"):
        p = problem(n, m, 4, pair=pair, mask="all", columns=True)
        with emulated():
            r, c = serving(p).rows(p)
            grads = serving(p).gradients(p, r, c, torch.ones(n), torch.ones(m), all_wanted(p))
        empty = float("-inf") if pair == "identity" else 0.0
        assert r.tolist() == [empty] * n and c.tolist() == [empty] * m
        assert not grads.x.any() and not grads.y.any() and grads.scale == 0.0


STEEP = [("sqdist", Power(-1.0, 1e-6)), ("dot", CosineJS(1e-6)), ("sqdist", Log(1e-6)), ("dot", Power(-2.0, 1e-6))]


@pytest.mark.parametrize(("operand", "pair"), STEEP, ids=str)
@pytest.mark.parametrize("form", ["strip", "fused"])
def test_float16_sums_whose_slope_is_huge_where_no_pair_is(
    form: str, operand: str, pair: PairFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clamp at 1e-6 bounds the slope by up to 1e18, a million times every pair's: a unit from it would leave weights of 0."""
    monkeypatch.setenv("FASTCL_CUDA", form)
    p = problem(24, 33, 8, operand=operand, pair=pair, mask="all", columns=True, dtype=F16)
    with emulated():
        check_total(p, "sum", serving(p))


@pytest.mark.parametrize(("form", "dtype"), [("strip", F32), ("strip", F64), ("fused", F32)], ids=str)
@pytest.mark.parametrize(("pair", "low", "high"), SMOOTH, ids=lambda p: getattr(p, "name", ""))
def test_digits_near_zeros(
    form: str, dtype: torch.dtype, pair: PairFunction, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCL_CUDA", form)
    with emulated():
        check_digits(pair, low, high, "cuda", dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("form", ["strip", "fused"])
def test_16_bit_distances_lose_nothing_to_a_far_origin(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCL_CUDA", form)
    with emulated():
        check_distances_far_from_the_origin(choice.choose("cuda", torch.device("cpu"), dtype)[1], dtype)


@pytest.mark.parametrize("form", ["strip", "fused"])
def test_gradients_use_the_reductions_that_they_are_given(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA", form)
    p = problem(37, 53, 24, columns=True, dtype=BF16)
    with emulated():
        check_given_reductions(p, serving(p))


@pytest.mark.parametrize(("mask", "pair"), [("off_diagonal", "identity"), ("all", "softplus")])
@pytest.mark.parametrize("dtype", [F32, F16] if EVERYTHING else [F16], ids=str)
def test_cuda_and_triton_agree(dtype: torch.dtype, mask: str, pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two backends on the same inputs: to what either may differ from the reference."""
    pytest.importorskip("triton", reason="Triton is not installed, so there is nothing to agree with")
    from fastcl import triton_kernels
    from tests.triton.emulation import emulated as triton_emulated

    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.2")
    p = problem(140, 150, 20, pair=pair, mask=mask, columns=True, bias=True, dtype=dtype)
    up = upstream(p)
    mine = answers(p)
    with triton_emulated(80):
        check_rows_and_gradients(p, triton_kernels)
        r, c = triton_kernels.rows(p)
        theirs = [r, c, *triton_kernels.gradients(p, r, c, up.g, up.h, all_wanted(p))]
    for name, a, b in zip(("r", "c", "dx", "dy", "dscale", "dshift", "dbias_x", "dbias_y"), mine, theirs, strict=True):
        size = b.double().abs().sum().item() / 10 if b.ndim == 0 else 0.0
        assert error(a, b, size) <= 2 * roundings(p), name


# ---- the instrument ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        ("reduce_logsumexpIf", "rows"),
        ("weighIfNS1_14SoftmaxWeights", "gradients"),
        ("reduce_logsumexp_limitedIf", "rows"),
        ("weigh_limitedIfLb1", "gradients"),
    ],
)
def test_a_dropped_barrier_is_noticed(kernel: str, operator: str) -> None:
    """Each barrier of a kernel in turn is taken out of its PTX: none is there for nothing."""
    p = problem(70, 140, 8, columns=True, bias=True, scale=80.0, limits="limited" in kernel)
    p.x.mul_(torch.logspace(0, 2, 70)[:, None])
    up = upstream(p)
    with emulated() as session:
        backend = serving(p)
        r, c = backend.rows(p)

        def run() -> None:
            if operator == "rows":
                backend.rows(p)
            else:
                backend.gradients(p, r, c, up.g, up.h, all_wanted(p))

        run()
        found = 0
        for index in range(20):
            taken = []

            def without(text: str, index: int = index, taken: list[bool] = taken) -> str:
                def entry(match: re.Match[str]) -> str:
                    places = list(re.finditer(r"\n\s*(?:bar|barrier)\.(?:cta\.)?sync[^;]*;", match[0]))
                    if index >= len(places):
                        return match[0]
                    taken.append(True)
                    return match[0][: places[index].start()] + match[0][places[index].end() :]

                return re.sub(rf"\.entry [^\n]*{kernel}.*?\n}}", entry, text, flags=re.DOTALL)

            session.mutate = without
            try:
                run()
            except (ptxemu.SharedRace, ptxemu.Uninitialized):
                found += 1
            session.mutate = None
            if not taken:
                break
        assert found == index >= 1, f"{index} barriers, {found} noticed"


@pytest.mark.parametrize("kernel", ["strip_reduce", "strip_weights"])
def test_a_wrong_mask_is_noticed(kernel: str) -> None:
    """An off-diagonal mask one column away: the measure of every test here sees it."""
    p = problem(70, 80, 8, columns=True)
    with emulated() as session:

        def shifted(name: str, words: list[int]) -> list[int]:
            if name == kernel:
                words[4] = (words[4] + 1) % 2**64  # Equation.diff
            return words

        session.tamper = shifted
        with pytest.raises(AssertionError, match="off by"):
            check_rows_and_gradients(p, serving(p))


def test_memory_left_unwritten_is_noticed() -> None:
    """A kernel that reads what nobody wrote is a fault: here the partial results of a launch that does not happen."""
    p = problem(40, 50, 8)
    with emulated() as session:
        session.tamper = lambda name, words: None if name == "strip_reduce" else words
        with pytest.raises(ptxemu.Uninitialized):
            serving(p).rows(p)


def test_access_is_coalesced_and_without_bank_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of whole blocks: no access asks for more sectors, or takes more shared-memory wavefronts, than its bytes need."""
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "2")
    for pair, guides in product(("identity", "softplus"), (False, True)):
        p = problem(128, 256, 16, pair=pair, columns=True, bias=True, dtype=BF16, guides=guides)
        with emulated() as session:
            check_rows_and_gradients(p, serving(p))
            for name, stats in zip(session.names, session.stats, strict=True):
                if name.startswith("strip_"):
                    assert not stats.conflicts_by_site(), name
                    assert not stats.uncoalesced_by_site(), name


@pytest.mark.parametrize("mask", ["off_diagonal", "across_groups"])
def test_one_exponential_a_pair(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both kernels, 1/43 more where weights bring r and c to one reference; two where r or c are far from it."""
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "2")
    n, m = 128, 256
    p = problem(n, m, 16, mask=mask, columns=True, dtype=BF16)
    up = upstream(p)
    with emulated() as session:
        r, c = serving(p).rows(p)
        for far in (0.0, 100.0):
            serving(p).gradients(p, r, c + far, up.g, up.h, all_wanted(p))
        counts = [
            s.mufu / (n * m) for s, name in zip(session.stats, session.names, strict=True) if name.startswith("strip")
        ]
    assert counts == [1.0, 1.0 + 192 / 8192, 2.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_x": torch.zeros(29)}, "norms, biases, groups: expected 30 for rows and 40 for columns"),
        ({"bias_y": torch.zeros(40, dtype=F64)}, "bias_y: expected 0 elements or more of float32"),
        ({"bias_y": torch.zeros(80)[::2]}, "one after the other"),
        ({"dot": torch.zeros(30, 41)[:, 1:]}, "dot: expected rows that begin at multiples of 16 bytes"),
        ({"dot": torch.zeros(30, 40, dtype=F64)}, "dot: expected a matrix of float32"),
        ({"i0": -1}, "i0, j0: expected none below 0"),
        ({"i0": 1}, "norms, biases, groups: expected 31 for rows"),
        ({"rows": torch.zeros(59)}, "rows: expected 60 elements or more of float32"),
        ({"cols": torch.zeros(79)}, "cols: expected 80 elements or more"),
        ({"mask": "within_groups"}, "mask: 'within_groups' needs group_x and group_y"),
        ({"operand": "sqdist", "norm_x": None}, "operand: 'sqdist' needs norm_x and norm_y"),
        ({"pair": "mine"}, "pair: expected a pair function that was built in, got 'mine'"),
        ({"scale": torch.zeros(2)}, "scale: expected one number of float32 or float64"),
    ],
    ids=lambda change: ", ".join(change) if isinstance(change, dict) else "",
)
def test_what_a_kernel_must_not_touch_is_refused(change: dict[str, object], words: str) -> None:
    """Of the ops' callers too: nothing is launched."""
    one = torch.ones(())
    arguments = {
        "scale": one, "shift": one, "norm_x": torch.zeros(30), "norm_y": torch.zeros(40), "bias_x": None, "bias_y": None,
        "group_x": None, "group_y": None, "diff": 0, "period": 0, "mask": "all", "operand": "dot", "pair": "identity",
        "k0": 0.0, "k1": 0.0, "reduce": "logsumexp", "dot": torch.zeros(30, 40), "i0": 0, "j0": 0, "rows": torch.zeros(60),
        "cols": torch.zeros(80),
    }  # fmt: skip
    with emulated() as session:
        session.tamper = lambda name, words: None
        torch.ops.fastcl_emulated.strip_reduce(*arguments.values())
        with pytest.raises(ValueError, match=re.escape(words)):
            torch.ops.fastcl_emulated.strip_reduce(*(arguments | change).values())


def test_only_inside_the_context_and_cpu_kernels_stay_beside() -> None:
    x = torch.randn(5, 3)
    with pytest.raises(choice.BackendUnavailableError, match="it serves cuda tensors"):
        fastcl.functional.clip(x, x, logit_scale=1.0, backend="cuda")
    with emulated() as session:
        fastcl.functional.clip(x, x, logit_scale=1.0, backend="cpu")
        assert not session.names
        fastcl.functional.clip(x, x, logit_scale=1.0, backend="cuda")
        assert session.names
    with pytest.raises(choice.BackendUnavailableError, match="it serves cuda tensors"):
        fastcl.functional.clip(x, x, logit_scale=1.0, backend="cuda")
