"""From measurements to tables; no figure in README.md and docs/benchmarks.md is typed by hand."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from . import ROOT, fits
from .cases import HEADLINE
from .measure import FULL_WIDTH, SQUARE_ROWS
from .scaling import COMPILED_AT, TOWER, TOWERS

FOLDER = ROOT / "bench" / "results"
RESULTS, SCALING = FOLDER / "cpu.json", FOLDER / "scaling.json"
PICTURES = ROOT / "docs" / "pictures"
SCALING_PLOT, CASES_PLOT = PICTURES / "scaling.png", PICTURES / "cases.png"
PAGES = {"headline": "README.md", "tables": "docs/benchmarks.md"}  # which page holds what, between markers of that name
EVEN = 1.03  # ratios this near to 1 are a tie

METHOD = (
    "Written by `make bench`; `python -m bench CASE` runs one case, and `fastcl bench` any loss at any size. "
    "Value and gradient are held against float64 first: what fails "
    "has no figure. The methods of a case then take turns in one process, and a ratio is the median over rounds of the two times "
    "in the same round; calls of less than 20 ms are repeated for as long, and their median counts. Peaks are of one forward and "
    "backward in a fresh process. The ceiling is a loop of fused multiply-adds in registers, which takes turns too."
)

AMX = " fastcl's products run on AMX, each float product as six of bfloat16 parts: its ceiling lies above that loop."

Result = dict[str, Any]


def save(results: Result, path: Path) -> None:
    """Write the measurements, whole or not at all; the tables are made from this file alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def load(path: Path) -> Result | None:
    """What was measured, or None."""
    found: Result | None = json.loads(path.read_text()) if path.exists() else None
    return found


# ---- one case -------------------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """One case: time, spread, ratio to fastcl, share of the ceiling, errors and peak memory of every method."""
    limit = result["ceiling"].get("fma", result["ceiling"].get("matmul", 0.0))
    lines = [
        f"**{result['case']}**: {result['loss']}, n = {result['n']:,}, d = {result['d']}, float32; work counted as "
        f"{result['gemms']:.3g} products of n x n x d{' (of 2n x 2n x d)' if result['loss'] == 'nt_xent' else ''}, "
        f"{result['flops'] / 1e9:,.1f} GFLOP; ceiling {limit / 1e9:.0f} GFLOP/s (torch's matmul reaches "
        f"{result['ceiling'].get('matmul', 0.0) / 1e9:.0f})",
        "",
        "| method | forward + backward, ms | quartiles, rounds | against fastcl | of ceiling | peak, MB | value, gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, row, result, limit) for name, row in result["methods"].items()]
    return "\n".join([*lines, *_notes(result)])


def _row(name: str, row: Result, result: Result, limit: float) -> str:
    label = f"{name}, chunk {row['chunk']}" if "chunk" in row else name
    found = f"{row['value_error']:.0e}, {row['gradient_error']:.0e}" if "value_error" in row else ""
    memory = _megabytes(row)
    if "median" in row:
        ratio = row.get("against_fastcl", row["median"] / result["methods"]["fastcl"]["median"])
        spread = f"{_ms(row['low'])} to {_ms(row['high'])}" + (f", {row['rounds']}" if "rounds" in row else "")
        return (
            f"| {label} | {_ms(row['median'])} | {spread} | {ratio:.2f}x | "
            f"{result['flops'] / row['median'] / limit:.0%} | {memory} | {found} |"
        )
    if "absent" in row:
        return f"| {label} | absent: {row['absent']} | | | | | |"
    if "failed" in row:
        return f"| {label} | failed: {row['failed']} | | | | | {found} |"
    if not row.get("right", True):
        return f"| {label} | wrong: no figure | | | | | {found} |"
    return f"| {label} | {row.get('cut', 'not measured')} | | | | {memory} | {found} |"


def _notes(result: Result) -> list[str]:
    """Who is not beaten and why, and what was swept."""
    rows = result["methods"]
    ours = rows.get("fastcl", {})
    timed = {name: row for name, row in rows.items() if "median" in row and name != "fastcl"}
    ahead: dict[str, list[str]] = {}
    notes = []
    for name, row in timed.items():
        if row.get("against_fastcl", row["median"] / ours["median"]) < 1.0 / EVEN:
            ahead.setdefault(row.get("ahead") or "no reason is known yet", []).append(name)
        if row.get("peak_bytes") and ours.get("peak_bytes") and row["peak_bytes"] < ours["peak_bytes"] / EVEN:
            notes.append(
                f"{name} takes less memory than fastcl here: {row['peak_bytes'] / ours['peak_bytes']:.2f} of it."
            )
    notes = [f"Not beaten in time: {', '.join(names)}; {why}." for why, names in ahead.items()] + notes
    swept = [f"{name} over {', '.join(row['swept'])}" for name, row in rows.items() if row.get("swept")]
    if swept:
        notes.append(f"The chunk that is shown was the quickest: {'; '.join(swept)} rows.")
    return ["", " ".join(notes)] if notes else []


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def _megabytes(row: Result) -> str:
    return "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:,.0f}"


# ---- the pages -----------------------------------------------------------------------------------------------------------


def headline(results: Result) -> str:
    """The README's first table: fastcl, eager PyTorch, torch.compile, and the best of all the others."""
    lines = [
        "| loss, n x d, float32 | fastcl: ms, MB | eager PyTorch | torch.compile | quickest of all others |",
        "|---|---|---|---|---|",
    ]
    by_name = {result["case"]: result for result in results["cases"]}
    for name in HEADLINE:
        if name in by_name:
            result = by_name[name]
            rows = result["methods"]
            cells = [_cell(rows.get(m, {})) for m in ("fastcl", "eager", "torch.compile")]
            others = {
                m: row for m, row in rows.items() if m not in ("fastcl", "eager", "torch.compile") and "median" in row
            }
            best = min(others, key=lambda m: others[m]["median"], default=None)
            cells.append("-" if best is None else f"{_cell(others[best])} ({best})")
            lines.append(f"| `{result['loss']}`, {result['n']:,} x {result['d']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Forward and backward, medians; peak extra memory. {where(results)}"])


