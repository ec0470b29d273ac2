"""SogCLR and FastCLIP over several batches beside the authors' code in plain numbers, and the modules that keep the normalisers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastcl.functional as F
from fastcl.losses import FastCLIPLoss, SogCLRLoss

from .cases import two_views
from .witnesses import close, gradients, served

DOUBLE = torch.float64
SIZE, N, D = 11, 6, 5
INDEX = [torch.tensor(i) for i in ([3, 0, 7, 9, 1, 10], [7, 2, 3, 10, 5, 4], [3, 7, 10, 0, 2, 8])]


def leaves(step: int) -> list[Tensor]:
    return [nn.functional.normalize(x, dim=1).requires_grad_() for x in two_views(N, D, seed=step)]


class AuthorsSogCLR:
    """The loss of builder.py, one process, with a new sample told apart by its own u (there: by the batch's sum)."""

    def __init__(self, gamma: float, tau: float) -> None:
        self.gamma, self.tau, self.u = gamma, tau, torch.zeros(SIZE, 1, dtype=DOUBLE)

    def __call__(self, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
        n = len(a)
        labels, masks, large = torch.eye(n, 2 * n), torch.eye(n), 1e9
        ab_aa = torch.cat([a @ b.T, a @ a.T - masks * large], 1)
        ba_bb = torch.cat([b @ a.T, b @ b.T - masks * large], 1)
        losses, new, old = [], [], self.u[index]
        gamma = torch.where(old == 0, torch.ones_like(old), self.gamma)
        for logits in (ab_aa, ba_bb):
            negatives = torch.exp(logits / self.tau) * (1 - labels)
            u = (1 - gamma) * old + gamma * negatives.sum(1, keepdim=True).detach() / (2 * (n - 1))
            weighted = ((negatives / u).detach() * logits).sum(1, keepdim=True) / (2 * (n - 1))
            losses.append(-(labels * (logits - weighted)).sum(1))
            new.append(u)
        self.u[index] = (new[0] + new[1]) / 2
        return (losses[0] + losses[1]).mean()


class AuthorsFastCLIP:
    """FastCLIPLoss of loss.py (multiply_tau), one process: `local`, then `forward`, where both halves of the loss are the same."""

    def __init__(self, gamma: float, rho: float, eps: float) -> None:
        self.gamma, self.rho, self.eps, self.u = gamma, rho, eps, torch.zeros(SIZE, 2, dtype=DOUBLE)

    def __call__(self, x: Tensor, y: Tensor, index: Tensor, tau: Tensor) -> Tensor:
        n, s = len(x), x @ y.T
        own = s.diag().unsqueeze(1)
        loss = self.rho * tau
        for side, similarity in enumerate((s, s.T)):
            g = (torch.exp((similarity - own) / tau) * (1 - torch.eye(n))).sum(1) / (n - 1)
            old = self.u[index, side]
            u = torch.where(old < 1e-35, g, (1 - self.gamma) * old + self.gamma * g).detach()
            self.u[index, side] = u
            loss = loss + (g / (u + self.eps)).mean() * tau.detach() / 2 + torch.log(u + self.eps).mean() / 2 * tau
        return loss


@pytest.mark.parametrize("backend", served(DOUBLE))
def test_sogclr_is_the_authors_over_batches(backend: str) -> None:
    ours, theirs = (
        SogCLRLoss(SIZE, gamma=0.6, temperature=0.3, normalize=False, backend=backend).double(),
        AuthorsSogCLR(0.6, 0.3),
    )
    for step, index in enumerate(INDEX):
        rows = leaves(step)
        wanted = gradients(theirs(*rows, index), rows)
        for got, want in zip(gradients(ours(*rows, index), rows), wanted, strict=True):
            close(2 * got, want)  # their mean is over n samples
        close(ours.log_u.exp(), theirs.u)


@pytest.mark.parametrize("backend", served(DOUBLE))
def test_fast_clip_is_the_authors_over_batches(backend: str) -> None:
    """Rows, and a temperature that is learned; their printed value has g / (u + eps) more."""
    tau = nn.Parameter(torch.tensor(0.2, dtype=DOUBLE))
    ours = FastCLIPLoss(SIZE, gamma=0.4, temperature=tau, rho=3.0, eps=1e-3, normalize=False, backend=backend).double()
    theirs = AuthorsFastCLIP(0.4, 3.0, 1e-3)
    for step, index in enumerate(INDEX):
        rows = [*leaves(step), tau]
        wanted = gradients(theirs(*rows[:2], index, tau), rows)
        for got, want in zip(gradients(ours(*rows[:2], index), rows), wanted, strict=True):
            close(got, want)
        close(ours.log_u.exp(), theirs.u)


@pytest.mark.parametrize(("function", "columns"), [(F.sogclr, 1), (F.fast_clip, 2)])
def test_at_gamma_1_the_gradient_is_that_of_the_value(function: Any, columns: int) -> None:
    rows = [x.requires_grad_() for x in two_views(4, 3)]
    log_u = torch.randn(4, columns, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda *r: function(*r, log_u, gamma=1.0, temperature=0.5), rows)


@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_the_state_is_the_functions(cls: Any) -> None:
    """What the module keeps is what the function returns; it saves, copies, moves, and stays in evaluation."""
    module = cls(SIZE)
    rows, index = [x.detach().float() for x in leaves(0)], INDEX[0]
    module(*rows, index)
    _, log_u = cls.function(*rows, return_log_u=True)
    assert torch.equal(module.log_u[index], log_u) and not log_u.requires_grad
    assert int(module.log_u.isfinite().all(1).sum()) == N
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    fresh = cls(SIZE)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    of_half = cls(SIZE).half()  # its tensors become the saved ones, in their dtype
    of_half.load_state_dict({k: v.half() for k, v in module.state_dict().items()}, assign=True)
    assert of_half.log_u.dtype == torch.float32
    for twin in (fresh, copy.deepcopy(module), copy.deepcopy(module).half()):
        assert twin.log_u.dtype == torch.float32 and torch.equal(twin.log_u, module.log_u)
        assert torch.equal(twin.eval()(*rows, index), module.eval()(*rows, index)) and torch.equal(
            twin.log_u, module.log_u
        )
    assert module.train().double().log_u.dtype == DOUBLE and module.to("meta").log_u.is_meta


@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_a_sample_that_is_there_twice_keeps_its_larger_normaliser(cls: Any) -> None:
    module, rows = cls(SIZE).double(), leaves(0)
    module(*rows, torch.tensor([3, 0, 3, 9, 1, 3]))
    log_u = cls.function(*rows, return_log_u=True)[1]
    assert torch.equal(module.log_u[3], log_u[[0, 2, 5]].amax(0))


@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_normalisers_out_of_range_as_numbers(cls: Any) -> None:
    """At tau = 1e-3 u is e^1000: in float32 the gradients are right all the same."""
    small, wide = cls(SIZE, temperature=1e-3), cls(SIZE, temperature=1e-3).double()
    for step, index in enumerate(INDEX):
        rows = [
            two_views(N, D, seed=s)[0].float().requires_grad_() for s in (step, 10 + step)
        ]  # no positive is the nearest
        truth = [x.detach().double().requires_grad_() for x in rows]
        found, wanted = (gradients(module(*r, index), r) for module, r in ((small, rows), (wide, truth)))
        for got, want in zip(found, wanted, strict=True):
            assert got.isfinite().all() and (got - want).abs().max() < 1e-2 * want.abs().max()


def test_small_batches_come_near_the_gradient_of_all() -> None:
    """Averaged over the batches of an epoch, the gradient is nearer that of one batch of all samples than each batch's own is."""
    rows = [x.detach() for x in two_views(32, 8, seed=3)]
    whole = [x.clone().requires_grad_() for x in rows]
    truth = torch.cat(gradients(F.fast_clip(*whole, temperature=0.3), whole))

    def error(gamma: float) -> Tensor:
        module, orders = FastCLIPLoss(32, gamma=gamma, temperature=0.3).double(), torch.Generator().manual_seed(0)
        total = torch.zeros_like(truth)
        for epoch in range(150):
            for index in torch.randperm(32, generator=orders).split(4):
                own = [x[index].requires_grad_() for x in rows]
                found = gradients(module(*own, index), own)
                if epoch >= 30:
                    total += torch.cat([torch.zeros_like(rows[0]).index_add(0, index, g) for g in found])
        return (total / (120 * 8) - truth).norm() / truth.norm()

    assert error(0.1) < 0.7 * error(1.0)


@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_errors(cls: Any) -> None:
    module, rows = cls(SIZE), [x.detach().float() for x in leaves(0)]
    for index, kind, said in (
        (torch.arange(5), ValueError, r"index: expected shape \(6,\)"),
        (torch.arange(6).int(), TypeError, "index: expected an int64 tensor, got int32"),
        (torch.arange(6) + 6, ValueError, "index: expected samples of the data set, 0 to 10, got 1 outside"),
        (torch.arange(6) - 2, ValueError, "got 2 outside"),
        ([0] * 6, TypeError, "index: expected an int64 tensor, got list"),
    ):
        with pytest.raises(kind, match=said):
            module(*rows, index)
    assert not module.log_u.isfinite().any(), "a call that failed moved the state"
    with pytest.raises(TypeError, match="index"):
        module(*rows)
    with pytest.raises(ValueError, match=r"log_u: expected shape \(6, "):
        cls.function(*rows, torch.zeros(6, 3))
    with pytest.raises(ValueError, match="gamma: expected the share"):
        cls.function(*rows, gamma=1.5)
    with pytest.raises(ValueError, match="expected at least 2"):
        cls.function(rows[0][:1], rows[1][:1])


@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_a_batch_beyond_the_numbers_is_not_kept(cls: Any) -> None:
    x, y = two_views(4, 3)
    index, loss = torch.arange(4), cls(6)
    loss(x, y, index)
    kept = loss.log_u.clone()
    bad = x.clone()
    bad[0] = torch.inf
    loss(bad, y, index)
    assert torch.equal(loss.log_u, kept)
    assert loss(x, y, index).isfinite()


@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_the_state_is_where_the_rows_are(cls: Any) -> None:
    x, y = two_views(4, 3)
    with pytest.raises(ValueError, match=r"log_u: expected the device of [ux], cpu, got meta; move it"):
        cls(6).to("meta").eval()(x, y, torch.arange(4))


@pytest.mark.parametrize("multi", [get_ema_multi_avg_fn(0.9), None], ids=["ema", "swa"])
@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_an_average_of_weights_and_buffers(cls: Any, multi: Any) -> None:
    """An average of -inf is NaN, which is a sample that was never there."""
    module = cls(20)
    average = AveragedModel(module, multi_avg_fn=multi, use_buffers=True)
    u, v = two_views(5, 4)
    for step in range(8):
        module(u, v, (torch.arange(5) + 3 * step) % 20)
        average.update_parameters(module)
    index = average.module.log_u[:, 0].isnan().nonzero()[:5, 0]
    assert len(index) == 5
    known = torch.where(average.module.log_u.isnan(), -torch.inf, average.module.log_u)[index]
    found, truth = average.eval()(u, v, index), cls.function(u, v, known)
    assert truth.isfinite()
    close(found, truth)
    average.train()(u, v, index)
    assert average.module.log_u[index].isfinite().all()


@pytest.mark.parametrize("cls", [SogCLRLoss, FastCLIPLoss])
def test_the_state_is_float32_in_a_model_that_is_made_in_half_precision(cls: Any) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        made = cls(10)
    finally:
        torch.set_default_dtype(before)
    assert made.log_u.dtype == torch.float32
