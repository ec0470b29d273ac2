"""The papers' experiments as one calls them: each at a tiny setting, cut off and taken up again; and what the records come to."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.papers import command, dhel_kcl, f_micl, minc, results
from examples.papers.cells import Cell, Paper, Record
from fastcl import losses

pytestmark = pytest.mark.slow

PAPERS = {paper.name: paper for paper in (f_micl.PAPER, minc.PAPER, dhel_kcl.PAPER)}
RECORDS = Path(__file__).parents[2] / "docs/pictures/papers"
PARTS = {"f_micl": "optimiser", "minc": "rows clipped", "dhel_kcl": "batch size 64"}


def run(name: str, output: Path, *argv: str) -> int:
    tiny = ("--epochs", "0.2", "--seeds", "1", "--jobs", "1", "--part", PARTS[name], "--fashion", "/nowhere")
    return command.main([PAPERS[name]], [*tiny, "--output", str(output), *argv])


@pytest.mark.parametrize("name", PAPERS)
def test_a_run_that_was_cut_off_is_taken_up(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--resume does what is missing, be it a record or half of one, and nothing else; without it all is done anew."""
    assert run(name, tmp_path) == 0
    shown = capsys.readouterr()
    assert "training/s" in shown.err or "s/training" in shown.err, "the progress bar"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    path, table = tmp_path / f"{name}.jsonl", (tmp_path / f"{name}.txt").read_text()
    whole = path.read_text()
    cells = [cell for cell in PAPERS[name].cells if cell.part.startswith(PARTS[name])]
    assert len(whole.splitlines()) == len(cells)
    assert all(cell.title in table for cell in cells) and table in shown.out

    path.write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    assert run(name, tmp_path, "--resume") == 0
    assert "1/1 " in capsys.readouterr().err, "one record was missing"
    assert [_timeless(line) for line in path.read_text().splitlines()] == [
        _timeless(line) for line in whole.splitlines()
    ]


def test_all_papers_are_one_command(tmp_path: Path) -> None:
    """In two processes; papers without such a part say so."""
    tiny = (
        "--epochs",
        "0.1",
        "--seeds",
        "1",
        "--part",
        "optimiser: SGD",
        "--fashion",
        "/nowhere",
        "--output",
        str(tmp_path),
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "examples.papers", *tiny], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no records") == 2, "of MINC, and of DHEL and KCL"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["f_micl.png"]


@pytest.mark.parametrize("part", ["800", "3,200", "LARS, m", "LARS, n", "d 512, m", "d 512, n", "d 512, f", "d 1,024"])
def test_minc_longer_with_lars_and_wider(part: str, tmp_path: Path) -> None:
    """Each part trains, at its own width and with its own optimiser, and is judged and drawn."""
    tiny = ("--epochs", "0.4", "--seeds", "1", "--jobs", "1", "--fashion", "/nowhere", "--output", str(tmp_path))
    assert command.main([minc.PAPER], [*tiny, "--part", part]) == 0
    cells = [cell for cell in minc.PAPER.cells if cell.part.startswith(part)]
    records = results.read(tmp_path / "minc.jsonl")
    assert [record["cell"]["title"] for record in records] == [cell.title for cell in cells] and cells
    assert all(record["quality"] is not None for record in records)
    assert (tmp_path / "minc.png").read_bytes().startswith(b"\x89PNG")


def test_the_panels_of_longer_lars_and_wider_have_cells_and_a_comparison() -> None:
    for parts in minc.BEYOND.values():
        for part in parts:
            shown = [cell for cell in minc.PAPER.cells if cell.part.startswith(part)]
            assert {cell.loss for cell in shown} == {"SpectralLoss", "MINCLoss"}
            assert all(cell.settings["mu"] == 4.0 for cell in shown), "rows clipped, as the titles say"


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_minc_with_lars_takes_a_rate_that_the_spectral_loss_was_tried_with(momentum: float) -> None:
    """And the best of them, by the records that docs/papers.md shows."""
    tried = [
        cell for cell in minc.PAPER.cells if cell.schedule.optimizer == "lars" and cell.schedule.momentum == momentum
    ]
    alone = [cell for cell in tried if cell.loss == "SpectralLoss"]
    found = results.summaries(alone, results.read(RECORDS / "minc.jsonl"))
    best = max(found, key=lambda one: one.mean("knn"))
    assert len(found) == len(alone) and all(len(one.records) == 3 for one in found)
    assert {cell.schedule.learning_rate for cell in tried if cell.loss == "MINCLoss"} == {
        best.cell.schedule.learning_rate
    }


