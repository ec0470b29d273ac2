"""Builds fastcl's libraries of kernels from the sources under csrc/, each by one ninja graph.

    libfastcl_cpu.so    csrc/*.cpp and csrc/cpu/**
        csrc/cpu/isa/*.cpp     once per instruction set (ISAS below), with -DFASTCL_ISA=<name> and its flags
    libfastcl_cuda.so   csrc/arguments.cpp, csrc/tensors.cpp and csrc/cuda/**, with a CUDA runtime of its own: where nvcc is found
                        and torch is a CUDA build of its major version or a later one, or where FASTCL_BUILD_CUDA=1 asks for it
        csrc/cuda/sm_90a/*.cu  for 9.0a alone, where 9.0 or 9.0a is built: instructions that no other architecture has

Both call torch by the C functions of csrc/torch_abi.h alone, so that a build needs no torch, and one library serves torch 2.10 and
later and any Python.

What cannot be built is left out, and the package installs all the same on pure PyTorch: the reasons go
into fastcl/build_facts.json, which `fastcl doctor` reads. A source that does not compile is an error.

Environment: FASTCL_BUILD_CPU, FASTCL_BUILD_CUDA, FASTCL_BUILD_AVX2, FASTCL_BUILD_AVX512 and FASTCL_BUILD_AMX (auto; 0
leaves it out; 1 fails where it cannot be built), FASTCL_BUILD_MODELS (1: AVX-512's and AMX's kernels once more over plain
loops, to be tested on any processor with AVX2), CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it was a part of the package wheel
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
FACTS = "build_facts.json"
CPU, CUDA = "libfastcl_cpu.so", "libfastcl_cuda.so"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall <folder of the fastcl source>"
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"

# -ffast-math stays out: it breaks NaN and infinity, and linking with it makes the process flush denormals.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


OWN_PAIR = (
    "cpu/own_pair.h"  # what a user's own pair function is compiled with at run time (fastcl/backends/own_pairs.py)
)


def headers_of(name: str) -> dict[str, str]:
    """A header of csrc/ and all of csrc/ that it includes: names with digests of what they say."""
    found: dict[str, str] = {}
    waiting = [CSRC / name]
    while waiting:
        path = waiting.pop()
        key = path.relative_to(CSRC).as_posix()
        if key not in found:
            text = path.read_bytes()
            found[key] = hashlib.sha256(text).hexdigest()
            included = re.findall(r'^#include "(.*)"', text.decode(), re.MULTILINE)
            waiting += [Path(os.path.normpath(path.parent / other)) for other in included]
    return dict(sorted(found.items()))


def problem_of(source: Path) -> str:
    """The arguments of the ops: a library that takes others would read them wrong."""
    values = {
        node.targets[0].id: node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return "; ".join(str(ast.literal_eval(values[name])) for name in ("PROBLEM", "ALIGNED"))


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


def _of_children() -> float:
    """Processor seconds of all processes that this one has started and waited for."""
    used = os.times()
    return used.children_user + used.children_system


def _number(arch: str) -> str:
    """90 of 9.0+PTX."""
    return arch.removesuffix("+PTX").replace(".", "")


@dataclass
class Graph:
    """The build as text for ninja: compile edges, and one link.

    Paths to the sources are relative to the folder, so that the objects stay good where the tree is moved.
    """

    folder: Path
    rules: list[str]
    edges: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

    def compile(self, rule: str, source: Path, flags: Sequence[str] = (), folder: str = "common") -> None:
        target = f"{folder}/{source.relative_to(CSRC)}.o"
        path = re.sub(r"([$: ])", r"$\1", os.path.relpath(source, self.folder))
        self.edges.append(f"build {target}: {rule} {path}\n  flags = {join(flags)}")
        self.objects.append(target)

    def link(self, library: str, after: str = "") -> None:
        self.edges.append(f"build {library}: link {' '.join(self.objects)} | {after}\ndefault {library}")

    def stubs(self, compiler: Compiler, *names: str) -> str:
        """Libraries without a symbol in place of torch's: the loader finds by their names those that torch has loaded."""
        write_if_new(self.folder / "stub.cpp", "")
        self.rules.append(f"rule stub\n  command = {join(compiler.command)} -shared -Wl,-soname,$out -o $out $in")
        self.edges += [f"build {name}: stub stub.cpp" for name in names]
        return " ".join(names)

    def old_glibc(self, compiler: Compiler) -> list[str]:
        """Threads and loader as glibc before 2.34 had them, to be linked before its libc: csrc/cuda/glibc says why."""
        versions = CSRC / "cuda" / "glibc" / f"{platform.machine()}.map"
        if platform.libc_ver()[0] != "glibc" or not versions.exists():
            return ["-ldl", "-lrt", "-lpthread"]
        script = os.path.relpath(versions, self.folder)
        options = f"-shared -nostdlib -Wl,-soname,$name -Wl,--version-script={script}"
        self.rules.append(f"rule glibc\n  command = {join(compiler.command)} {options} -o $out $in")
        # In a folder of their own: nvcc has its programs look for libraries in the one that it is run in.
        made = {f"glibc/{path.stem}": path for path in sorted(versions.parent.glob("*.cpp"))}
        for target, path in made.items():
            source = os.path.relpath(path, self.folder)
            self.edges.append(f"build {target}: glibc {source} | {script}\n  name = {path.stem}")
        return list(made)

    def run(self, ninja: list[str]) -> None:
        """Writes the file and runs ninja, which compiles only what has changed."""
        (self.folder / "build.ninja").write_text("\n".join([*self.rules, *self.edges, ""]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*ninja, *jobs], cwd=self.folder, check=False).returncode:
            raise CompileError(
                "fastcl's kernels did not compile: the compiler's message is above. To install without them, on "
                "pure PyTorch: FASTCL_BUILD_CPU=0; without the CUDA kernels alone: FASTCL_BUILD_CUDA=0"
            )


