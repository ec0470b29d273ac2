"""The benchmarks at tiny sizes: every method is right, a wrong one gets no figure, and tables come from measurements alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import baselines, measure, report
from bench.cases import CASES, HEADLINE

TINY = 96


@pytest.mark.parametrize("name", CASES)
def test_every_method_is_right(name: str) -> None:
    case = CASES[name].resized(TINY)
    for method, make in baselines.methods(case.loss, case.n).items():
        if method != "torch.compile":  # the same formula as eager; compiling takes 20 s a case
            value_error, gradient_error = measure.errors(case, make)
            assert value_error < measure.TOLERANCE and gradient_error < measure.TOLERANCE, method


def _wrong(loss: str, n: int) -> dict[str, Callable[[], baselines.Method]]:
    def twice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2.0 * baselines.FASTCL[loss](x, y)

    return {"fastcl": lambda: baselines.FASTCL[loss], "twice": lambda: twice}


def test_a_wrong_method_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "methods", _wrong)
    result = measure.measure(CASES["clip-2k"].resized(TINY), rounds=2, memory=False)
    assert "median" in result["methods"]["fastcl"]
    assert "median" not in result["methods"]["twice"]
    assert "| twice | wrong: no figure |" in report.table(result)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    case = CASES["clip-2k"]
    ours, eager = measure.peak_memory(case, "fastcl"), measure.peak_memory(case, "eager")
    assert ours is not None and eager is not None
    assert 2 * 2048 * 128 * 4 < ours < eager / 2
    assert eager > 2 * 2048 * 2048 * 4


def test_tables_come_from_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "methods", _wrong)
    results = {
        "environment": measure.environment(),
        "cases": [measure.measure(CASES[name].resized(TINY), rounds=2, memory=False) for name in HEADLINE],
    }
    readme = tmp_path / "README.md"
    readme.write_text(
        "a\n<!-- bench:headline -->\nold\n<!-- /bench:headline -->\nb\n<!-- bench:tables -->\n<!-- /bench:tables -->\n"
    )
    report.write_readme(json.loads(json.dumps(results)), readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("a\n<!-- bench:headline -->\n| loss")
    assert all(f"**{name}**" in text for name in HEADLINE)
    report.plot(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_readme_holds_the_committed_measurements(tmp_path: Path) -> None:
    """No figure between the markers is typed by hand."""
    readme = tmp_path / "README.md"
    text = (report.ROOT / "README.md").read_text()
    readme.write_text(text)
    report.write_readme(json.loads(report.RESULTS.read_text()), readme)
    assert readme.read_text() == text


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["clip-9k"])
    assert "got clip-9k" in capsys.readouterr().err