def _timeless(line: str) -> Record:
    record = json.loads(line)
    del record["seconds"]
    return record  # type: ignore[no-any-return]


@pytest.mark.parametrize("paper", PAPERS.values(), ids=PAPERS)
def test_every_cell_can_be_built_and_is_itself_after_json(paper: Paper) -> None:
    keys = {results.key(json.loads(json.dumps(asdict(cell))), 0) for cell in paper.cells}
    assert keys == {results.key(cell, 0) for cell in paper.cells} and len(keys) == len(paper.cells)
    for cell in paper.cells:
        assert isinstance(
            cell.build(8, None), losses.MINCLoss if cell.loss == "MINCLoss" else getattr(losses, cell.loss)
        )


def test_a_target_changes_no_other_setting() -> None:
    """Of the statistic, GHA and the bound on rows."""
    cells = [cell for cell in minc.PAPER.cells if cell.loss == "MINCLoss"]
    assert {cell.rate is None for cell in cells} == {True, False}
    for cell in cells:
        loss = cell.build(8, None)
        assert (loss.ema, loss.gha, loss.mu) == (cell.settings["ema"], cell.settings["gha"], cell.settings.get("mu"))


def test_mean_spread_and_divergence() -> None:
    cell = Cell("part", "title", "InfoNCELoss")
    quality = {"linear": 0.5, "alignment": 0.1, "uniformity": -1.0, "effective_rank": 3.0, "top_direction": 0.2}
    records: list[Record] = [
        {"cell": asdict(cell), "seed": seed, "quality": None if knn is None else quality | {"knn": knn}, "seconds": 1.0}
        for seed, knn in enumerate((0.6, 0.8, None))
    ]
    (one,) = results.summaries([cell, Cell("part", "not run", "DCLLoss")], records)
    assert one.mean("knn") == pytest.approx(0.7) and one.spread("knn") == pytest.approx(math.sqrt(0.02))
    assert "| title | 70.0 ± 14.1 | 50.0 ± 0.0 |" in results.table([one]) and "| 3, 1 diverged |" in results.table(
        [one]
    )


@pytest.mark.parametrize("gha", [False, True])
@pytest.mark.parametrize(("ema", "m"), [(0.8, 0.9), (0.0, 0.9), (0.3, 0.0), (0.8, 0.0)])
def test_the_bound_of_the_step_is_where_the_loop_ceases_to_settle(ema: float, m: float, gha: bool) -> None:
    bound = minc.bound(ema, m, gha)
    below, above = minc.returns(bound * np.array([0.97, 1.03]), ema, m, gha, None, steps=1500)
    assert below and not above


@pytest.mark.parametrize(
    ("divergence", "second"), [("kl", lambda u: 1 / u), ("js", lambda u: 1 / (u * (1 + u))), ("pearson", lambda u: 2)]
)
def test_the_weight_at_which_pull_and_push_balance(divergence: str, second: Callable[[float], float]) -> None:
    """By the double loop over pairs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.nn.functional.normalize(torch.randn(2, 12, 4, generator=generator, dtype=torch.float64), dim=-1)
    pull = [u * second(u) for u in (math.exp(-2.5 * float((a - b).square().sum())) for a, b in zip(x, y, strict=True))]
    pairs = (math.exp(-2.5 * float((a - b).square().sum())) for a in x for b in x if a is not b)
    push = [u * u * second(u) for u in pairs if u < 1.0]
    assert f_micl.balance(x, y, divergence, 2.5) == pytest.approx(np.mean(pull) / np.mean(push), rel=1e-4)
