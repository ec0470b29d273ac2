"""Measure and report.

python -m bench                 every case, JSON, plot, and the README's tables       (make bench)
python -m bench clip-8k         one case, printed                                     (fastcl bench clip-8k)
python -m bench --report        the README's tables from the committed JSON, without measuring
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from . import report
from .cases import CASES, Case
from .measure import environment, measure


def run(cases: list[Case], rounds: int, memory: bool = True) -> dict[str, Any]:
    """Measure the cases, with a progress bar that names what is running."""
    results: dict[str, Any] = {"environment": environment(), "cases": []}
    with tqdm(cases, unit="case", file=sys.stderr) as bar:
        for case in bar:
            result = measure(case, rounds, lambda what, case=case: bar.set_postfix_str(f"{case.name}: {what}"), memory)  # type: ignore[misc]
            results["cases"].append(result)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastcl bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"one or more of {', '.join(CASES)}; all when none is named"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each method (default 5)")
    parser.add_argument("--rows", type=int, help="another number of rows than the case has")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the peak memory, which takes a process a method"
    )
    parser.add_argument(
        "--report", action="store_true", help="rewrite the README's tables from the committed JSON and stop"
    )
    chosen = parser.parse_args(arguments)
    if chosen.report:
        report.write_readme(json.loads(report.RESULTS.read_text()))
        return 0
    unknown = [name for name in chosen.cases if name not in CASES]
    if unknown:
        parser.error(f"expected cases among {', '.join(CASES)}, got {', '.join(unknown)}")
    cases = [CASES[name] for name in chosen.cases or CASES]
    if chosen.rows:
        cases = [case.resized(chosen.rows) for case in cases]
    results = run(cases, chosen.rounds, memory=not chosen.no_memory)
    print(report.where(results), report.vector_width(results), sep="\n")
    for result in results["cases"]:
        print(f"\n{report.table(result)}")
    if not chosen.cases and not chosen.rows:
        report.save(results)
        report.plot(results)
        report.write_readme(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
