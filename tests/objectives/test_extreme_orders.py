"""f_mi_alpha at orders whose powers leave a dtype: right where the value fits, infinite with its sign where not, never NaN."""

from __future__ import annotations

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

import fastcl.functional as F
from tests import oracle

from .cases import two_views
from .witnesses import close, gradients, served

DOUBLE, SINGLE = torch.float64, torch.float32


def leaves(scale: float, dtype: torch.dtype, n: int = 7, d: int = 5) -> list[Tensor]:
    return [(scale * x).to(dtype).requires_grad_() for x in two_views(n, d)]


def exactly(rows: list[Tensor], alpha: float, eps: float) -> tuple[mpf, list[list[list[mpf]]]]:
    """The value and its gradients by mpmath, whose exponents have no end."""
    mp.dps = 30
    u, v = ([[mpf(e) for e in row] for row in x.tolist()] for x in rows)
    n, a, least = len(u), mpf(alpha), mpf(eps)
    value, grads = mpf(0), [[[mpf(0)] * len(u[0]) for _ in u] for _ in range(2)]
    for i in range(n):
        for j in range(n):
            s = sum(p * q for p, q in zip(u[i], v[j], strict=True))
            t, live = max(s, least), s >= least
            if i == j:
                value -= (t ** (a - 1) - 1) / (a - 1) / n
                w = -(t ** (a - 2)) / n
            else:
                value += (t**a - 1) / a / (n * (n - 1))
                w = t ** (a - 1) / (n * (n - 1))
            for k in range(len(u[0])) if live else ():
                grads[0][i][k] += w * v[j][k]
                grads[1][j][k] += w * u[i][k]
    return value, grads


def as_tensor(values: object, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype; infinite where that is its range."""
    flat = [[float(e) for e in row] for row in values] if isinstance(values, list) else float(values)  # type: ignore[arg-type]
    return torch.tensor(flat, dtype=DOUBLE).to(dtype)


@pytest.mark.parametrize(
    ("alpha", "scale", "dtype"),
    [
        (50.0, 0.6, SINGLE),  # 1e33
        (50.0, 8.0, SINGLE),  # 1e140: infinite
        (3.0, 1e4, SINGLE),
        (2.0, 1.1e9, SINGLE),  # mean s^2 is 1e37, and its sum over pairs beyond float32
        (2.0, 1e12, SINGLE),
        (50.0, 5e2, DOUBLE),  # 1e300: its sum over pairs is beyond float64
        (50.0, 6e2, DOUBLE),
        (50.0, 1e5, DOUBLE),
        (400.0, 30.0, DOUBLE),
        (1.5, 1e20, SINGLE),
        (-9.0, 1.0, SINGLE),
        (-40.0, 1.0, SINGLE),
    ],
)
def test_values_and_gradients_are_right_or_infinite(alpha: float, scale: float, dtype: torch.dtype) -> None:
    exact, wanted = exactly(leaves(scale, dtype), alpha, 1e-3)
    want = as_tensor(exact, dtype)
    rtol = 4 * max(alpha, 4.0) * torch.finfo(dtype).eps if dtype == DOUBLE or alpha <= 2.0 else 1e-6
    for backend in served(dtype):
        rows = leaves(scale, dtype)
        value = F.f_mi_alpha(*rows, alpha=alpha, backend=backend)
        torch.testing.assert_close(value.detach(), want, rtol=rtol, atol=0.0)
        found = gradients(value, rows)
        for got, truth in zip(found, wanted, strict=True):
            w = as_tensor(truth, dtype)
            assert not got.isnan().any(), backend
            if w.isfinite().all():
                close(got, w, rtol=rtol)
            # Beyond the range a gradient keeps its sign; where the value is still within it, it is infinite.
            sure = w.abs() > 1e-3 * w.abs().max() if w.isfinite().all() else w.isinf()
            assert torch.equal(got[sure].sign(), w[sure].sign()), backend
            assert want.isinf() or got[w.isinf()].isinf().all(), backend


def test_rows_of_their_own_and_one_long_row() -> None:
    """What none gives for each row sums to the value; a long row does not take the others' digits."""
    rows = leaves(30.0, DOUBLE)
    with torch.no_grad():
        rows[0][0] *= 100.0
    none = F.f_mi_alpha(*rows, alpha=40.0, reduction="none")
    close(none.mean(), F.f_mi_alpha(*rows, alpha=40.0), rtol=1e-12)
    truth = oracle.f_mi_alpha(*rows, alpha=40.0, eps=1e-3).detach()
    assert truth.isfinite()
    close(none.mean(), truth, rtol=1e-12)


def test_a_sum_over_many_pairs_stays_within_the_dtype() -> None:
    """40 equal rows: every power is 1e307, and 1,560 of them are added."""
    s = 10.0 ** (307 / 3)
    rows = [torch.full((40, 4), (s / 4) ** 0.5, dtype=DOUBLE, requires_grad=True) for _ in range(2)]
    value = F.f_mi_alpha(*rows, alpha=3.0)
    close(value, torch.tensor(s**3 / 3, dtype=DOUBLE), rtol=1e-12)
    for got in gradients(value, rows):
        close(got, s**2 / 40 * rows[0], rtol=1e-12)


def test_orders_without_a_number_are_errors() -> None:
    u, v = two_views(5, 4)
    message = r"^alpha: expected an order at which eps \*\* alpha and eps \*\* \(alpha - 2\) stay within float64, got alpha = "
    with pytest.raises(ValueError, match=message + r"-200 with eps = 0.001; bring eps nearer to 1$"):
        F.f_mi_alpha(u, v, alpha=-200.0)
    with pytest.raises(ValueError, match=message + r"400 with eps = 10; "):
        F.f_mi_alpha(u, v, alpha=400.0, eps=10.0)
    assert F.f_mi_alpha(u, v, alpha=-200.0, eps=0.5).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transformed", [False, True])
def test_an_alignment_beyond_its_dtype_beside_no_pairs(dtype: torch.dtype, transformed: bool) -> None:
    """|x - y|^1000 overflows, and the uniformity of no pairs is -inf: so is their sum, as of the numbers that they stand for."""
    x = 100.0 * torch.eye(4, dtype=dtype)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.align_uniform(x, -x.detach(), alpha=1000.0, normalize=False, groups=torch.zeros(4, dtype=torch.int64))

    if transformed:
        assert loss(x).isneginf() and torch.func.vjp(loss, x)[0].isneginf()
        return
    value = loss(x.requires_grad_())
    assert value.isneginf()
    (gradient,) = torch.autograd.grad(value, x)
    assert torch.equal(gradient, torch.where(torch.eye(4) > 0, float("inf"), 0.0).to(dtype))


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 3.0, 1000.0])
@pytest.mark.parametrize("apart", [1e-22, 1e-3, 1.0, 1e18])
def test_alignment_of_rows_that_differ_in_one_column(alpha: float, apart: float) -> None:
    """The slope of a power is infinite at either end of the range; where nothing differs there is no gradient."""
    x = torch.zeros(3, 4, requires_grad=True)
    value = F.alignment(x, apart * torch.eye(3, 4), alpha=alpha, normalize=False)
    (gradient,) = torch.autograd.grad(value, x)
    assert not value.isnan()
    assert not gradient.isnan().any()
    assert gradient[torch.eye(3, 4) == 0].eq(0.0).all()


