"""NaN comes from NaN alone: a row that is NaN leaves those that no pair joins to it their values and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.equation.pairs import pair_function

N, M, D = 21, 34, 5
BAD = 3
BACKENDS = ("cpu", "blocked", "reference")
CALLS: dict[str, dict[str, Any]] = {
    "logsumexp": {"scale": 0.5},
    "distances": {"operand": "sqdist", "scale": -0.5},
    "exp": {"pair": "exp", "reduce": "sum", "scale": 0.1},
    "softplus": {"pair": "softplus", "reduce": "sum", "shift": 0.3},
    "log1p": {"operand": "sqdist", "pair": "log1p", "reduce": "sum", "scale": 0.5},
    "identity": {"reduce": "sum", "scale": 2.0},
}


def masked(kind: str, itself: bool) -> tuple[Any, Tensor]:
    """A mask of fastcl, and which pairs it visits."""
    m = N if itself else M
    group_x, group_y = torch.arange(N) % 4, torch.arange(m) % 4
    group_x[-1] = group_y[-1] = 9  # a row that meets nothing but its like
    if kind == "off_diagonal":
        return "off_diagonal", ~torch.eye(m, dtype=torch.bool)[:N]
    same = group_x[:, None] == group_y[None, :]
    make = fastcl.within_groups if kind == "within_groups" else fastcl.across_groups
    return make(group_x) if itself else make(group_x, group_y), same if kind == "within_groups" else ~same


def by_pairs(x: Tensor, y: Tensor, keep: Tensor, *, operand: str = "dot", pair: str = "identity", reduce: str = "logsumexp",
             scale: float = 1.0, shift: float = 0.0) -> Tensor:  # fmt: skip
    """r from the visited pairs alone: what is left out has no part in any gradient."""
    i, j = keep.nonzero(as_tuple=True)
    u = (x[i] * y[j]).sum(1) if operand == "dot" else (x[i] - y[j]).square().sum(1)
    z = scale * u + shift
    if reduce == "sum":
        return z.new_zeros(len(x)).index_add(0, i, pair_function(pair).f(z))
    parts = [z[i == row] for row in range(len(x))]
    return torch.stack([torch.logsumexp(part, 0) if len(part) else z.new_full((), -math.inf) for part in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["off_diagonal", "within_groups", "across_groups"])
@pytest.mark.parametrize("place", ["x", "y", "itself"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_row_stays_with_those_it_meets(
    backend: str, place: str, kind: str, call: str, dtype: torch.dtype
) -> None:
    itself = place == "itself"
    x, y = torch.randn(N, D, dtype=dtype), torch.randn(M, D, dtype=dtype)
    (y if place == "y" else x)[BAD, 1] = math.nan
    mask, keep = masked(kind, itself)

    def found(definition: bool) -> list[Tensor]:
        leaves = [t.double() if definition else t.clone() for t in ((x,) if itself else (x, y))]
        leaves = [t.requires_grad_() for t in leaves]
        if definition:
            r = by_pairs(leaves[0], leaves[-1], keep, **CALLS[call])
        else:
            r = fastcl.pair_reduce(*leaves, mask=mask, backend=backend, **CALLS[call])
        gradients = torch.autograd.grad(torch.where(r.isneginf(), 0.0, r).sum(), leaves)
        return [r.detach(), *(g.isnan().any(1, keepdim=True) * 0.0 + g for g in gradients)]

    for got, want in zip(found(False), found(True), strict=True):
        want = want if want.ndim == 1 else torch.where(want.isnan().any(1, keepdim=True), math.nan, want)
        got = got.double() if got.ndim == 1 else torch.where(got.isnan().any(1, keepdim=True), math.nan, got.double())
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("call", [*CALLS, "sum of distances"])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_what_meets_nothing_is_in_nothing(backend: str, call: str) -> None:
    """A row of NaN, and one whose squared norm is infinite, with no pair: sum 0 or log-sum-exp -inf, and no gradient but 0."""
    arguments = CALLS.get(call, {"operand": "sqdist", "reduce": "sum", "scale": 0.5})
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, D, generator=generator) for n in (9, 7))
    x[3], x[5], y[2] = 1e20, math.nan, 1e20
    mask = fastcl.within_groups(torch.tensor([0, 0, 0, 7, 1, 8, 1, 1, 1]), torch.tensor([0, 0, 6, 0, 1, 1, 1]))
    found = []
    for by in (backend, "reference"):
        scale = torch.tensor(arguments.get("scale", 1.0))
        leaves = [leaf.clone().requires_grad_() for leaf in (x, y, scale)]
        r, c = fastcl.pair_reduce(*leaves[:2], mask=mask, columns=True, backend=by, **{**arguments, "scale": leaves[2]})
        total = torch.cat([r, c])
        total = torch.where(total.isneginf(), 0.0, total).sum()
        found.append([r, c, *torch.autograd.grad(total, leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_infinite_row_without_a_pair_leaves_the_scale_alone() -> None:
    """Square of rows that are beyond float32: 0 times infinity was in the gradient of the scale, NaN for 0."""
    x, y = torch.full((1, 3), math.inf), torch.ones(1, 3)
    scale = torch.ones((), requires_grad=True)
    r = fastcl.pair_reduce(x, y, pair="square", reduce="sum", mask="off_diagonal", scale=scale, backend="blocked")
    assert r == 0.0
    assert torch.autograd.grad(r.sum(), scale)[0] == 0.0


def test_of_no_rows_the_scale_has_no_gradient() -> None:
    """Norms of those that nothing meets are beyond float32."""
    scale = torch.ones((), requires_grad=True)
    total = fastcl.pair_total(
        torch.empty(0, 2), torch.full((2, 2), 1e29), operand="sqdist", reduce="logsumexp", outer="sum", scale=scale,
        backend="blocked",
    )  # fmt: skip
    assert torch.autograd.grad(total, scale)[0] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["rows", "both", "itself", "total"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", [{"pair": "exp"}, {"pair": "exp", "operand": "sqdist"}, {"pair": "square"}], ids=str)
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_infinite_weights_are_no_nan(
    backend: str, form: str, dtype: torch.dtype, call: dict[str, str], scale: float
) -> None:
    """Infinite weights of rows of both signs: what is left of them is infinite with its sign; of no row that no other meets."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, D, generator=g).to(dtype) for n in (N, M))
    scale *= 1e17 if call["pair"] == "square" and dtype == torch.float32 else 1.0
    y[:, 0], x[:, 0] = 0.0, 0.0
    leaves = [t.requires_grad_() for t in ((x,) if form == "itself" else (x, y))]
    number = torch.tensor(scale, requires_grad=True)
    how = {**call, "reduce": "sum", "scale": number, "mask": "off_diagonal", "backend": backend}
    if form == "total":
        value = fastcl.pair_total(*leaves, outer="sum", **how)
    else:
        value = fastcl.pair_reduce(*leaves, columns=form == "both", **how)
        value = torch.cat(value) if isinstance(value, tuple) else value
    gradients = torch.autograd.grad(value.sum(), [*leaves, number])
    assert not value.isnan().any()
    assert value.isinf().any() or call["pair"] == "square" or (dtype == torch.float64 and scale == 100.0)
    for gradient in gradients:
        assert not gradient.isnan().any()
    assert all((gradient[:, 0] == 0.0).all() for gradient in gradients[:-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_weights_have_the_sign_of_their_sum(backend: str) -> None:
    """e^1000 (1, 0) and 1 (0, 1): the second is a number beside the first."""
    x = torch.eye(2, requires_grad=True)
    r = fastcl.pair_reduce(x, -torch.eye(2), pair="exp", reduce="sum", scale=-1e3, backend=backend)
    (gradient,) = torch.autograd.grad(r.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[math.inf, 1e3], [1e3, math.inf]]))


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_large_weights_of_long_rows_are_no_nan(backend: str) -> None:
    """e^60 is a number, and its products with rows of 1e25 of either sign are not."""
    x, y = torch.tensor([[60e-25, 0.0]], requires_grad=True), torch.tensor([[1e25, 1e25], [1e25, -2e25]])
    r = fastcl.pair_reduce(x, y, pair="exp", reduce="sum", backend=backend)
    assert isinstance(r, Tensor) and r.isfinite().all()
    (gradient,) = torch.autograd.grad(r.sum(), x)
    assert gradient.tolist() == [[math.inf, -math.inf]]
