"""Rows of any norm, tiny temperatures, equal rows, empty rows, NaN: the kernels take the right path and are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastcl


def results(x: Tensor, y: Tensor | None, backend: str, **more: object) -> list[Tensor]:
    """r (and c), the contrast total, and the gradients of both."""
    a = x.clone().requires_grad_()
    leaves = [a] if y is None else [a, y.clone().requires_grad_()]
    out = fastcl.pair_reduce(*leaves, columns=y is not None, backend=backend, **more)
    r, c = out if y is not None else (out, None)
    upstream = torch.linspace(0.5, 2, r.shape[0], dtype=r.dtype)
    loss = (r * upstream).sum() + (0 if c is None else (c * c.new_ones(()).expand_as(c)).sum())
    first = torch.autograd.grad(loss, leaves)
    # Where r's own rounding is larger than 1, r - positive is noise, but for positives far away.
    positive = r.detach() - upstream if r.detach().abs().max() < 1e5 else torch.zeros_like(r)
    total = fastcl.pair_total(*leaves, outer="contrast", positive=positive, backend=backend, **more)
    second = torch.autograd.grad(total, leaves)
    pooled = fastcl.pair_total(*leaves, outer="pooled", backend=backend, **more)
    third = torch.autograd.grad(pooled, leaves)
    return [r.detach(), *([] if c is None else [c.detach()]), pooled.detach(), *first, *second, *third]


def assert_right(x: Tensor, y: Tensor | None, **more: object) -> None:
    """Against the float64 definition: z itself is rounded to float32, so everything is right to eps |z|."""
    other = x if y is None else y
    if more.get("operand") == "sqdist":
        reach = (x.double().norm(dim=1).max() + other.double().norm(dim=1).max()).square().item()
    else:
        reach = (x.double() @ other.double().T).abs().max().item()
    reach *= abs(float(more["scale"]))  # type: ignore[arg-type]
    for want, got in zip(results(x.double(), None if y is None else y.double(), "reference", **more),
                         results(x, y, "cpu", **more), strict=True):  # fmt: skip
        assert torch.isfinite(got).all()
        scale = want.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        error = (got.double() - want).abs().max() / scale
        assert error < 2e-6 + 4e-7 * min(reach, 2e6), (error, reach)


@pytest.mark.parametrize("scale", [1.0, 1e3, -1e3])
@pytest.mark.parametrize("norm", [1e-20, 1e-5, 1.0, 1e3, 1e10])
@pytest.mark.parametrize("which", ["every third row", "one row", "all rows"])
def test_any_norm_and_tiny_temperatures(norm: float, scale: float, which: str) -> None:
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(70, 8, generator=g), torch.randn(101, 8, generator=g)
    x[{"every third row": slice(None, None, 3), "one row": slice(4, 5), "all rows": slice(None)}[which]] *= norm
    # At |z| beyond 1e6 float32 z is one dominant pair's: ties within its rounding are what no float32 code can tell.
    if norm * abs(scale) > 1e6:
        y = torch.eye(8)[torch.arange(101) % 8] * (1 + torch.arange(101) // 8)[:, None]
        x = x.sign() * torch.arange(1.0, 9.0) * x.norm(dim=1, keepdim=True)
    assert_right(x, y, scale=scale)


@pytest.mark.parametrize("n", [7, 100, 400])
@pytest.mark.parametrize("norm", [1.0, 30.0, 1e3, 1e5, 1e10])
@pytest.mark.parametrize("mask", ["all", "off_diagonal"])
def test_equal_rows(norm: float, n: int, mask: str) -> None:
    """All z are equal: r = z + log n, and every weight is 1/n although r's rounding swallows log n."""
    x = torch.ones(n, 4) * (norm / 2)
    a = x.clone().requires_grad_()
    r = fastcl.pair_reduce(a, x, mask=mask, backend="cpu")
    count = n - (mask == "off_diagonal")
    torch.testing.assert_close(r, torch.full((n,), norm**2 + math.log(count)), rtol=3e-7, atol=0)
    (gradient,) = torch.autograd.grad(r.sum(), a)
    torch.testing.assert_close(gradient, x, rtol=2e-5, atol=0)
    a = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fastcl.pair_reduce(a, mask=mask, backend="cpu").sum(), a)
    torch.testing.assert_close(gradient, 2 * x, rtol=2e-5, atol=0)


