"""The compiled backends, "cpu" and "cuda": the kernels of csrc/ behind the protocol of a backend.

torch's dispatcher finds the kernels by the device of x, and releases the interpreter's lock while they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..equation.problem import Gradients, Problem, Wanted, pack
from . import extension

kernels = torch.ops.fastcl
OLDEST_CAPABILITY = (8, 0)  # of the architectures that setup.py builds for unless told


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve this device and dtype, with what mends it; None when they can."""
    if extension.library is None:
        return extension.reason
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not _registered(key):
        return f"the extension was built without kernels for {device.type}; rebuild it: {extension.REBUILD}"
    return _gpu_reason(device) if key == "CUDA" else None


@cache
def _registered(key: str) -> bool:
    """Whether the library, which registers its kernels when it is opened, at import, has some for this dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastcl::kernel_rows", key)


def _gpu_reason(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "no GPU is visible to torch; check the driver and `nvidia-smi`, or use backend='blocked'"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0 (A100 and later), and this GPU has {found[0]}.{found[1]}; use backend='blocked'"
    return None


def rows(p: Problem) -> tuple[Tensor, Tensor | None]:
    """r, and c when asked."""
    r, c = kernels.kernel_rows(*pack(p))
    return r, c if p.columns else None


def gradients(p: Problem, r: Tensor, c: Tensor | None, g: Tensor, h: Tensor | None, wanted: Wanted) -> Gradients:
    """The gradients of <g, r> + <h, c>."""
    absent = r.new_empty(0)
    given = [absent if t is None else t for t in (r, c, g, h)]
    return _present(kernels.kernel_gradients(*pack(p), *given, list(wanted)), wanted)


def total(p: Problem, positive: Tensor | None, outer: str, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """The value of the total form and its gradients for an upstream gradient of 1."""
    value, *answer, dpositive = kernels.kernel_total(*pack(p), positive, outer, list(wanted))
    return value, _present(answer, wanted), None if positive is None else dpositive


def _present(answer: Sequence[Tensor], wanted: Wanted) -> Gradients:
    return Gradients(*(t if w else None for t, w in zip(answer, wanted, strict=True)))
