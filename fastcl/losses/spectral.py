"""Spectral contrastive learning, and MINC with the statistic that it keeps."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from typing_extensions import Self

from .. import functional
from ..equation.arguments import integer
from ..equation.checks import is_dtensor
from ..functional.spectral import second_moment
from .objective import Objective


class SpectralLoss(Objective, function=functional.spectral):
    """The spectral contrastive loss. Call: loss(u, v, groups=None).

    Examples:
        >>> loss = fastcl.losses.SpectralLoss()
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -2.0
    """

    mu: float | Tensor = 1.0
    estimator: str = "unbiased"
    normalize: bool = False


class FMIAlphaLoss(Objective, function=functional.f_mi_alpha):
    """f-mutual information by an alpha-divergence. Call: loss(u, v, groups=None).

    Examples:
        >>> loss = fastcl.losses.FMIAlphaLoss(alpha=2.0)
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -0.5
    """

    alpha: float = 2.0
    eps: float = 1e-3
    normalize: bool = False


class MINCLoss(Objective, function=functional.minc):
    """MINC with its running statistic. Call: loss(u, v, target_u=None, target_v=None).

        statistic <- ema * statistic + (1 - ema) * mean of z z^T over both views

    The first batch sets it. It is updated in training only, before it is used, from the online features of all ranks of `group`;
    without a group, of all ranks where torch.distributed runs (the loss itself is then of own rows). These ranks keep the same
    statistic, however many rows each has. The loss is a surrogate with the right gradient; `value`, written at each call, is what
    is minimised, over the rows that the statistic takes in (in evaluation without a group: own rows), with the statistic as it
    now is:

        value = -2 mean_i <u_i, v_i> + mean <z, statistic z>

    Args:
        d: the width of a row.
        ema: the weight of the old statistic, in [0, 1); 0 takes each batch's own.
        gha: see below.

    Raises:
        ValueError: for an ema outside [0, 1), or a width that is not > 0.

    Examples:
        >>> loss = fastcl.losses.MINCLoss(4)
        >>> x = torch.eye(4, requires_grad=True)
        >>> loss(x, x).backward()
        >>> round(loss.value.item(), 4)
        -1.75
    """

    d: int = field(kw_only=False)
    ema: float = 0.8
    gha: bool = True
    normalize: bool = False

    statistic: Tensor = field(init=False)
    updates: Tensor = field(init=False)
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("d", self.d, least=1)
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema: expected the weight of the old statistic, in [0, 1), got {self.ema}")
        self.register_buffer("statistic", torch.zeros(self.d, self.d, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("value", torch.zeros((), dtype=torch.float32), persistent=False)

    def forward(self, *rows: Any, **data: Any) -> Tensor:
        """The surrogate of these rows; in training the statistic takes them in first."""
        self._take_in(*rows, **data)
        loss: Tensor = self.function(*rows, statistic=self.statistic, **data, **self.arguments())
        return loss

    @torch.no_grad()
    def _take_in(self, *rows: Any, **data: Any) -> None:
        """Write the value, in training with the statistic moved first."""
        everybody = self.training and dist.is_available() and dist.is_initialized()
        placed = any(map(is_dtensor, (*rows, *data.values())))  # which bring their ranks with them
        group = dist.group.WORLD if self.group is None and everybody and not placed else self.group
        moment, aligned = second_moment(*rows, **data, width=self.d, normalize=self.normalize, group=group)
        if placed:
            moment, aligned = (t.full_tensor() for t in (moment, aligned))  # type: ignore[attr-defined]
        if self.training:
            kept = torch.where(self.updates == 0, 0.0, self.ema)
            self.statistic.lerp_(moment.to(self.statistic.dtype), (1.0 - kept).to(self.statistic.dtype))
            self.updates.add_(1)
        self.value.copy_((self.statistic * moment).sum() - 2.0 * aligned)

    def extra_repr(self) -> str:
        return f"{self.d}, ema={self.ema}, {super().extra_repr()}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in ("statistic", "value")}
        super()._apply(fn, recurse)
        for name, before in kept.items():  # means of squares: no half precision, whatever becomes of the model
            after = getattr(self, name)
            if after.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before.to(after.device))
        return self
