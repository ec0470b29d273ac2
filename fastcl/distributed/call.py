"""From one call of an objective with `group=` to the union of the ranks' rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import batch, loss_scaling, transforms
from ..equation.arguments import declared
from ..equation.checks import is_dtensor
from . import dtensors
from .agreement import Call, agree, bound, named
from .shards import Shards
from .wire import Wire

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = "ProcessGroup | DeviceMesh"
P = ParamSpec("P")
R = TypeVar("R")


def over_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """An objective that takes group=, gradient= and strategy=; its body need not know.

    Its arguments are checked by their annotations first. Without a group the body then runs as it is.
    """
    checked = named(declared(function))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(map(is_dtensor, args)) or any(map(is_dtensor, kwargs.values())):
            return dtensors.over_placement(named(call), bound(function, args, kwargs))
        if kwargs.get("group") is None:
            if batch.beyond_this_process():
                # A part of an objective over ranks, which is scaled as a whole, by what all ranks agree on: shards of different
                # sizes would divide by different powers what their sums then mix.
                return checked(*args, **kwargs)
            return loss_scaling.scaled(checked, args, kwargs)
        return _over_ranks(checked, args, kwargs)

    return call


@torch._disable_dynamo  # torch.compiler.disable imports torch._dynamo at once, which takes longer than torch itself
def _over_ranks(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    wire = Wire(process_group(kwargs["group"]))
    if wire.world == 1:
        return loss_scaling.scaled(function, args, kwargs)
    call = Call(function, args, kwargs)
    with transforms.set_aside():
        layouts = agree(wire, call)
    shards = Shards(wire, layouts, call.settings["strategy"])
    rows = max((sum(layout) for layout in layouts), default=0)
    with batch.over(shards):
        answer = loss_scaling.scaled(function, (), call.arguments, rows, shards.largest)
    return answer if call.settings["gradient"] == "ddp" else shared(answer, wire.world)


def shared(answer: Any, world: int) -> Any:
    """Whatever all ranks hold alike (numbers, not rows) with its gradient over world."""
    if isinstance(answer, tuple):
        return type(answer)(*(shared(part, world) for part in answer))
    return _Share.apply(answer, world) if answer.dim() == 0 else answer


class _Share(torch.autograd.Function):
    """The value as it is, its gradient over world."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: int) -> Tensor:
        ctx.world = world
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] / ctx.world, None


@dataclass(frozen=True)
class SavedGroup:
    """What a pickled module keeps of its group. That of all ranks is found again where it is used; another must be given anew.

    Args:
        ranks: of its members, as far as this process knew them.
        everybody: whether these were all ranks.
    """

    ranks: tuple[int, ...]
    everybody: bool

    @classmethod
    def of(cls, group: Any) -> SavedGroup | None:
        """For a group, a mesh, or None."""
        if group is None or isinstance(group, cls):
            return group
        try:
            ranks = tuple(dist.get_process_group_ranks(process_group(group)))
        except (ValueError, TypeError):
            return cls((), False)
        return cls(ranks, ranks == tuple(range(dist.get_world_size())))

    def found(self) -> Any:
        """The group in this process."""
        if self.everybody:
            return dist.group.WORLD
        raise ValueError(
            f"group: the module was saved with a group of the ranks {list(self.ranks)}, and groups are not saved; "
            "set its `group` to one of this process, or to None for own rows alone"
        )


def process_group(group: Any) -> Any:
    """The process group of a group or of a one-dimensional DeviceMesh.

    Raises:
        TypeError: it is neither.
        ValueError: a mesh of several dimensions, a group that this process is not in, or torch.distributed does not run.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: torch.distributed does not run; call torch.distributed.init_process_group first, or leave group out (None)"
        )
    if isinstance(group, SavedGroup):
        group = group.found()
    if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh
        if group.ndim != 1:
            raise ValueError(
                f"group: expected one dimension of a DeviceMesh, got {group.ndim}; pass mesh['name'], for instance"
                f" mesh[{(group.mesh_dim_names or ('dp',))[0]!r}]"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this process is not in the group; call the objective on its members only")
        raise TypeError(
            f"group: expected a ProcessGroup or one dimension of a DeviceMesh, got {type(group).__name__}; "
            "torch.distributed.group.WORLD is the group of all"
        )
    return group
