"""Spectral contrastive learning, and MINC with the statistic that it keeps."""

from __future__ import annotations

import warnings
from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .. import functional
from ..distributed import Ranks
from ..equation.arguments import integer
from ..equation.checks import is_dtensor
from ..equation.names import Estimator
from ..functional.spectral import second_moment
from .objective import Objective

SWINGS = (
    "MINCLoss: ema={ema} in training without a target network lets the statistic lag behind the features, which with a momentum "
    "optimiser swings or collapses; pass target_u and target_v of a copy that moves at a rate of at least ema, or take ema=0"
)


class SpectralLoss(Objective, function=functional.spectral):
    """The spectral contrastive loss. Call: loss(u, v, groups=None).

    Examples:
        >>> loss = fastcl.losses.SpectralLoss()
        >>> x = torch.eye(4)
        >>> round(loss(x, x).item(), 4)
        -2.0
    """

    mu: float | Tensor = 1.0
    estimator: Estimator = "unbiased"
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
    now is; `lag` is how far that is from the moment of these rows:

        value = -2 mean_i <u_i, v_i> + mean <z, statistic z>      lag = |moment - statistic| / |statistic|, by Frobenius norms

    An average that lags and an optimiser with momentum m are two lags in one loop, stable only for steps with
    2 eta lambda < (1 - ema m) / (ema m): 98 times smaller at m = 0.9 for ema = 0.8 than without averaging. A target network that
    moves no faster than the statistic lets the lags cancel, so that with ema > 0 it belongs to training (torch.optim.swa_utils
    has one; its features must not feed the statistic): docs/equations.md has the recipe, the derivation and figures. A lag that
    stays above 1 says that the loop swings.

    Args:
        d: the width of a row.
        ema: the weight of the old statistic, in [0, 1); 0 takes each batch's own.
        gha: whether the statistic deflates by its lower triangle; see fastcl.functional.minc.
        mu: the largest squared norm > 0 of a row, as in fastcl.losses.SpectralLoss; None leaves rows as they are.

    Warns:
        UserWarning: in training with ema > 0 and without a target (not under torch.compile).

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
    ema: float = 0.0
    gha: bool = False
    mu: float | Tensor | None = None
    normalize: bool = False

    statistic: Tensor = field(init=False)
    updates: Tensor = field(init=False)
    value: Tensor = field(init=False)
    lag: Tensor = field(init=False)

    wide = ("statistic", "value", "lag")  # means of squares

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("d", self.d, least=1)
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema: expected the weight of the old statistic, in [0, 1), got {self.ema}")
        self.register_buffer("statistic", torch.zeros(self.d, self.d, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for name in ("value", "lag"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32), persistent=False)

    def forward(self, *rows: Any, **data: Any) -> Tensor:
        """The surrogate of these rows; in training the statistic takes them in first."""
        settings = self.arguments()
        data = self._apart(data, settings, ("statistic", "width", "training"))
        targets = dict(zip(("target_u", "target_v"), rows[2:], strict=False)) | data
        alone = targets.get("target_u") is None and targets.get("target_v") is None
        if alone and self.ema > 0.0 and self.training and not torch.compiler.is_compiling():  # which takes no warning
            warnings.warn(SWINGS.format(ema=self.ema), stacklevel=2)
        self._take_in(*rows, **data)
        loss: Tensor = self.function(*rows[:2], statistic=self.statistic, **targets, **settings)
        return loss

    def _speaks_to_all(self) -> bool:
        return True  # in training also without a group

    @torch.no_grad()
    def _take_in(self, *rows: Any, **data: Any) -> None:
        """Write the value, in training with the statistic moved first."""
        everybody = self.training and dist.is_available() and dist.is_initialized()
        placed = any(map(is_dtensor, (*rows, *data.values())))  # which bring their ranks with them
        group = dist.group.WORLD if Ranks.of(self.group) is None and everybody and not placed else self.group
        moment, aligned = second_moment(
            *rows, **data, width=self.d, training=self.training, normalize=self.normalize, mu=self.mu, group=group
        )
        if placed:
            moment, aligned = (t.full_tensor() for t in (moment, aligned))  # type: ignore[attr-defined]
        if self.training:
            kept = torch.where(self.updates == 0, 0.0, self.ema)
            self.statistic.lerp_(moment.to(self.statistic.dtype), (1.0 - kept).to(self.statistic.dtype))
            self.updates.add_(1)
        self.value.copy_((self.statistic * moment).sum() - 2.0 * aligned)
        size = torch.linalg.matrix_norm(self.statistic)
        lag = torch.linalg.matrix_norm(moment - self.statistic) / torch.where(size == 0.0, 1.0, size)
        self.lag.copy_(lag)

    def extra_repr(self) -> str:
        return f"{self.d}, ema={self.ema}, {super().extra_repr()}"
