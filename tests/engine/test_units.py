"""Rows far from 1 under a scale that brings their products back: blocked and the closed forms, which share units.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.backends import units

FAR = [
    # Lengths of x and of y, and a scale: z is a number of float32, and so are gradients.
    (1e30, 1e30, 1e-38), (1e36, 1e36, 1e-38), (1e36, 1e10, 1e-38), (1e19, 1e19, 0.07), (1e-36, 1e-36, 1e38), (1e-20, 1e-20, 3e38),
    (0.57, 1.4e35, 1.4e-34), (1e-30, 1.0, 3e30),
    (1.0, 1e-38, 1e37), (1e37, 1e-30, 5e-7), (1e-37, 1e37, 0.1), (1e15, 1e15, 1e-20), (1e-30, 1e-30, 1e38),
]  # fmt: skip


def answers(x: Tensor, y: Tensor | None, backend: str, scale: float, **how: object) -> list[Tensor]:
    dtype = torch.float64 if backend == "reference" else x.dtype
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, y) if t is not None]
    a = torch.tensor(scale, dtype=dtype, requires_grad=True)
    r = fastcl.pair_reduce(*leaves, scale=a, backend=backend, **how)  # type: ignore[call-overload]
    return [r.detach(), *torch.autograd.grad(r.sum(), [*leaves, a])]


@pytest.mark.parametrize("operand", ["dot", "sqdist"])
@pytest.mark.parametrize("pair", ["logsumexp", "softplus", "identity", "square", "exp"])
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize(("long", "short", "scale"), FAR)
def test_rows_far_from_one(long: float, short: float, scale: float, itself: bool, pair: str, operand: str) -> None:
    """Each result right to a few roundings of its largest, infinite beyond float32 and never NaN; of sums z^2 may be infinite and
    its gradient a number."""
    g = torch.Generator().manual_seed(0)
    x, y = long * torch.randn(9, 3, generator=g), short * torch.randn(12, 3, generator=g)
    how = {"reduce": "logsumexp"} if pair == "logsumexp" else {"reduce": "sum", "pair": pair}
    how |= {"operand": operand, "mask": "off_diagonal"}
    sides = (x, None) if itself else (x, y)
    got, exact = (answers(*sides, backend, scale, **how) for backend in ("blocked", "reference"))
    most, least = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    z = scale * (4.0 * max(long, short) ** 2 if operand == "sqdist" or itself else long * short)
    if z > most or (pair in ("logsumexp", "exp") and z > 1e4):
        return
    for mine, right in zip(got, exact, strict=True):
        assert not mine.isnan().any()
        inside = right.abs() < 0.9 * most
        assert mine[inside].isfinite().all() or right.dim() == 0  # a sum of numbers beyond float32
        error = torch.where(inside & mine.isfinite(), mine - right, 0.0).abs().max()
        of_z = 3e-6 * z if pair in ("logsumexp", "softplus") and z < 1e4 else 0.0
        assert error <= (1e-5 + of_z) * torch.where(inside, right, 0.0).abs().max() + least


def test_usual_rows_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a length nor a copy of rows under a scale between 1/16 and 1024."""

    def asked(rows: Tensor) -> float:
        raise AssertionError("a length was asked for")

    monkeypatch.setattr(units, "_length", asked)
    x = torch.randn(9, 3, requires_grad=True)
    for scale in (0.07, 1.0, -100.0, 1000.0):
        for operand in ("dot", "sqdist"):
            fastcl.pair_reduce(x, operand=operand, scale=scale, backend="blocked").sum().backward()
            fastcl.pair_reduce(x, operand=operand, scale=scale, reduce="sum", backend="blocked").sum().backward()
    with pytest.raises(AssertionError, match="a length"):
        fastcl.pair_reduce(x, scale=1e6, backend="blocked")


@pytest.mark.parametrize("reduce", ["sum", "logsumexp"])
def test_parameters_are_looked_at_as_tensors_are(reduce: str) -> None:
    """Learned rows, as prototypes are: both their lengths, and whether one is NaN."""
    x, y = 1e-36 * torch.randn(9, 3), 1e-36 * torch.randn(12, 3)
    how = {"reduce": reduce, "scale": 1e38, "mask": "off_diagonal", "backend": "blocked"}
    right = answers(x, y, "reference", 1e38, reduce=reduce, mask="off_diagonal")[0]
    learned = torch.nn.Parameter(x)
    found = fastcl.pair_reduce(learned, y, **how)  # type: ignore[call-overload]
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-38)
    learned.data[3] = float("nan")
    groups = torch.arange(9) // 3, torch.arange(12) // 3
    how["mask"] = fastcl.within_groups(*groups)
    (gradient,) = torch.autograd.grad(fastcl.pair_reduce(learned, y, **how)[:3].sum(), learned)  # type: ignore[call-overload]
    assert not gradient[:3].isnan().any()


