"""The day of the card in at most so many lines: what was right, what was quick, and whether the dispatch tables were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Result = dict[str, Any]


def failures(results: Result) -> list[str]:
    """Every check that was wrong, and every part that did not come to its end."""
    found = [f"{name}: {part['ended']}" for name, part in results["parts"].items() if "ended" in part]
    return found + [
        f"{name}: {_named(r)}: {r.get('failed') or _errors(r)}"
        for name, part in results["parts"].items()
        for r in part["results"]
        if r.get("right") is False
    ]


def table(results: Result, most: int) -> list[str]:
    """The lines, the failures cut first."""
    parts = results["parts"]
    facts = next(iter(parts.get("facts", {}).get("results", [])), {})
    head = [
        f"# {facts.get('device', results['device'])}",
        ", ".join(
            f"{key} {facts[key]}"
            for key in ("torch", "cuda", "triton", "capability", "python", "commit")
            if key in facts
        ),
        f"extension: {results['built']}{'; ' + results['rivals'] if results['rivals'] else ''}",
    ]
    body = [line for name, part in parts.items() for line in _part(name, part)]
    wrong = failures(results)
    room = most - len(head) - len(body) - 1
    if len(wrong) > room:
        wrong = [*wrong[: max(room - 1, 0)], f"and {len(wrong) - max(room - 1, 0)} more in gpu_day.json"]
    lines = [*head, *body, f"{len(failures(results))} failures", *(f"  {line}"[:200] for line in wrong)]
    return lines[:most]


def plotted(results: Result) -> Result:
    """The timings as bench.plots takes them."""
    found = []
    for name, part in results["parts"].items():
        rows = [r for r in part["results"] if "ms" in r and "method" in r]
        methods = {r["method"]: {"median": r["ms"] / 1e3, "peak_bytes": r.get("peak")} for r in rows}
        if methods:
            case = next(r for r in part["results"] if "ceiling" in r)
            found.append(
                {"case": name, "dtype": "bfloat16", "methods": methods} | {k: case[k] for k in ("loss", "n", "d")}
            )
    return {"cases": found}


def _part(name: str, part: Result) -> Iterator[str]:
    found = part["results"]
    checked = [r for r in found if "right" in r]
    if checked:
        right = sum(r["right"] for r in checked)
        cut = "".join(f"; cut: {r['cut']}" for r in found if "cut" in r)
        yield f"{name}: {right} of {len(checked)} right in {part['seconds']:.0f} s{cut}"
    for r in found:
        if "absent" in r and "method" not in r:
            yield f"{name}: {r['absent']}"
    yield from _verdicts([r for r in found if "verdict" in r])
    timed = [r for r in found if "method" in r]
    if timed:
        yield from _timed(next(r for r in found if "ceiling" in r), timed)


def _timed(case: Result, rows: list[Result]) -> Iterator[str]:
    """Two lines a case: times with their share of the matmul, and peaks."""
    limit = case["ceiling"]
    yield (
        f"{case['case']}: {case['loss']}, {case['n']:,} x {case['d']} bfloat16; matmul {limit['flops'] / 1e12:.3g} TFLOP/s, "
        f"copy {limit['bytes'] / 1e12:.2g} TB/s"
    )
    yield "  " + " | ".join(
        f"{r['method']} {r['ms']:.3g} ms {r['share']:.0%}" if "ms" in r else f"{r['method']} {_why(r)}" for r in rows
    )
    peaks = [f"{r['method']} {r['peak'] / 1e6:,.0f}" for r in rows if r.get("peak")]
    if peaks:
        yield "  peak MB: " + " | ".join(peaks)


def _why(row: Result) -> str:
    return next((f"{key}: {row[key]}"[:60] for key in ("absent", "failed", "cut") if key in row), "no figure")


def _verdicts(found: list[Result]) -> Iterator[str]:
    """A line for each column of a dispatch table; the JSON has the times of every form."""
    columns: dict[str, list[str]] = {}
    for r in found:
        said = f"d = {r['d']} {r['verdict']}, {r['best']} {r['ms'][r['best']]:.3g} ms"
        columns.setdefault(f"{r['backend']} {r['kind']} {r['op']}", []).append(said)
    yield from (f"{column}: {'; '.join(said)}" for column, said in columns.items())


def _named(r: Result) -> str:
    return " ".join(str(r[key]) for key in ("case", "index", "n", "d", "dtype", "route") if key in r)


def _errors(r: Result) -> str:
    return f"errors {r.get('value_error', float('nan')):.1e}, {r.get('gradient_error', float('nan')):.1e}"
