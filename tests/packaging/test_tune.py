"""`fastcl tune`: the rules of the choice with made-up times, the file that keeps it, and processes that follow it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastcl import doctor, tune
from fastcl.__main__ import main
from fastcl.backends import cache_folder, extension, tuned

from .conftest import ROOT, run

ALL = ["baseline", "avx2", "avx512", "amx"]
COMPILED = pytest.mark.skipif(extension.library is None, reason="no compiled extension here")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "kept"
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(folder))
    monkeypatch.delenv(tune.ISA_VARIABLE, raising=False)
    return folder


def example(**other: Any) -> tuned.Measured:
    facts = {
        "isa": "avx512",
        "milliseconds": {"avx512": 10.0, "amx": 13.0},
        "processor": tuned.processor(),
        "usable": ALL,
    }
    return tuned.Measured(**{**facts, "threads": 2, "date": "2026-01-31"} | other)


def kept(usable: list[str] | None = None) -> str | None:
    found = tuned.kept(lambda: usable or ALL)
    return found and found.isa


# ---- the choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"avx2": 3.0, "avx512": 2.0, "amx": 1.0}, "amx"),
        ({"avx2": 3.0, "avx512": 1.0, "amx": 2.0}, "avx512"),
        ({"avx512": 1.0, "amx": 1.05}, "amx"),  # a tie: the wider one
        ({"amx": 1.05, "avx512": 1.0}, "amx"),
        ({"avx512": 1.0, "amx": 1.06}, "avx512"),
        ({"avx2": 1.0, "avx512": 1.04, "amx": 1.07}, "avx512"),  # ties are with the best, not with one another
        ({"avx2": 1.0}, "avx2"),
    ],
)
def test_the_quickest_is_chosen_and_of_equals_the_widest(times: dict[str, float], chosen: str) -> None:
    assert tuned.quickest(times, ALL) == chosen


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "measured it 1.30 times as fast as amx on 2026-01-31, on 2 threads"),
        (
            {"isa": "amx", "milliseconds": {"avx512": 9.9, "amx": 10.0}, "threads": 1},
            "even with avx512, which is narrower, on",
        ),
        (
            {"isa": "avx2", "milliseconds": {"avx2": 9.9}, "usable": ALL[:2]},
            "found no other above baseline on 2026-01-31",
        ),
    ],
)
def test_the_reason_in_words(facts: dict[str, Any], words: str) -> None:
    assert words in example(**facts).why()


# ---- the file -------------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_found_until_it_is_forgotten(place: Path) -> None:
    assert kept() is None and not tuned.forget()
    assert not place.exists(), "looking makes no folder"
    assert tuned.keep(example()) is None
    assert kept() == "avx512"
    assert tuned.forget() and kept() is None


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100000,
        *(json.dumps({**vars(example()), **wrong}).encode() for wrong in (
            {"isa": "sse9"}, {"isa": None}, {"milliseconds": 3}, {"milliseconds": {"avx512": "quick"}}, {"usable": None},
            {"milliseconds": {"avx512": float("nan")}}, {"milliseconds": {"avx512": -1.0}}, {"threads": "many"}, {"processor": 5},
            {"threads": math.inf}, {"milliseconds": {"avx512": 10**400}}, {"milliseconds": {"avx512": math.inf}},
        )),
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_none(text: bytes) -> None:
    assert tuned.keep(example()) is None
    tuned.path().write_bytes(text)
    assert kept() is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name")
def test_a_pipe_counts_as_none_and_is_not_waited_for(place: Path) -> None:
    place.mkdir()
    os.mkfifo(place / cache_folder.MEASURED)
    with ThreadPoolExecutor() as pool:
        found = pool.submit(kept)
        try:
            assert found.result(5.0) is None
        finally:
            if not found.done():  # who reads it is let go
                tuned.path().write_bytes(b"")


def test_what_was_measured_elsewhere_counts_as_none() -> None:
    tuned.keep(example(processor="another"))
    assert kept() is None
    tuned.keep(example())
    assert kept(ALL[:3]) is None, "other sets are there now"
    tuned.keep(example(isa="amx", usable=ALL[:3]))
    assert kept(ALL[:3]) is None, "it is not there"


def test_a_file_that_others_may_write_counts_as_none(place: Path) -> None:
    tuned.keep(example())
    tuned.path().chmod(0o666)
    assert kept() is None
    tuned.path().chmod(0o600)
    assert kept() == "avx512"
    place.chmod(0o777)
    assert kept() is None


def test_there_may_be_no_place_for_it(place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file")
    assert "set FASTCL_CACHE to" in (tuned.keep(example()) or "")
    assert kept() is None


def test_a_full_disk_leaves_nothing_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in (tuned.keep(example()) or "")
    assert list(place.iterdir()) == []


def test_a_folder_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(mode=0o700)
    monkeypatch.setattr(os, "access", lambda *_: False)  # none is closed to the superuser
    assert "cannot be written" in (tuned.keep(example()) or "")
    assert list(place.iterdir()) == []


def test_the_processor_is_told() -> None:
    assert tuned.processor() == tuned.processor()
    assert len(tuned.processor()) > 5


# ---- the command, and processes after it ----------------------------------------------------------------------------------

SMALL = ["--n", "64", "--d", "16", "--rounds", "2"]
CHOSEN = """
import fastcl
from fastcl.backends import extension, pair_libraries
flags = extension.facts()["cpu_flags"].get(extension.library.chosen_isa(), [])
assert pair_libraries._flags()[: len(flags)] == flags
print(extension.library.chosen_isa())
"""


def fresh(program: list[str], place: Path, **environment: str) -> str:
    """What a process of its own prints, that keeps what it keeps in this place."""
    return run([sys.executable, *program], ROOT, {cache_folder.CACHE_VARIABLE: str(place), **environment})


@COMPILED
@pytest.mark.slow
def test_a_process_follows_what_was_measured(place: Path) -> None:
    assert extension.library is not None
    usable = extension.library.usable_isas()
    found = json.loads(fresh(["-m", "fastcl", "tune", "--json", *SMALL], place))
    assert found["kept"] == str(place / cache_folder.MEASURED) and found["failed"] == {}
    assert list(found["milliseconds"]) == (usable[1:] or usable) and found["usable"] == usable
    assert found["isa"] == tuned.quickest(found["milliseconds"], usable)
    assert fresh(["-c", CHOSEN], place).split()[-1] == found["isa"]

    # Whichever it is, another one that was chosen is followed too: by kernels, pair functions and the doctor.
    other = next((isa for isa in usable if isa != usable[-1] and isa != "baseline"), usable[0])
    tuned.keep(example(isa=other, milliseconds={other: 2.0, usable[-1]: 5.0}, usable=usable))
    assert fresh(["-c", CHOSEN], place).split()[-1] == other
    said = " ".join(fresh(["-m", "fastcl", "doctor"], place).split())
    if other != usable[-1]:
        assert f"chosen {other} (fastcl tune measured it 2.50 times as fast as {usable[-1]} on 2026-01-31" in said
    # FASTCL_CPU_ISA rules over it, a damaged file says nothing, and what is forgotten is.
    assert fresh(["-c", CHOSEN], place, FASTCL_CPU_ISA="baseline").split()[-1] == "baseline"
    assert "chosen baseline (FASTCL_CPU_ISA=baseline)" in " ".join(
        fresh(["-m", "fastcl", "doctor"], place, FASTCL_CPU_ISA="baseline").split()
    )
    tuned.path().write_text("{")
    assert fresh(["-W", "error", "-c", CHOSEN], place).split() == [usable[-1]]
    assert fresh(["-m", "fastcl", "tune", "--forget"], place).startswith("removed")
    assert "(the widest; fastcl tune measures" in " ".join(fresh(["-m", "fastcl", "doctor"], place).split())


@COMPILED
@pytest.mark.slow
def test_the_choice_comes_before_the_first_call_or_not_at_all() -> None:
    program = """
