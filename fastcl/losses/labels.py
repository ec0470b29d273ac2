"""Supervised contrastive learning."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class SupConLoss(Objective, function=functional.sup_con):
    """SupCon. Call: loss(z, labels), views concatenated with their labels."""

    temperature: float | Tensor = 0.07
    base_temperature: float | Tensor = 0.07


class SINCERELoss(Objective, function=functional.sincere):
    """SINCERE. Call: loss(z, labels), views concatenated with their labels."""

    temperature: float | Tensor = 0.1
