"""One rank's mistake is everybody's error, the same one; what is asked for in vain is refused before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import distributed as dist

from fastcl import Ranks, functional, losses
from fastcl.dropin import lightly, open_clip
from tests.objectives.cases import CASES

from .shards import cut, random

D = 6


def mistakes(rank: int, world: int) -> float:
    """One rank's mistake is the same error on every rank, and the group goes on working."""
    if world == 1:
        return 0.0
    odd = rank == world - 1
    x, y = random(4, D, seed=rank), random(4, D, seed=rank + 9)
    group = dist.group.WORLD
    keys = losses.MoCoQueue(D, 8)
    short = torch.arange(3 if odd else 4)
    distill = open_clip.DistillClipLoss(rank=rank, world_size=world, gather_with_grad=True)
    coca, tokens = open_clip.CoCaLoss(1.0, 1.0, rank=rank, world_size=world), torch.ones(4, 3 + odd, 5)
    nested = losses.MatryoshkaLoss(losses.NTXentLoss(group=group), (2, D))
    by_call = losses.MatryoshkaLoss(partial(functional.clip, logit_scale=9.0, group=group), (2, D))
    kept = losses.FastCLIPLoss(9, group=group)
    calls: dict[str, Callable[[], Any]] = {
        "objective: expected the same on every rank": lambda: (functional.nt_xent if odd else functional.info_nce)(
            x, y, temperature=0.5, group=group
        ),
        "x: expected the same on every rank, got float64": lambda: functional.info_nce(
            *((x.float(), y.float()) if odd else (x, y)), group=group
        ),
        "got float64 (rows, 6)": lambda: functional.info_nce(*((x[:, :4], y[:, :4]) if odd else (x, y)), group=group),
        "temperature: expected the same on every rank, got 0.1 on rank 0": lambda: functional.info_nce(
            x, y, temperature=0.2 if odd else 0.1, group=group
        ),
        "strategy: expected the same": lambda: functional.info_nce(x, y, group=Ranks(group, strategy="ring" if odd else "gather")),
        "autocast: expected the same on every rank, got 'bfloat16'": lambda: under(
            torch.float16 if odd else torch.bfloat16, lambda: functional.clip(x.float(), y.float(), logit_scale=9.0, group=group)
        ),
        "autocast: expected the same on every rank, got 'off'": lambda: under(
            torch.float16 if odd else None, lambda: losses.MINCLoss(D)(x.float(), y.float())
        ),
        "with gradient": lambda: functional.info_nce(x.clone().requires_grad_(odd), y, group=group),
        f"groups: expected shape (4,), one group for each row of the longer side, got (3,) (on rank {world - 1}": (
            lambda: functional.info_nce(x.detach(), y, groups=short, group=group)
        ),
        "y: expected at least one row": lambda: functional.info_nce(x.detach(), y[:2] if odd else y, group=group),
        f"guide: expected the same on every rank, got None on rank 0 and tensors on rank {world - 1}": lambda: functional.info_nce(
            x, y, false_negative_margin=0.1, guide=(x, y) if odd else None, group=group
        ),
        "guide[1]: expected the same on every rank, got float64 (rows, 6)": lambda: functional.clip(
            x, y, logit_scale=9.0, false_negative_margin=0.1, guide=(x, y[:, :4] if odd else y), group=group
        ),
        f"guide[0]: expected one row for each of the first view, 4, got 3 (on rank {world - 1}": lambda: functional.nt_xent(
            x, y, false_negative_margin=0.1, guide=(x[:3] if odd else x, y), group=group
        ),
        "temperature: expected a number > 0": lambda: functional.info_nce(x, y, temperature=-1.0, group=group),
        "info_nce(): missing a required argument: 'y'": lambda: functional.info_nce(*((x,) if odd else (x, y)), group=group),
        "info_nce(): got an unexpected keyword argument 'grops'": lambda: losses.InfoNCELoss(group=group)(
            x, y, **({"grops": short} if odd else {})
        ),
        f"or call fastcl.functional.clip (on rank {world - 1} of {world})": lambda: losses.CLIPLoss(group=group)(
            x, y, **({"logit_scale": 5.0} if odd else {})
        ),
        "gamma: expected as a setting of the module, got it at its call": lambda: kept(
            x, y, torch.arange(4), **({"gamma": 0.5} if odd else {})
        ),
        "log_u: expected what FastCLIPLoss keeps, got it at its call": lambda: kept(
            x, y, torch.arange(4), **({"log_u": x} if odd else {})
        ),
        "mu: expected as a setting of the module, got it at its call": lambda: losses.MINCLoss(D)(
            x, y, **({"mu": 2.0} if odd else {})
        ),
        "y: expected the same on every rank, got float64 (rows, 6) on cpu on rank 0 and nested": lambda: functional.info_nce(
            x, torch.nested.nested_tensor([*y], layout=torch.jagged) if odd else y, group=group
        ),
        "y: expected a dense tensor": lambda: functional.info_nce(x, y.to_sparse(), group=group),
        "x: expected the same on every rank, got float64 (rows, 6) on cpu on rank 0 and array": (
            lambda: functional.info_nce(x.numpy() if odd else x, y, group=group)
        ),
        "x: expected the same on every rank, got float64 (rows, 6) on cpu on rank 0 and float64 (rows, 6) on meta": (
            lambda: functional.info_nce(*((x.to("meta"), y.to("meta")) if odd else (x, y)), group=group)
        ),
        "fastcl: group= works with .backward()": lambda: torch.func.jvp(
            lambda a: functional.info_nce(a, y, group=group), (x,), (y,)
        ),
        "group= works with .backward()": lambda: (torch.func.grad if odd else lambda f: f)(
            lambda a: functional.info_nce(a, y, group=group)
        )(x),
        "strategy: expected one of": lambda: functional.info_nce(x, y, group=Ranks(group, strategy="rign")),
        "u: expected the same on every rank, got float64 (rows, 6)": lambda: losses.MINCLoss(D)(
            *((x[:, :4], y[:, :4]) if odd else (x, y))
        ),
        "u: expected rows of the statistic's width, d = 4": lambda: losses.MINCLoss(4)(x, y),
        "second_moment(): missing a required argument: 'v'": lambda: losses.MINCLoss(D)(*((x,) if odd else (x, y))),
        "target_u: expected rows of the width of u": lambda: losses.MINCLoss(D)(x, y, target_u=x[:, :4]),
        "k: expected the same on every rank, got float64 (rows, 4) on cpu on rank 0": lambda: keys.enqueue(x if odd else x[:, :4]),
        "k: expected rows of the queue's width, d = 6, got d = 4": lambda: keys.enqueue(x[:, :4]),
        "k: expected float64, float32, bfloat16 or float16, got int64": lambda: keys.enqueue(x.long()),
        "MoCoQueue.enqueue(): missing a required argument: 'k'": lambda: keys.enqueue(*(() if odd else (x,))),
        "index: expected samples of the data set, 0 to 8, got 1 outside": lambda: kept(x, y, torch.arange(4) + 6 * odd),
        "index: expected shape (4,), one group for each row of x, got (3,)": lambda: kept(x, y, short),
        "sogclr(): missing a required argument: 'index'": lambda: losses.SogCLRLoss(9, group=group)(
            x, y, *(() if odd else (short,))
        ),
        "length: expected the same on every rank, got 8": lambda: losses.MoCoQueue(D, 9 if odd else 8).enqueue(x),
        "training: expected the same on every rank, got True on rank 0 and False": lambda: losses.SogCLRLoss(9, group=group).train(
            not odd
        )(x, y, torch.arange(4)),
        "training: expected the same on every rank, got False on rank 0 and True": lambda: losses.MINCLoss(D, group=group).train(
            odd
        )(x, y),
        f"on rank 0 and float64 (rows, 5) on cpu on rank {world - 1}; make": lambda: nested(*(t[:, : D - odd] for t in (x, y))),
        "rows[1]: expected the same on every rank, got float64 (rows, 6)": lambda: by_call(x, y[:, :5] if odd else y),
        "rows[1]: expected at least 6 columns, the largest of dims, got 5": lambda: nested(x, y[:, :5]),
        "rows[1]: expected a dense tensor": lambda: nested(x, y.to_sparse()),
        "rows[0]: expected the same on every rank, got float64 (rows, 6) on cpu on rank 0 and nothing": lambda: nested(
            *(() if odd else (x, y))
        ),
        "rows[0]: expected the same on every rank, got float64 (rows, 6) on cpu on rank 0 and [[": lambda: nested(
            x.tolist() if odd else x, y
        ),
        "weights: expected the same on every rank, got (1.0, 2.0) on rank 0 and (2.0, 1.0)": lambda: losses.MatryoshkaLoss(
            losses.NTXentLoss(group=group), (2, D), (2.0, 1.0) if odd else (1.0, 2.0)
        )(x, y),
        "dims: expected the same on every rank, got (2, 6) on rank 0 and (3, 6)": lambda: losses.MatryoshkaLoss(
            losses.InfoNCELoss(group=Ranks(group)), (3 if odd else 2, D)
        )(x, y),
        "rows[0]: expected the same on every rank, got float64 (rows, 6) on cpu on rank 0 and float64 (rows, 5)": (
            lambda: losses.MatryoshkaLoss([losses.MINCLoss(2), losses.MINCLoss(D)], (2, D))(*(t[:, : D - odd] for t in (x, y)))
        ),
        "dist_image_features: expected the same on every rank, got float64 (rows, 6)": lambda: distill(
            x, y, 9.0, *(t[:, : D - odd] for t in (x, y)), 9.0
        ),
        "dist_text_features: expected the same on every rank, got float64 (rows, 6)": lambda: distill(
            x, y, 9.0, x, y.float() if odd else y, 9.0
        ),
        f"dist_image_features: expected one row for each row of image_features, 4, got 3 (on rank {world - 1}": lambda: distill(
            x, y, 9.0, *(t[: 4 - odd] for t in (x, y)), 9.0
        ),
        "dist_logit_scale: expected the same on every rank, got 9.0": lambda: distill(x, y, 9.0, x, y, 8.0 if odd else 9.0),
        f"logits: expected shape (n, positions, vocabulary), got (4, 5); pass all positions (on rank {world - 1}": lambda: coca(
            x, y, tokens[:, 0] if odd else tokens, tokens[..., 0].long(), 9.0
        ),
        f"out1: expected the shape of out0, (4, 6), got (4, 5) (on rank {world - 1}": lambda: lightly.DirectCLRLoss(
            5, gather_distributed=True
        )(x, y[:, : D - odd]),
        "rank is torch.distributed's: expected the same on every rank, got True on rank 0 and False": lambda: open_clip.SigLipLoss(
            rank=0 if odd else rank, world_size=world
        )(x, y, 9.0, 0.0),
        f"dhel: expected at least 2 rows, or there is no pair of different rows, got {1}": (
            lambda: functional.dhel(x[: int(odd)], y[: int(odd)], group=group)
        ),
    }  # fmt: skip
    for part, call in calls.items():
        message = says(part, call)
        if part.startswith(("logits: expected shape", "out1: expected the shape")):  # as in one process
            assert message.startswith("ValueError"), message
        messages: list[Any] = [None] * world
        dist.all_gather_object(messages, message)
        assert len(set(messages)) == 1, messages
        assert functional.info_nce(x.detach(), y, group=group).isfinite()
    assert not keys.position and not kept.log_u.isfinite().any(), "a call that failed moved the state"
    return 0.0


