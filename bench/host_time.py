"""What a loss costs the host of a GPU, measured without one: launches are counted, and do nothing.

    python -m bench.host_time [--losses clip nt_xent ...] [--rows 8] [--width 128] [--rounds 15]

Each backend takes CPU tensors as the tests do (tests/cuda/emulation.py, tools/ptxemu/triton.py), up to where the driver would be
called: Triton's own path to its launcher is in the time, that of CUDA's ops is too, and a call back to Python for each launch
(some microseconds more than the driver takes). torch's operations run, on few rows. `kernels` are ours, `operations` those of torch
that would launch something. Times are of the process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import profile
from tqdm import tqdm

from fastcl.bench.losses import EAGER, Method, ours
from tests.cuda import emulation
from tools.ptxemu import triton as ptxemu

from .cases import Case
from .measure import environment, quiet, step
from .small import of_process

LOSSES = ("clip", "nt_xent", "f_micl_js", "siglip")
# Of torch's operations on a device: these move no memory, and launch nothing.
FREE = {
    "view", "reshape", "as_strided", "slice", "select", "expand", "transpose", "permute", "unsqueeze", "squeeze", "alias",
    "detach", "t", "numpy_T", "narrow", "split", "chunk", "unbind", "resolve_conj", "resolve_neg", "result_type",
    "lift_fresh", "promote_types", "empty", "empty_like", "empty_strided", "new_empty", "item", "flatten", "unflatten",
}  # fmt: skip


class Found(NamedTuple):
    """Kernels and torch's operations, forward and backward, and seconds of the process."""

    kernels: tuple[int, int]
    operations: tuple[int, int]
    seconds: float


class _Nothing:
    """Stands in for Triton's launcher: counts, and launches nothing."""

    launched = 0

    def __init__(self, src: Any, metadata: Any) -> None:
        """Of any kernel."""

    def __call__(self, *arguments: Any) -> None:
        _Nothing.launched += 1


@contextmanager
def cuda(arch: int) -> Iterator[Callable[[], int]]:
    """backend="cuda" of CPU tensors; gives what counts the launches so far."""
    count = 0

    def counted(name: str, struct: list[int]) -> None:
        nonlocal count
        count += 1

    with emulation.emulated(arch) as session:
        session.tamper = counted
        yield lambda: count


@contextmanager
def triton(arch: int) -> Iterator[Callable[[], int]]:
    """backend="triton" of CPU tensors; gives what counts the launches so far."""
    from triton.runtime import driver

    with ptxemu.activate(arch):
        driver.active.launcher_cls = _Nothing
        yield lambda: _Nothing.launched


@contextmanager
def nothing() -> Iterator[Callable[[], int]]:
    """No kernels of ours."""
    yield lambda: 0


BACKENDS: dict[str, tuple[str | None, Callable[[], AbstractContextManager[Callable[[], int]]]]] = {
    "eager": (None, nothing),
    "cuda, sm_80": ("cuda", partial(cuda, 80)),
    "cuda, sm_90": ("cuda", partial(cuda, 90)),
    "triton, sm_80": ("triton", partial(triton, 80)),
    "triton, sm_90": ("triton", partial(triton, 90)),
}


def operations(run: Callable[[], Any]) -> int:
    """torch's operations that would launch something: what no other calls, but for views, fresh memory and casts to itself."""
    with profile() as seen:
        run()
    return sum(_launches(event) for event in seen.events())


def _launches(event: Any) -> bool:
    parent, name = event.cpu_parent, event.name.removeprefix("aten::")
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    casts_to_itself = name == "to" and not event.cpu_children
    return event.name.startswith("aten::") and parent is None and name not in FREE and not casts_to_itself


def found(loss: Method, case: Case, count: Callable[[], int], rounds: int) -> Found:
    """One method on one problem."""
    x, y = case.inputs(torch.bfloat16)
    step(loss, x, y)  # compiles and caches

    def both() -> tuple[int, int, int]:
        before, value = count(), loss(x, y)
        between = count()
        value.backward()  # type: ignore[no-untyped-call]
        return before, between, count()

    before, between, after = both()
    values: list[Tensor] = []
    forward = operations(lambda: values.append(loss(x, y)))
    backward = operations(lambda: values[0].backward())  # type: ignore[no-untyped-call]
    seconds = statistics.median(of_process(both) for _ in range(rounds))
    return Found((between - before, after - between), (forward, backward), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=tuple(EAGER))
    parser.add_argument(
        "--rows", type=int, default=8, help="of a view (default 8: what torch's operations take is their host time)"
    )
    parser.add_argument("--width", type=int, default=128, help="columns (default 128)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    where = environment()
    problem = f"{chosen.rows} x {chosen.width}, bfloat16"
    print(f"{where['processor']}, 1 thread, torch {where['torch']}, commit {where['commit']}, {problem}")
    print(f"{'loss':10} {'backend':14} {'kernels':>9} {'operations':>11} {'us':>7}  of eager   (forward + backward)")
    for name in tqdm(chosen.losses, unit="loss"):
        eager = 0.0
        for label, (backend, context) in BACKENDS.items():
            loss = EAGER[name] if backend is None else ours(name, backend)
            with context() as count:
                f = found(loss, Case(name, name, chosen.rows, chosen.width, 0), count, chosen.rounds)
            eager = eager or f.seconds
            said = [f"{a:3} + {b:3}" for a, b in (f.kernels, f.operations)]
            tqdm.write(
                f"{name:10} {label:14} {said[0]:>9} {said[1]:>11} {1e6 * f.seconds:7.0f}  {f.seconds / eager:5.2f}x"
            )


if __name__ == "__main__":
    main()