def _cell(row: Result) -> str:
    if "median" not in row:
        return "does not fit" if "GB" in row.get("absent", "") else "-"
    memory = _megabytes(row)
    return _ms(row["median"]) + (f", {memory}" if memory else "")


def where(results: Result) -> str:
    e = results["environment"]
    isa = f" ({e['isa']})" if "isa" in e else ""
    return (
        f"Measured on {e['processor']}, {e['threads']} threads, torch {e['torch']}, Python {e['python']}, "
        f"fastcl {e['fastcl']} at {e['commit']}, backend {e['backend']}{isa}."
    )


def vector_width(results: Result) -> str:
    """Whether torch's matmul uses the machine's full vector width: the ratios depend on it."""
    shares = [c["square"] / c["fma"] for c in (r["ceiling"] for r in results["cases"]) if "fma" in c and "square" in c]
    if not shares:
        return ""
    share = statistics.median(shares)
    verdict = "uses" if share > FULL_WIDTH else "does not use"
    e = results["environment"]
    blas = f" ({e['blas']}; torch's own loops: {e['torch_isa']})" if "blas" in e else ""
    return (
        f"torch's float32 product of {SQUARE_ROWS:,} x {SQUARE_ROWS:,} matrices reaches {share:.0%} of the FMA loop here (median "
        f"of the cases): its BLAS{blas} {verdict} the full vector width of this processor. Where it does, the baselines that are "
        "bound by it are nearer." + (AMX if e.get("isa") == "amx" else "")
    )


def cut(results: Result) -> str:
    """What the time budget left out."""
    lines = [f"{name}: {why}" for name, why in results.get("cut", {}).items()]
    for result in results["cases"]:
        lines += [f"{m} in {result['case']}" for m, row in result["methods"].items() if "cut" in row]
    if "seconds" not in results:
        return ""
    said = f"All cases were measured within {results['seconds'] / 60:.1f} minutes"
    return said + (
        f"; the budget left out: {'; '.join(lines)}." if lines else "; nothing was left out for want of time."
    )


