"""The sigmoid objective."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional
from ..equation.names import MarginStrategy
from .objective import Objective
from .scale import LogitScale, factor, given_or_learned, learnable_or_fixed, stated


class SigLIPLoss(Objective, function=functional.siglip):
    """SigLIP with its learned scale and bias. Call: loss(x, y, positives=None, groups=None, guide=None).

    The scale is the module `logit_scale` (a LogitScale, whose parameter `log` starts at log(10)), the bias the parameter
    `logit_bias`, from -10: most pairs are negatives, and the start says so (Zhai et al. 2023, section 3.2).

    Args:
        logit_scale: the factor to start from, a number > 0; or what holds the factor itself, a tensor with one element or a
            parameter (which has no bound) or a LogitScale.
        logit_bias: the bias to start from, a number; or a tensor with one element or a parameter that holds it.
        largest_scale: the scale's upper bound, or None.
        learnable: whether scale and bias are parameters.

    Examples:
        >>> loss = fastcl.losses.SigLIPLoss()
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        0.6933
    """

    logit_scale: float | Tensor | LogitScale = 10.0
    logit_bias: float | Tensor = -10.0
    false_negative_margin: float | None = None
    margin_strategy: MarginStrategy = "absolute"
    largest_scale: float | None = None
    learnable: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given_or_learned(self)
        if not (isinstance(self.logit_bias, Tensor) or stated(self, "logit_bias")):
            value = self.logit_bias
            del self.logit_bias
            self.logit_bias = learnable_or_fixed(self, "logit_bias", value, self.learnable)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"logit_scale": factor(self.logit_scale, self.group)}
