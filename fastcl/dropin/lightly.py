"""NTXentLoss, DirectCLRLoss, DCLLoss, DCLWLoss, MACLLoss and HypersphereLoss as in lightly 1.6 (lightly/loss).

    from lightly.loss import NTXentLoss, DCLLoss, DCLWLoss
    ->  from fastcl.dropin.lightly import NTXentLoss, DCLLoss, DCLWLoss

All scale rows to unit length. In a group of processes the rows of all are negatives, and gradients flow back to where rows
came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as torch_dist
from torch.nn import functional as F

from ..distributed import agreed
from ..equation import checks
from ..equation.arguments import absent, dense, kind_of, positive_real, said
from ..equation.intrinsics import softplus
from ..equation.masks import Mask, across_groups
from ..functional.matching import row_dot
from ..functional.rows import normalize_rows
from ..functional.uniformity import align_uniform
from ..ops import pair_reduce, pair_total
from ..precision import stacked
from ..transforms import of_keepable
from . import ranks

__all__ = [
    "DCLLoss",
    "DCLWLoss",
    "DirectCLRLoss",
    "HypersphereLoss",
    "MACLLoss",
    "NTXentLoss",
    "negative_mises_fisher_weights",
]
if not TYPE_CHECKING:  # to type checkers it would say that any name is there
    __getattr__ = absent(__name__)


def _check_views(module: nn.Module, out0: Tensor, out1: Tensor) -> None:
    checks.pair_of_matrices("out0", out0, "out1", out1, same_rows=True)
    checks.some_rows("out0", out0)


def _gathers(module: nn.Module) -> dict[str, object] | None:
    """What all ranks must share, where rows of all are taken in."""
    bank = getattr(module, "memory_bank", None)
    shared = {"temperature": module.temperature, "memory_bank_size": None if bank is None else bank.size}
    return shared if module.gather_distributed else None


def _check_maps(out0: Tensor, out1: Tensor) -> None:
    """Raise what is wrong with features that are yet to be made rows."""
    for name, out in (("out0", out0), ("out1", out1)):
        if not isinstance(out, Tensor):
            raise TypeError(f"{name}: expected a floating-point tensor, got {kind_of(out)}; pass features (n, d)")
        dense(name, out)
        if out.dim() < 2:
            raise ValueError(
                f"{name}: expected shape (n, d) or (n, d, ...), got {tuple(out.shape)}; pass a row a sample"
            )
    if out0.shape != out1.shape:
        raise ValueError(f"out1: expected the shape of out0, {tuple(out0.shape)}, got {tuple(out1.shape)}")


class MemoryBank(nn.Module):
    """The last unit rows of the second view, overwritten batch by batch; a batch that passes the end is cut off there.

    Args:
        size: (rows, d), or 0 for none.
        gather_distributed: whether the rows of all processes enter.

    Raises:
        ValueError: for a size without its d, or a negative one.
        TypeError: for one that is no integer.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int] = 0, gather_distributed: bool = False) -> None:
        super().__init__()
        given = size if isinstance(size, Sequence) else (size,)
        self.size = tuple(checks.integer("memory_bank_size", k) for k in given)
        if self.size != (0,) and (len(self.size) != 2 or min(self.size) < 0):
            raise ValueError(
                f"memory_bank_size: expected (rows, d) or 0 for no bank, got {size}; pass e.g. (4096, 128)"
            )
        self.gather_distributed = gather_distributed
        bank = F.normalize(torch.randn(self.size), dim=-1) if len(self.size) == 2 else torch.zeros(self.size)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Overwrite the oldest rows with these."""
        if self.gather_distributed and ranks.world_size() > 1:
            rows = ranks.gathered(rows)
        length = self.size[0]
        rows = rows[:length]
        end = self.bank_ptr + rows.shape[0]
        places = self.bank_ptr + torch.arange(rows.shape[0], device=rows.device)
        within, places = (places < length).unsqueeze(1), places % length
        # What is cut off stands where it would go round to, as it was: nothing is read on the host, where a graph would break.
        rows = torch.where(within, rows.to(self.bank.dtype), self.bank.index_select(0, places))
        self.bank.index_copy_(0, places, rows)
        self.bank_ptr.copy_(torch.where(end < length, end, 0))


class NTXentLoss(nn.Module):
    """NT-Xent (SimCLR), or with a memory bank InfoNCE against its rows (MoCo).

        L = mean_{i <= 2n} [ LSE_{k != i} s_ik / tau - s_ip(i) / tau ],   s over z = [out0; out1]
        with a bank:  L = mean_{i <= n} [ log(e^{s_ii / tau} + sum_k e^{<out0_i, bank_k> / tau}) - s_ii / tau ]

    Source: Chen et al. 2020 (arXiv 2002.05709), eq. 1; He et al. 2020 (arXiv 1911.05722), eq. 1.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows, d), or 0 for no bank. The bank is a buffer, `memory_bank.bank`, not in the state_dict.
        gather_distributed: whether negatives (with a bank: its new rows) come from all processes.

    Raises:
        ValueError: for values that do not fit, or where torch.distributed is not available.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_gather(gather_distributed)
        self.temperature = checks.positive_number("temperature", temperature)
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)
        self.gather_distributed = gather_distributed

    @agreed(_check_views, _gathers, even=("out0",))
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of one batch; with a bank, out1 enters it afterwards if out0 wants gradients.

        Args:
            out0: (n, d) floating, the first views.
            out1: (n, d), dtype of out0, the second views.

        Returns:
            A scalar.

        Raises:
            ValueError: for shapes that do not fit, or no rows.
            TypeError: for unsupported or mixed dtypes.
        """
        _check_views(self, out0, out1)
        unit0, unit1 = normalize_rows(out0), normalize_rows(out1)
        if self.memory_bank.size[0] > 0:
            return self._against_bank(unit0, unit1)
        views = _Views.of(unit0, unit1, self.gather_distributed)
        p = row_dot(views.rows, views.partners) / self.temperature
        total = pair_total(
            views.rows, views.columns, outer="contrast", positive=p, scale=1.0 / self.temperature, mask=views.mask
        )
        return total / p.shape[0]

    def _against_bank(self, unit0: Tensor, unit1: Tensor) -> Tensor:
        # A copy, since the bank is overwritten before the backward pass.
        bank = self.memory_bank.bank.to(unit0, copy=True)
        p = row_dot(unit0, unit1) / self.temperature
        total = pair_total(unit0, bank, outer="contrast", positive=p, scale=1.0 / self.temperature)
        if unit0.requires_grad:
            self.memory_bank.enqueue(unit1.detach())
        return total / p.shape[0]


class DirectCLRLoss(NTXentLoss):
    """NTXentLoss of the first loss_dim columns of each row, without a projection head.

    Source: Jing et al. 2021 (arXiv 2110.09348), section 6.

    Args:
        loss_dim: how many columns, > 0.
        temperature, memory_bank_size, gather_distributed: see NTXentLoss.

    Raises:
        ValueError: for values that do not fit.
    """

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed)
        self.loss_dim = checks.integer("loss_dim", loss_dim, least=1)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            out0: (n, ...) floating, the first views; further dimensions are flattened.
            out1: of the shape and dtype of out0, the second views.

        Returns:
            A scalar.

        Raises:
            ValueError: for shapes that do not fit, or no rows.
            TypeError: for unsupported or mixed dtypes.
        """
        try:
            _check_maps(out0, out1)
        except (ValueError, TypeError) as error:
            if _gathers(self) is None or ranks.world_size() == 1:
                raise
            refused: Tensor = super().forward(out0, out1, **said(str(error), isinstance(error, ValueError)))  # on all ranks
            return refused
        loss: Tensor = super().forward(*(out.flatten(1)[:, : self.loss_dim] for out in (out0, out1)))
        return loss


