"""Gradients by themselves: against finite differences, in every dtype, when losses are small, and what backward allows."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from .cases import CASES, Case
from .witnesses import gradients, library, name_of, served, sets_of, upstream_for

DOUBLE = torch.float64
# Where by definition the gradient is not that of the value, the double loop and test_analytic.py hold it instead.
SMOOTH = [(case, index) for case, index in sets_of() if not case.is_surrogate(index)]


def of_leaves(case: Case, index: int, backend: str | None, reduction: str | None, n: int = 4, d: int = 3):
    """The objective as a function of its differentiable leaves, and those leaves."""
    rows = [x.detach() for x in case.rows_of(n, d)]
    arguments = case.arguments(index, n, d, rows[0])
    arguments |= {"reduction": reduction} if reduction else {}
    places = [k for k in range(len(rows)) if k not in case.detached]
    names = list(case.scalars)
    leaves = [rows[k] for k in places]
    leaves += [torch.tensor(float(arguments.get(k, case.scalars[k])), dtype=DOUBLE) for k in names]

    def call(*values: Tensor) -> Tensor:
        given = list(rows)
        for place, value in zip(places, values, strict=False):
            given[place] = value
        scalars = dict(zip(names, values[len(places) :], strict=True))
        return library(case, given, backend, **arguments | scalars)

    return call, [x.requires_grad_() for x in leaves]


@pytest.mark.parametrize("backend", served(DOUBLE))
@pytest.mark.parametrize(("case", "index"), SMOOTH, ids=name_of)
def test_gradcheck(case: Case, index: int, backend: str) -> None:
    call, leaves = of_leaves(case, index, backend, "none" if case.rows else None)
    assert gradcheck(call, leaves)


@pytest.mark.parametrize("case", [c for c in CASES if not c.is_surrogate(0)], ids=name_of)
def test_the_reference_is_differentiable_twice(case: Case) -> None:
    call, leaves = of_leaves(case, 0, "reference", None)
    assert gradgradcheck(call, leaves, atol=1e-4)


@pytest.mark.parametrize("backend", served(DOUBLE, definition=False))
@pytest.mark.parametrize("case", [c for c in CASES if c.backend], ids=name_of)
def test_other_backends_refuse_second_derivatives(case: Case, backend: str) -> None:
    call, leaves = of_leaves(case, 0, backend, None)
    value = call(*leaves)
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(value, leaves, create_graph=True)


@pytest.mark.parametrize("backend", served(torch.float32))
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_backward_runs_twice_and_repeats_bit_for_bit(case: Case, backend: str) -> None:
    n, d = 33, 7
    for reduction in ("mean", "none") if case.rows else ("mean",):
        rows = case.rows_of(n, d, torch.float32)
        arguments = case.arguments(0, n, d, rows[0]) | ({"reduction": reduction} if case.rows else {})
        values = [library(case, rows, backend, **arguments) for _ in range(2)]
        assert torch.equal(*values)
        g = upstream_for(values[0])
        wanted = [x for k, x in enumerate(rows) if k not in case.detached]
        first = torch.autograd.grad(values[0], wanted, g, retain_graph=True)
        again = torch.autograd.grad(values[0], wanted, g)
        other = gradients(values[1], wanted, g)
        for a, b, c in zip(first, again, other, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
