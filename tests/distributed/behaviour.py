"""What users of many processes meet: DistributedDataParallel, sub-groups, meshes, mistakes, queues, statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fastcl
from fastcl import Ranks, functional, losses
from fastcl.distributed import CONVENTIONS, Shards
from fastcl.distributed.shards import checked
from fastcl.distributed.wire import Wire
from fastcl.equation.names import Gradient

from .mistakes import says
from .shards import LAYOUTS, cut, distance, random

D = 6
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "clip": losses.CLIPLoss,
    "info_nce": losses.InfoNCELoss,
    "nt_xent": losses.NTXentLoss,
    "f_micl": partial(losses.FMICLLoss, negatives="xx+yy"),
    "uniformity": losses.AlignUniformLoss,
    "siglip": losses.SigLIPLoss,
    "spectral": losses.SpectralLoss,
    "minc": partial(losses.MINCLoss, D),
}


class Towers(nn.Module):
    """Two encoders and a loss, all of which learn."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(5, D), nn.Linear(5, D)])
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.encoders[0](x), self.encoders[1](y))
        return loss


def trained(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The parameters and buffers after one step for each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in batches:
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    return model.state_dict()


def ddp(name: str, strategy: str, rank: int, world: int) -> float:
    """Three steps of DistributedDataParallel end where three steps of one process do."""
    torch.manual_seed(0)
    one = Towers(LOSSES[name]()).double()
    many = Towers(LOSSES[name](group=Ranks(dist.group.WORLD, strategy=strategy))).double()
    many.load_state_dict(copy.deepcopy(one.state_dict()))
    sizes = [5, 2, 4, 1][:world]
    batches = [(random(sum(sizes), 5, seed=10 + i), random(sum(sizes), 5, seed=20 + i)) for i in range(3)]
    shards = [(cut(x, sizes, rank), cut(y, sizes, rank)) for x, y in batches]
    with mock.patch.object(dist, "is_initialized", return_value=False):  # MINC's statistic asks
        expected = trained(one, batches)
    found = trained(DistributedDataParallel(many), shards)
    names = [key for key in expected if expected[key].is_floating_point()]
    tolerance = 1e6 if name == "minc" else 1.0  # its statistic is float32 by definition: 1e-6
    return max(distance(found["module." + key].double(), expected[key].double()) for key in names) / tolerance


def bounded(convention: Gradient, rank: int, world: int) -> float:
    """Beyond its bound a learned scale's gradient is that of one process, whatever the signs of the ranks' shares of it."""
    sizes, errors = [5, 2, 4, 1][:world], []
    for seed in range(8):
        x, y = (random(sum(sizes), D, seed=50 + 2 * seed + k).detach() for k in (0, 1))
        found = []
        for group in (None, Ranks(dist.group.WORLD, convention)):
            loss = losses.CLIPLoss(logit_scale=3.0, largest_scale=3.0, group=group).double()
            with torch.no_grad():
                loss.logit_scale.log += 0.1
            loss(*((x, y) if group is None else (cut(x, sizes, rank), cut(y, sizes, rank)))).backward()
            found.append(loss.logit_scale.log.grad)
        dist.all_reduce(found[1])
        errors.append(distance(found[1] / (world if convention == "ddp" else 1), found[0], scale=1.0))
    return max(errors)


def repeatable(strategy: str, rank: int, world: int) -> float:
    """The same bits every time, and the same value on every rank."""
    x, y = (cut(random(9 * world, D, seed=s).requires_grad_(), [9] * world, rank) for s in (1, 2))
    answers = []
    for _ in range(3):
        a, b = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
        loss = functional.clip(a, b, logit_scale=9.0, group=Ranks(dist.group.WORLD, strategy=strategy))
        loss = loss + functional.nt_xent(a, b, group=Ranks(dist.group.WORLD, strategy=strategy))
        loss.backward()
        answers.append((loss.detach(), a.grad, b.grad))
    same = all(torch.equal(p, q) for answer in answers[1:] for p, q in zip(answer, answers[0], strict=True))
    values = [torch.empty_like(answers[0][0]) for _ in range(world)]
    dist.all_gather(values, answers[0][0])
    return 0.0 if same and all(torch.equal(v, values[0]) for v in values) else float("inf")


def subgroups(rank: int, world: int) -> float:
    """A group of some of the ranks, and one dimension of a mesh, is a batch of its own."""
    if world < 4:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
        parts, groups = [list(range(world))], [mesh]
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "data"))
        parts, groups = [[0, 1], [2, 3]], [mesh["data"]] * 2
        parts += [[0, 2, 3]]
        groups += [dist.new_group([0, 2, 3])]
        says("mesh['model']", lambda: functional.info_nce(random(2, 3, seed=1), random(2, 3, seed=1), group=mesh))
    errors = []
    for members, group in zip(parts, groups, strict=True):
        if rank not in members:
            continue
        sizes = LAYOUTS["uneven"](len(members))
        whole = [random(sum(sizes), D, seed=s).requires_grad_() for s in (3, 4)]
        expected = functional.nt_xent(*whole)
        expected.backward()
        for strategy in ("gather", "ring"):
            own = [cut(t, sizes, members.index(rank)) for t in whole]
            loss = functional.nt_xent(*own, group=Ranks(group, "exact", strategy))
            loss.backward()
            errors.append(distance(loss, expected))
            for mine, t in zip(own, whole, strict=True):
                errors.append(
                    distance(mine.grad, cut(t.grad, sizes, members.index(rank)), scale=float(t.grad.abs().max()))
                )
    return max(errors)


