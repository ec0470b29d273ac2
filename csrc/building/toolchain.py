"""The compilers and ninja of this machine, the instruction sets and architectures that they take, and why a part is left out."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from setuptools.errors import CompileError

from . import ROOT

T = TypeVar("T")

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall <folder of the fastcl source>"
# Code for 8.0 runs on 8.6 and 8.9 as well: csrc/cuda/README.md has what code of their own costs.
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX;10.0;12.0+PTX"

# -ffast-math stays out: it breaks NaN and infinity, and linking with it makes the process flush denormals.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class Isa(NamedTuple):
    """An instruction set: its compiler flags, and the name that ATen's vector headers know it by."""

    flags: tuple[str, ...]
    capability: str

    def compile_flags(self, name: str) -> list[str]:
        capability = [f"-DCPU_CAPABILITY={self.capability}", f"-DCPU_CAPABILITY_{self.capability}"]
        return [*self.flags, f"-DFASTCL_ISA={name}", f"-DFASTCL_ISA_{name.upper()}", *capability]


# Narrowest first, and the objects are linked in this order. Inline functions of headers (std::vector) come
# out of every object, and the linker keeps the first copy that it meets: that must be one that every
# processor can run. A copy that only the AVX-512 objects have is called from nowhere else.
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "-mprefer-vector-width=512",
)
AMX_FLAGS = (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
ISAS = {"baseline": Isa((), "DEFAULT")}
if platform.machine().lower() in ("x86_64", "amd64"):
    if (
        os.environ.get("FASTCL_BUILD_MODELS") == "1"
    ):  # before the processor's own sets, of which the last is the default
        model = (*AVX2_FLAGS, "-Wno-psabi", "-include", str(ROOT / "tests" / "cpu" / "model.h"))
        ISAS |= {"avx512_model": Isa(model, "AVX2"), "amx_model": Isa((*model, "-DFASTCL_MODEL_AMX"), "AVX2")}
    ISAS |= {"avx2": Isa(AVX2_FLAGS, "AVX2"), "avx512": Isa(AVX512_FLAGS, "AVX512"), "amx": Isa(AMX_FLAGS, "AVX512")}


class LeftOut(Exception):  # noqa: N818 - caught and noted, never an error by itself
    """A part that cannot be built here: the reason, and what mends it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. To mend it: {remedy}")
        self.reason, self.remedy = reason, remedy


def attempt(part: str, facts: dict[str, Any], make: Callable[[], T]) -> T | None:
    """What make() returns, or None with the reason noted where it is left out; FASTCL_BUILD_<PART> overrides."""
    variable = f"FASTCL_BUILD_{part.upper()}"
    value = os.environ.get(variable, "auto").lower()
    if value not in ("auto", "0", "1"):
        raise CompileError(f"{variable}: expected auto, 0 or 1, got {value!r}")
    try:
        if value == "0":
            raise LeftOut(f"{variable}=0 was set when it was built", f"unset {variable}; {REBUILD}")
        return make()
    except LeftOut as cause:
        if value == "1":
            raise CompileError(f"{variable}=1, but {cause}") from cause
        facts["left_out"][part] = {"reason": cause.reason, "remedy": cause.remedy}
        return None


def output(command: list[str]) -> str:
    """All that a command prints."""
    run = subprocess.run(command, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return run.stdout


@dataclass
class Compiler:
    """The C++ compiler, and which flags it takes."""

    command: list[str]
    version: str
    flags: list[str]

    @classmethod
    def find(cls) -> Compiler:
        """The compiler named by CXX, else the first of g++, clang++ and c++.

        Raises:
            LeftOut: there is none, or it does not compile C++20.
        """
        if sys.platform == "win32":
            raise LeftOut("the kernels are not built on Windows", "use the Windows Subsystem for Linux")
        named = os.environ.get("CXX")
        tried = [shlex.split(named)] if named else [["g++"], ["clang++"], ["c++"]]
        get_one = f"apt install g++ (or conda install cxx-compiler); {REBUILD}"
        command = next((c for c in tried if shutil.which(c[0])), None)
        if command is None:
            raise LeftOut(f"no C++ compiler was found (tried {', '.join(c[0] for c in tried)})", get_one)
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        version = output([*command, "--version"]).partition("\n")[0].strip()
        compiler = cls(command, version, [*CXX_FLAGS, *extra])
        if complaint := compiler.complaint([], "#include <concepts>\n#include <vector>\n"):
            raise LeftOut(f"{command[0]} does not compile C++20: {complaint}", get_one)
        return compiler

    def complaint(self, flags: list[str], source: str) -> str | None:
        """What the compiler says against this source with these flags, or None."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text(source + "int main() { return 0; }\n")
            command = [*self.command, *self.flags, *flags, "-c", str(probe), "-o", os.devnull]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            return None
        lines = [line.strip() for line in run.stderr.splitlines() if "error" in line]
        return lines[0] if lines else f"exit status {run.returncode} without a message"

    def check(self, isa: Isa) -> Isa:
        """The instruction set itself, when the compiler takes its flags."""
        if complaint := self.complaint(list(isa.flags), ""):
            remedy = f"use a newer compiler; {REBUILD}"
            raise LeftOut(f"{self.version} does not take its flags: {complaint}", remedy)
        return isa


@dataclass
class Cuda:
    """nvcc, its toolkit, and the architectures to build for."""

    nvcc: str
    home: Path
    version: str
    archs: list[str]
    library_dirs: list[str]

    @classmethod
    def find(cls, torch: Any) -> Cuda:
        """The toolkit at CUDA_HOME, else the one of the nvcc on the path; torch: that which is to run what is built, None for any.

        Raises:
            LeftOut: torch has no CUDA, or there is no nvcc, or it is of a later major version.
        """
        if torch is not None and torch.version.cuda is None:
            remedy = f"install a CUDA build of torch, or set FASTCL_BUILD_CUDA=1 to build for another; {REBUILD}"
            raise LeftOut(f"torch {torch.__version__} is not a CUDA build", remedy)
        toolkit = f"the CUDA toolkit {torch.version.cuda}" if torch is not None else "a CUDA toolkit"
        wanted = f"install {toolkit} or set CUDA_HOME to it; {REBUILD}"
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = shutil.which("nvcc", path=str(Path(named, "bin")) if named else None)
        if nvcc is None:
            raise LeftOut(f"nvcc was not found (looked in {named or 'PATH'})", wanted)
        # nvcc's own word for its folder: the one on the path may be a link or a script that lies elsewhere.
        dry_run = output([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull])
        top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
        libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry_run, re.MULTILINE)
        release = re.search(r"V(\d+\.\d+\.\d+)", output([nvcc, "--version"]))
        if top is None or release is None:
            raise LeftOut(f"{nvcc} does not tell its folder and version", wanted)
        # The driver that torch's own CUDA needs runs what an nvcc of that major version or an earlier one has made.
        if torch is not None and int(release[1].split(".")[0]) > int(torch.version.cuda.split(".")[0]):
            raise LeftOut(f"nvcc is {release[1]}, but torch was built with CUDA {torch.version.cuda}", wanted)
        if named_archs := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            archs = re.split(r"[;, ]+", named_archs.strip())
        else:
            # Never the builder's own GPU: what is built here may run elsewhere.
            known = set(re.findall(r"compute_(\d+)", output([nvcc, "--list-gpu-arch"])))
            archs = [arch for arch in DEFAULT_CUDA_ARCHS.split(";") if not known or _number(arch) in known]
        folders = [os.path.realpath(word[2:]) for word in shlex.split(libraries[1] if libraries else "")]
        return cls(nvcc, Path(top[1].strip()).resolve(), release[1], archs, folders)

    def size_flags(self) -> list[str]:
        """Every architecture's code compressed, to an eighth, from nvcc 13 on.

        NVIDIA: "not compatible with drivers released before CUDA Toolkit's 12.4"; what nvcc 12 makes runs on earlier ones.
        """
        return ["--compress-mode=size"] if int(self.version.split(".")[0]) >= 13 else []

    def arch_flags(self) -> list[str]:
        """One -gencode for each architecture's code, and one more for the PTX where +PTX asks for it."""
        flags = []
        for arch in self.archs:
            if not (form := re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)):
                raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected names such as 9.0 or 9.0+PTX, got {arch!r}")
            number = _number(arch)
            flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
            flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if form[3] else []
        return flags

    def hopper_flags(self) -> list[str]:
        """The flags for csrc/cuda/sm_90a; none where that architecture is not built."""
        built = any(_number(arch) in ("90", "90a") for arch in self.archs)
        return ["-gencode=arch=compute_90a,code=sm_90a"] if built else []


def _number(arch: str) -> str:
    """90 of 9.0+PTX."""
    return arch.removesuffix("+PTX").replace(".", "")


def find_ninja() -> list[str]:
    """The ninja of this Python environment, else the one on the path."""
    for command in ([sys.executable, "-m", "ninja"], ["ninja"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "--version"], capture_output=True).returncode:
            return command
    raise LeftOut("ninja was not found", f"pip install ninja; {REBUILD}")
