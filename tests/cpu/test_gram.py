"""The spectral loss in two passes over its rows: against its definition and its general form, and where it steps aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcl import functional as F
from fastcl.functional import gram


def rows(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x.requires_grad_(), (x.detach() + torch.randn(n, d, generator=generator)).requires_grad_()


def takes_it(loss: Tensor) -> bool:
    return "PlainSpectral" in str(loss.grad_fn) or any(
        "PlainSpectral" in str(f) for f, _ in loss.grad_fn.next_functions
    )


def by_definition(u: Tensor, v: Tensor, factor: float = 1.0, **arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (t.detach().double().requires_grad_() for t in (u, v))
    loss = F.spectral(x, y, backend="reference", **arguments) * factor
    return loss, *torch.autograd.grad(loss, (x, y))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mu", [1e-3, 1.0, 9.0, 1e4])  # all rows reach sqrt(mu), nearly all, some, none
@pytest.mark.parametrize(
    ("n", "d", "block"), [(5, 2, 1 << 18), (45, 7, 1 << 18), (131, 10, 64), (64, 16, 64), (200, 33, 1)]
)
def test_is_the_definition(
    monkeypatch: pytest.MonkeyPatch, n: int, d: int, block: int, mu: float, reduction: str, estimator: str
) -> None:
    monkeypatch.setattr(gram, "BLOCK", block)
    u, v = rows(n, d)
    arguments = {"mu": mu, "estimator": estimator, "reduction": reduction}
    loss = F.spectral(u, v, **arguments)
    assert takes_it(loss)
    value, du, dv = by_definition(u, v, 3.0, **arguments)
    torch.testing.assert_close(3.0 * loss.double(), value, rtol=2e-6, atol=1e-6)
    for got, expected in zip(torch.autograd.grad(3.0 * loss, (u, v)), (du, dv), strict=True):
        assert (got - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_exactly_as_long_as_the_limit_are_clipped_ones(normalize: bool) -> None:
    # Their gradient has no part along the row, as in the authors' code, where norm < limit decides.
    u, v = torch.eye(4).repeat(3, 1).requires_grad_(), rows(12, 4)[1]
    loss = F.spectral(u, v, normalize=normalize)
    assert normalize or takes_it(loss)
    (du,) = torch.autograd.grad(loss, u)
    assert torch.linalg.vecdot(du, u).abs().max() < 1e-7 < du.abs().max()


def test_only_what_is_asked_for_and_the_same_bits_each_time() -> None:
    u, v = rows(300, 8)
    both = torch.autograd.grad(F.spectral(u, v), (u, v))
    (du,), (dv,) = torch.autograd.grad(F.spectral(u, v.detach()), u), torch.autograd.grad(F.spectral(u.detach(), v), v)
    assert torch.equal(du, both[0])
    assert torch.equal(dv, both[1])
    x = rows(300, 8)[0]
    (itself,) = torch.autograd.grad(F.spectral(x, x), x)
    a, b = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    torch.testing.assert_close(itself, sum(torch.autograd.grad(F.spectral(a, b), (a, b))))


def test_steps_aside_for_what_it_does_not_serve() -> None:
    u, v = rows(30, 4)
    huge, infinite = u.detach().clone().requires_grad_(), u.detach().clone().requires_grad_()
    huge.data[3], infinite.data[5, 1] = 1e30, float("inf")
    mu = torch.tensor(2.0, requires_grad=True)
    for loss in (
        F.spectral(u, v, mu=mu), F.spectral(u, v, groups=torch.arange(30) // 2), F.spectral(u, v, backend="reference"),
        F.spectral(u.double(), v.double()), F.spectral(u[:, :0], v[:, :0]), F.spectral(infinite, v),
        F.spectral(huge, v, mu=1e32), F.spectral(u[:4], v[:4]), F.spectral(u, v, mu=1e-12),
    ):  # fmt: skip
        assert not takes_it(loss)
    huge.data[3] = 1e15
    assert takes_it(F.spectral(huge, v))  # long rows that are clipped are ordinary ones
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_it(F.spectral(u, v))
    assert F.spectral(u, v, reduction="none").shape == (30,)


def test_not_a_number_comes_only_from_one() -> None:
    u, v = rows(30, 4)
    u.data[7, 2] = float("nan")
    assert F.spectral(u, v).isnan()
    u, v = rows(30, 4)
    u.data[7] = 0.0
    assert all(g.isfinite().all() for g in torch.autograd.grad(F.spectral(u, v), (u, v)))
    for g in torch.autograd.grad(F.spectral(u, v), (u, v), torch.tensor(3e38)):
        assert not g.isnan().any()
    v.data[7] = 0.0  # no gradient here, and upstream / mu is infinite
    for upstream in (3e38, float("inf")):
        for g in torch.autograd.grad(F.spectral(u, v, mu=0.01), (u, v), torch.tensor(upstream)):
            assert not g.isnan().any()
            assert (g[7] == 0).all()
    assert torch.autograd.grad(F.spectral(u, v), u, torch.tensor(float("nan")))[0].isnan().all()
    _, du, _ = by_definition(u, v, 2.0**60)
    (got,) = torch.autograd.grad(F.spectral(u, v), u, torch.tensor(2.0**60))
    assert (got - du).norm() <= 2e-6 * du.norm()


def test_refuses_second_derivatives_with_the_reason() -> None:
    u, v = rows(30, 4)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(F.spectral(u, v), (u, v), create_graph=True)


def test_takes_any_strides() -> None:
    u, v = rows(40, 12)
    u, v = (t.detach()[:, 2:9].requires_grad_() for t in (u, v))
    loss = F.spectral(u, v)
    assert takes_it(loss)
    value, du, _ = by_definition(u, v)
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-6)
    assert (torch.autograd.grad(loss, u)[0] - du).norm() <= 2e-6 * du.norm()
