"""Errors in float32 and half precision, against float64: no more than torch's own in that dtype, and a little.

The double loop is run in float64, which is the truth, and in the dtype itself, which is what torch's own operations make of
it. `eps` is the dtype's unit roundoff for gradients, which come back in it, and float32's for values, which are float32.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastcl.functional import dcl, f_micl, positives, temperature_free_info_nce
from fastcl.functional.debiasing import _log1mexp
from fastcl.functional.divergence import gaussian_divergence

from .cases import CASES, Case, generator
from .witnesses import HALF, double_loop, gradients, library, name_of, served, sets_of, upstream_for

N, D = 12, 16
RAW = ("spectral", "minc", "f_mi_alpha")  # rows are not normalised by default


def error(got: Tensor, truth: Tensor) -> float:
    """The largest absolute error; NaN is never right."""
    if not truth.numel():
        return 0.0
    assert not got.isnan().any()
    return float((got.detach().double() - truth.detach()).abs().max())


def torchs_error(theirs: Tensor, truth: Tensor) -> float:
    """The error of torch's own operations; a few units where they give no number at all (float16 underflows to log 0)."""
    if theirs.isnan().any():
        return 8 * torch.finfo(theirs.dtype).eps * size(truth)
    return error(theirs, truth)


def size(truth: Tensor) -> float:
    return float(truth.detach().abs().max()) if truth.numel() else 0.0


def copies(rows: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in rows]


def stored(case: Case, arguments: dict, rows: list[Tensor]) -> float:
    """What storing log-sum-exps in float32 may cost hard_negative, in eps; torch's loop keeps exponentials and stores none.

    A log-sum-exp up to 2^(k + 1) is known to half a unit in its last place, 2^(k - 1) eps. The gradient weighs the two by 1 + beta
    and by beta: at tau = 0.1, 2 * 8 + 1 * 4 eps. Measured there, over 16 orders of the columns: torch's loop up to 7.5 eps, the
    cpu backend 12.4, blocked 30 (the worst order, on top of torch's own). Of rows that are not normalised the logits are as much
    larger as their dot products: at tau = 2 and dot products of 32, 2 * 16 + 1 * 8; measured, 13.2 eps. At no other setting
    more than torch's and 8 eps.
    """
    if case.name != "hard_negative":
        return 0.0
    scale, beta = 1.0 / arguments.get("temperature", 0.5), arguments.get("beta", 1.0)
    if not arguments.get("normalize", True):
        scale *= max(1.0, float((rows[0] @ rows[1].T).detach().abs().max()))
    terms = ((1.0 + beta, scale * (1.0 + beta)), (beta, scale * beta))
    return sum(weight * 2.0 ** (math.floor(math.log2(logit)) - 1) for weight, logit in terms)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name_of)
@pytest.mark.parametrize(("case", "index"), sets_of(), ids=name_of)
def test_errors_are_no_larger_than_torchs_own(case: Case, index: int, dtype: torch.dtype) -> None:
    rows = case.rows_of(N, D, dtype)
    arguments = case.arguments(index, N, D, rows[0]) | ({"reduction": "none"} if case.rows else {})
    exact, rounded = copies(rows, torch.float64), copies(rows, dtype)
    truth, torchs = double_loop(case, exact, **arguments), double_loop(case, rounded, **arguments)
    g = upstream_for(truth)
    truth_grads, torch_grads = gradients(truth, exact, g), gradients(torchs, rounded, g.to(dtype))
    # float32: torch's error on a dozen rows can be small by luck, hence a few units; in half precision it is not.
    eps, few = torch.finfo(dtype).eps, (max(8.0, stored(case, arguments, rows)) if dtype == torch.float32 else 1.0)
    for backend in served(dtype):
        leaves = copies(rows, dtype)
        value = library(case, leaves, backend, **arguments)
        assert value.dtype == torch.float32
        little = eps * max(few * size(truth), few * case.terms(arguments), 2.0 * case.logits(arguments))
        assert error(value, truth) <= torchs_error(torchs, truth) + little, backend
        found = gradients(value, leaves, g.to(value.dtype))
        for got, theirs, want in zip(found, torch_grads, truth_grads, strict=True):
            assert got.dtype == dtype
            assert error(got, want) <= torchs_error(theirs, want) + few * eps * size(want), backend


