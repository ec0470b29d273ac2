"""MoCoQueue: the latest keys, in a circle, for any sizes of batches; what it saves, and what it refuses."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastcl
from fastcl.losses import MoCoLoss, MoCoQueue

from .cases import generator
from .witnesses import close

LENGTH, D = 7, 4


def keys(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, generator=generator(seed), dtype=torch.float64)


def queue(**arguments: object) -> MoCoQueue:
    torch.manual_seed(0)
    return MoCoQueue(D, LENGTH, dtype=torch.float64, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 3, 3, 3), (5, 0, 5), (7, 2), (9,), (2, 16, 3), (20, 1)])
def test_the_latest_keys_stand_at_their_places(sizes: tuple[int, ...], normalize: bool) -> None:
    """Key number k of all stands at place k mod length, until key number k + length replaces it."""
    q = queue(normalize=normalize)
    want = q.rows.clone()
    close(want.norm(dim=1), torch.ones(LENGTH, dtype=torch.float64), rtol=1e-12)
    number = 0
    for step, n in enumerate(sizes):
        batch = keys(n, step) * 3.0
        q.enqueue(batch)
        for key in F.normalize(batch) if normalize else batch:
            want[number % LENGTH] = key
            number += 1
        close(q.rows, want, rtol=1e-15)
        assert int(q.position) == number % LENGTH


def test_the_loss_takes_the_queue_as_it_was() -> None:
    """Keys are enqueued after the loss and before its backward, as in the authors' code: the gradient is that of before."""
    q = queue()
    x, k = keys(5, 1).requires_grad_(), keys(5, 2).requires_grad_()
    before = q.rows.clone()
    for normalize, reduction in product((True, False), ("mean", "none")):
        value = MoCoLoss(normalize=normalize, reduction=reduction)(x, k, q.rows).sum()
        q.enqueue(k)
        (got,) = torch.autograd.grad(value, x)
        again = fastcl.functional.moco(x, k, before, normalize=normalize, reduction=reduction).sum()
        (want,) = torch.autograd.grad(again, x)
        close(got, want, rtol=1e-12)
        before = q.rows.clone()
    assert not q.rows.requires_grad


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
def test_a_graph_takes_the_queue_as_it_was() -> None:
    """The compiler makes a clone again in the backward, of what has been written over since."""
    torch._dynamo.reset()
    loss, q, x = MoCoLoss(normalize=False, reduction="none"), queue(), keys(5, 1).requires_grad_()

    def step(q: MoCoQueue) -> Tensor:
        value = loss(x, keys(5, 2), q.rows).sum()
        q.enqueue(x.detach())
        return value

    twin = copy.deepcopy(q)
    (got,) = torch.autograd.grad(torch.compile(step)(twin), x)
    (want,) = torch.autograd.grad(step(q), x)
    close(got, want, rtol=1e-12)
    close(twin.rows, q.rows, rtol=1e-12)


@pytest.mark.parametrize("sharded", [False, True])
def test_it_saves_copies_and_moves(sharded: bool) -> None:
    """Also where its rows are no buffers, which DistributedDataParallel would overwrite."""
    q = queue(sharded=sharded)
    assert len(list(q.buffers())) == (0 if sharded else 2)
    q.enqueue(keys(5, 1))
    assert set(q.state_dict()) == {"rows", "position"}
    stream = io.BytesIO()
    torch.save(q.state_dict(), stream)
    stream.seek(0)
    other = MoCoQueue(D, LENGTH, dtype=torch.float64, sharded=sharded)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for twin in (other, copy.deepcopy(q)):
        q_twin = copy.deepcopy(q)
        for each in (twin, q_twin):
            each.enqueue(keys(4, 2))
        assert torch.equal(twin.rows, q_twin.rows)
        assert int(twin.position) == 2
    half = copy.deepcopy(q).bfloat16()
    half.enqueue(keys(2, 3).float())
    assert half.rows.dtype == torch.bfloat16
    assert half.position.dtype == torch.int64


def test_what_does_not_fit_is_an_error() -> None:
    q = queue()
    with pytest.raises(ValueError, match=r"^k: expected rows of the queue's width, d = 4, got d = 3$"):
        q.enqueue(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^k: expected the device of the queue, cpu, got meta; move one of them$"):
        q.enqueue(torch.ones(2, D, device="meta"))
    with pytest.raises(TypeError, match=r"^k: expected float64, float32, bfloat16 or float16, got int64"):
        q.enqueue(torch.ones(2, D, dtype=torch.int64))
    for d, length, name in ((0, 4, "d"), (4, 0, "length")):
        with pytest.raises(ValueError, match=f"^{name}: expected a number > 0, got 0$"):
            MoCoQueue(d, length)
