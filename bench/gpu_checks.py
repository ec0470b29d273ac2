"""The parts of the day of the card that are right or wrong: losses by every route, sizes, graphs, streams, threads, sanitizers.

Each part is a generator of results, one a line in its file; `left` says how many seconds it may still take.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fastcl
from tests.objectives.cases import CASES
from tests.objectives.cases import Case as LossCase
from tests.objectives.witnesses import gradients, library

from . import ROOT, device_checks
from .capture import replays, waits
from .cases import Case
from .device_checks import Item, Result, Route, first_line, routes, setting
from .formulas import EAGER, ours

WIDTHS = (100, 128, 512, 768, 1024)
LOSSES = ("clip", "siglip", "nt_xent", "f_micl_js", "info_nce", "kcl")
WIDE = ("clip", "siglip", "nt_xent", "sup_con", "f_micl", "kcl", "spectral")  # of the cases of tests/objectives
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 2e-5}


@dataclass(frozen=True)
class Day:
    """What every part is told. rows: a number of rows instead of each part's own, to try the command itself."""

    device: torch.device
    rows: int | None
    end: float
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        return self.end - self.clock()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def facts(device: torch.device) -> Result:
    """What the figures hold for, beside torch and the commit."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    if device.type != "cuda":
        return {"device": "a CPU: the command was tried, and nothing here is a figure", "triton": version}
    if version != "none" and "fused" not in device_checks.forms_of("triton", device, torch.bfloat16):
        version += " (too old for the fused form here)"
    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}"
    return {"device": properties.name, "capability": capability, "cuda": torch.version.cuda, "triton": version}


def losses(day: Day) -> Iterator[Result]:
    """Every loss in every dtype by every route of the first backend, then of the others, then all arguments in float32."""
    sizes = ((day.rows or 203, 37),)
    first = routes(day.device, torch.float32)[0].backend
    todo = []
    for mine in (True, False):
        for item in device_checks.wanted(sizes, every_argument=False, cases=CASES):
            todo += [(item, r) for r in routes(day.device, item.dtype) if (r.backend == first) == mine]
    every = device_checks.wanted(((day.rows or 256, 64),), every_argument=True, cases=CASES)
    todo += [(item, routes(day.device, item.dtype)[0]) for item in every]
    for k, (item, route) in enumerate(todo):
        if day.left < 0:
            yield {"cut": f"{len(todo) - k} of {len(todo)} checks"}
            return
        yield device_checks.check(item, route, day.device)


def against_float64(
    day: Day, loss: str, n: int, d: int, dtype: torch.dtype, route: Route, stride: int | None = None
) -> Result:
    """Value and gradients of n rows a view against the eager formula in float64 on the device."""
    found: Result = {"case": loss, "n": n, "d": d, "dtype": str(dtype).removeprefix("torch."), "route": route.name}
    try:
        x, y = (t.detach() for t in Case("", loss, n, d, 1).inputs(dtype, day.device.type))
        if stride is not None:  # rows far apart in memory, of which only their own pages are touched
            wide = torch.empty(n, stride, dtype=dtype, device=day.device)
            wide[:, :d] = x
            x = wide[:, :d]
        leaves = [t.requires_grad_() if t.is_leaf else t for t in (x, y)]
        with setting(route.settings):
            mine = torch.autograd.grad(value := ours(loss, route.backend)(*leaves), leaves)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        truth = torch.autograd.grad(true_value := EAGER[loss](*exact), exact)
        off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, truth, strict=True)]
        value_error = float((value.double() - true_value).abs() / true_value.abs())
    except Exception as error:
        return found | {"right": False, "failed": first_line(error)}
    right = value_error < TOLERANCE[dtype] and max(off) < TOLERANCE[dtype]
    return found | {"value_error": value_error, "gradient_error": max(off), "right": right}


def forms(day: Day) -> Iterator[Result]:
    """Every route at the widths of the timed cases, tiles so small that every loop over tiles turns."""
    for d in WIDTHS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for loss in LOSSES:
                for route in routes(day.device, dtype, small_tiles=True):
                    if day.left < 0:
                        yield {"cut": f"from d = {d}, {dtype}, {loss} on"}
                        return
                    yield against_float64(day, loss, day.rows or 1100, d, dtype, route)


def large(day: Day) -> Iterator[Result]:
    """More row blocks than multiprocessors, several whole tiles, and elements past 2^31: nothing smaller reaches that code."""
    first = [r for r in routes(day.device, torch.bfloat16) if r.backend != "blocked"] or routes(
        day.device, torch.bfloat16
    )
    sizes = [
        ("clip", 20000, 64),
        ("nt_xent", 12000, 128),
        ("f_micl_js", 20000, 128),
        ("siglip", 20000, 512),
        ("clip", 20000, 1024),
    ]
    for loss, n, d in sizes:
        for route in first:
            if day.left < 0:
                yield {"cut": f"from {loss} on"}
                return
            yield against_float64(day, loss, day.rows or n, d, torch.bfloat16, route)
    stride = 1 << 17 if day.cuda else 256  # times 20,000 rows passes 2^31 elements
    yield against_float64(day, "siglip", day.rows or 20000, 128, torch.bfloat16, first[0], stride)
    yield halves_agree(day, day.rows or 70000, 128)


def halves_agree(day: Day, n: int, d: int) -> Result:
    """n rows whose matrix no float64 would hold: the log-sum-exps of 64 rows and of 64 columns against all of the other side."""
    found: Result = {"case": "pair_reduce", "n": n, "d": d, "dtype": "bfloat16", "route": "auto"}
    try:
        x, y = (t.detach() for t in Case("", "clip", n, d, 1).inputs(torch.bfloat16, day.device.type))
        x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
        r, c = fastcl.pair_reduce(x, y, scale=14.0, columns=True)
        rows = torch.arange(0, n, max(1, n // 64), device=day.device)
        exact_r = torch.logsumexp(14.0 * x[rows].double() @ y.double().T, 1)
        exact_c = torch.logsumexp(14.0 * y[rows].double() @ x.double().T, 1)
        off = max(float((a[rows].double() - b).abs().max()) for a, b in ((r, exact_r), (c, exact_c)))
    except Exception as error:
        return found | {"right": False, "failed": first_line(error)}
    return found | {"value_error": off, "gradient_error": 0.0, "right": off < 1e-4}


# ---- what only a card has -------------------------------------------------------------------------------------------------


def captured(rows: int | None) -> Iterator[Item]:
    """Every loss with its first arguments, then with groups, then some whose strip has several tiles."""
    for grouped in (False, True):
        for case in CASES:
            if case.groups or not grouped:
                yield Item(case.id, len(case.grid) if grouped else 0, rows or 203, 37, torch.bfloat16)
    for case in CASES:
        if case.id in WIDE:
            yield Item(case.id, 0, rows or 1024, 512, torch.bfloat16)


def graphs(day: Day) -> Iterator[Result]:
    """Forward and backward of every loss captured by a CUDA graph, and replayed with other rows; without a card, whether the host
    would have to wait, which ends a capture. Of 37 columns, as in `losses`, whose kernels Triton has by then."""
    if day.cuda:
        gc.freeze()  # before 2.9 or so torch collects garbage at each capture, which would take most of the time
    backends = ("cuda", "triton") if day.cuda else ("blocked",)
    todo = [(item, backend) for backend in backends for item in captured(day.rows)]
    for k, (item, backend) in enumerate(todo):
        case = device_checks.named(item.case)
        if backend != backends[0] and not case.backend:
            continue
        if day.left < 0:
            yield {"cut": f"{len(todo) - k} of {len(todo)} captures"}
            return
        found: Result = item._asdict() | {"route": backend, "dtype": "bfloat16"}
        try:
            wrong = _captured(item, case, backend, day)
            yield found | ({"right": False, "failed": wrong} if wrong else {"right": True})
        except Exception as error:
            yield found | {"right": False, "failed": first_line(error)}
            if day.cuda:
                torch.cuda.synchronize()


def _captured(item: Item, case: LossCase, backend: str, day: Day) -> str | None:
    """Why a graph does not hold a loss, or None."""
    rows, arguments = device_checks.given(item)
    arguments = tree_map_only(Tensor, lambda t: t.to(day.device), arguments)
    leaves = [x.to(day.device).requires_grad_() for x in rows]

    def loss(leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        value = library(case, leaves, backend, **arguments)
        return value.detach(), *gradients(value, leaves)

    if day.cuda:
        return replays(loss, leaves, [x.to(day.device).flip(0) for x in rows])
    found = waits(lambda: loss(leaves))
    return f"the host would wait: {', '.join(f'{n} {name}' for name, n in found.items())}" if found else None


def threads(day: Day) -> Iterator[Result]:
    """Two host threads, each on a stream of its own with another d, as often as a second holds: the bits of each alone."""
    widths = (64, 256)
    rows = {
        d: [t.detach() for t in Case("", "clip", day.rows or 1024, d, 1).inputs(torch.bfloat16, day.device.type)]
        for d in widths
    }

    def step(d: int) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in rows[d]]
        return list(torch.autograd.grad(fastcl.functional.clip(*leaves, logit_scale=14.0), leaves))

    for route in routes(day.device, torch.bfloat16):
        found: Result = {"case": "clip", "route": route.name, "dtype": "bfloat16"}
        with setting(route.settings | {"FASTCL_BACKEND": route.backend}):
            try:
                alone = {d: step(d) for d in widths}
            except Exception as error:
                yield found | {"right": False, "failed": first_line(error)}
                continue
            wrong: list[str] = []
            stop = day.clock() + min(1.0, max(0.0, day.left))

            def run(
                d: int, alone: dict[int, list[Tensor]] = alone, wrong: list[str] = wrong, stop: float = stop
            ) -> None:
                try:
                    stream = torch.cuda.Stream() if day.cuda else None
                    with torch.cuda.stream(stream):
                        while True:
                            if not all(map(torch.equal, step(d), alone[d])):
                                wrong.append(f"other bits at d = {d}")
                            if day.clock() > stop or wrong:
                                return
                except Exception as error:
                    wrong.append(first_line(error))

            workers = [threading.Thread(target=run, args=(d,)) for d in widths]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        yield found | ({"right": False, "failed": wrong[0]} if wrong else {"right": True})


# 330 rows: the diagonals of two views lie further apart than any tile is wide, which kernels of every form then look for.
TINY = """
import os, torch, fastcl.functional as f
torch.manual_seed(0)
for form, d in (("fused", 72), ("strip", 72), ("fused", 256), ("hopper", 72)):
    os.environ["FASTCL_CUDA"], os.environ["FASTCL_WORKSPACE_MB"] = form, "0.1"
    for dtype in (torch.bfloat16, torch.float32):
        x, y = (torch.randn(330, d, device="cuda", dtype=dtype).requires_grad_() for _ in range(2))
        (f.clip(x, y, logit_scale=5.0) + f.siglip(x, y, logit_scale=5.0, logit_bias=-5.0) + f.nt_xent(x, y)
         + f.f_micl(x, y, divergence="js")).backward()
torch.cuda.synchronize()
"""


def sanitizers(day: Day) -> Iterator[Result]:
    """memcheck, then racecheck, of fastcl's own kernels; torch's allocations are not pooled, so that bounds are bounds."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not day.cuda:
        yield {
            "absent": "compute-sanitizer is not on the path" if day.cuda else f"no compute-sanitizer on {day.device}"
        }
        return
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    for kind in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            kind,
            "--kernel-regex",
            "kns=fastcl",
            "--error-exitcode",
            "9",
            sys.executable,
            "-W",
            "ignore",
            "-c",
            TINY,
        ]
        allowance = max(5.0, day.left / (2 if kind == "memcheck" else 1))
        found: Result = {"case": kind}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=allowance, check=False
            )
        except subprocess.TimeoutExpired:
            yield found | {"cut": f"took more than {allowance:.0f} s"}
            continue
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line][-1:] or done.stdout.splitlines()[-1:]
        yield found | {"right": done.returncode == 0, "failed": f"status {done.returncode}: {' '.join(summary)[:200]}"}
