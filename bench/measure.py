"""How a case is measured: correctness first, then peak memory in a process of its own, then methods interleaved in this one.

The memory run calls each method once at full size. Its seconds say how many rounds the time allowance has room for.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcl.backends import choice
from fastcl.bench import measuring
from fastcl.bench.measuring import by_wall, spread, step, time_interleaved

from . import ROOT
from .baselines import Baseline, baselines
from .budget import affordable
from .cases import Case
from .formulas import FASTCL, Method

CHECK_ROWS = 1024
SWEEP_ROWS = 4096
SQUARE_ROWS = 1024
SQUARE_FLOPS = 2.0 * SQUARE_ROWS**3
FULL_WIDTH = 0.55  # of the loop of fused multiply-adds: half the vector width cannot give a matmul more than 0.5
TOLERANCE = 1e-4  # relative, of value and gradient in float32: a wrong loss is wrong by far more
FMA_SECONDS = 0.05
CHECKS_PART, MEMORY_PART = 0.5, 0.6  # of the time of a case, and of what is left of it
LEAST_MEMORY = 20.0  # seconds, so that fastcl has a peak even on a busy machine
LEAST_TIMING = 6.0  # seconds: a small case whose checks took long (KeOps compiles) still times what is quick
LONG = 1.0  # seconds: a call as long needs no warm-up of its own, a few rows start the threads and load the libraries
CEILING = "ceiling: "

Tick = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """rounds: at most. allowance: seconds for the case. memory: whether to run the memory process."""

    rounds: int = 7
    allowance: float = math.inf
    memory: bool = True


# ---- correctness ----------------------------------------------------------------------------------------------------------


def exact(case: Case, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradients of the float64 definition on these very numbers, on the CPU."""
    return measuring.exact(FASTCL[case.loss], x, y)


def errors(case: Case, method: Method, truth: tuple[Tensor, Tensor] | None = None) -> tuple[float, float]:
    """Relative errors of value and gradient against the float64 definition, at CHECK_ROWS rows."""
    x, y = small(case).inputs()
    return measuring.errors(method, exact(case, x, y) if truth is None else truth, x, y)


def small(case: Case) -> Case:
    """The case at the size of the check."""
    return case.resized(min(case.n, CHECK_ROWS))


def check(case: Case, baseline: Baseline, method: Method, truth: tuple[Tensor, Tensor]) -> Result:
    """Errors and whether they are small enough; a method that raises is reported, not raised."""
    try:
        value_error, gradient_error = errors(case, method, truth)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    right = value_error < TOLERANCE and gradient_error < TOLERANCE  # NaN is not
    return {"value_error": value_error, "gradient_error": gradient_error, "right": right}


# ---- time -----------------------------------------------------------------------------------------------------------------


_SWEPT: dict[tuple[str, str, int, int], dict[int, float]] = {}  # cases of one loss and width share a sweep


def sweep(case: Case, baseline: Baseline) -> tuple[int, dict[str, float]]:
    """The chunk size that is quickest at SWEEP_ROWS rows, and the seconds of a call with each."""
    if len(baseline.choices) == 1:
        return baseline.choices[0], {}
    part = case.resized(min(case.n, SWEEP_ROWS))
    key = (baseline.name, case.loss, part.n, part.d)
    if key not in _SWEPT:
        x, y = part.inputs()
        step(baseline.make(baseline.choices[0]), x, y)
        _SWEPT[key] = {chunk: by_wall(partial(step, baseline.make(chunk), x, y)) for chunk in baseline.choices}
    found = _SWEPT[key]
    return min(found, key=lambda chunk: found[chunk]), {str(chunk): seconds for chunk, seconds in found.items()}


# ---- memory ---------------------------------------------------------------------------------------------------------------


def memory_run(case: Case, chosen: dict[str, int], seconds: float, tick: Tick = lambda name: None) -> dict[str, Result]:
    """Peak bytes and seconds of one call of each method, in the order given, until the seconds are used up."""
    command = [sys.executable, "-m", "bench.memory", case.name, str(case.n), str(case.d)]
    command += [f"{name}:{chunk}" for name, chunk in chosen.items()]
    found: dict[str, Result] = {}
    waiting = list(chosen)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        watch = threading.Timer(min(max(seconds, 1.0), threading.TIMEOUT_MAX), process.kill)
        watch.start()
        tick(f"{waiting[0]}, memory")
        for line in process.stdout or ():
            if line.startswith("{"):  # libraries may print, too
                answer = json.loads(line)
                found[answer.pop("method")] = answer
                waiting.pop(0)
                tick(f"{waiting[0] if waiting else 'end'}, memory")
        watch.cancel()
    return found


# ---- one case -------------------------------------------------------------------------------------------------------------