def under(dtype: torch.dtype | None, call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        return call()


def says(part: str, call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(part)) as error:
        call()
    return f"{error.type.__name__}: {error.value}"


def second_derivatives(rank: int, world: int) -> float:
    """No objective lets create_graph=True pass, on any backend, whether its upstream gradient wants a gradient or not."""
    if world == 1:
        return 0.0
    turns = cycle(product(("gather", "ring"), ("reference", "auto")))
    for case, reduction in product(CASES, ("mean", "sum", "none")):
        if (case.rows == 0 and reduction != "mean") or (case.name in ("alignment", "moco") and reduction == "none"):
            continue  # the latter send nothing, and have second derivatives
        rows = case.rows_of(2 * world, D, torch.float64)
        own = [cut(t, [2] * world, rank) for t in rows]
        strategy, backend = next(turns)
        arguments = case.arguments(0, 2, D, own[0]) | {"reduction": reduction, "backend": backend}
        loss = getattr(functional, case.name)(*own, **arguments, group=Ranks(dist.group.WORLD, strategy=strategy))
        loss = loss[0] if isinstance(loss, tuple) else loss
        with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
            torch.autograd.grad(loss.sum(), own, create_graph=True, allow_unused=True)
    x = random(4, D, seed=rank)
    for loss in (functional.clip, functional.uniformity, functional.spectral):
        of = partial(loss, **({"logit_scale": 3.0} if loss is functional.clip else {}), group=dist.group.WORLD)
        once = (lambda t, of=of: of(t)) if loss is functional.uniformity else (lambda t, of=of: of(t, x))
        with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
            torch.autograd.functional.hessian(once, x)
        leaf = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
            torch.autograd.gradgradcheck(once, leaf)
        with pytest.raises(RuntimeError, match="several gradients at once"):
            torch.autograd.grad(once(leaf), leaf, torch.ones(2, dtype=x.dtype), is_grads_batched=True)
    return 0.0


CHECKS: dict[str, Callable[[int, int], float]] = {"mistakes": mistakes, "second derivatives": second_derivatives}
