"""Time and memory of CLIP against n, from 1,024 to 65,536 rows, and against d: do they grow with n^2 and with n?

    python -m bench.scaling [--seconds 120] [--sizes 1024 2048 ...] [--widths 64 128 ...] [--out bench/results/scaling.json]

Every point is a fork of its own: a call on a few rows (torch.compile: one at full size), then calls until 0.3 seconds are
full, the first of which gives the peak memory. A point is left out, and said so, when its predicted time does not fit the seconds
that are left, or its memory the machine. The JSON is written after every point.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastcl.bench.peaks import in_fork, one_call

from .baselines import Baseline, baselines
from .cases import CASES, Case
from .measure import environment, quiet, step

SIZES = tuple(1024 * 2**k for k in range(7))
WIDTHS = (64, 128, 256, 512, 1024)
WIDTHS_AT = 4096
COMPILED_AT = (2048, 4096, 8192, 16384)  # every size compiles anew
CURVES = {"fastcl": SIZES, "eager": SIZES, "torch.compile": COMPILED_AT, "chunked recompute": SIZES}
WIDTH_CURVES = ("fastcl", "eager", "chunked recompute")
TOWER = (512, 2048)  # in, hidden; out is d
TOWERS = "two towers, without a loss"
CALLS_SECONDS, MOST_CALLS = 0.3, 20
OVERHEAD = 1.0  # seconds of a fork, its inputs and its warm-up, beside the call
COMPILING = 6.0  # seconds, on two idle cores


def point(baseline: Baseline, case: Case) -> dict[str, Any]:
    """Peak memory of one call, the median of several, in this process."""
    quiet()
    method = baseline.make(baseline.choices[len(baseline.choices) // 2])
    first = one_call(method, case.inputs(), case.warm_inputs(baseline.compiles))
    seconds = [first["seconds"]]
    x, y = case.inputs()
    while sum(seconds) < CALLS_SECONDS and len(seconds) < MOST_CALLS:
        start = time.perf_counter()
        step(method, x, y)
        seconds.append(time.perf_counter() - start)
    # The first call takes pages from the system; where others follow, they are the steady state.
    return {
        "seconds": statistics.median(seconds[1:] or seconds),
        "peak_bytes": first["peak_bytes"],
        "calls": len(seconds),
    }


def towers(case: Case) -> dict[str, Any]:
    """Forward, backward and update of two small encoders whose outputs the loss would get: the rest of a CLIP-like step."""
    torch.manual_seed(0)
    inputs = [torch.randn(case.n, TOWER[0]) for _ in range(2)]
    sides = nn.ModuleList(nn.Sequential(nn.Linear(*TOWER), nn.GELU(), nn.Linear(TOWER[1], case.d)) for _ in range(2))
    optimizer = torch.optim.SGD(sides.parameters(), 1e-3)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        optimizer.zero_grad()
        total: Tensor = sum(side(x).sum() for side, x in zip(sides, inputs, strict=True))  # type: ignore[assignment]
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": 0, "calls": 2}


class Curves:
    """Points, in an order that spends the budget on what matters most: fastcl to the end, the others as far as it goes."""

    def __init__(self, seconds: float, save: Callable[[dict[str, Any]], None], tick: Callable[[str], None]) -> None:
        self.seconds, self.save, self.tick = seconds, save, tick
        self.start = time.perf_counter()
        self.results: dict[str, Any] = {
            "environment": None,
            "seconds": seconds,
            "points": [],
            "cut": [],
            "whole": False,
        }

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)

    def last(self, method: str, against: str) -> dict[str, Any] | None:
        found = [p for p in self.results["points"] if p["method"] == method and p["against"] == against]
        return found[-1] if found else None

    def predicted(self, method: str, case: Case, against: str) -> float:
        """Seconds of a point: from the last point of its curve, by n^2 d; memory and time take two calls where it compiles."""
        last = self.last(method, against)
        calls = 2.0 if method == "torch.compile" else 1.0
        grown = last["seconds"] * (case.n / last["n"]) ** 2 * case.d / last["d"] if last else 0.0
        compiling = COMPILING if method == "torch.compile" else 0.0
        return OVERHEAD + compiling + max(calls * grown, CALLS_SECONDS if grown < CALLS_SECONDS else 0.0)

    def run(
        self, method: str, case: Case, against: str, work: Callable[[], dict[str, Any]], why: str | None, reserve: float
    ) -> None:
        """One point, or the reason why there is none."""
        last = self.last(method, against)
        if any(c["method"] == method and c["against"] == against for c in self.results["cut"]):
            return
        self.tick(f"{method}, {case.n:,} x {case.d}")
        needed = self.predicted(method, case, against)
        if why is None and (last is not None or method == "torch.compile") and needed > self.left - reserve:
            why = f"about {needed:.0f} s a point, {max(0.0, self.left - reserve):.0f} s left for it"
        if why is None:
            answer = in_fork(work)
            why = answer.get("failed")
        if why is not None:
            self.results["cut"].append({"method": method, "against": against, "n": case.n, "d": case.d, "why": why})
        else:
            self.results["points"].append({"method": method, "against": against, "n": case.n, "d": case.d, **answer})
        self.save(self.results)


def measure(
    seconds: float, sizes: Sequence[int], widths: Sequence[int], widths_at: int, save: Callable[[dict[str, Any]], None],
    tick: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:  # fmt: skip
    """All curves. Nothing is computed in this process: it forks."""
    curves = Curves(seconds, save, tick)
    curves.results["environment"] = in_fork(environment)
    known = {b.name: b for b in baselines("clip")}
    clip = CASES["clip-8k"]
    for d in widths:
        for name in WIDTH_CURVES:
            case = clip.resized(widths_at, d)
            curves.run(
                name, case, "d", lambda b=known[name], c=case: point(b, c), known[name].absent(case), 0.5 * seconds
            )  # type: ignore[misc]
    for n in sizes:
        case = clip.resized(n)
        for name, at in CURVES.items():
            if n not in at and name == "torch.compile":
                continue
            later = [] if name == "fastcl" else [m for m in sizes if m > n]  # of fastcl, to be paid first
            own = sum(curves.predicted("fastcl", clip.resized(m), "n") for m in later)
            curves.run(name, case, "n", lambda b=known[name], c=case: point(b, c), known[name].absent(case), own)  # type: ignore[misc]
        if n <= 16384:
            curves.run(TOWERS, case, "n", lambda c=case: towers(c), None, 0.3 * seconds)  # type: ignore[misc]
    curves.results["whole"] = True
    save(curves.results)
    return curves.results


def main(arguments: Sequence[str] | None = None) -> int:
    from .report import SCALING

    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="for all points together (default 120)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="numbers of columns")
    parser.add_argument(
        "--widths-at", type=int, default=WIDTHS_AT, help=f"rows of the curve against d (default {WIDTHS_AT})"
    )
    parser.add_argument("--out", type=Path, default=SCALING, help="the JSON")
    chosen = parser.parse_args(arguments)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)

    def save(results: dict[str, Any]) -> None:
        chosen.out.write_text(json.dumps(results, indent=1) + "\n")

    with tqdm(unit="point", file=sys.stderr) as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        measure(chosen.seconds, sorted(chosen.sizes), sorted(chosen.widths), chosen.widths_at, save, tick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