@pytest.mark.parametrize(("case", "index"), sets_of(), ids=name_of)
def test_sizes_beyond_a_tile(case: Case, index: int) -> None:
    """Ragged and larger than any register or cache tile: float32 against the definition in float64."""
    n, d = 203, 37
    rows = case.rows_of(n, d, torch.float32)
    arguments = case.arguments(index, n, d, rows[0])
    if not arguments.get("normalize", True) or case.name in RAW:
        rows = [(x.detach() / d**0.5).requires_grad_() for x in rows]
    exact = copies(rows, torch.float64)
    truth = library(case, exact, "reference", **arguments)
    want = gradients(truth, exact)
    # A logit's rounding is eps times its size, and it is a relative one of its exponential.
    allowed = 4 * max(14.3, case.logits(arguments)) * torch.finfo(torch.float32).eps
    for backend in served(torch.float32, definition=False):
        leaves = copies(rows, torch.float32)
        value = library(case, leaves, backend, **arguments)
        assert error(value, truth) <= allowed * max(size(truth), case.terms(arguments)), backend
        for got, w in zip(gradients(value, leaves), want, strict=True):
            assert error(got, w) <= allowed * size(w), backend


def unit_rows(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Rows of unit length but for the rounding to the dtype."""
    rows = [x / x.norm(dim=1, keepdim=True) for x in case.inputs(N, D, 3)]
    return [x.to(dtype) for x in rows]


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_half_precision_inputs_are_all_that_is_rounded(case: Case, dtype: torch.dtype) -> None:
    """On rows that half precision holds exactly the value is float32's, and the gradient is rounded about once."""
    rows = unit_rows(case, dtype)
    arguments = case.arguments(0, N, D, rows[0]) | case.exact
    exact = copies(rows, torch.float64)
    truth = double_loop(case, exact, **arguments)
    want = gradients(truth, exact)
    for backend in served(dtype):
        leaves = copies(rows, dtype)
        value = library(case, leaves, backend, **arguments)
        scale = max(size(truth), case.terms(arguments), case.logits(arguments))
        assert error(value, truth) <= 16 * torch.finfo(torch.float32).eps * scale, backend
        for got, w in zip(gradients(value, leaves), want, strict=True):
            assert error(got, w) <= 2 * torch.finfo(dtype).eps * size(w), backend


@pytest.mark.parametrize("case", [c for c in CASES if c.sharp], ids=name_of)
def test_extreme_temperatures(case: Case) -> None:
    """1 / tau = 1000 on unit rows: an error of eps in a cosine is one of 1000 eps in its logit, and no more."""
    rows = case.rows_of(N, D, torch.float32)
    arguments = case.arguments(0, N, D, rows[0]) | case.sharp
    exact = copies(rows, torch.float64)
    truth = double_loop(case, exact, **arguments)
    want = gradients(truth, exact)
    for dtype in (torch.float64, torch.float32):
        eps = 1000 * torch.finfo(dtype).eps
        for backend in served(dtype):
            leaves = copies(rows, dtype)
            value = library(case, leaves, backend, **arguments)
            assert error(value, truth) <= 8 * eps * max(1.0, size(truth) / 1000), backend
            for got, w in zip(gradients(value, leaves), want, strict=True):
                assert error(got, w) <= 8 * eps * size(w) + 8 * eps, backend
    for dtype in HALF:
        for backend in served(dtype):
            leaves = copies(rows, dtype)
            value = library(case, leaves, backend, **arguments)
            assert torch.isfinite(value), backend
            assert all(torch.isfinite(g).all() for g in gradients(value, leaves)), backend


def aligned_rows(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Unit rows whose positives are the rows themselves, rounded to the dtype: what a trained encoder gives."""
    base = torch.randn(N, D, generator=generator(11), dtype=torch.float64)
    base = (base / base.norm(dim=1, keepdim=True)).to(dtype)
    rows = [base if len(x) == N else x for x in unit_rows(case, dtype)]
    return [torch.cat([base, x[N:]]) if len(x) > N and k != 2 else x for k, x in enumerate(rows)]


def sharpness_for(case: Case, rows: list[Tensor], target: float) -> float:
    """The sharpness at which the loss is the target, by bisection on its logarithm."""
    low, high = 0.0, math.log(200.0)
    for _ in range(40):
        middle = 0.5 * (low + high)
        arguments = case.small(math.exp(middle)) | {"normalize": False}
        above = float(double_loop(case, [x.double() for x in rows], **arguments)) > target
        low, high = (middle, high) if above else (low, middle)
    return math.exp(high)


@pytest.mark.parametrize("target", [1e-3, 1e-6])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 3e-5), (torch.bfloat16, 1e-2)], ids=name_of)
@pytest.mark.parametrize("case", [c for c in CASES if c.small], ids=name_of)
def test_small_losses_keep_accurate_gradients(case: Case, dtype: torch.dtype, allowed: float, target: float) -> None:
    """The positive stays outside the reduction: relative to its own size the gradient keeps the dtype's accuracy."""
    rows = aligned_rows(case, dtype)
    arguments = case.small(sharpness_for(case, rows, target)) | {"normalize": False}
    exact = copies(rows, torch.float64)
    truth = double_loop(case, exact, **arguments)
    assert 0.1 * target < float(truth.detach()) < 2 * target
    want = gradients(truth, exact)
    for backend in served(dtype):
        leaves = copies(rows, dtype)
        value = library(case, leaves, backend, **arguments)
        assert error(value, truth) <= allowed * size(truth), backend
        for got, w in zip(gradients(value, leaves), want, strict=True):
            assert float((got.double() - w).norm()) <= allowed * float(w.norm()), backend


def pairs_in_one(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What sup_con takes in place of two aligned views: each row twice, the second a little off, the pairs in no order."""
    base = torch.randn(N, D, generator=generator(11), dtype=torch.float64)
    both = torch.cat([base, base + 1e-3 * torch.randn(N, D, generator=generator(12), dtype=torch.float64)])
    order = torch.randperm(2 * N, generator=generator(13))
    labels = 7 - 1000 * (torch.arange(2 * N) % N)
    return (both / both.norm(dim=1, keepdim=True)).to(dtype)[order], labels[order]


@pytest.mark.parametrize("target", [1e-3, 1e-6, 5e-9])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 3e-5), (torch.bfloat16, 1e-2)], ids=name_of)
@pytest.mark.parametrize("few", [0, 4])
def test_a_single_positive_of_a_label_stays_outside(
    dtype: torch.dtype, allowed: float, target: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sup_con where a label has two rows: as accurate as nt_xent, though labels tell which row is the positive."""
    monkeypatch.setattr(positives, "FEW", few)
    case = next(c for c in CASES if c.name == "sup_con")
    z, labels = pairs_in_one(dtype)
    low, high = math.log(1e-3), 0.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        arguments = {"labels": labels, "temperature": math.exp(middle), "base_temperature": math.exp(middle)}
        above = float(double_loop(case, [z.double()], normalize=False, **arguments)) > target
        low, high = (low, middle) if above else (middle, high)
    exact = copies([z], torch.float64)
    truth = double_loop(case, exact, normalize=False, **arguments)
    assert 0.1 * target < float(truth.detach()) < 2 * target
    (want,) = gradients(truth, exact)
    for backend in served(dtype):
        leaves = copies([z], dtype)
        value = library(case, leaves, backend, normalize=False, **arguments)
        assert error(value, truth) <= allowed * size(truth), backend
        (got,) = gradients(value, leaves)
        assert float((got.double() - want).norm()) <= allowed * float(want.norm()), backend


def test_the_share_that_debiasing_leaves_keeps_its_digits() -> None:
    """log(1 - e^t) where the negatives are nearly all hidden positives, t near 0, and where none is, t far below."""
    t = -torch.cat([torch.logspace(-7, 1.9, 60), torch.tensor([0.6931, 0.6932])])
    exact = t.double().requires_grad_()
    truth = torch.where(exact > -1e-3, torch.log(-torch.expm1(exact)), torch.log1p(-torch.exp(exact)))
    rounded = t.clone().requires_grad_()
    value = _log1mexp(rounded)
    torch.testing.assert_close(value.double(), truth, rtol=4e-7, atol=0.0)
    (got,), (want,) = (
        gradients(value, [rounded], torch.ones_like(value)),
        gradients(truth, [exact], torch.ones_like(truth)),
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0.0)


# f''(u) u = d f'(e^l) / dl, each as a sum of terms of one sign.
SLOPES = {
    "kl": lambda l: l.exp() / l.exp(),
    "js": lambda l: (1.0 + l.exp()).reciprocal(),
    "pearson": lambda l: 2.0 * l.exp(),
    "sh": lambda l: 0.5 * (-0.5 * l).exp(),
    "vlc": lambda l: 8.0 * l.exp() / (1.0 + l.exp()) ** 3,
    "neyman": lambda l: 2.0 * (-2.0 * l).exp(),
    "jeffrey": lambda l: 1.0 + (-l).exp(),
    "rkl": lambda l: (-l).exp(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SLOPES)
def test_slopes_of_critics_far_from_0(name: str, dtype: torch.dtype) -> None:
    """A positive at a large distance, or under a large mu, has a small gradient, and no less of it than its digits."""
    l = torch.tensor(
        [-43.0, -40.0, -17.0, -5.0, -1.0, -0.3, 0.0, 0.3, 1.0, 5.0, 17.0, 40.0], dtype=dtype, requires_grad=True
    )
    (found,) = torch.autograd.grad(gaussian_divergence(name, None).critic(l).sum(), l)
    right = SLOPES[name](l.detach().double())
    allowed = 4.0 * torch.finfo(dtype).eps * (1.0 + l.detach().double().abs())  # exp of a rounded number
    assert bool(((found.double() / right - 1.0).abs() <= allowed).all()), found.double() / right - 1.0


@pytest.mark.parametrize("divergence", ["pearson", "vlc"])
def test_f_micl_of_far_positives(divergence: str) -> None:
    """Rows at right angles under the paper's beta for text: u = e^-40."""
    made = torch.randn(2, 32, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        x, y = (part.to(dtype).requires_grad_() for part in made)
        loss = f_micl(x, y, divergence=divergence, beta=20.0, alpha=0.0, reduction="none").sum()
        found.append(torch.autograd.grad(loss, (x, y)))
    for got, right in zip(*found, strict=True):
        assert bool(((got - right).norm(dim=1) <= 1e-4 * right.norm(dim=1)).all())
    x, y = (torch.nn.functional.normalize(part, dim=1).requires_grad_() for part in made)
    square = (x - y).square().sum(1)
    slope = SLOPES[divergence](-20.0 * square.detach()) * 20.0
    right = torch.autograd.grad((slope * square).sum(), x)[0]  # of unit rows: what is across them is that of the rows
    across = right - (right * x).sum(1, keepdim=True) * x
    torch.testing.assert_close(found[1][0] * made[0].norm(dim=1, keepdim=True), across, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("sigma", [0.1, 0.01, 0.002])
def test_weights_of_dcl_add_up(sigma: float) -> None:
    """A softmax of logits of 1 / sigma, whose rounded log-sum-exp would leave its rounding of the gradient of sigma."""
    made = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made[1] = made[0] + 1e-3 * made[1]

    def slope(dtype: torch.dtype, plainly: bool) -> Tensor:
        (u, v), s = made.float().to(dtype), torch.tensor(sigma).to(dtype).requires_grad_()
        loss = dcl(u, v, temperature=0.1, sigma=s, detach_weight=False)
        if plainly:  # what of it has weights
            aligned = torch.nn.functional.cosine_similarity(u, v)
            loss = -((2.0 - len(u) * torch.softmax(aligned / s, 0)) * aligned / 0.1).mean()
        return torch.autograd.grad(loss, s)[0].double()

    right = slope(torch.float64, False)
    torch.testing.assert_close(slope(torch.float64, True), right, rtol=1e-6, atol=1e-12 / sigma**2)
    allowed = 4.0 * abs(slope(torch.float32, True) - right) + torch.finfo(torch.float32).eps * 10.0 / sigma**2
    assert abs(slope(torch.float32, False) - right) <= allowed


@pytest.mark.parametrize("how", ["plainly", "torch.func"])
def test_temperature_free_of_opposed_positives(how: str) -> None:
    """1 + s of a row and its positive keeps its digits near s = -1, as 1 - s does near 1."""
    made = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.nn.functional.normalize(made[0], dim=1).float()
    y = (-x.double() + 1e-3 * made[1]).float()
    found = []
    for dtype in (torch.float32, torch.float64):
        if how == "torch.func":
            found.append(torch.func.grad(temperature_free_info_nce)(x.to(dtype), y.to(dtype)).double())
        else:
            at = x.to(dtype).requires_grad_()
            found.append(torch.autograd.grad(temperature_free_info_nce(at, y.to(dtype)), at)[0].double())
    got, right = found
    assert float(((got - right).norm(dim=1) / right.norm(dim=1)).max()) <= 1e-4
