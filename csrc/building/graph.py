"""The build as text for ninja."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from setuptools.errors import CompileError

from . import CSRC
from .toolchain import Compiler

TORCH_LINK = ["-shared", "-L.", "-Wl,--no-as-needed"]
COMPILING = "$flags -c $in -o $out -MMD -MF $out.d\n  depfile = $out.d\n  deps = gcc"


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


def rules(compiler: Compiler, flags: Sequence[str], link: Sequence[str]) -> list[str]:
    """ninja's rules for a C++ object and the library."""
    link = [*link, *shlex.split(os.environ.get("LDFLAGS", ""))]
    return [
        f"rule cxx\n  command = {join([*compiler.command, *flags])} {COMPILING}",
        f"rule link\n  command = {join(compiler.command)} $in -o $out {join(link)}",
    ]


def join(flags: Sequence[str]) -> str:
    return shlex.join(flags).replace("$", "$$")


def write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