def queue(rank: int, world: int) -> float:
    """A queue that every rank holds whole and one that is kept in parts give the same loss."""
    torch.manual_seed(0)
    whole = losses.MoCoQueue(D, 6 * world, dtype=torch.float64)
    part = losses.MoCoQueue(D, 6, dtype=torch.float64, sharded=True)
    q, k = random(4, D, seed=30 + rank), random(4, D, seed=40 + rank)
    for step in range(3):  # 12 keys of each rank: both queues hold the last 6 or more of each
        keys = random(2, D, seed=100 * step + rank)
        whole.enqueue(keys)
        part.enqueue(keys)
    assert whole.rows.shape[0] == world * part.rows.shape[0]
    answers = [
        functional.moco(q, k, rows, sharded_queue=sharded, group=dist.group.WORLD)
        for rows, sharded in ((whole.rows, False), (part.rows, True))
    ]
    return distance(answers[1], answers[0])


class Queued(nn.Module):
    """An encoder with its queue, which is enqueued to within its forward, as in the authors' code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, D)
        self.queue = losses.MoCoQueue(D, 6, sharded=True)

    def forward(self, x: Tensor) -> Tensor:
        q = self.encoder(x)
        loss = functional.moco(q, q.detach(), self.queue.rows, sharded_queue=True, group=dist.group.WORLD)
        self.queue.enqueue(q.detach())
        return loss


def wrapped_queue(rank: int, world: int) -> float:
    """Within DistributedDataParallel a queue in parts keeps the keys of its own rank, and no rank those of another."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(Queued())
    keys = []
    for step in range(3):
        x = random(2, 5, seed=100 * step + rank).detach().float()
        keys.append(nn.functional.normalize(model.module.encoder(x)).detach())
        model(x).backward()
    return distance(model.module.queue.rows, torch.cat(keys))


