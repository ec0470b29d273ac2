"""Over which ranks the rows of a call are spread, and how these work together: what `group=` takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from torch import distributed as dist

from ..equation import checks
from ..equation.names import Gradient, Strategy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

CONVENTIONS = get_args(Gradient)
STRATEGIES = get_args(Strategy)
SETTINGS = {"gradient": CONVENTIONS, "strategy": STRATEGIES}


@dataclass(frozen=True)
class Ranks:
    """The ranks over which the rows of a call are spread, and how they work together; a group alone stands for these defaults.

        L = loss of the union of all ranks' rows,   sum over ranks of its gradients = world * dL ("ddp") or dL ("exact")

    Names are checked where they are used: one that is wrong on one rank is then the same error on every rank.

    Args:
        group: a process group, or one dimension of a DeviceMesh; None for this process alone.
        gradient: "ddp", right where DistributedDataParallel averages over ranks (world times the gradient), or "exact".
        strategy: "auto", "gather" or "ring": how rows of other ranks come here; see fastcl.distributed.

    Examples:
        >>> ranks = fastcl.Ranks(None, gradient="exact", strategy="ring")  # None: a torch.distributed group, once there is one
        >>> loss = fastcl.losses.NTXentLoss(group=ranks)(torch.eye(4), torch.eye(4))
        >>> round(float(loss), 4)
        0.5944
    """

    group: ProcessGroup | DeviceMesh | SavedGroup | None
    gradient: Gradient = "ddp"
    strategy: Strategy = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.group, Ranks):  # whose gradient and strategy would go unheard
            raise TypeError("group: expected a process group, got Ranks; pass dataclasses.replace(ranks, ...)")

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """A copy in the same process keeps the group, whoever's module holds it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (SavedGroup.of(self.group), self.gradient, self.strategy)

    @classmethod
    def of(cls, given: Any) -> Ranks | None:
        """What `group=` was given; None where there are no others, with its names checked."""
        if given is None:
            return None
        ranks = given if isinstance(given, cls) else cls(given)
        if ranks.group is None:
            check_settings(ranks.settings)
            return None
        return ranks

    @property
    def settings(self) -> dict[str, Any]:
        """What all ranks must give alike."""
        return {"gradient": self.gradient, "strategy": self.strategy}


Group: TypeAlias = "ProcessGroup | DeviceMesh | Ranks"


def check_settings(settings: dict[str, Any]) -> None:
    """What is given of gradient and strategy is one of their names."""
    for name, allowed in SETTINGS.items():
        if name in settings:
            checks.one_of(name, settings[name], allowed)


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
    def of(cls, group: Any) -> SavedGroup | Ranks | None:
        """For whatever `group=` takes."""
        if group is None or isinstance(group, cls):
            return group
        if isinstance(group, Ranks):
            return replace(group, group=cls.of(group.group))  # type: ignore[arg-type]  # of what is no Ranks, none comes
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
    """The process group of whatever `group=` takes, which is not None.

    Raises:
        TypeError: it is neither.
        ValueError: a mesh of several dimensions, a group that this process is not in, or torch.distributed does not run.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: torch.distributed does not run; call torch.distributed.init_process_group first, or leave group out (None)"
        )
    if isinstance(group, Ranks):
        group = group.group
    if isinstance(group, SavedGroup):
        group = group.found()
    if isinstance(group, dist.DeviceMesh):
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
