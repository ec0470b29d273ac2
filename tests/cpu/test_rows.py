"""<x_i, y_i> in one pass: as torch's, in every layout; and rows near the ends of the range are not its."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl.backends import extension
from fastcl.backends.row_dot import in_one_pass
from fastcl.functional.matching import one_pass_dot
from fastcl.functional.rows import normalize_rows, plain_norms
from fastcl.functional.spectral import clip_norms

pytestmark = pytest.mark.skipif(extension.library is None, reason="the compiled kernels are not built")


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (7, 8), (5, 9), (1000, 129), (3, 5000)])
def test_dot_products_are_rounded_once(n: int, d: int) -> None:
    x, y = rows(n, d), rows(n, d, 1)
    assert in_one_pass(x) and in_one_pass(y)
    torch.testing.assert_close(one_pass_dot(x, y), (x.double() * y.double()).sum(1).float(), rtol=2e-7, atol=1e-7)


def test_layouts() -> None:
    x, wide = rows(6, 5), rows(6, 20)
    assert in_one_pass(wide.T[:6, :5]) and not in_one_pass(x.double()) and not in_one_pass(x[0])
    for y in (wide[:, 3:8], wide[:1, :5].expand(6, 5), wide[:, ::4], rows(5, 6).T):
        torch.testing.assert_close(one_pass_dot(x, y), (x * y).sum(1))


def test_gradients_of_both_orders() -> None:
    x, y = rows(6, 5).requires_grad_(), rows(6, 5, 1).requires_grad_()
    first = torch.autograd.grad(one_pass_dot(x, y).square().sum(), (x, y), create_graph=True)
    wanted = torch.autograd.grad((x * y).sum(1).square().sum(), (x, y), create_graph=True)
    for got, want in zip(first, wanted, strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            *(torch.autograd.grad(v.square().sum(), x, retain_graph=True)[0] for v in (got, want))
        )


def test_arguments_are_refused() -> None:
    for x, y, kind in (
        (rows(2, 3).double(), rows(2, 3), ValueError),
        (rows(2, 3), rows(3, 3), ValueError),
        (rows(2, 3)[0], rows(2, 3), ValueError),
    ):
        with pytest.raises(kind, match="cpu_row_dot: expected"):
            torch.ops.fastcl.cpu_row_dot(x, y)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, float("inf"), float("nan")])
def test_rows_that_are_not_plain(value: float) -> None:
    """Those beyond the range of a square are told, and come out as in float64, NaN alone being NaN."""
    x = rows(4, 6)
    x[1] = value
    plain = plain_norms(x)
    assert plain is not None and plain.rows.flatten().tolist() == [True, value < 1.0, True, True]
    wide = x.double()
    if 0.0 < value < float("inf"):
        torch.testing.assert_close(normalize_rows(x), normalize_rows(wide).float())
    assert not normalize_rows(x)[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("size", [1e30, 3e38, float("inf")])
def test_gradients_that_overflow_are_infinite_with_their_sign(size: float) -> None:
    """A dot product that overflows is found by its value, and the careful way taken."""
    x = (0.01 * rows(4, 6)).requires_grad_()
    g = torch.zeros(4, 6)
    g[:, 0] = size
    for of in (normalize_rows, lambda x: clip_norms(x, torch.tensor(0.001))):
        (got,) = torch.autograd.grad(of(x), x, g)
        assert not got.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_short_rows_keep_the_documented_clamp(dtype: torch.dtype) -> None:
    """x / max(|x|, 1e-12), on both sides of the bound and of 2^-60, where one pass ends: alone and among ordinary rows."""
    for norm in (1e-30, 2.0**-61, 2.0**-59, 1e-15, 0.9e-12, 1.1e-12, 1e-9):
        short = torch.nn.functional.normalize(rows(1, 8).double()) * norm
        for x in (short, torch.cat([rows(3, 8).double(), short])):
            x = x.to(dtype).requires_grad_()
            wide = x.detach().double().requires_grad_()
            got, want = normalize_rows(x), wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-12)
            g = rows(len(x), 8, 1).double()
            pairs = [
                (got, want),
                *zip(
                    torch.autograd.grad(got, x, g.to(dtype)),
                    torch.autograd.grad(want, wide, g.to(dtype).double()),
                    strict=True,
                ),
            ]
            for a, b in pairs:
                torch.testing.assert_close(
                    a[-1].double(),
                    b[-1],
                    rtol=4 * torch.finfo(dtype).eps,
                    atol=float(b[-1].detach().abs().max()) * torch.finfo(dtype).eps * 2,
                )


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: t.repeat_interleave(3, 1)[:, ::3],
    "one row": lambda t: t[:1].expand(len(t), -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unit_rows_and_their_gradient(layout: str, dtype: torch.dtype) -> None:
    """One row of each norm between the ends of the dtype's range, against float64."""
    norms = torch.logspace(-44, 37, 30).clamp(max=torch.finfo(dtype).max / 64)
    x = LAYOUTS[layout]((rows(30, 21) * norms[:, None]).to(dtype)).requires_grad_()
    g = LAYOUTS[layout](rows(30, 21, 1).to(dtype))
    wide = x.detach().double().requires_grad_()
    unit, expected = normalize_rows(x), F.normalize(wide, dim=1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(unit.double(), expected, rtol=eps, atol=eps / 1e3)
    (got,), (want,) = torch.autograd.grad(unit, x, g), torch.autograd.grad(expected, wide, g.double())
    over = want.abs() > torch.finfo(dtype).max
    assert torch.equal(got[over].double(), torch.copysign(torch.full_like(want[over], float("inf")), want[over]))
    size = want.abs().amax(1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(
        torch.where(over, 0.0, got.double() / size), torch.where(over, 0.0, want / size), rtol=0, atol=4 * eps
    )


def test_an_infinite_gradient_is_infinite_with_its_sign_and_nan_stays_in_its_row() -> None:
    x, g = rows(4, 3).requires_grad_(), rows(4, 3, 1)
    with torch.no_grad():
        x[0] = torch.tensor([2.0, 0.0, 0.0])
        x[3] = torch.tensor([1.0, float("inf"), 1.0])
    g[0], g[1, 1] = torch.tensor([float("inf"), 0.0, -float("inf")]), float("nan")
    unit = normalize_rows(x)
    (got,) = torch.autograd.grad(unit, x, g)
    assert got[0].tolist() == [0.0, 0.0, -float("inf")]  # what goes along the row is taken out
    assert got[1].isnan().all() and got[2].isfinite().all()
    assert unit[3].isnan().all() and got[3].isnan().all()
