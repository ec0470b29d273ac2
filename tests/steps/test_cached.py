"""cached_step and cached_embeddings against the step that keeps every graph, in one process."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import functional, losses

from .towers import WIDTH, gradients, rows, same, step_with_every_graph, tower

LOSSES: dict[str, Any] = {
    "clip": losses.CLIPLoss,
    "siglip": losses.SigLIPLoss,
    "nt_xent": losses.NTXentLoss,
    "f_micl": losses.FMICLLoss,
    "kcl": losses.KCLLoss,
    "spectral": losses.SpectralLoss,
}

X, LOSS = rows(6, 0), losses.NTXentLoss()


def steps(
    encoders: list[nn.Module], batches: list[Tensor], loss: nn.Module, chunk: int, **settings: Any
) -> tuple[Any, Any]:
    """Value, gradients and the random state afterwards: cached, and with every graph."""
    found = []
    for cached in (True, False):
        torch.manual_seed(7)
        if cached:
            value = fastcl.cached_step(encoders, batches, loss, chunk=chunk, **settings)
        else:
            value = step_with_every_graph(encoders, batches, loss, chunk)
        found.append([value, torch.rand(()), *gradients(*dict.fromkeys(encoders), loss)])
    return found[0], found[1]


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("shared", [False, True])
def test_any_loss_two_towers_or_one(name: str, shared: bool) -> None:
    """Dropout repeats; 11 rows are uneven in chunks of 4."""
    images = tower(0)
    found, wanted = steps([images, images if shared else tower(1)], [rows(11, 0), rows(11, 1)], LOSSES[name](), 4)
    same(found, wanted)
    assert float(sum(g.abs().sum() for g in found[2:])) > 0


def test_a_single_encoder_serves_every_batch_and_sizes_may_differ() -> None:
    """More captions than images, chunks of their own."""
    encoder, loss, batches = tower(0, dropout=0.0), losses.CLIPLoss(), [rows(5, 0), rows(9, 1)]
    found = [fastcl.cached_step(encoder, batches, loss, chunk=(2, 100)), *gradients(encoder, loss)]
    value = loss(*map(encoder, batches))
    value.backward()
    same(found, [value.detach(), *gradients(encoder, loss)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_scaler(dtype: torch.dtype) -> None:
    """The autocast of the call holds in both passes, and gradients come scaled."""
    encoders, loss = [tower(0).float(), tower(1).float()], losses.CLIPLoss()
    batches, scaler = [rows(11, 0).float(), rows(11, 1).float()], torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        value = fastcl.cached_step(encoders, batches, loss, chunk=4, scaler=scaler)
    found = [value, *(g / 2**10 for g in gradients(*encoders, loss))]
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        wanted = loss(*(torch.cat([e(part) for part in b.split(4)]) for e, b in zip(encoders, batches, strict=True)))
    scaler.scale(wanted).backward()
    same(found, [wanted.detach(), *(g / 2**10 for g in gradients(*encoders, loss))], torch.finfo(dtype).eps)


def test_backward_of_cached_embeddings() -> None:
    """As any graph: a sum with something else, and twice."""
    encoders, loss, batches = [tower(0), tower(1)], losses.CLIPLoss(), [rows(11, 0), rows(11, 1)]
    torch.manual_seed(7)
    value = loss(*fastcl.cached_embeddings(encoders, batches, chunk=4)) * 3.0
    value.backward(retain_graph=True)
    once = gradients(*encoders, loss)
    value.backward()
    same(gradients(*encoders, loss), once)
    torch.manual_seed(7)
    wanted = 3.0 * step_with_every_graph(encoders, batches, loss, 4)
    same([value.detach(), *once], [wanted, *(3.0 * g for g in gradients(*encoders, loss))])
    with torch.no_grad():
        assert not fastcl.cached_embeddings(encoders, batches, chunk=4)[0].requires_grad


class Both(nn.Module):
    """A model of both towers with its scale, as open_clip's and transformers' are."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.towers, self.named = nn.ModuleList([tower(0), tower(1)]), named
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, pixels: Tensor, tokens: Tensor, flag: bool = True) -> Any:
        assert flag
        found = (self.towers[0](pixels), self.towers[1](tokens), self.scale.exp())
        return dict(zip(("x", "y", "logit_scale"), found, strict=True)) if self.named else found


