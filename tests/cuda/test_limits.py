"""Limits of logits and of guides by backend="cuda": the strip's kernels, whatever form is asked for, under tools/ptxemu."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastcl
from fastcl.backends import cuda
from fastcl.backends.cuda.form import form
from fastcl.backends.cuda.strip import Strip
from fastcl.backends.products import mirror_
from fastcl.equation.problem import Wanted
from tests.engine import test_guides, test_limits
from tests.fuzz import draws
from tests.fuzz.case import Case, Found, run
from tests.fuzz.test_fuzz import hold
from tests.triton.problems import (
    MARGINS,
    Largest,
    all_wanted,
    check_decisions_at_equality,
    check_limits_that_are_no_numbers,
    check_margin,
    check_nan_rows_of_guides,
    check_rows_and_gradients,
    problem,
    upstream,
)

from .emulation import EVERYTHING, emulated

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.2")


@pytest.mark.parametrize("of", ["limits", "guides"])
@pytest.mark.parametrize("dtype", test_limits.DTYPES if EVERYTHING else [F32, BF16], ids=str)
@pytest.mark.parametrize("call", test_limits.FORMS, ids=lambda f: "-".join(map(str, f.values())) or "rows")
def test_the_public_op_is_the_definition(call: dict[str, Any], dtype: torch.dtype, of: str) -> None:
    """Limits of rows, of columns and of both, beside a diagonal and groups."""
    for n, m in ((65, 129), (150, None)):
        x, y = test_limits.rows(n, 12, 0, dtype), None if m is None else test_limits.rows(m, 12, 1, dtype)
        z = test_limits.logits(x, y, call.get("operand", "dot"), call.get("scale", 2.0), 0.1)
        own, other = test_guides.whole(n, 19, 2), test_guides.whole(m or n, 19, 3)
        guide = None if of == "limits" else own if m is None else (own, other)
        of_rows, of_cols = (test_limits.between(z, 0.6), test_limits.between(z.T, 0.8)) if guide is None else (
            test_guides.limits(n, 4), test_guides.limits(m or n, 5))  # fmt: skip
        groups = torch.arange(n) % 3, None if m is None else torch.arange(m) % 3
        given = [(of_rows, None, "off_diagonal")]
        if m is not None:
            given += [(None, of_cols, "all"), (of_rows, of_cols, fastcl.across_groups(*groups))]
        for *limits, base in given:
            with emulated() as session:
                test_limits.every_backend_agrees(x, y, fastcl.at_most(*limits, guide=guide, mask=base), call, cancels=True)
                assert "strip_reduce_limited" in session.names or "strip_weights_limited" in session.names


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16] if EVERYTHING else [F32], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("name", MARGINS)
def test_losses_with_a_margin(name: str, strategy: str, guided: bool, dtype: torch.dtype) -> None:
    with emulated() as session:
        check_margin(name, "cuda", dtype, guided, strategy)
        assert any("limited" in launched for launched in session.names)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("pair", ["identity", "exp"])
@pytest.mark.parametrize("m", [60, None])
def test_forward_and_backward_decide_alike(m: int | None, pair: str, dtype: torch.dtype) -> None:
    with emulated():
        check_decisions_at_equality(m, pair, "cuda", dtype)


@pytest.mark.parametrize("of", ["limits", "guides"])
@pytest.mark.parametrize("pair", ["identity", "softplus"])
@pytest.mark.parametrize("m", [83, None])
def test_limits_that_are_no_numbers(m: int | None, pair: str, of: str) -> None:
    p = problem(67, m, 8, pair=pair, mask="all", columns=m is not None, **{of: True})
    with emulated():
        check_limits_that_are_no_numbers(p, cuda)


@pytest.mark.parametrize("pair", ["logsumexp", "exp", "of z itself"])
def test_a_row_of_nan_stays_with_those_it_meets(pair: str) -> None:
    with emulated():
        check_nan_rows_of_guides(pair, cuda)


@pytest.mark.parametrize("of", ["limits", "guides"])
@pytest.mark.parametrize("pair", ["identity", "exp"])
def test_pairs_that_are_left_out_may_have_any_logit(pair: str, of: str) -> None:
    """Infinite, or beyond what its exponential holds: their weights are 0, and what others have a part in is finite."""
    p = problem(40, 150, 8, pair=pair, mask="all", columns=True, scale=3.0, **{of: True})
    assert p.mask.limit_x is not None
    p.x[2], p.x[3, 0] = 1e20, torch.inf
    p.mask.limit_x[2:4] = -torch.inf
    with emulated():
        r, c = cuda.rows(p)
        wanted = Wanted(True, False, False, True, False, False)
        got = cuda.gradients(p, r, c, torch.ones(40), torch.ones(150), wanted)
    assert r[2:4].tolist() == [-torch.inf if pair == "identity" else 0.0] * 2
    assert torch.isnan(r).sum() == 0 == torch.isnan(c).sum()
    assert not got.x[2:4].any() and got.x.isfinite().all() and got.shift.isfinite()


@pytest.mark.parametrize("asked", ["strip", "fused", "hopper", "auto"])
@pytest.mark.parametrize("arch", [80, 90])
def test_whatever_form_is_asked_for(arch: int, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA", asked)
    p = problem(70, 80, 64, columns=True, dtype=BF16, limits=True)
    with emulated(arch):
        for gradients in (False, True):
            assert form(p, gradients) == "strip"
            assert (form(replace(p, mask=p.mask.unlimited()), gradients) == "strip") == (asked == "strip")


def test_an_unknown_form_is_refused_beside_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_CUDA", "wide")
    with emulated(), pytest.raises(ValueError, match="FASTCL_CUDA: expected strip, fused, hopper or auto, got 'wide'"):
        cuda.rows(problem(3, 4, 8, limits=True))


@pytest.mark.parametrize("kernel", ["strip_reduce_limited", "strip_weights_limited"])
@pytest.mark.parametrize("word", [-3, -2, -1], ids=["limit_x", "limit_y", "guided"])
def test_what_a_kernel_is_not_told_is_noticed(word: int, kernel: str) -> None:
    """Every pointer of AtMost in either kernel: the measure of every test here sees one that is not read."""
    p = problem(70, 80, 8, columns=True, guides=True)

    def without(name: str, words: list[int]) -> list[int]:
        if name == kernel:
            words[word] = 0
        return words

    with emulated() as session:
        session.tamper = without
        with pytest.raises(AssertionError, match=r"off by|infinite"):
            check_rows_and_gradients(p, cuda)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limit_x": None, "limit_y": None}, "limit_x: expected limits of the rows, the columns or both, got none"),
        ({"limit_x": torch.zeros(29)}, "limit_x: expected 30 elements or more of float32"),
        ({"limit_y": torch.zeros(40, dtype=F64)}, "limit_y: expected 40 elements or more of float32"),
        ({"guided": torch.zeros(30, 44)[:, :40]}, "guided: expected the layout of dot"),
        ({"guided": torch.zeros(30, 40, dtype=F64)}, "guided: expected a matrix of float32"),
    ],
    ids=lambda change: ", ".join(change) if isinstance(change, dict) else "",
)
def test_what_a_kernel_must_not_read_is_refused(change: dict[str, object], words: str) -> None:
    one = torch.ones(())
    arguments: dict[str, object] = {
        "scale": one, "shift": one, "norm_x": None, "norm_y": None, "bias_x": None, "bias_y": None,
        "group_x": None, "group_y": None, "diff": 0, "period": 0, "mask": "all", "operand": "dot", "pair": "identity",
        "k0": 0.0, "k1": 0.0, "reduce": "logsumexp",
        "dot": torch.zeros(30, 40), "i0": 0, "j0": 0, "rows": torch.zeros(60), "cols": torch.zeros(80),
        "limit_x": torch.zeros(30), "limit_y": torch.zeros(40), "guided": torch.zeros(30, 40),
    }  # fmt: skip
    with emulated() as session:
        session.tamper = lambda name, words: None
        torch.ops.fastcl_emulated.strip_reduce_limited(*arguments.values())
        with pytest.raises(ValueError, match=re.escape(words)):
            torch.ops.fastcl_emulated.strip_reduce_limited(*(arguments | change).values())


@pytest.mark.parametrize("m", [400, None])
def test_memory_is_that_of_two_tiles(m: int | None) -> None:
    """Of the pairs' matrix, 0.64 MB, no tensor of the call is more than a part: the tiles and their halves share the workspace."""
    p = problem(400, m, 8, dtype=BF16, columns=m is not None, guides=True)
    up = upstream(p)
    with emulated(), Largest() as largest:
        r, c = cuda.rows(p)
        cuda.gradients(p, r, c, up.g, up.h, all_wanted(p))
        cuda.total(replace(p, columns=False), None, "pooled", all_wanted(p))
    assert largest.bytes <= 0.2 * 2**20


