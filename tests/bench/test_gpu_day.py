"""The day of the card without a card: the command on CPU tensors and under emulation, and each way in which a part can fail."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import pytest
import torch

from bench import device_checks, gpu_baselines, gpu_checks, gpu_day, gpu_timing, measure
from bench.baselines import Baseline
from bench.device_checks import Item, Result, Route, check, routes
from bench.gpu_table import failures, table
from tests.objectives.cases import CASES, Case
from tests.objectives.witnesses import library

CPU = torch.device("cpu")
ROWS = 24
FEW = [case for case in CASES if case.id in ("clip", "siglip", "sup_con", "f_micl", "spectral")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiles or is built, and one set of arguments for a few losses."""
    monkeypatch.setattr(torch, "compile", lambda method, **options: method)
    monkeypatch.setattr(Case, "sets", lambda case: range(2))
    monkeypatch.setattr(gpu_checks, "CASES", FEW)
    monkeypatch.setattr(gpu_checks, "WIDTHS", (100,))
    monkeypatch.setattr(gpu_checks, "LOSSES", ("clip", "f_micl_js"))
    monkeypatch.setattr(gpu_timing, "ROUNDS", 1)
    monkeypatch.setattr(gpu_day, "PARTS", dict.fromkeys(gpu_day.PARTS, 300.0))
    monkeypatch.setattr(gpu_day, "build", lambda seconds, device: "not asked for")


def _here(name: str, arguments: list[str], seconds: float) -> str | None:
    """A part in this process."""
    assert gpu_day.main(["--one", name, *arguments]) == 0
    return None


def day_of(tmp_path: Path, *more: str, run: gpu_day.Run = _here) -> tuple[int, Result, list[str]]:
    status = gpu_day.main(
        ["--device", "cpu", "--rows", str(ROWS), "--out", str(tmp_path), "--minutes", "90", *more], run
    )
    return (
        status,
        json.loads((tmp_path / "gpu_day.json").read_text()),
        (tmp_path / "gpu_day.md").read_text().splitlines(),
    )


def test_the_whole_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, results, lines = day_of(tmp_path)
    assert status == 0, failures(results)
    assert list(results["parts"]) == list(gpu_day.PARTS)
    losses = results["parts"]["losses"]["results"]
    assert {r["dtype"] for r in losses} == {"bfloat16", "float16", "float32", "float64"}
    assert {r["case"] for r in losses} == {case.id for case in FEW}
    graphs = results["parts"]["graphs"]["results"]
    assert {r["case"] for r in graphs} == {case.id for case in FEW} and {r["index"] for r in graphs} > {0}
    assert all(r["right"] for r in graphs)
    for name in gpu_day.TIMED:
        ceiling, *rows = results["parts"][name]["results"]
        assert ceiling["ceiling"]["flops"] > 0.0 and ceiling["ceiling"]["bytes"] > 0.0
        assert {"fastcl", "eager", "torch.compile"} <= {r["method"] for r in rows if r.get("ms", 0.0) > 0.0}
    assert len(lines) <= gpu_day.LINES and lines[-1] == "0 failures"
    assert (tmp_path / "gpu_day.png").stat().st_size > 10_000
    assert lines == capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_parts_cover_the_routes_that_the_emulated_card_has() -> None:
    """The same checks by the kernels as compiled: what is typed wrong for a card fails here."""
    pytest.importorskip("triton")
    from tests.cuda.emulation import EVERYTHING, emulated

    with emulated() as session:
        found = [r for r in routes(CPU, torch.bfloat16) if r.backend == "cuda"]
        assert [r.name for r in found] == ["cuda auto", "cuda strip", "cuda fused", "cuda hopper"]
        results = [check(Item("clip", 0, ROWS, 8, torch.bfloat16), route, CPU) for route in found]
        assert session.names
        if EVERYTHING:
            day = gpu_checks.Day(CPU, ROWS, end=1e12)
            results += [r for part in (gpu_checks.forms, gpu_checks.large) for r in part(day)]
    assert all(r["right"] for r in results), results
    assert torch.cuda.is_available() or not [r for r in routes(CPU, torch.bfloat16) if r.backend == "cuda"]


