"""The objects of the instruction sets, linked into one library: no set's code reaches a processor that lacks it.

The baseline and the AVX-512 objects hold copies of the same inline functions. The linker keeps the first, so a wrong
order, or a static initialiser in an AVX-512 object, would end the process on an older processor (SIGILL), and a
template outside the set's own namespace would give every set the baseline's code, silently slow.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from fastcl.backends import extension

from .conftest import ROOT

FOLDER = ROOT / "build" / f"native-{torch.__version__}-{sysconfig.get_config_var('SOABI')}"

pytestmark = pytest.mark.skipif(
    extension.library is None or not FOLDER.is_dir() or shutil.which("nm") is None,
    reason="needs the compiled objects of this torch in build/, and binutils",
)


def objects() -> dict[str, list[Path]]:
    """The compiled objects of each instruction set, in the order in which they are linked."""
    (line,) = (
        line for line in (FOLDER / "build.ninja").read_text().splitlines() if line.startswith("build _C.so: link ")
    )
    names = line.removeprefix("build _C.so: link ").split()
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
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", FOLDER / "_C.so"))
    assert any(name.startswith("libtorch_cpu") for name in needed)
    assert not [name for name in needed if "omp" in name]
