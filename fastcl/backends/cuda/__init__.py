"""The backend "cuda": kernels written by hand for compute capability 8.0 and later, in three forms.

strip    torch's matrix products on tiles in a bounded workspace, two kernels between them: whatever there is, limits alone
fused    dot products, pair function and reduction in one kernel, nothing of size n x m in memory
hopper   tiles by wgmma, for rows of two bytes on compute capability 9.0

aligned  a whole loss of a small batch: the fused kernels, and three around them (aligned.py)

FASTCL_CUDA (read at each call) is strip, fused or hopper, where their kernels hold the problem, or auto: the table in form.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ...equation.problem import Gradients, Problem, Wanted
from .. import extension
from ..tiles import plain
from . import aligned, fused, hopper, launches, strip
from .form import OLDEST_CAPABILITY, form

__all__ = ["aligned", "gradients", "rows", "total", "unavailable"]
FORMS: dict[str, ModuleType] = {"strip": strip, "fused": fused, "hopper": hopper}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve this device and dtype, with what mends it; None when they can."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type}; use backend='blocked'"
    if extension.cuda_reason is not None:
        return extension.cuda_reason
    if (why := launches.stale()) is not None:
        return why
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "no GPU is visible to torch; check the driver and `nvidia-smi`, or use backend='blocked'"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0 (A100 and later), and this GPU has {found[0]}.{found[1]}; use backend='blocked'"
    return None


@contextmanager
def _serving(p: Problem, gradients: bool) -> Iterator[tuple[ModuleType, Problem]]:
    """The form that serves, and the problem as it takes it."""
    served = FORMS[form(p, gradients)]
    with plain(p, served.LEAST_PERIOD) as p:
        yield served, p


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r (n,), and c (m,) when p.columns."""
    with _serving(p, gradients=False) as (served, p):
        r, c = served.rows(p)
        return r, c


def gradients(
    p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted, dtype: torch.dtype | None = None
) -> Gradients:  # fmt: skip
    """The gradients of <g, r> + <h, c>; dx and dy in `dtype`, that of x unless told."""
    with _serving(p, gradients=True) as (served, p):
        answer: Gradients = served.gradients(p, r, c, g, h, wanted, dtype)
        return answer


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """The value of the total form and its gradients, all in the accumulation dtype."""
    with _serving(p, gradients=any(wanted)) as (served, p):
        value, answer, dpositive = served.total(p, positive, outer, wanted)
        return value, answer, dpositive
