"""The losses that can be measured: fastcl's by name, with the formula as people write it in PyTorch; others by module:function."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..equation.arguments import one_of

Method = Callable[[Tensor, Tensor], Tensor]

SCALE, TEMPERATURE, SIGLIP_SCALE, SIGLIP_BIAS = 14.0, 0.5, 10.0, -10.0
BETA, ALPHA, KCL_T, KCL_GAMMA = 1.0, 40.0, 2.0, 16.0
LOG_2 = 0.6931471805599453
ROWS = {"x", "y", "u", "v", "views"}  # what the arguments that are rows are called
EAGER_MATRICES = 9  # of rows x rows numbers at most, at the peak of an eager formula


def units(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(x), F.normalize(y)


def labels(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)


def _no_diagonal(z: Tensor, value: float = float("-inf")) -> Tensor:
    return z.masked_fill(torch.eye(z.shape[0], dtype=torch.bool, device=z.device), value)


# ---- eager: the whole matrix ----------------------------------------------------------------------------------------------


def clip(x: Tensor, y: Tensor) -> Tensor:
    x, y = units(x, y)
    logits = SCALE * x @ y.T
    return (F.cross_entropy(logits, labels(x)) + F.cross_entropy(logits.T, labels(x))) / 2


def info_nce(x: Tensor, y: Tensor) -> Tensor:
    x, y = units(x, y)
    return F.cross_entropy(SCALE * x @ y.T, labels(x))


def nt_xent(x: Tensor, y: Tensor) -> Tensor:
    z, n = torch.cat(units(x, y)), x.shape[0]
    return F.cross_entropy(_no_diagonal(z @ z.T / TEMPERATURE), torch.cat([labels(x) + n, labels(x)]))


def siglip(x: Tensor, y: Tensor) -> Tensor:
    x, y = units(x, y)
    z = SIGLIP_SCALE * x @ y.T + SIGLIP_BIAS
    return (F.softplus(z).sum() - z.diagonal().sum()) / x.shape[0]


def f_micl_js(x: Tensor, y: Tensor) -> Tensor:
    x, y = units(x, y)
    n = x.shape[0]
    energy = _no_diagonal(F.softplus(-BETA * (2.0 - 2.0 * x @ x.T)), 0.0).sum() / (n * (n - 1)) - LOG_2
    return ALPHA * energy - js_positive(x, y).mean()


def js_positive(x: Tensor, y: Tensor) -> Tensor:
    return LOG_2 - F.softplus(BETA * (x - y).square().sum(1))


def kcl(x: Tensor, y: Tensor) -> Tensor:
    x, y = units(x, y)
    n = x.shape[0]
    energies = [_no_diagonal(torch.exp(-KCL_T * (2.0 - 2.0 * u @ u.T)), 0.0).sum() / (n * (n - 1)) for u in (x, y)]
    return KCL_GAMMA * (energies[0] + energies[1]) - 2.0 * torch.exp(-KCL_T * (x - y).square().sum(1)).mean()


def spectral(x: Tensor, y: Tensor) -> Tensor:
    x, y = clipped(x), clipped(y)
    n, s = x.shape[0], x @ y.T
    return -2.0 * s.diagonal().mean() + _no_diagonal(s.square(), 0.0).sum() / (n * (n - 1))


def clipped(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm < 1.0, x, x / norm)


EAGER: dict[str, Method] = {
    "clip": clip, "info_nce": info_nce, "nt_xent": nt_xent, "siglip": siglip, "f_micl_js": f_micl_js, "kcl": kcl,
    "spectral": spectral,
}  # fmt: skip

# name -> the function and its settings, of the losses that have an eager form above; every other takes its defaults.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", {"logit_scale": SCALE}),
    "info_nce": ("info_nce", {"temperature": 1.0 / SCALE}),
    "nt_xent": ("nt_xent", {"temperature": TEMPERATURE}),
    "siglip": ("siglip", {"logit_scale": SIGLIP_SCALE, "logit_bias": SIGLIP_BIAS}),
    "f_micl_js": ("f_micl", {"divergence": "js", "beta": BETA, "alpha": ALPHA}),
    "kcl": ("kcl", {"t": KCL_T, "gamma": KCL_GAMMA}),
    "spectral": ("spectral", {}),
}


def ours(loss: str, backend: str | None = None) -> Method:
    """The loss by fastcl."""
    name, settings = SETTINGS.get(loss, (loss, {}))
    function = getattr(functional, name)
    if _rows_of(function) == 1:
        return lambda x, y: function(x, backend=backend, **settings)
    return partial(function, backend=backend, **settings)


def _required(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]


def _rows_of(function: Callable[..., Any]) -> int:
    """How many of two views it takes."""
    needed = _required(function)
    return 1 if len(needed) == 1 and needed[0].kind is not inspect.Parameter.VAR_POSITIONAL else 2


def names() -> list[str]:
    """fastcl's losses of two views."""
    functions = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]
    free = [name for name in functions if {p.name for p in _required(getattr(functional, name))} <= ROWS]
    return sorted({*free, *SETTINGS})


def method_of(loss: str, backend: str | None = None) -> Method:
    """The method of a name, or of module:function, which takes two views and is looked for in the current folder first.

    Raises:
        ValueError: for an unknown name, a function of fastcl that takes more than two views, or what is no function.
        ImportError, AttributeError: for a module or function that is not there.
    """
    if ":" not in loss:
        if loss in functional.__all__ and loss not in names():
            more = ", ".join(p.name for p in _required(getattr(functional, loss)) if p.name not in ROWS)
            raise ValueError(
                f"loss: expected one of two views, got {loss!r}, which needs {more}; give them in a function (x, y) of your own "
                "and pass module:function"
            )
        return ours(one_of("loss", loss, names()), backend)
    module, _, name = loss.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Method = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise  # what the module itself imports
        raise ModuleNotFoundError(
            f"loss: expected module:function of the current folder or of what is installed, got {loss!r}; no module {error.name!r} "
            f"in {os.getcwd()}",
            name=error.name,
        ) from None
    if not callable(function):
        raise ValueError(
            f"loss: expected a function (x, y) of two views, got {loss}, of type {type(function).__name__}"
        )
    return function


def complaint(loss: str, error: Exception) -> str:
    """What is said of a function of one's own that raises: whatever it is, it is no fault of what measures it."""
    return f"loss: expected a function (x, y) of two views that returns one number; {loss} raised {type(error).__name__}: {error}"
