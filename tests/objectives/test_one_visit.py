"""Prefixes of InfoNCE and CLIP in one visit of each pair: against float64, at the ends of ranges, under transforms."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fastcl import losses
from fastcl.backends import extension
from fastcl.functional import matryoshka
from fastcl.losses import matryoshka as wrapper

DIMS, WEIGHTS, N = (40, 120, 160), (0.5, -0.25, 2.0), 70

pytestmark = [
    pytest.mark.skipif(
        extension.library is not None and extension.library.chosen_isa() == "amx", reason="one by one with AMX"
    ),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # torch's own, of compiled losses
]


@pytest.fixture
def visits(monkeypatch):
    """How many calls were served in one visit; its strips are of a few rows."""
    served = []

    def spied(*given, **named):
        found = matryoshka.in_one_visit(*given, **named)
        served.append(found is not None)
        return found

    monkeypatch.setattr(wrapper, "in_one_visit", spied)
    monkeypatch.setattr(matryoshka, "LEAST_ROWS", 16)
    monkeypatch.setenv("FASTCL_WORKSPACE_MB", "0.001")
    return served


def views(m=N, dtype=torch.float64, width=DIMS[-1], seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(k, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for k in (N, m)]


def loss_of(columns, scale=9.0, **settings):
    a = torch.nn.Parameter(torch.tensor([1.0 / scale], dtype=torch.float64))
    if not columns:
        return losses.InfoNCELoss(temperature=a, **settings)
    return losses.CLIPLoss(logit_scale=scale, largest_scale=None, **settings)


def plainly(x: Tensor, y: Tensor, a: Tensor | float, columns: bool, reduction: str = "mean") -> Tensor:
    """The sum in torch's own operations."""
    total, matching = torch.zeros((), dtype=x.dtype), torch.arange(x.shape[0])
    for d, w in zip(DIMS, WEIGHTS, strict=True):
        z = a * F.normalize(x[:, :d], dim=1) @ F.normalize(y[:, :d], dim=1).T
        ways = [z, z.T] if columns else [z]
        total = total + w * sum(F.cross_entropy(way, matching, reduction=reduction) for way in ways) / len(ways)
    return total


