"""From one call of an objective with `group=` to the union of the ranks' rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import batch, loss_scaling
from ..equation import checks
from .agreement import CONVENTIONS, Call, agree, bound
from .shards import STRATEGIES, Shards
from .wire import Wire

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = "ProcessGroup | DeviceMesh"
P = ParamSpec("P")
R = TypeVar("R")
SETTINGS = ("group", "gradient", "strategy")


def over_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """An objective that takes group=, gradient= and strategy=; its body need not know.

    Without a group the body runs as it is.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("group") is None:
            return loss_scaling.scaled(function, args, kwargs)
        return _over_ranks(function, args, kwargs)

    return call


@torch._disable_dynamo  # torch.compiler.disable imports torch._dynamo at once, which takes longer than torch itself
def _over_ranks(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments = bound(function, args, kwargs)
    group, gradient, strategy = (arguments.pop(name) for name in SETTINGS)
    wire = Wire(process_group(group))
    if wire.world == 1:
        checks.one_of("gradient", gradient, CONVENTIONS)
        checks.one_of("strategy", strategy, STRATEGIES)
        return loss_scaling.scaled(function, (), arguments)
    call = Call(function, arguments, {"gradient": gradient, "strategy": strategy})
    shards = Shards(wire, agree(wire, call), strategy)
    rows = max((sum(layout) for layout in shards.layouts), default=0)
    with batch.over(shards):
        answer = loss_scaling.scaled(function, (), arguments, rows, shards.largest)
    return answer if gradient == "ddp" else _shared(answer, wire.world)


def _shared(answer: Any, world: int) -> Any:
    """Whatever all ranks hold alike (numbers, not rows) with its gradient over world."""
    if isinstance(answer, tuple):
        return type(answer)(*(_shared(part, world) for part in answer))
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


def process_group(group: Any) -> Any:
    """The process group of a group or of a one-dimensional DeviceMesh.

    Raises:
        TypeError: it is neither.
        ValueError: a mesh of several dimensions, a group that this process is not in, or torch.distributed does not run.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: torch.distributed does not run; call torch.distributed.init_process_group first")
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
