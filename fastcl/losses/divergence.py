"""f-MICL: mutual information by any f-divergence."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class FMICLLoss(Objective, function=functional.f_micl):
    """f-MICL. Call: loss(x, y, groups=None)."""

    divergence: str = "kl"
    similarity: str = "gaussian"
    beta: float | Tensor = 1.0
    mu: float | Tensor = 1.0
    alpha: float | Tensor = 40.0
    negatives: str = "xx"
    q: float | None = None
    return_terms: bool = False


class FMICLDVLoss(Objective, function=functional.f_micl_dv):
    """f-MICL for KL after the Donsker-Varadhan shift. Call: loss(x, y, groups=None)."""

    beta: float | Tensor = 1.0
