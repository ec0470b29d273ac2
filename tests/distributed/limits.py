"""Limits of logits over ranks: the primitive, and the losses that take a margin, against one process with the whole batch."""

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


def loss(name: str, strategy: str, layout: str, margin: float, relative: str, rank: int, world: int) -> float:
    """The error of this rank's value and gradients, over the tolerance."""
    sizes = LAYOUTS[layout](world)
    whole = [random(sum(sizes), 4, seed=1).requires_grad_()]
    whole.append((whole[0].detach() + 0.7 * random(sum(sizes), 4, seed=2)).requires_grad_())
    own = [cut(t, sizes, rank) for t in whole]
    arguments: dict[str, Any] = SETTINGS[name] | {"false_negative_margin": margin, "margin_strategy": relative}
    objective = getattr(functional, name)
    theirs, ours = (
        objective(*whole, **arguments),
        objective(*own, **arguments, group=Ranks(dist.group.WORLD, "exact", strategy)),
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
            layout = next(layouts)
            checks[f"limits, {reduction}, {form}, {strategy}, {layout}"] = partial(
                primitive.check, reduction, form, "limited", strategy, layout, torch.float64
            )
    for name, strategy in product(SETTINGS, primitive.STRATEGIES):
        layout, margin = next(layouts), next(margins)
        checks[f"margin, {name}, {strategy}, {layout}"] = partial(loss, name, strategy, layout, *margin)
    return checks


CHECKS = _all()
