"""Decoupled contrast."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class DCLLoss(Objective, function=functional.dcl):
    """DCL, and with sigma DCLW. Call: loss(u, v, groups=None)."""

    temperature: float | Tensor = 0.1
    sigma: float | Tensor | None = None
    detach_weight: bool = True
    symmetric: bool = True


class DHELLoss(Objective, function=functional.dhel):
    """DHEL. Call: loss(u, v, groups=None)."""

    temperature: float | Tensor = 0.3
    form: str = "joint"
