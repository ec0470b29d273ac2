"""The pairwise reduction over ranks against that of one process: values and all gradients, for every way to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

import fastcl
from fastcl.distributed import Shards
from fastcl.distributed.wire import Wire
from fastcl.equation.intrinsics import sigmoid
from fastcl.pairs import PairFunction

from .shards import LAYOUTS, cut, distance, random

D = 3


@dataclass(frozen=True)
class Swish(PairFunction, name="swish_of_a_test"):
    """z sigmoid(w z), as a user writes it: no kernel knows it."""

    w: float

    @staticmethod
    def value(z: Any, w: Any) -> Any:
        return z * sigmoid(w * z)


del PairFunction.registry[Swish.name]  # errors that list the names know those of fastcl alone

STRATEGIES = ("gather", "ring")
REDUCTIONS: dict[str, dict[str, Any]] = {
    "logsumexp": {},
    "exp": {"pair": "exp", "reduce": "sum"},
    "softplus of sqdist": {"pair": "softplus", "reduce": "sum", "operand": "sqdist", "scale": -0.7},
    "logsumexp of sqdist": {"operand": "sqdist", "scale": -0.7},
    "identity": {"pair": "identity", "reduce": "sum"},
    "identity of sqdist": {"pair": "identity", "reduce": "sum", "operand": "sqdist", "scale": -0.7},
    "square": {"pair": "square", "reduce": "sum"},
    "one's own": {"pair": Swish(1.5), "reduce": "sum"},
}
FORMS = ("rows", "columns", "biased", "same", "same total", "total", "pooled", "contrast")
MASKS = ("all", "off_diagonal", "across_groups", "within_groups", "one group")
LIMITED = ("limited", "guided")  # these are for limits.py


def check(
    reduction: str, form: str, mask: str, strategy: str, layout: str, dtype: torch.dtype, rank: int, world: int
) -> float:
    """The error of this rank's values and gradients, over the tolerance."""
    sizes = LAYOUTS[layout](world)
    n, same = sum(sizes), form.startswith("same")
    extra = (
        0 if same or mask in ("off_diagonal", *LIMITED) else 2
    )  # as many columns as rows where own pairs are left out
    whole = {"x": F.normalize(random(n, D, seed=1, dtype=dtype)).requires_grad_()}
    if not same:
        whole["y"] = F.normalize(random(n + extra, D, seed=2, dtype=dtype)).requires_grad_()
    if form == "biased":
        whole["bias_x"] = random(n, seed=3, dtype=dtype).requires_grad_()
        whole["bias_y"] = random(n + extra, seed=4, dtype=dtype).requires_grad_()
    settings = dict(REDUCTIONS[reduction])
    scalars = {
        "scale": torch.tensor(settings.pop("scale", 0.9), dtype=dtype, requires_grad=True),
        "shift": torch.tensor(0.2, dtype=dtype, requires_grad=True),
    }
    weights = random(n, seed=5, dtype=dtype), random(n + extra, seed=6, dtype=dtype)
    groups = (torch.zeros(n + extra) if mask == "one group" else torch.arange(n + extra) % 3).long()
    own = {name: cut(t, sizes, rank) for name, t in whole.items()}
    own_scalars = {name: t.detach().clone().requires_grad_() for name, t in scalars.items()}
    mine = own["x"].shape[0]
    shards = Shards(Wire(dist.group.WORLD), (tuple(sizes), _columns(sizes, extra)), strategy)

    def value(engine: Any, t: dict[str, Tensor], s: dict[str, Tensor], w: tuple[Tensor, Tensor], g: Tensor) -> Any:
        gx = g[: t["x"].shape[0]] if engine is fastcl or not same else g
        kept = _mask(mask, gx, g if not same else None)
        if mask in LIMITED:
            of_x, of_y = (
                torch.stack([torch.cos(7.0 * v), torch.sin(5.0 * v), v], 1) for v in w
            )  # each row's own, however cut
            guide = None if mask == "limited" else of_x if same else (of_x, of_y)
            kept = fastcl.at_most(w[0], None if same else w[1], guide=guide, mask=kept)
        call = {**t, **s, **settings, "mask": kept}
        if form in ("total", "same total"):
            return engine.pair_total(**call, outer="sum"), ()
        if form == "pooled":
            return engine.pair_total(**call, outer="pooled"), ()
        if form == "contrast":
            return engine.pair_total(**call, outer="contrast", positive=w[0]), ()
        found = engine.pair_reduce(**call, columns=form in ("columns", "biased"))
        parts = found if isinstance(found, tuple) else (found,)
        # What visits nothing is -inf; its weight would make the sum infinite.
        return sum((part[part.isfinite()] * v[part.isfinite()]).sum() for part, v in zip(parts, w, strict=False)), parts

    theirs = _answer(value, fastcl, whole, scalars, weights, groups)
    exact = theirs
    if dtype != torch.float64:
        wide = [
            {name: t.detach().double().requires_grad_() for name, t in leaves.items()} for leaves in (whole, scalars)
        ]
        exact = _answer(value, fastcl, *wide, tuple(w.double() for w in weights), groups)
    start = sum(sizes[:rank])
    stop = start + own.get("y", own["x"]).shape[0]
    cuts = {"x": slice(start, start + mine), "y": slice(start, stop)}
    ours = _answer(value, shards, own, own_scalars, tuple(w[c] for w, c in zip(weights, cuts.values(), strict=True)),
                   groups[cuts["x" if same else "y"]])  # fmt: skip
    # All ranks hold the same total: the rule gives world times its gradient.
    held = 1.0 if form in ("rows", "columns", "biased", "same") else float(world)
    parts = [
        exact[name][exact[name].isfinite()] * w[exact[name].isfinite()]
        for name, w in zip("rc", weights, strict=True)
        if name in exact
    ]
    exact_terms = float(sum((part.abs().sum() for part in parts), start=torch.zeros(())))
    errors = []
    for name, found in ours.items():
        rows: Any = ...
        least = 2.0 * n if reduction.startswith("identity") else 0.0  # what cancels when everything is left out
        if found.dim() and not name.startswith("d scale"):
            rows = cuts["x" if name in ("r", "d x", "d bias_x") else "y"]
        if name in ("d scale", "d shift"):
            dist.all_reduce(found)
            # Both are sums over rows, of either sign: they round by what is added up, and not by what is left of it.
            least = max(least, float(exact["value"].abs()), exact_terms)
        if name.startswith("d "):
            found = found / held
        if name == "value" and held == 1.0:
            continue
        errors.append(distance(found, theirs[name][rows], exact[name][rows], _scale(exact[name], least)))
    return max(errors)


