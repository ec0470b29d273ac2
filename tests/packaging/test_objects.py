"""The objects of the instruction sets, linked into one library: no set's code reaches a processor that lacks it.

The baseline and the AVX-512 objects hold copies of the same inline functions. The linker keeps the first, so a wrong
order, or a static initialiser in an AVX-512 object, would end the process on an older processor (SIGILL), and a
template outside the set's own namespace would give every set the baseline's code, silently slow.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastcl.backends import extension
from fastcl.backends.extension import CPU

from .conftest import ROOT

FOLDER = ROOT / "build" / f"cpu-{platform.machine()}"

pytestmark = pytest.mark.skipif(
    extension.library is None or not FOLDER.is_dir() or shutil.which("nm") is None,
    reason="needs the compiled objects in build/, and binutils",
)


def objects() -> dict[str, list[Path]]:
    """The compiled objects of each instruction set, in the order in which they are linked."""
    (line,) = (
        line for line in (FOLDER / "build.ninja").read_text().splitlines() if line.startswith(f"build {CPU}: link ")
    )
    names = line.removeprefix(f"build {CPU}: link ").partition("|")[0].split()
    sets = list(dict.fromkeys(name.split("/")[0] for name in names))
    return {isa: [FOLDER / name for name in names if name.startswith(f"{isa}/")] for isa in sets}


def tool(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def test_narrow_sets_are_linked_first() -> None:
    facts = extension.facts()
    assert facts is not None
    assert list(objects()) == ["common", *(isa for isa in facts["cpu_isas"] if objects().get(isa))]


def test_wide_objects_run_nothing_when_the_library_is_opened() -> None:
    for isa, paths in objects().items():
        for path in paths if isa not in ("common", "baseline") else []:
            assert not re.findall(r"\.(?:init_array|ctors)\S*", tool("readelf", "--section-headers", "--wide", path)), (
                path
            )


def test_each_set_has_its_own_kernels() -> None:
    """No function of fastcl is defined under one name in two sets."""
    defined: dict[str, str] = {}
    for isa, paths in objects().items():
        for path in paths:
            for line in tool("nm", "--demangle", "--defined-only", path).splitlines():
                kind, name = line[17:18], line[19:]
                if kind in "TWVu" and re.match(r"(?:\w+ )*fastcl::", name):
                    assert defined.setdefault(name, isa) == isa, f"{name} in {defined[name]} and in {isa}"
    assert defined


def test_threads_are_those_of_torch() -> None:
    """The library brings no OpenMP of its own: torch.set_num_threads would not reach it, and threads would double."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", FOLDER / CPU))
    assert any(name.startswith("libtorch_cpu") for name in needed)
    assert not [name for name in needed if "omp" in name]


def undefined() -> list[str]:
    """What the library wants of others, with the version where it has one."""
    return [line.split()[-1] for line in tool("nm", "--dynamic", "--undefined-only", FOLDER / CPU).splitlines()]


def test_torch_is_called_by_its_stable_interface_alone() -> None:
    """No name of C++ but the standard library's, none of Python, and of torch's those that torch_abi.h declares."""
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", (ROOT / "csrc" / "torch_abi.h").read_text()))
    names = {name.partition("@")[0] for name in undefined()}
    assert {name for name in names if "torch" in name} <= declared
    assert not [name for name in names if re.match(r"_ZN?K?\d*(?:2at|3c10|5torch)|Py|_Py", name)]
    # Without a version: of torch's (a stub stands in for it), or weak.
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize", "__gmon_start__"}
    assert {name for name in undefined() if "@" not in name} - declared <= weak


def test_it_runs_on_systems_of_manylinux_2_28() -> None:
    """That is glibc 2.28, and the C++ library of GCC 8."""
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8,)}
    for name in undefined():
        if found := re.search(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", name):
            assert tuple(map(int, found[2].split("."))) <= newest[found[1]], name


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_declarations_are_those_of_torch(tmp_path: Path) -> None:
    """Compiled together with torch's own headers, as of 2.10, where another signature is an error.

    So are the launches, whose stream a torch without CUDA declares too: no other file of csrc/cuda names torch.
    """
    headers = Path(torch.__file__).parent / "include"
    text = "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/csrc/stable/c/shim.h>\n"
    (tmp_path / "both.cpp").write_text(f'{text}#include "{ROOT}/csrc/torch_abi.h"\n')
    # Without ours each declared name must be theirs: a use of it compiles.
    declared = re.findall(r"\b((?:aoti_)?torch_\w+)\(", (ROOT / "csrc" / "torch_abi.h").read_text())
    uses = ", ".join(f"(void*)&{name}" for name in declared)
    (tmp_path / "theirs.cpp").write_text(f"{text}void* uses[] = {{{uses}}};\n")
    for name in ("launches", "aligned"):
        (tmp_path / f"{name}.cpp").write_text(f'{text}#include "{ROOT}/csrc/cuda/{name}.cpp"\n')
    assert len(declared) > 25
    for name in ("both", "theirs", "launches", "aligned"):
        target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
        cuda = ("-DUSE_CUDA", "-DFASTCL_HOPPER") if name in ("launches", "aligned") else ()
        tool("g++", "-std=c++20", "-fsyntax-only", target, *cuda, f"-I{headers}", tmp_path / f"{name}.cpp")
