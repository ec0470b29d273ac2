"""How a loss is measured: errors against float64 first, then time, all methods in turns; and what the figures hold for."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor

from ..backends import choice, extension
from ..equation.arguments import one_of
from ..version import __version__
from .losses import Method

TURN_SECONDS = 0.02  # of one method in one round, or one call where that takes longer


def views(n: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two views of one batch, (n, d), with cosines of positives about 0.45: the loss is neither at chance nor near zero.

    Near zero the baselines lose digits that fastcl keeps (the positive stays outside its reduction): not the point here.
    """
    generator = torch.Generator().manual_seed(n * 1000 + d)
    x = torch.randn(n, d, generator=generator)
    y = x + 2.0 * torch.randn(n, d, generator=generator)
    return x.to(device, dtype).requires_grad_(), y.to(device, dtype).requires_grad_()


def check_device(device: str) -> None:
    """Raise ValueError unless rows can be made there."""
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected cpu or a GPU that torch has here, got {device!r} ({error})") from None
    one_of("device", kind, ("cpu", "cuda"))


def step(method: Method, x: Tensor, y: Tensor) -> Tensor:
    """One forward and backward; returns the value, leaves the gradients in x.grad and y.grad."""
    x.grad = y.grad = None
    value = method(x, y)
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss: expected a tensor of one number that has a gradient, got {got}")
    value.backward()
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return value.detach()


# ---- correctness ----------------------------------------------------------------------------------------------------------


def exact(method: Method, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradients of the method on these very numbers in float64, on the CPU; ours by the definition."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in (x, y)]
    before = os.environ.get(choice.ENVIRONMENT_VARIABLE)
    os.environ[choice.ENVIRONMENT_VARIABLE] = "reference"
    try:
        value = step(method, *leaves)
    finally:
        os.environ.pop(choice.ENVIRONMENT_VARIABLE)
        if before is not None:
            os.environ[choice.ENVIRONMENT_VARIABLE] = before
    return value, flat_gradient(leaves)


def flat_gradient(leaves: Iterable[Tensor]) -> Tensor:
    """The gradients as one float64 vector; 0 where a loss has none to give."""
    return torch.cat(
        [(torch.zeros_like(t) if t.grad is None else t.grad).detach().cpu().double().flatten() for t in leaves]
    )


def errors(method: Method, truth: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> tuple[float, float]:
    """Relative errors of value and gradient at these leaves."""
    value, gradient = truth
    got = step(method, x, y).cpu().double()
    difference = flat_gradient((x, y)) - gradient
    return float((got - value).abs() / value.abs()), float(difference.norm() / gradient.norm())


# ---- time -----------------------------------------------------------------------------------------------------------------


def by_wall(run: Callable[[], Any]) -> float:
    """Seconds of one call: of as many as fit in TURN_SECONDS the median, of a longer one itself.

    A single call of a few milliseconds would be charged for what the method before it left in caches and in memory.
    """
    seconds: list[float] = []
    while sum(seconds) < TURN_SECONDS:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def time_interleaved(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    tick: Callable[[str], None] = lambda name: None,
    stop: Callable[[], bool] | None = None,
    warm: Container[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each method in each round; all methods take turns, after one warm-up each of those that are not `warm`.

    `stop` may end it after a round.
    """
    for name, run in steps.items():
        if name not in warm:
            tick(f"{name}, warm-up")
            run()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            tick(name)
            seconds[name].append(by_wall(run))
        if stop is not None and stop():
            break
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, and of how many."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
    return {"median": statistics.median(seconds), "low": low, "high": high, "rounds": len(seconds)}


# ---- the machine ----------------------------------------------------------------------------------------------------------


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "fastcl": __version__,
        "backend": choice.choose(None, torch.device(device), torch.float32)[0],
        "isa": "none" if extension.library is None else str(extension.library.chosen_isa()),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "not MKL",
    }  # fmt: skip


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
