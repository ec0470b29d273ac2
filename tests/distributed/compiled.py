"""Whole steps under torch.compile over two ranks: no graph break, and the bits of the same step without. The calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh

import fastcl
from fastcl import Ranks, batch, functional, losses
from fastcl.distributed import over_ranks
from fastcl.dropin import open_clip
from tests.objectives.cases import CASES, Case

from . import losses as of_objectives
from .mistakes import says
from .shards import random

D = 6
ROWS = (5, 3)  # of either rank
Step = Callable[..., Tensor]


def here(how: str = "gather", gradient: Any = "ddp") -> Ranks:
    """All ranks."""
    return Ranks(dist.group.WORLD, gradient, how)  # type: ignore[arg-type]


def rows(rank: int, count: int = 2, dtype: torch.dtype = torch.float32, n: int | None = None) -> list[Tensor]:
    """Leaves of this rank, as many rows as it has."""
    n = ROWS[rank] if n is None else n
    return [random(n, D, seed=10 * rank + k, dtype=dtype).requires_grad_() for k in range(count)]


def whole(step: Step, backend: Any = "aot_eager", **options: Any) -> Step:
    """The step compiled anew, which may not break."""
    torch._dynamo.reset()
    return torch.compile(step, backend=backend, fullgraph=True, **options)


def same(
    step: Step, leaves: list[Tensor], compiled: Step | None = None, upstream: float = 1.0, tolerance: float = 0.0
) -> float:
    """Whether value and gradients are the same bits as without, or as near."""
    found = []
    for call in (step, whole(step) if compiled is None else compiled):
        value = call(*leaves)
        gradients = torch.autograd.grad(value, leaves, torch.full_like(value, upstream), allow_unused=True)
        filled = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True))
        found.append([value.detach(), *filled])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    assert any(g.any() for g in found[0][1:]) or not len(leaves[0])
    return 0.0


def triangular(u: Any) -> Any:
    return (u - 1.0) * (u - 1.0) / (u + 1.0)


def twice(u: Any) -> Any:
    return 2.0 * (u - 1.0) * (u - 1.0) / (u + 1.0)


def weighed(values: Tensor) -> Tensor:
    """A number whose gradient is another for each of these."""
    return (values * torch.arange(1.0, values.shape[0] + 1.0)).sum()


def of_rows_within() -> Callable[..., Tensor]:
    """An objective that is defined within a function, twice under one name."""

    def made(sign: float) -> Callable[..., Tensor]:
        @over_ranks
        def within(x: Tensor, y: Tensor, *, group: Any = None) -> Tensor:
            return sign * (batch.pair_reduce(x, y) - (x * y).sum(1))

        return within

    first, second = made(1.0), made(-2.0)
    return lambda x, y: first(x, y, group=here()).square().sum() + second(x.detach(), y.detach(), group=here("ring")).sum()


OWN = fastcl.Divergence("triangular", triangular)
INDEX = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clip": lambda x, y: functional.clip(x, y, logit_scale=9.0, group=dist.group.WORLD),
    "clip, several of everything": lambda x, y: functional.clip(
        x, y, logit_scale=x.square().mean().exp(), label_smoothing=0.1, pairs=2, group=here("ring", "exact")
    ),
    "siglip": lambda x, y: functional.siglip(x, y, logit_scale=5.0, logit_bias=-2.0, group=here()),
    "siglip, ring": lambda x, y: functional.siglip(x, y, logit_scale=5.0, logit_bias=-2.0, group=here("ring")),
    "nt_xent": lambda x, y: functional.nt_xent(x, y, reduction="sum", group=here()),
    "nt_xent of itself": lambda x, y: functional.nt_xent(x, x, group=here("ring")) + y.sum(),
    "sup_con": lambda x, y: functional.sup_con(x * y, torch.arange(len(x)) % 2, group=here()),
    "f_micl": lambda x, y: functional.f_micl(x, y, divergence="tsallis", negatives="xx+yy", q=0.5, group=here()),
    "f_micl, own": lambda x, y: functional.f_micl(x, y, divergence=OWN, alpha=1.0, backend="blocked", group=here()),
    "views": lambda x, y: functional.mv_info_nce(x, y, x + y, temperature=0.2, group=here()),
    "positives": lambda x, y: functional.info_nce(x, y, positives=INDEX, group=here()),
    "guides": lambda x, y: functional.info_nce(
        x, y, false_negative_margin=0.1, margin_strategy="relative", guide=[x.detach()[:, :4], y.detach()[:, :4]], group=here()
    ),
    "guides first": lambda x, y: functional.info_nce(
        guide=[t.detach().double() for t in (x, y)], y=y, x=x, false_negative_margin=0.1, margin_strategy="relative", group=here()
    ),
    "groups": lambda x, y: functional.dcl(u=x, v=y, groups=torch.arange(len(x)) // 2, sigma=0.5, group=here()),
    "minc": lambda x, y: functional.minc(x, y, torch.eye(D), group=here()),
    "rows": lambda x, y: weighed(functional.info_nce(x + 1.0, y, reduction="none", group=here())),
    "rows of both views": lambda x, y: weighed(functional.nt_xent(x, y, reduction="none", group=here("ring"))),
    "rows of views": lambda x, y: weighed(functional.mv_info_nce(x, y, x + y, reduction="none", group=here("ring"))),
    "rows of a queue": lambda x, y: weighed(
        functional.moco(x, y, y.detach(), reduction="none", sharded_queue=True, group=here())
    ),
    "rows, positives": lambda x, y: weighed(
        functional.clip(x, y, logit_scale=x.square().mean(), positives=INDEX, reduction="none", group=here())
    ),
    "terms": lambda x, y: weighed(torch.stack(functional.f_micl(x, y, return_terms=True, group=here(gradient="exact")))),
    "one of the terms": lambda x, y: functional.f_micl(x, y, return_terms=True, group=here()).positive,
    "terms of rows": lambda x, y: weighed(
        functional.f_micl(x, y, return_terms=True, reduction="none", group=here("ring")).negative
    ),
    "normalisers": lambda x, y: functional.sogclr(x, y, return_log_u=True, group=here()).loss
    * functional.fast_clip(x, y, return_log_u=True, group=here()).log_u.sum(),
    "within a function": of_rows_within(),
    "views of others": lambda x, y: functional.align_uniform(x.T.contiguous().T, torch.cat([y, y], 1)[:, 2:8], group=here()),
}  # fmt: skip


def calls(name: str, rank: int, world: int) -> float:
    """Objectives with what they take: the same bits as without."""
    return same(CALLS[name], rows(rank))


MODULES: dict[str, Callable[..., nn.Module]] = {
    "clip": partial(losses.CLIPLoss, logit_scale=100.0),
    "siglip": losses.SigLIPLoss,
    "nt_xent": losses.NTXentLoss,
    "info_nce, learned": lambda **given: losses.InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.5)), **given),
    "matryoshka": lambda **given: losses.MatryoshkaLoss(losses.NTXentLoss(**given), (2, D), (0.5, 1.0)),
}


def modules(name: str, backend: str, rank: int, world: int) -> float:
    """Modules with what they learn, one of them at its bound, which asks the other ranks for the sign of its gradient."""
    module = MODULES[name](group=here())
    with torch.no_grad():
        for number in module.parameters():
            number += 0.1
    x, y = rows(rank)
    leaves = [x, y, *module.parameters()]
    return same(lambda *_: module(x, y), leaves, whole(lambda *_: module(x, y), backend))


def half_of_a_call(rank: int, world: int) -> float:
    """Rows of halves, columns without gradient, an evaluation without any, and a forward alone."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x, y = rows(rank, dtype=dtype)
        same(CALLS["clip"], [x, y])
        same(CALLS["clip"], [x, y], upstream=2.0**16)
        same(lambda a, y=y: functional.info_nce(a, y.detach(), group=here()), [x])
    x, y = rows(rank)
    step = whole(CALLS["nt_xent"])
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            assert torch.equal(step(x, y), CALLS["nt_xent"](x, y))
    a, b = CALLS["nt_xent"](x, y), step(x, y)  # and no backward
    assert torch.equal(a, b) and b.requires_grad
    with torch.no_grad():
        assert not step(x.detach(), y).requires_grad
    return 0.0


