"""Decoupled contrast."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..equation.names import Form, MarginStrategy
from .objective import Objective


class DCLLoss(Objective, function=functional.dcl):
    """DCL, and with sigma DCLW. Call: loss(u, v, groups=None, guide=None).

    Examples:
        >>> loss = fastcl.losses.DCLLoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -0.2082
    """

    temperature: float | Tensor = 0.1
    sigma: float | Tensor | None = None
    detach_weight: bool = True
    symmetric: bool = True
    false_negative_margin: float | None = None
    margin_strategy: MarginStrategy = "absolute"


class DHELLoss(Objective, function=functional.dhel):
    """DHEL. Call: loss(u, v, groups=None, guide=None).

    Examples:
        >>> loss = fastcl.losses.DHELLoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        0.1972
    """

    temperature: float | Tensor = 0.3
    form: Form = "joint"
    false_negative_margin: float | None = None
    margin_strategy: MarginStrategy = "absolute"
