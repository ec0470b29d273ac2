"""Debiased and hard negatives."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class DebiasedLoss(Objective, function=functional.debiased):
    """Debiased contrastive loss. Call: loss(u, v, groups=None).

    Examples:
        >>> loss = fastcl.losses.DebiasedLoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        0.2115
    """

    temperature: float | Tensor = 0.5
    tau_plus: float = 0.1


class HardNegativeLoss(Objective, function=functional.hard_negative):
    """Hard-negative contrastive loss. Call: loss(u, v, groups=None).

    Examples:
        >>> loss = fastcl.losses.HardNegativeLoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        0.2115
    """

    temperature: float | Tensor = 0.5
    tau_plus: float = 0.1
    beta: float | Tensor = 1.0
