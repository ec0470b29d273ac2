"""The spectral loss, MINC and its statistic: identities on paper, and the spectrum of a small Markov chain."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor

import fastcl.functional as F
from fastcl.losses import MINCLoss
from tests import oracle

from .cases import two_views
from .witnesses import close, gradients, served

DOUBLE = torch.float64


def pooled_spectral(u: Tensor, v: Tensor) -> Tensor:
    """-2 mean <u_i, v_i> + ||Lambda||^2, Lambda the second moment of both views' rows."""
    z = torch.cat([u, v])
    return -2 * (u * v).sum(1).mean() + (z.T @ z / len(z)).square().sum()


def leaves(n: int = 9, d: int = 4, seed: int = 0) -> list[Tensor]:
    return [x.requires_grad_() for x in two_views(n, d, seed)]


def test_minc_of_the_batch_is_half_the_pooled_spectral_gradient() -> None:
    """Without GHA, EMA and target network MINC descends the spectral loss over both views."""
    rows = leaves()
    z = torch.cat(rows).detach()
    got = gradients(F.minc(*rows, z.T @ z / len(z)), rows)
    want = gradients(pooled_spectral(*rows), rows)
    for a, b in zip(got, want, strict=True):
        close(a, b / 2, rtol=1e-12)


def test_minc_is_its_direction() -> None:
    """dL/dz_i = (T z_i - z'_i) / N with T = tril(Lambda), and targets in the place of the partners."""
    n, d = 9, 4
    (u, v), (tu, tv) = leaves(n, d), two_views(n, d, seed=4)
    statistic = two_views(3 * d, d, seed=5)[0]
    statistic = statistic.T @ statistic
    gu, gv = gradients(F.minc(u, v, statistic, gha=True, target_u=tu, target_v=tv), [u, v])
    close(gu, (u @ statistic.tril().T - tv) / n, rtol=1e-12)
    close(gv, (v @ statistic.tril().T - tu) / n, rtol=1e-12)
    gu, _ = gradients(F.minc(u, v, statistic), [u, v])
    close(gu, (u @ statistic.T - v) / n, rtol=1e-12)


def test_targets_and_statistic_carry_no_gradient() -> None:
    rows, targets = leaves(), leaves(seed=4)
    statistic = torch.eye(4, dtype=DOUBLE, requires_grad=True)
    loss = F.minc(*rows, statistic, target_u=targets[0], target_v=targets[1])
    assert torch.autograd.grad(loss, [*targets, statistic], allow_unused=True) == (None, None, None)


def chain() -> tuple[Tensor, Tensor, Tensor]:
    """A reversible chain of 12 states: every ordered pair (x, x') as often as it occurs, and the spectrum, descending."""
    states = torch.arange(12)
    ring = (states[:, None] - states[None, :]).abs()
    ring = torch.minimum(ring, 12 - ring)
    counts = torch.where(ring == 0, 9, torch.where(ring == 1, 4, torch.where(ring == 2, 1, 0)))
    counts = counts + torch.where((states[:, None] < 4) & (states[None, :] < 4), 3, 0)
    counts = counts + torch.diag(torch.arange(12) % 5)
    joint = counts.double() / counts.sum()
    p = joint.sum(1)
    spectrum = torch.linalg.eigvalsh(joint / torch.sqrt(p[:, None] * p[None, :])).flip(0)
    first, second = counts.nonzero().T
    return first.repeat_interleave(counts[first, second]), second.repeat_interleave(counts[first, second]), spectrum


@pytest.mark.filterwarnings("ignore:MINCLoss. ema")  # plain gradient descent, in steps that its lag allows
@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_gha_finds_the_ordered_spectrum_of_a_markov_chain(ema: float) -> None:
    """The fixed point has Lambda = diag(lambda_1 >= lambda_2 >= ...); without GHA only up to a rotation."""
    d = 4
    first, second, spectrum = chain()
    share = torch.bincount(first, minlength=12).double() / len(first)
    found = {}
    for gha in (True, False):
        table = 0.3 * two_views(12, d, seed=2)[0]
        loss = MINCLoss(d, ema=ema, gha=gha).double()
        for _ in range(1500):
            table.requires_grad_()
            (g,) = torch.autograd.grad(loss(table[first], table[second]), table)
            table = (table - 0.15 * g / share[:, None]).detach()
        found[gha] = loss.statistic
    torch.testing.assert_close(found[True], torch.diag(spectrum[:d]), rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.linalg.eigvalsh(found[False]).flip(0), spectrum[:d], rtol=0, atol=2e-3)
    assert float((found[False] - torch.diag(spectrum[:d])).abs().max()) > 0.05


