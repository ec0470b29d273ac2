"""Steps of training under torch.compile over two ranks, and what could get two ranks out of step.

    python -m tests.distributed.compiled_steps RANK WORLD MEETING_FILE RESULT_FILE
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastcl import batch, functional, losses
from fastcl.distributed import in_graph, over_ranks
from fastcl.dropin import open_clip

from . import compiled, compiled_states, ranks
from .behaviour import Towers
from .compiled import CALLS, ROWS, D, here, rows, same, whole
from .compiled_states import Queued
from .costs import counted
from .shards import random


def trained(model: nn.Module, step: Any, rank: int, precision: torch.dtype | None = None) -> list[Tensor]:
    """Losses, gradients and parameters of three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for k in range(3):
        n = ROWS[rank] + 2 * (k == 2)
        x, y = (random(n, 5, seed=100 * k + 10 * rank + s, dtype=torch.float32) for s in (0, 1))
        optimizer.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = step(x, y)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*found, *(p.detach() for p in model.parameters())]


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: losses.CLIPLoss(logit_scale=100.0, group=here("ring")),
    "minc": lambda: losses.MINCLoss(D, mu=1.0, group=here()),
    "queue": lambda: Queued(group=here()),
}


def around(how: str, backend: str, loss: str, rank: int, world: int) -> float:
    """Towers and loss, all in DistributedDataParallel or FSDP2: three steps are those without; no break is in our code."""
    torch.manual_seed(0)
    plain = Towers(LOSSES[loss]())
    found = []
    for as_graph in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model: nn.Module = copy.deepcopy(plain)
        if how.startswith("ddp"):
            model = DistributedDataParallel(model)
        else:
            for encoder in model.encoders:  # type: ignore[union-attr]
                fully_shard(encoder)
            fully_shard(model)
        step = torch.compile(model, backend=backend) if as_graph else model
        found.append(trained(model, step, rank, torch.bfloat16 if "autocast" in how else None))
        found[-1] += [t.float() for t in model.buffers()]
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not any("fastcl" in reason or "_disable_dynamo" in reason for reason in reasons), reasons
    for a, b in zip(*found, strict=True):
        a, b = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in (a, b))
        torch.testing.assert_close(b, a, **({"rtol": 0.0, "atol": 0.0} if backend == "aot_eager" and loss != "queue" else {}))
    return 0.0


def one_rank_alone(rank: int, world: int) -> float:
    """Two losses of a step whose one rank runs the graph and the other does not, either of them: the same messages."""
    x, y = rows(rank)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return functional.clip(x, y, logit_scale=9.0, group=here()) + functional.nt_xent(x, y, group=here("ring"))

    compiled = whole(step)
    for who in (0, 1):
        same(step, [x, y], compiled if rank == who else step)
        half = [t.detach().half().requires_grad_() for t in (x, y)]
        same(step, half, compiled if rank == who else step, upstream=2.0**16)
    with pytest.raises(RuntimeError, match="create_graph"):  # the compiler's own error, and ours
        torch.autograd.grad((compiled if rank == 0 else step)(x, y), (x, y), create_graph=True)
    for name in ("rows", "terms", "rows of a queue", "normalisers"):
        for who, dtype in ((0, torch.float32), (1, torch.float16)):
            same(CALLS[name], rows(rank, dtype=dtype), whole(CALLS[name]) if rank == who else CALLS[name])
    return 0.0


def order(rank: int, world: int) -> float:
    """Losses over two groups, one of which this rank has no use for: neither is left out, nor are they exchanged."""
    other = dist.new_group([0, 1])
    x, y = rows(rank)

    def step(x: Tensor, y: Tensor) -> Tensor:
        b = functional.nt_xent(x, y, group=other)
        a = functional.clip(x, y, logit_scale=9.0, group=here())
        return a if rank == 0 else a + b.detach()

    for backend in ("eager", "aot_eager", "inductor"):
        same(step, [x, y], whole(step, backend))
    with torch.no_grad():
        assert torch.equal(step(x, y), whole(step)(x, y))
    return 0.0


