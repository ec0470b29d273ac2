"""A compiled library is opened only when it fits; what does not fit is refused with one warning, and pure PyTorch serves."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl.backends import extension
from fastcl.equation.problem import SIGNATURES

from .conftest import MADE, ROOT, run
from .test_installs import ONE_OP

pytestmark = pytest.mark.slow

REPORT = "from fastcl.backends import extension\nprint('LIBRARY', extension.library, extension.reason, extension.cuda_reason)\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with the facts of a build for this torch, and a library that no process could open."""
    shutil.copytree(Path(fastcl.__file__).parent, tmp_path / "fastcl", ignore=MADE)
    facts = {
        "machine": platform.machine(),
        "problem": SIGNATURES,
        "nvcc": None,
        "cpu_isas": ["baseline"],
        "cuda_archs": [],
        "left_out": {"cuda": {"reason": "none is needed", "remedy": "none"}},
    }
    library = tmp_path / "fastcl" / extension.CPU
    library.write_bytes(b"not a library")
    facts["libraries"] = {library.name: extension.fingerprint(library)}
    (tmp_path / "fastcl" / "build_facts.json").write_text(json.dumps(facts))
    return tmp_path


def imported(folder: Path) -> tuple[str, list[str]]:
    """The report and the warnings of a process that imports this copy, and computes with it."""
    said = run([sys.executable, "-W", "always", "-c", ONE_OP + ONE_OP + REPORT], folder)
    return said[said.index("LIBRARY") :], re.findall(r"RuntimeWarning: (.*)", said)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("problem", "Tensor x, Tensor? y", "it was built from other sources than these, and takes other arguments"),
        ("machine", "sparc", f"it was built for processors of the kind sparc, and this is {platform.machine()}"),
    ],
)
def test_built_for_another(package: Path, key: str, value: str, words: str) -> None:
    path = package / "fastcl" / "build_facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    report, warnings = imported(package)
    assert words in report
    assert len(warnings) == 1
    assert words in warnings[0]
    assert "pip install --no-build-isolation" in warnings[0]


@pytest.mark.parametrize(
    ("nvcc", "cuda", "words"),
    [
        ("13.0.88", "12.8", "it was built by nvcc 13.0.88, and this torch has CUDA 12.8"),
        (None, "13.0", "name no nvcc, but None"),
        ("13.0.88", "13.2", None),
        ("12.8.93", "13.0", None),
        ("13.0.88", None, "is not a CUDA build"),
    ],
)
def test_the_cuda_kernels_need_a_driver_that_knows_their_runtime(
    package: Path, nvcc: str | None, cuda: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is a torch with CUDA of that major version or later; others are told, and not warned: the wheel is for all."""
    path = package / "fastcl" / extension.CUDA
    (package / "fastcl" / extension.CPU).rename(path)
    facts = json.loads((package / "fastcl" / "build_facts.json").read_text()) | {"nvcc": nvcc, "left_out": {}}
    facts["libraries"] = {path.name: extension.fingerprint(path)}
    (package / "fastcl" / "build_facts.json").write_text(json.dumps(facts))
    monkeypatch.setattr(extension, "FACTS", package / "fastcl" / "build_facts.json")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if cuda in (None, "12.8"):
        assert words in str(extension.open_library(extension.CUDA, "cuda")[1])
        return
    with pytest.warns(RuntimeWarning, match=words or "it cannot be opened"):
        extension.open_library(extension.CUDA, "cuda")


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
    '{"libraries": [], "cpu_isas": [], "cuda_archs": [], "machine": "", "left_out": {"cpu": 1}}',
    '{"libraries": {}, "cpu_isas": 3, "cuda_archs": [], "machine": "", "left_out": {}}',
    "\xff",
]
WRONG_FACTS += ['{"left_out": {"cpu": {"reason": 1, "remedy": null}}}', '{"left_out": {}, "torch": []}', "[" * 100_000]


def test_a_checkout_before_an_installed_package_is_said(package: Path, tmp_path: Path) -> None:
    """Once, whatever it was built with; the package itself, named twice or on the path by another name, is no other."""
    program = "import sys; sys.path[1:1] = {}; import fastcl"
    site = tmp_path / "site"
    shutil.copytree(package / "fastcl", site / "fastcl")
    (tmp_path / "link").symlink_to(tmp_path)
    for path, checkout in (([site], True), ([tmp_path, tmp_path / "link"], True), ([site], False)):
        shutil.rmtree(package / "csrc", ignore_errors=True)
        if checkout:
            shutil.copytree(ROOT / "csrc", package / "csrc")
        said = run([sys.executable, "-W", "always", "-c", program.format([str(entry) for entry in path])], package)
        expected = f"in place of the one installed in {site / 'fastcl'}"
        assert said.count(expected) == (path == [site] and checkout), said


@pytest.mark.parametrize("content", WRONG_FACTS, ids=lambda content: str(content)[:40])
def test_with_damaged_facts_it_is_not_opened(
    package: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = package / "fastcl" / "build_facts.json"
    path.unlink() if content is None else path.write_text(content, encoding="latin-1")
    monkeypatch.setattr(extension, "FACTS", path)
    with pytest.warns(RuntimeWarning, match="pip install --no-build-isolation") as said:
        library, reason = extension.open_library(extension.CPU, "cpu")
    assert library is None
    assert len(said) == 1
    assert reason is not None


def test_without_facts_and_library_nothing_is_said(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "FACTS", package / "build_facts.json")
    library, reason = extension.open_library(extension.CPU, "cpu")
    assert library is None
    assert "were not built" in str(reason)


@pytest.mark.parametrize("damage", ["cut short", "zeros at its end", "empty", "gone"])
def test_a_damaged_library_is_one_warning(package: Path, damage: str) -> None:
    """As a whole process: opening what is cut short would end it."""
    if extension.library is None:
        pytest.skip(f"no compiled extension here: {extension.reason}")
    built, path = extension.library.path, package / "fastcl" / extension.CPU
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


def test_an_older_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, old in (("2.9.1+cu128", True), ("2.6.0", True), ("2.10.0", False), ("3.0.0a0+git", False)):
        monkeypatch.setattr(torch, "__version__", version)
        why = extension.too_old()
        assert (why is not None) == old, version
        assert not old or f"the kernels need torch 2.10 or later, and this is {version}" in str(why)


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