@pytest.mark.parametrize("mu", [None, 0.5])
def test_the_statistic_is_a_moving_average(mu: float | None) -> None:
    """The first batch sets it, later ones move it in training; evaluation leaves it alone."""
    loss, ema = MINCLoss(4, ema=0.7, gha=True, mu=mu), 0.7
    want = torch.zeros(4, 4, dtype=DOUBLE)
    for seed in range(3):
        u, v = (x.float() for x in two_views(9, 4, seed))
        value = loss(u, v, target_u=u, target_v=v)
        if mu is not None:
            u, v = (x * (mu**0.5 / x.norm(dim=1, keepdim=True)).clamp(max=1.0) for x in (u, v))
        moment = oracle.second_moment(u.double(), v.double())
        want = moment if seed == 0 else ema * want + (1 - ema) * moment
        torch.testing.assert_close(loss.statistic.double(), want, rtol=1e-5, atol=1e-6)
        # What is used is the statistic with this batch in it; what is reported is the value at it.
        torch.testing.assert_close(
            value.double(), oracle.minc(u.double(), v.double(), want, gha=True), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            loss.value.double(), oracle.minc_value(u.double(), v.double(), want), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(loss.lag.double(), (moment - want).norm() / want.norm(), rtol=1e-4, atol=1e-5)
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    loss(*(x.float() for x in two_views(9, 4, seed=9)))
    for key, kept in loss.state_dict().items():
        assert torch.equal(kept, before[key])


def test_an_average_without_a_target_warns_in_training() -> None:
    rows = leaves()
    loss = MINCLoss(4, ema=0.8).double()
    with pytest.warns(UserWarning, match="ema=0.8 in training without a target network"):
        loss(*rows)
    loss(*rows, target_u=rows[0], target_v=rows[1])  # any other warning is an error here
    loss.eval()(*rows)
    MINCLoss(4).double()(*rows)


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated"
)  # by torch.compile
def test_an_average_without_a_target_compiles_whole() -> None:
    """torch.compile takes no warning into a graph."""
    torch._dynamo.reset()
    u, v = torch.randn(6, 4), torch.randn(6, 4)
    loss, twin = MINCLoss(4, ema=0.5), MINCLoss(4, ema=0.5)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="ema"):
        value = loss(u, v)
    assert torch.equal(compiled(u, v), value)
    assert torch.equal(twin.statistic, loss.statistic)


def test_no_lag_of_rows_that_are_zero() -> None:
    loss = MINCLoss(4)
    loss(torch.zeros(3, 4), torch.zeros(3, 4))
    assert float(loss.lag) == 0.0


def test_the_statistic_is_saved_and_stays_in_float32() -> None:
    loss = MINCLoss(4)
    loss(*(x.float() for x in two_views(9, 4)))
    assert loss.statistic.dtype == torch.float32
    twin = MINCLoss(4)
    twin.load_state_dict(loss.state_dict())
    rows = [x.float() for x in two_views(9, 4, seed=1)]
    assert torch.equal(loss(*rows), twin(*rows))
    assert torch.equal(loss.statistic, twin.statistic)
    kept = loss.statistic.clone()
    for half in (loss.half(), loss.bfloat16()):
        assert half.statistic.dtype == torch.float32
        assert torch.equal(half.statistic, kept)
    twin.load_state_dict({k: v.half() for k, v in loss.state_dict().items()}, assign=True)
    assert twin.statistic.dtype == torch.float32
    value = loss(*(x.bfloat16() for x in two_views(9, 4)))
    assert value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss(*rows)
    assert loss.statistic.dtype == torch.float32


