"""The growth curves: a small run in a process of its own, the fits on curves that are known, and the figures for users."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import fits, plots, report, scaling
from bench.cases import CASES


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    sizes = ["--sizes", "64", "128", "--widths", "16", "--widths-at", "64", "--seconds", "60", "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "bench.scaling", *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "point" in done.stderr  # the progress bar
    found = json.loads(out.read_text())
    assert found["whole"] and found["environment"]["torch"]
    assert {(p["method"], p["n"]) for p in found["points"] if p["against"] == "n"} == {
        (m, n) for m in ("fastcl", "eager", "chunked recompute", scaling.TOWERS) for n in (64, 128)
    }
    plots.scaling(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
    assert "### Growth" in report.scaling_section(found)


def _points(method: str, seconds: float, peak: tuple[float, float]) -> list[dict]:
    """Times seconds n^2, peaks a n^2 + b n."""
    return [
        {
            "method": method, "against": "n", "n": n, "d": 128, "seconds": seconds * n * n,
            "peak_bytes": peak[0] * n * n + peak[1] * n, "calls": 1,
        }
        for n in (1024, 2048, 4096, 8192, 16384)
    ]  # fmt: skip


@pytest.fixture
def known() -> dict:
    points = (
        _points("fastcl", 5e-9, (0.0, 4000.0))
        + _points("eager", 2e-8, (16.0, 1e5))
        + _points(scaling.TOWERS, 1e-9, (0, 0))
    )
    environment = dict.fromkeys(("processor", "threads", "torch", "python", "fastcl", "commit", "backend"), "x")
    cut = [{"method": "eager", "against": "n", "n": 32768, "d": 128, "why": "needs about 21 GB"}]
    return {"environment": environment, "points": points, "cut": cut}


def test_fits_find_the_law(known: dict) -> None:
    ours, theirs = (fits.fit(fits.curve(known["points"], m, "peak_bytes")) for m in ("fastcl", "eager"))
    assert ours is not None and theirs is not None
    assert ours.exponent == pytest.approx(1.0) and ours.square == pytest.approx(0.0, abs=1e-9)
    assert ours.linear == pytest.approx(4000.0)
    assert theirs.square == pytest.approx(16.0) and theirs.linear == pytest.approx(1e5, rel=1e-6)
    assert theirs.at(theirs.inverse(1e10)) == pytest.approx(1e10)
    time = fits.fit(fits.curve(known["points"], "fastcl", "seconds"))
    assert time is not None and time.exponent == pytest.approx(2.0)


def test_peaks_have_a_constant_and_no_square_is_made_of_it() -> None:
    """What fastcl takes on a machine is 3.2 KB a row less 2 MB; what a chunked loss takes is less a row, and 40 MB."""
    for linear, constant in ((3200.0, -2e6), (8800.0, 4e7)):
        law = fits.fit([(n, linear * n + constant) for n in (4096, 8192, 16384, 32768)], 0, fixed=True)
        assert law is not None and law.square == pytest.approx(0.0, abs=1e-9)
        assert (law.linear, law.fixed) == (pytest.approx(linear), pytest.approx(constant))
        assert law.at(law.inverse(8e10)) == pytest.approx(8e10)


def test_the_largest_batch_fits_and_one_more_would_not(known: dict) -> None:
    largest = {(row.method, row.gigabytes): row for row in fits.largest_batches(known)}
    n = largest["fastcl", 8].n
    whole = 4000.0 + 2 * 4 * 128
    assert whole * n <= 8e9 < whole * (n + 2)
    assert largest["eager", 8].n < 25_000 < n
    assert largest["fastcl", 8].beyond and largest["eager", 80].beyond


def test_the_time_saved_is_the_difference_of_the_curves(known: dict) -> None:
    rows = fits.saved(known, scaling.TOWERS)
    assert [(r.n, r.method) for r in rows] == [(n, "eager") for n in fits.STEP_SIZES]
    assert rows[0].seconds == pytest.approx(1.5e-8 * 4096**2)
    assert rows[0].share == pytest.approx(1.5e-8 / 2.1e-8)


def test_the_section_says_what_was_left_out(known: dict) -> None:
    text = report.scaling_section(known)
    assert "eager from n = 32,768 on (needs about 21 GB)" in text
    assert "| fastcl | n^2.00 | n^1.00 | 16,384 | - |" in text
    assert "scaling.png" in text


def test_a_point_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = scaling.Curves(10.0, lambda results: None, lambda what: None)
    monkeypatch.setattr(scaling, "in_fork", lambda work: {"seconds": 4.0, "peak_bytes": 1, "calls": 1})
    case = CASES["clip-8k"].resized(1024)
    curves.run("fastcl", case, "n", dict, None, 0.0)
    curves.run("fastcl", case.resized(2048), "n", dict, None, 0.0)  # 16 s by n^2
    curves.run("fastcl", case.resized(4096), "n", dict, None, 0.0)
    assert [p["n"] for p in curves.results["points"]] == [1024]
    (cut,) = curves.results["cut"]
    assert cut["n"] == 2048 and "17 s a point" in cut["why"]