def one_by_one(own, x, y, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(wrapper, "in_one_visit", lambda *_, **__: None)
        return own(x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [9.0, 100.0])
@pytest.mark.parametrize(("columns", "m"), [(False, N), (False, N + 9), (True, N)])
def test_values_and_gradients(visits, columns, m, scale, reduction):
    x, y = views(m, width=170)
    loss = loss_of(columns, scale, reduction=reduction).double()
    given = [x, y, *loss.parameters()]
    value = losses.MatryoshkaLoss(loss, DIMS, WEIGHTS)(x, y)
    a = loss.logit_scale() if columns else 1.0 / loss.temperature
    right = plainly(x, y, a, columns, reduction)
    torch.testing.assert_close(value, right)
    assert visits == [True]
    for got, wanted in zip(
        torch.autograd.grad(3.0 * value, given), torch.autograd.grad(3.0 * right, given), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("columns", [False, True])
def test_errors_are_no_larger_than_torchs_own(visits, columns, scale, dtype):
    x, y = views(dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    plain = [t.detach().float().requires_grad_() for t in (x, y)]
    loss = loss_of(columns, scale)
    value = losses.MatryoshkaLoss(loss, DIMS, WEIGHTS)(x, y)
    truth, theirs = (plainly(*rows, scale, columns) for rows in (exact, plain))
    eps = torch.finfo(torch.float32).eps
    assert visits == [True] and value.dtype == torch.float32
    assert abs(value.double() - truth) <= abs(theirs.double() - truth) + 8 * eps * truth.abs()
    got, right, torchs = (
        torch.autograd.grad(v, rows) for v, rows in ((value, (x, y)), (truth, exact), (theirs, plain))
    )
    for g, t, p in zip(got, right, torchs, strict=True):
        rounding = torch.finfo(dtype).eps + 8 * eps
        assert g.dtype == dtype
        assert (g.double() - t).abs().max() <= (p.double() - t).abs().max() + rounding * t.abs().max()


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("level", [1e-3, 1e-6])
def test_late_in_training(visits, columns, level):
    """The positive stays outside of the sum: small losses have all their digits."""
    x, _ = views(dtype=torch.float32)
    scale = 30.0
    noise = torch.randn(N, DIMS[-1], generator=torch.Generator().manual_seed(2))
    y = (x.detach() + 0.05 * noise).requires_grad_()
    scale = {1e-3: 22.0, 1e-6: 36.0}[level]
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    value = losses.MatryoshkaLoss(loss_of(columns, scale), DIMS, WEIGHTS)(x, y)
    truth = plainly(*exact, scale, columns)
    assert visits == [True] and truth.abs() < 20 * level
    assert abs(value.double() - truth) < 3e-5 * truth.abs()
    for g, t in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(truth, exact), strict=True):
        assert (g.double() - t).norm() < 3e-5 * t.norm()


def _zero_prefix(x, y):
    x[3, : DIMS[0]] = 0.0
    y[5] = 0.0


def _lengths(x, y):
    x[::2] *= 1e-9
    y[::3] *= 1e15


def _short_rows(x, y):
    x[::2] *= 1e-30


def _long_rows(x, y):
    y[::3] *= 1e30


def _short_prefix(x, y):
    x[4, : DIMS[0]] *= 1e-5
    x[4, DIMS[0] :] *= 1e13


def _prefix_below_the_least_length(x, y):
    x[4] *= 1.2e-13


def _identical(x, y):
    x.copy_(x[:1].expand_as(x))
    y.copy_(x)


@pytest.mark.parametrize("scale", [14.0, 1e3])
@pytest.mark.parametrize(
    "change",
    [_zero_prefix, _lengths, _short_rows, _long_rows, _short_prefix, _prefix_below_the_least_length, _identical],
)
@pytest.mark.parametrize("columns", [False, True])
def test_far_from_ordinary(monkeypatch, visits, columns, change, scale):
    x, y = views(dtype=torch.float32)
    with torch.no_grad():
        change(x, y)
    own = losses.MatryoshkaLoss(loss_of(columns, scale), DIMS, WEIGHTS)
    value, right = own(x, y), one_by_one(own, x, y, monkeypatch)
    assert visits == [change in (_lengths, _identical)]
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    truth = plainly(*exact, scale, columns)
    eps = 8 * torch.finfo(torch.float32).eps
    assert abs(value.double() - truth) <= abs(right.double() - truth) + eps * scale
    wanted = torch.autograd.grad(truth, exact)
    for g, o, t in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(right, (x, y)), wanted, strict=True):
        size = t.abs().amax(1, keepdim=True) + scale / N / t.shape[1]
        assert torch.equal(g.isfinite(), o.isfinite())
        kept = g.isfinite()
        assert ((g.double() - t).abs() <= (o.double() - t).abs() + 8 * eps * scale * size)[kept].all()


@pytest.mark.parametrize("columns", [False, True])
def test_nan_comes_from_nan_only(visits, columns):
    x, y = views(dtype=torch.float32)
    with torch.no_grad():
        x[3, DIMS[0] + 1] = math.nan
    own = losses.MatryoshkaLoss(loss_of(columns), DIMS)
    assert own(x, y).isnan() and visits == [False]
    first = losses.MatryoshkaLoss(loss_of(columns), (DIMS[0], DIMS[0] + 1, 150))
    assert first(x, y).isnan()


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"label_smoothing": 0.1}, {}),
        ({"false_negative_margin": 0.1}, {}),
        ({"false_negative_margin": 0.0}, {}),
        ({"normalize": False}, {}),
        ({"reduction": "none"}, {}),
        ({"backend": "blocked"}, {}),
        ({}, {"groups": torch.arange(N) // 2}),
        ({}, {"positives": (torch.arange(N), torch.arange(N).flip(0))}),
    ],
)
@pytest.mark.parametrize("columns", [False, True])
def test_other_settings_are_taken_one_by_one(visits, columns, settings, data):
    x, y = views(dtype=torch.float32)
    loss = loss_of(columns, **settings).float()
    value = losses.MatryoshkaLoss(loss, DIMS)(x, y, **data)
    assert not any(visits)
    torch.testing.assert_close(value, sum(loss(x[:, :d], y[:, :d], **data) for d in DIMS))


def test_a_subclass_a_hook_and_few_columns_are_taken_one_by_one(visits):
    class Mine(losses.InfoNCELoss):
        def forward(self, x, y):
            return super().forward(x, y) + 1.0

    x, y = views(dtype=torch.float32)
    hooked = losses.InfoNCELoss()
    hooked.register_forward_hook(lambda *_: torch.zeros(()))
    assert losses.MatryoshkaLoss(hooked, DIMS)(x, y) == 0.0
    losses.MatryoshkaLoss(Mine(), DIMS)(x, y)
    losses.MatryoshkaLoss(losses.InfoNCELoss(), (8, 16))(x, y)
    losses.MatryoshkaLoss(losses.InfoNCELoss(), DIMS)(x[:20], y[:20])
    assert visits == [False, False]


