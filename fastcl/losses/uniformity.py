"""Alignment and uniformity on the hypersphere."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from .objective import Objective


class AlignmentLoss(Objective, function=functional.alignment):
    """Alignment. Call: loss(x, y).

    Examples:
        >>> loss = fastcl.losses.AlignmentLoss()
        >>> x = torch.eye(4)
        >>> round(loss(x, x.roll(1, 0)).item(), 4)
        2.0
    """

    alpha: float = 2.0


class UniformityLoss(Objective, function=functional.uniformity):
    """Uniformity. Call: loss(x, groups=None).

    Examples:
        >>> loss = fastcl.losses.UniformityLoss(t=2.0)
        >>> x = torch.eye(4)
        >>> round(loss(x).item(), 4)
        -4.0
    """

    t: float | Tensor = 2.0


class AlignUniformLoss(Objective, function=functional.align_uniform):
    """Alignment plus weighted uniformity. Call: loss(x, y, groups=None).

    Examples:
        >>> loss = fastcl.losses.AlignUniformLoss()
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -4.0
    """

    alpha: float = 2.0
    t: float | Tensor = 2.0
    weight: float | Tensor = 1.0


class SpreadOutLoss(Objective, function=functional.spread_out):
    """The spread-out regulariser. Call: loss(x, groups=None).

    Examples:
        >>> loss = fastcl.losses.SpreadOutLoss()
        >>> round(loss(torch.ones(4, 2)).item(), 4)
        1.5
    """

    mean_weight: float | Tensor = 1.0
    second_moment_weight: float | Tensor = 1.0