def test_workspace_holds_the_products_of_guides_too() -> None:
    for given in (problem(400, 300, 8, guides=True), problem(400, None, 8, dtype=F16, guides=True)):
        found = Strip(given)
        for tile in found.sweep():
            assert tile.guided is not None and tile.guided.stride() == tile.dot.stride()
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (tile.dot, tile.weights, tile.guided)}
            assert sum(held.values()) <= 0.2 * 2**20
        plain = Strip(replace(given, mask=given.mask.unlimited()))
        assert next(plain.sweep()).guided is None


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 1200])
def test_both_orders_of_a_pair_are_one_number(n: int) -> None:
    square = torch.randn(n, n + 3)[:, :n]
    square[0, -1] = torch.nan if n > 2 else 0.0
    wanted = square.triu() + square.triu(1).T
    mirror_(square)
    torch.testing.assert_close(square, wanted, rtol=0.0, atol=0.0, equal_nan=True)


def in_the_emulator(case: Case) -> Found:
    with emulated():
        return run(case)


@pytest.mark.parametrize("path", ["pair_reduce", "pair_total"])
def test_calls_that_nobody_thought_of(path: str) -> None:
    """Drawn masks with limits and guides, groups, offsets, biases, scales and dtypes."""
    hold(draws.emulated(path), 200 if EVERYTHING else 20, in_the_emulator)