@pytest.mark.parametrize("columns", [False, True])
def test_checkpointed(visits, columns):
    own, rows = losses.MatryoshkaLoss(loss_of(columns), DIMS, WEIGHTS), views()
    right = torch.autograd.grad(own(*rows), rows)
    found = torch.autograd.grad(checkpoint(own, *rows, use_reentrant=False), rows)
    assert all(visits)
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("reduction", "avg", "expected one of 'mean', 'sum', 'none', got 'avg'"), ("temperature", 0, "expected a number > 0, got 0")],
)  # fmt: skip
def test_a_setting_changed_to_what_is_none_is_refused(name, value, said):
    own = losses.MatryoshkaLoss(losses.InfoNCELoss(), DIMS)
    setattr(own.losses[0], name, value)
    with pytest.raises(ValueError, match=f"^{name}: {said}"):
        own(*views(dtype=torch.float32))


def test_a_backend_of_the_environment_is_kept(visits, monkeypatch):
    monkeypatch.setenv("FASTCL_BACKEND", "blocked")
    losses.MatryoshkaLoss(losses.InfoNCELoss(), DIMS)(*views(dtype=torch.float32))
    assert visits == [False]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_what_is_wanted(monkeypatch, visits, which):
    x, y = (t.detach() for t in views(dtype=torch.float32))
    loss = loss_of(True)
    given = [x, y, loss.logit_scale.log]
    for i, t in enumerate(given):
        t.requires_grad_(i == which)
    own = losses.MatryoshkaLoss(loss, DIMS)
    (g,) = torch.autograd.grad(own(x, y), given[which])
    for t in given:
        t.requires_grad_()
    torch.testing.assert_close(g, torch.autograd.grad(own(x, y), given)[which])
    monkeypatch.setattr(matryoshka._Visit, "weigh", None)
    with torch.no_grad():
        value = own(x, y)
    monkeypatch.undo()
    assert visits == [True] * 3 and not value.requires_grad
    torch.testing.assert_close(value, own(x, y).detach())


def test_one_view_twice_and_a_backward_twice(visits):
    (x, _) = views()
    own = losses.MatryoshkaLoss(loss_of(False).double(), DIMS, WEIGHTS)
    value, right = own(x, x), plainly(x, x, 9.0, False)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(right, x)[0])
    assert torch.equal(torch.autograd.grad(value, x)[0], first) and visits == [True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize("columns", [False, True])
def test_transforms(monkeypatch, visits, columns):
    x, y = views(dtype=torch.float32)
    own = losses.MatryoshkaLoss(loss_of(columns).requires_grad_(False), DIMS, WEIGHTS)
    value = own(x, y)
    (g,) = torch.autograd.grad(value, x)
    rows = [t.detach() for t in (x, y)]
    near = {"atol": 2e-6, "rtol": 2e-5}
    torch.testing.assert_close(torch.func.grad(own)(*rows), g, **near)
    torch.testing.assert_close(torch.vmap(own)(*(t[None] for t in rows)), value.detach()[None], **near)
    torch.testing.assert_close(
        torch.func.jvp(lambda t: own(t, rows[1]), (rows[0],), (rows[0],))[0], value.detach(), **near
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert own(x, y).isfinite()
    torch.testing.assert_close(torch.compile(own, backend="aot_eager", fullgraph=True)(x, y), value, **near)
    assert visits[0] and not any(visits[1:])
    batched = torch.autograd.grad(own(x, y), x, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.stack((g, 2 * g)), **near)


def test_rows_that_do_not_fit_are_refused_by_the_loss(visits):
    x, y = views(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^y: expected at least"):
        losses.MatryoshkaLoss(loss_of(False).float(), DIMS)(x, y[:-1])
    with pytest.raises(TypeError, match=r"^y: expected the dtype of x"):
        losses.MatryoshkaLoss(loss_of(True).float(), DIMS)(x, y.double())
    assert not any(visits)


def test_second_derivatives_are_refused(visits):
    x, y = views(dtype=torch.float32)
    value = losses.MatryoshkaLoss(losses.InfoNCELoss(), DIMS)(x, y)
    with pytest.raises(RuntimeError, match="pass backend='reference'"):
        torch.autograd.grad(value, x, create_graph=True)
    own = losses.MatryoshkaLoss(losses.InfoNCELoss(backend="reference"), DIMS)
    (g,) = torch.autograd.grad(own(x, y), x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x)[0].isfinite().all() and visits == [True]


def test_no_matrix_of_all_pairs(visits):
    n = 1500
    x, y = (torch.randn(n, DIMS[-1]).requires_grad_() for _ in range(2))
    own = losses.MatryoshkaLoss(losses.CLIPLoss(), DIMS)
    own(x, y)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        own(x, y).backward()
    assert visits == [True] * 2
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest < 4 * n * n / 2


def test_a_copy_learns_the_same(visits):
    x, y = views(dtype=torch.float32)
    own = losses.MatryoshkaLoss(losses.CLIPLoss(), DIMS)
    twin = copy.deepcopy(own)
    own(x, y).backward()
    twin(x, y).backward()
    assert torch.equal(own.losses[0].logit_scale.log.grad, twin.losses[0].logit_scale.log.grad) and visits == [True] * 2
