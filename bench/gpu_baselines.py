"""What fastcl is compared with on a GPU beside eager PyTorch: the three libraries of fused kernels.

The libraries are imported where they are installed, and listed as absent with the command that gets them elsewhere. No wheel of
theirs needs a compiler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .baselines import Baseline
from .formulas import SCALE, SIGLIP_BIAS, SIGLIP_SCALE, Method, units


def _memeff(choice: int) -> Method:
    """stable=False: by default it returns the gradient times sqrt(n / temperature), not the gradient."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1.0 / SCALE, normalized_inputs=True, stable=False)
    return lambda x, y: loss(*units(x, y))


def _inf_cl(both: bool) -> Method:
    """One direction a call; it casts the rows to float32."""
    from inf_cl.flash import cal_flash_loss

    def method(x: Tensor, y: Tensor) -> Tensor:
        x, y = units(x, y)
        loss = cal_flash_loss(x, y, scale=SCALE).mean()
        return (loss + cal_flash_loss(y, x, scale=SCALE).mean()) / 2 if both else loss

    return method


def _siglip_kernel(choice: int) -> Method:
    from siglip_kernel import fused_siglip_loss

    def method(x: Tensor, y: Tensor) -> Tensor:
        log_temperature = torch.tensor(math.log(SIGLIP_SCALE), device=x.device)
        return fused_siglip_loss(*units(x, y), log_temperature, torch.tensor(SIGLIP_BIAS, device=x.device))

    return method


def libraries(loss: str, d: int) -> list[Baseline]:
    """The libraries that have this loss."""
    found = []
    if loss == "clip":
        command = "pip install --no-deps memeff==0.3.1"
        found.append(Baseline("memeff", _memeff, module="memeff", command=command, cuda_only=True))
    if loss in ("clip", "info_nce"):
        command = "pip install --no-deps inf-cl==1.2.1"
        why = "" if d % 256 == 0 else f"takes widths that are multiples of 256, got {d}"
        found.append(
            Baseline(
                "inf-cl",
                lambda choice: _inf_cl(loss == "clip"),
                module="inf_cl",
                command=command,
                cuda_only=True,
                never=why,
            )
        )
    if loss == "siglip":
        command = "pip install --no-deps siglip-kernel==0.1.2"
        found.append(Baseline("siglip-kernel", _siglip_kernel, module="siglip_kernel", command=command, cuda_only=True))
    return found
