"""Measure losses here: milliseconds of forward and backward, peak memory, and errors against float64.

    fastcl bench                                             clip at 4,096 x 128, beside eager PyTorch
    fastcl bench --loss clip siglip --n 1024 8192 --d 512 --dtype float32 bfloat16
    fastcl bench --loss clip my_losses:mine                  a function (x, y) of yours takes turns with it
    fastcl bench --json before.json; ...; fastcl bench --json after.json; fastcl bench --compare before.json after.json
    fastcl bench --profile trace.json                        where the time goes; the trace opens in chrome://tracing

All methods of one shape and dtype take turns in one process; times are medians, with quartiles. What is wrong has no figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..backends import choice
from ..equation.arguments import DTYPES
from .losses import EAGER, EAGER_MATRICES, complaint, method_of, names
from .measuring import check_device, environment, errors, exact, spread, step, time_interleaved
from .peaks import Call, Rows, free_memory, peaks_of

CHECK_ROWS = 1024
SECONDS = 30.0  # of the rounds of one shape; one round is always whole
MOST_MEMORY = 0.5  # the part of the free memory that rows and an eager formula's matrices may take
WRONG = 50.0  # times the dtype's eps times the root of d: a wrong loss is wrong by far more
EVEN = 1.05  # ratios nearer to 1 are no change
KEY = ("loss", "method", "n", "d", "dtype", "device")
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]

Result = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Measures, compares or profiles.

    Args:
        argv: see --help.

    Returns:
        0; 1 where a method is wrong or fails, and with --compare where the second file is slower.
    """
    chosen = arguments_of(argv)
    if chosen.compare:
        return compare(*chosen.compare)
    if chosen.profile:
        call = next(calls_of(chosen))
        try:
            profiled(call, chosen.profile)
        except Exception as error:
            if ":" not in call.loss:
                raise
            print(f"fastcl bench: error: {complaint(call.loss, error)}", file=sys.stderr)
            return 1
        return 0
    found = [measured(calls, chosen.rounds) for _, calls in shapes(calls_of(chosen))]
    results = [row for rows in found for row in rows]
    whole = {"environment": environment(chosen.device), "results": results}
    if chosen.json == "-":
        print(json.dumps(whole, indent=1))
    else:
        print("\n".join(table(whole)))
    if chosen.json and chosen.json != "-":
        Path(chosen.json).write_text(json.dumps(whole, indent=1) + "\n")
    return int(any("failed" in row or not row.get("right", True) for row in results))


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastcl bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--loss", nargs="+", default=["clip"], metavar="LOSS", help=f"module:function, or of {', '.join(names())}")
    add("--n", nargs="+", type=int, default=[4096], metavar="N", help="rows of a view (default 4096)")
    add("--d", nargs="+", type=int, default=[128], metavar="D", help="columns (default 128)")
    add("--dtype", nargs="+", choices=NAMES, default=["float32"], help="of the rows (default float32)")
    add("--backend", nargs="+", choices=choice.NAMES, default=["auto"], help="of fastcl (default auto)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--rounds", type=int, default=7, help="timed rounds at most (default 7)")
    add("--json", nargs="?", const="-", metavar="FILE", help="JSON, printed, or into a file beside the table")
    add("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="two such files instead of measuring")
    add("--profile", metavar="FILE", help="profile the first method instead, and keep the trace")
    chosen = parser.parse_args(argv)
    try:
        for loss in chosen.loss:
            method_of(loss)
        check_device(chosen.device)
        if chosen.compare:
            chosen.compare = [kept(file) for file in chosen.compare]
    except (ValueError, ImportError, AttributeError, OSError) as error:
        parser.error(str(error))
    for file in (chosen.json, chosen.profile):  # now, and not when all is measured
        if file not in (None, "-") and not Path(file).parent.is_dir():
            parser.error(f"{file}: expected a file in a folder that exists")
    if min([*chosen.n, *chosen.d, chosen.rounds]) < 1:
        parser.error("--n, --d, --rounds: expected integers >= 1")
    return chosen


def kept(file: str) -> Result:
    """What --json wrote into this file."""
    try:
        whole: Result = json.loads(Path(file).read_text())
    except ValueError:
        whole = {}
    if not (isinstance(whole, dict) and {"environment", "results"} <= whole.keys()):
        raise ValueError(f"{file}: expected what fastcl bench --json FILE writes; measure anew")
    return whole


# ---- what is measured -------------------------------------------------------------------------------------------------------


def calls_of(chosen: argparse.Namespace) -> Iterator[Call]:
    """Every loss by every backend, and in eager PyTorch, at every shape and dtype."""
    for n, d, dtype in product(chosen.n, chosen.d, chosen.dtype):
        for loss in chosen.loss:
            for backend in chosen.backend if ":" not in loss else ["auto"]:
                yield Call(loss, n, d, dtype, None if backend == "auto" else backend, device=chosen.device)
            if loss in EAGER:
                yield Call(loss, n, d, dtype, eager=True, device=chosen.device)


def shapes(calls: Iterable[Call]) -> Iterator[tuple[tuple[int, int, str], list[Call]]]:
    """The calls of each shape and dtype."""
    found: dict[tuple[int, int, str], list[Call]] = {}
    for call in calls:
        found.setdefault((call.n, call.d, call.dtype), []).append(call)
    yield from found.items()


def name_of(call: Call) -> str:
    if call.eager:
        return "eager PyTorch"
    if ":" in call.loss:
        return "yours"
    return f"fastcl, {call.backend}" if call.backend else "fastcl"


def measured(calls: Sequence[Call], rounds: int) -> list[Result]:
    """One row a call: those that are right take turns."""
    rows: list[Result] = [
        {"loss": c.loss, "method": name_of(c), "n": c.n, "d": c.d, "dtype": c.dtype, "device": c.device} for c in calls
    ]
    able = []
    for call, row in zip(calls, rows, strict=True):
        row |= _unfit(call) or _checked(call)
        if row.get("right"):
            able.append((call, row))
    for (_, row), answer in zip(able, peaks_of([call for call, _ in able]), strict=True):
        if "peak_bytes" in answer:
            row["peak_bytes"] = answer["peak_bytes"]
        else:
            row["no_peak"] = answer["failed"]
    if not able:
        return rows
    inputs = calls[0].rows()  # they have one shape
    steps: dict[str, Callable[[], Any]] = {str(k): partial(_run, call, inputs) for k, (call, _) in enumerate(able)}
    end = time.perf_counter() + SECONDS
    seconds = time_interleaved(steps, rounds, _told(len(steps)), lambda: time.perf_counter() > end)
    for k, (_, row) in enumerate(able):
        row |= spread(seconds[str(k)])
        row["against_first"] = statistics.median(a / b for a, b in zip(seconds[str(k)], seconds["0"], strict=True))
    return rows


def _told(methods: int) -> Any:
    """Says on a terminal which of the methods runs."""

    def tick(name: str) -> None:
        print(f"\r{name.partition(',')[0]} of {methods} ", end="", file=sys.stderr, flush=True)

    return tick if sys.stderr.isatty() else lambda name: None


def _run(call: Call, rows: Rows) -> None:
    step(call.method(), *rows)
    if call.device != "cpu":
        torch.accelerator.synchronize()


def _unfit(call: Call) -> Result | None:
    """Why a call is not even tried."""
    needed = 16.0 * call.n * call.d  # two views and their gradients
    if call.eager:
        needed += EAGER_MATRICES * 4.0 * call.n**2 * (4 if call.loss == "nt_xent" else 1)
    free = free_memory() if call.device == "cpu" else float(torch.cuda.mem_get_info(call.device)[0])
    if needed <= MOST_MEMORY * free:
        return None
    return {"unfit": f"does not fit: about {needed / 1e9:,.0f} GB, and {free / 1e9:,.0f} GB are free"}


def _checked(call: Call) -> Result:
    """Errors on a few rows, and whether they are those of the dtype."""
    x, y = call.rows(min(call.n, CHECK_ROWS))
    try:
        truth = exact(EAGER[call.loss] if call.eager else method_of(call.loss), x, y)
        value, gradient = errors(call.method(), truth, x, y)
    except Exception as error:  # whatever it is, the other methods have figures
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    allowed = WRONG * torch.finfo(x.dtype).eps * call.d**0.5
    return {"value_error": value, "gradient_error": gradient, "right": value < allowed and gradient < allowed}


# ---- what is said -----------------------------------------------------------------------------------------------------------


def table(whole: Result) -> Iterator[str]:
    """The machine, and one line a method."""
    where = whole["environment"]
    yield (
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, fastcl {where['fastcl']}, "
        f"backend {where['backend']} ({where['isa']})"
    )
    lines: list[tuple[str, ...]] = [
        ("loss", "n x d, dtype", "method", "ms", "quartiles, rounds", "against first", "peak MB", "errors")
    ]
    lines += [_line(row) for row in whole["results"]]
    # What went wrong is a sentence: it may run on over the empty columns behind it, and widens none.
    widths = [max(len(cell) for cell in column if "Error: " not in cell) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _line(row: Result) -> tuple[str, ...]:
    shape = f"{row['n']:,} x {row['d']:,}, {row['dtype']}"
    found = f"{row['value_error']:.0e}, {row['gradient_error']:.0e}" if "value_error" in row else ""
    if "median" not in row:
        why = row.get("unfit") or row.get("failed") or "wrong: no figure"
        return row["loss"], shape, row["method"], why, "", "", "", found
    return (
        row["loss"], shape, row["method"], f"{1e3 * row['median']:,.2f}",
        f"{1e3 * row['low']:,.2f} to {1e3 * row['high']:,.2f}, {row['rounds']}", f"{row['against_first']:.2f}x",
        f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else "", found,
    )  # fmt: skip


def compare(before: Result, after: Result) -> int:
    """After against before, for what both have; 1 where something is slower beyond both quartiles and EVEN."""
    for which, whole in (("before", before), ("after", after)):
        print(f"{which}: {next(table({**whole, 'results': []}))}")
    known = {tuple(row[k] for k in KEY): row for row in before["results"] if "median" in row}
    slower = False
    for row in after["results"]:
        old = known.get(tuple(row[k] for k in KEY))
        if old is None or "median" not in row:
            continue
        ratio, verdict = row["median"] / old["median"], "even"
        if ratio > EVEN and row["low"] > old["high"]:
            verdict, slower = "SLOWER", slower or row["method"] != "eager PyTorch"
        elif ratio < 1.0 / EVEN and row["high"] < old["low"]:
            verdict = "quicker"
        memory = (
            f", {row['peak_bytes'] / old['peak_bytes']:.2f}x the memory" if {"peak_bytes"} <= row.keys() & old else ""
        )
        print(
            f"{row['loss']}, {row['n']:,} x {row['d']:,}, {row['dtype']}, {row['method']}: {1e3 * old['median']:,.2f} to "
            f"{1e3 * row['median']:,.2f} ms, {ratio:.2f}x the time{memory}: {verdict}"
        )
    return int(slower)


def profiled(call: Call, file: str) -> None:
    """Prints where the time of a step goes, and writes the trace."""
    rows = call.rows()
    _run(call, rows)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if call.device != "cpu" else [])
    with profile(activities=activities) as found:
        _run(call, rows)
    found.export_chrome_trace(file)
    order = "self_cpu_time_total" if call.device == "cpu" else "self_device_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=48))
    print(f"{call.loss}, {call.n:,} x {call.d:,}, {call.dtype}; the trace is in {file}")
