"""What a loss will cost here, before it is run at full size: milliseconds, bytes, flops, and the kernels that are chosen.

    fastcl cost --loss clip --n 65536 --d 512 --dtype bfloat16

The flops of forward and backward are counted without computing. Time and memory come from this machine's own rates: the loss is
measured at two smaller sizes, its time follows its flops and its rows, its memory its rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..backends import choice, extension
from .command import NAMES, _run
from .losses import complaint, method_of, names
from .measuring import by_wall, check_device, environment, step
from .peaks import Call, peaks_of

LARGEST = 4096  # rows that are measured; from them on time follows flops


def main(argv: Sequence[str]) -> int:
    """Prints what a loss will cost.

    Args:
        argv: see --help.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="fastcl cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--loss", default="clip", metavar="LOSS", help=f"module:function, or of {', '.join(names())} (default clip)")
    add("--n", type=int, default=32768, help="rows of a view (default 32768)")
    add("--d", type=int, default=128, help="columns (default 128)")
    add("--dtype", choices=NAMES, default="float32", help="of the rows (default float32)")
    add("--backend", choices=choice.NAMES, default="auto", help="of fastcl (default auto)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--json", action="store_true", help="one JSON object")
    chosen = parser.parse_args(argv)
    if min(chosen.n, chosen.d) < 1:
        parser.error("--n, --d: expected integers >= 1")
    backend = None if chosen.backend == "auto" else chosen.backend
    call = Call(chosen.loss, chosen.n, chosen.d, chosen.dtype, backend, device=chosen.device)
    try:
        method_of(chosen.loss)
        check_device(chosen.device)
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(str(error))
    try:
        found = cost(call)
    except Exception as error:
        if ":" in chosen.loss:
            parser.error(complaint(chosen.loss, error))
        if not isinstance(error, (ValueError, ImportError, choice.BackendUnavailableError)):
            raise
        parser.error(str(error))
    if chosen.json:
        print(json.dumps(found, indent=1))
        return 0
    where = environment(chosen.device)
    print(f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, fastcl {where['fastcl']}")
    for name, text in said(found):
        print(f"  {name:<10}{text}")
    return 0


def said(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each line."""
    how = "measured" if found["measured_at"] == found["n"] else f"from rates at {found['measured_at']:,} rows"
    peak = found["bytes"]
    return [
        ("loss", f"{found['loss']}, {found['n']:,} x {found['d']:,}, {found['dtype']}, forward and backward"),
        ("time", f"{1e3 * found['seconds']:,.1f} ms, {how}"),
        ("memory", "not measured here" if peak is None else f"{peak / 1e6:,.1f} MB beside the rows"),
        (
            "flops",
            f"{found['flops'] / 1e9:,.1f} GFLOP in products, {found['flops'] / found['seconds'] / 1e9:,.0f} GFLOP/s",
        ),
        ("kernels", found["kernel"]),
    ]


def cost(call: Call) -> dict[str, Any]:
    """Seconds, bytes, flops and kernels of one forward and backward."""
    at = min(call.n, LARGEST)
    sizes = (at,) if at == call.n else (at // 2, at)
    calls = [call._replace(n=n) for n in sizes]
    peaks = [answer["peak_bytes"] for answer in peaks_of(calls) if "peak_bytes" in answer]
    rows = [c.rows() for c in calls]
    for c, r in zip(calls, rows, strict=True):
        _run(c, r)
    seconds = [by_wall(partial(_run, c, r)) for c, r in zip(calls, rows, strict=True)]
    flops, ops = counted(call)
    if len(sizes) == 2:
        small, large = (float(counted(c)[0]) for c in calls)
        taken = _grown(seconds, [small, large], flops, call.n / at)
    else:
        taken = seconds[0]
    room = peaks[-1] + 2.0 * max(0, peaks[-1] - peaks[0]) * (call.n / at - 1.0) if len(peaks) == len(sizes) else None
    return {
        **call._asdict(), "seconds": taken, "bytes": room, "flops": flops, "kernel": kernel_of(call, ops, flops), "measured_at": at
    }  # fmt: skip


def _grown(seconds: Sequence[float], flops: Sequence[float], whole: float, rows: float) -> float:
    """Seconds = a rows + b flops through both sizes (rows 1/2 and 1), neither negative, at `rows` and `whole`."""
    (t0, t1), (f0, f1) = seconds, flops
    determinant = 0.5 * f1 - f0  # 0 where flops grow as rows do, or there are none
    if determinant <= 0.0:
        return t1 * rows
    b = min(max((0.5 * t1 - t0) / determinant, 0.0), t1 / f1)
    return (t1 - b * f1) * rows + b * whole


def counted(call: Call) -> tuple[int, list[str]]:
    """Flops of the products of forward and backward, and fastcl's ops among what ran; nothing is computed."""
    with FakeTensorMode():
        x, y = (
            torch.empty(call.n, call.d, dtype=getattr(torch, call.dtype), device=call.device, requires_grad=True)
            for _ in range(2)
        )
        with FlopCounterMode(display=False) as counter:
            step(call.method(), x, y)
    ops = [str(op) for op in counter.get_flop_counts().get("Global", {})]
    return counter.get_total_flops(), [op.removeprefix("fastcl.") for op in ops if op.startswith("fastcl.")]


def kernel_of(call: Call, ops: Sequence[str], flops: int) -> str:
    """Which backend serves it, with which instructions, and by which ops."""
    if not ops:
        return "none of fastcl's: no sum over pairs"
    name, _ = choice.choose(call.backend, torch.device(call.device), getattr(torch, call.dtype))
    isa = f" ({extension.library.chosen_isa()})" if name == "cpu" and extension.library else ""
    gram = "; by d x d products, no pair is formed" if flops < 2 * call.n**2 * call.d else ""
    return f"backend {name}{isa}: {', '.join(ops)}{gram}"
