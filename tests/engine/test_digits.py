"""Pair functions keep their digits where they are small: each at z near its zero, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch

import fastcl
from fastcl.backends import extension
from fastcl.equation import intrinsics
from fastcl.equation.pairs import CosineJS, Exp, Log1p, PairFunction, Rsqrt1p, SigmoidSquared, Softplus

NEAR_ZERO = torch.cat([sign * torch.logspace(-8, 2, 81, dtype=torch.float64) for sign in (-1.0, 1.0)])
SMOOTH: list[tuple[PairFunction, float, float]] = [
    # Where z stands: within the domain, and for CosineJS not so near its edge that z's own rounding is what counts.
    (CosineJS(1e-6), -80.0, 0.5), (Softplus(), -80.0, 100.0), (SigmoidSquared(), -40.0, 80.0), (Exp(), -80.0, 80.0),
    (Log1p(), -0.5, 100.0), (Rsqrt1p(), -0.5, 100.0),
]  # fmt: skip


def check_digits(pair: PairFunction, low: float, high: float, backend: str, dtype: torch.dtype) -> None:
    """Value and slope at each z, one pair a row, to 8 roundings of themselves (of the exponential's argument too)."""
    z = NEAR_ZERO[(low <= NEAR_ZERO) & (high >= NEAR_ZERO)].to(dtype)
    x = z[:, None].clone().requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    r = fastcl.pair_reduce(x, one, reduce="sum", pair=pair, backend=backend)  # type: ignore[arg-type]
    assert isinstance(r, torch.Tensor)
    (slope,) = torch.autograd.grad(r.sum(), x)
    exact, eps = z.double(), torch.finfo(dtype).eps
    for what, got, want in (("value", r, pair.f(exact)), ("slope", slope[:, 0], pair.df(exact))):
        off = (got.detach().double() - want).abs() / (eps * (8.0 + exact.abs()) * want.abs())
        worst = int(off.argmax())
        assert float(off[worst]) <= 1.0, (
            f"{pair.name} {what} at z = {float(z[worst])!r}: {float(off[worst]):.3g} of what is allowed"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blocked", "cpu"])
@pytest.mark.parametrize(("pair", "low", "high"), SMOOTH, ids=lambda p: getattr(p, "name", ""))
def test_digits(pair: PairFunction, low: float, high: float, backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and extension.library is None:
        pytest.skip("no compiled extension here")
    check_digits(pair, low, high, backend, dtype)


@pytest.mark.parametrize("backend", ["reference", "blocked", "cpu"])
def test_a_clamped_logarithm_is_that_of_its_clamp(backend: str) -> None:
    """-log(2 - e^(log 2 - eps)): of the difference float32 keeps two digits, and every clamped pair had that error."""
    if backend == "cpu" and extension.library is None:
        pytest.skip("no compiled extension here")
    x, one = torch.tensor([[0.7], [40.0]]), torch.ones(1, 1)
    for eps in (1e-6, 1e-5, 1e-2):
        pair = CosineJS(eps)
        r = fastcl.pair_reduce(x, one, reduce="sum", pair=pair, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(r.double(), pair.f(x[:, 0].double()), rtol=1e-6, atol=0.0)


def test_second_derivatives_of_softplus_on_both_sides() -> None:
    """F.logsigmoid's is 0 beyond 17 in float32, where confident rows of a contrast lie."""
    found = []
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([-80.0, -30.0, -3.0, -1e-8, 0.0, 1e-8, 3.0, 30.0, 80.0], dtype=dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(intrinsics.softplus(z).sum(), z, create_graph=True)
        found.append(torch.autograd.grad(slope.sum(), z)[0].double())
    truth = torch.exp(-z.detach().abs()) / (1.0 + torch.exp(-z.detach().abs())) ** 2
    for mine in found:
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=0.0)
