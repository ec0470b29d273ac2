"""The definition (reference.py) against the double loops, and its own gradient formulas against autograd."""

import pytest
import torch

import fastcl
from fastcl import ops
from fastcl.backends import reference
from fastcl.equation.problem import Wanted

from .combinations import Combination, assert_same, combinations, inputs, total_id, totals, value_and_gradients

COMBINATIONS = combinations()


@pytest.mark.parametrize("c", COMBINATIONS, ids=lambda c: c.id)
def test_reference_equals_double_loops(c: Combination) -> None:
    i = inputs(c, 4, 3, 3)
    columns = not c.itself
    expected = value_and_gradients(i.loops(columns=columns), i.leaves)
    assert_same(value_and_gradients(i.call("reference", columns=columns), i.leaves), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("c", "outer"), totals(), ids=total_id)
def test_totals_equal_double_loops(c: Combination, outer: str) -> None:
    i = inputs(c, 4, 3, 3)
    more: dict = {"outer": outer}
    if outer == "contrast":
        more["positive"] = i.leaves["positive"] = torch.randn(4, dtype=torch.float64).requires_grad_()
    expected = value_and_gradients(i.loops(**more), i.leaves)
    if torch.isneginf(
        expected["output0"]
    ):  # a row with nothing left: the sum of rows is -inf, and has no gradient to compare
        assert torch.isneginf(i.call("reference", **more))
        return
    assert_same(value_and_gradients(i.call("reference", **more), i.leaves), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("c", COMBINATIONS, ids=lambda c: c.id)
def test_gradient_formulas_equal_autograd(c: Combination) -> None:
    """The four sums of reference.py's header, against autograd through its own forward."""
    i = inputs(c, 6, 5, 3)
    affine = {"bias_x": None, "bias_y": None, **i.affine()}
    p = ops.problem(
        *i.sides, operand=c.operand, pair=c.pair, reduce=c.reduce, mask=i.mask, columns=not c.itself, **affine
    )
    expected = value_and_gradients(tuple(t for t in reference.rows(p) if t is not None), i.leaves)
    g = torch.sin(torch.arange(p.n, dtype=torch.float64) + 1.0)
    h = torch.sin(torch.arange(p.m, dtype=torch.float64) + 2.0) if p.columns else None
    with torch.no_grad():
        r, columns = reference.rows(p)
        answer = reference.gradients(p, r, columns, g, h, Wanted(*(True,) * 6))
    for name, gradient in answer._asdict().items():
        if name in i.leaves:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
def test_reference_is_differentiable_twice(reduce: str) -> None:
    c = next(
        c for c in COMBINATIONS if c.reduce == reduce and c.operand == "sqdist" and c.pair.name in ("exp", "identity")
    )
    i = inputs(c, 3, 4, 2)
    names = list(i.leaves)

    def rows(*tensors: torch.Tensor) -> torch.Tensor:
        i.leaves.update(zip(names, tensors, strict=True))
        return torch.cat(i.call("reference", columns=True))

    def total(*tensors: torch.Tensor) -> torch.Tensor:
        i.leaves.update(zip(names, tensors, strict=True))
        return i.call("reference", outer="sum")

    leaves = tuple(i.leaves.values())
    assert torch.autograd.gradgradcheck(rows, leaves)
    assert torch.autograd.gradgradcheck(total, leaves)


@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_rows_with_themselves_have_one_z_for_both_orders(operand: str) -> None:
    """A product of matrices rounds <x_i, x_j> and <x_j, x_i> apart, by 2e6 at a z of 1e22: a weight would be e to that."""
    for n in range(2, 45):
        x = 1e11 * torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        r = fastcl.pair_reduce(x.requires_grad_(), operand=operand, backend="reference")
        assert isinstance(r, torch.Tensor)
        (dx,) = torch.autograd.grad(r.sum(), x)
        assert dx.norm() <= 4 * (1.0 + n) * x.norm(), n
