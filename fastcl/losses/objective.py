"""An objective as an nn.Module: its constructor takes the function's settings, its call takes the rows.

A subclass names its function and its settings, with the function's defaults, and becomes a dataclass by itself:

    class InfoNCELoss(Objective, function=functional.info_nce):
        temperature: float | Tensor = 0.07

A setting that is an nn.Parameter is learned, one that is a plain tensor becomes a buffer: both move and save with the module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from inspect import cleandoc, signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, dataclass_transform

from ..distributed import CONVENTIONS, STRATEGIES, Group
from ..equation import checks
from ..functional.rows import REDUCTIONS, check_backend

ACROSS_RANKS = ("group", "gradient", "strategy")

_as_dataclass = dataclass(kw_only=True, eq=False, repr=False)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class _Declared(nn.Module):
    """For type checkers: what derives from this is a dataclass. Of the class that carries the mark itself they take no fields."""


@_as_dataclass
class Objective(_Declared):
    """An objective as a module; the module's own docstring says how to write one.

    Args:
        normalize: whether to scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        backend: see fastcl.pair_reduce.
        group, gradient, strategy: the ranks over which the rows are spread; see fastcl.distributed.
    """

    normalize: bool = True
    reduction: str = "mean"
    backend: str | None = None
    group: Group | None = None
    gradient: str = "ddp"
    strategy: str = "auto"

    function: ClassVar[Callable[..., Tensor]]
    settings: ClassVar[tuple[str, ...]] = ()  # the fields that are arguments of the function

    def __new__(cls, *_: Any, **__: Any) -> Self:
        module = super().__new__(cls)
        nn.Module.__init__(module)  # before the fields are assigned: some are parameters
        return module

    def __init_subclass__(cls, function: Callable[..., Any] | None = None) -> None:
        _as_dataclass(cls)
        known = {setting.name for setting in fields(cls) if setting.init}
        for name in known & cls.__dict__.keys():  # a default left on the class would hide a parameter of that name
            delattr(cls, name)
        if function is not None:
            cls.function = staticmethod(function)
            cls.settings = tuple(name for name in signature(function).parameters if name in known)
            cls.__doc__ = "\n\n".join(
                (
                    cleandoc(cls.__doc__ or ""),
                    f"fastcl.functional.{function.__name__}:",
                    cleandoc(function.__doc__ or ""),
                )
            )

    def __post_init__(self) -> None:
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        check_backend(self.backend)
        checks.one_of("gradient", self.gradient, CONVENTIONS)
        checks.one_of("strategy", self.strategy, STRATEGIES)
        for name in self.settings:
            value = getattr(self, name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                delattr(self, name)
                self.register_buffer(name, value)

    def forward(self, *rows: Tensor, **data: Tensor | None) -> Any:
        """The objective of these rows; `data` is what differs from batch to batch, such as groups."""
        return self.function(*rows, **data, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """The settings as the function takes them."""
        return {name: getattr(self, name) for name in self.settings}

    def extra_repr(self) -> str:
        shown = self.settings if self.group is not None else (s for s in self.settings if s not in ACROSS_RANKS)
        kept = ((name, getattr(self, name)) for name in shown)
        return ", ".join(f"{name}={_shown(value)}" for name, value in kept if not isinstance(value, nn.Module))


class LogitScale(nn.Module):
    """A factor > 0 held by its logarithm, so that a step of an optimiser multiplies it; learned or fixed.

        scale = exp(log),   log <= log(largest)

    In training the logarithm itself is brought back to its bound at each call, as CLIP does after each step: clamped in the
    formula instead, it would get no gradient beyond the bound and never come back.

    Args:
        initial: the factor to start from, a number > 0.
        largest: its upper bound, a number > 0, or None.
        learnable: whether it is a parameter (otherwise a buffer).

    Raises:
        ValueError: for numbers that are not > 0, or an initial factor above the largest.
    """

    log: Tensor

    def __init__(self, initial: float, largest: float | None = None, learnable: bool = True) -> None:
        super().__init__()
        checks.positive_number("logit_scale", initial)
        self.largest = largest
        if largest is not None and initial > checks.positive_number("largest_scale", largest):
            raise ValueError(f"logit_scale: expected at most largest_scale = {largest}, got {initial}")
        self.log = learnable_or_fixed(self, "log", math.log(initial), learnable)

    def forward(self) -> Tensor:
        """The factor, a 0-dim float32 tensor."""
        if self.largest is None:
            return self.log.exp()
        bound = math.log(self.largest)
        if self.training and self.log.requires_grad:
            with torch.no_grad():
                self.log.clamp_(max=bound)
            return self.log.exp()
        return self.log.clamp(max=bound).exp()

    def extra_repr(self) -> str:
        return f"log={self.log.item():.4g}, largest={self.largest}, learnable={self.log.requires_grad}"


def learnable_or_fixed(module: nn.Module, name: str, value: float, learnable: bool) -> Tensor:
    """A 0-dim parameter of the module, or a buffer."""
    tensor = torch.tensor(float(value), dtype=torch.float32)
    if not learnable:
        module.register_buffer(name, tensor)
        return tensor
    parameter = nn.Parameter(tensor)
    module.register_parameter(name, parameter)
    return parameter


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    kind = "Parameter" if isinstance(value, nn.Parameter) else "tensor"
    return f"{kind}({value.item():.4g})" if value.numel() == 1 else f"{kind}{tuple(value.shape)}"