def test_targets_are_the_third_and_fourth_rows() -> None:
    """As the module's call says, with no warning of a missing target."""
    rows, targets = two_views(9, 4), two_views(9, 4, seed=1)
    named = MINCLoss(4, ema=0.5)(*rows, target_u=targets[0], target_v=targets[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(MINCLoss(4, ema=0.5)(*rows, *targets), named)


def test_two_batches_may_wait_for_their_backward() -> None:
    """Gradient accumulation: the statistic moves on between a forward and its backward."""
    loss, rows, others = MINCLoss(4), leaves(), leaves(seed=3)
    first = loss(*rows)
    statistic = loss.statistic.clone()
    second = loss(*others)
    (first + second).backward()
    for x, want in zip(rows, gradients(F.minc(*rows, statistic), rows), strict=True):
        close(x.grad, want, rtol=1e-12)


@pytest.mark.parametrize("backend", served(DOUBLE))
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("n", [3, 7, 9, 40])
def test_the_gram_route_is_the_dense_one(n: int, estimator: str, backend: str) -> None:
    """d = 6: below n = 8 the sweep over pairs is cheaper, above it the d x d matrices; the value does not tell."""
    rows = leaves(n, 6)
    value = F.spectral(*rows, mu=2.0**20, estimator=estimator, backend=backend) * 2.0**20
    u, v = rows
    s = u @ v.T
    own = s.diag()
    squares = s.square().sum() - (own.square().sum() if estimator == "unbiased" else 0)
    dense = -2 * own.mean() + squares / (n * (n - 1) if estimator == "unbiased" else n * n)
    close(value, dense, rtol=1e-12)
    for got, want in zip(gradients(value, rows), gradients(dense, rows), strict=True):
        close(got, want, rtol=1e-12)


def test_alpha_two_is_half_the_spectral_loss() -> None:
    """f-MI at alpha = 2 is spectral / 2 + 1 / 2 as long as no s is clamped and no row is clipped."""
    u, v = (x.abs() for x in two_views(9, 4))
    spectral = F.spectral(u, v, mu=2.0**20) * 2.0**20
    close(F.f_mi_alpha(u, v, alpha=2.0), spectral / 2 + 0.5, rtol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_alpha_divergences_are_continuous_at_their_limits(limit: float) -> None:
    u, v = (x.abs() for x in two_views(9, 4))
    at = F.f_mi_alpha(u, v, alpha=limit)
    for near in (limit - 1e-5, limit + 1e-5):
        torch.testing.assert_close(F.f_mi_alpha(u, v, alpha=near), at, rtol=0, atol=1e-3)


def test_rows_are_clipped_not_normalised() -> None:
    """HaoChen et al. 2021: rows within sqrt(mu) are left as they are, longer ones are brought to it."""
    u, v = two_views(9, 4)
    short = torch.full((9,), 0.5, dtype=DOUBLE)
    long = torch.full((9,), 30.0, dtype=DOUBLE)
    unit_u, unit_v = (x / x.norm(dim=1, keepdim=True) for x in (u, v))
    within = F.spectral(unit_u * short[:, None], unit_v * short[:, None], mu=1.0)
    close(within, F.spectral(unit_u * short[:, None], unit_v * short[:, None], mu=2.0**20) * 2.0**20, rtol=1e-12)
    beyond = F.spectral(unit_u * long[:, None], unit_v * long[:, None], mu=4.0)
    close(beyond, F.spectral(unit_u * 2, unit_v * 2, mu=2.0**20) * 2.0**20 / 4.0, rtol=1e-12)


@pytest.mark.parametrize("how", ["plainly", "torch.func"])
@pytest.mark.parametrize("size", [1e-11, 1e-13, 1e-15])
def test_rows_are_clipped_however_short(size: float, how: str) -> None:
    """1e-12, the least length that a row is normalised from, is none of clipping's."""
    views, mu = [size * x for x in two_views(9, 4)], 2.0 * size**2

    def plain(*views: Tensor) -> Tensor:
        u, v = (x * (mu**0.5 / x.norm(dim=1, keepdim=True)).clamp(max=1.0) for x in views)
        s = u @ v.T
        away = s.square().sum() - s.diagonal().square().sum()
        return (away / (9 * 8) - 2.0 * s.diagonal().mean()) / mu

    found = []
    for run in (lambda *views: F.spectral(*views, mu=mu), plain):
        if how == "plainly":
            at = [x.detach().clone().requires_grad_() for x in views]
            value = run(*at)
            found.append([value.detach(), *gradients(value, at)])
        else:
            found.append([run(*views), *torch.func.grad(run, argnums=(0, 1))(*views)])
    for got, want in zip(*found, strict=True):
        close(got, want, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_biased_estimator_keeps_own_pairs_beside_groups(reduction: str) -> None:
    """Equal groups are left out, but i = j stays, and counts in the mean."""
    rows, groups = leaves(), torch.tensor([0, 1, 2, 0, 1, 3, 0, 4, 5])
    arguments = {"estimator": "biased", "groups": groups, "mu": 2.0, "reduction": reduction}
    value, truth = F.spectral(*rows, **arguments), oracle.spectral(*rows, **arguments)
    close(value, truth)
    for got, want in zip(gradients(value.sum(), rows), gradients(truth.sum(), rows), strict=True):
        close(got, want)


def test_a_statistic_of_8_bits_is_refused() -> None:
    """As rows are; it was taken, and its products were those of float32."""
    rows, statistic = torch.ones(3, 2), torch.eye(2)
    with pytest.raises(TypeError, match=r"^statistic: expected float64, .* got float8_e4m3fn; convert it, e.g. statistic.float"):
        F.minc(rows, rows, statistic.to(torch.float8_e4m3fn))
