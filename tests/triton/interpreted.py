"""Every kernel in Triton's interpreter, on ragged sizes, against the float64 reference. Run by test_interpreter.py.

The interpreter is chosen when the kernels are imported, so these tests need a process of their own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from fastcl.triton_kernels import pair_reduce, strip, tuning

import fastcl
from fastcl import triton_kernels
from fastcl.backends import reference
from fastcl.backends.choice import BackendUnavailableError, choose
from fastcl.backends.sides import Sides
from fastcl.equation.problem import Gradients, Problem, Wanted
from tests.objectives.cases import CASES, Case

from .problems import (
    MARGINS,
    MASKS,
    PAIRS,
    check,
    check_decisions_at_equality,
    check_distances_far_from_the_origin,
    check_given_reductions,
    check_limits_that_are_no_numbers,
    check_margin,
    check_nan_rows_of_guides,
    check_rows_and_gradients,
    check_total,
    error,
    problem,
    upstream,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns where a masked lane overflows
F32, F64 = torch.float32, torch.float64
FORMS = ("strip", "fused")
OPERANDS = ("dot", "sqdist")


@pytest.fixture(params=FORMS, autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTCL_TRITON", request.param)
    # Tiles of 32 x 32 or so: several of them, ragged, at sizes that the interpreter can run.
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.005")
    return str(request.param)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("mask", MASKS)
def test_logsumexp_of_two_sides(operand: str, mask: str) -> None:
    p = problem(45, 37, 24, operand=operand, mask=mask, bias=True, columns=True)
    check_rows_and_gradients(p, triton_kernels)
    for outer in ("sum", "contrast", "pooled"):
        check_total(p, outer, triton_kernels)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("mask", MASKS)
def test_logsumexp_of_one_side(operand: str, mask: str) -> None:
    p = problem(45, None, 24, operand=operand, mask=mask)
    check_rows_and_gradients(p, triton_kernels)
    for outer in ("contrast", "pooled"):
        check_total(p, outer, triton_kernels)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_sums(operand: str, pair: str) -> None:
    p = problem(37, 53, 20, operand=operand, pair=pair, bias=True, columns=True)
    check_rows_and_gradients(p, triton_kernels)
    check_total(p, "sum", triton_kernels)
    check_total(problem(53, None, 20, operand=operand, pair=pair), "sum", triton_kernels)


@pytest.mark.parametrize("mask", MASKS)
def test_masked_sums(mask: str) -> None:
    check_rows_and_gradients(problem(37, 53, 20, pair="softplus", mask=mask, columns=True), triton_kernels)
    check_rows_and_gradients(problem(53, None, 20, pair="softplus", mask=mask), triton_kernels)


@pytest.mark.parametrize("of", ["limits", "guides"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", ["identity", "softplus", "exp"])
def test_limits(pair: str, dtype: torch.dtype, of: str) -> None:
    """Either form asked for, the strip's kernels leave out the pairs above a limit, of the logit or of the guides' product."""
    for mask, m in (("off_diagonal", 53), ("within_groups", 53), ("off_diagonal", None)):
        p = problem(37, m, 20, pair=pair, mask=mask, bias=True, columns=True, dtype=dtype, **{of: True})
        check_rows_and_gradients(p, triton_kernels)
        for outer in ("sum",) if p.reduce == "sum" else ("contrast", "pooled"):
            check_total(replace(p, columns=False), outer, triton_kernels)


@pytest.mark.parametrize("of", ["limits", "guides"])
@pytest.mark.parametrize("period", [7, 22])
@pytest.mark.parametrize("pair", ["identity", "softplus"])
def test_limits_beside_a_short_period(pair: str, period: int, of: str) -> None:
    """Diagonals nearer to each other than a tile is wide are told by groups, and limits stay beside them."""
    for m in (None, 53):
        p = problem(44, m, 20, pair=pair, columns=True, **{of: True})
        p = replace(p, mask=p.mask._replace(period=period))
        check_rows_and_gradients(p, triton_kernels)
        for outer in ("sum",) if p.reduce == "sum" else ("contrast", "pooled"):
            check_total(replace(p, columns=False), outer, triton_kernels)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", MARGINS)
def test_false_negatives(name: str, guided: bool) -> None:
    check_margin(name, "triton", F32, guided)


@pytest.mark.parametrize("of", ["limits", "guides"])
@pytest.mark.parametrize("pair", ["identity", "softplus"])
@pytest.mark.parametrize("m", [53, None])
def test_limits_that_are_no_numbers(pair: str, m: int | None, of: str) -> None:
    check_limits_that_are_no_numbers(problem(37, m, 20, pair=pair, mask="all", columns=True, **{of: True}), triton_kernels)


@pytest.mark.parametrize("pair", ["logsumexp", "exp", "of z itself"])
def test_a_row_of_nan_stays_with_those_it_meets(pair: str) -> None:
    check_nan_rows_of_guides(pair, triton_kernels)


@pytest.mark.parametrize("pair", ["identity", "exp"])
@pytest.mark.parametrize("m", [53, None])
def test_forward_and_backward_decide_alike(pair: str, m: int | None) -> None:
    check_decisions_at_equality(m, pair, "triton", F32)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 65, 3), (65, 1, 17), (33, 31, 100), (20, 30, 200)])
def test_ragged_sizes(n: int, m: int, d: int) -> None:
    check_rows_and_gradients(problem(n, m, d, mask="all", columns=True), triton_kernels)
    check_total(problem(n, m, d, mask="all", pair="softplus"), "sum", triton_kernels)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sides(n: int, m: int) -> None:
    for pair in ("identity", "softplus"):
        check_rows_and_gradients(problem(n, m, 8, pair=pair, columns=True), triton_kernels)


@pytest.mark.parametrize("operand", OPERANDS)
def test_rows_of_no_width(operand: str) -> None:
    """Their sums have no address to be stored at."""
    for pair in ("identity", "softplus"):
        check_rows_and_gradients(problem(20, 37, 0, operand=operand, pair=pair, columns=True), triton_kernels)
        check_rows_and_gradients(problem(20, None, 0, operand=operand, pair=pair), triton_kernels)


def test_everything_masked() -> None:
    """Groups that never meet: log-sum-exp -inf, sum 0, gradients exactly 0."""
    for pair in ("identity", "exp"):
        p = problem(20, 40, 8, pair=pair, mask="within_groups", columns=True)
        assert p.mask.group_x is not None
        p = p.__class__(**{**p.__dict__, "mask": p.mask._replace(group_x=p.mask.group_x + 100)})
        check_rows_and_gradients(p, triton_kernels)


def with_exact_products(p: Problem, bits: int, size: float = 1.0) -> Problem:
    """Rows rounded to multiples of size / 2^bits: their products are exact in float32, in any order of summation.

    NumPy's matmul, which the interpreter multiplies by, rounds x y^T and y x^T differently; the hardware does not.
    """
    assert p.y is not None
    for rows in (p.x, p.y):
        rows.mul_(2.0**bits / size).round_().mul_(size / 2.0**bits)
    return p


def test_huge_norms_and_tiny_temperatures() -> None:
    """Rows of norm 1024 give logits of 1e6; a temperature of 1e-3 on unit rows, tiles whose rows lie hundreds of nats apart.

    Logits of 1e6 that lie within a few nats of each other would measure how float32 rounds 1e6: six bits keep them 256 apart.
    """
    far = problem(40, 50, 16, columns=True, length=1024.0, scale=1.0)
    check_rows_and_gradients(with_exact_products(far, 6, 1024.0), triton_kernels)
    near = problem(40, 50, 16, columns=True, scale=1024.0)
    check_rows_and_gradients(with_exact_products(near, 9), triton_kernels)


def test_rows_far_apart() -> None:
    """Rows 100 times apart in norm: their log-sum-exps differ by more than one exponential can span."""
    p = with_exact_products(problem(40, 50, 16, columns=True, scale=4.0), 9)
    p.x.mul_(torch.logspace(0, 6, 40, base=2.0).round()[:, None])
    check_rows_and_gradients(p, triton_kernels)


def test_duplicate_rows() -> None:
    p = problem(40, 40, 16, operand="sqdist", columns=True)
    p.y.copy_(p.x)  # type: ignore[union-attr]
    check_rows_and_gradients(p, triton_kernels)


def test_strided_inputs(form: str) -> None:
    p = problem(37, 41, 48, columns=True)
    wide = torch.randn(37, 96)
    wide[:, ::2] = p.x
    for x in (wide[:, ::2], p.x.T.contiguous().T, torch.cat((p.x, p.x), 1)[:, :48]):
        check_rows_and_gradients(p.__class__(**{**p.__dict__, "x": x}), triton_kernels)


def test_strided_vectors(form: str) -> None:
    """Biases and groups that are views, and the expanded upstream gradient that sum().backward() hands on."""
    p = problem(37, 41, 16, columns=True, bias=True, mask="across_groups")

    def every_other(t: torch.Tensor | None) -> torch.Tensor:
        assert t is not None
        return torch.stack((t, torch.full_like(t, 77)), 1)[:, 0]

    mask = p.mask._replace(group_x=every_other(p.mask.group_x), group_y=every_other(p.mask.group_y))
    views = {"bias_x": every_other(p.bias_x), "bias_y": every_other(p.bias_y), "mask": mask}
    check_rows_and_gradients(p.__class__(**{**p.__dict__, **views}), triton_kernels)
    x = p.x.clone().requires_grad_()
    exact = p.x.double().requires_grad_()
    assert p.y is not None
    fastcl.pair_reduce(x, p.y, backend="triton").sum().backward()
    fastcl.pair_reduce(exact, p.y.double(), backend="reference").sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert error(x.grad, exact.grad) < 4e-6


def test_only_what_is_wanted() -> None:
    """One gradient at a time gives the same numbers as all at once, and None for the rest."""
    for operand in OPERANDS:
        p = problem(30, 40, 16, operand=operand, bias=True, columns=True)
        up = upstream(p)
        r, c = triton_kernels.rows(p)
        for k, name in enumerate(Gradients._fields):
            wanted = Wanted(*(k == other for other in range(6)))
            got = triton_kernels.gradients(p, r, c, up.g, up.h, wanted)
            truth = reference.gradients(p, r, c, up.g, up.h, wanted)
            assert up.h is not None
            sizes = reference.gradients(p, r, c, up.g.abs(), up.h.abs(), wanted)
            for field, mine, theirs, size in zip(Gradients._fields, got, truth, sizes, strict=True):
                check(f"d{field} of {name}", mine, theirs, None, 4e-6, size)


def test_float16() -> None:
    check_rows_and_gradients(problem(37, 53, 24, columns=True, dtype=torch.float16), triton_kernels)
    p = problem(37, 53, 24, pair="exp", dtype=torch.float16, scale=14.0)
    # Weights of e^14 pass the largest float16, and most others are a millionth of that.
    p.y[:37].copy_(p.x)  # type: ignore[index]
    check_total(p, "sum", triton_kernels)


def test_float16_distances_of_a_cloud_far_from_the_origin() -> None:
    """diag(W 1) X - W Y cancels there: its two terms must take the same rounded weights."""
    p = problem(37, 53, 24, operand="sqdist", pair="exp", dtype=torch.float16, length=0.25, scale=-8.0)
    assert p.y is not None
    p.x.add_(3.0)
    p.y.add_(3.0)
    g, wanted = torch.ones(37), Wanted(True, True, False, False, False, False)
    got = triton_kernels.gradients(p, g, None, g, None, wanted)
    truth = reference.gradients(p, g, None, g, None, wanted)
    for mine, theirs in zip(got[:2], truth[:2], strict=True):
        assert mine is not None
        assert theirs is not None
        assert error(mine, theirs) < 1.5e-3


def test_float16_distances_lose_nothing_to_a_far_origin() -> None:
    check_distances_far_from_the_origin(triton_kernels, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_use_the_reductions_that_they_are_given(dtype: torch.dtype) -> None:
    check_given_reductions(problem(37, 53, 24, columns=True, dtype=dtype), triton_kernels)
    check_given_reductions(problem(37, None, 24, dtype=dtype), triton_kernels)


@pytest.mark.parametrize("m", [37, None])
def test_a_far_row_leaves_the_others_their_distances(m: int | None) -> None:
    p = problem(45, m, 24, operand="sqdist", pair="log1p", scale=0.5)
    p.x[5] = 1e6
    (r, _), right = triton_kernels.rows(p), reference.rows(p)[0]
    wanted = Wanted(True, m is not None, True, False, False, False)
    gradients = [each.total(p, None, "sum", wanted)[1] for each in (triton_kernels, reference)]
    torch.testing.assert_close(r, right, rtol=1e-5, atol=0.0)
    for mine, theirs in zip(*gradients, strict=True):
        if mine is not None and theirs is not None:
            size = theirs.norm(dim=1, keepdim=True) if theirs.ndim else theirs.abs()
            assert ((mine - theirs).abs() <= 1e-5 * size).all()


def test_a_centre_that_would_round_rows_is_not_taken() -> None:
    """Columns of a cloud about the origin stay as they are, and so do those of which one row would be rounded."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 3, generator=g).half() + torch.tensor([100.0, 0.0, 100.0]).half()
    rows[7, 2] = 0.001
    sides = Sides(Problem(**{**problem(50, None, 3, operand="sqdist").__dict__, "x": rows}), rows.dtype)
    assert sides.x[:, 1:].equal(rows[:, 1:])
    assert sides.x[:, 0].abs().max() < 10
    assert (sides.x[:, 0].float() - rows[:, 0].float()).unique().numel() == 1


