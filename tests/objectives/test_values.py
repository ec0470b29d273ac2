"""Three witnesses: the double loop, every backend (the reference among them), and the recorded values of the papers' codes."""

import pytest
import torch

import fastcl
from tests import oracle
from tests.golden import Record, records

from .cases import CASES, SIZES, Case
from .witnesses import close, double_loop, gradients, library, name_of, served, sets_of, upstream_for

DOUBLE = torch.float64


def leaves_and_arguments(case: Case, index: int, n: int, d: int):
    """Leaves for rows and for scalars, twice: for the library and for the double loop."""
    made = []
    for _ in range(2):
        rows = case.rows_of(n, d)
        arguments = case.arguments(index, n, d, rows[0])
        scalars = {
            name: torch.tensor(float(arguments.get(name, value)), dtype=DOUBLE, requires_grad=True)
            for name, value in case.scalars.items()
        }
        made.append((rows, arguments | scalars, [*rows, *scalars.values()]))
    return made


@pytest.mark.parametrize("backend", served(DOUBLE))
@pytest.mark.parametrize(("case", "index"), sets_of(), ids=name_of)
def test_value_and_gradients_are_those_of_the_double_loop(case: Case, index: int, backend: str) -> None:
    n, d = SIZES
    for reduction in ("mean", "sum", "none") if case.rows else ("mean",):
        (rows, arguments, leaves), (rows_o, arguments_o, leaves_o) = leaves_and_arguments(case, index, n, d)
        chosen = {"reduction": reduction} if case.rows else {}
        value = library(case, rows, backend, **arguments, **chosen)
        truth = double_loop(case, rows_o, **arguments_o, **chosen)
        assert value.shape == truth.shape
        assert value.dtype == DOUBLE
        close(value, truth)
        g = upstream_for(truth)
        for got, want in zip(gradients(value, leaves, g), gradients(truth, leaves_o, g), strict=True):
            close(got, want)


@pytest.mark.parametrize("case", [c for c in CASES if c.rows], ids=name_of)
def test_reductions_agree(case: Case) -> None:
    n, d = SIZES
    rows = case.rows_of(n, d)
    arguments = case.arguments(0, n, d, rows[0])
    none, total, mean = (library(case, rows, None, **arguments, reduction=r) for r in ("none", "sum", "mean"))
    assert none.shape == (case.values(rows, arguments),)
    close(none.sum(), total)
    if "positives" not in arguments or case.name == "siglip":  # the mean is over the rows that have positives
        close(none.mean(), mean)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_inputs_detached_by_definition_get_no_gradient(case: Case) -> None:
    n, d = SIZES
    rows = case.rows_of(n, d)
    value = library(case, rows, None, **case.arguments(0, n, d, rows[0]))
    found = torch.autograd.grad(value, rows, allow_unused=True)
    for k, g in enumerate(found):
        if k in case.detached:
            assert g is None or not g.any()
        else:
            assert g is not None
            assert g.any()


@pytest.mark.parametrize("backend", served(DOUBLE))
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_gradient_to_one_input_alone(case: Case, backend: str) -> None:
    """A gradient does not depend on which others are asked for."""
    n, d = SIZES
    rows = case.rows_of(n, d)
    arguments = case.arguments(0, n, d, rows[0])
    together = gradients(library(case, rows, backend, **arguments), rows)
    for k in range(len(rows)):
        if k in case.detached:
            continue
        alone = [x.detach().requires_grad_(i == k) for i, x in enumerate(rows)]
        value = library(case, alone, backend, **arguments)
        close(gradients(value, [alone[k]])[0], together[k], rtol=1e-12)


@pytest.mark.parametrize("rows_of_a_block", [1, 4])
@pytest.mark.parametrize(("case", "index"), sets_of(), ids=name_of)
def test_blocks_add_up(case: Case, index: int, rows_of_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocked backend with blocks of one row and of a few: the same as in one block."""
    n, d = 11, 4
    found = []
    for megabytes in ("8", str(rows_of_a_block * n * 8 / 2**20)):
        monkeypatch.setenv("FASTCL_WORKSPACE_MB", megabytes)
        rows = case.rows_of(n, d)
        value = library(case, rows, "blocked", **case.arguments(index, n, d, rows[0]))
        found.append([value, *gradients(value, rows)])
    for got, want in zip(*found, strict=True):
        close(got, want, rtol=1e-12)


def golden(public: bool) -> list[Record]:
    return [r for r in records() if r.public or not public]


@pytest.mark.parametrize("backend", served(DOUBLE))
@pytest.mark.parametrize("objective", sorted({r.objective for r in golden(public=True)} & {c.name for c in CASES}))
def test_recorded_values_of_the_papers_codes(objective: str, backend: str) -> None:
    case = next(c for c in CASES if c.name == objective)
    checked = 0
    for record in golden(public=True):
        if record.objective == objective:
            try:
                record.check(fastcl.functional, **({"backend": backend} if case.backend else {}))
            except AssertionError as error:
                raise AssertionError(f"{record.name}: {error}") from error
            checked += 1
    assert checked


@pytest.mark.parametrize("objective", sorted({r.objective for r in golden(public=False)}))
def test_double_loops_meet_the_recorded_values(objective: str) -> None:
    """All of n = 8 and every ninth of n = 37: the others take a minute and were checked when the loops were written."""
    chosen = [r for r in golden(public=False) if r.objective == objective]
    small = [r for r in chosen if len(r.inputs[0]) <= 16]
    large = [r for r in chosen if len(r.inputs[0]) > 16][::9]
    assert small
    assert large
    for record in (*small, *large):
        try:
            record.check(oracle)
        except AssertionError as error:
            raise AssertionError(f"{record.name}: {error}") from error