def find_ninja() -> list[str]:
    """The ninja of this Python environment, else the one on the path."""
    for command in ([sys.executable, "-m", "ninja"], ["ninja"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "--version"], capture_output=True).returncode:
            return command
    raise LeftOut("ninja was not found", f"pip install ninja; {REBUILD}")


def join(flags: Sequence[str]) -> str:
    return shlex.join(flags).replace("$", "$$")


class build_kernels(build_ext):  # noqa: N801 - setuptools prints the name of the command as it stands
    """build_ext with ninja doing the compiling, and torch imported only for the CUDA kernels."""

    made: bool | None = None  # whether the last build made a library; None before one

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], CPU))

    def build_extension(self, ext: Extension) -> None:
        began, before = time.perf_counter(), _of_children()
        folder = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "fastcl": self.distribution.get_version(),
            "machine": platform.machine(),
            "compiler": None,
            "cpu_isas": [],
            "cpu_flags": {},  # of each instruction set, and the headers: for pair functions that are compiled at run time
            "headers": {},
            "problem": problem_of(ROOT / "fastcl/equation/problem.py"),
            "nvcc": None,  # this and what follows: of the CUDA kernels
            "cuda_archs": [],
            "libraries": {},
            "left_out": {},
        }
        for name, part, compile_library in ((CPU, "cpu", compile_cpu), (CUDA, "cuda", compile_cuda)):
            library = folder / name
            library.unlink(missing_ok=True)  # one left from an earlier build must not pass for this one's
            if made := attempt(part, facts, partial(compile_library, facts)):
                shutil.copy2(made, library)
                facts["libraries"][name] = fingerprint(library)
        build_kernels.made = bool(facts["libraries"])
        facts["seconds"] = round(time.perf_counter() - began, 1)
        facts["compilers_seconds"] = round(_of_children() - before, 1)
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        report(facts)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the libraries and the facts beside the sources, and no library of before."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            in_source, built = (Path(path).parent for path in self._get_inplace_equivalent(build_py, ext))
            for name in (CPU, CUDA, FACTS):
                (in_source / name).unlink(missing_ok=True)
                if (built / name).exists():
                    shutil.copy2(built / name, in_source / name)


