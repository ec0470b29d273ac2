"""The GPU report on the CPU backends, so that it cannot rot before a card is there."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import device_checks, gpu_baselines, gpu_report
from bench.device_checks import check_all, wrong
from fastcl.backends import choice
from tests.objectives.cases import CASES, Case
from tests.objectives.witnesses import library

CPU = torch.device("cpu")
ROWS = 40


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiles, and one set of arguments for each loss."""
    monkeypatch.setattr(torch, "compile", lambda method, **options: method)
    monkeypatch.setattr(Case, "sets", lambda case: range(1))


def _here(arguments: list[str], seconds: float) -> str | None:
    """A part in this process."""
    assert gpu_report.main(arguments) == 0
    return None


def _run(tmp_path: Path, *more: str, run: Callable[[list[str], float], str | None] = _here) -> tuple[int, dict, str]:
    folders = ["--out", str(tmp_path / "out"), "--parts", str(tmp_path / "parts")]
    status = gpu_report.main(
        ["--device", "cpu", "--rows", str(ROWS), "--rounds", "2", "--minutes", "5", *folders, *more], run
    )
    return status, json.loads((tmp_path / "out" / "gpu.json").read_text()), (tmp_path / "out" / "gpu.md").read_text()


def test_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, results, text = _run(tmp_path)
    assert status == 0
    assert {r["loss"] for r in results["checks"]} == {case.name for case in CASES}
    assert {r["dtype"] for r in results["checks"]} == {"float32", "bfloat16", "float16"}
    assert [r["case"] for r in results["cases"]] == list(gpu_report.CASES)
    for result in results["cases"]:
        rows = result["methods"]
        assert {"fastcl", "eager", "torch.compile"} <= rows.keys()
        assert rows["fastcl"]["rounds"] == 2 and rows["fastcl"]["against_fastcl"] == 1.0
        assert result["ceiling"]["matmul"] > 0.0
        assert all("failed" not in row for row in rows.values()), rows
    assert "L2 flushed" in text and "matrix products" in text and "TFLOP/s" in text
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert (tmp_path / "out" / "gpu.png").stat().st_size > 10_000


def test_a_peak_counts_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def peak(device: object, run: Callable) -> int:
        seen.append(run.args[1].grad is None and run.args[2].grad is None)  # type: ignore[attr-defined]
        return 7

    monkeypatch.setattr(gpu_report.Device, "peak", peak)
    gpu = gpu_report.CASES["clip-16k-f32"]
    checks = [{"loss": "clip", "backend": b, "dtype": "float32", "right": True} for b in ("cpu", "blocked")]
    small = replace(gpu, case=gpu.case.resized(ROWS))
    rows = gpu_report.measure(small, gpu_report.Device("cpu"), checks, 1, 60.0)["methods"]
    assert all(seen) and len(seen) >= 5 and rows["fastcl"]["peak_bytes"] == 7


def test_running_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(device: object, run: Callable) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    monkeypatch.setattr(gpu_report.Device, "peak", peak)
    gpu = gpu_report.CASES["clip-16k-f32"]
    checks = [{"loss": "clip", "backend": b, "dtype": "float32", "right": True} for b in ("cpu", "blocked")]
    result = gpu_report.measure(replace(gpu, case=gpu.case.resized(ROWS)), gpu_report.Device("cpu"), checks, 1, 60.0)
    assert "Tried to allocate 64 GiB" in result["methods"]["eager"]["failed"]
    assert "| eager | failed: OutOfMemoryError" in gpu_report.table(result)


def test_rivals_that_are_not_there_are_named_with_what_gets_them() -> None:
    found = {
        b.name: b.absent(gpu_report.CASES[name].case)
        for name in ("clip-8k-bf16", "siglip-64k-bf16")
        for b in gpu_baselines.libraries(gpu_report.CASES[name].case.loss, 512)
    }
    assert found.keys() == {"memeff", "inf-cl", "siglip-kernel"}
    for name, why in found.items():
        assert why is not None
        assert f"pip install --no-deps {name}==" in why or "these are on cpu" in why


def test_inf_cl_says_which_widths_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (rival,) = gpu_baselines.libraries("info_nce", 128)
    why = rival.absent(gpu_report.CASES["info-nce-64k-bf16"].case, 1e15, "cuda")
    assert why is not None and "multiples of 256, got 128" in why


def test_a_loss_that_fails_its_device_check_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(case: Case, rows: list, backend: str, **arguments: object) -> torch.Tensor:
        value = library(case, rows, backend, **arguments)
        return value * (1.0 + 1e-3 * (backend == "cpu" and case.name == "siglip"))

    monkeypatch.setattr(device_checks, "library", off)
    monkeypatch.setattr(device_checks, "CASES", [c for c in CASES if c.name in ("siglip", "clip")])
    status, results, text = _run(tmp_path, "--case", "siglip-16k-f32", "clip-16k-f32")
    assert status == 1
    siglip, clip = (r["methods"] for r in results["cases"])
    assert "failed 1 of 1 device checks" in siglip["fastcl"]["failed"]
    assert not any("median" in row for row in siglip.values())
    assert "median" in clip["fastcl"]
    assert "- siglip, arguments 0" in text


@pytest.mark.parametrize("name", [b for b in ("blocked", "cpu") if choice.reason(b, CPU, torch.float32) is None])
def test_a_backend_that_raises_fails_its_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*rest: object, **arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(device_checks, "library", raises)
    monkeypatch.setattr(device_checks, "CASES", CASES[:1])
    results = check_all(CPU, [name], sizes=((8, 4),))
    assert results and not any(r["right"] for r in results)
    why = wrong(results, CASES[0].name, name, "float32")
    assert why is not None and "RuntimeError: no kernel" in why
    assert wrong(results, "another", name, "float32") == "its device check did not run"


def test_a_part_that_dies_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_checks, "CASES", [c for c in CASES if c.name in ("siglip", "clip")])

    def dies(arguments: list[str], seconds: float) -> str | None:
        return "ended with -11: " if "siglip-16k-f32" in arguments else _here(arguments, seconds)

    status, results, text = _run(tmp_path, "--case", "siglip-16k-f32", "clip-16k-f32", run=dies)
    assert status == 1 and [r["case"] for r in results["cases"]] == ["clip-16k-f32"]
    assert "- siglip-16k-f32: ended with -11" in text
    begun = []

    def noted(arguments: list[str], seconds: float) -> str | None:
        begun.append(arguments[1])
        return _here(arguments, seconds)

    _, results, _ = _run(tmp_path, "--resume", "--case", "siglip-16k-f32", "clip-16k-f32", run=noted)
    assert len(results["cases"]) == 2 and begun == ["siglip-16k-f32"]


def test_a_part_is_a_process_of_its_own() -> None:
    why = gpu_report.in_process(["--device", "cpu", "--one", "no-such-case"], 120.0)
    assert why is not None and why.startswith("ended with 1: KeyError")


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA device, got none"):
        gpu_report.Device("cuda")