@pytest.mark.parametrize("named", [False, True])
def test_a_model_of_both_towers_with_its_scale(named: bool) -> None:
    """A batch of several tensors, by position or by name, and outputs likewise; the scale is one for all chunks."""
    model, x, y = Both(named), rows(11, 0), rows(11, 1)
    loss = functional.clip if named else lambda a, b, s: functional.clip(a, b, logit_scale=s)
    torch.manual_seed(7)
    batch = {"pixels": x, "tokens": y, "flag": True} if named else (x, y)
    found = [fastcl.cached_step([model], [batch], loss, chunk=4), *gradients(model)]
    torch.manual_seed(7)
    parts = [(model.towers[0](a), model.towers[1](b)) for a, b in zip(x.split(4), y.split(4), strict=True)]
    value = functional.clip(*map(torch.cat, zip(*parts, strict=True)), logit_scale=model.scale.exp())
    value.backward()
    same(found, [value.detach(), *gradients(model)])


def test_lists_are_cut_too() -> None:
    encoder = tower(0, dropout=0.0)
    texts = [str(float(n)) for n in range(7)]
    read = lambda chunk: encoder(torch.tensor([[float(text)] * 5 for text in chunk], dtype=torch.float64))  # noqa: E731
    found = [
        fastcl.cached_step([read, encoder], [texts, rows(7, 1)], losses.NTXentLoss(), chunk=3),
        *gradients(encoder),
    ]
    value = losses.NTXentLoss()(read(texts), encoder(rows(7, 1)))
    value.backward()
    same(found, [value.detach(), *gradients(encoder)])


def test_activations_are_those_of_one_chunk() -> None:
    """Of the graphs of seven chunks, none is alive when the next begins."""
    alive: list[weakref.ref[Tensor]] = []
    encoder = tower(0)

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            gc.collect()
            assert sum(ref() is not None for ref in alive) == 0
            alive.append(weakref.ref(output))

    encoder[1].register_forward_hook(watch)
    fastcl.cached_step(encoder, [rows(14, 0), rows(14, 1)], losses.NTXentLoss(), chunk=2)
    assert len(alive) == 14


def test_a_frozen_tower_gets_nothing() -> None:
    images, texts = tower(0), tower(1).requires_grad_(False)
    found, wanted = steps([images, texts], [rows(6, 0), rows(6, 1)], losses.CLIPLoss(), 4)
    same(found, wanted)
    assert all(p.grad is None for p in texts.parameters())


def test_an_encoder_that_does_not_repeat_itself_is_told() -> None:
    own = torch.Generator().manual_seed(0)
    encoder = tower(0)
    noisy = lambda x: encoder(x) + torch.rand(WIDTH, generator=own, dtype=torch.float64)  # noqa: E731
    with pytest.raises(RuntimeError, match="expected the same rows in both passes"):
        fastcl.cached_step([noisy, encoder], [rows(6, 0), rows(6, 1)], losses.NTXentLoss(), chunk=4)


@pytest.mark.parametrize("repeats", [True, False])
def test_masks_and_indices_among_the_outputs(repeats: bool) -> None:
    """An encoder hands them on to the loss; they are the same in both passes, or it does not repeat itself."""
    encoder, calls = tower(0, dropout=0.0), iter(range(100))

    def outputs(x: Tensor) -> Any:
        known = x[:, 0] > (-torch.inf if repeats else 1.0 if next(calls) else -1.0)
        return {"z": encoder(x), "known": known, "index": torch.full((len(x),), 1000) + known}

    loss = lambda z, known, index: losses.SupConLoss()(z[known], (index - index)[known])  # noqa: E731
    if not repeats:
        with pytest.raises(RuntimeError, match="expected the same rows in both passes"):
            fastcl.cached_step([outputs], [rows(6, 0)], loss, chunk=4)
        return
    found = [fastcl.cached_step([outputs], [rows(6, 0)], loss, chunk=np.int64(4)), *gradients(encoder)]
    value = loss(**outputs(rows(6, 0)))
    value.backward()
    same(found, [value.detach(), *gradients(encoder)])