def statistic(how: str, rank: int, world: int) -> float:
    """MINC keeps one statistic and one value on the ranks that it is for, whoever has how many rows."""
    members = [0, 2, 3] if how == "sub-group" and world == 4 else list(range(world))
    group = {"without a group": None, "group": dist.group.WORLD}.get(how)
    if how == "sub-group":
        group = dist.new_group(members)
    one, many = losses.MINCLoss(D, ema=0.7), losses.MINCLoss(D, ema=0.7, group=group)
    errors: list[float] = []
    for step, layout in enumerate(("uneven", "even", "uneven" if group is None else "with an empty one")):
        if rank not in members:
            continue
        sizes = LAYOUTS[layout](len(members))
        u, v = (random(sum(sizes), D, seed=10 * step + i, dtype=torch.float32) for i in (1, 2))
        own = [cut(x, sizes, members.index(rank)) for x in (u, v)]
        with mock.patch.object(dist, "is_initialized", return_value=False):
            expected = one(u, v)
        loss = many(*own)
        alone = functional.minc(*own, one.statistic) if group is None else expected
        errors += [
            distance(many.statistic, one.statistic),
            distance(many.value, one.value, scale=max(1.0, float(one.value.abs()))),
        ]
        errors.append(distance(loss, alone, scale=max(1.0, float(alone.abs()))))
        kept = [torch.empty_like(many.statistic) for _ in members]
        dist.all_gather(kept, many.statistic, group=group)
        assert all(torch.equal(k, kept[0]) for k in kept), "the ranks keep different statistics"
    if rank in members:
        before = many.statistic.clone()
        many.eval()(*own)
        assert torch.equal(many.statistic, before), "the statistic moved in evaluation"
    return max(errors, default=0.0)


def normalizers(how: str, rank: int, world: int) -> float:
    """The normalisers of all ranks' samples, the same on each, and a sample that comes to another rank later; own rows alone in
    evaluation.
    """
    group = dist.group.WORLD if how == "group" else None
    one = losses.FastCLIPLoss(9 * world, temperature=0.5, gamma=0.5).double()
    many = losses.FastCLIPLoss(9 * world, temperature=0.5, gamma=0.5, group=group).double()
    errors = []
    for step, layout in enumerate(("uneven", "even", "with an empty one")):
        sizes = LAYOUTS[layout](world)
        x, y = (random(sum(sizes), D, seed=10 * step + i) for i in (1, 2))
        index = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(step))
        own = [cut(t, sizes, rank) for t in (x, y, index)]
        if group is None and min(sizes) < 2:
            continue
        before = one.log_u.clone()
        with mock.patch.object(dist, "is_initialized", return_value=False):
            expected = one(x, y, index)
            if group is None:  # each rank's own rows, all of them kept
                one.log_u.copy_(before)
                for k in range(world):
                    part = [cut(t, sizes, k) for t in (x, y, index)]
                    found = functional.fast_clip(
                        *part[:2], before[part[2]], temperature=0.5, gamma=0.5, return_log_u=True
                    )
                    one.log_u[part[2]] = found.log_u
                    expected = found.loss if k == rank else expected
        errors += [distance(many(*own), expected), distance(many.log_u.exp(), one.log_u.exp())]
        kept = [torch.empty_like(many.log_u) for _ in range(world)]
        dist.all_gather(kept, many.log_u)
        assert all(torch.equal(k, kept[0]) for k in kept), "the ranks keep different normalisers"
        many.eval()(*own)
        assert torch.equal(many.train().log_u, kept[0]), "they moved in evaluation"
    return max(errors)


def plain_queue(rank: int, world: int) -> float:
    """Without group=, the queue takes in the keys of all ranks, in their order, and each rank's loss is that of own queries."""
    torch.manual_seed(rank)  # ranks start with different rows, as they may
    queue = losses.MoCoQueue(D, 11, dtype=torch.float64)
    torch.manual_seed(0)
    one = losses.MoCoQueue(D, 11, dtype=torch.float64)
    queue.load_state_dict(one.state_dict())
    q, k = random(3, D, seed=30 + rank), random(3, D, seed=40 + rank)
    for step in range(4):
        sizes = LAYOUTS["with an empty one" if step == 2 else "uneven"](world)
        keys = random(sum(sizes), D, seed=100 + step)
        queue.enqueue(cut(keys, sizes, rank))
        with mock.patch.object(dist, "is_initialized", return_value=False):
            one.enqueue(keys)
        assert torch.equal(queue.position, one.position)
    loss, expected = losses.MoCoLoss()(q, k, queue.rows), functional.moco(q, k, one.rows)
    return max(distance(queue.rows, one.rows), distance(loss, expected))