def wheel_command() -> dict[str, Any]:
    """bdist_wheel with our tag: no library knows Python, and what has none runs anywhere."""
    if bdist_wheel is None:
        return {}

    class wheel_of_kernels(bdist_wheel):  # noqa: N801 - as above
        def get_tag(self) -> tuple[str, str, str]:
            platform_tag: str = "any" if build_kernels.made is False else super().get_tag()[2]
            return "py3", "none", platform_tag

    return {"bdist_wheel": wheel_of_kernels}


def fingerprint(path: Path) -> list[int]:
    """The size of a file and a checksum of 64 samples of it; fastcl/backends/extension.py asks for the same before it opens one."""
    size, check = path.stat().st_size, 0
    with path.open("rb") as opened:
        for k in range(64):
            opened.seek(max(0, size - 4096) * k // 63)
            check = zlib.crc32(opened.read(4096), check)
    return [size, check]


def import_torch() -> Any:
    try:
        import torch
    except ImportError as cause:
        reason = f"torch could not be imported at build time ({cause}); pip's build isolation hides it"
        raise LeftOut(reason, f"pip install torch setuptools ninja; {REBUILD}") from cause
    return torch


def compile_cpu(facts: dict[str, Any]) -> Path:
    """Compiles and links the CPU kernels for every instruction set that the compiler takes, and adds to the facts.

    Raises:
        LeftOut: there is no compiler or no ninja.
    """
    compiler = Compiler.find()
    facts["compiler"] = compiler.version
    ninja = find_ninja()
    isas = {"baseline": ISAS["baseline"]}
    for name in list(ISAS)[1:]:
        if isa := attempt(name, facts, partial(compiler.check, ISAS[name])):
            isas[name] = isa
    facts["cpu_isas"] = list(isas)
    facts["cpu_flags"] = {name: [*CXX_FLAGS, *isa.compile_flags(name)] for name, isa in isas.items()}
    facts["headers"] = headers_of(OWN_PAIR)
    folder = ROOT / "build" / f"cpu-{facts['machine']}"
    folder.mkdir(parents=True, exist_ok=True)
    listed = " ".join(f"X({name})" for name in isas)
    write_if_new(
        folder / "isas.h",
        f"// Written by setup.py at each build.\n#pragma once\n#define FASTCL_FOR_EACH_ISA(X) {listed}\n",
    )
    # Threads are those of torch too, by one of its C functions: nothing here is linked with an OpenMP.
    csrc = os.path.relpath(CSRC, folder)
    flags = [*compiler.flags, "-I.", f"-I{csrc}", "-include", f"{csrc}/cpu/glibc.h"]
    linux = sys.platform != "darwin"
    link = [*TORCH_LINK, "-ltorch_cpu"] if linux else ["-bundle", "-undefined", "dynamic_lookup"]
    graph = Graph(folder, rules(compiler, flags, link))
    for source in (*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("cpu/*.cpp"))):
        graph.compile("cxx", source)
    for name, isa in isas.items():
        for source in sorted(CSRC.glob("cpu/isa/*.cpp")):
            graph.compile("cxx", source, isa.compile_flags(name), name)
    graph.link(CPU, graph.stubs(compiler, "libtorch_cpu.so") if linux else "")
    graph.run(ninja)
    return folder / CPU


