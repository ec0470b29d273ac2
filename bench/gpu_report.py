"""Correctness, time and memory on a GPU, for the day a card is there.

    python -m bench.gpu_report [--minutes 9] [--device cuda] [--case clip-64k-bf16 ...] [--resume]

First every loss against the float64 definition on the device (bench.device_checks), then the cases: all methods interleaved, the
L2 cache flushed before every call, times by events, medians; TFLOP/s from the stated count of matrix products, as a share of the
matmul of that dtype measured in turns with them; peak memory by the allocator. Every part is a process of its own, so that a
kernel that kills its context ends one part; the JSON is written after each. Writes gpu.json, gpu.md and gpu.png into
bench/results. The rivals come by `pip install --no-deps memeff==0.3.1 inf-cl==1.2.1 siglip-kernel==0.1.2`; those that are not there
are listed as absent.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ROOT, gpu_baselines
from .baselines import Baseline, free_memory
from .budget import Budget, affordable
from .cases import Case
from .device_checks import check_all, wrong
from .measure import environment, errors, exact, quiet, small, spread, step
from .report import FOLDER, Result, _megabytes, _ms, _notes, load, save

MINUTES = 9.0
CHECKS_PART = 0.3
FLUSH_CALLS = 2  # times the size of the L2 cache
PRODUCT = 8192
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative; tf32 products fail the first


@dataclass(frozen=True)
class GpuCase:
    """A case in a dtype; its name says both."""

    case: Case
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.case.name


def _cases() -> dict[str, GpuCase]:
    half, full = torch.bfloat16, torch.float32
    found = [
        GpuCase(Case("clip-8k-bf16", "clip", 8192, 512, 4), half),
        GpuCase(Case("clip-64k-bf16", "clip", 65536, 512, 4, weight=2.0), half),
        GpuCase(Case("siglip-64k-bf16", "siglip", 65536, 768, 3, weight=2.0), half),
        GpuCase(Case("info-nce-64k-bf16", "info_nce", 65536, 512, 3, weight=2.0), half),
        GpuCase(Case("simclr-16k-bf16", "nt_xent", 16384, 256, 2), half),
        GpuCase(Case("fmicl-js-32k-bf16", "f_micl_js", 32768, 256, 1.5), half),
        GpuCase(Case("kcl-32k-bf16", "kcl", 32768, 256, 3), half),
        GpuCase(Case("spectral-64k-bf16", "spectral", 65536, 512, 6 * 512 / 65536), half),
        GpuCase(Case("clip-16k-f32", "clip", 16384, 512, 4), full),
        GpuCase(Case("siglip-16k-f32", "siglip", 16384, 512, 3), full),
    ]
    return {c.name: c for c in found}


CASES = _cases()


class Device:
    """What a GPU and the CPU differ in: the clock, the peak of the allocator, and a cache to flush."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise SystemExit(
                f"expected a CUDA device, got none with torch {torch.__version__}; `fastcl doctor` says why"
            )
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 1 << 20
        self.flushed = torch.empty(FLUSH_CALLS * l2, dtype=torch.int8, device=self.device)

    def clock(self, run: Callable[[], Any]) -> float:
        """Seconds of one call with nothing of it in the L2 cache."""
        self.flushed.zero_()
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Bytes that a call adds to what is allocated; None on the CPU, whose allocator does not count."""
        if not self.cuda:
            run()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    @property
    def free(self) -> float:
        """Bytes that a method may need; on a GPU all are tried, since running out of its memory is an error that can be caught."""
        return float("inf") if self.cuda else free_memory()

    def clear(self) -> None:
        """Gives back what the last method left."""
        if self.cuda:
            torch.cuda.empty_cache()

    def facts(self) -> Result:
        """What the figures hold for."""
        found = environment()
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            found |= {
                "device": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "cuda": torch.version.cuda,
            }
        else:
            found |= {"device": found["processor"], "capability": found["isa"], "cuda": None}
        return found


# ---- one case -------------------------------------------------------------------------------------------------------------


def measure(gpu: GpuCase, device: Device, checks: Sequence[Result], rounds: int, allowance: float) -> Result:
    """One case: errors, peaks, then everything in turns. What cannot run keeps a row that says why."""
    begun = time.perf_counter()
    case, dtype = gpu.case, gpu.dtype
    leaves = small(case).inputs(dtype, device.device.type)
    truth = exact(case, *leaves)
    rows: dict[str, Result] = {}
    able: dict[str, Callable[[], Any]] = {}
    estimates: dict[str, float] = {}
    x, y = case.inputs(dtype, device.device.type)
    for baseline in gpu_baselines.methods(case.loss, case.d, device.device, dtype):
        row = rows[baseline.name] = _prepare(baseline, gpu, device, checks, (truth, leaves))
        if not row.get("right"):
            continue
        if time.perf_counter() - begun > allowance:
            row["cut"] = "cut by the time budget"
            continue
        try:
            run = _quickest(baseline, device, row, x, y)
            x.grad = y.grad = None  # they are part of what a call adds
            row["peak_bytes"] = device.peak(run)
            estimates[baseline.name] = device.clock(run)
            able[baseline.name] = run
        except Exception as error:  # out of memory, mostly
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            x.grad = y.grad = None
        device.clear()
    left = allowance - (time.perf_counter() - begun)
    kept, fits = affordable(estimates, max(left, 0.0), "fastcl") if able else ([], 1)
    for name in able.keys() - set(kept):
        rows[name]["cut"] = f"cut by the time budget: one call takes {estimates[name]:.1f} s"
    ceiling = _in_turns({name: able[name] for name in kept}, rows, device, gpu, max(1, min(rounds, fits)))
    return {
        "case": case.name, "loss": case.loss, "n": case.n, "d": case.d, "dtype": str(dtype).removeprefix("torch."),
        "gemms": case.gemms, "flops": case.flops, "methods": rows, "ceiling": ceiling,
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def _prepare(
    baseline: Baseline,
    gpu: GpuCase,
    device: Device,
    checks: Sequence[Result],
    against: tuple[Any, tuple[Tensor, Tensor]],
) -> Result:
    """The row of a method: absent, failed its device check, failed, or its errors here."""
    truth, leaves = against
    why = baseline.absent(gpu.case, device.free, device.device.type)
    if why is not None:
        return {"absent": why}
    if baseline.backend:
        why = wrong(checks, gpu.case.loss.removesuffix("_js"), baseline.backend, str(gpu.dtype).removeprefix("torch."))
        if why is not None:
            return {"failed": why}
    row: Result = {"ahead": baseline.ahead, "backend": baseline.backend}
    try:
        row["value_error"], row["gradient_error"] = errors(gpu.case, baseline.make(baseline.choices[0]), truth, leaves)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    row["right"] = max(row["value_error"], row["gradient_error"]) < TOLERANCE[gpu.dtype]
    return row


def _quickest(baseline: Baseline, device: Device, row: Result, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """The step with the chunk size that is quickest at full size; warmed up."""
    steps = {chunk: partial(step, baseline.make(chunk), x, y) for chunk in baseline.choices}
    seconds = {}
    for chunk, run in steps.items():
        run()
        seconds[chunk] = device.clock(run) if len(steps) > 1 else 0.0
    best = min(seconds, key=lambda chunk: seconds[chunk])
    if len(steps) > 1:
        row |= {"chunk": best, "swept": {str(chunk): s for chunk, s in seconds.items()}}
    return steps[best]


def _in_turns(
    steps: dict[str, Callable[[], Any]], rows: dict[str, Result], device: Device, gpu: GpuCase, rounds: int
) -> dict[str, float]:
    """Medians into the rows; returns the matmul ceiling, which took turns with the methods."""
    if "fastcl" not in steps:
        return {}
    side = min(PRODUCT, gpu.case.n)
    a, b = (torch.randn(side, side, device=device.device).to(gpu.dtype) for _ in range(2))
    every = steps | {"": lambda: a @ b}
    every[""]()
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds):
        for name, run in every.items():
            seconds[name].append(device.clock(run))
    for name in steps:
        rows[name] |= spread(seconds[name])
        rows[name]["against_fastcl"] = statistics.median(
            theirs / ours for theirs, ours in zip(seconds[name], seconds["fastcl"], strict=True)
        )
    return {"matmul": 2.0 * side**3 / statistics.median(seconds[""]), "side": side}


# ---- tables ---------------------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """One case, as bench.report does it, with TFLOP/s."""
    limit = result["ceiling"].get("matmul", float("nan"))
    lines = [
        f"**{result['case']}**: {result['loss']}, n = {result['n']:,}, d = {result['d']}, {result['dtype']}; work counted as "
        f"{result['gemms']:.3g} matrix products, {result['flops'] / 1e12:.3g} TFLOP; torch's {result['dtype']} matmul reaches "
        f"{limit / 1e12:.3g} TFLOP/s at {result['ceiling'].get('side', 0):,.0f} rows and columns",
        "",
        "| method | forward + backward, ms | quartiles, rounds | against fastcl | TFLOP/s | of matmul | peak, MB | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        [*lines, *(_row(name, row, result, limit) for name, row in result["methods"].items()), *_notes(result)]
    )


def _row(name: str, row: Result, result: Result, limit: float) -> str:
    label = f"{name}, chunk {row['chunk']}" if "chunk" in row else name
    label += f" ({row['backend']})" if row.get("backend") and name == "fastcl" else ""
    found = f"{row['value_error']:.0e}, {row['gradient_error']:.0e}" if "value_error" in row else ""
    if "median" in row:
        rate = result["flops"] / row["median"]
        return (
            f"| {label} | {_ms(row['median'])} | {_ms(row['low'])} to {_ms(row['high'])}, {row['rounds']} | "
            f"{row['against_fastcl']:.2f}x | {rate / 1e12:.3g} | {rate / limit:.0%} | {_megabytes(row)} | {found} |"
        )
    states = (("absent", "absent: {}"), ("failed", "failed: {}"), ("cut", "{}"))
    said = next((form.format(row[key]) for key, form in states if key in row), "wrong: no figure")
    return f"| {label} | {said} | | | | | | {found} |"


def checks_line(checks: Sequence[Result]) -> str:
    """How many checks passed, and every one that did not."""
    failed = [r for r in checks if not r["right"]]
    backends = ", ".join(dict.fromkeys(r["backend"] for r in checks)) or "no backend"
    lines = [
        f"{len(checks) - len(failed)} of {len(checks)} device checks passed ({backends}; all losses, value and gradients against "
        "the float64 definition). A loss that failed has no figure."
    ]
    for r in failed:
        why = r.get("failed") or f"errors {r['value_error']:.1e}, {r['gradient_error']:.1e}, allowed {r['allowed']}"
        lines.append(
            f"- {r['case']}, arguments {r['arguments']}, {r['n']} x {r['d']}, {r['dtype']}, {r['backend']}: {why}"
        )
    return "\n".join(lines)


def page(results: Result) -> str:
    """Everything as one page of Markdown."""
    e = results["environment"]
    head = (
        f"# {e['device']}\n\n{e['device']} ({e['capability']}), CUDA {e['cuda']}, torch {e['torch']}, Python {e['python']}, "
        f"fastcl {e['fastcl']} at {e['commit']}. L2 flushed before each call, methods in turns, medians; errors are of value and "
        "gradient against float64."
    )
    lost = [f"- {name}: {why}" for name, why in results["cut"].items()]
    return "\n\n".join([head, checks_line(results["checks"]), *lost, *(table(r) for r in results["cases"])]) + "\n"


# ---- all of it ------------------------------------------------------------------------------------------------------------


def in_process(arguments: list[str], seconds: float) -> str | None:
    """Runs one part in a process of its own; why it ended badly, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu_report", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            timeout=seconds,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} s"
    last = (done.stderr.strip().splitlines() or [""])[-1][:300]
    return None if done.returncode == 0 else f"ended with {done.returncode}: {last}"