class MACLLoss(nn.Module):
    """Model-aware contrastive learning: NT-Xent whose temperature follows the alignment, and whose rows are reweighted.

        L = mean_{i <= 2n} sg(1 / (1 - P_i)) l_i,   l_i = LSE_{k != i} s_ik / t - s_ip(i) / t,   P_i = e^{-l_i}
        t = tau (1 + alpha (sg(mean_i s_ip(i)) - A_0)),   s over z = [z0; z1]

    Source: Huang et al. 2023 (arXiv 2207.07874).

    Args:
        temperature: tau >= 1e-8.
        alpha: how much the temperature follows, in [0, 1].
        A_0: the alignment at which the temperature is tau, in [0, 1].

    Raises:
        ValueError: for values that do not fit.
    """

    def __init__(self, temperature: float = 0.1, alpha: float = 0.5, A_0: float = 0.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.eps = 1e-8
        if positive_real("temperature", temperature) < self.eps:
            raise ValueError(f"temperature: expected a number >= 1e-8, got {temperature}")
        for name, value in (("alpha", alpha), ("A_0", A_0)):
            if not 0.0 <= checks.real(name, value) <= 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
        self.alpha = alpha
        self.A_0 = A_0

    @of_keepable
    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            z0: (n, d) floating, the first views.
            z1: (n, d), dtype of z0, the second views.

        Returns:
            A scalar.

        Raises:
            ValueError: for shapes that do not fit, or no rows.
            TypeError: for unsupported or mixed dtypes.
        """
        checks.pair_of_matrices("z0", z0, "z1", z1, same_rows=True)
        checks.some_rows("z0", z0)
        views = _Views.of(normalize_rows(z0), normalize_rows(z1), gather=False)
        aligned = row_dot(views.rows, views.partners)
        scale = 1.0 / (self.temperature * (1.0 + self.alpha * (aligned.detach().mean() - self.A_0)))
        r = pair_reduce(views.rows, scale=scale, mask=views.mask)
        losses = softplus(r - scale * aligned)
        return (losses / (self.eps - torch.expm1(-losses.detach()))).mean()


class HypersphereLoss(nn.Module):
    """Alignment and uniformity, the latter as the mean of both views.

        L = mean_i |x_i - y_i|^alpha + lam (U(x) + U(y)) / 2,   U(x) = log mean_{i < j} e^{-t |x_i - x_j|^2}

    Source: Wang & Isola 2020 (arXiv 2005.10242), section 4.1.2.

    Args:
        t: of the uniformity, > 0.
        lam: its weight.
        alpha: the power of the alignment, > 0.

    Raises:
        ValueError: for values that do not fit.
    """

    def __init__(self, t: float = 1.0, lam: float = 1.0, alpha: float = 2.0) -> None:
        super().__init__()
        self.t = positive_real("t", t)
        self.lam = checks.real("lam", lam)
        self.alpha = positive_real("alpha", alpha)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            z_a: (n, d) floating, n >= 2, the first views.
            z_b: (n, d), dtype of z_a, the second views.

        Returns:
            A scalar.

        Raises:
            ValueError: for shapes that do not fit, or fewer than 2 rows.
            TypeError: for unsupported or mixed dtypes.
        """
        checks.pair_of_matrices("z_a", z_a, "z_b", z_b, same_rows=True)
        if z_a.shape[0] < 2:
            raise ValueError(
                f"z_a: expected at least 2 rows, a pair for the uniformity, got {z_a.shape[0]}; skip such batches"
            )
        return align_uniform(z_a, z_b, alpha=self.alpha, t=self.t, weight=self.lam)


class DCLLoss(nn.Module):
    """Decoupled contrastive learning: the positive is not among the negatives; the mean of both directions.

        L = mean_{i <= 2n} [ LSE_{k not in {i, p(i)}} s_ik / tau - w_i s_ip(i) / tau ],   s over z = [out0; out1]

    Source: Yeh et al. 2022 (arXiv 2110.06848), eq. 6.

    Args:
        temperature: tau > 0.
        weight_fn: w = weight_fn(a, b), (n,), of the unit rows of a view and the other one, called once for each direction;
            None for 1. Gradients flow through it.
        gather_distributed: whether negatives come from all processes.

    Raises:
        ValueError: for values that do not fit, or where torch.distributed is not available.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_gather(gather_distributed)
        self.temperature = checks.positive_number("temperature", temperature)
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed

    @agreed(_check_views, _gathers, even=("out0",))
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of one batch, of what NTXentLoss takes; -inf for one row, which has no negatives."""
        _check_views(self, out0, out1)
        unit0, unit1 = normalize_rows(out0), normalize_rows(out1)
        views = _Views.of(unit0, unit1, self.gather_distributed)
        p = row_dot(views.rows, views.partners) / self.temperature
        if self.weight_fn is not None:
            p = p * stacked(self.weight_fn(unit0, unit1), self.weight_fn(unit1, unit0))
        energy = pair_total(views.rows, views.columns, outer="sum", scale=1.0 / self.temperature, mask=views.mask)
        return (energy - p.sum()) / p.shape[0]


class DCLWLoss(DCLLoss):
    """DCL with negative von Mises-Fisher weights, which carry no gradient.

        w_i = 2 - n softmax_i(s_ii / sigma)

    Source: Yeh et al. 2022 (arXiv 2110.06848), eq. 7.

    Args:
        temperature: tau > 0.
        sigma: the temperature of the weights, > 0.
        gather_distributed: whether negatives come from all processes; the softmax stays within one.

    Raises:
        ValueError: for values that do not fit, or where torch.distributed is not available.
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        checks.positive_number("sigma", sigma)
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """2 - n softmax_i(<out0_i, out1_i> / sigma), (n,), without gradient."""
    return 2.0 - out0.shape[0] * torch.softmax(row_dot(out0.detach(), out1.detach()) / sigma, dim=0)


class _Views(NamedTuple):
    """Both views of this process as rows, those of all processes as columns, and which pairs are negatives."""

    rows: Tensor
    columns: Tensor | None
    partners: Tensor
    mask: Mask

    @classmethod
    def of(cls, unit0: Tensor, unit1: Tensor, gather: bool) -> _Views:
        n = unit0.shape[0]
        rows = stacked(unit0, unit1)
        if not gather or ranks.world_size() == 1:
            groups = torch.arange(n, device=rows.device).repeat(2)
            return cls(rows, None, stacked(unit1, unit0), across_groups(groups))
        all0, all1 = ranks.gathered_with_gradient(unit0), ranks.gathered_with_gradient(unit1)
        own = slice(ranks.rank() * n, (ranks.rank() + 1) * n)
        groups = torch.arange(all0.shape[0], device=rows.device)
        mask = across_groups(groups[own].repeat(2), groups.repeat(2))
        return cls(rows, stacked(all0, all1), stacked(all1[own], all0[own]), mask)


def _check_gather(gather_distributed: bool) -> None:
    checks.boolean("gather_distributed", gather_distributed)
    if gather_distributed and not torch_dist.is_available():
        raise ValueError(
            "gather_distributed: expected False, since this torch has no torch.distributed, got True; "
            "install a torch with it, or pass False"
        )
