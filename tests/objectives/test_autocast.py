"""No matrix product of the library runs in a lower dtype because autocast is on: looked at one by one, as they are dispatched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl import functional, metrics, ops
from fastcl.dropin import lightly, open_clip
from fastcl.dropin.pytorch_metric_learning import NTXentLoss
from fastcl.dropin.sentence_transformers import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from fastcl.precision import product, stacked

from .cases import CASES, Case
from .witnesses import close, gradients, library, name_of

N, D = 24, 6
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "matmul", "linalg_vecdot"}
INSIDE = {
    "pair_reduce": ops._pair_reduce,
    "pair_reduce_backward": ops._pair_reduce_backward,
    "pair_total": ops._pair_total,
}


class Watch(TorchDispatchMode):
    """Keeps the name and dtypes of each product, within the op too."""

    def __init__(self) -> None:
        super().__init__()
        self.low: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.rpartition("::")[2]
        dtypes = {a.dtype for a in args if isinstance(a, Tensor)}
        if name in PRODUCTS and dtypes & {torch.bfloat16, torch.float16}:
            self.low.append(f"{op} {dtypes}")
        inside = INSIDE.get(name) if op.namespace == "fastcl" else None
        if inside is None:
            return op(*args, **(kwargs or {}))
        with self:
            return inside(*args)


@contextmanager
def watched(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype), Watch() as watch:
        yield
    assert not watch.low


LOWER = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.parametrize("backend", ["blocked", "reference", None])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_objectives(case: Case, backend: str | None) -> None:
    """Forward and backward, both inside autocast."""
    for reduction in ("mean", "none") if case.rows else ("mean",):
        rows = case.rows_of(N, D, torch.float32)
        arguments = case.arguments(0, N, D, rows[0]) | ({"reduction": reduction} if case.rows else {})
        with watched(torch.bfloat16):
            gradients(library(case, rows, backend, **arguments).sum(), rows)


@LOWER
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_batched_gradients_of_either_half_under_either(case: Case, dtype: torch.dtype) -> None:
    """PyTorch stacks what a batched backward's entries give, which autocast refuses of the half that it does not cast to."""
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for backend in ("blocked", "reference", None):
        leaves = case.rows_of(N, D, other)
        value = library(case, leaves, backend, **case.arguments(0, N, D, leaves[0])).sum()
        wanted = [x for k, x in enumerate(leaves) if k not in case.detached]
        ways = {"retain_graph": True, "grad_outputs": value.new_tensor([1.0, 2.0]), "is_grads_batched": True}
        want = torch.autograd.grad(value, wanted, **ways)
        with torch.autocast("cpu", dtype):
            got = torch.autograd.grad(value, wanted, **ways)
            by_vmap = torch.func.vmap(lambda g: torch.autograd.grad(value, wanted, g, retain_graph=True))(  # noqa: B023
                value.new_tensor([1.0, 2.0])
            )
        for g, v, w in zip(got, by_vmap, want, strict=True):
            assert torch.equal(g, w) and torch.equal(v, w)


@LOWER
def test_metrics_are_those_without_autocast(dtype: torch.dtype) -> None:
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    y += x
    calls: dict[str, Callable[[], Any]] = {
        "retrieval": lambda: metrics.retrieval_accuracy(x, y, k=(1, 3)),
        "wasserstein": lambda: metrics.wasserstein_uniformity(x),
        "effective rank": lambda: metrics.effective_rank(x),
        "rank": lambda: metrics.rank(x),
        "alignment": lambda: metrics.alignment(x, y),
    }
    for call in calls.values():
        plain = call()
        with watched(dtype):
            again = call()
        assert again == (pytest.approx(plain, rel=1e-12) if isinstance(plain, float) else plain)


def dropins() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    labels = torch.arange(N) // 2
    ranking = MultipleNegativesRankingLoss(torch.nn.Identity(), directions=("query_to_doc", "doc_to_doc"))
    return {
        "open_clip": lambda x, y: open_clip.ClipLoss()(x, y, torch.tensor(5.0)),
        "siglip": lambda x, y: open_clip.SigLipLoss()(x, y, torch.tensor(5.0), torch.tensor(-1.0)),
        "lightly": lambda x, y: lightly.NTXentLoss()(x, y),
        "lightly, weighted": lambda x, y: lightly.DCLWLoss()(x, y),
        "lightly, bank": lambda x, y: lightly.NTXentLoss(memory_bank_size=(32, D))(x, y),
        "lightly, aligned": lambda x, y: lightly.MACLLoss()(x, y),
        "metric learning": lambda x, y: NTXentLoss()(stacked(x, y), labels.repeat(2)),
        "mined": lambda x, y: NTXentLoss()(x, labels, (labels, labels + 1, labels, labels.flip(0)), y),
        "ranking": lambda x, y: ranking.compute_loss_from_embeddings([x, y, y]),
        "ranking, cut": lambda x, y: CachedMultipleNegativesRankingLoss(torch.nn.Identity()).calculate_loss(
            [[x[:5], x[5:]], [y[:5], y[5:]]]
        ),
    }


@LOWER
def test_dropins(dtype: torch.dtype) -> None:
    for call in dropins().values():
        x, y = torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
        with watched(dtype):
            gradients(call(x, y), [x, y])


