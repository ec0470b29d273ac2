"""How a case is measured: correctness first, then methods interleaved in one process, then peak memory in fresh processes."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fastcl
from fastcl import backends

from .baselines import FASTCL, Method, methods
from .cases import Case

CHECK_ROWS = 1024
TOLERANCE = 1e-4  # relative, of value and gradient in float32: a wrong loss is wrong by far more


def step(method: Method, x: Tensor, y: Tensor) -> Tensor:
    """One forward and backward; returns the value, leaves the gradients in x.grad and y.grad."""
    x.grad = y.grad = None
    value = method(x, y)
    value.backward()
    return value.detach()


def errors(case: Case, make: Callable[[], Method]) -> tuple[float, float]:
    """Relative errors of value and gradient against the float64 definition, at CHECK_ROWS rows."""
    small = case.resized(min(case.n, CHECK_ROWS))
    x, y = small.inputs()
    exact_x, exact_y = (t.detach().double().requires_grad_() for t in (x, y))
    before = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    os.environ[backends.ENVIRONMENT_VARIABLE] = "reference"
    try:
        exact = step(FASTCL[case.loss], exact_x, exact_y)
    finally:
        os.environ.pop(backends.ENVIRONMENT_VARIABLE)
        if before is not None:
            os.environ[backends.ENVIRONMENT_VARIABLE] = before
    value = step(make(), x, y)
    got = torch.cat([t.grad.double().flatten() for t in (x, y) if t.grad is not None])
    want = torch.cat([t.grad.flatten() for t in (exact_x, exact_y) if t.grad is not None])
    return float((value.double() - exact).abs() / exact.abs()), float((got - want).norm() / want.norm())


def time_interleaved(
    steps: dict[str, Callable[[], Any]], rounds: int, tick: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each method in each round; all methods take turns, after one warm-up each."""
    for name, run in steps.items():
        tick(f"{name}, warm-up")
        run()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            tick(name)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(case: Case, method: str) -> int | None:
    """Bytes that one forward and backward adds to a fresh process that holds its inputs; None when it fails."""
    command = [sys.executable, "-m", "bench.memory", case.name, method, str(case.n)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def measure(
    case: Case, rounds: int, tick: Callable[[str], None] = lambda name: None, memory: bool = True
) -> dict[str, Any]:
    """Everything about one case, as JSON: methods that are wrong keep their errors and get no figure."""
    makers = methods(case.loss, case.n)
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        tick(f"{name}, check")
        value_error, gradient_error = errors(case, make)
        rows[name] = {"value_error": value_error, "gradient_error": gradient_error}
        rows[name]["right"] = value_error < TOLERANCE and gradient_error < TOLERANCE
    x, y = case.inputs()
    right = {name: makers[name]() for name in makers if rows[name]["right"]}
    steps = {name: lambda method=method: step(method, x, y) for name, method in right.items()}  # type: ignore[misc]
    for name, seconds in time_interleaved(steps, rounds, tick).items():
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
        rows[name] |= {"median": statistics.median(seconds), "low": low, "high": high}
    for name in right if memory else ():
        tick(f"{name}, memory")
        rows[name]["peak_bytes"] = peak_memory(case, name)
    return {
        "case": case.name, "loss": case.loss, "n": case.n, "d": case.d, "gemms": case.gemms, "flops": case.flops,
        "methods": rows, "ceiling": ceiling(),
    }  # fmt: skip


def ceiling(seconds: float = 0.2) -> dict[str, float]:
    """This machine's own limits, in flops a second: the FMA loop of the widest instruction set, and torch's float32 matmul."""
    a = torch.randn(2048, 512)
    b = torch.randn(512, 2048)
    product = min(time_interleaved({"mm": lambda: a @ b}, 7)["mm"])
    limits = {"matmul": 2.0 * 2048 * 2048 * 512 / product}
    if backends.reason("cpu", torch.device("cpu"), torch.float32) is None:
        limits["fma"] = float(torch.ops.fastcl.cpu_fma_peak(seconds))
    return limits


def environment() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": _processor(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "fastcl": fastcl.__version__, "commit": _commit(),
        "backend": backends.choose(None, torch.device("cpu"), torch.float32)[0],
    }  # fmt: skip


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> Iterable[str]:
    if os.path.exists(path):
        with open(path) as file:
            yield from file


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
