"""Limits of logits (fastcl.at_most): pairs above the limit of their row or column are out, by one decision forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.equation.masks import Mask
from tests.objectives.witnesses import gradients, served

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SHAPES = [(30, 50), (301, 420), (420, None)]  # within a tile, across tiles, x with itself on both sides of the diagonal


def rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).div(d**0.5).to(dtype)


def between(z: Tensor, share: float) -> Tensor:
    """For each row a limit that about that share of its logits is below, in the middle of two of them; a few are infinite."""
    order = z.sort(1).values
    k = int(share * (z.shape[1] - 1))
    wide = k + (order[:, k + 1 : k + 6] - order[:, k : k + 5]).argmax(1, keepdim=True)
    limit = (order.gather(1, wide) + order.gather(1, wide + 1)).squeeze(1) / 2
    limit[3::17], limit[5::23] = INF, -INF
    return limit


def logits(x: Tensor, y: Tensor | None, operand: str, scale: float, shift: float) -> Tensor:
    x, y = x.double(), x.double() if y is None else y.double()
    u = x @ y.T if operand == "dot" else (x[:, None] - y[None]).square().sum(2)
    return scale * u + shift


FORMS: list[dict[str, Any]] = [
    {},
    {"columns": True},
    {"operand": "sqdist", "pair": "softplus", "reduce": "sum", "scale": 0.7, "columns": True},
    {"pair": "identity", "reduce": "sum"},
    {"pair": "square", "reduce": "sum"},
    {"outer": "pooled"},
    {"outer": "contrast"},
    {"outer": "sum", "pair": "exp", "reduce": "sum"},
]


def evaluated(x: Tensor, y: Tensor | None, mask: Mask, form: dict[str, Any], backend: str) -> list[Tensor]:
    """Values, and the gradients of x, y and scale."""
    form = {"scale": 2.0, "shift": 0.1} | form
    scale = torch.tensor(form.pop("scale"), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, y, scale) if t is not None]
    sides = leaves[:-1]
    if y is None:
        form.pop("columns", None)
    if form.get("outer") == "contrast":
        form["positive"] = torch.linspace(-1.0, 1.0, len(x))
    op = fastcl.pair_total if "outer" in form else fastcl.pair_reduce
    found = op(*sides, scale=leaves[-1], mask=mask, backend=backend, **form)
    found = found if isinstance(found, tuple) else (found,)
    weighed = sum(
        (torch.where(t.isneginf(), 0.0, t) * torch.linspace(-1.0, 2.0, t.numel(), dtype=t.dtype).view(t.shape)).sum()
        for t in found
    )
    return [*(t.detach() for t in found), *gradients(weighed, leaves)]


def every_backend_agrees(
    x: Tensor, y: Tensor | None, mask: Mask, form: dict[str, Any], cancels: bool = False
) -> None:
    """With the reference, in results and gradients. cancels: the gradient of scale may be small for what it is the sum of."""
    tight = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}[x.dtype]
    wanted = evaluated(x, y, mask, form, "reference")
    # a da = <W, a U> is the sum of <x_i, dx_i> over the rows.
    summed = float((x * wanted[-2 if y is None else -3]).abs().sum()) / form.get("scale", 2.0) if cancels else 0.0
    for backend in served(x.dtype):
        for got, want in zip(evaluated(x, y, mask, form, backend), wanted, strict=True):
            size = max(float(want[want.isfinite()].abs().max()), summed if want is wanted[-1] else 0.0)
            torch.testing.assert_close(got, want, rtol=tight, atol=tight * size, msg=lambda e, b=backend: f"{b}: {e}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())) or "rows")
def test_every_backend_is_the_definition(form: dict[str, Any], n: int, m: int | None, dtype: torch.dtype) -> None:
    x, y = rows(n, 12, 0, dtype), None if m is None else rows(m, 12, 1, dtype)
    z = logits(x, y, form.get("operand", "dot"), form.get("scale", 2.0), 0.1)
    of_rows, of_cols = between(z, 0.6), between(z.T, 0.8)
    limits = [(of_rows, None)] if m is None else [(of_rows, None), (None, of_cols), (of_rows, of_cols)]
    for limit, base in zip(limits, ("off_diagonal", "all", fastcl.off_diagonal()), strict=False):
        mask = fastcl.at_most(*limit, mask=base)
        every_backend_agrees(x, y, mask, form)


@pytest.mark.parametrize("backend", served(torch.float32))
@pytest.mark.parametrize("itself", [True, False])
def test_forward_and_backward_decide_alike_at_equality(itself: bool, backend: str) -> None:
    """Hundreds of logits are their limits but for rounding. The shift's gradient of a sum of exponentials is that sum itself."""
    x = rows(40, 24, 0).repeat(8, 1)
    y = None if itself else rows(40, 24, 1).repeat(6, 1)
    z = 3.0 * (x @ (x if y is None else y).T) + 0.1
    mask = fastcl.at_most(z[:, 7], None if itself else z[9], mask="off_diagonal")
    for form in ("rows", "total"):
        shift = torch.tensor(0.1, requires_grad=True)
        exp: dict[str, Any] = {
            "pair": "exp",
            "reduce": "sum",
            "scale": 3.0,
            "shift": shift,
            "mask": mask,
            "backend": backend,
        }
        sides = (x,) if y is None else (x, y)
        r = fastcl.pair_reduce(*sides, **exp).sum() if form == "rows" else fastcl.pair_total(*sides, outer="sum", **exp)
        (slope,) = torch.autograd.grad(r, shift)
        torch.testing.assert_close(slope, r.detach(), rtol=2e-6, atol=0.0)
        # And the weights of a log-sum-exp are 1 in each row that has any.
        lse = exp | {"pair": "identity", "reduce": "logsumexp"}
        r = fastcl.pair_reduce(*sides, **lse) if form == "rows" else fastcl.pair_total(*sides, outer="pooled", **lse)
        some = torch.isfinite(r)
        (slope,) = torch.autograd.grad(torch.where(some, r, 0.0).sum(), shift)
        torch.testing.assert_close(slope, some.sum().to(slope.dtype), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_that_are_no_numbers(dtype: torch.dtype) -> None:
    """NaN comes of NaN, of a limit as of a row, and inf leaves out nothing."""
    x, y = rows(6, 3, 0, dtype), rows(9, 3, 1, dtype)
    for backend in served(dtype):
        plain = fastcl.pair_reduce(x, y, columns=True, backend=backend)
        inf = fastcl.at_most(torch.full((6,), INF), torch.full((9,), INF))
        for got, want in zip(fastcl.pair_reduce(x, y, mask=inf, columns=True, backend=backend), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)
        none = fastcl.at_most(torch.full((6,), -INF))
        leaf = x.clone().requires_grad_()
        r = fastcl.pair_reduce(leaf, y, mask=none, backend=backend)
        assert torch.isneginf(r).all()
        assert not gradients(torch.where(r.isneginf(), 0.0, r).sum(), [leaf])[0].any()
        for reduce, itself in itertools.product(("sum", "logsumexp"), (True, False)):
            limit = torch.full((6,), INF)
            limit[2] = float("nan")
            sides = (x,) if itself else (x, y)
            r = fastcl.pair_reduce(*sides, reduce=reduce, mask=fastcl.at_most(limit), backend=backend)
            wanted = torch.ones(6, dtype=torch.bool) if itself else torch.arange(6) == 2
            assert torch.equal(torch.isnan(r), wanted), (
                backend,
                reduce,
                itself,
            )  # pairs of x with itself have both limits
            bad = x.clone()
            bad[2] = float("nan")
            r = fastcl.pair_reduce(bad, y, reduce=reduce, mask=fastcl.at_most(torch.zeros(6)), backend=backend)
            assert torch.equal(torch.isnan(r), torch.arange(6) == 2)


# Of the torch.jit that forward mode and torch.compile load, torch itself warns.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", served(torch.float64))
def test_transforms_and_graphs(backend: str) -> None:
    x, y, limit = rows(7, 4, 0, torch.float64), rows(9, 4, 1, torch.float64), torch.full((7,), 0.1, requires_grad=True)

    def value(x: Tensor, y: Tensor) -> Tensor:
        r = fastcl.pair_reduce(x, y, scale=3.0, mask=fastcl.at_most(limit, mask="off_diagonal"), backend=backend)
        assert isinstance(r, Tensor)
        return torch.where(r.isneginf(), 0.0, r).sum()

    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    wanted = gradients(value(*leaves), leaves)
    for got, want in zip(torch.func.grad(value, (0, 1))(x, y), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    direction = torch.ones_like(x)
    _, slope = torch.func.jvp(lambda x: value(x, y), (x,), (direction,))
    torch.testing.assert_close(slope, (wanted[0] * direction).sum(), rtol=1e-10, atol=1e-12)
    several = torch.func.vmap(value)(torch.stack([x, 2 * x]), torch.stack([y, y]))
    torch.testing.assert_close(several, torch.stack([value(x, y), value(2 * x, y)]).detach(), rtol=1e-10, atol=1e-12)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled(*leaves), leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert limit.grad is None and torch.autograd.grad(value(*leaves), limit, allow_unused=True) == (None,)


X = rows(4, 3, 0)
REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {}, ValueError, "at_most: expected limits of the rows, the columns or both, got none; pass limit_x"),
    ({"limit_x": torch.ones(3)}, {}, ValueError, "limit_x: expected shape (4,), one value for each row of x, got (3,)"),
    ({"limit_x": torch.ones(4).int()}, {}, TypeError, "limit_x: expected a floating-point tensor, got int32; "),
    ({"limit_x": [1.0] * 4}, {}, TypeError, "limit_x: expected a floating-point tensor, got list"),
    (
        {"limit_y": torch.ones(3)},
        {"y": X},
        ValueError,
        "limit_y: expected shape (4,), one value for each row of y, got (3,)",
    ),
    ({"limit_y": torch.ones(4)}, {}, ValueError, "mask: x with itself has limits of its rows alone, got limit_y; "),
    ({"limit_x": torch.ones(4), "mask": "some"}, {}, ValueError, "mask: expected one of "),
    ({"limit_x": torch.ones(4), "mask": 3}, {}, TypeError, "mask: expected a name or a fastcl.Mask, got int"),
    (
        {"limit_x": torch.ones(4), "mask": fastcl.at_most(torch.ones(4))},
        {},
        ValueError,
        "mask: expected one without limits",
    ),
]


@pytest.mark.parametrize(("given", "call", "kind", "message"), REFUSED, ids=[r[3][:60] for r in REFUSED])
def test_refused(given: dict[str, Any], call: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        fastcl.pair_reduce(X, mask=fastcl.at_most(**given), **call)
    assert str(caught.value).startswith(message)