def part(chosen: argparse.Namespace) -> int:
    """One part: the checks (--one checks), or a case, into the folder of parts."""
    device = Device(chosen.device)
    parts = chosen.parts
    if chosen.one == "checks":
        check_all(device.device, save=lambda found: save({"checks": found}, parts / "checks.json"), **_sizes(chosen))
        return 0
    gpu = CASES[chosen.one]
    if chosen.rows:
        gpu = replace(gpu, case=gpu.case.resized(chosen.rows))
    checks = (load(parts / "checks.json") or {"checks": []})["checks"]
    save(measure(gpu, device, checks, chosen.rounds, chosen.seconds), parts / f"{chosen.one}.json")
    return 0


def _sizes(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"sizes": ((chosen.rows, 16),)} if chosen.rows else {}


def report(chosen: argparse.Namespace, run: Callable[[list[str], float], str | None]) -> Result:
    """The checks, then the cases; written after each."""
    parts = chosen.parts
    budget = Budget(60.0 * chosen.minutes, {"checks": 0.0} | {name: CASES[name].case.weight for name in chosen.case})
    passed = ["--device", chosen.device, "--parts", str(chosen.parts.resolve()), "--rounds", str(chosen.rounds)]
    passed += ["--rows", str(chosen.rows)] if chosen.rows else []
    results: Result = {"environment": Device(chosen.device).facts(), "checks": [], "cases": [], "cut": {}}
    for name in ("checks", *chosen.case):
        file = parts / f"{name}.json"
        allowance = budget.begin(name) if name != "checks" else CHECKS_PART * budget.left
        if not (chosen.resume and file.exists()):
            file.unlink(missing_ok=True)
            why = run(["--one", name, "--seconds", f"{allowance:.0f}", *passed], 3.0 * allowance + 60.0)
            if why is not None:
                results["cut"][name] = why
        found = load(file)
        if found is not None:
            results["checks" if name == "checks" else "cases"] += found["checks"] if name == "checks" else [found]
        save(results, chosen.out / "gpu.json")
        (chosen.out / "gpu.md").write_text(page(results))
    return results


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the report itself")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything (default {MINUTES:g})")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each method at most (default 15)")
    parser.add_argument(
        "--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--rows", type=int, help="another number of rows, for the checks too")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder (default bench/results)")
    parser.add_argument("--resume", action="store_true", help="keep the parts that are there")
    parser.add_argument(
        "--parts", type=Path, default=ROOT / "out" / "gpu", help="where parts of it are kept (default out/gpu)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, run: Callable[[list[str], float], str | None] = in_process) -> int:
    from . import plots

    chosen = arguments_of(arguments)
    quiet()
    if chosen.one:
        return part(chosen)
    results = report(chosen, run)
    plots.cases(results, chosen.out / "gpu.png")
    print(page(results))
    failed = [r for r in results["checks"] if not r["right"]]
    return 1 if failed or results["cut"] or not results["checks"] else 0


if __name__ == "__main__":
    sys.exit(main())