@pytest.mark.parametrize("spread", [1.0, 20.0, 60.0, 150.0, 1e4])
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_spread_of_normalisers(spread: float, itself: bool, operand: str) -> None:
    """Rows whose log-sum-exps lie `spread` apart: one shared reference, one for each row, or running maxima."""
    g = torch.Generator().manual_seed(11)
    unit = torch.nn.functional.normalize(torch.randn(150, 12, generator=g))
    x = unit * torch.linspace(0.1, 1, 150).sqrt()[:, None] * math.sqrt(spread)
    # x with itself without the pairs (i, i): at distance 0 they alone would count.
    mask = "off_diagonal" if itself else "all"
    scale = -1.0 if operand == "sqdist" else 1.0
    assert_right(x, None if itself else x.flip(0).roll(1, 1), operand=operand, scale=scale, mask=mask)


def test_small_values_fall_back_to_running_maxima() -> None:
    """Far below the bound of Cauchy and Schwarz the shared exponentials underflow, and the kernels notice."""
    x = torch.zeros(60, 8)
    x[:, 0] = 20.0
    for far in (-1.0, -0.5):
        y = x * far
        assert_right(x, y, scale=1.0)
    y = x.clone()
    y[7] = -x[7]
    assert_right(x, y, scale=1.0)  # column 7 alone is tiny


def test_infinite_bias_pads() -> None:
    """A bias of -inf takes a row or a column out, as padding does."""
    x, y = torch.randn(30, 6), torch.randn(40, 6)
    bias_y = torch.zeros(40)
    bias_y[10:] = float("-inf")
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    r, c = fastcl.pair_reduce(a, b, bias_y=bias_y, columns=True, backend="cpu")
    torch.testing.assert_close(r, (x @ y[:10].T).logsumexp(1))
    assert torch.isneginf(c[10:]).all()
    da, db = torch.autograd.grad(r.sum(), (a, b))
    assert (db[10:] == 0).all()
    assert torch.isfinite(da).all()


def test_infinite_z_gives_infinite_r() -> None:
    x = torch.tensor([[1e30], [1.0]])
    r = fastcl.pair_reduce(x, torch.tensor([[1e30], [1.0]]), backend="cpu")
    assert r[0] == math.inf
    torch.testing.assert_close(r[1], torch.tensor(1e30))


@pytest.mark.parametrize("itself", [False, True])
def test_all_masked(itself: bool) -> None:
    x = torch.randn(60, 3, requires_grad=True)
    same = torch.zeros(60, dtype=torch.int64)
    mask = fastcl.across_groups(same) if itself else fastcl.across_groups(same, same)
    others = () if itself else (x.detach(),)
    r = fastcl.pair_reduce(x, *others, mask=mask, backend="cpu")
    assert torch.isneginf(r).all()
    assert (torch.autograd.grad(torch.where(torch.isneginf(r), 0.0, r).sum(), x)[0] == 0).all()
    for outer, value in (("contrast", 0.0), ("pooled", -math.inf)):
        positive = torch.zeros(60, requires_grad=True) if outer == "contrast" else None
        total = fastcl.pair_total(x, *others, outer=outer, positive=positive, mask=mask, backend="cpu")
        assert total.item() == value
        assert (torch.autograd.grad(total, x)[0] == 0).all()
    assert (fastcl.pair_reduce(x, *others, mask=mask, pair="exp", reduce="sum", backend="cpu") == 0).all()


@pytest.mark.parametrize("pair", ["identity", "exp", "softplus", "square", "log1p"])
@pytest.mark.parametrize("operand", ["dot", "sqdist"])
def test_nan_reaches_its_row_and_no_other(pair: str, operand: str) -> None:
    x, y = torch.randn(60, 5).abs(), torch.randn(70, 5).abs()
    y[20, 1] = float("nan")
    mask = fastcl.within_groups(torch.arange(60) % 2, (torch.arange(70) % 2))
    reduce = "logsumexp" if pair == "identity" else "sum"
    r = fastcl.pair_reduce(x, y, pair=pair, reduce=reduce, mask=mask, operand="dot", backend="cpu")
    assert r.isnan().tolist() == [i % 2 == 0 for i in range(60)]
    x[3, 0] = float("nan")
    r = fastcl.pair_reduce(x, y[:20], pair=pair, reduce=reduce, operand=operand, backend="cpu")
    assert r.isnan().nonzero().flatten().tolist() == [3]