def scaling_section(scaling: Result) -> str:
    """The plot, the growth laws, and the figures that users ask for."""
    points = scaling["points"]
    methods = [m for m in dict.fromkeys(p["method"] for p in points if p["against"] == "n") if m != TOWERS]
    lines = [
        "### Growth", "", f"![time and memory against n and d](pictures/{SCALING_PLOT.name})", "",
        f"CLIP, forward and backward; least squares in relative error from n = {fits.FROM:,} on. {where(scaling)}", "",
        "| method | time grows as | memory grows as | largest n measured | against d: time, memory |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for method in methods:
        time, memory = (fits.fit(fits.curve(points, method, what)) for what in ("seconds", "peak_bytes"))
        if time is not None and memory is not None:
            widths = [fits.fit(fits.curve(points, method, what, "d"), 0) for what in ("seconds", "peak_bytes")]
            by_d = "-" if None in widths else ", ".join(f"d^{law.exponent:.2f}" for law in widths if law)
            lines.append(f"| {method} | n^{time.exponent:.2f} | n^{memory.exponent:.2f} | {time.largest:,} | {by_d} |")
    left_out = [f"{c['method']} from {c['against']} = {c[c['against']]:,} on ({c['why']})" for c in scaling["cut"]]
    lines += ["", f"Left out: {'; '.join(left_out)}." if left_out else "No size was left out."]
    lines[-1] += (
        f" torch.compile, which compiles anew for each size, runs at {', '.join(f'{n:,}' for n in COMPILED_AT)}."
    )
    return "\n".join([*lines, "", batches(scaling), "", steps(scaling)])


def batches(scaling: Result) -> str:
    """The largest batch that fits in a given memory."""
    largest = fits.largest_batches(scaling)
    d = next((p["d"] for p in scaling["points"] if p["against"] == "n"), 0)
    lines = [
        f"Largest batch of CLIP at d = {d} whose loss fits, inputs and gradients included, by the fits of the peaks "
        "(* beyond the sizes that were measured):", "",
        f"| method | {' | '.join(f'{g} GB' for g in fits.GIGABYTES)} |", f"|---{'|---' * len(fits.GIGABYTES)}|",
    ]  # fmt: skip
    for method in dict.fromkeys(row.method for row in largest):
        cells = [f"{row.n:,}{'*' if row.beyond else ''}" for row in largest if row.method == method]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps(scaling: Result) -> str:
    """The time that a CLIP-like step saves."""
    rows = fits.saved(scaling, TOWERS)
    d = next((p["d"] for p in scaling["points"] if p["against"] == "n"), 0)
    lines = [
        f"Time saved for each step of a CLIP-like step, whose towers are two MLPs of {TOWER[0]}-{TOWER[1]}-{d} with SGD, from the "
        "measured curves:", "",
        "| batch | loss by | loss, ms | by fastcl, ms | rest of the step, ms | saved, ms | of the step |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        lines.append(
            f"| {r.n:,} | {r.method} | {_ms(r.loss)} | {_ms(r.ours)} | {_ms(r.rest)} | {_ms(r.seconds)} | {r.share:.0%} |"
        )
    return "\n".join(lines)


def sections(results: Result, scaling: Result | None) -> dict[str, str]:
    """What stands between each pair of markers."""
    picture = f"![time and memory of every case](pictures/{CASES_PLOT.name})"
    above = [where(results), METHOD, vector_width(results), cut(results), picture]
    tables = "\n\n".join(["## CPU: every case", *filter(None, above), *(table(r) for r in results["cases"])])
    if scaling is not None:
        tables += f"\n\n{scaling_section(scaling)}"
    return {"headline": headline(results), "tables": tables}


def write_pages(results: Result, scaling: Result | None = None, root: Path = ROOT) -> None:
    """Rewrite what stands between the markers of each page, every table of it."""
    for name, content in sections(results, scaling).items():
        page = root / PAGES[name]
        text = page.read_text()
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if begin not in text or end not in text:
            raise ValueError(
                f"expected the markers {begin} and {end} in {PAGES[name]}, got neither or one; put them back"
            )
        page.write_text(
            re.sub(f"{begin}.*?{end}", lambda _, c=content, b=begin, e=end: f"{b}\n{c}\n{e}", text, flags=re.DOTALL)
        )
