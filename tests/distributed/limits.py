"""Limits of logits and of guides over ranks: the primitive, and the losses that take a margin, against one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import distributed as dist

from fastcl import Ranks, functional
from tests.objectives.test_false_negatives import SETTINGS

from . import primitive
from .shards import LAYOUTS, cut, distance, random

REDUCTIONS = ("logsumexp", "softplus of sqdist", "identity", "square")
LOGARITHMS = ("columns", "biased", "same", "pooled", "contrast")
SUMS = ("columns", "same", "same total", "total")
MARGINS = ((-0.2, "absolute"), (-0.5, "relative"))


def loss(
    name: str, strategy: str, layout: str, margin: float, relative: str, guided: bool, rank: int, world: int
) -> float:
    """The error of this rank's value and gradients, over the tolerance."""
    sizes = LAYOUTS[layout](world)
    whole = [random(sum(sizes), 4, seed=1).requires_grad_()]
    whole.append((whole[0].detach() + 0.7 * random(sum(sizes), 4, seed=2)).requires_grad_())
    own = [cut(t, sizes, rank) for t in whole]
    arguments: dict[str, Any] = SETTINGS[name] | {"false_negative_margin": margin, "margin_strategy": relative}
    guides = [random(sum(sizes), 6, seed=3)]
    guides.append(guides[0] + 0.7 * random(sum(sizes), 6, seed=4))
    all_guides, own_guides = (guides, [cut(t, sizes, rank) for t in guides]) if guided else (None, None)
    objective, group = getattr(functional, name), Ranks(dist.group.WORLD, "exact", strategy)
    theirs, ours = (
        objective(*whole, **arguments, guide=all_guides),
        objective(*own, **arguments, guide=own_guides, group=group),
    )
    theirs.backward()
    ours.backward()
    errors = [distance(ours, theirs, scale=max(1.0, float(theirs.abs())))]
    for mine, t in zip(own, whole, strict=True):
        errors.append(distance(mine.grad, cut(t.grad, sizes, rank), scale=float(t.grad.abs().max())))
    return max(errors)


def _all() -> dict[str, Callable[[int, int], float]]:
    layouts, margins = cycle(LAYOUTS), cycle(MARGINS)
    checks: dict[str, Callable[[int, int], float]] = {}
    for reduction, strategy in product(REDUCTIONS, primitive.STRATEGIES):
        for form in LOGARITHMS if reduction == "logsumexp" else SUMS:
            for mask in primitive.LIMITED:
                layout = next(layouts)
                checks[f"limits, {reduction}, {form}, {mask}, {strategy}, {layout}"] = partial(
                    primitive.check, reduction, form, mask, strategy, layout, torch.float64
                )
    for name, strategy, guided in product(SETTINGS, primitive.STRATEGIES, (False, True)):
        layout, margin = next(layouts), next(margins)
        told = "guide, " if guided else ""
        checks[f"margin, {told}{name}, {strategy}, {layout}"] = partial(loss, name, strategy, layout, *margin, guided)
    return checks


CHECKS = _all()