def test_a_loss_that_is_off_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(case: Case, rows: list, backend: str, **arguments: object) -> torch.Tensor:
        return library(case, rows, backend, **arguments) * (
            1.0 + 0.2 * (backend == "blocked" and case.name == "siglip")
        )

    monkeypatch.setattr(device_checks, "library", off)
    monkeypatch.setattr(gpu_checks, "CASES", [case for case in FEW if case.id == "siglip"])
    status, results, lines = day_of(tmp_path, "--only", "losses")
    assert status == 1
    wrong = failures(results)
    assert wrong and all("siglip" in line and "blocked" in line for line in wrong)
    assert f"{len(wrong)} failures" in lines and any("siglip" in line for line in lines)


def test_a_route_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*rest: object, **arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel")

    device_checks.definition.cache_clear()
    monkeypatch.setattr(device_checks, "library", raises)
    found = check(Item("clip", 0, 8, 4, torch.float32), Route("blocked", "blocked"), CPU)
    assert found["right"] is False and found["failed"] == "RuntimeError: no kernel"


def test_what_a_part_found_before_it_died_is_kept(tmp_path: Path) -> None:
    def dies(name: str, arguments: list[str], seconds: float) -> str | None:
        if name != "forms":
            return _here(name, arguments, seconds)
        (tmp_path / "parts" / "forms.jsonl").write_text('{"case": "clip", "right": true}\n{"case": "si')
        return "ended with -11: CUDA error: an illegal memory access was encountered"

    status, results, lines = day_of(tmp_path, "--only", "forms", "clip-256", run=dies)
    assert status == 1
    assert results["parts"]["forms"]["results"] == [{"case": "clip", "right": True}]
    assert any("illegal memory access" in line for line in lines)
    assert any(r.get("ms") for r in results["parts"]["clip-256"]["results"])


