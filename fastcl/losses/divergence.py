"""f-MICL: mutual information by any f-divergence."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..equation.divergence import Divergence
from ..equation.names import DivergenceName, Negatives, Similarity
from .objective import Objective


class FMICLLoss(Objective, function=functional.f_micl):
    """f-MICL. Call: loss(x, y, groups=None).

    Examples:
        >>> loss = fastcl.losses.FMICLLoss(divergence="js", alpha=1.0)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -0.5662
    """

    divergence: DivergenceName | Divergence = "kl"
    similarity: Similarity = "gaussian"
    beta: float | Tensor = 1.0
    mu: float | Tensor = 1.0
    alpha: float | Tensor = 40.0
    negatives: Negatives = "xx"
    q: float | None = None
    return_terms: bool = False


class FMICLDVLoss(Objective, function=functional.f_micl_dv):
    """f-MICL for KL after the Donsker-Varadhan shift. Call: loss(x, y, groups=None).

    Examples:
        >>> loss = fastcl.losses.FMICLDVLoss(beta=1.0)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -2.0
    """

    beta: float | Tensor = 1.0