import torch, fastcl
from fastcl.backends import extension
prefer, chosen = torch.ops.fastcl.cpu_prefer_isa, extension.library.chosen_isa
assert not prefer("sse9")
assert prefer("baseline") and chosen() == "baseline"
assert not prefer(extension.library.usable_isas()[-1]) and chosen() == "baseline"
"""
    run([sys.executable, "-c", program], ROOT, {cache_folder.CACHE_VARIABLE: str(tuned.path().parent)})


@COMPILED
@pytest.mark.slow
def test_a_set_whose_process_ends_is_left_out() -> None:
    times, failed = tune.measured(["baseline", "sse9"], 16, 4, 1)
    assert list(times) == ["baseline"] and times["baseline"] > 0.0
    assert list(failed) == ["sse9"]
    assert failed["sse9"].startswith("its process ended with status 1: ") and "sse9" in failed["sse9"]


@COMPILED
def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    assert extension.library is not None
    monkeypatch.setattr(extension.library, "usable_isas", lambda: ALL)
    found = {"avx2": 30.0, "avx512": 10.0}
    monkeypatch.setattr(tune, "measured", lambda *_: (found, {"amx": "its process ended with status -4"}))
    assert main(["tune"]) == 0
    said = capsys.readouterr().out
    assert (
        "avx2             30.00          3.00" in said
        and "amx         failed: its process ended with status -4" in said
    )
    assert "Chosen: avx512.\nKept in " in said
    place.chmod(0o777)
    assert main(["tune"]) == 1
    assert "it is not kept: " in capsys.readouterr().err
    monkeypatch.setattr(tune, "measured", lambda *_: ({}, {"amx": "its process ended with status -4"}))
    assert main(["tune"]) == 1
    assert "amx: its process ended with status -4" in capsys.readouterr().err


@COMPILED
def test_one_candidate_is_kept_and_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.library is not None
    monkeypatch.setattr(extension.library, "usable_isas", lambda: ALL[:2])
    monkeypatch.setattr(tune, "measured", lambda isas, *_: (dict.fromkeys(isas, 1.0), {}))
    assert main(["tune"]) == 0
    assert "Chosen: avx2, the only one above baseline here." in capsys.readouterr().out
    assert kept(ALL[:2]) == "avx2"


def test_without_kernels_it_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "library", None)
    monkeypatch.setattr(extension, "reason", "they were left out")
    assert main(["tune"]) == 1
    assert "no kernels of the CPU to measure: they were left out" in capsys.readouterr().err


@COMPILED
def test_doctor_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.library is not None
    monkeypatch.setattr(extension, "preferred", example(isa=extension.library.chosen_isa(), milliseconds={
        extension.library.chosen_isa(): 10.0, "another": 20.0,
    }))  # fmt: skip
    assert "measured it 2.00 times as fast as another" in doctor.chosen_isa(extension.library)


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "PATIENCE", 0.2)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        with pytest.raises(OSError, match="no answer"):
            tune._turn(process)
        assert process.wait() != 0