WRITES: dict[str, Any] = {
    "times": lambda a: a.mul_(2.0),
    "some rows": lambda a: a[3:9].add_(0.5),
    "without a graph": lambda a: a.detach().mul_(2.0),
}


@pytest.mark.parametrize("way", list(WRITES))
@pytest.mark.parametrize("lazily", [True, False])
def test_embeddings_may_be_written_into(way: str, lazily: bool) -> None:
    """As into those of any encoder."""
    encoder, batches, found = tower(0), [rows(11, 0), rows(11, 1)], []

    def written(a: Tensor, b: Tensor) -> Tensor:
        WRITES[way](a)
        return LOSS(a, b)

    for cached in (True, False):
        torch.manual_seed(7)
        if not cached:
            value = step_with_every_graph([encoder, encoder], batches, written, 4)
        elif lazily:
            value = written(*fastcl.cached_embeddings(encoder, batches, chunk=4))
            value.backward()
        else:
            value = fastcl.cached_step(encoder, batches, written, chunk=4)
        found.append([value.detach(), *gradients(encoder)])
    same(*found)


def test_a_loss_may_call_backward_itself() -> None:
    """What it leaves in the embeddings is added to."""
    encoder, batches, found = tower(0, dropout=0.0), [rows(11, 0), rows(11, 1)], []

    def twice(a: Tensor, b: Tensor) -> Tensor:
        LOSS(a, b).backward(retain_graph=True)
        return LOSS(2.0 * a, a + b)

    for cached in (True, False):
        if cached:
            value = fastcl.cached_step(encoder, batches, twice, chunk=4)
        else:
            value = twice(*map(encoder, batches))
            value.backward()
        found.append([value.detach(), *gradients(encoder)])
    same(*found)


def test_an_encoder_that_does_not_repeat_itself_is_told_of_written_embeddings_too() -> None:
    own, encoder = torch.Generator().manual_seed(0), tower(0)
    noisy = lambda x: encoder(x) + torch.rand(WIDTH, generator=own, dtype=torch.float64)  # noqa: E731
    with pytest.raises(RuntimeError, match="expected the same rows in both passes"):
        fastcl.cached_step(noisy, [rows(40, 0), rows(40, 1)], lambda a, b: LOSS(a.mul_(2.0), b.mul_(2.0)), chunk=30)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.distributed.optim's own import
