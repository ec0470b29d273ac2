"""Gradients formed view by view, against those of the stacked views in plain float64."""

import pytest
import torch

import fastcl
from fastcl.backends import extension
from fastcl.functional import both_views

ROWS = 37
LOSSES = {
    "debiased": fastcl.functional.debiased,
    "hard_negative": fastcl.functional.hard_negative,
    "sogclr": fastcl.functional.sogclr,
}
pytestmark = pytest.mark.skipif(extension.library is None, reason="no compiled kernels")


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch):
    monkeypatch.setattr(both_views, "PART", 1)


def drawn(dtype, scale=1.0):
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(ROWS, 6, generator=g, dtype=torch.float64) for _ in range(2))
    u, v = (scale * torch.nn.functional.normalize(t) for t in (u, v))
    groups = torch.randint(0, 9, (ROWS,), generator=g)
    return u.to(dtype).requires_grad_(), v.to(dtype).requires_grad_(), groups


def calls_counted(monkeypatch):
    calls = []
    apply = both_views._ViewByView.apply
    monkeypatch.setattr(both_views._ViewByView, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    # Rows of length 30: exponentials are relative to each row's largest, and those of a part to its own.
    [(torch.float64, 1.0), (torch.float32, 1.0), (torch.float32, 30.0), (torch.bfloat16, 1.0)],
)
def test_gradients(monkeypatch, grouped, loss, dtype, scale):
    """As near to the definition as those of the stacked views are."""
    u, v, groups = drawn(dtype, scale)
    calls = calls_counted(monkeypatch)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(0.5, 1.5, 2 * ROWS, dtype=torch.float64)

    def gradients(u, v, backend):
        terms = LOSSES[loss](
            u, v, temperature=temperature, groups=groups if grouped else None, normalize=False, reduction="none",
            backend=backend,
        )  # fmt: skip
        return torch.autograd.grad((terms.double() * weights).sum(), (u, v, temperature))

    found = gradients(u, v, "cpu")
    assert calls == [1]
    right = gradients(u.detach().double().requires_grad_(), v.detach().double().requires_grad_(), "reference")
    monkeypatch.setattr(both_views, "PART", 2**40)
    stacked = gradients(u, v, "cpu")
    assert calls == [1], "neither the definition nor few rows are taken apart"
    for got, other, true in zip(found, stacked, right, strict=True):
        largest = true.abs().max()
        error, of_stacked = (float((t.double() - true).abs().max() / largest) for t in (got, other))
        eps = max(
            torch.finfo(got.dtype).eps, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        )
        assert error <= 2.0 * of_stacked + 4.0 * eps


@pytest.mark.parametrize("side", [0, 1])
def test_one_view_alone(monkeypatch, side):
    calls = calls_counted(monkeypatch)
    rows = list(drawn(torch.float64)[:2])
    rows[1 - side] = rows[1 - side].detach()
    (got,) = torch.autograd.grad(fastcl.functional.hard_negative(*rows, backend="cpu"), (rows[side],))
    (expected,) = torch.autograd.grad(fastcl.functional.hard_negative(*rows, backend="reference"), (rows[side],))
    assert calls == [1]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_temperature_alone(monkeypatch):
    calls = calls_counted(monkeypatch)
    u, v = (rows.detach() for rows in drawn(torch.float64)[:2])
    temperature = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    got, expected = (
        torch.autograd.grad(
            fastcl.functional.hard_negative(u, v, temperature=temperature, backend=backend), temperature
        )[0]
        for backend in ("cpu", "reference")
    )
    assert calls == [1] and got.shape == (1,)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_batched_gradients_and_graphs():
    u, v, _ = drawn(torch.float64)
    terms = fastcl.functional.debiased(u, v, reduction="none", backend="cpu")
    eye = torch.eye(2 * ROWS, dtype=torch.float64)
    together = torch.autograd.grad(terms, (u, v), eye, is_grads_batched=True, retain_graph=True)
    for k in (0, ROWS + 3):
        alone = torch.autograd.grad(terms, (u, v), eye[k], retain_graph=True)
        for got, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(got[k], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="pass backend='reference'"):
        torch.autograd.grad(terms.sum(), u, create_graph=True)


def test_a_view_changed_in_place_is_noticed():
    u, v, _ = drawn(torch.float64)
    loss = fastcl.functional.sogclr(u, v, normalize=False, backend="cpu")
    with torch.no_grad():
        v.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
