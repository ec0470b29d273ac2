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

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1 it was a part of the package wheel
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))  # for these: csrc/cuda is not the package cuda
from building import CSRC, ROOT
from building.facts import FACTS, OWN_PAIR, fingerprint, headers_of, problem_of, report
from building.graph import COMPILING, TORCH_LINK, Graph, join, rules, write_if_new
from building.toolchain import CXX_FLAGS, ISAS, NVCC_FLAGS, REBUILD, Compiler, Cuda, LeftOut, attempt, find_ninja

del sys.path[0]

CPU, CUDA = "libfastcl_cpu.so", "libfastcl_cuda.so"


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


def _of_children() -> float:
    """Processor seconds of all processes that this one has started and waited for."""
    used = os.times()
    return used.children_user + used.children_system


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


def import_torch() -> Any:
    try:
        import torch
    except ImportError as cause:
        reason = f"torch could not be imported at build time ({cause}); pip's build isolation hides it"
        raise LeftOut(reason, f"pip install torch setuptools ninja; {REBUILD}") from cause
    return torch


def wheel_command() -> dict[str, Any]:
    """bdist_wheel with our tag: no library knows Python, and what has none runs anywhere."""
    if bdist_wheel is None:
        return {}

    class wheel_of_kernels(bdist_wheel):  # noqa: N801 - as above
        def get_tag(self) -> tuple[str, str, str]:
            platform_tag: str = "any" if build_kernels.made is False else super().get_tag()[2]
            return "py3", "none", platform_tag

    return {"bdist_wheel": wheel_of_kernels}


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


if __name__ == "__main__":
    require_wheel()
    # depends brings every source, every header and the modules of csrc/building into the source distribution.
    files = [path.relative_to(ROOT) for path in CSRC.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    sources = sorted(map(str, files))
    setup(
        # triton_kernels/ lies beside csrc/, but its import name at the top level belongs to another package.
        packages=[*find_packages(include=["fastcl", "fastcl.*"]), "fastcl.triton_kernels", "fastcl.csrc"],
        package_dir={"fastcl.triton_kernels": "triton_kernels", "fastcl.csrc": "csrc"},
        package_data={"fastcl": ["py.typed"], "fastcl.csrc": list(headers_of(OWN_PAIR))},
        ext_modules=[Extension("fastcl.libfastcl_cpu", sources=[], depends=sources, language="c++")],
        cmdclass={"build_ext": build_kernels, **wheel_command()},
        **{"license_expression" if setuptools_version() >= (77, 0) else "license": "MIT"},
    )
