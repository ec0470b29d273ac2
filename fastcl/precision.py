"""The library's own matrix products: in the dtype of their factors, whatever autocast says, forward and backward.

Of 16-bit rows on CUDA they are taken by tensor cores, into float32: products of 16-bit numbers are exact there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import transforms

# Asked once: torch.compile does not trace the question before torch 2.13.
_WITH_AUTOCAST = [
    kind for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu") if torch.amp.is_autocast_available(kind)
]


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast within, where there is any."""
    kind = device.type
    if kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def rounded_once(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast within, on a CPU: for terms of `widened` rows."""
    return full_precision(device) if device.type == "cpu" else nullcontext()


def widened(x: Tensor) -> Tensor:
    """Rows of a half dtype in float32, on a CPU, where sweeps over them take about as long.

    Of terms whose gradients cancel the sum is rounded, and not each: rounded alone, they leave more than they are.
    """
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def swept(x: Tensor) -> Tensor:
    """Rows as the op takes them: where autocast rounds them there, rounded, in float32.

    What is taken out of a sweep again, or compared with what is in it, is of these rows too: else a rounding is left.
    """
    kind = x.device.type
    if kind not in ("cpu", "cuda") or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    dtype = torch.get_autocast_dtype(kind)
    return x if x.dtype == dtype else x.to(dtype).float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, and its gradients likewise: a backward may run under autocast too."""
    if transforms.active():
        with full_precision(a.device):
            return a @ b
    found: Tensor = _Product.apply(a, b)
    return found


def stacked(*views: Tensor) -> Tensor:
    """[u; v; ...]. Autocast's own cat refuses rows of the half precision that it does not cast to."""
    with full_precision(views[0].device):
        return torch.cat(views)


class _Product(torch.autograd.Function):
    """a @ b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device):
            return a @ b

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (g,), (of_a, of_b) = ctx.saved_tensors, upstream, ctx.needs_input_grad
        return (product(g, b.T) if of_a else None), (product(a.T, g) if of_b else None)


def on_tensor_cores(x: Tensor) -> bool:
    """Whether 16-bit rows are multiplied as they are, into float32: by CUDA, and where no setting lets float16 add up in itself."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cuda" or torch.version.hip is not None:
        return False
    into_float32 = "dtype" in torch.ops.aten.mm.overloads()  # from torch 2.8 on
    return into_float32 and not (x.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation)


def dot_precision(t: Tensor) -> str:
    """How float32 operands are multiplied: torch's own setting, as torch.mm follows it."""
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if t.dtype == torch.float32 and setting == "tf32" else "ieee"


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 of a 16-bit matrix and one of 16 bits or of float32, which two of 16 bits stand for.

    Two bfloat16 numbers hold 16 bits of a float32 number, two float16 numbers 22 of the largest one of the matrix, which is
    brought to 2^12 by a power of two: less is lost than where the result is rounded to 16 bits.
    """
    if b.dtype == a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    unit = None
    if a.dtype == torch.float16:
        unit = torch.exp2(torch.floor(torch.log2(b.abs().amax().clamp(1e-30, 3e38))) - 12.0).nan_to_num(1.0)
        b = b / unit
    high = b.to(a.dtype)
    low = (b - high).nan_to_num(0.0, 0.0, 0.0).to(a.dtype)  # infinite entries have no rest
    found = torch.mm(a, high, out_dtype=torch.float32).add_(torch.mm(a, low, out_dtype=torch.float32))
    return found if unit is None else found.mul_(unit)
