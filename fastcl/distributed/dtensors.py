"""Rows that are DTensors: what every rank holds is one batch already, rows that are sharded make group= of their mesh dimension.

The answer is a DTensor of the same mesh, and gradients are those of one program, of the placements of what they are for; a plain
tensor of one element (a temperature, a learned scale) gets its whole gradient on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..equation.checks import is_dtensor
from ..equation.masks import Mask, by_groups
from ..precision import stacked
from .agreement import COUNTS
from .derivatives import Passed
from .pairs import MASKING
from .ranks import Ranks, check_settings, process_group
from .shards import Shards
from .wire import Wire

HELD_WHOLE = ("queue", "statistic")  # what every rank has whole, whatever its rows are
OWN_VALUES = "own_values"  # the attribute of an objective whose rows have several
VECTORS = ("bias_x", "bias_y", "positive")  # of the primitive: one number for each row

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Placement:
    """Where rows are: on a mesh, whose dimension `sharded` shards them (None: every rank has all)."""

    mesh: Any
    sharded: int | None

    @classmethod
    def of(cls, rows: dict[str, Any]) -> Placement:
        """That of all rows of a call.

        Raises:
            TypeError: some rows are DTensors, and some are not.
            ValueError: for placements that differ, or are anything but Replicate and one Shard(0).
        """
        from torch.distributed.tensor import Replicate, Shard

        name, first = next((name, t) for name, t in rows.items() if is_dtensor(t))
        on = [i for i, p in enumerate(first.placements) if type(p) is Shard and p.dim == 0]
        others = [p for i, p in enumerate(first.placements) if i not in on]
        if len(on) > 1 or not all(isinstance(p, Replicate) for p in others):
            raise ValueError(
                f"{name}: expected a DTensor that is replicated, or whose rows one mesh dimension shards (Shard(0)), got "
                f"{first.placements}; redistribute it, e.g. {name}.redistribute(placements=[Shard(0)])"
            )
        for other, t in rows.items():
            if not is_dtensor(t):
                raise TypeError(
                    f"{other}: expected a DTensor, as {name} is one, got a plain tensor; pass both as DTensors, or both as plain"
                )
            if (t.device_mesh, t.placements) != (first.device_mesh, first.placements):
                raise ValueError(
                    f"{other}: expected the mesh and placements of {name}, {first.placements} on {first.device_mesh}, got "
                    f"{t.placements} on {t.device_mesh}; redistribute one of them"
                )
            if on and t.shape[0] != first.shape[0]:
                raise ValueError(
                    f"{other}: expected as many rows as {name}, {first.shape[0]}, where they are sharded, got {t.shape[0]}; "
                    "redistribute them with placements=[Replicate()]"
                )
        return cls(first.device_mesh, on[0] if on else None)

    @property
    def group(self) -> Any:
        """The ranks over which rows are sharded; None for none."""
        return None if self.sharded is None else self.mesh.get_group(self.sharded)

    def check_group(self, group: Any) -> None:
        """A group given beside says the same."""
        if group is None:
            return
        if self.group is None or set(dist.get_process_group_ranks(process_group(group))) != set(
            dist.get_process_group_ranks(self.group)
        ):
            raise ValueError(
                "group: rows that are DTensors bring their own, the mesh dimension that shards them; leave group out (None)"
            )

    def number(self, t: Tensor) -> Tensor:
        """A tensor of one element, whose gradient is the sum of all ranks' shares of it."""
        t = local_number(t)
        return t if self.group is None or not t.requires_grad else Passed.apply(t, Wire(self.group).summed)

    def wrapped(self, answer: Tensor, rows: int, count: int = 1) -> Tensor:
        """The answer as a DTensor: what all ranks hold alike, or `count` values for each own row, of `rows` rows in all."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        everywhere = [Replicate()] * self.mesh.ndim
        if answer.dim() != 1 or self.sharded is None:
            return DTensor.from_local(answer, self.mesh, everywhere, run_check=False)
        placements = [Shard(0) if i == self.sharded else Replicate() for i in range(self.mesh.ndim)]
        views = answer.chunk(count) if answer.shape[0] else [answer] * count
        placed: list[Tensor] = [
            DTensor.from_local(v, self.mesh, placements, run_check=False, shape=torch.Size([rows]), stride=(1,))
            for v in views
        ]
        return placed[0] if len(placed) == 1 else stacked(*placed)  # the views of all ranks, one after the other


def replicated(t: Tensor) -> Tensor:
    """A DTensor of one element, which a rank holds whole and others not at all where it is sharded, on every rank."""
    if not is_dtensor(t):
        return t
    from torch.distributed.tensor import Replicate

    whole: Tensor = t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)  # type: ignore[attr-defined]
    return whole


def local_number(t: Tensor) -> Tensor:
    """A DTensor of one element as a plain tensor, with the gradient of this process."""
    if not is_dtensor(t):
        return t
    whole: Tensor = replicated(t).to_local()  # type: ignore[attr-defined]
    return whole


def own_values(count: int) -> Callable[[F], F]:
    """Says of an objective that each row has so many values under reduction="none", where that is not one."""

    def say(function: F) -> F:
        setattr(function, OWN_VALUES, count)
        return function

    return say


def is_number(t: Any) -> bool:
    """Whether this is a tensor for one number, rather than for rows."""
    return isinstance(t, Tensor) and t.is_floating_point() and t.dim() < 2 and t.numel() == 1


def over_placement(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """An objective of DTensors: of their local rows, over the ranks that share them."""
    asked = arguments.get("group")
    ranks = asked if isinstance(asked, Ranks) else Ranks(asked)
    check_settings(ranks.settings)
    whole = () if arguments.get("sharded_queue") else HELD_WHOLE
    numbers = {name: t for name, t in arguments.items() if is_number(t)}
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor) and name not in numbers}
    rows = {name: t for name, t in tensors.items() if name not in whole}
    if not any(map(is_dtensor, rows.values())):  # a number alone: its gradient is that of this process's own loss
        held = {name: _held(name, t) for name, t in tensors.items()}
        return function(**(arguments | held | {name: local_number(t) for name, t in numbers.items()}))
    place = Placement.of(rows)
    place.check_group(ranks.group)
    for name in (*COUNTS, "positives") if place.sharded is not None else ():
        if arguments.get(name) is not None:
            got = arguments[name] if name in COUNTS else type(arguments[name]).__name__
            raise ValueError(
                f"{name}: expected None where rows are sharded, got {got}: each rank has its own; pass own rows and group= instead"
            )
    local = {name: t.to_local() for name, t in rows.items()}  # type: ignore[attr-defined]
    local |= {name: _held(name, t) for name, t in tensors.items() if name in whole}
    local |= {name: place.number(t) for name, t in numbers.items()}
    answer = function(**(arguments | local | {"group": Ranks(place.group, "exact", ranks.strategy)}))
    name, of_all = next((name, t.shape[0]) for name, t in rows.items())
    parts, own = answer if isinstance(answer, tuple) else (answer,), local[name].shape[0]
    # Asked of no other rank, which a graph would have to wait for.
    here = getattr(function, OWN_VALUES, 1)  # of a rank without rows
    placed = [place.wrapped(part, of_all, part.shape[0] // own if own and part.dim() else here) for part in parts]
    return type(answer)(*placed) if isinstance(answer, tuple) else placed[0]


def _held(name: str, t: Tensor) -> Tensor:
    if not is_dtensor(t):
        return t
    if not all(p.is_replicate() for p in t.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name}: expected a plain tensor or a replicated DTensor, which every rank has whole, got {t.placements}; "  # type: ignore[attr-defined]
            f"redistribute it with placements=[Replicate()]"
        )
    whole: Tensor = t.to_local()  # type: ignore[attr-defined]
    return whole


def pairs(form: str, op: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """pair_reduce or pair_total (`form`, computed by `op` where every rank has all rows) of DTensors."""
    from .call import shared

    mask = arguments.get("mask", "all")
    mask = Mask(mask) if isinstance(mask, str) else mask
    masking = {name: getattr(mask, name) for name in MASKING if getattr(mask, name, None) is not None}
    given = arguments | masking
    rows = {
        name: t
        for name, t in given.items()
        if isinstance(t, Tensor) and (name in ("x", "y", *VECTORS) or name in masking)
    }
    numbers = {name: given[name] for name in ("scale", "shift") if isinstance(given.get(name), Tensor)}
    if not any(map(is_dtensor, rows.values())):
        return op(**(arguments | {name: local_number(t) for name, t in numbers.items()}))
    place = Placement.of(rows)
    if place.sharded is not None and isinstance(mask, Mask) and mask.row_offset != mask.col_offset:
        raise ValueError(
            f"mask: expected equal offsets where rows are sharded, got row_offset={mask.row_offset} and "
            f"col_offset={mask.col_offset}; redistribute the rows with placements=[Replicate()]"
        )
    local = {name: t.to_local() for name, t in rows.items()}  # type: ignore[attr-defined]
    if masking:
        mask = mask._replace(**{name: local.pop(name) for name in masking})
    local |= {"mask": mask} | {name: place.number(t) for name, t in numbers.items()}
    arguments, count = arguments | local, rows["x"].shape[0]
    if place.sharded is None:
        answer = op(**arguments)
    else:
        wire = Wire(place.group)
        mine = torch.tensor([local["x"].shape[0]], device=wire.device)
        shards = Shards(wire, (tuple(wire.everywhere(mine).view(-1).tolist()),))
        if isinstance(mask, Mask) and mask.period:
            y, first = local.get("y"), mask.row_offset + shards.first(local["x"])
            shifted = mask._replace(
                row_offset=first, col_offset=first if y is None else mask.col_offset + shards.first(y)
            )
            arguments["mask"] = by_groups(shifted, len(local["x"]), None if y is None else len(y), local["x"].device)
        answer = getattr(shards, form)(**arguments)
        answer = shared(answer, wire.world) if form == "pair_total" else answer
    if isinstance(answer, tuple):
        return tuple(place.wrapped(part, count) for part in answer)
    return place.wrapped(answer, count)
