"""`fastcl bench` and `fastcl cost`, as somebody with nothing but the package calls them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastcl import functional
from fastcl.__main__ import main
from fastcl.bench import command, cost, losses, measuring
from fastcl.bench.peaks import Call, peaks_of

SMALL = ["--n", "96", "--d", "16", "--rounds", "2"]


@pytest.fixture(autouse=True)
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own takes three seconds; one test has it."""
    for module in (command, cost):
        monkeypatch.setattr(module, "peaks_of", lambda calls: [{"peak_bytes": 10 * call.n} for call in calls])


def measured(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[dict]:
    assert main(["bench", *SMALL, "--json", *arguments]) == status
    found: list[dict] = json.loads(capsys.readouterr().out)["results"]
    return found


@pytest.mark.parametrize("loss", losses.names())
def test_every_loss_is_right(loss: str) -> None:
    x, y = measuring.views(96, 16)
    truth = measuring.exact(losses.method_of(loss), x, y)
    for method in [losses.method_of(loss, "blocked"), *([losses.EAGER[loss]] if loss in losses.EAGER else [])]:
        assert max(measuring.errors(method, truth, x, y)) < 1e-4
    assert cost.counted(Call(loss, 96, 16))[0] >= 0


def test_methods_take_turns_at_every_shape_and_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(
        capsys, "--loss", "clip", "kcl", "--d", "8", "16", "--dtype", "float32", "bfloat16", "--backend", "auto", "blocked"
    )  # fmt: skip
    methods = ["fastcl", "fastcl, blocked", "eager PyTorch"]
    assert [row["method"] for row in rows] == methods * 2 * 4
    assert {(row["d"], row["dtype"]) for row in rows} == {(d, t) for d in (8, 16) for t in ("float32", "bfloat16")}
    assert all(row["right"] and row["rounds"] == 2 and row["low"] <= row["median"] <= row["high"] for row in rows)


def test_a_function_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_own_losses.py").write_text(
        "import torch\n"
        "def good(x, y):\n    return (x - y).square().mean()\n"
        "def wrong(x, y):\n    return x.detach().float().round().sum() * 1e-3 + (x * y).sum()\n"
        "def broken(x, y):\n    raise KeyError('no such thing')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"my_own_losses:{name}" for name in ("good", "broken")]
    good, broken = measured(capsys, "--loss", *names, status=1)
    assert good["method"] == "yours" and good["median"] > 0
    assert broken["failed"] == "KeyError: 'no such thing'"


@pytest.mark.parametrize("own", ["os:getcwd", "os:environ", "builtins:print", "torch.nn:Linear"])
def test_a_function_that_is_no_loss_is_named(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is, one line says so, and no traceback."""
    for given in (
        ["cost", "--n", "32", "--loss", own],
        ["bench", "--n", "32", "--profile", str(tmp_path / "t"), "--loss", own],
    ):
        try:
            status = main(given)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err.splitlines()[-1]
        assert status and "loss: expected a function (x, y) of two views" in said and own in said


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "free_memory", lambda: 1e5)
    assert main(["bench", *SMALL]) == 0
    assert "does not fit: about 0 GB" in capsys.readouterr().out


def test_a_wrong_method_has_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(losses.EAGER, "clip", lambda x, y: 2.0 * losses.ours("clip")(x, y))
    monkeypatch.setattr(command, "exact", lambda *_: measuring.exact(losses.ours("clip"), *_[1:]))
    ours, eager = measured(capsys, status=1)
    assert "median" in ours and "median" not in eager


def test_two_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (str(tmp_path / f"{name}.json") for name in ("before", "after"))
    assert main(["bench", *SMALL, "--json", before]) == 0
    assert "eager PyTorch" in capsys.readouterr().out  # the table, too
    whole = json.loads(Path(before).read_text())
    ours = whole["results"][0]
    ours |= dict.fromkeys(("median", "low", "high"), 3.0 * ours["high"])
    Path(after).write_text(json.dumps(whole))
    assert main(["bench", "--compare", before, after]) == 1
    text = capsys.readouterr().out
    assert (
        "fastcl: " in text and "1.00x the memory: SLOWER" in text and "1.00x the time, 1.00x the memory: even" in text
    )
    assert main(["bench", "--compare", after, before]) == 0
    assert "quicker" in capsys.readouterr().out


def test_a_profile_names_our_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert main(["bench", *SMALL, "--profile", str(trace)]) == 0
    assert "fastcl::" in capsys.readouterr().out
    assert "fastcl::" in trace.read_text()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_peaks_of_a_process_of_its_own() -> None:
    ours, eager, failed = peaks_of(
        [Call("clip", 2048, 64), Call("clip", 2048, 64, eager=True), Call("no_module:here", 8, 8)]
    )
    assert 2048 * 64 * 4 < ours["peak_bytes"] < eager["peak_bytes"] / 2
    assert eager["peak_bytes"] > 2 * 2048 * 2048 * 4
    assert failed["failed"].startswith("ModuleNotFoundError")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "clipp"], "did you mean 'clip'"),
        (["--loss", "moco"], "which needs q, k, queue"),
        (["--loss", "no_module:here"], "got 'no_module:here'; no module 'no_module' in "),
        (["--loss", "torch:here"], "no attribute 'here'"),
        (["--n", "0"], "expected integers >= 1"),
        (["--device", "nosuch"], "device: expected cpu or a GPU that torch has here, got 'nosuch'"),
        (["--device", "meta"], "device: expected one of"),
        (["--compare", "no.json", "no.json"], "No such file or directory: 'no.json'"),
        (["--compare", __file__, __file__], "expected what fastcl bench --json FILE writes"),
        (["--json", "no_folder/figures.json"], "expected a file in a folder that exists"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_what_a_machine_cannot_do_widens_no_column() -> None:
    row = {"loss": "clip", "n": 8, "d": 8, "dtype": "float32", "method": "fastcl"}
    good = {**row, "median": 1e-3, "low": 1e-3, "high": 1e-3, "rounds": 1, "against_first": 1.0}
    where = dict.fromkeys(("processor", "threads", "torch", "fastcl", "backend", "isa"), "")
    failed = {**row, "failed": "BackendUnavailableError: " + 200 * "x"}
    lines = list(command.table({"environment": where, "results": [failed, good]}))
    assert max(map(len, (lines[1], lines[3]))) < 120 and lines[2].endswith(200 * "x")


def test_rows_that_no_memory_holds_are_not_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--n", "100000000000", "--d", "16"]) == 0
    assert capsys.readouterr().out.count("does not fit") == 2


# ---- cost -------------------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_size_that_is_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "LARGEST", 256)
    arguments = ["cost", "--loss", "nt_xent", "--n", "100000", "--d", "32"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops"] >= 3 * 2 * 200_000**2 * 32  # the products of the dense formula
    assert found["bytes"] == pytest.approx(10 * 100_000)
    assert found["seconds"] > 0 and found["measured_at"] == 256
    assert "pair_total" in found["kernel"]
    assert main(arguments) == 0
    assert "from rates at 256 rows" in capsys.readouterr().out


@pytest.mark.parametrize("size", [["--n", "-5"], ["--n", "0"], ["--d", "0"]], ids=" ".join)
def test_a_cost_of_nothing_is_no_size(size: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cost", "--n", "8", "--d", "8", *size])
    assert "--n, --d: expected integers >= 1" in capsys.readouterr().err


def test_time_grows_with_rows_and_flops() -> None:
    a, b = 3.0, 0.5  # seconds = a rows + b flops
    assert cost._grown([a * 0.5 + b * 4, a + b * 16], [4, 16], 400, 5) == pytest.approx(a * 5 + b * 400)
    assert cost._grown([1.0, 2.0], [4, 8], 80, 10) == pytest.approx(20.0)  # flops grow as rows do
    assert cost._grown([2.0, 2.0], [4, 16], 400, 5) == pytest.approx(10.0)  # noise: neither rate is negative
    assert cost._grown([0.1, 2.0], [4, 16], 400, 5) == pytest.approx(50.0)


def test_a_sum_without_pairs_says_so() -> None:
    flops, ops = cost.counted(Call("spectral", 65536, 64))
    assert "no pair is formed" in cost.kernel_of(Call("spectral", 65536, 64), ops, flops)
    assert "no sum over pairs" in cost.kernel_of(Call("alignment", 64, 64), [], 0)


def test_nothing_of_the_process_is_changed() -> None:
    before = dict(os.environ)
    measuring.exact(functional.align_uniform, *(t.to(torch.float32) for t in measuring.views(8, 4)))
    assert dict(os.environ) == before