def sizes(rank: int, world: int) -> float:
    """A batch that changes, on one rank to a single row and to none, makes one more graph."""
    counter = CompileCounterWithBackend("aot_eager")
    step = whole(CALLS["clip"], counter)
    for n in ((5, 3), (6, 4), (7, 2), (8, 5)):
        same(CALLS["clip"], rows(rank, n=n[rank]), step)
    assert counter.frame_count <= 2, counter.frame_count
    for n in ((4, 1), (0, 4)):
        same(CALLS["clip"], rows(rank, n=n[rank]), step)
    dynamic = whole(CALLS["clip"], dynamic=True)
    for n in ((5, 3), (6, 4)):
        same(CALLS["clip"], rows(rank, n=n[rank]), dynamic)
    return 0.0


def numbers(rank: int, world: int) -> float:
    """A temperature that changes makes one more graph, a setting that changes one each, and none is taken for another."""
    counter = CompileCounterWithBackend("aot_eager")
    x, y = rows(rank)

    def step(t: float, pairs: int = 2, how: str = "mean") -> Tensor:
        return functional.clip(x, y, logit_scale=t, pairs=pairs, reduction=how, group=here())

    compiled = whole(step, counter)
    for t in (3.0, 4.0, 5.0, 6.0):
        assert torch.equal(compiled(t), step(t))
    assert counter.frame_count <= 2, counter.frame_count
    for how in ("mean", "sum"):
        for pairs in (1, 2, 3):
            assert torch.equal(compiled(7.0, pairs, how), step(7.0, pairs, how))
    assert counter.frame_count <= 6, counter.frame_count
    return 0.0


