"""One of several gloo processes: cached steps of wrapped encoders. Run by test_across_ranks.py.

    python -m tests.steps.ranks RANK WORLD MEETING_FILE RESULT_FILE

The result is {check: (error against one process with the whole batch, how often the ranks met for gradients)}.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastcl
from fastcl import losses

from .towers import gradients, normed_tower, rows, tower

SIZES = (7, 5)  # rows of each rank: 3 and 2 chunks of 3, and each rank waits once; 2 and 2 of 4


def counted(module: nn.Module, met: list[int], **settings: Any) -> DistributedDataParallel:
    """The module, its parameters in one bucket; every meeting for it is noted."""
    wrapped = DistributedDataParallel(module, **settings)

    def average(_, bucket):  # type: ignore[no-untyped-def]  # annotations that are texts are refused
        met.append(1)
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, average)
    return wrapped


def batches(rank: int) -> list[Tensor]:
    """Own rows of both sides."""
    return [rows(sum(SIZES), seed).split(SIZES)[rank] for seed in (0, 1)]


def truth(shared: bool) -> list[Tensor]:
    """One process with everything: gradients of the encoders and of the loss."""
    encoders, loss = [tower(0, 0.0), tower(1, 0.0)], losses.CLIPLoss()
    if shared:
        encoders[1] = encoders[0]
    loss(*(e(rows(sum(SIZES), seed)) for seed, e in enumerate(encoders))).backward()
    return gradients(*dict.fromkeys(encoders), loss)


def step(kind: str, shared: bool, lazily: bool, rank: int) -> tuple[float, int]:
    """The error of the gradients, and the meetings of one step."""
    met: list[int] = []
    towers = [tower(0, 0.0)] if shared else [tower(0, 0.0), tower(1, 0.0)]
    if kind == "ddp" or kind == "function of ddp":
        encoders: list[Any] = [counted(t, met) for t in towers]
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        encoders = [fully_shard(t, mesh=mesh) for t in towers]
    loss = losses.CLIPLoss(group=dist.group.WORLD)
    wrapped = list(encoders)
    settings: dict[str, Any] = {"chunk": 3 if "ddp" in kind else 4}
    if kind == "function of ddp":
        encoders, settings["ddp"] = [lambda x, e=e: e(x) for e in wrapped], wrapped
    if kind == "method of fully_shard":  # whose hooks no call of the module runs
        for t in towers:
            register_fsdp_forward_method(t, "forward")
        encoders = [t.forward for t in towers]
    encoders = [encoders[0], encoders[-1]]
    if lazily:
        loss(*fastcl.cached_embeddings(encoders, batches(rank), **settings)).backward()
    else:
        fastcl.cached_step(encoders, batches(rank), loss, **settings)
    found = [p.grad for t in towers for p in t.parameters()]
    found = [g.full_tensor() if isinstance(g, DTensor) else g for g in found]
    scale = loss.logit_scale.log.grad / dist.get_world_size()
    dist.all_reduce(scale)
    wanted = truth(shared)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip([*found, scale], wanted, strict=True)]
    return max(errors), len(met)


def step_of_state(lazily: int, rank: int) -> tuple[float, int]:
    """A shared tower whose output depends on its buffers: DistributedDataParallel starts each step with those of rank 0."""
    met: list[int] = []
    torch.manual_seed(0)
    model, loss = normed_tower(), losses.CLIPLoss(group=dist.group.WORLD)
    everyone = [copy.deepcopy(model) for _ in SIZES]
    embedded = [[torch.cat([m(c) for c in b.split(3)]) for b in batches(r)] for r, m in enumerate(everyone)]
    losses.CLIPLoss()(*map(torch.cat, zip(*embedded, strict=True))).backward()
    wanted = [torch.stack(parts).sum(0) for parts in zip(*(gradients(m) for m in everyone), strict=True)]
    wrapped = counted(model, met)
    for buffer in model.buffers() if rank else ():
        buffer.copy_(buffer.flip(0))
    if lazily:
        loss(*fastcl.cached_embeddings(wrapped, batches(rank), chunk=3)).backward()
    else:
        fastcl.cached_step(wrapped, batches(rank), loss, chunk=3)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients(model), wanted, strict=True)]
    return max(errors), len(met)


class Moving(nn.Module):
    """An output that depends on buffers which every call moves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(5).double(), nn.Linear(5, 6).double()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.norm(x))
        self.mean.lerp_(x.detach().mean(0), 0.3)
        return nn.functional.gelu(x - self.mean.clone())


def step_of_moving_buffers(chunk: int, lazily: int, rank: int) -> tuple[float, int]:
    """As in a plain step DistributedDataParallel hands out the buffers of rank 0 as each tower starts."""
    found, met = [], []
    for cached in (False, True):
        met.clear()
        wrapped, loss = counted(Moving(), met), losses.CLIPLoss(group=dist.group.WORLD)
        if not cached:
            parts = [b.split(chunk) for b in batches(rank)]
            loss(*(torch.cat([wrapped(first), *map(wrapped.module, rest)]) for first, *rest in parts)).backward()
        elif lazily:
            loss(*fastcl.cached_embeddings(wrapped, batches(rank), chunk=chunk)).backward()
        else:
            fastcl.cached_step(wrapped, batches(rank), loss, chunk=chunk)
        found.append([*gradients(wrapped), *wrapped.buffers()])
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*reversed(found), strict=True)]
    return max(errors), len(met)


def static_graph(rank: int) -> tuple[float, int]:
    """Which DistributedDataParallel has for one backward alone."""
    met: list[int] = []
    towers = [counted(tower(seed, 0.0), met, static_graph=True) for seed in (0, 1)]
    with torch.no_grad():
        fastcl.cached_embeddings(towers, batches(rank), chunk=2)
    wanted = r"encoders: expected DistributedDataParallel without static_graph=True .* got it for 2; leave it out"
    for chunk, encoders in ((2, towers), (7, towers[0])):
        with pytest.raises(ValueError, match=wanted):
            fastcl.cached_step(encoders, batches(rank), losses.CLIPLoss(), chunk=chunk)
    fastcl.cached_step(towers, batches(rank), losses.CLIPLoss(), chunk=7)
    return 0.0, len(met)


CHECKS: dict[str, Callable[[int], tuple[float, int]]] = (
    {
        f"{kind}, {'shared' if shared else 'two'}, {'lazily' if lazily else 'step'}": (
            lambda rank, kind=kind, shared=shared, lazily=lazily: step(kind, shared, lazily, rank)
        )
        for kind in ("ddp", "function of ddp", "fully_shard", "method of fully_shard")
        for shared in (False, True)
        for lazily in (False, True)
    }
    | {
        f"ddp with state, shared, {way}": (lambda rank, lazily=lazily: step_of_state(lazily, rank))
        for lazily, way in enumerate(("step", "lazily"))
    }
    | {
        f"ddp with moving buffers in chunks of {chunk}, shared, {way}": (
            lambda rank, chunk=chunk, lazily=lazily: step_of_moving_buffers(chunk, lazily, rank)
        )
        for chunk in (7, 5)
        for lazily, way in enumerate(("step", "lazily"))
    }
    | {"ddp of a static graph, two": static_graph}
)


def main(rank: int, world: int, meeting: str, result: str) -> None:
    """Make every check, and write what came of it."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save({name: check(rank) for name, check in CHECKS.items()}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
