"""Global contrastive losses with their state: the logarithm of a normaliser for each sample of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import batch, functional, transforms
from ..distributed import Ranks, in_graph, over_ranks, write_gathered, writer
from ..equation import checks
from ..equation.arguments import integer
from ..functional.normalizers import NormalizedLoss
from .objective import Objective


def of_samples(function: Callable[..., Any]) -> Callable[..., NormalizedLoss]:
    """The function of rows, their samples' indices and what is known of these; over ranks all of it is agreed on at once.

    `training` is among it: a rank that keeps nothing would not send what the others wait for.
    """

    def step(x: Any, y: Any, index: Any, *, log_u: Any, size: int, training: bool, **given: Any) -> NormalizedLoss:
        checks.matrix(first, x)
        checks.groups("index", index, x.shape[0], first, x)
        if readable(index):
            refuse(batch.total(outside(index, size)), size)
        answer: NormalizedLoss = function(x, y, log_u, return_log_u=True, **given)
        return answer

    x_and_y, rest = list(signature(function).parameters.values())[:2], list(signature(function).parameters.values())[2:]
    index = Parameter("index", Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
    kept = [Parameter(name, Parameter.KEYWORD_ONLY) for name in ("log_u", "size", "training")]
    settings = [p for p in rest if p.name not in ("log_u", "return_log_u")]
    form = Signature([*x_and_y, index, *kept, *settings], return_annotation=NormalizedLoss)
    first = x_and_y[0].name

    def named(*args: Any, **kwargs: Any) -> NormalizedLoss:
        given = form.bind(*args, **kwargs).arguments
        x, y = (given.pop(p.name) for p in x_and_y)
        return step(x, y, **given)

    named.__signature__, named.__name__ = form, function.__name__  # type: ignore[attr-defined]
    named.__qualname__ = f"of_samples.{function.__name__}"  # one for each of our functions, wherever this module is imported
    return over_ranks(named)


def readable(index: Any) -> bool:
    """Whether the values of an index may be looked at: it is in memory, and nothing is traced."""
    plain = type(index) is Tensor and index.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and not transforms.active()


def outside(index: Tensor, size: int) -> Tensor:
    """Which are the index of no sample, as numbers."""
    return ((index < 0) | (index >= size)).to(torch.float64)


def refuse(count: Tensor, size: int) -> None:
    """Raise where there are any."""
    if count > 0:
        raise ValueError(
            f"index: expected samples of the data set, 0 to {size - 1}, got {int(count)} outside; pass size=, how many it has"
        )


class _OfSamples(Objective):
    """The state and how it is kept."""

    size: int = field(kw_only=False)
    gamma: float = 0.9

    log_u: Tensor = field(init=False)

    step: ClassVar[Callable[..., NormalizedLoss]]
    columns: ClassVar[int]
    wide = ("log_u",)

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("size", self.size, least=2)
        self.register_buffer("log_u", torch.full((self.size, self.columns), -torch.inf, dtype=torch.float32))

    def _of(self, *rows: Any, **data: Any) -> Tensor:
        index = data.get("index", rows[2] if len(rows) > 2 else None)
        if any(map(checks.is_dtensor, (*rows, *data.values()))):
            raise TypeError(
                f"{type(self).__name__}: expected plain tensors, got a DTensor; pass each rank's own rows, and group="
            )
        kept = {"log_u": self._known(index), "size": self.size, "training": self.training}
        settings = self.arguments()
        loss, log_u = self.step(*rows, **kept, **self._apart(data, settings, tuple(kept)), **settings)
        if self.training and isinstance(index, Tensor):  # else the step has raised, or raises where a graph is run
            self._keep(index, log_u.detach())
        return loss

    def _known(self, index: Any) -> Tensor | None:
        """What is kept of these samples; of what is no index into them anything, for the step to say so on every rank."""
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            return None
        if index.device != self.log_u.device:
            return self.log_u.new_empty(index.shape[0], self.columns)
        # What stands outside the step refuses, on every rank, also where it is an op of a graph.
        refused = readable(index) or (in_graph.traced() and Ranks.of(self.group) is not None and index.device.type == "cpu")
        return self.log_u.index_select(0, index.clamp(0, self.size - 1) if refused else index)

    @torch.no_grad()
    def _keep(self, index: Tensor, log_u: Tensor) -> None:
        """Write them, those of all ranks."""
        group: Any = Ranks.of(self.group)
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        write_gathered(of_their_samples, [self.log_u], (index, log_u), group)

    def extra_repr(self) -> str:
        return f"{self.size}, {super().extra_repr()}"


@writer
def of_their_samples(kept: Tensor, index: Tensor, log_u: Tensor) -> None:
    """Write what was found of samples; of one that is there several times, the largest.

    What a batch beyond the numbers has found (too large a loss scale, say) is not kept: an average would stay there.
    """
    log_u = torch.where(log_u < torch.inf, log_u, kept.index_select(0, index).to(log_u.dtype))
    index = index.unsqueeze(1).expand_as(log_u)
    kept.scatter_reduce_(0, index, log_u.to(kept.dtype), "amax", include_self=False)


class SogCLRLoss(_OfSamples, function=functional.sogclr):
    """SogCLR with its normalisers. Call: loss(u, v, index, groups=None).

    `log_u`, (size, 1) and in the state_dict, is what the function takes for each sample of the data set. In training each call
    moves those of its samples, of all ranks of `group` (without a group: of all ranks where torch.distributed runs), so that a
    sample may come to another rank in the next epoch. A sample whose index is there several times keeps the largest.
    A batch that is no number moves nothing. Activation checkpointing around the loss would compute it again from what has moved.

    Args:
        size: how many samples the data set has, an integer > 1.
        index: (n,) int64, at the call: which sample each row is of, 0 to size - 1.

    Raises:
        ValueError: for an index that is none.

    Examples:
        >>> loss = fastcl.losses.SogCLRLoss(10, temperature=0.1)
        >>> x = torch.eye(4)
        >>> round(loss(x, x, torch.tensor([7, 2, 0, 5])).item(), 4)
        -1.0
        >>> int(loss.log_u.isfinite().sum())
        4
    """

    temperature: float | Tensor = 0.1

    columns = 1
    step = staticmethod(of_samples(functional.sogclr))

    def forward(self, *rows: Any, **data: Any) -> Tensor:
        """The loss of these rows; in training the normalisers of their samples are then what it made of them."""
        return self._of(*rows, **data)


class FastCLIPLoss(_OfSamples, function=functional.fast_clip):
    """FastCLIP with its normalisers. Call: loss(x, y, index, groups=None).

    `log_u`, (size, 2) and in the state_dict, is what the function takes for each sample of the data set. In training each call
    moves those of its samples, of all ranks of `group` (without a group: of all ranks where torch.distributed runs), so that a
    sample may come to another rank in the next epoch. A sample whose index is there several times keeps the largest.
    A batch that is no number moves nothing. Activation checkpointing around the loss would compute it again from what has moved.
    The authors let gamma fall from 1 by a cosine over half of the epochs: assign to `gamma` to do so.

    Args:
        size: how many samples the data set has, an integer > 1.
        index: (n,) int64, at the call: which sample each row is of, 0 to size - 1.

    Raises:
        ValueError: for an index that is none.

    Examples:
        >>> loss = fastcl.losses.FastCLIPLoss(10, temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x, torch.tensor([7, 2, 0, 5])).item(), 4)
        -1.0
        >>> learned = fastcl.losses.FastCLIPLoss(10, temperature=torch.nn.Parameter(torch.tensor(0.07)), rho=8.0)
    """

    temperature: float | Tensor = 0.07
    rho: float | Tensor = 0.0
    eps: float = 1e-14

    columns = 2
    step = staticmethod(of_samples(functional.fast_clip))

    def forward(self, *rows: Any, **data: Any) -> Tensor:
        """The loss of these rows; in training the normalisers of their samples are then what it made of them."""
        return self._of(*rows, **data)