def test_a_part_is_a_process_that_ends_in_time(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    passed = ["--device", "cpu", "--out", str(tmp_path)]
    why = gpu_day.in_process("no_such_part", passed, 120.0)
    assert why is not None and why.startswith("ended with 1: AttributeError")
    why = gpu_day.in_process("losses", passed, 0.2 - gpu_day.GRACE)
    assert why is not None and why.startswith("ended after")


def test_parts_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    chosen = argparse.Namespace(minutes=2.0, out=tmp_path, device="cpu", rows=ROWS, only=["facts", "losses", "forms"])
    seconds = itertools.count(0, 50)  # each look at the clock is 50 s later
    asked: list[str] = []
    results = gpu_day.everything(
        chosen, lambda name, arguments, seconds: asked.append(name), clock=lambda: float(next(seconds))
    )
    assert asked == ["facts"] or asked == []
    assert results["parts"]["forms"]["ended"] == "no time was left"


def test_a_part_stops_by_itself_at_its_end() -> None:
    late = gpu_checks.Day(CPU, ROWS, end=0.0, clock=lambda: 1.0)
    for part in (gpu_checks.losses, gpu_checks.forms, gpu_checks.large, gpu_checks.graphs):
        assert "cut" in next(iter(part(late)))


@pytest.mark.parametrize(("version", "forms"), [("3.6.0", ("auto", "strip")), ("3.9.0", ("auto", "strip", "fused"))])
def test_a_form_that_is_refused_is_not_asked_for(
    version: str, forms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton of before 3.7.1 has no fused form on Hopper: no failure of the day."""
    pytest.importorskip("triton")
    from fastcl.triton_kernels import tuning

    monkeypatch.setattr(tuning.triton, "__version__", version)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    assert device_checks.forms_of("triton", CPU, torch.bfloat16) == forms
    assert "fused" in device_checks.forms_of("triton", CPU, torch.float32)  # no matrix instruction


def test_a_loss_that_no_graph_holds_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(case: Case, rows: list[torch.Tensor], backend: str, **arguments: object) -> torch.Tensor:
        value = library(case, rows, backend, **arguments)
        return value if case.name != "siglip" or value.item() else -value

    monkeypatch.setattr(gpu_checks, "library", looks)
    for found in gpu_checks.graphs(gpu_checks.Day(CPU, ROWS, end=1e12)):
        assert found["right"] == (found["case"] != "siglip")
        assert found["right"] or found["failed"] == "the host would wait: 1 aten::_local_scalar_dense"


def test_running_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(clock: object, run: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    monkeypatch.setattr(gpu_timing.Clock, "peak", peak)
    ceiling, *rows = gpu_timing.timed(gpu_checks.Day(CPU, ROWS, end=1e12), "clip-256")
    assert ceiling["ceiling"]["flops"] > 0.0
    assert {"fastcl", "eager"} <= {row["method"] for row in rows if "Tried to allocate 64 GiB" in row.get("failed", "")}
    assert not any("ms" in row for row in rows)


def test_a_rival_that_cannot_be_imported_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(choice: int) -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(gpu_baselines, "libraries", lambda loss, d: [Baseline("rival", make)])  # type: ignore[arg-type]
    rows = {r["method"]: r for r in gpu_timing.timed(gpu_checks.Day(CPU, ROWS, end=1e12), "clip-256") if "method" in r}
    assert "libcudart.so.12" in rows["rival"]["failed"] and "ms" in rows["fastcl"]


def test_rivals_that_are_not_there_are_named_with_what_gets_them() -> None:
    found = {
        b.name: b.absent(gpu_timing.CASES["clip-256"])
        for loss in ("clip", "siglip")
        for b in gpu_baselines.libraries(loss, 512)
    }
    assert found.keys() == {"memeff", "inf-cl", "siglip-kernel"}
    for name, why in found.items():
        assert why is not None
        assert f"pip install --no-deps {name}==" in why or "these are on cpu" in why


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*rest: object, **options: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(measure.subprocess, "run", none)
    assert measure._commit() == "unknown"


def test_the_table_is_short_however_much_fails() -> None:
    wrong = [{"case": "clip", "right": False, "failed": "RuntimeError: no kernel"}] * 500
    lines = table(
        {"device": "cpu", "built": "", "rivals": "", "parts": {"losses": {"results": wrong, "seconds": 1.0}}}, 60
    )
    assert len(lines) <= 60 and "and 4" in lines[-1] and "500 failures" in lines


@pytest.mark.parametrize(("auto", "said"), [(1.0, "confirmed"), (2.0, "refuted: fused is 2.00 times as fast as auto")])
def test_a_dispatch_table_has_a_verdict(auto: float, said: str) -> None:
    found = gpu_timing.verdict({"auto": auto, "strip": 1.5, "fused": 1.0})
    assert found["verdict"] == said
    rows = [{"backend": "cuda", "kind": "tf32", "op": "rows", "d": d} | found for d in (64, 128)]
    results = {"device": "cuda", "built": "", "rivals": "", "parts": {"dispatch": {"results": rows, "seconds": 1.0}}}
    assert f"cuda tf32 rows: d = 64 {said}, fused 1 ms; d = 128 {said}, fused 1 ms" in table(results, 60)


def test_both_columns_of_a_dispatch_table_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of every backend that has some, by two-byte rows and by tf32; torch's precision is put back."""
    asked: list[tuple[str, torch.dtype]] = []

    def of_forms(backend: str, n: int, d: int, dtype: torch.dtype, clock: object, day: object) -> object:
        asked.append((backend, dtype))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        yield "rows", {"auto": 1.0, "strip": 1.0}
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu_timing, "_of_forms", of_forms)
    monkeypatch.setattr(
        gpu_timing, "routes", lambda *rest: [Route("cuda auto", "cuda"), Route("triton auto", "triton")]
    )
    before = torch.backends.cuda.matmul.fp32_precision
    results = list(gpu_timing.dispatch(gpu_checks.Day(CPU, ROWS, end=1e12)))
    assert set(asked) == {(b, t) for b in ("cuda", "triton") for t in (torch.bfloat16, torch.float32)}
    assert {r.get("verdict") or r["failed"] for r in results} == {"confirmed", "RuntimeError: no kernel"}
    assert torch.backends.cuda.matmul.fp32_precision == before
