"""Several views at once."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class MVInfoNCELoss(Objective, function=functional.mv_info_nce):
    """MV-InfoNCE. Call: loss(u, v, ..., groups=None), a matrix for each view.

    Examples:
        >>> loss = fastcl.losses.MVInfoNCELoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x, x).item(), 4)
        0.4756
    """

    temperature: float | Tensor = 0.1


class MVDHELLoss(Objective, function=functional.mv_dhel):
    """MV-DHEL. Call: loss(u, v, ..., groups=None), a matrix for each view.

    Examples:
        >>> loss = fastcl.losses.MVDHELLoss(temperature=0.5)
        >>> x = torch.eye(4)
        >>> round(loss(x, x, x).item(), 4)
        0.1972
    """

    temperature: float | Tensor = 0.3
