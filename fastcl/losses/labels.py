"""Supervised contrastive learning."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class SupConLoss(Objective, function=functional.sup_con):
    """SupCon. Call: loss(z, labels), views concatenated with their labels.

    Examples:
        >>> loss = fastcl.losses.SupConLoss(temperature=0.5, base_temperature=0.5)
        >>> round(loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)).item(), 4)
        0.5944
    """

    temperature: float | Tensor = 0.07
    base_temperature: float | Tensor = 0.07


class SINCERELoss(Objective, function=functional.sincere):
    """SINCERE. Call: loss(z, labels), views concatenated with their labels.

    Examples:
        >>> loss = fastcl.losses.SINCERELoss(temperature=0.5)
        >>> round(loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)).item(), 4)
        0.5944
    """

    temperature: float | Tensor = 0.1
