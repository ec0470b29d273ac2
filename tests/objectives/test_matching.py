"""Products and distances of matching rows, formed part by part, against the same in plain float64."""

import pytest
import torch

import fastcl
from fastcl.functional import matching, positives

FORMS = {
    "dot": lambda x, y, i, j: matching.row_dot(x, y),
    "sqdist": lambda x, y, i, j: matching.row_sqdist(x, y),
    "listed": lambda x, y, i, j: matching.pair_dot(x, y, i, j),
}


def definition(form, x, y, i, j):
    a, b = (x[i], y[j]) if form == "listed" else (x, y)
    return ((a - b).square() if form == "sqdist" else a * b).sum(1)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(matching, "PART", 32)


def drawn(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(23, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    i, j = (torch.randint(0, 23, (41,), generator=g) for _ in range(2))
    return x, y, i, j


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients(form, dtype):
    x, y, i, j = drawn(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    found, right = FORMS[form](x, y, i, j), definition(form, *wide, i, j)
    g = torch.linspace(-1.0, 2.0, len(right), dtype=torch.float64)
    gradients = torch.autograd.grad(found, (x, y), g.to(found.dtype))
    truth = torch.autograd.grad(right, wide, g)
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), right, rtol=0, atol=16 * eps * 8)
    for got, expected in zip(gradients, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=32 * eps)


@pytest.mark.parametrize("form", FORMS)
def test_one_side_alone(form):
    x, y, i, j = drawn(torch.float64)
    (got,) = torch.autograd.grad(FORMS[form](x.detach(), y, i, j).sum(), (y,))
    (expected,) = torch.autograd.grad(definition(form, x.detach(), y, i, j).sum(), (y,))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_differentiated_again(form):
    x, y, i, j = drawn(torch.float64)
    torch.autograd.gradcheck(lambda x, y: FORMS[form](x, y, i, j), (x, y), check_batched_grad=True)
    torch.autograd.gradgradcheck(lambda x, y: FORMS[form](x, y, i, j), (x, y))


@pytest.mark.parametrize("spread", [0.0, 0.9, 1.1, 100.0])
@pytest.mark.parametrize("loss", ["sup_con", "sincere"])
def test_own_term_is_taken_out_of_a_label(loss, spread, monkeypatch):
    """To both sides of where rows are taken in float64: at a spread a (max |x|^2 - min |x|^2) of 1."""
    monkeypatch.setattr(positives, "FEW", 0)
    torch.manual_seed(0)
    z, labels, a = torch.nn.functional.normalize(torch.randn(64, 16)), torch.arange(64) % 8, 10.0
    z *= (1.0 + torch.linspace(0.0, spread / a, 64)).sqrt()[:, None]
    call = getattr(fastcl.functional, loss)
    way = {"temperature": 1.0 / a, "normalize": False, "reduction": "none"}
    rows = z.clone().requires_grad_(), z.double().requires_grad_()
    values = [call(r, labels, **way) for r in rows]
    gradients = [torch.autograd.grad(v.sum(), r)[0] for v, r in zip(values, rows, strict=True)]
    torch.testing.assert_close(values[0].double(), values[1], rtol=2e-6, atol=1e-6)
    size = gradients[1].norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradients[0].double() / size, gradients[1] / size, rtol=0, atol=1e-5)