@pytest.mark.parametrize("pair", ["logsumexp", "softplus", "identity", "square", "sigmoid_squared"])
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_under_a_scale_of_zero_every_z_is_the_shift(operand: str, pair: str) -> None:
    """Whatever the rows: 0 times a product beyond float32 would be NaN."""
    x, y = torch.tensor([[6e29, -5e29], [1.0, 2.0]]), torch.tensor([[1e30, 1.3e30], [1e30, -2e30], [0.5, 0.5]])
    how = {"reduce": "logsumexp"} if pair == "logsumexp" else {"reduce": "sum", "pair": pair}
    for sides in ((x, y), (x, None)):
        got, exact = (answers(*sides, backend, 0.0, operand=operand, **how) for backend in ("blocked", "reference"))
        for mine, right in zip(got, exact, strict=True):
            torch.testing.assert_close(mine, right.float())


@pytest.mark.parametrize(("itself", "columns"), [(False, False), (False, True), (True, False)])
def test_of_a_logsumexp_that_is_infinite_the_infinite_logits_have_the_weights(itself: bool, columns: bool) -> None:
    """One that is infinite has a weight of 1, the others of 0: infinity less infinity would be NaN."""
    x, y = torch.tensor([[6e29, 0.0], [1.0, 2.0]]), torch.tensor([[1e30, 1.3e30], [-1e30, -2e30], [0.5, 0.5]])
    found = []
    for backend in ("blocked", "reference"):
        leaves = [t.to(torch.float64 if backend == "reference" else t.dtype).requires_grad_() for t in (x, y)]
        r = fastcl.pair_reduce(*leaves[: 1 if itself else 2], columns=columns, backend=backend)  # type: ignore[call-overload]
        r = r if columns else (r,)
        assert r[0][0] == float("inf") or r[0][0] > 1e40
        found.append(torch.autograd.grad([t.sum() for t in r], leaves, allow_unused=True))
    for mine, right in zip(*found, strict=True):
        if right is not None:
            torch.testing.assert_close(mine, right.float())


@pytest.mark.parametrize("pair", ["logsumexp", "softplus", "sigmoid_squared", "exp"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 500.0])
def test_products_beyond_the_dtype_under_a_usual_scale_keep_their_sign(scale: float, pair: str) -> None:
    """Terms of one product that are beyond float32 on either side: infinity less infinity would be NaN."""
    x, y = torch.tensor([[6e29, -5e29], [1.0, 2.0]]), torch.tensor([[1e30, 1.3e30], [1e30, -2e30], [0.5, 0.5]])
    how = {"reduce": "logsumexp"} if pair == "logsumexp" else {"reduce": "sum", "pair": pair}
    got, exact = (answers(x, y, backend, scale, **how) for backend in ("blocked", "reference"))
    for mine, right in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["rows", "columns", "self", "total", "self total"])
def test_weights_where_normalisers_round(form: str) -> None:
    """Beside logits of 3e7 log 150 is 5 or 6: weights formed of what is stored were off by e."""
    x, y = (torch.randn(size, 6, generator=torch.Generator().manual_seed(size)) for size in (40, 2))
    y = y[torch.arange(300) % 2]
    found = []
    for dtype, backend in ((torch.float32, "blocked"), (torch.float64, "reference")):
        a = (x[torch.arange(80) % 2] if "self" in form else x).to(dtype)
        added = torch.zeros(() if "self" in form else len(a), dtype=dtype, requires_grad=True)
        given = {"operand": "sqdist", "reduce": "logsumexp", "mask": "off_diagonal", "scale": 1e7, "backend": backend}
        given["shift" if "self" in form else "bias_x"] = added
        b = None if "self" in form else y.to(dtype)
        if "total" in form:
            value = fastcl.pair_total(a, b, outer="sum", **given)
        else:
            r = fastcl.pair_reduce(a, b, columns=form == "columns", **given)
            value = r[0].sum() + (r[1] * torch.linspace(-1.0, 1.0, 300, dtype=dtype)).sum() if form == "columns" else r.sum()
        found.append(torch.autograd.grad(value, added)[0].double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