def extreme_order(rank: int, world: int) -> float:
    """Powers whose sum over pairs is beyond float64: the longest rows of all ranks say how rows are scaled."""
    sizes = LAYOUTS["with an empty one"](world)
    whole = [(random(sum(sizes), D, seed=s) * 8e50).requires_grad_() for s in (3, 4)]
    expected = functional.f_mi_alpha(*whole, alpha=3.0)
    expected.backward()
    own = [cut(t, sizes, rank) for t in whole]
    loss = functional.f_mi_alpha(*own, alpha=3.0, group=Ranks(dist.group.WORLD, "exact"))
    loss.backward()
    assert 1e304 < expected.abs() < float("inf")
    errors = [
        distance(mine.grad, cut(t.grad, sizes, rank), scale=float(t.grad.abs().max()))
        for mine, t in zip(own, whole, strict=True)
    ]
    return max(distance(loss, expected), *errors)


def gradient_accumulates(rank: int, world: int) -> float:
    """Two backward passes through one loss, and a loss within a larger sum."""
    sizes = LAYOUTS["uneven"](world)
    whole = [random(sum(sizes), D, seed=s).requires_grad_() for s in (3, 4)]
    expected = 3.0 * functional.info_nce(*whole) + whole[0].square().sum()
    expected.backward()
    own = [cut(t, sizes, rank) for t in whole]
    loss = functional.info_nce(*own, group=Ranks(dist.group.WORLD, "exact"))
    (2.0 * loss).backward(retain_graph=True)
    (loss + own[0].square().sum()).backward()
    return max(
        distance(mine.grad, cut(t.grad, sizes, rank), scale=float(t.grad.abs().max()))
        for mine, t in zip(own, whole, strict=True)
    )


def autocast(rank: int, world: int) -> float:
    """Half-precision rows under autocast, as in one process, to bfloat16's precision."""
    whole = [random(4 * world, D, seed=s, dtype=torch.float32).requires_grad_() for s in (3, 4)]
    own = [cut(t, [4] * world, rank) for t in whole]
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.clip(*whole, logit_scale=5.0)
        loss = functional.clip(*own, logit_scale=5.0, group=Ranks(dist.group.WORLD, "exact"))
    expected.backward()
    loss.backward()
    worst = max(
        float((mine.grad - cut(t.grad, [4] * world, rank)).abs().max() / t.grad.abs().max())
        for mine, t in zip(own, whole, strict=True)
    )
    return max(worst, float((loss - expected).abs())) / 2**-7


def half(rank: int, world: int) -> float:
    """float16 rows whose gradients of unit rows overflow, with another upstream gradient on each rank: to float16's precision."""
    sizes = LAYOUTS["uneven"](world)
    whole = [1e3 * random(sum(sizes), D, seed=s) for s in (3, 4)]
    own = [cut(x, sizes, rank).half().requires_grad_() for x in whole]
    exact = [x.half().double().requires_grad_() for x in whole]
    given = torch.cat([torch.full((n,), 2.0 ** (20 + k)) for k, n in enumerate(sizes)])
    loss = functional.info_nce(*own, temperature=0.5, group=dist.group.WORLD, reduction="none")
    expected = functional.info_nce(*exact, temperature=0.5, reduction="none")
    found = torch.autograd.grad(loss, own, cut(given, sizes, rank))
    wanted = torch.autograd.grad(expected, exact, given.double())
    worst = max(
        float((mine - cut(g, sizes, rank)).abs().max() / g.abs().max()) for mine, g in zip(found, wanted, strict=True)
    )
    return worst / 2**-7