def test_nan_comes_only_from_nan() -> None:
    p = problem(37, 53, 24, mask="all", columns=True)
    p.x[5, 3] = float("nan")
    r, c = triton_kernels.rows(p)
    assert c is not None
    assert r.isnan().nonzero().flatten().tolist() == [5]
    assert c.isnan().all()


def test_what_the_interpreter_cannot_serve_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        choose("triton", torch.device("cpu"), torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match="float32, float16 and bfloat16"):
        choose("triton", torch.device("cpu"), torch.float64)


def test_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_TRITON", "fast")
    with pytest.raises(ValueError, match="FASTCL_TRITON: expected one of strip, fused, auto, got 'fast'"):
        triton_kernels.rows(problem(3, 4, 8))


@pytest.mark.parametrize("form", ["strip"], indirect=True)  # what torch.compile sees does not depend on it
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of the Function that torch.compile traces, torch itself warns
def test_compiles_whole_and_for_every_batch_size(form: str) -> None:
    """torch.compile sees one op for each direction: no graph break, and no new graph for another n."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fastcl.functional.clip(x, y, logit_scale=14.0, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = 0
    for n in (5, 8, 13):
        x, y = (torch.randn(n, 12, requires_grad=True) for _ in range(2))
        expected = torch.autograd.grad(loss(x, y), (x, y))
        for mine, theirs in zip(torch.autograd.grad(compiled(x, y), (x, y)), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations
    nodes = [
        node for graph in counter.graphs for node in graph.graph.nodes
    ]  # floats of the signature may be inputs of a graph
    ops = [str(node.target) for node in nodes if node.op == "call_function" and "fastcl" in str(node.target)]
    assert ops == ["fastcl.pair_reduce"], ops


@pytest.mark.parametrize(
    ("version", "arch", "form"),
    [("3.6.0", "sm_90", "strip"), ("3.7.0+git1", "sm_90", "strip"), ("3.7.1", "sm_90", "fused"), ("3.10.0", "sm_90", "fused"),
     ("3.6.0", "sm_100", "strip"), ("3.7.1", "sm_100", "fused"), ("3.6.0", "sm_80", "fused"), ("3.6.0", "sm_120", "fused")],
)  # fmt: skip
def test_a_form_that_an_older_compiler_makes_a_race_of_is_neither_picked_nor_taken(
    version: str, arch: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning.triton, "__version__", version)
    monkeypatch.setattr(tuning, "architecture", lambda device: arch)
    half, single = (problem(3, 4, 128, dtype=dtype) for dtype in (torch.float16, torch.float32))
    monkeypatch.delenv("FASTCL_TRITON", raising=False)
    assert pair_reduce.form(half, gradients=False) == form
    monkeypatch.setenv("FASTCL_TRITON", "fused")
    assert pair_reduce.form(single, gradients=True) == "fused"  # multiplied without a matrix instruction
    if form == "fused":
        assert pair_reduce.form(half, gradients=True) == "fused"
        return
    said = f"expected Triton 3.7.1 or later on {arch}, got {version[:5]}.*; upgrade Triton, or unset"
    with pytest.raises(ValueError, match=said):
        pair_reduce.form(half, gradients=False)
    monkeypatch.setenv("FASTCL_TRITON", "strip")
    assert pair_reduce.form(half, gradients=False) == "strip"


def test_no_grid_is_taller_than_a_card_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries against millions of keys, and millions of rows against few columns: no blocks beyond 65,535 along y."""
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "16384")
    for n, m in ((2, 2_200_000), (1, 5_000_000), (5_000_000, 1), (3_000_000, None)):
        x = torch.empty(n, 0, dtype=torch.float16)
        p = problem(1, 1, 1).__class__(
            **{**problem(1, 1, 1).__dict__, "x": x, "y": None if m is None else x.new_empty(m, 0)}
        )
        for full_width in (False, True):
            rows, _ = strip.Strip(p).shape(full_width)
            for block in (tuning.STRIP_REDUCE, tuning.STRIP_WEIGHTS):
                assert -(-min(rows, n) // block[0]) <= strip.MOST_BLOCKS


@pytest.mark.parametrize("text", ["-1", "0", "much"])
def test_bad_workspace_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FASTCL_TRITON", "strip")
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", text)
    with pytest.raises(ValueError, match="expected a positive number of megabytes"):
        triton_kernels.rows(problem(3, 4, 8))


@pytest.mark.filterwarnings("ignore:kcl")
@pytest.mark.parametrize("case", [case for case in CASES if case.backend], ids=lambda case: case.id)
def test_every_loss(case: Case, form: str) -> None:
    """Each public loss with backend="triton" against the float64 reference on the same float32 rows, values and gradients."""
    n, d = 7, 12
    loss = getattr(fastcl.functional, case.name)
    rows = case.rows_of(n, d, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in rows]
    arguments = case.arguments(0, n, d, rows[0]) | case.scalars
    got = loss(*rows, **arguments, backend="triton")
    wide = case.arguments(0, n, d, exact[0]) | case.scalars
    truth = loss(*exact, **wide, backend="reference")
    got, truth = (value.total if hasattr(value, "total") else value for value in (got, truth))
    # The value is a difference of terms; each is known to a few roundings of its own size.
    size = case.terms(arguments) * case.logits(arguments)
    assert (got - truth).abs().item() <= 2e-6 * max(size, truth.abs().item())
    got.backward()
    truth.backward()
    for mine, theirs in zip(rows, exact, strict=True):
        if theirs.grad is None:
            assert mine.grad is None or not mine.grad.any()
        else:
            assert mine.grad is not None
            assert error(mine.grad, theirs.grad) <= 2e-6 * max(1.0, case.logits(arguments))
