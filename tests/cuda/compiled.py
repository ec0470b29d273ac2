"""What nvcc made of every CUDA kernel for every architecture, read from the objects of a build; needs no GPU and no torch.

python -m tests.cuda.compiled           the record as a table
python -m tests.cuda.compiled FOLDER    write the record of a build (build/cuda-...)
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

RECORD = Path(__file__).with_name("compiled.json")
# Shared memory, threads and registers of a multiprocessor (CUDA C programming guide, compute capabilities).
SHARED = {"sm_80": 167936, "sm_86": 102400, "sm_89": 102400, "sm_90": 233472, "sm_100": 233472, "sm_120": 102400}
THREADS = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
REGISTERS = 65536


class Kernel(NamedTuple):
    """One kernel as compiled for one architecture. blocks: how many registers, static shared memory and threads let one
    multiprocessor hold; the fused kernels' dynamic shared memory is counted where they are launched."""

    registers: int
    stack: int
    local: int
    shared: int
    blocks: int

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local)


def tool(name: str) -> str:
    """A program of the CUDA toolkit: of the toolkit itself, or the copy that comes with Triton."""
    home = os.environ.get("CUDA_HOME")
    spec = importlib.util.find_spec("triton")
    folders = (spec.submodule_search_locations or []) if spec else []
    places = [Path(home, "bin", name)] if home else []
    places += [Path(folder, "backends", "nvidia", "bin", name) for folder in folders]
    found = next((str(path) for path in places if path.exists()), shutil.which(name))
    if found is None:
        raise FileNotFoundError(f"{name}: found neither in CUDA_HOME, nor beside Triton, nor on the path")
    return found


def read(folder: Path) -> dict[str, Kernel]:
    """Architecture and kernel to what was made of it, for every CUDA object of the build."""
    found = {}
    for made in sorted(folder.rglob("cuda/**/*.cu.o")):
        text = _run(tool("cuobjdump"), "-res-usage", str(made))
        for arch, part in re.findall(r"arch = (sm_\w+)(.*?)(?=Fatbin elf code|\Z)", text, re.DOTALL):
            pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
            for name, *numbers in re.findall(pattern, part):
                registers, stack, shared, local = map(int, numbers)
                plain = _plain(name)
                blocks = _blocks(arch, plain, registers, shared)
                found[f"{arch} {plain}"] = Kernel(registers, stack, local, shared, blocks)
    return dict(sorted(found.items(), key=lambda item: (int(re.findall(r"\d+", item[0])[0]), item[0])))


def _blocks(arch: str, name: str, registers: int, shared: int) -> int:
    threads = 128 if name.startswith(("merge_parts", "fused_merge")) else 1024 if "finish" in name else 256
    base = arch.rstrip("af")
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-max(registers, 1) // 8) * 8 * 32 * warps)
    return min(by_registers, THREADS[base] // (32 * warps), SHARED[base] // (shared + 1024), 32)


def _plain(name: str) -> str:
    """The kernel's name and template arguments, without namespaces and parameters."""
    plain = _run("c++filt", name).strip()
    plain = re.sub(r"\(anonymous namespace\)::|fastcl::cuda::|fastcl::pairs::|fastcl::", "", plain)
    plain = re.sub(r"\((?:int|long|bool)\)", "", plain).removeprefix("void ")
    return plain[: plain.rindex("(")] if plain.endswith(")") else plain


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def recorded() -> dict[str, Kernel]:
    """The committed record; nothing where there is none yet."""
    if not RECORD.exists():
        return {}
    return {key: Kernel(*values) for key, values in json.loads(RECORD.read_text()).items()}


def regressions(found: dict[str, Kernel], before: dict[str, Kernel]) -> list[str]:
    """What a build has lost against the record: a kernel that is missing or new, spills, registers, blocks."""
    remedy = "python -m tests.cuda.compiled FOLDER records a build"
    lost = [f"{key}: not in this build; {remedy}" for key in before if key not in found]
    for key, kernel in found.items():
        if kernel.spills:
            lost.append(f"{key}: spills, stack {kernel.stack}, local {kernel.local}")
        if not before:
            continue
        if key not in before:
            lost.append(f"{key}: not in the record; {remedy}")
        elif kernel.registers > before[key].registers + 8 or kernel.blocks < before[key].blocks:
            lost.append(f"{key}: was {tuple(before[key])}, is {tuple(kernel)}")
    return lost


def write(found: dict[str, Kernel]) -> None:
    RECORD.write_text(
        "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(list(v))}" for k, v in found.items()) + "\n}\n"
    )


def table(found: dict[str, Kernel]) -> str:
    """The record as people read it."""
    lines = [
        "| architecture | kernel | registers | stack, local | shared memory | blocks |",
        "|---|---|---|---|---|---|",
    ]
    for key, k in found.items():
        arch, name = key.split(" ", 1)
        lines.append(f"| {arch} | `{name}` | {k.registers} | {k.stack}, {k.local} | {k.shared} | {k.blocks} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write(read(Path(sys.argv[1])))
    else:
        print(table(recorded()))
