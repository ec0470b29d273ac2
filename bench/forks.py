"""Work in a fork of this process, so that its memory starts from what is loaded here and is given back; Linux only.

Only a process that has not started PyTorch's threads may fork: nothing may be computed before.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .formulas import Method
from .measure import step

WARM_ROWS = 256


def reset_peak() -> None:
    """Let the peak start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The highest resident memory since the last reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("VmHWM: expected in /proc/self/status, got none; peak memory is measured on Linux only")


def one_call(method: Method, case: Any, compiles: bool = False) -> dict[str, float]:
    """What one forward and backward adds to the resident memory, inputs made and libraries loaded, and its seconds.

    First the method runs on a few rows, or, where it compiles for one shape, on all of them.
    """
    x, y = case.inputs()
    step(method, *(x, y) if compiles else case.resized(min(case.n, WARM_ROWS)).inputs())
    x.grad = y.grad = None
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
