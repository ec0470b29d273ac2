"""The narrower builds on processors that lack the wider instructions: the objects as they were built, under an emulator.

An AVX-512 instruction in the AVX2 object, or an AVX one in the baseline, ends the emulated process (SIGILL). The portable kernels
are compiled for ARM too.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / f"cpu-{platform.machine()}"
EMULATOR = shutil.which("qemu-x86_64")
ARM_EMULATOR, ARM_COMPILER = shutil.which("qemu-aarch64"), shutil.which("aarch64-linux-gnu-g++")

# Each set on the oldest processor that it is for; the last line shows that the emulator does refuse what is missing.
PROCESSORS = [
    ("baseline", "Nehalem", True),
    ("avx2", "Haswell", True),
    ("avx2", "Nehalem", False),
    ("avx512", "Haswell", False),
]


def built(isa: str) -> Path:
    return OBJECTS / isa / "cpu" / "isa" / "kernels.cpp.o"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """standalone.cpp linked with each set's object."""
    found = {}
    for isa in {isa for isa, _, _ in PROCESSORS}:
        found[isa] = tmp_path_factory.mktemp(isa) / "standalone"
        source = Path(__file__).with_name("standalone.cpp")
        command = ["g++", "-std=c++20", "-O1", f"-DFASTCL_ISA={isa}", source, built(isa), "-o", found[isa]]
        subprocess.run([str(part) for part in command], check=True)
    return found


@pytest.mark.skipif(EMULATOR is None, reason="needs an emulator: apt install qemu-user")
@pytest.mark.skipif(
    not built("avx512").exists(), reason="needs the objects of an x86-64 build in build/; run make setup"
)
@pytest.mark.parametrize(("isa", "processor", "runs"), PROCESSORS, ids=lambda v: str(v))
def test_on_an_older_processor(isa: str, processor: str, runs: bool, program: dict[str, Path]) -> None:
    assert EMULATOR is not None
    run = subprocess.run([EMULATOR, "-cpu", processor, program[isa]], capture_output=True, text=True, check=False)
    assert (run.returncode == 0) == runs, run.stdout + run.stderr
    assert not runs or run.stdout == "0 failures\n"


@pytest.mark.slow
@pytest.mark.skipif(
    ARM_EMULATOR is None or ARM_COMPILER is None,
    reason="needs a compiler and an emulator: apt install g++-aarch64-linux-gnu qemu-user",
)
def test_on_arm(tmp_path: Path) -> None:
    """The portable kernels on NEON, as setup.py compiles them where there is nothing wider."""
    assert ARM_EMULATOR is not None and ARM_COMPILER is not None
    command = [ARM_COMPILER, "-std=c++20", "-O3", "-fno-math-errno", "-Wall", "-DFASTCL_ISA=baseline"]
    common = [f"-I{ROOT / 'csrc'}", "-include", f"{ROOT / 'csrc' / 'cpu' / 'glibc.h'}"]
    kernels = tmp_path / "kernels.o"
    said = subprocess.run(
        [*command, *common, "-c", f"{ROOT / 'csrc' / 'cpu' / 'isa' / 'kernels.cpp'}", "-o", f"{kernels}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (said.returncode, said.stderr) == (0, "")
    source, program = Path(__file__).with_name("standalone.cpp"), tmp_path / "standalone"
    subprocess.run([*command, "-static", f"{source}", f"{kernels}", "-o", f"{program}"], check=True)
    run = subprocess.run([ARM_EMULATOR, program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "0 failures\n"), run.stderr


@pytest.mark.skipif(
    not built("avx512").exists() or shutil.which("nm") is None, reason="needs the objects of a build, and binutils"
)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
def test_no_symbol_is_shared_between_sets(isa: str) -> None:
    """Whatever an object defines weakly carries its set's name, so that the linker cannot keep another set's copy."""
    if not built(isa).exists():
        pytest.skip("the compiler does not know AMX")
    lines = subprocess.run(
        ["nm", "--demangle", built(isa)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    defined = [line[19:] for line in lines if line[17:18] in "TWVu"]
    assert defined
    assert [name for name in defined if f"fastcl::cpu::{isa}::" not in name] == []
