"""The benchmarks at tiny sizes: every method is right, a wrong one gets no figure, and tables come from measurements alone."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import baselines, measure, plots, report
from bench.baselines import Baseline
from bench.budget import Budget, affordable
from bench.cases import CASES, HEADLINE
from bench.formulas import FASTCL
from bench.measure import Settings
from fastcl.bench import measuring, peaks
from fastcl.bench.losses import EAGER

TINY = 96


@pytest.mark.parametrize("name", CASES)
def test_every_method_is_right(name: str) -> None:
    case = CASES[name].resized(TINY)
    truth = measure.exact(case, *case.inputs())
    for baseline in baselines.baselines(case.loss):
        why = baseline.absent(case)
        assert why is None or baseline.module == "pykeops", why
        if not baseline.compiles:  # the same formula as eager; compiling takes 20 s a case
            for chunk in {baseline.choices[0], min(64, baseline.choices[-1])}:  # several chunks, and one ragged
                errors = measuring.errors(baseline.make(chunk), truth, *case.inputs())
                assert max(errors) < measure.TOLERANCE, (baseline.name, chunk, errors)


def _doubled(loss: str) -> list[Baseline]:
    """fastcl, twice its value, something that raises, something that is not installed, something too large."""

    def twice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2.0 * FASTCL[loss](x, y)

    def broken(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such kernel")

    return [
        Baseline("fastcl", lambda chunk: FASTCL[loss]),
        Baseline("faster", lambda chunk: FASTCL[loss], ahead="it is the same"),
        Baseline("twice", lambda chunk: twice),
        Baseline("broken", lambda chunk: broken),
        Baseline("elsewhere", lambda chunk: broken, module="no_such_package", command="pip install no-such-package"),
        Baseline("large", lambda chunk: broken, size=lambda rows, d: 1e18),
    ]


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "baselines", _doubled)


def _tiny(name: str, **settings: object) -> dict:
    return measure.measure(CASES[name].resized(TINY), Settings(rounds=2, memory=False, **settings))


@pytest.mark.usefixtures("doubled")
def test_a_method_without_a_figure_says_why() -> None:
    result = _tiny("clip-2k")
    rows, text = result["methods"], report.table(result)
    assert [name for name, row in rows.items() if "median" in row] == ["fastcl", "faster"]
    assert rows["fastcl"]["rounds"] == 2 and rows["fastcl"]["low"] <= rows["fastcl"]["median"] <= rows["fastcl"]["high"]
    assert "| twice | wrong: no figure |" in text
    assert "| broken | failed: ValueError: no such kernel |" in text
    assert "| elsewhere | absent: no_such_package is not installed; pip install no-such-package |" in text
    assert "| large | absent: needs about 1,000,000,000 GB" in text
    assert {"fma", "matmul", "square"} == set(result["ceiling"])


@pytest.mark.usefixtures("doubled")
def test_nothing_is_quoted_when_fastcl_itself_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TOLERANCE", 0.0)
    result = _tiny("clip-2k")
    assert not any("median" in row for row in result["methods"].values())
    assert "| fastcl | wrong: no figure |" in report.table(result)


def test_a_baseline_ahead_is_shown_with_its_reason() -> None:
    ours = {
        "value_error": 0.0,
        "gradient_error": 0.0,
        "right": True,
        "median": 2.0,
        "low": 2.0,
        "high": 2.0,
        "rounds": 3,
    }
    theirs = ours | {"median": 1.0, "against_fastcl": 0.5, "ahead": "it knows the answer"}
    result = {
        "case": "c", "loss": "clip", "n": 8, "d": 4, "gemms": 4, "flops": 1e9, "ceiling": {"fma": 1e10},
        "methods": {"fastcl": ours | {"against_fastcl": 1.0}, "quick": theirs, "odd": theirs | {"ahead": ""}},
    }  # fmt: skip
    text = report.table(result)
    assert "| quick | 1,000 | 2,000 to 2,000, 3 | 0.50x | 10% |" in text
    assert "Not beaten in time: quick; it knows the answer." in text
    assert "Not beaten in time: odd; no reason is known yet." in text


def test_quick_calls_are_repeated_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def taking(*seconds: float) -> float:
        left = iter(seconds)
        return measuring.by_wall(lambda: now.__setitem__(0, now[0] + next(left)))

    assert taking(0.009, 0.004, 0.005, 0.004) == pytest.approx(0.0045)  # the first finds its data elsewhere
    assert taking(0.5) == pytest.approx(0.5)


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # from wherever it is called
    case = CASES["clip-2k"]
    found = measure.memory_run(case, {"fastcl": 0, "eager": 0, "chunked recompute": 256}, 60.0)
    peaks = {name: row["peak_bytes"] for name, row in found.items()}
    assert 2 * 2048 * 128 * 4 < peaks["fastcl"] < peaks["eager"] / 2
    assert peaks["eager"] > 2 * 2048 * 2048 * 4 > peaks["chunked recompute"]
    assert all(row["seconds"] > 0.0 for row in found.values())


def test_the_peak_is_that_of_the_second_call_where_the_first_compiles() -> None:
    case = CASES["clip-8k"].resized(4096, 16)  # matrices that the allocator gives back at once
    assert peaks.one_call(EAGER["clip"], case.inputs(), case.warm_inputs(True))["peak_bytes"] > 2 * 4096 * 4096 * 4


def test_a_memory_run_that_takes_too_long_ends() -> None:
    assert measure.memory_run(CASES["clip-32k"], {"fastcl": 0}, 0.0) == {}


def test_a_fork_that_fails_says_why() -> None:
    assert peaks.in_fork(lambda: {"a": 1}) == {"a": 1}
    assert peaks.in_fork(lambda: {"a": 1 // 0})["failed"].startswith("ZeroDivisionError")
    assert peaks.in_fork(lambda: __import__("os").kill(__import__("os").getpid(), 9)) == {"failed": "ended by signal 9"}


# ---- the time budget ------------------------------------------------------------------------------------------------------


def test_what_a_case_leaves_goes_to_the_others() -> None:
    now = [0.0]
    budget = Budget(100.0, {"a": 1.0, "b": 3.0, "c": 1.0}, lambda: now[0])
    assert budget.begin("a") == 20.0
    now[0] = 60.0  # it overran
    assert budget.begin("b") == 30.0
    now[0] = 61.0
    assert budget.begin("c") == 39.0


def test_the_slowest_methods_are_left_out_first() -> None:
    times = {"fastcl": 9.0, "quick": 1.0, "slow": 5.0}
    assert affordable(times, 90.0, "fastcl") == (["fastcl", "quick", "slow"], 5)
    assert affordable(times, 20.0, "fastcl") == (["fastcl", "quick"], 1)
    assert affordable(times, 0.0, "fastcl") == (["fastcl"], 1)
    assert affordable(times, 20.0, "fastcl", warm={"fastcl", "slow"}) == (["fastcl", "quick", "slow"], 1)


@pytest.mark.usefixtures("doubled")
def test_a_method_cut_by_the_budget_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        measure,
        "memory_run",
        lambda *rest: {"fastcl": {"peak_bytes": 1, "seconds": 1.0}, "faster": {"peak_bytes": 2, "seconds": 1e9}},
    )
    result = measure.measure(CASES["clip-2k"].resized(TINY), Settings(rounds=2, allowance=60.0))
    assert "median" in result["methods"]["fastcl"] and "median" not in result["methods"]["faster"]
    assert "cut by the time budget" in report.table(result)


# ---- README and files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubled: None) -> Path:
    """A checkout's README and results, elsewhere."""
    (tmp_path / "docs").mkdir()
    for name, page in report.PAGES.items():
        (tmp_path / page).write_text(f"a\n<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->\n")
    for name in ("RESULTS", "SCALING", "SCALING_PLOT", "CASES_PLOT"):
        monkeypatch.setattr(report, name, tmp_path / getattr(report, name).name)
    monkeypatch.setattr(report, "write_pages", partial(report.write_pages, root=tmp_path))
    small = {name: case.resized(TINY) for name, case in CASES.items() if name in HEADLINE[:3]}
    monkeypatch.setattr(command, "CASES", small)
    return tmp_path


