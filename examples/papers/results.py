"""Records on disk, one JSON object a line, appended as they come; and what they come to over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cells import Cell, Record

# Title, name in the record, factor and digits.
COLUMNS = (
    ("kNN, %", "knn", 100.0, 1),
    ("linear, %", "linear", 100.0, 1),
    ("alignment", "alignment", 1.0, 2),
    ("uniformity", "uniformity", 1.0, 2),
    ("effective rank", "effective_rank", 1.0, 1),
    ("top direction, %", "top_direction", 100.0, 0),
)


def key(cell: Cell | dict[str, Any], seed: int) -> str:
    """What makes a record the one that is asked for: every setting of the cell, and the seed."""
    return json.dumps([asdict(cell) if isinstance(cell, Cell) else cell, seed], sort_keys=True)


def append(path: Path, record: Record) -> None:
    """One line more, with numbers of five digits."""
    short = json.loads(json.dumps(record), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    with path.open("a") as file:
        file.write(json.dumps(short | {"cell": record["cell"]}) + "\n")


def read(path: Path) -> list[Record]:
    """The records of a file; a last line that was cut off, as by a kill, is dropped from the file as well."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        lines = lines[:-1]
    return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Summary:
    """One cell and its records, one for each seed."""

    cell: Cell
    records: list[Record]

    def values(self, name: str) -> list[float]:
        """Of the seeds whose training stayed finite."""
        flat = [(record["quality"] or {}) | record for record in self.records if record["quality"] is not None]
        return [one[name] for one in flat if name in one]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name) or [math.nan])

    def spread(self, name: str) -> float:
        """The standard deviation over the seeds, 0 for a single one."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else 0.0


def summaries(cells: Iterable[Cell], records: Sequence[Record]) -> list[Summary]:
    """In the order of the cells; those without a record are left out."""
    by_cell: dict[str, list[Record]] = {}
    for record in records:
        by_cell.setdefault(key(record["cell"], 0), []).append(record)
    found = [Summary(cell, by_cell.get(key(cell, 0), [])) for cell in cells]
    return [one for one in found if one.records]


def table(found: Sequence[Summary]) -> str:
    """Markdown: one line a cell, the mean and the standard deviation over its seeds."""
    lines = [
        "| | " + " | ".join(title for title, *_ in COLUMNS) + " | seeds |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    part = ""
    for one in found:
        if one.cell.part != part:
            part = one.cell.part
            lines.append(f"| **{part}** |" + " |" * (len(COLUMNS) + 1))
        cut = len(one.records) - len(one.values("knn"))
        shown = [_shown(one, name, factor, digits) for _, name, factor, digits in COLUMNS]
        seeds = f"{len(one.records)}" + (f", {cut} diverged" if cut else "")
        lines.append(f"| {one.cell.title} | " + " | ".join(shown) + f" | {seeds} |")
    return "\n".join(lines)


def _shown(one: Summary, name: str, factor: float, digits: int) -> str:
    if not one.values(name):
        return ""
    return f"{factor * one.mean(name):.{digits}f} ± {factor * one.spread(name):.{digits}f}"