def mistakes(rank: int, world: int) -> float:
    """One rank's mistake is the same error on both, as without, and the group can be used on."""
    odd = rank == 1
    x, y = (t.detach() for t in rows(rank))
    labels, module = torch.arange(2 if odd else len(x)), losses.InfoNCELoss(group=here())
    queue, sogclr = losses.MoCoQueue(D, 8), losses.SogCLRLoss(9, group=here())
    minc, unlike = losses.MINCLoss(4, group=here()), losses.MINCLoss(D, group=here()).train(odd)
    clip = open_clip.ClipLoss(rank=rank, world_size=2)
    nested = losses.MatryoshkaLoss(losses.NTXentLoss(group=here()), (2, D))
    wrong: dict[str, Callable[[], Any]] = {
        "temperature: expected the same on every rank, got 0.1 on rank 0 and 0.2 on rank 1": lambda: functional.info_nce(
            x, y, temperature=0.2 if odd else 0.1, group=here()
        ),
        "x: expected the same on every rank, got float32 (rows, 6)": lambda: functional.clip(
            *((x[:, :4], y[:, :4]) if odd else (x, y)), logit_scale=9.0, group=here()
        ),
        "labels: expected shape (3,), one group for each row of z, got (2,) (on rank 1": lambda: functional.sup_con(
            x, labels, group=here()
        ),
        "info_nce(): got an unexpected keyword argument 'grops'": lambda: module(
            x, y, **({"grops": labels} if odd else {})
        ),
        "temperature: expected as a setting of the module, got it at its call; make InfoNCELoss(temperature=...)": lambda: module(
            x, y, **({"temperature": 0.5} if odd else {})
        ),
        "gamma: expected as a setting of the module, got it at its call; make SogCLRLoss(gamma=...)": lambda: sogclr(
            x, y, torch.arange(len(x)), **({"gamma": 0.5} if odd else {})
        ),
        "rows[0]: expected the same on every rank, got float32 (rows, 6)": lambda: nested(*(t[:, : D - odd] for t in (x, y))),
        "columns, the largest of dims, got 5; pass smaller dims (on rank 0": lambda: nested(x, y[:, :5]),
        "reduction: expected one of": lambda: functional.clip(x, y, logit_scale=9.0, reduction="avg", group=here()),
        "objective: expected the same on every rank": lambda: (functional.nt_xent if odd else functional.info_nce)(
            x, y, temperature=0.5, group=here()
        ),
        "strategy: expected one of": lambda: functional.info_nce(x, y, group=here("rign")),
        "clip(): missing a required argument: 'logit_scale'": lambda: functional.clip(
            x, y, group=here(), **({} if odd else {"logit_scale": 3.0})
        ),
        "labels: expected shape (3,), one group for each row of z": lambda: functional.sup_con(
            x, labels, reduction="none", group=here()
        ),
        "y: expected the same on every rank, got float32 (rows, 6) on cpu on rank 0 and float32 (rows, 4)": lambda: (
            functional.f_micl(x, y[:, :4] if odd else y, return_terms=True, group=here()).positive
        ),
        "k: expected rows of the queue's width, d = 6, got d = 4 (on rank": lambda: queue.enqueue(x[:, :4]),
        "k: expected the same on every rank, got float32 (rows, 6)": lambda: queue.enqueue(x.double() if odd else x),
        "index: expected samples of the data set, 0 to 8, got 1 outside": lambda: sogclr(x, y, torch.arange(len(x)) + 7 * odd),
        "index: expected shape (3,), one group for each row of u, got (2,) (on rank 1": lambda: sogclr(x, y, labels),
        "u: expected rows of the statistic's width, d = 4": lambda: minc(x, y),
        "training: expected the same on every rank": lambda: unlike(x, y),
        "image_features: expected as many rows on every rank, got 5 on rank 0 and 3": lambda: clip(x, y, 9.0),
    }  # fmt: skip
    for part, call in wrong.items():
        plain = says(part, call)
        step = whole(call)
        said = says(part, step)
        assert said == plain, (said, plain)
        assert functional.info_nce(x, y, group=here()).isfinite()
    assert not queue.position and not sogclr.log_u.isfinite().any(), "a call that failed moved the state"
    torch._dynamo.reset()  # what no op takes breaks the graph, and is told to the other rank
    meta = torch.compile(lambda: CALLS["clip"](*((x.to("meta"), y.to("meta")) if odd else (x, y))), backend="aot_eager")
    says("got float32 (rows, 6) on cpu on rank 0 and float32 (rows, 6) on meta on rank 1", meta)
    return 0.0


