"""Gradients beyond the range of a dtype, through the normalisation: right where they fit, else infinite with their sign; no NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl.functional as F
from fastcl.equation.problem import accumulation_dtype
from fastcl.functional import positives
from fastcl.functional.rows import normalize_rows
from fastcl.functional.spectral import clip_norms

from .cases import generator
from .witnesses import HALF, name_of

DTYPES = (*HALF, torch.float32, torch.float64)


def clipped(x: Tensor) -> Tensor:
    return clip_norms(x, torch.full((), 0.5, dtype=accumulation_dtype(x.dtype)))


def rows(dtype: torch.dtype, norm: float, seed: int) -> Tensor:
    """(6, 5) of that norm."""
    x = torch.randn(6, 5, generator=generator(seed), dtype=torch.float64)
    return (x / x.norm(dim=1, keepdim=True) * norm).to(dtype)


@pytest.mark.parametrize("of", [normalize_rows, clipped], ids=["normalised", "clipped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_dot_product_of_large_gradients_does_not_overflow(of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for norm, size in ((1.0, most / 4), (16.0, most), (2.0**-6, most / 4), (16.0, 1e-3 * most), (2.0, 1.0)):
        x, g = rows(dtype, norm, 1).requires_grad_(), rows(dtype, 1.0, 2)
        g = (g.double() / g.double().abs().amax(1, keepdim=True) * size).to(dtype)
        (got,) = torch.autograd.grad(of(x), x, g)
        # In units of 2^-40 or so, so that float64 itself does not overflow.
        e, d = x.detach().double(), g.double() * 2.0**-40
        length = e.norm(dim=1, keepdim=True)
        if of is clipped:  # rows of norm 0.5 or more are: 0.5 x / |x|
            active, by = length >= 0.5, torch.where(length >= 0.5, 0.5 / length, 1.0)
        else:
            active, by = length > 0, 1.0 / length
        unit = e / length
        want = (d - torch.where(active, (d * unit).sum(1, keepdim=True), 0.0) * unit) * by
        fits = want.abs() < 0.99 * most * 2.0**-40
        beyond = want.abs() > 1.01 * most * 2.0**-40
        assert not got.isnan().any()
        assert torch.equal(got[beyond], want[beyond].sign().to(dtype) * math.inf)
        error = (got.double() * 2.0**-40 - want).abs() / want.abs().amax(1, keepdim=True)
        assert float(torch.where(fits, error, 0.0).max()) <= 8 * torch.finfo(dtype).eps
        assert fits.any()


@pytest.mark.parametrize("of", [normalize_rows, clipped], ids=["normalised", "clipped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_infinite_gradients_stay_infinite(of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """A row of g with infinities gives some, with the sign of their tangential part; it gives no NaN, and leaves others alone."""
    for norm in (1.0, 100.0, 1e4):
        x, g = rows(dtype, norm, 1).requires_grad_(), rows(dtype, 1.0, 2)
        (plain,) = torch.autograd.grad(of(x), x, g)
        g[1, 3], g[2, 0], g[2, 4] = math.inf, -math.inf, math.inf
        (got,) = torch.autograd.grad(of(x), x, g)
        assert not got.isnan().any()
        assert torch.equal(got[[0, 3, 4, 5]], plain[[0, 3, 4, 5]])
        assert got[1, 3] == math.inf  # (1 - u_3^2) g_3
        assert got[2].isinf().all()
        g[2, 0] = math.nan
        (got,) = torch.autograd.grad(of(x), x, g)
        assert got[2].isnan().all()
        assert not got[1].isnan().any()


def test_the_limit_of_clipping_takes_no_infinity_from_another() -> None:
    x, limit = rows(torch.float32, 2.0, 1), torch.tensor(1.0, requires_grad=True)
    for size in (1.0, 1e38, 3e38, math.inf):
        g = torch.zeros_like(x)
        g[0, 0], g[1, 0], g[2, 1] = size, -size, size
        (got,) = torch.autograd.grad(clip_norms(x, limit), limit, g)
        unit = x.double() / x.double().norm(dim=1, keepdim=True)
        want = float(unit[0, 0] - unit[1, 0] + unit[2, 1]) * size
        assert not got.isnan()
        assert abs(float(got) - want) <= 1e-6 * abs(want) if math.isfinite(size) else float(got) == want


def test_a_learnt_limit_has_its_gradient_in_float64() -> None:
    """Through the largest number of the dtype, which float64 does not take as a Python number."""
    g = torch.Generator().manual_seed(0)
    u, v = (3.0 * torch.randn(6, 4, dtype=torch.float64, generator=g) for _ in range(2))
    mu = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda mu: F.spectral(u, v, mu=mu), mu)


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
@pytest.mark.parametrize("negatives", ["xx", "xy", "xx+yy"])
def test_infinite_weights_of_negatives_are_no_nan(negatives: Any, backend: Any) -> None:
    """e^s of long rows, whose products with rows of either sign had been infinity less infinity."""
    x, y = (rows(torch.float32, 30.0, seed).requires_grad_() for seed in (1, 2))
    x.data[0] = y.data[0] = 30.0
    value = F.f_micl(x, y, divergence="kl", similarity="cosine", normalize=False, negatives=negatives, backend=backend)
    assert value == math.inf
    for gradient in torch.autograd.grad(value, (x, y)):
        assert not gradient.isnan().any()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (torch.tensor(0.5), torch.tensor(0.0))])
def test_moments_near_the_end_of_float32(weights: Any) -> None:
    """Sums of squares that are beyond it where their mean is not, and a weight of 0 of one that is."""
    x = torch.tensor([[1.0, 0.5, 0.2], [0.9, 0.4, 0.6], [1.0, 0.7, 0.3]]) * 3.6e9
    found, right = (
        F.spread_out(t, mean_weight=weights[0], second_moment_weight=weights[1], normalize=False)
        for t in (x, x.double())
    )
    assert float(found) == pytest.approx(float(right), rel=1e-6)


@pytest.mark.parametrize("few", [0, 4])
def test_logits_of_sup_con_beyond_float32(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not normalised: losses are infinite or what they are, and gradients those of float64."""
    monkeypatch.setattr(positives, "FEW", few)
    z, labels = rows(torch.float32, 1.0, 3) * 1e20, torch.tensor([0, 0, 1, 1, 1, 2])
    found = []
    for dtype in (torch.float32, torch.float64):
        x = z.to(dtype).requires_grad_()
        losses = F.sup_con(x, labels, normalize=False, reduction="none")
        found.append([losses.float(), torch.autograd.grad(losses.sum(), x)[0].float()])
    assert found[1][0].isinf().any()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("tau", [2e-18, 1e-20, 2e-22])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "dcl", "moco_v3", "sigma"])
def test_a_learned_temperature_whose_square_leaves_float32(name: str, tau: float) -> None:
    """Rows as they are, of squares near tau: its gradient has one power of 1 / tau, its inverse's slope two."""
    made, found = (tau / 2.0) ** 0.5 * torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0)), []
    rows = made if name == "moco_v3" else made[:2]
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor(tau).to(dtype).requires_grad_()
        if name == "sigma":
            loss = F.dcl(*rows.to(dtype), temperature=tau, sigma=t, detach_weight=False, normalize=False)
        else:
            loss = getattr(F, name)(*rows.to(dtype), temperature=t, normalize=False)
        found.append(torch.autograd.grad(loss, t)[0].double())
    torch.testing.assert_close(*found, rtol=2e-3 if name == "moco_v3" else 1e-5, atol=0.0)
