"""Float32 on AMX, as six products of bfloat16 parts: as exact as float32. Where its range ends: test_range.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl.backends import extension

pytestmark = pytest.mark.skipif(
    extension.library is None or extension.library.chosen_isa() not in ("amx", "amx_model"),
    reason="this processor has no AMX for bfloat16, or FASTCL_CPU_ISA names another set",
)


def errors(x: Tensor, y: Tensor, products: Tensor) -> Tensor:
    """Of dot products, over |x| |y|."""
    truth = x.double() @ y.double().T
    return (products.double() - truth).abs() / (x.double().norm(dim=1)[:, None] * y.double().norm(dim=1))


@pytest.mark.parametrize("d", [8, 16, 31, 33, 128, 129, 512, 1000, 4096])
def test_dot_products_are_as_exact_as_torchs(d: int) -> None:
    """A log-sum-exp over one column is the product itself. Here the errors are half of torch.mm's."""
    g = torch.Generator().manual_seed(d)
    ours, theirs = [], []
    for _ in range(8):
        x, y = torch.randn(100, d, generator=g), torch.randn(1, d, generator=g)
        ours.append(errors(x, y, fastcl.pair_reduce(x, y, backend="cpu")[:, None]))
        theirs.append(errors(x, y, x @ y.T))
    assert torch.stack(ours).square().mean() <= 1.1 * torch.stack(theirs).square().mean()
    assert torch.stack(ours).max() <= 2.0 * torch.stack(theirs).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_lose_nothing(dtype: torch.dtype) -> None:
    """One or two parts hold them whole: the products are float32's, the gradients' weights known to 2^-17."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(90, 70, generator=g).to(dtype).requires_grad_() for _ in range(2))
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    r = fastcl.pair_reduce(x, y, scale=0.3, backend="cpu")
    truth = fastcl.pair_reduce(*exact, scale=0.3, backend="reference")
    torch.testing.assert_close(r.double(), truth, rtol=1e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(r.sum(), (x, y)), torch.autograd.grad(truth.sum(), exact), strict=True):
        rounded = want.to(dtype).double()
        assert (got.double() - want).abs().max() <= (rounded - want).abs().max() + 2.0**-16 * want.abs().max()


def test_products_of_weights_are_as_exact_as_torchs() -> None:
    """Gradients of a sum whose weights are known exactly: f(z) = z has W = g_i + h_j."""
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 150, generator=g).requires_grad_() for n in (300, 333))
    total = fastcl.pair_total(x, y, outer="sum", reduce="sum", pair="exp", scale=0.02, backend="cpu")
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    truth = fastcl.pair_total(*wide, outer="sum", reduce="sum", pair="exp", scale=0.02, backend="reference")
    eager = torch.exp(0.02 * (x @ y.T)).sum()
    for got, torchs, want in zip(
        *(torch.autograd.grad(v, leaves) for v, leaves in ((total, (x, y)), (eager, (x, y)), (truth, wide))),
        strict=True,
    ):
        ours, theirs = ((t.double() - want).norm() / want.norm() for t in (got, torchs))
        assert ours <= 1.5 * theirs


def test_weights_beyond_its_range_are_multiplied_in_float_arithmetic() -> None:
    """Infinite weights give infinities with their sign, not the NaN that their parts would make."""
    x, y = torch.ones(40, 8).requires_grad_(), (torch.ones(50, 8) * torch.tensor([1.0, -1.0] * 4)).requires_grad_()
    r = fastcl.pair_reduce(x, y, reduce="sum", pair="exp", shift=100.0, backend="cpu")
    dx, dy = torch.autograd.grad(r.sum(), (x, y))
    assert r.isposinf().all() and dy.isposinf().all()
    assert torch.equal(dx, float("inf") * y.detach()[:1].expand(40, -1))


def test_small_weights_keep_their_digits() -> None:
    """All of them below 2^-100, where parts of parts would be flushed to zero."""
    g = torch.Generator().manual_seed(4)
    x, y = (torch.randn(60, 20, generator=g).requires_grad_() for _ in range(2))
    for factor in (1e-25, 1e-33):
        r = fastcl.pair_reduce(x, y, scale=0.1, backend="cpu")
        wide = [t.detach().double().requires_grad_() for t in (x, y)]
        truth = fastcl.pair_reduce(*wide, scale=0.1, backend="reference")
        for got, want in zip(
            torch.autograd.grad(r, (x, y), torch.full_like(r, factor)),
            torch.autograd.grad(truth, wide, torch.full_like(truth, factor)),
            strict=True,
        ):
            assert (got.double() - want).norm() <= 2e-6 * want.norm()