def settings(rank: int, world: int) -> float:
    """Groups, conventions and divergences that change from call to call: none is taken for another that was there before."""
    x, y = rows(rank)
    alone = [dist.new_group([k]) for k in range(world)][rank]
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))

    def step(x: Tensor, y: Tensor, group: Any) -> Tensor:
        return functional.clip(x, y, logit_scale=9.0, group=group)

    compiled = whole(step)
    groups: list[Any] = [dist.group.WORLD, alone, mesh, here(gradient="exact"), Ranks(alone, "exact"), mesh["data"]]
    for group in groups:
        same(partial(step, group=group), [x, y], partial(compiled, group=group))
    module = losses.FMICLLoss(divergence="js", backend="blocked", group=here())
    found, own = torch.compile(module, backend="aot_eager", fullgraph=True), []
    for divergence in ("js", OWN, "kl", fastcl.Divergence("triangular", twice)):
        module.divergence = divergence
        same(module, [x, y], found)
        own.append(module(x, y).item())
    assert len(set(own)) == 4, own
    return 0.0


def objective(case: Case, how: str, reduction: str, rank: int, world: int) -> float:
    """Every objective over ranks against one process with the whole batch, as losses.py compares them without a graph."""
    plain = getattr(functional, case.name)

    def call(*args: Any, group: Any = None, **given: Any) -> Any:
        return plain(*args, **given) if group is None else whole(partial(plain, group=group))(*args, **given)

    with mock.patch.object(functional, case.name, call):
        return of_objectives.check(case, 0, torch.float64, "uneven", {"strategy": how, "reduction": reduction}, rank, world)


CHECKS: dict[str, Callable[[int, int], float]] = {
    **{f"call, {name}": partial(calls, name) for name in CALLS},
    **{
        f"objective, {case.id}": partial(objective, case, how, "mean")
        for case, how in zip(CASES, cycle(("gather", "ring")), strict=False)
    },
    **{
        f"rows of an objective, {case.id}": partial(objective, case, how, "none")
        for case, how in zip({c.name: c for c in CASES if c.rows}.values(), cycle(("gather", "ring")), strict=False)
    },
    **{f"module, {name}": partial(modules, name, "aot_eager") for name in MODULES},
    "module, clip, inductor": partial(modules, "clip", "inductor"),
    "parts of a call": half_of_a_call,
    "sizes": sizes,
    "numbers": numbers,
    "settings": settings,
    "mistakes": mistakes,
}
