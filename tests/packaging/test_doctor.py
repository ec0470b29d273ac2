"""`fastcl doctor` tells the truth: its lines are compared with what torch and fastcl say themselves."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fastcl import __version__, doctor
from fastcl.__main__ import COMMANDS, main
from fastcl.backends import blocked, choice, extension
from fastcl.equation.problem import Problem

from .conftest import ROOT, run


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The report as name -> text, with wrapped lines joined."""
    assert main(["doctor"]) == 0
    found: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("      ") and name:
            found[name] += " " + line.strip()
        elif line.startswith("  "):
            name, _, text = line.strip().partition("  ")
            found[name] = text.strip()
    return found


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    report = said(capsys)
    assert report["fastcl"] == __version__
    assert report["torch"].startswith(str(torch.__version__))
    assert report["Python"].split()[0] == ".".join(str(part) for part in sys.version_info[:3])


def test_a_reader_that_has_had_enough() -> None:
    """As of `fastcl doctor | head -1`: no traceback, neither of the write nor at exit."""
    command = [sys.executable, "-m", "fastcl", "doctor"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait() == 1
        assert process.stderr is not None and process.stderr.read() == ""


def test_what_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    report, facts = said(capsys), extension.facts()
    if extension.library is None:
        assert report["in use"] == f"no: {extension.reason}"
    else:
        assert facts is not None
        assert report["in use"] == "yes"
        assert report["instruction sets"] == ", ".join(facts["cpu_isas"])
        assert report["chosen"].split()[0] == extension.library.chosen_isa()


def test_a_build_with_cuda_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = extension.facts() or {"machine": "x86_64", "compiler": None, "cpu_isas": [], "left_out": {}}
    monkeypatch.setattr(extension, "facts", lambda: facts | {"nvcc": "13.0.88", "cuda_archs": ["8.0", "9.0+PTX"]})
    assert said(capsys)["CUDA kernels"] == "8.0, 9.0+PTX, by nvcc 13.0.88"


def test_every_dtype_and_backend_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    report = said(capsys)
    lines = {tuple(name.split(", ")): text for name, text in report.items() if "float" in name}
    for dtype in doctor.DTYPES:
        auto, _ = choice.choose("auto", torch.device("cpu"), dtype)
        (text,) = (text for names, text in lines.items() if str(dtype).removeprefix("torch.") in names)
        assert text == f"{auto} (auto)"
    for name, reason in choice.explain(torch.device("cpu"), torch.float32):
        if reason is not None:
            assert name in report


def test_a_backend_that_the_environment_asks_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "reference")
    assert said(capsys)["asked for"].startswith("FASTCL_BACKEND=reference")


@pytest.mark.skipif(extension.library is None, reason="no compiled extension here")
def test_an_instruction_set_that_is_not_there() -> None:
    command = [sys.executable, "-m", "fastcl", "doctor"]
    text = " ".join(run(command, ROOT, {"FASTCL_CPU_ISA": "sse9"}).split())
    assert "FASTCL_CPU_ISA: expected one of baseline" in text
    assert "got 'sse9'" in text
    assert "chosen baseline (FASTCL_CPU_ISA=baseline)" in " ".join(
        run(command, ROOT, {"FASTCL_CPU_ISA": "baseline"}).split()
    )


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastcl {__version__}\n"
    with pytest.raises(SystemExit) as stopped:
        main(["doktor"])
    assert stopped.value.code == 2
    assert "got 'doktor'; did you mean 'doctor'?" in capsys.readouterr().err
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"usage: fastcl {name}" in capsys.readouterr().out


def test_json_holds_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = said(capsys)
    assert main(["doctor", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert {name.strip() for rows in sections.values() for name, _ in rows} == report.keys()
    assert ["fastcl", __version__] in sections["Versions"]


def test_check_computes_with_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--check", "--json"])
    (found,) = (dict(rows) for title, rows in json.loads(capsys.readouterr().out).items() if title.startswith("Checks"))
    names = [name for name in choice.MODULES if choice.reason(name, torch.device("cpu"), torch.float32) is None]
    assert {f"{name}, float32" for name in names} <= found.keys()
    assert all(text.startswith("right") for text in found.values())
    assert status == (0 if extension.library is not None else 1)


def test_check_tells_a_wrong_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def off(p: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
        r, c = rows(p)
        return r + 0.1, c

    rows = blocked.rows
    monkeypatch.setattr(blocked, "rows", off)
    assert main(["doctor", "--check"]) == 1
    assert "WRONG" in capsys.readouterr().out