def _answer(value: Any, engine: Any, leaves: Any, scalars: Any, weights: Any, groups: Tensor) -> dict[str, Tensor]:
    """The value, what the reduction returned, and the gradients."""
    answer, parts = value(engine, leaves, scalars, weights, groups)
    answer.backward()
    found = {"value": answer.detach()} | dict(zip("rc", parts, strict=False))
    return found | {f"d {name}": t.grad for name, t in (leaves | scalars).items()}


def _scale(t: Tensor, least: float = 0.0) -> float:
    t = t.detach()
    finite = t[t.isfinite()]
    return max(least, float(finite.abs().max()) if finite.numel() else 0.0)


def _columns(sizes: list[int], extra: int) -> tuple[int, ...]:
    return (*sizes[:-1], sizes[-1] + extra)


def _mask(name: str, gx: Tensor, gy: Tensor | None) -> str | fastcl.Mask:
    if name in ("all", "off_diagonal", *LIMITED):
        return "off_diagonal" if name in LIMITED else name
    if name == "within_groups":
        return fastcl.within_groups(gx, gy)
    return fastcl.across_groups(gx, gy)


def _makes_sense(reduction: str, form: str, mask: str) -> bool:
    if form in ("pooled", "contrast") and not reduction.startswith("logsumexp"):
        return False
    return not (mask == "one group" and form in ("pooled", "total", "same total") and reduction.startswith("logsumexp"))


def _all() -> dict[str, Callable[[int, int], float]]:
    """Every combination, the layouts and dtypes taking turns: each meets every reduction, form, mask and strategy."""
    turns = cycle(
        [
            ("even", torch.float64),
            ("uneven", torch.float64),
            ("with an empty one", torch.float64),
            ("uneven", torch.float32),
        ]
    )
    checks: dict[str, Callable[[int, int], float]] = {}
    for reduction, form, mask, strategy in product(REDUCTIONS, FORMS, MASKS, STRATEGIES):
        if _makes_sense(reduction, form, mask):
            layout, dtype = next(turns)
            name = f"{reduction}, {form}, {mask}, {strategy}, {layout}, {str(dtype).removeprefix('torch.')}"
            checks[name] = partial(check, reduction, form, mask, strategy, layout, dtype)
    return checks


CHECKS = _all()