def test_an_optimizer_in_the_backward_is_told() -> None:
    """torch.distributed.optim's, whose hook is on a node of the graph."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    encoder, before = tower(0), tower(0).state_dict()
    _apply_optimizer_in_backward(torch.optim.SGD, encoder.parameters(), {"lr": 1e-4})
    with pytest.raises(ValueError, match=r"encoders: .* an optimizer in the backward, .* 4 chunks"):
        fastcl.cached_step(encoder, [X, X], LOSS, chunk=3)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())


def test_hooks_that_run_for_each_chunk_are_told() -> None:
    """Before anything is computed, and where there are several; not those of loss, and of frozen parameters."""
    encoder, loss, calls = tower(0), losses.CLIPLoss(), []
    encoder[2].register_forward_hook(lambda *_: calls.append("forward"))
    handle = encoder[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("step"))
    loss.logit_scale.log.register_post_accumulate_grad_hook(lambda p: calls.append("loss"))
    for step in (fastcl.cached_step, lambda *a, **k: fastcl.cached_embeddings(*a[:2], **k)):
        with pytest.raises(
            ValueError, match=r"encoders: .*register_post_accumulate_grad_hook.* 4 chunks, got one on 0.weight; "
        ):
            step(encoder, [X, X], loss, chunk=3)
    with torch.no_grad():
        fastcl.cached_embeddings(encoder, [X], chunk=3)
    assert calls == ["forward"] * 2
    fastcl.cached_step(encoder, [X], lambda x: loss(x, x), chunk=6)
    assert calls[2:] == ["forward", "loss", "forward", "step"]
    encoder[0].weight.requires_grad_(False)
    fastcl.cached_step(encoder, [X, X], loss, chunk=3)
    handle.remove()


@pytest.mark.parametrize("used", [True, False])
def test_parameters_that_change_before_backward_are_told(used: bool) -> None:
    """As those that a graph saved: a RuntimeError, where they get gradients."""
    model = nn.ModuleList([tower(0), tower(1)])
    (x,) = fastcl.cached_embeddings(lambda x: model[0](x), [X], chunk=4)
    with torch.no_grad():
        model[not used][4].weight.mul_(1.001)
    if not used:
        x.sum().backward()
        return
    with pytest.raises(RuntimeError, match=r"parameter of shape .6, 16. .* changed in place .* step after"):
        x.sum().backward()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda e: fastcl.cached_step([e], [X, X], LOSS, chunk=2), ValueError, "batches: expected one for each encoder, 1, got 2"),
        (lambda e: fastcl.cached_step([], [], LOSS, chunk=2), ValueError, "batches: expected one for each encoder, 0, got 0"),
        (lambda e: fastcl.cached_step(e, [X, X], LOSS, chunk=0), ValueError, "chunk: expected a number of rows >= 1, got 0"),
        (lambda e: fastcl.cached_step(e, [X, X], LOSS, chunk=True), TypeError, "chunk: expected an integer, got bool"),
        (lambda e: fastcl.cached_step(e, [X, X], LOSS, chunk=(2,)), ValueError, "chunk: expected a number, or one for each enc"),
        (lambda e: fastcl.cached_step(e, [X, X], LOSS, chunk=2.0), TypeError, r"chunk: expected an integer, got float; pass int"),
        (lambda e: fastcl.cached_step(e, [X, X], LOSS, chunk=None), TypeError, "chunk: expected an integer, got NoneType"),
        (lambda e: fastcl.cached_step(e, X, LOSS, chunk=2), TypeError, r"batches: expected a sequence, .* pass \[batches\]"),
        (lambda e: fastcl.cached_step(e, {"x": X}, LOSS, chunk=2), TypeError, r"batches: .* got dict; pass \[batches\]"),
        (lambda e: fastcl.cached_step([e, None], [X, X], LOSS, chunk=2), TypeError, r"encoders\[1\]: .* got NoneType"),
        (lambda e: fastcl.cached_step(None, [X, X], LOSS, chunk=2), TypeError, "encoders: expected a sequence, .* NoneType"),
        (lambda e: fastcl.cached_step(lambda x: {"x": e(x)}, [X, X], LOSS, chunk=2), ValueError, "different names, got 'x'"),
        (lambda e: fastcl.cached_step(e, [(X, X[:2])], LOSS, chunk=2), ValueError, r"batches\[0\]: .* got \[2, 6\] rows"),
        (lambda e: fastcl.cached_step(e, [3.0], LOSS, chunk=2), ValueError, r"batches\[0\]: .* got float without any"),
        (lambda e: fastcl.cached_step(lambda x: None, [X], LOSS, chunk=2), TypeError, r"encoders\[0\]: .* got NoneType"),
        (lambda e: fastcl.cached_step(lambda x: e(x)[:1], [X], LOSS, chunk=2), ValueError, r"expected 2 rows .* shape \(1, 6\)"),
        (lambda e: fastcl.cached_step(e, [X, X], torch.add, chunk=2), ValueError, r"loss: expected a tensor .* shape \(6, 6\)"),
    ],
)  # fmt: skip
def test_errors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(tower(0))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_says_so(without: Any) -> None:
    with without(), pytest.raises(RuntimeError, match="cached_step: expected gradients to be recorded"):
        fastcl.cached_step(tower(0), [X, X], LOSS, chunk=2)
