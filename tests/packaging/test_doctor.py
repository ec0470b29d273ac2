"""`fastcl doctor` tells the truth: its lines are compared with what torch and fastcl say themselves."""

from __future__ import annotations

import sys

import pytest
import torch

from fastcl import __version__, doctor
from fastcl.__main__ import COMMANDS, main
from fastcl.backends import choice, extension

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


def test_what_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    report, facts = said(capsys), extension.facts()
    if extension.library is None:
        assert report["in use"] == f"no: {extension.reason}"
    else:
        assert facts is not None
        assert report["in use"] == "yes"
        assert report["instruction sets"] == ", ".join(facts["cpu_isas"])
        assert report["chosen"].split()[0] == extension.library.chosen_isa()


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
    assert "invalid choice: 'doktor'" in capsys.readouterr().err
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"usage: fastcl {name}" in capsys.readouterr().out
