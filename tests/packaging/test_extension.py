"""fastcl._C is opened only when it fits; what does not fit is refused with one warning, and pure PyTorch serves."""

from __future__ import annotations

import json
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from fastcl.backends import extension

from .conftest import MADE, ROOT, run
from .test_installs import ONE_OP

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
REPORT = "from fastcl.backends import extension\nprint('LIBRARY', extension.library, extension.reason)\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with the facts of a build for this torch, and a library that no process could open."""
    shutil.copytree(ROOT / "fastcl", tmp_path / "fastcl", ignore=MADE)
    facts = {
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "python": sysconfig.get_config_var("SOABI"),
        "left_out": {},
    }
    library = tmp_path / "fastcl" / f"_C{SUFFIX}"
    library.write_bytes(b"not a library")
    facts["library"] = extension.fingerprint(library)
    (tmp_path / "fastcl" / "build_facts.json").write_text(json.dumps(facts))
    return tmp_path


def imported(folder: Path) -> tuple[str, list[str]]:
    """The report and the warnings of a process that imports this copy, and computes with it."""
    said = run([sys.executable, "-W", "always", "-c", ONE_OP + ONE_OP + REPORT], folder)
    return said[said.index("LIBRARY") :], re.findall(r"RuntimeWarning: (.*)", said)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("torch", "2.12.0+cpu", f"it was built for torch 2.12.0+cpu, and this is {torch.__version__}"),
        ("torch_cuda", "11.8", f"it was built for a torch with CUDA 11.8, and this is {torch.version.cuda}"),
        ("python", "cpython-39-x86_64-linux-gnu", "it was built for Python cpython-39-x86_64-linux-gnu"),
    ],
)
def test_built_for_another(package: Path, key: str, value: str, words: str) -> None:
    path = package / "fastcl" / "build_facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    report, warnings = imported(package)
    assert report.startswith(f"LIBRARY None {words}")
    assert len(warnings) == 1
    assert words in warnings[0]
    assert "pip install --no-build-isolation" in warnings[0]


def test_a_library_that_does_not_open(package: Path) -> None:
    report, warnings = imported(package)
    assert report.startswith("LIBRARY None it cannot be opened (")
    assert len(warnings) == 1


WRONG_FACTS = [
    None,
    "",
    "{",
    "[]",
    "{}",
    "null",
    "3",
    '"left_out"',
    '{"left_out": []}',
    '{"left_out": {"cpu": 1}}',
    "\xff",
]
WRONG_FACTS += ['{"left_out": {"cpu": {"reason": 1, "remedy": null}}}', '{"left_out": {}, "torch": []}', "[" * 100_000]


@pytest.mark.parametrize("content", WRONG_FACTS, ids=lambda content: str(content)[:40])
def test_with_damaged_facts_it_is_not_opened(
    package: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = package / "fastcl" / "build_facts.json"
    path.unlink() if content is None else path.write_text(content, encoding="latin-1")
    monkeypatch.setattr(extension, "FACTS", path)
    with pytest.warns(RuntimeWarning, match="pip install --no-build-isolation") as said:
        library, reason = extension.open_library()
    assert library is None
    assert len(said) == 1
    assert reason is not None


def test_without_facts_and_library_nothing_is_said(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "FACTS", package / "build_facts.json")
    library, reason = extension.open_library()
    assert library is None
    assert "was not built" in str(reason)


@pytest.mark.parametrize("damage", ["cut short", "zeros at its end", "empty", "gone"])
def test_a_damaged_library_is_one_warning(package: Path, damage: str) -> None:
    """As a whole process: opening what is cut short would end it."""
    if extension.library is None:
        pytest.skip(f"no compiled extension here: {extension.reason}")
    built, path = Path(str(extension.library.__file__)), package / "fastcl" / f"_C{SUFFIX}"
    content = built.read_bytes()
    half = len(content) // 2
    path.write_bytes(
        {"cut short": content[:half], "zeros at its end": content[:half] + bytes(len(content) - half)}.get(damage, b"")
    )
    if damage == "gone":
        path.unlink()
    shutil.copy2(extension.FACTS, package / "fastcl")
    report, warnings = imported(package)
    assert report.startswith("LIBRARY None")
    assert len(warnings) == 1
    assert "pip install --no-build-isolation" in warnings[0]


def test_the_library_and_the_file_beside_it_tell_the_same() -> None:
    if extension.library is None:
        pytest.skip(f"no compiled extension here: {extension.reason}")
    inside, beside = json.loads(extension.library.build_facts()), extension.facts()
    assert beside is not None
    assert inside == {key: value for key, value in beside.items() if key not in ("seconds", "compilers_seconds", "library")}


def test_instruction_sets() -> None:
    if extension.library is None:
        pytest.skip(f"no compiled extension here: {extension.reason}")
    facts = extension.facts()
    assert facts is not None
    usable = extension.library.usable_isas()
    assert usable == [isa for isa in facts["cpu_isas"] if isa in usable]
    assert usable[0] == "baseline"
    supported = torch.backends.cpu.get_cpu_capability()
    assert ("avx512" in usable) == ("avx512" in facts["cpu_isas"] and supported == "AVX512")
