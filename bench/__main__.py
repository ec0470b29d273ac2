"""Measure and report.

python -m bench                    every case and the growth curves; JSON, plots, and the tables of README and docs   (make bench)
python -m bench clip-8k            one case, printed
python -m bench --only clip-8k     that case anew, among the saved ones
python -m bench --resume           what is missing after a run that was cut off
python -m bench --report           the tables and plots from the saved JSON, without measuring
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from . import ROOT, report
from .budget import Budget
from .cases import CASES, Case
from .measure import Settings, environment, measure, quiet

MINUTES = 9.0
SCALING_PART = 0.2  # of the total time
LEAST_SCALING = 60.0  # seconds, if the cases took longer than they should
LEAST = 5.0  # seconds; a case that is allowed less is not begun


def run(
    cases: Sequence[Case], budget: Budget, settings: Settings, results: dict[str, Any], keep: Any = lambda results: None
) -> None:
    """Measure the cases into `results`, with a progress bar that names what is running; `keep` is called after each."""
    with tqdm(cases, unit="case", file=sys.stderr) as bar:
        for case in bar:
            allowance = budget.begin(case.name)
            if allowance < LEAST:
                results["cut"][case.name] = f"{max(allowance, 0.0):.0f} s were left for it"
            else:
                chosen = Settings(settings.rounds, allowance, settings.memory)
                result = measure(case, chosen, lambda what, case=case: bar.set_postfix_str(f"{case.name}: {what}"))  # type: ignore[misc]
                results["cases"] = [r for r in results["cases"] if r["case"] != case.name] + [result]
                results["cut"].pop(case.name, None)
            order = list(CASES)
            results["cases"].sort(key=lambda r: order.index(r["case"]))
            keep(results)


def regenerate(results: dict[str, Any]) -> None:
    """Tables and plots from what was measured."""
    from . import plots

    scaling = report.load(report.SCALING)
    plots.cases(results, report.CASES_PLOT)
    if scaling is not None:
        plots.scaling(scaling, report.SCALING_PLOT)
    report.write_pages(results, scaling)


def print_results(results: dict[str, Any]) -> None:
    print(report.where(results), report.vector_width(results), sep="\n")
    for result in results["cases"]:
        print(f"\n{report.table(result)}")


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"one or more of {', '.join(CASES)}; all when none is named"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"for everything (default {MINUTES:g}; for named cases: no limit)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each method at most (default 7)")
    parser.add_argument("--rows", type=int, help="another number of rows than the case has; nothing is saved")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="measure these anew and save them among the others")
    parser.add_argument("--resume", action="store_true", help="measure only what has no result at this commit")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the growth curves")
    parser.add_argument("--report", action="store_true", help="rewrite tables and plots from the saved JSON and stop")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in [*chosen.cases, *(chosen.only or [])] if name not in CASES]
    if unknown:
        parser.error(f"expected cases among {', '.join(CASES)}, got {', '.join(unknown)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = arguments_of(arguments)
    quiet()
    saved = report.load(report.RESULTS)
    if chosen.report:
        if saved is None:
            raise SystemExit(f"expected measurements in {report.RESULTS}, got none; run `make bench`")
        regenerate(saved)
        return 0
    settings = Settings(rounds=chosen.rounds, memory=not chosen.no_memory)
    cases = [CASES[name] for name in chosen.cases or chosen.only or CASES]
    if chosen.rows:
        cases = [case.resized(chosen.rows) for case in cases]
    shown = bool(chosen.cases or chosen.rows)
    total = 60.0 * chosen.minutes if chosen.minutes else math.inf if shown or chosen.only else 60.0 * MINUTES
    results: dict[str, Any] = {"environment": environment(), "cases": [], "cut": {}}
    if shown:
        run(cases, Budget(total, {case.name: case.weight for case in cases}), settings, results)
        print_results(results)
        return 0
    if saved is not None and (chosen.only or (chosen.resume and saved["environment"] == results["environment"])):
        results["cases"] = saved["cases"]
        results["cut"] = saved.get("cut", {})
        done = set() if chosen.only else {r["case"] for r in saved["cases"]}
        cases = [case for case in cases if case.name not in done]
    curves = report.load(report.SCALING)
    whole = chosen.resume and curves is not None and curves["whole"] and curves["environment"] == results["environment"]
    measure_and_save(cases, total, settings, results, with_scaling=not (chosen.no_scaling or chosen.only or whole))
    return 0


def measure_and_save(
    cases: list[Case], total: float, settings: Settings, results: dict[str, Any], with_scaling: bool
) -> None:
    """All of it, saved after each case; the growth curves in a process of their own, since it forks."""
    start = time.perf_counter()

    def keep(results: dict[str, Any]) -> None:
        results["seconds"] = time.perf_counter() - start
        report.save(results, report.RESULTS)

    if cases:
        part = 1.0 - SCALING_PART if with_scaling else 1.0
        run(cases, Budget(part * total, {case.name: case.weight for case in cases}), settings, results, keep)
    if with_scaling:
        left = total - (time.perf_counter() - start) - LEAST if math.isfinite(total) else 60.0 * MINUTES * SCALING_PART
        done = subprocess.run(
            [sys.executable, "-m", "bench.scaling", "--seconds", f"{max(left, LEAST_SCALING):.0f}"], cwd=ROOT
        )
        results["cut"].pop("growth curves", None)
        if done.returncode:
            results["cut"]["growth curves"] = f"bench.scaling ended with {done.returncode}"
        keep(results)
    regenerate(json.loads(json.dumps(results)))
    print_results(results)


if __name__ == "__main__":
    sys.exit(main())
