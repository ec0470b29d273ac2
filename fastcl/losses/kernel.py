"""Kernel contrastive learning."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..equation.names import KernelName
from .objective import Objective


class KCLLoss(Objective, function=functional.kcl):
    """KCL. Call: loss(u, v, groups=None).

    Examples:
        >>> loss = fastcl.losses.KCLLoss(kernel="gaussian", t=2.0)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -1.4139
    """

    kernel: KernelName = "gaussian"
    t: float | Tensor = 2.0
    gamma: float | Tensor = 16.0