def compile_cuda(facts: dict[str, Any]) -> Path:
    """Compiles the CUDA kernels, links them with nvcc's own CUDA runtime, and adds to the facts.

    Raises:
        LeftOut: there is no nvcc, no compiler or no ninja; or no torch to run it, and it was not asked for.
    """
    asked = os.environ.get("FASTCL_BUILD_CUDA") == "1"
    cuda = Cuda.find(None if asked else import_torch())
    compiler, ninja = Compiler.find(), find_ninja()
    facts |= {"nvcc": cuda.version, "cuda_archs": cuda.archs}
    folder = ROOT / "build" / f"cuda-{cuda.version}"
    folder.mkdir(parents=True, exist_ok=True)
    csrc = os.path.relpath(CSRC, folder)
    flags = [
        *compiler.flags,
        f"-I{csrc}",
        "-include",
        f"{csrc}/cpu/glibc.h",
        *(["-DFASTCL_HOPPER"] if cuda.hopper_flags() else []),
    ]
    # Of the runtime nothing is exported: torch's own stays apart.
    runtime = [
        "-Wl,--exclude-libs,ALL",
        *(f"-L{path}" for path in cuda.library_dirs),
        "-lcudart_static",
    ]
    nvcc = [cuda.nvcc, *NVCC_FLAGS, *cuda.size_flags(), "-ccbin", compiler.command[0], f"-I{csrc}"]
    graph = Graph(folder, [f"rule nvcc\n  command = {join(nvcc)} {COMPILING}"])
    glibc = graph.old_glibc(compiler)
    graph.rules += rules(compiler, flags, [*TORCH_LINK, "-ltorch_cpu", "-ltorch_cuda", *runtime, *glibc])
    for source in (CSRC / "arguments.cpp", CSRC / "tensors.cpp", *sorted(CSRC.glob("cuda/*.cpp"))):
        graph.compile("cxx", source)
    for source in sorted(CSRC.glob("cuda/*.cu")):
        graph.compile("nvcc", source, cuda.arch_flags())
    for source in sorted(CSRC.glob("cuda/sm_90a/*.cu")) if cuda.hopper_flags() else []:
        graph.compile("nvcc", source, cuda.hopper_flags())
    stubs = graph.stubs(compiler, "libtorch_cpu.so", "libtorch_cuda.so")
    graph.link(CUDA, " ".join([stubs, *(name for name in glibc if not name.startswith("-"))]))
    graph.run(ninja)
    return folder / CUDA


TORCH_LINK = ["-shared", "-L.", "-Wl,--no-as-needed"]
COMPILING = "$flags -c $in -o $out -MMD -MF $out.d\n  depfile = $out.d\n  deps = gcc"


def rules(compiler: Compiler, flags: Sequence[str], link: Sequence[str]) -> list[str]:
    """ninja's rules for a C++ object and the library."""
    link = [*link, *shlex.split(os.environ.get("LDFLAGS", ""))]
    return [
        f"rule cxx\n  command = {join([*compiler.command, *flags])} {COMPILING}",
        f"rule link\n  command = {join(compiler.command)} $in -o $out {join(link)}",
    ]


def write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def setuptools_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", setuptools.__version__)[:2])


def require_wheel() -> None:
    """Stop with words where a setuptools before 70.1 would stop with "invalid command 'bdist_wheel'"."""
    asked = {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv)
    if asked and setuptools_version() < (70, 1) and importlib.util.find_spec("wheel") is None:
        raise SystemExit(
            f"fastcl: setuptools {setuptools.__version__} needs the package wheel to install anything without build isolation, and "
            "it is not here. To mend it: pip install wheel ninja (or pip install --upgrade setuptools ninja), then install again"
        )


def report(facts: dict[str, Any]) -> None:
    made = f"built for {', '.join(facts['cpu_isas'])}" if facts["cpu_isas"] else "built no kernels"
    made += f" and for CUDA {', '.join(facts['cuda_archs'])}" if facts["cuda_archs"] else ""
    print(f"fastcl: {made} in {facts['seconds']} s")
    for part, why in facts["left_out"].items():
        print(f"fastcl: left out {part}: {why['reason']}. To mend it: {why['remedy']}")


if __name__ == "__main__":
    require_wheel()
    # depends brings every source and header into the source distribution.
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file())
    setup(
        # triton_kernels/ lies beside csrc/, but its import name at the top level belongs to another package.
        packages=[*find_packages(include=["fastcl", "fastcl.*"]), "fastcl.triton_kernels", "fastcl.csrc"],
        package_dir={"fastcl.triton_kernels": "triton_kernels", "fastcl.csrc": "csrc"},
        package_data={"fastcl": ["py.typed"], "fastcl.csrc": list(headers_of(OWN_PAIR))},
        ext_modules=[Extension("fastcl.libfastcl_cpu", sources=[], depends=sources, language="c++")],
        cmdclass={"build_ext": build_kernels, **wheel_command()},
        **{"license_expression" if setuptools_version() >= (77, 0) else "license": "MIT"},
    )
