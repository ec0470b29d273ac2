"""A learned factor with a bound, and learned numbers as parameters of one element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import transforms
from ..distributed import evened
from ..distributed.dtensors import replicated
from ..equation import checks
from ..equation.arguments import declared


class LogitScale(nn.Module):
    """A factor > 0 held by its logarithm, so that a step of an optimiser multiplies it; learned or fixed.

        scale = exp(min(log, log(largest)))

    Nothing is clamped in place, which copies of the parameter (FSDP2's gathered one, a master copy in float32) would not see.
    Beyond the bound a gradient that brings the logarithm back passes as it is, as CLIP's clamp after each step would let it; one
    that would take it further is 0. So a step past the bound is the last in that direction.

    The parameter has one element in one dimension, since FSDP2 shards no 0-dim parameter; 0-dim ones of older checkpoints load.

    Args:
        initial: the factor to start from, a number > 0.
        largest: its upper bound, a number > 0, or None.
        learnable: whether it is a parameter (otherwise a buffer).

    Raises:
        ValueError: for numbers that are not > 0, or an initial factor above the largest.

    Examples:
        >>> scale = fastcl.losses.LogitScale(1 / 0.07, largest=100.0)
        >>> round(float(scale().detach()), 4)
        14.2857
    """

    log: Tensor

    @declared
    def __init__(self, initial: float, largest: float | None = None, learnable: bool = True) -> None:
        super().__init__()
        _check_bounds("initial", initial, "largest", largest)
        self.largest = largest
        self.log = learnable_or_fixed(self, "log", math.log(initial), learnable)

    def forward(self) -> Tensor:
        """The factor, a 0-dim tensor; float32 where the logarithm is held in half precision."""
        log = replicated(self.log).to(torch.promote_types(self.log.dtype, torch.float32)).reshape(())
        if self.largest is not None:
            bound = math.log(self.largest)
            # A transform takes the plain form, which differs in its gradient beyond the bound alone.
            log = log.clamp(max=bound) if transforms.active() else _AtMost.apply(log, bound)
        return log.exp()

    def extra_repr(self) -> str:
        return f"log={number(self.log)}, largest={self.largest}, learnable={self.log.requires_grad}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        reshape_numbers(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_bounds(name: str, initial: float, name_of_largest: str, largest: float | None) -> None:
    in_float32 = torch.zeros(())
    checks.positive_number(name, initial, in_float32)
    if largest is not None and initial > checks.positive_number(name_of_largest, largest, in_float32):
        raise ValueError(f"{name}: expected at most {name_of_largest} = {largest}, got {initial}")


def given_or_learned(module: Any) -> None:
    """Make of a module's `logit_scale` a LogitScale where that is a number; what else is given is the scale itself."""
    if isinstance(module.logit_scale, (LogitScale, Tensor)) or stated(module, "logit_scale"):
        if module.largest_scale is not None:
            checks.positive_number("largest_scale", module.largest_scale, torch.zeros(()))
        return
    _check_bounds("logit_scale", module.logit_scale, "largest_scale", module.largest_scale)
    module.logit_scale = LogitScale(module.logit_scale, module.largest_scale, module.learnable)


def factor(scale: Any, group: Any) -> Any:
    """What a loss over these ranks multiplies by. A bound asks for the sign of the gradient of all ranks' rows."""
    if not isinstance(scale, LogitScale):
        return scale
    return scale() if scale.largest is None else evened(scale(), group)


class _AtMost(torch.autograd.Function):
    """min(value, bound), whose gradient beyond the bound is 0 in the one direction and passes in the other.

    It has no jvp: torch.compile takes no Function that has one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, bound: float) -> Tensor:
        return value.clamp(max=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        value, ctx.bound = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (value,), (g,) = ctx.saved_tensors, upstream
        return torch.where((value > ctx.bound) & (g < 0), 0.0, g), None


def stated(module: nn.Module, name: str) -> bool:
    """Whether a subclass states it by a property: declared settings leave nothing of their name on the class."""
    return hasattr(type(module), name)


def learnable_or_fixed(module: nn.Module, name: str, value: float, learnable: bool) -> Tensor:
    """A parameter of the module with one element, or a buffer: a number that float32 holds."""
    tensor = torch.tensor([float(checks.number(name, value, torch.zeros(())))], dtype=torch.float32)
    if not learnable:
        module.register_buffer(name, tensor)
        return tensor
    parameter = nn.Parameter(tensor)
    module.register_parameter(name, parameter)
    return parameter


def reshape_numbers(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Before a state is loaded: one element is one element, in no dimension or in one."""
    for name, held in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor) and saved.numel() == held.numel() == 1 and saved.shape != held.shape:
            state_dict[prefix + name] = saved.reshape(held.shape)


def number(t: Tensor) -> str:
    """The number in a tensor of one element, or its dtype and where it is, for one that holds none here."""
    try:
        if type(t) in (Tensor, nn.Parameter) and not t.is_meta:  # a DTensor would ask other ranks
            return f"{t.item():.4g}"
    except (RuntimeError, AssertionError):  # a graph is captured, or every tensor is taken for a fake one
        pass
    return f"{str(t.dtype).removeprefix('torch.')} on {t.device.type}"
