"""The objectives that the examples train, one row each.

All f-MICL divergences share beta = 1 and one weight, alpha = 5 (the paper, too, takes one for all vision: 40, for far longer
training). What the others take beside their defaults stands in their row: it was chosen for trainings of a hundred steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import functional, losses

Module = Callable[..., nn.Module]


@dataclass(frozen=True)
class Entry:
    """One objective.

    title: as the tables print it.
    module: makes the loss module, called as loss(u, v); keywords: backend, and dim where `sized`.
    labels: it is called as loss(u, v, labels): supervised.
    momentum: v comes from a slowly moving copy of the encoder, and carries no gradient.
    rate: the weight of the old weights in each step of that copy.
    both: u and v are then both views' rows, one after the other.
    degenerate: the paper predicts that its embeddings degenerate.
    """

    title: str
    module: Module
    sized: bool = False
    labels: bool = False
    momentum: bool = False
    both: bool = False
    degenerate: bool = False
    rate: float = 0.9

    def build(self, dim: int, backend: str | None) -> nn.Module:
        return self.module(dim, backend=backend) if self.sized else self.module(backend=backend)


class SupervisedTwoViews(losses.SupConLoss):
    """SupCon of both views, which carry the same labels."""

    def forward(self, u: Tensor, v: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        return super().forward(torch.cat([u, v]), labels.repeat(2))


class QueuedMoCo(nn.Module):
    """MoCo with a queue of its own, short: on few images a long one would hold the other views of the batch itself."""

    def __init__(self, dim: int, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        self.queue = losses.MoCoQueue(dim, length=256)

    def forward(self, u: Tensor, v: Tensor) -> Any:
        loss = functional.moco(u, v, self.queue.rows, backend=self.backend)
        self.queue.enqueue(v)
        return loss


class TargetedMINC(losses.MINCLoss):
    """MINC with its averaged statistic, and the target network that this needs; rows bounded as for the spectral loss."""

    def __init__(
        self, dim: int, backend: str | None, ema: float = 0.8, gha: bool = False, mu: float | None = 4.0
    ) -> None:
        super().__init__(dim, ema=ema, gha=gha, mu=mu, backend=backend)

    def forward(self, u: Tensor, v: Tensor) -> Any:  # type: ignore[override]
        (u1, u2), (target_u, target_v) = u.chunk(2), v.chunk(2)
        return super().forward(u1, u2, target_u=target_u, target_v=target_v)


class TwoWayMoCo(losses.MoCoV3Loss):
    """MoCo v3 of the queries of both views and the keys of both."""

    def forward(self, u: Tensor, v: Tensor) -> Any:  # type: ignore[override]
        return super().forward(*u.chunk(2), *v.chunk(2))


def f_micl(divergence: str, q: float | None = None) -> Module:
    return partial(losses.FMICLLoss, divergence=divergence, alpha=5.0, q=q)


OBJECTIVES = {
    "info_nce": Entry("InfoNCE", partial(losses.InfoNCELoss, temperature=0.2)),
    "f_micl.kl": Entry("f-MICL KL", f_micl("kl")),
    "f_micl.js": Entry("f-MICL JS", f_micl("js")),
    "f_micl.pearson": Entry("f-MICL Pearson", f_micl("pearson")),
    "f_micl.sh": Entry("f-MICL SH", f_micl("sh")),
    "f_micl.tsallis": Entry("f-MICL Tsallis", f_micl("tsallis", q=1.5)),
    "f_micl.vlc": Entry("f-MICL VLC", f_micl("vlc")),
    "f_micl.jeffrey": Entry("f-MICL Jeffrey", f_micl("jeffrey")),
    "f_micl.rkl": Entry("f-MICL RKL", f_micl("rkl"), degenerate=True),
    "f_micl.neyman": Entry("f-MICL Neyman", f_micl("neyman"), degenerate=True),
    "f_micl_dv": Entry("f-MICL KL, DV", losses.FMICLDVLoss),
    "clip": Entry("CLIP", losses.CLIPLoss),
    "nt_xent": Entry("NT-Xent", partial(losses.NTXentLoss, temperature=0.2)),
    "align_uniform": Entry("align + uniform", losses.AlignUniformLoss),
    "dcl": Entry("DCL", losses.DCLLoss),
    "dclw": Entry("DCLW", partial(losses.DCLLoss, sigma=0.5)),
    "dhel": Entry("DHEL", losses.DHELLoss),
    "kcl": Entry("KCL Gaussian", partial(losses.KCLLoss, gamma=3.0)),
    "spectral": Entry("spectral", partial(losses.SpectralLoss, mu=4.0)),
    "minc": Entry("MINC", TargetedMINC, sized=True, momentum=True, both=True),
    "f_mi_alpha": Entry("f-MI alpha", losses.FMIAlphaLoss),
    "siglip": Entry("SigLIP", losses.SigLIPLoss),
    "debiased": Entry("debiased", losses.DebiasedLoss),
    "hard_negative": Entry("hard negatives", losses.HardNegativeLoss),
    "moco": Entry("MoCo", QueuedMoCo, sized=True, momentum=True),
    "moco_v3": Entry("MoCo v3", TwoWayMoCo, momentum=True, both=True),
    "sup_con": Entry("SupCon (labels)", partial(SupervisedTwoViews, temperature=0.2), labels=True),
}
