"""Several views at once."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class MVInfoNCELoss(Objective, function=functional.mv_info_nce):
    """MV-InfoNCE. Call: loss(u, v, ..., groups=None), a matrix for each view."""

    temperature: float | Tensor = 0.1


class MVDHELLoss(Objective, function=functional.mv_dhel):
    """MV-DHEL. Call: loss(u, v, ..., groups=None), a matrix for each view."""

    temperature: float | Tensor = 0.3