def measure(case: Case, settings: Settings, tick: Tick = lambda name: None) -> Result:
    """Everything about one case, as JSON. A method that is absent, wrong or cut keeps a row that says so, without figures."""
    begun = time.perf_counter()
    rows: dict[str, Result] = {}
    able: dict[str, Method] = {}
    chosen: dict[str, int] = {}
    truth = exact(case, *small(case).inputs())
    for baseline in baselines(case.loss):
        why = baseline.absent(case)
        if why is not None:
            rows[baseline.name] = {"absent": why}
            continue
        tick(f"{baseline.name}, check")
        row = rows[baseline.name] = {}
        if time.perf_counter() - begun > CHECKS_PART * settings.allowance and able:
            row["cut"] = "cut by the time budget before its check"
            continue
        try:
            chosen[baseline.name], swept = sweep(case, baseline)
            method = baseline.make(chosen[baseline.name])
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        if swept:
            row |= {"chunk": chosen[baseline.name], "swept": swept}
        row |= check(case, baseline, method, truth)
        if baseline.ahead:
            row["ahead"] = baseline.ahead
        if row.get("right"):
            able[baseline.name] = method
    estimates = _remember_memory(case, rows, {name: chosen[name] for name in able}, settings, begun, tick)
    ceiling = _time(case, rows, {name: able[name] for name in estimates}, estimates, settings, begun, tick)
    return {
        "case": case.name, "loss": case.loss, "n": case.n, "d": case.d, "gemms": case.gemms, "flops": case.flops,
        "methods": rows, "ceiling": ceiling, "seconds": time.perf_counter() - begun,
        "allowance": settings.allowance if math.isfinite(settings.allowance) else None,
    }  # fmt: skip


def _remember_memory(
    case: Case, rows: dict[str, Result], chosen: dict[str, int], settings: Settings, begun: float, tick: Tick
) -> dict[str, float]:
    """Peak bytes into the rows; returns the seconds of one call of each method, None-free, for those that may be timed."""
    if not settings.memory or not chosen:
        return dict.fromkeys(chosen, 0.0)
    left = settings.allowance - (time.perf_counter() - begun)
    answers = memory_run(case, chosen, max(MEMORY_PART * left, LEAST_MEMORY), tick)
    estimates = {}
    for name in chosen:
        answer = answers.get(name, {"cut": "the time of the case ran out before its memory run"})
        rows[name] |= {key: value for key, value in answer.items() if key != "seconds"}
        if "seconds" in answer:
            estimates[name] = answer["seconds"]
            rows[name]["one_call"] = answer["seconds"]
    if "fastcl" in chosen:  # it is always timed
        estimates.setdefault("fastcl", 0.0)
    return estimates


def _time(
    case: Case, rows: dict[str, Result], able: dict[str, Method], estimates: dict[str, float], settings: Settings,
    begun: float, tick: Tick,
) -> dict[str, float]:  # fmt: skip
    """Medians and quartiles into the rows; returns the ceilings, which took turns with the methods."""
    if "fastcl" not in able:
        return {}
    end = max(begun + settings.allowance, time.perf_counter() + LEAST_TIMING)
    left = end - time.perf_counter()
    # The check has run each on a few rows. torch.compile compiles for all of them.
    warm = {name for name in able if estimates[name] > LONG and name != "torch.compile"}
    kept, fits = affordable(estimates, left, "fastcl", warm) if math.isfinite(left) else (list(able), settings.rounds)
    for name in able:
        if name not in kept:
            rows[name]["cut"] = f"cut by the time budget: one call takes {estimates[name]:.1f} s"
    x, y = case.inputs()
    steps = {name: partial(step, able[name], x, y) for name in kept}
    limits, rates = ceiling_steps(case)
    seconds = time_interleaved(
        steps | limits, min(settings.rounds, fits), tick, lambda: time.perf_counter() > end, warm
    )
    for name in kept:
        rows[name] |= spread(seconds[name])
        rows[name]["against_fastcl"] = statistics.median(
            theirs / ours for theirs, ours in zip(seconds[name], seconds["fastcl"], strict=True)
        )
    found = {name: statistics.median(values) for name, values in rates.items()}
    found["matmul"] = _product(case)[0] / statistics.median(seconds[f"{CEILING}matmul"])
    found["square"] = SQUARE_FLOPS / statistics.median(seconds[f"{CEILING}square"])
    return found


def _product(case: Case) -> tuple[float, tuple[int, int]]:
    """Flops and shape of the matmul that is the ceiling: as deep as the case's, at most 4096 rows."""
    n = min(case.rows, SWEEP_ROWS)
    return 2.0 * n * n * case.d, (n, case.d)


def ceiling_steps(case: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, list[float]]]:
    """This machine's own limits as steps that take turns: torch's float32 matmul, and a loop of fused multiply-adds.

    One matmul is as deep as the case's, the other a square one, which tells what vectors the BLAS uses: at small depths
    it is bound by what it writes.
    """
    a, b = (torch.randn(_product(case)[1]) for _ in range(2))
    square = torch.randn(SQUARE_ROWS, SQUARE_ROWS)
    steps: dict[str, Callable[[], Any]] = {
        f"{CEILING}matmul": lambda: a @ b.T, f"{CEILING}square": lambda: square @ square
    }  # fmt: skip
    rates: dict[str, list[float]] = {}
    if choice.reason("cpu", torch.device("cpu"), torch.float32) is None:
        rates["fma"] = []
        steps[f"{CEILING}fma"] = lambda: rates["fma"].append(float(torch.ops.fastcl.cpu_fma_peak(FMA_SECONDS)))
    return steps, rates


# ---- the machine ----------------------------------------------------------------------------------------------------------


def environment() -> Result:
    """What the figures hold for."""
    return measuring.environment() | {"commit": _commit()}


def _commit() -> str:
    """The commit, and whether sources differ from it."""
    try:
        name, changes = (
            subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
            for arguments in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--", "fastcl", "csrc", "triton_kernels", "bench/*.py"),
            )
        )
    except OSError:  # no git on this machine
        return "unknown"
    return (name or "unknown") + (" with changes" if changes else "")


def quiet() -> None:
    """Warnings of the libraries that are measured are not ours to print."""
    warnings.simplefilter("ignore")