def test_a_run_writes_json_tables_and_plots(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--minutes", "1", "--rounds", "2", "--no-memory", "--no-scaling"]) == 0
    readme, text = ((tree / page).read_text() for page in report.PAGES.values())
    assert "old" not in readme + text
    assert readme.startswith("a\n<!-- bench:headline -->\n| loss")
    assert all(f"**{name}**" in text for name in HEADLINE[:3])
    assert "nothing was left out for want of time" in text
    assert (tree / "cases.png").stat().st_size > 10_000
    assert "clip-8k" in capsys.readouterr().out
    before = json.loads((tree / "cpu.json").read_text())
    command.main(["--only", "simclr-4k", "--rounds", "2", "--no-memory"])
    after = json.loads((tree / "cpu.json").read_text())
    assert [r["case"] for r in after["cases"]] == [r["case"] for r in before["cases"]]
    changed = [a["case"] for a, b in zip(after["cases"], before["cases"], strict=True) if a != b]
    assert changed == ["simclr-4k"]


def test_a_run_that_was_cut_off_is_resumed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure.measure

    def dies(case: object, *rest: object) -> dict:
        if getattr(case, "name", "") == "clip-8k-wide":
            raise KeyboardInterrupt
        return whole(case, *rest)  # type: ignore[arg-type]

    arguments = ["--minutes", "1", "--rounds", "1", "--no-memory", "--no-scaling"]
    monkeypatch.setattr(command, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    saved = json.loads((tree / "cpu.json").read_text())
    assert [r["case"] for r in saved["cases"]] == ["clip-8k", "simclr-4k"]
    monkeypatch.setattr(command, "measure", whole)
    command.main([*arguments, "--resume"])
    resumed = json.loads((tree / "cpu.json").read_text())
    assert resumed["cases"][:2] == saved["cases"] and len(resumed["cases"]) == 3


def test_a_case_without_time_is_named(tree: Path) -> None:
    command.main(["--minutes", "0.0001", "--no-memory", "--no-scaling"])
    assert "the budget left out: clip-8k: 0 s were left for it" in (tree / "docs" / "benchmarks.md").read_text()


def test_pages_hold_the_committed_measurements(tmp_path: Path) -> None:
    """No figure between the markers is typed by hand."""
    (tmp_path / "docs").mkdir()
    before = {page: (report.ROOT / page).read_text() for page in report.PAGES.values()}
    for page, text in before.items():
        (tmp_path / page).write_text(text)
    results, scaling = report.load(report.RESULTS), report.load(report.SCALING)
    assert results is not None
    report.write_pages(results, scaling, tmp_path)
    assert {page: (tmp_path / page).read_text() for page in before} == before


def test_every_picture_of_the_pages_is_there() -> None:
    for page in report.PAGES.values():
        found = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (report.ROOT / page).read_text())
        assert found and all(((report.ROOT / page).parent / path).is_file() for path in found)


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    results = report.load(report.RESULTS)
    assert results is not None
    with pytest.raises(ValueError, match="expected the markers"):
        report.write_pages(results, None, tmp_path)


def test_the_width_that_the_blas_uses_is_named() -> None:
    for share, verdict in ((0.9, "BLAS uses the full"), (0.3, "BLAS does not use the full")):
        few = {"cases": [{"ceiling": {"fma": 1.0, "square": s}} for s in (share, share, 3.0)], "environment": {}}
        assert verdict in report.vector_width(few) and f"{share:.0%}" in report.vector_width(few)


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["clip-9k"])
    assert "got clip-9k" in capsys.readouterr().err


@pytest.mark.usefixtures("doubled")
def test_one_case_is_printed_and_nothing_saved(capsys: pytest.CaptureFixture[str], tree: Path) -> None:
    command.main(["clip-8k", "--rows", str(TINY), "--rounds", "1", "--no-memory"])
    printed = capsys.readouterr()
    assert "**clip-8k**" in printed.out and "case" in printed.err  # table, and progress bar
    assert not (tree / "cpu.json").exists()


def test_plots_of_nothing_measured(tmp_path: Path) -> None:
    plots.scaling({"points": []}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").is_file()