@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", dropins())
def test_dropins_take_either_half_under_either(name: str, rows: torch.dtype) -> None:
    """Autocast's own cat refuses float16 rows where it casts to bfloat16, and the other way round."""
    call, data = dropins()[name], torch.randn(2, N, D)
    x, y = (half.to(rows).requires_grad_() for half in data)
    torch.manual_seed(0)  # of the bank's rows
    want = gradients(call(x, y), [x, y])
    other = torch.float16 if rows == torch.bfloat16 else torch.bfloat16
    torch.manual_seed(0)
    with torch.autocast("cpu", other):
        got = gradients(call(x, y), [x, y])
    for g, w in zip(got, want, strict=True):
        assert g.dtype == rows
        scale = float(w.abs().max())  # of a gradient: one entry's rounding, of logits about 20 that were cast to 8 bits
        assert float((g - w).abs().max()) < 0.1 * scale


def test_a_queue_takes_either_half_under_either() -> None:
    for rows, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        queue = fastcl.losses.MoCoQueue(D, length=8, dtype=rows)
        keys = torch.eye(D)
        with torch.autocast("cpu", other):
            queue.enqueue(keys)
        assert torch.equal(queue.rows[:D], keys.to(rows))


SQUARES = {
    "square": lambda x, y, **k: fastcl.pair_reduce(x, y, pair="square", reduce="sum", **k).mean(),
    "identity": lambda x, y, **k: fastcl.pair_reduce(x, y, pair="identity", reduce="sum", **k).mean(),
    "spectral": functional.spectral,
    "spectral, rows": lambda x, y, **k: functional.spectral(x, y, reduction="none", **k).mean(),
    "clip": lambda x, y, **k: functional.clip(x, y, logit_scale=10.0, **k),
}


@pytest.mark.parametrize("backend", ["blocked", "reference", None])
@pytest.mark.parametrize("name", SQUARES)
def test_a_backward_inside_autocast_is_the_one_outside(name: str, backend: str | None) -> None:
    """To the bit, whether the forward was inside or not; autocast nested and switched off again included."""
    x, y = torch.randn(96, 16, requires_grad=True), torch.randn(96, 16)
    for cast in (False, True):
        found = []
        for inside in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = SQUARES[name](x, y, backend=backend)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                found += torch.autograd.grad(loss, x)
        assert torch.equal(*found)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        (nested,) = torch.autograd.grad(SQUARES[name](x, y, backend=backend), x)
    (plain,) = torch.autograd.grad(SQUARES[name](x, y, backend=backend), x)
    assert torch.equal(nested, plain)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", SQUARES)
def test_batched_and_second_gradients_inside_autocast_are_those_outside(name: str, backend: str | None) -> None:
    """They work a loss out again in backward, which is no forward of autocast's."""
    x, y = torch.randn(24, 8, requires_grad=True), torch.randn(24, 8)
    batched, twice = [], []
    for inside in (False, True):
        loss = SQUARES[name](x, y, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            batched += torch.autograd.grad(loss, x, loss.new_ones(2), is_grads_batched=True, retain_graph=True)
            if backend == "reference" and name != "identity":
                (g,) = torch.autograd.grad(loss, x, create_graph=True)
        if backend == "reference" and name != "identity":
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                twice += torch.autograd.grad(g, x, torch.ones_like(g))
    close(batched[1], batched[0], rtol=1e-5)
    if twice:
        close(twice[1], twice[0], rtol=1e-5)


def test_the_library_s_product_ignores_autocast() -> None:
    a, b = torch.randn(5, 4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    want = [a @ b, *torch.autograd.grad((a @ b).square().sum(), (a, b))]
    with watched(torch.bfloat16):
        value = product(a, b)
        got = [value, *torch.autograd.grad(value.square().sum(), (a, b))]
    for g, w in zip(got, want, strict=True):
        close(g, w, rtol=1e-6)


LISTED = (torch.tensor([0, 0, 1, 3, 5]), torch.tensor([0, 4, 1, 3, 0]))
OF_LABELS = torch.arange(N) // 3
COMPARED: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, **k: functional.info_nce(x, y, temperature=0.05, positives=LISTED, **k),
    "clip": lambda x, y, **k: functional.clip(x, y, logit_scale=20.0, positives=LISTED, **k),
    "nt_xent": lambda x, y, **k: functional.nt_xent(
        x, y, temperature=0.05, positives=(LISTED[0], LISTED[1] + 6, torch.ones(5)), **k
    ),
    "siglip": lambda x, y, **k: functional.siglip(x, y, logit_scale=20.0, logit_bias=-5.0, positives=LISTED, **k),
    "sup_con": lambda x, y, **k: functional.sup_con(x, OF_LABELS, temperature=0.05, **k),
    "sincere": lambda x, y, **k: functional.sincere(x, OF_LABELS, temperature=0.05, **k),
}


@LOWER
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared_with_a_sweep_is_of_its_rows(name: str, normalize: bool, dtype: torch.dtype) -> None:
    """Autocast rounds a sweep's rows; a positive that is in it, or an own term that is taken out again, is of these.

    On a CPU many positives and their sweep, whose gradients cancel, are not rounded: of these, too, both are the same.
    """
    x, y = torch.randn(N, D), torch.randn(N, D)
    if not normalize:
        x, y = x.to(dtype).float() + 2.0**-13 * x, y.to(dtype).float() + 2.0**-13 * y
    swept = [torch.nn.functional.normalize(rows) if normalize else rows for rows in (x, y)]
    if name == "sincere":
        swept = [rows.to(dtype).float() for rows in swept]
    want = COMPARED[name](*swept, normalize=False)
    with torch.autocast("cpu", dtype):
        got = COMPARED[name](x, y, normalize=normalize)
    close(got, want, rtol=2e-5)