def parts_of_a_half(rank: int, world: int) -> float:
    """Columns that cancel from rank to rank: the gradients of the visits add up before they are rounded to bfloat16."""
    sizes = LAYOUTS["even"](world)
    signs = torch.cat([torch.full((n, 1), float((k == 0) - (k == 1))) for k, n in enumerate(sizes)])
    whole = [random(sum(sizes), D, seed=3).bfloat16(), (signs * random(1, D, seed=4)).bfloat16()]
    x, y = (cut(t, sizes, rank).requires_grad_() for t in whole)
    exact = [t.double().requires_grad_() for t in whole]
    (wanted,) = torch.autograd.grad(fastcl.pair_reduce(*exact, scale=1e-3).sum(), exact[:1])
    worst = 0.0
    for strategy in ("gather", "ring"):
        shards = Shards(Wire(dist.group.WORLD), (tuple(sizes), tuple(sizes)), strategy)
        r = shards.pair_reduce(x, y, scale=1e-3)
        (found,) = torch.autograd.grad(r.sum(), x)  # type: ignore[union-attr]
        worst = max(worst, float((found - cut(wanted, sizes, rank)).abs().max() / wanted.abs().max()))
    return worst / 2**-8


def half_in_parts(rank: int, world: int) -> float:
    """The same for an objective that is made of others, one upstream gradient for all: shards of different sizes."""
    sizes = LAYOUTS["uneven"](world)
    whole = [random(sum(sizes), D, seed=s) for s in (3, 4)]
    own = [cut(x, sizes, rank).half().requires_grad_() for x in whole]
    exact = [x.half().double().requires_grad_() for x in whole]
    loss = functional.align_uniform(*own, group=Ranks(dist.group.WORLD, "exact"))
    found = torch.autograd.grad(loss, own, torch.tensor(1024.0))
    wanted = torch.autograd.grad(1024.0 * functional.align_uniform(*exact), exact)
    worst = max(
        float((mine - cut(g, sizes, rank)).abs().max() / g.abs().max()) for mine, g in zip(found, wanted, strict=True)
    )
    return worst / 2**-7


def unlike_norms(rank: int, world: int) -> float:
    """A long row among short ones: nothing is taken out again of sums and matrices that its pair with itself is most of."""
    sizes = LAYOUTS["uneven"](world)
    worst = 0.0
    for length, pair in ((1e12, "identity"), (1e5, "square")):
        whole = [random(sum(sizes), D, seed=s) for s in (3, 4)]
        for rows in whole:
            rows[0] *= length
        own = [cut(rows, sizes, rank).requires_grad_() for rows in whole]
        exact = [rows.clone().requires_grad_() for rows in whole]
        shards = Shards(Wire(dist.group.WORLD), (tuple(sizes), tuple(sizes)))
        how: dict[str, Any] = {"pair": pair, "reduce": "sum", "mask": "off_diagonal"}
        for count in (1, 2):
            r = shards.pair_reduce(*own[:count], **how)
            wanted = fastcl.pair_reduce(*exact[:count], backend="reference", **how)
            found = [r, *torch.autograd.grad(shards.total(r), own[:count])]  # type: ignore[arg-type]
            truth = [wanted, *torch.autograd.grad(wanted.sum(), exact[:count])]  # type: ignore[union-attr]
            factors = [1.0] + [1.0 / world] * count  # every rank's total has a gradient
            for mine, theirs, factor in zip(found, truth, factors, strict=True):
                theirs = cut(theirs.detach(), sizes, rank)
                if len(theirs):
                    worst = max(worst, float(((mine.detach() * factor - theirs).abs() / theirs.abs()).max()))
    return worst / 1e-13


def nan_row(rank: int, world: int) -> float:
    """A log-sum-exp over all ranks of a row that is NaN is NaN: as -inf it was the best uniformity there is."""
    x = random(3, D, seed=rank)
    x[0] += math.nan if rank == 0 else 0.0
    loss = functional.uniformity(x, group=dist.group.WORLD, normalize=False)
    return 0.0 if loss.isnan() else 1e3


def sums_beyond(rank: int, world: int) -> float:
    """Sums of rows of 4e38 and -4e38, whose total is in float32."""
    x = torch.tensor([[{0: 2e19, 1: -1.9995e19}.get(rank, 0.0)]])
    y = torch.tensor([[2e19 / world]])
    shards = Shards(Wire(dist.group.WORLD), ((1,) * world, (1,) * world))
    total = shards.pair_total(x, y, pair="identity", reduce="sum", mask="all", outer="sum")
    return 0.0 if world == 1 else abs(float(total) / (2e19 * (2e19 - 1.9995e19)) - 1.0) / 1e-3