@pytest.mark.parametrize("size", [1e-38, 1e-19, 1e30])
@pytest.mark.parametrize("d", [2, 64])
def test_a_high_power_of_a_distance_beyond_the_range_is_its_limit(size: float, d: int) -> None:
    x = size * torch.ones(3, d)
    x.requires_grad_()
    value = F.alignment(x, torch.zeros(3, d), alpha=501.0, normalize=False)
    (gradient,) = torch.autograd.grad(value, x)
    assert value == (0.0 if size < 1.0 else float("inf"))
    assert not gradient.isnan().any()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e18, 1e30])
def test_an_alignment_whose_squares_leave_float32(alpha: float, size: float) -> None:
    """A distance fits where its square does not: its value and its gradient do too."""
    x, y = (size * rows for rows in two_views(6, 4))
    got, want = x.float().requires_grad_(), x.float().double().requires_grad_()
    loss = F.alignment(got, y.float(), alpha=alpha, normalize=False)
    right = ((want - y.float().double()).norm(dim=1) ** alpha).mean()
    loss.backward(), right.backward()
    for a, b in ((loss, right), (got.grad, want.grad)):
        torch.testing.assert_close(a.double(), b.float().double(), rtol=2e-5, atol=1e-6 * b.abs().max().item())


def test_long_rows_opposed_keep_their_clamp() -> None:
    """Every product is below eps: 1 / eps^0 - ... = (1 - eps) + (eps^2 - 1) / 2, though the lengths allow sums beyond float32."""
    row = torch.tensor([[1.22e11, -7.5e10]])
    u, v = row.expand(3, 2).clone().requires_grad_(), -row.expand(3, 2)
    value = F.f_mi_alpha(u, v, alpha=2.0)
    close(value, torch.tensor(1.0 - 1e-3 + 0.5 * (1e-6 - 1.0)), rtol=1e-6)
    (gradient,) = torch.autograd.grad(value, u)
    assert not gradient.any()