def unlike(rank: int, world: int) -> float:
    """Upstream gradients that differ from rank to rank, one made of the rows: the gradients of their sum, as without."""
    x, y = rows(rank, dtype=torch.float64)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return (y.mean() + 2.0 * rank) * functional.clip(x, y, logit_scale=9.0, group=here("gather", "exact"))

    found = [torch.autograd.grad(call(x, y), (x, y)) for call in (step, whole(step))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
    return 0.0


def once(rank: int, world: int) -> float:
    """Within a checkpoint of the graph a call is made once, around it once each way; twice backward is twice the gradient."""
    x, y = rows(rank)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return functional.clip(x * 2.0, y.sin(), logit_scale=9.0, group=here())

    def checkpointed(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = checkpoint(step, x, y, use_reentrant=False)
        return loss

    calls = [0]
    real = in_graph._united

    def united(*given: Any) -> Any:
        calls[0] += 1
        return real(*given)

    compiled = whole(checkpointed)
    with (
        mock.patch.object(in_graph, "_united", united),
        torch._functorch.config.patch(donated_buffer=False),  # which takes no retain_graph
    ):
        loss = compiled(x, y)
        loss.backward(retain_graph=True)
        loss.backward()
    assert calls[0] == 1, calls
    expected = torch.autograd.grad(step(x, y), (x, y))
    for leaf, g in zip((x, y), expected, strict=True):
        assert torch.equal(leaf.grad, 2.0 * g)
    clip = open_clip.ClipLoss(gather_with_grad=True, rank=rank, world_size=world)
    for of in (CALLS["rows"], CALLS["terms"], lambda x, y: clip(x[:3], y[:3], 9.0)):
        same(of, [x, y], whole(lambda x, y, of=of: checkpoint(of, x, y, use_reentrant=False)), tolerance=1e-6)
    inner, calls[0] = whole(step), 0
    with mock.patch.object(in_graph, "_united", united):
        same(step, [x, y], lambda x, y: checkpoint(inner, x, y, use_reentrant=False))
    assert calls[0] == 2, calls  # and again in its backward
    return 0.0


def refused(rank: int, world: int) -> float:
    """Second derivatives, several gradients at once and transforms of torch.func are errors, as without."""
    x, y = rows(rank)
    loss = whole(CALLS["clip"], "eager")(x, y)
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(loss, (x, y), create_graph=True)
    with pytest.raises(RuntimeError, match="several gradients at once"):
        torch.autograd.grad(loss, x, torch.ones(2), is_grads_batched=True, retain_graph=True)
    (g, *_) = torch.autograd.grad(whole(CALLS["clip"])(x, y), (x, y), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), x)
    step = torch.compile(lambda a: torch.func.grad(lambda b: CALLS["clip"](b, y.detach()))(a), backend="eager")
    with pytest.raises(RuntimeError, match="group= works with"):
        step(x.detach())
    return 0.0


def scaled(rank: int, world: int) -> float:
    """float16 gradients that a loss scale saves from 0 are saved, and none is too large that would not be without a graph."""
    x, y = rows(rank, n=1024)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return functional.clip(x, y, logit_scale=0.01, group=here())

    compiled = whole(step)
    for upstream in (2.0**16, 2.0**40):
        found = []
        for call in (step, compiled):
            loss = call(x, y)
            found.append(torch.autograd.grad(loss, (x, y), torch.full_like(loss, upstream)))
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() <= 1e-3 * a.abs().max(), (a, b)
    halves = [(t.detach() * 2.0**-14).half().requires_grad_() for t in rows(rank, n=4)]
    (g, *_) = torch.autograd.grad(CALLS["clip"](*halves), halves)
    assert 2.0**13 < g.abs().max() < 2.0**16, g.abs().max()
    return same(CALLS["clip"], halves)


def backward_under_autocast(rank: int, world: int) -> float:
    """A backward that makes the call again makes the call that was made: autocast around it rounds no rows."""
    found = []
    for call in (CALLS["rows"], whole(CALLS["rows"])):
        leaves = rows(rank)
        value = call(*leaves)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(value, leaves))
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)
    return 0.0


def still_broken(rank: int, world: int) -> float:
    """An objective that does not say what it returns runs as it would without, outside the graph: one break, no more."""
    x, y = rows(rank, dtype=torch.float64)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    of = over_ranks(lambda x, y, *, group=None: batch.pair_reduce(x, y))

    def step(x: Tensor, y: Tensor) -> Tensor:
        return of(x, y, group=here()).sum()

    same(step, [x, y], torch.compile(step, backend="aot_eager"))
    (reason,) = counters["graph_break"]
    assert "_over_ranks" in reason, reason
    return 0.0


def sent(rank: int, world: int) -> float:
    """As many bytes as without: the mean of the upstream gradients is one all-reduce, in place of the sum's message."""
    x, y = rows(rank, n=4)
    found = []
    for call in (CALLS["clip"], whole(CALLS["clip"])):
        call(x, y)
        with counted() as bytes_sent:
            call(x, y).backward()
        found.append(bytes_sent[0])
    assert 0 < found[1] <= found[0] + 8, found
    return 0.0


CHECKS: dict[str, Callable[[int, int], float]] = {
    **compiled.CHECKS,
    **compiled_states.CHECKS,
    **{f"{how}, {backend}, {loss}": partial(around, how, backend, loss) for how, backend, loss in (
        *(("ddp", "aot_eager", loss) for loss in LOSSES), *(("fsdp", "aot_eager", loss) for loss in LOSSES),
        ("ddp", "inductor", "clip"), ("ddp, autocast", "aot_eager", "clip"),
    )},
    "one rank alone": one_rank_alone,
    "order": order,
    "unlike upstream": unlike,
    "once": once,
    "refused": refused,
    "loss scale": scaled,
    "backward under autocast": backward_under_autocast,
    "still a break": still_broken,
    "bytes": sent,
}  # fmt: skip


if __name__ == "__main__":
    ranks.main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], CHECKS)
