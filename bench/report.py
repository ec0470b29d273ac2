"""From measurements to tables and a plot; no figure in README.md is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .cases import HEADLINE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu.json"
OUTPUT = ROOT / "out"

Result = dict[str, Any]


def save(results: dict[str, Any]) -> None:
    """Write the measurements; the tables are made from this file alone."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table(result: Result) -> str:
    """One case: time, spread, ratio to fastcl, share of the ceiling, errors and peak memory of every method."""
    fastest = result["methods"]["fastcl"].get("median")
    peak = result["ceiling"].get("fma", result["ceiling"]["matmul"])
    lines = [
        f"**{result['case']}**: {result['loss']}, n = {result['n']:,}, d = {result['d']}, float32; work counted as "
        f"{result['gemms']:g} products of n x n x d, ceiling {peak / 1e9:.0f} GFLOP/s (torch's matmul reaches "
        f"{result['ceiling']['matmul'] / 1e9:.0f})",
        "",
        "| method | forward + backward, ms | quartiles | against fastcl | share of ceiling | peak, MB | error: value, gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        found = f"{row['value_error']:.0e}, {row['gradient_error']:.0e}"
        if "median" not in row:
            lines.append(f"| {name} | wrong: no figure | | | | | {found} |")
            continue
        memory = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        lines.append(
            f"| {name} | {_ms(row['median'])} | {_ms(row['low'])} to {_ms(row['high'])} | {row['median'] / fastest:.2f}x | "
            f"{result['flops'] / row['median'] / peak:.0%} | {memory} | {found} |"
        )
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def headline(results: dict[str, Any]) -> str:
    """The README's first table: fastcl, eager PyTorch and torch.compile."""
    lines = [
        "| loss, n x d, float32 | fastcl: ms, MB | eager PyTorch | torch.compile |",
        "|---|---|---|---|",
    ]
    by_name = {result["case"]: result for result in results["cases"]}
    for name in HEADLINE:
        if name in by_name:
            result = by_name[name]
            cells = [_cell(result["methods"].get(m, {})) for m in ("fastcl", "eager", "torch.compile")]
            lines.append(f"| `{result['loss']}`, {result['n']:,} x {result['d']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Forward and backward, medians; peak extra memory. {where(results)}"])


def _cell(row: dict[str, Any]) -> str:
    if "median" not in row:
        return "-"
    memory = row.get("peak_bytes")
    return _ms(row["median"]) + ("" if memory is None else f", {memory / 1e6:,.0f}")


def where(results: dict[str, Any]) -> str:
    e = results["environment"]
    return (
        f"Measured on {e['processor']}, {e['threads']} threads, torch {e['torch']}, Python {e['python']}, "
        f"fastcl {e['fastcl']} at {e['commit']}, backend {e['backend']}."
    )


def vector_width(results: dict[str, Any]) -> str:
    """Whether torch's matmul uses the machine's full vector width: the ratios depend on it."""
    ceiling = results["cases"][0]["ceiling"]
    if "fma" not in ceiling:
        return ""
    share = ceiling["matmul"] / ceiling["fma"]
    verdict = "uses" if share > 0.55 else "does not use"
    return (
        f"torch's float32 matmul reaches {share:.0%} of the FMA loop here: its BLAS {verdict} the full vector width of this "
        "processor. Where it does, the baselines that are bound by it are nearer."
    )


def write_readme(results: dict[str, Any], readme: Path = ROOT / "README.md") -> None:
    """Rewrite what stands between the markers."""
    text = readme.read_text()
    tables = "\n\n".join([where(results), vector_width(results), *(table(r) for r in results["cases"])])
    sections = {"headline": headline(results), "tables": f"## Figures\n\n{tables}"}
    for name, content in sections.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, c=content, b=begin, e=end: f"{b}\n{c}\n{e}", text, flags=re.DOTALL)
    readme.write_text(text)


def plot(results: dict[str, Any], path: Path = OUTPUT / "bench.png") -> None:
    """Time and memory of every method, one row of bars for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = results["cases"]
    figure, axes = pyplot.subplots(len(cases), 2, figsize=(11, 1.9 * len(cases)), squeeze=False)
    for row, result in zip(axes, cases, strict=True):
        measured = {name: m for name, m in result["methods"].items() if "median" in m}
        colours = ["tab:blue" if name == "fastcl" else "lightgray" for name in measured]
        bars = (
            ("ms", [1e3 * m["median"] for m in measured.values()]),
            ("peak MB", [(m.get("peak_bytes") or 0) / 1e6 for m in measured.values()]),
        )
        for axis, (unit, values) in zip(row, bars, strict=True):
            axis.barh(list(measured), values, color=colours)
            axis.invert_yaxis()
            axis.set_title(f"{result['case']}: {unit}", fontsize=9)
            axis.tick_params(labelsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