def upstream_of_0(rank: int, world: int) -> float:
    """It takes away what is beyond float32: 0 times infinity was NaN."""
    x = torch.full((3, 2), 1e20).requires_grad_()
    scale = torch.tensor(1e-37, requires_grad=True)
    shards = Shards(Wire(dist.group.WORLD), ((3,) * world, (3,) * world))
    total = shards.pair_total(x, x.detach(), scale=scale, reduce="logsumexp", outer="sum")
    (of_one,) = torch.autograd.grad(total, scale, retain_graph=True)
    found = torch.autograd.grad(0.0 * total, (x, scale))
    return 0.0 if of_one == math.inf and not any(bool(g.any()) for g in found) else 1e3


def wide_guides(rank: int, world: int) -> float:
    """Rows that every rank has room for, with guides that it has none for: they travel together, round the ring."""
    n = 2**12
    x, guide = (torch.empty(n, width, device="meta") for width in (4, 2**15))
    shards = Shards(Wire(dist.group.WORLD), ((n,) * world,))
    masks = [fastcl.at_most(x[:, 0], guide=s) for s in (None, guide)]
    ring = [shards._tour(checked(x, None, {"mask": mask})[0]).ring for mask in masks]
    return 0.0 if ring == [False, True] else 1e3


def classes_that_are_nearly_points(layout: str, strategy: str, rank: int, world: int) -> float:
    """The end of supervised training in float32: all ranks go to float64 together. Over a tolerance of 1e-5 of all."""
    sizes = [40 * size for size in LAYOUTS[layout](world)]  # more than are listed in one process
    labels = torch.arange(sum(sizes)) % 2
    rows = (torch.eye(D)[0] * (1 - 2 * labels[:, None]) + 0.01 * random(sum(sizes), D, seed=3)).float()
    rows = rows / rows.norm(dim=1, keepdim=True)
    whole = rows.double().requires_grad_()
    (truth,) = torch.autograd.grad(functional.sup_con(whole, labels, temperature=0.1, normalize=False), whole)
    own = cut(rows, sizes, rank).requires_grad_()
    group = Ranks(dist.group.WORLD, "exact", strategy)
    value = functional.sup_con(own, cut(labels, sizes, rank), temperature=0.1, normalize=False, group=group)
    (found,) = torch.autograd.grad(value, own)
    return float((found - cut(truth, sizes, rank)).norm() / truth.norm()) / 1e-5


CHECKS: dict[str, Callable[[int, int], float]] = {
    **{
        f"classes that are nearly points, {layout}, {strategy}": partial(
            classes_that_are_nearly_points, layout, strategy
        )
        for layout in LAYOUTS
        for strategy in ("gather", "ring")
    },
    "wide guides": wide_guides,
    "upstream of 0": upstream_of_0,
    "row of NaN": nan_row,
    "sums beyond float32": sums_beyond,
    **{f"ddp, {name}, {strategy}": partial(ddp, name, strategy) for name in LOSSES for strategy in ("gather", "ring")},
    **{f"bounded scale, {name}": partial(bounded, name) for name in CONVENTIONS},
    **{f"repeatable, {strategy}": partial(repeatable, strategy) for strategy in ("gather", "ring")},
    "subgroups": subgroups,
    "queue": queue,
    "plain queue": plain_queue,
    "wrapped queue": wrapped_queue,
    **{f"statistic, {how}": partial(statistic, how) for how in ("without a group", "group", "sub-group")},
    **{f"normalizers, {how}": partial(normalizers, how) for how in ("without a group", "group")},
    "gradient accumulates": gradient_accumulates,
    "autocast": autocast,
    "half precision": half,
    "half precision in parts": half_in_parts,
    "parts of a half": parts_of_a_half,
    "extreme order": extreme_order,
    "unlike norms": unlike_norms,
}
