"""Rows that are DTensors: replicated, sharded on rows, on meshes of one and two dimensions; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastcl
from fastcl import functional, losses
from tests.objectives.cases import CASES

from .shards import distance, random

N, D = 7, 6  # not a multiple of the world: the last shard is smaller
KEPT = ("statistic", "queue")


def meshes(world: int) -> list[tuple[DeviceMesh, list[Any]]]:
    """Meshes with the placements that are served."""
    line = init_device_mesh("cpu", (world,))
    found: list[tuple[DeviceMesh, list[Any]]] = [(line, [Replicate()]), (line, [Shard(0)])]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        found += [
            (square, [Shard(0), Replicate()]),
            (square, [Replicate(), Shard(0)]),
            (square, [Replicate(), Replicate()]),
        ]
    return found


def gradient(leaf: Tensor) -> Tensor:
    """The whole gradient, of the placements of its leaf."""
    if leaf.grad is None:
        return torch.zeros_like(leaf if not isinstance(leaf, DTensor) else leaf.full_tensor())
    if isinstance(leaf, DTensor):
        assert leaf.grad.placements == leaf.placements, leaf.grad.placements
        return leaf.grad.full_tensor()
    return leaf.grad


def objectives(reduction: str, rank: int, world: int) -> float:
    """Every objective: its value, the gradients of its rows, and those of a scale that every rank holds."""
    errors = []
    for mesh, placements in meshes(world):
        for case in CASES:
            if case.rows == 0 and reduction != "mean":
                continue
            plain = [t.detach() for t in case.rows_of(N, D, torch.float64)]
            arguments = case.arguments(0, N, D, plain[0]) | {"reduction": reduction}
            if len({t.shape[0] for t in plain[:2]}) > 1 or not {"pairs", "positives"}.isdisjoint(arguments):
                continue  # refused where rows are sharded
            numbers = {name: torch.tensor(float(arguments.get(name, v))).double() for name, v in case.scalars.items()}
            answers = []
            for placed in (False, True):
                put = partial(distribute_tensor, device_mesh=mesh, placements=placements) if placed else torch.clone
                rows = [
                    t.clone() if case.name == "moco" and i == 2 else put(t).requires_grad_()
                    for i, t in enumerate(plain)
                ]
                scalars = {name: t.clone().requires_grad_() for name, t in numbers.items()}
                if placed and len(errors) % 2:
                    scalars = {
                        name: distribute_tensor(t.detach(), mesh, [Replicate()] * mesh.ndim).requires_grad_()
                        for name, t in scalars.items()
                    }
                given = {
                    name: put(v) if isinstance(v, Tensor) and v.dim() and name not in KEPT else v
                    for name, v in arguments.items()
                }
                loss = getattr(functional, case.name)(*rows, **(given | scalars))
                loss = loss[0] if isinstance(loss, tuple) else loss
                if loss.dim():
                    weights = torch.arange(1.0, loss.shape[0] + 1.0)
                    loss = loss * (distribute_tensor(weights, mesh, loss.placements) if placed else weights)
                loss.sum().backward()
                value = loss.full_tensor() if placed else loss
                answers.append([value, *map(gradient, rows), *map(gradient, scalars.values())])
            errors.append(
                max(
                    distance(a, b, scale=max(1e-3, float(b.detach().abs().max())))
                    for a, b in zip(*reversed(answers), strict=True)
                )
            )
    return max(errors) / 10.0  # sums in another order


def primitive(rank: int, world: int) -> float:
    """pair_reduce and pair_total, with columns, biases, masks and every outer form."""
    errors = []
    x, y = random(N, D, seed=1), random(N, D, seed=2)
    bias, groups = random(N, seed=3), torch.arange(N) % 3
    calls: list[tuple[str, dict[str, Any]]] = [
        ("pair_reduce", {"columns": True, "bias_x": bias, "bias_y": bias}),
        ("pair_reduce", {"mask": "off_diagonal", "pair": "square", "reduce": "sum"}),
        ("pair_reduce", {"mask": fastcl.within_groups, "operand": "sqdist", "scale": -0.5}),
        ("pair_total", {"outer": "sum", "pair": "softplus", "reduce": "sum"}),
        ("pair_total", {"outer": "pooled", "mask": fastcl.across_groups}),
        ("pair_total", {"outer": "contrast", "positive": bias, "mask": "off_diagonal"}),
        ("pair_reduce", {"mask": fastcl.off_diagonal(1, 1, 3)}),
        ("pair_total", {"outer": "pooled", "mask": fastcl.off_diagonal(period=N - 2)}),
    ]
    for mesh, placements in meshes(world):
        for name, arguments in calls:
            for same in (False, True):
                if same and ("bias_x" in arguments):
                    continue
                answers = []
                for placed in (False, True):
                    put = partial(distribute_tensor, device_mesh=mesh, placements=placements) if placed else torch.clone
                    given = {k: put(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
                    if callable(given.get("mask")):
                        given["mask"] = given["mask"](put(groups))
                    leaves = [put(t).requires_grad_() for t in ((x,) if same else (x, y))]
                    scale = torch.tensor(arguments.get("scale", 0.8)).double().requires_grad_()
                    found = getattr(fastcl, name)(*leaves, **(given | {"scale": scale}))
                    parts = found if isinstance(found, tuple) else (found,)
                    sum(part.square().sum() for part in parts).backward()
                    whole = [part.full_tensor() if placed else part for part in parts]
                    answers.append([*whole, *map(gradient, leaves), scale.grad])
                errors.append(
                    max(
                        distance(a, b, scale=max(1e-3, float(b.detach().abs().max())))
                        for a, b in zip(*reversed(answers), strict=True)
                    )
                )
    return max(errors) / 10.0


def modules(rank: int, world: int) -> float:
    """Learned scales, plain or DTensors themselves (sharded ones too), below their bound and beyond it; MINC with its statistic."""
    errors = []
    x, y = random(N, D, seed=1, dtype=torch.float32), random(N, D, seed=2, dtype=torch.float32)
    bounded = partial(losses.CLIPLoss, logit_scale=5.0, largest_scale=6.0)
    made: list[Callable[[], nn.Module]] = [losses.CLIPLoss, bounded, losses.SigLIPLoss, partial(losses.MINCLoss, D)]
    for mesh, placements in meshes(world):
        for make in made:
            answers = []
            for placed in (False, True, Replicate(), Shard(0)):
                module = make()
                if make is bounded:
                    nn.init.constant_(module.logit_scale.log, 3.0)
                if not isinstance(placed, bool):
                    _distribute_parameters(module, mesh, [placed] * mesh.ndim)
                rows = [distribute_tensor(t, mesh, placements) if placed else t.clone() for t in (x, y)]
                rows = [t.requires_grad_() for t in rows]
                with pytest.MonkeyPatch.context() as patch:
                    if not placed:
                        patch.setattr(dist, "is_initialized", lambda: False)  # MINC's statistic asks
                    loss = module(*rows)
                loss.backward()
                kept = [module.statistic, module.value] if isinstance(module, losses.MINCLoss) else []
                value = loss.full_tensor() if placed else loss
                answers.append([value, *kept, *map(gradient, [*rows, *module.parameters()])])
            learned = [name for name, _ in module.named_parameters()]  # sums of terms of 1, which cancel
            for answer in answers[1:]:
                for k, (found, want) in enumerate(zip(answer, answers[0], strict=True)):
                    least = 1.0 if k >= len(answers[0]) - len(learned) else 1e-3
                    errors.append(distance(found, want, scale=max(least, float(want.detach().abs().max()))))
    return max(errors) / 10.0


def _distribute_parameters(module: nn.Module, mesh: DeviceMesh, placements: list[Any]) -> None:
    """Each as a DTensor, as fully_shard and parallelize_module leave them."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))


