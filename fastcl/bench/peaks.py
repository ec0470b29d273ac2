"""Peak memory: of work in a fork of this process, whose memory starts from what is loaded here and is given back; Linux only.

Only a process that has not started PyTorch's threads may fork: nothing may be computed before. `peaks_of` starts one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .losses import EAGER, Method, method_of
from .measuring import step, views

WARM_ROWS = 256
Rows = tuple[Tensor, Tensor]


class Call(NamedTuple):
    """A loss by its name (losses.method_of), on rows of this shape; eager: as written in PyTorch."""

    loss: str
    n: int
    d: int
    dtype: str = "float32"
    backend: str | None = None
    eager: bool = False
    device: str = "cpu"

    def method(self) -> Method:
        return EAGER[self.loss] if self.eager else method_of(self.loss, self.backend)

    def rows(self, n: int | None = None) -> Rows:
        return views(n or self.n, self.d, getattr(torch, self.dtype), self.device)

    def peak(self) -> dict[str, float]:
        """Of one forward and backward, after one on a few rows."""
        return one_call(self.method(), self.rows(), self.rows(min(self.n, WARM_ROWS)))


def reset_peak() -> None:
    """Let the peak start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The highest resident memory since the last reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("VmHWM: expected in /proc/self/status, got none; peak memory is measured on Linux only")


def one_call(method: Method, rows: Rows, first: Rows) -> dict[str, float]:
    """What one forward and backward adds to the resident memory, inputs made and libraries loaded, and its seconds.

    Before it the method runs on the rows of `first`: a few, or all, where it compiles for one shape.
    """
    x, y = rows
    step(method, *first)
    reset_peak()
    before, start = peak(), time.perf_counter()
    step(method, x, y)
    seconds = time.perf_counter() - start
    return {"peak_bytes": peak() - before, "seconds": seconds}


def in_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a fork, or {"failed": why}: an exception, or the signal that ended it."""
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of threads, such as those of an idle pool
        child = os.fork()
    if child == 0:
        os.close(receive)
        status = 1
        with contextlib.suppress(BaseException):
            try:
                answer = work()
            except BaseException as error:
                answer = {"failed": "".join(traceback.format_exception_only(error)).strip()[:300]}
            os.write(send, json.dumps(answer).encode())
            status = 0
        os._exit(status)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return {
            "failed": f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended without an answer"
        }
    found: dict[str, Any] = json.loads(text)
    return found


def peaks_of(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Peak bytes and seconds of each call, in a process of their own, or why there is none; on a GPU its allocator counts."""
    if not calls or calls[0].device != "cpu":
        return [_on_device(call) for call in calls]
    if not Path("/proc/self/clear_refs").exists():
        return [{"failed": "peak memory is measured on Linux only"} for _ in calls]
    command = [sys.executable, "-m", __name__, json.dumps(calls)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # libraries may print, too
    return found + [{"failed": "ended without an answer"}] * (len(calls) - len(found))


def _on_device(call: Call) -> dict[str, Any]:
    rows, method = call.rows(), call.method()
    step(method, *call.rows(min(call.n, WARM_ROWS)))
    torch.cuda.reset_peak_memory_stats(call.device)
    before, start = torch.cuda.memory_allocated(call.device), time.perf_counter()
    step(method, *rows)
    torch.cuda.synchronize(call.device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(call.device) - before,
        "seconds": time.perf_counter() - start,
    }


def free_memory() -> float:
    """Bytes that a new process could take."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")


if __name__ == "__main__":
    for asked in json.loads(sys.argv[1]):
        print(json.dumps(in_fork(Call(*asked).peak)), flush=True)
