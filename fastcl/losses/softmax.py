"""Softmax objectives of two views."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional
from ..equation.names import MarginStrategy
from .objective import Objective
from .scale import LogitScale, factor, given_or_learned


class InfoNCELoss(Objective, function=functional.info_nce):
    """InfoNCE, one direction. Call: loss(x, y, positives=None, groups=None, guide=None).

    Examples:
        >>> loss = fastcl.losses.InfoNCELoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        0.3408
    """

    temperature: float | Tensor = 0.07
    label_smoothing: float = 0.0
    false_negative_margin: float | None = None
    margin_strategy: MarginStrategy = "absolute"


class TemperatureFreeInfoNCELoss(Objective, function=functional.temperature_free_info_nce):
    """InfoNCE without a temperature. Call: loss(x, y, groups=None).

    Examples:
        >>> loss = fastcl.losses.TemperatureFreeInfoNCELoss()
        >>> x = torch.eye(4)
        >>> round(loss(x + 0.5 * x.roll(1, 1), x).item(), 4)
        0.229
    """

    eps: float = 1e-6


class NTXentLoss(Objective, function=functional.nt_xent):
    """NT-Xent (SimCLR). Call: loss(u, v, positives=None, groups=None, guide=None).

    Examples:
        >>> loss = fastcl.losses.NTXentLoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        0.5944
    """

    temperature: float | Tensor = 0.5
    false_negative_margin: float | None = None
    margin_strategy: MarginStrategy = "absolute"


class CLIPLoss(Objective, function=functional.clip):
    """CLIP with its learned scale. Call: loss(x, y, pairs=None, positives=None, groups=None, guide=None).

    The scale is the module `logit_scale` (a LogitScale, whose parameter `log` starts at log(1 / 0.07)), and never exceeds 100
    (Radford et al. 2021, section 2.5).

    Args:
        logit_scale: the factor to start from, a number > 0; or what holds the factor itself, a tensor with one element or a
            parameter (which has no bound) or a LogitScale.
        largest_scale: its upper bound, or None.
        learnable: whether the scale is a parameter.

    Examples:
        >>> loss = fastcl.losses.CLIPLoss(logit_scale=10.0)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 6)
        0.000136
        >>> [name for name, _ in loss.named_parameters()]
        ['logit_scale.log']
    """

    logit_scale: float | Tensor | LogitScale = 1 / 0.07
    label_smoothing: float = 0.0
    false_negative_margin: float | None = None
    margin_strategy: MarginStrategy = "absolute"
    largest_scale: float | None = 100.0
    learnable: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given_or_learned(self)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"logit_scale": factor(self.logit_scale, self.group)}
