"""Each backend over ranks: a normaliser of the whole batch weighs the pairs of every visit, however far from 0 it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastcl import Ranks, functional

from .shards import LAYOUTS, cut, distance, random

D = 5
TAU = 0.7
# With the rows that it takes, and its temperature.
LOSSES: dict[str, tuple[Callable[..., Tensor], int, str | None]] = {
    "clip": (lambda *rows, tau=0.5, **how: functional.clip(*rows, logit_scale=1.0 / tau, **how), 2, "tau"),
    "info_nce": (functional.info_nce, 2, "temperature"),
    "nt_xent": (functional.nt_xent, 2, "temperature"),
    "dhel": (functional.dhel, 2, "temperature"),
    "dcl": (functional.dcl, 2, "temperature"),
    "debiased": (functional.debiased, 2, "temperature"),
    "hard_negative": (functional.hard_negative, 2, "temperature"),
    "moco_v3": (functional.moco_v3, 4, "temperature"),
    "uniformity": (functional.uniformity, 1, None),
    "align_uniform": (functional.align_uniform, 2, None),
}


def check(backend: str, dtype: torch.dtype, large: bool, rank: int, world: int) -> float:
    """Values and gradients of every log-sum-exp loss are those of one process, by the definition in float64."""
    sizes, errors = LAYOUTS["uneven"](world), []
    for turn, (loss, views, temperature) in enumerate(LOSSES.values()):
        if large and temperature is None:
            continue  # distances of long rows cancel in float32, over ranks or not
        # Rows up to 30 long, some of which meet each other only: their log-sum-exp is 900 / tau and more, others' is small.
        long = torch.where(torch.arange(sum(sizes)) % 3 == 1, 30.0 if large else 1.0, 1.0).unsqueeze(1)
        rows = [(random(sum(sizes), D, seed=turn + i) * long).to(dtype) for i in range(views)]
        # In float32 z and its normaliser are each rounded by up to 2^-24 of the largest z: so far off is each weight.
        largest = max(float(t.double().square().sum(1).max()) for t in rows) / TAU
        rounding = max(1.0, 2.0 * largest * 2.0**-24 / 1e-6)
        how: dict[str, Any] = {"normalize": False}
        if temperature is not None:
            how[temperature] = TAU
        whole = [t.double().requires_grad_() for t in rows]
        expected = loss(*whole, **how, backend="reference")
        expected.backward()
        for strategy in ("gather", "ring"):
            own = [cut(t, sizes, rank).requires_grad_() for t in rows]
            found = loss(*own, **how, backend=backend, group=Ranks(dist.group.WORLD, "exact", strategy))
            found.backward()
            errors.append(distance(found, expected.to(dtype), scale=max(1.0, float(expected.detach().abs()))))
            for mine, t in zip(own, whole, strict=True):
                wanted = torch.zeros_like(t) if t.grad is None else t.grad
                given = torch.zeros_like(mine) if mine.grad is None else mine.grad
                scale = max(1e-3, float(wanted.abs().max())) * rounding
                errors.append(distance(given, cut(wanted, sizes, rank).to(dtype), scale=scale))
    return max(errors)


CHECKS: dict[str, Callable[[int, int], float]] = {
    f"backend {backend}, {str(dtype).removeprefix('torch.')}{', large' if large else ''}": partial(
        check, backend, dtype, large
    )
    for backend in ("reference", "blocked", "auto")
    for dtype in (torch.float64, torch.float32)
    for large in (False, True)
    if not (backend == "auto" and dtype == torch.float32 and large)
}