def refused(rank: int, world: int) -> float:
    """One clear error for everything else."""
    mesh = init_device_mesh("cpu", (world,))
    x = random(N, D, seed=1)
    rows, whole = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(x, mesh, [Replicate()])
    wide, partial_ = distribute_tensor(x, mesh, [Shard(1)]), DTensor.from_local(x, mesh, [Partial()])
    calls: list[tuple[str, Callable[[], Any]]] = [
        (
            "x: expected a DTensor that is replicated, or whose rows one mesh dimension shards",
            lambda: functional.clip(wide, wide, logit_scale=2.0),
        ),
        ("x: expected a DTensor that is replicated, or whose rows", lambda: fastcl.pair_reduce(partial_)),
        ("y: expected a DTensor, as x is one, got a plain tensor", lambda: functional.info_nce(rows, x)),
        ("y: expected the mesh and placements of x", lambda: functional.info_nce(rows, whole)),
        ("groups: expected a DTensor", lambda: functional.info_nce(rows, rows, groups=torch.arange(N))),
        ("y: expected as many rows as x", lambda: fastcl.pair_reduce(rows, distribute_tensor(x[1:], mesh, [Shard(0)]))),
        ("pairs: expected None where rows are sharded", lambda: functional.clip(rows, rows, logit_scale=2.0, pairs=3)),
        (
            "positives: expected None where rows are sharded",
            lambda: functional.info_nce(rows, rows, positives=(torch.arange(2), torch.arange(2))),
        ),
        ("mask: expected equal offsets", lambda: fastcl.pair_reduce(rows, rows, mask=fastcl.off_diagonal(1, 0))),
        (
            "group: rows that are DTensors bring their own",
            lambda: functional.info_nce(whole, whole, group=dist.group.WORLD),
        ),
        (
            "statistic: expected a plain tensor or a replicated DTensor",
            lambda: functional.minc(rows, rows, distribute_tensor(torch.eye(D), mesh, [Shard(0)])),
        ),
        ("x: expected a plain tensor, got a DTensor", lambda: fastcl.metrics.uniformity(rows)),
        ("gradient: expected one of", lambda: functional.info_nce(rows, rows, group=fastcl.Ranks(None, "dpp"))),
    ]
    for message, call in calls:
        with pytest.raises((ValueError, TypeError), match=message.split("(")[0]):
            call()
    assert functional.info_nce(rows, rows, group=mesh).full_tensor().isfinite()
    return 0.0


CHECKS: dict[str, Callable[[int, int], float]] = {
    **{f"dtensors, objectives, {reduction}": partial(objectives, reduction) for reduction in ("mean", "none")},
    "dtensors, primitive": primitive,
    "dtensors, modules": modules,
    "dtensors, refused": refused,
}
