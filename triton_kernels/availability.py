"""Whether Triton can serve a device and a dtype; needs no Triton itself."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tensor cores for bfloat16 and tf32, and asynchronous copies: the code of every kernel here is made and checked from there.
OLDEST_CAPABILITY = (8, 0)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the Triton backend serves the device and dtype; otherwise why not, and what mends it."""
    try:
        from triton import jit  # noqa: F401  a folder that is merely called triton has no jit
    except ImportError as error:
        return f"Triton is not installed ({error}); `pip install triton` on Linux, or backend='blocked'"
    if dtype not in DTYPES:
        return (
            f"its kernels take float32, float16 and bfloat16; convert {dtype} with x.float(), or use backend='blocked'"
        )
    if device.type == "cuda":
        return _gpu_reason(device)
    if device.type != "cpu":
        return f"it serves cuda tensors (CUDA and HIP), and these are on {device.type}; use backend='blocked'"
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly (it adds the raw bits); use float32 or float16"
        return None
    if not runs_on_cpu():
        return "its kernels need a GPU, and these are CPU tensors; x.cuda(), backend='blocked', or TRITON_INTERPRET=1 to test"
    return None


def interpreted() -> bool:
    """Whether the kernels were built for Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    from triton import JITFunction  # the interpreter's own class would need NumPy, which Triton and torch do without

    from .reductions import merge

    return not isinstance(merge, JITFunction)


def runs_on_cpu() -> bool:
    """Whether Triton's active driver takes CPU tensors: an emulator of the GPU, as tools/ptxemu installs."""
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no driver at all: "0 active drivers"
        return False


def _gpu_reason(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "no GPU is visible to torch; check the driver and `nvidia-smi`, or use backend='blocked'"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"it needs compute capability 8.0 (A100 and later), and this GPU has {found}; use backend='blocked'"
    return None
