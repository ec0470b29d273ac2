"""Run backend="cuda" on CPU tensors: its ops as csrc/cuda/launches.cpp has them, their launches in the emulator.

with emulated(80) as session:
    fastcl.functional.clip(x, y, backend="cuda").backward()

Every launch runs the kernel's PTX on guarded copies of the memory that its struct points to, every check of tools/ptxemu on.
Memory from torch.empty holds the bits of NaN; what still holds them counts as never written.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import cpp_extension

from fastcl.backends import choice
from fastcl.backends.cuda import launches
from fastcl.backends.cuda.launches import Facts
from fastcl.equation.pairs import PairFunction
from tools.ptxemu import _build, nvcc
from tools.ptxemu.errors import from_fault
from tools.ptxemu.module import DeviceMemory, Module, make_options
from tools.ptxemu.stats import Stats

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# `make test-gpu-emulated` runs everything; a plain test run takes what fits a minute.
EVERYTHING = os.environ.get("FASTCL_GPU_EMULATED") == "all"
EXTRA = ("-std=c++20", "--expt-relaxed-constexpr")
_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)
_FAULT = 700  # cudaErrorIllegalAddress
_UNWRITTEN = np.uint32(0xFFD3FFB5)  # `unwritten` of emulated.cpp


class Session:
    """The launches of one `emulated` block: .stats has one Stats for each, .names their names, .seed picks the schedule."""

    def __init__(self, arch: int, seed: int, library: nvcc.HostLibrary | None, options: dict[str, Any]) -> None:
        self.arch, self.seed, self.library, self.options = arch, seed, library, options
        self.facts = FACTS[arch]
        self.schedule = _schedule()
        # For mutation tests: what becomes of a kernel's PTX, and of the words of a launch's struct (None: no launch).
        self.mutate: Callable[[str], str] | None = None
        self.tamper: Callable[[str, list[int]], list[int] | None] | None = None
        self.stats: list[Stats] = []
        self.names: list[str] = []
        self.given: list[Tensor] = []
        self.fault: BaseException | None = None

    def launch(self, name: bytes, arguments: int, size: int) -> int:
        """One launch as the schedule asks for it; what goes wrong is kept, since it cannot be raised through C++."""
        try:
            return self._launch(name.decode(), arguments, size)
        except BaseException as error:
            self.fault = error
            return _FAULT

    def _launch(self, name: str, arguments: int, size: int) -> int:
        struct = (ctypes.c_uint64 * (size // 8)).from_address(arguments)
        if self.tamper is not None:
            changed = self.tamper(name, list(struct))
            if changed is None:
                return 0
            struct[:] = changed
        form = next((form for form in ("fused", "hopper", "aligned") if name.startswith(form)), "strip")
        # Those around the fused kernels are quick to compile, and no part of a library of a few.
        library = self.library if self.library is not None and form != "aligned" else _launches(self.arch, form)
        function = getattr(library.library, f"fastcl_cuda_{name}")
        function.restype = ctypes.c_int
        memory = DeviceMemory()
        try:
            # A word that lies within a known block of memory is a pointer: no size, stride or constant looks like one.
            for k, word in enumerate(struct):
                struct[k] = self._translate(memory, word)
            core, options = library._core, make_options(seed=self.seed, **self.options)
            for address, count, block in list(memory.blocks.values()):
                for start, stop in _unwritten(block):
                    core.ptxemu_memory_uninitialized(memory.handle, address + start, stop - start)
                assert count == block.nbytes
            with _mutated(library, self.arch, self.mutate):
                library.library.ptxemu_shim_begin(memory.handle, ctypes.byref(options))
                result = function(struct, None)
                log = json.loads(library.library.ptxemu_shim_end())
            memory.copy_back()
        finally:
            memory.close()
        for entry in log:
            if "error" in entry:
                raise from_fault(entry)
            self.stats.append(Stats(entry))
            self.names.append(name)
        return int(result)

    def _translate(self, memory: DeviceMemory, word: int) -> int:
        if word < 1 << 20:
            return word
        begin = ctypes.c_uint64()
        size = self.schedule.emulated_block(ctypes.c_uint64(word), ctypes.byref(begin))
        if not size:
            for t in self.given:
                s = t.untyped_storage()
                if s.data_ptr() <= word < s.data_ptr() + s.nbytes():
                    begin.value, size = s.data_ptr(), s.nbytes()
        if not size:
            return word
        block = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin.value))
        return int(memory.address(block)) + word - begin.value

    def call(self, op: Any, *arguments: Any) -> Any:
        """An op of the schedule; a fault of the emulator is raised as itself."""
        self.given = [t for t in arguments if isinstance(t, Tensor)]
        try:
            return op(*arguments)
        except RuntimeError as error:
            fault, self.fault = self.fault, None
            if fault is not None:
                raise fault from error
            raise


def _unwritten(block: np.ndarray) -> Iterator[tuple[int, int]]:
    """Byte ranges that still hold what the allocator filled in."""
    words = block[: block.nbytes // 4 * 4].view(np.uint32) == _UNWRITTEN
    edges = np.flatnonzero(np.diff(np.concatenate(([0], words.view(np.int8), [0]))))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield int(start) * 4, int(stop) * 4


@functools.cache
def _launches(arch: int, form: str) -> nvcc.HostLibrary:
    hopper = form == "hopper"
    sources = sorted(CSRC.glob("cuda/sm_90a/*.cu" if hopper else f"cuda/{form}*.cu"))
    return nvcc.load_host_library(*sources, arch=f"sm_{arch}{'a' * hopper}", include_dirs=[CSRC], extra=EXTRA)


@contextmanager
def _mutated(library: nvcc.HostLibrary, arch: int, mutate: Callable[[str], str] | None) -> Iterator[None]:
    """The library with other PTX in its launches, for as long as this lasts."""
    if mutate is None:
        yield
        return
    texts = sorted(library.path.parent.glob(f"{library.path.stem}.*.ptx"))
    changed = nvcc.HostLibrary(library.path, [Module(mutate(text.read_text())) for text in texts], arch)
    try:
        yield
    finally:
        del changed


@functools.cache
def _schedule() -> ctypes.CDLL:
    """The ops and the stand-ins of their kernels, built against this torch and kept with the emulator's own builds."""
    own = [CSRC / name for name in ("arguments.cpp", "tensors.cpp", "cuda/launches.cpp", "cuda/aligned.cpp")]
    sources = [Path(__file__).with_name("emulated.cpp"), *own]
    includes = [CSRC, CSRC / "cuda", *cpp_extension.include_paths()]
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DFASTCL_HOPPER", *(f"-I{path}" for path in includes)]
    flags += ['-DFASTCL_LAUNCH_LIBRARY="fastcl_emulated"', '-DFASTCL_LAUNCH_KEY="CPU"']
    paths = [part for path in cpp_extension.library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    # One compilation of all sources: torch's headers take most of the time.
    together = "".join(f'#include "{s}"\n' for s in sources)
    texts = [text for s in sources for text in _with_headers(s)]
    library = _build.cache_dir() / f"schedule-{_build.digest(torch.__version__, flags, together, *texts)}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}.tmp")
        command = [
            os.environ.get("CXX", "g++"),
            *flags,
            "-shared",
            "-x",
            "c++",
            "-",
            *paths,
            "-lc10",
            "-ltorch",
            "-ltorch_cpu",
        ]
        run = subprocess.run([*command, "-o", str(made)], input=together, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-4000:]
        made.replace(library)
    schedule = ctypes.CDLL(str(library))
    schedule.emulated_block.restype = ctypes.c_int64
    return schedule


def _with_headers(source: Path, seen: set[Path] | None = None) -> Iterator[bytes]:
    """The text of a source and of every header of csrc that it includes, each once."""
    seen = set() if seen is None else seen
    if source in seen or not source.exists():
        return
    seen.add(source)
    text = source.read_bytes()
    yield text
    for name in re.findall(rb'^\s*#\s*include "([^"]+)"', text, re.MULTILINE):
        for folder in (source.parent, CSRC / "cuda"):
            yield from _with_headers((folder / name.decode()).resolve(), seen)


# What the ops are named: by the launches of csrc, and those of whole losses by themselves.
LAUNCHES = re.findall(
    r"^  X\((\w+), ",
    "".join((CSRC / "cuda" / name).read_text() for name in ("launch.h", "fused.h", "sm_90a/launch.h")),
    re.MULTILINE,
)
OPS = [*LAUNCHES, "cuda_aligned_loss", "cuda_aligned_loss_backward"]
# Of the cards that the emulator's runtime stands for.
FACTS = {80: Facts((8, 0), 108, 163 << 10), 90: Facts((9, 0), 132, 227 << 10)}

_running = threading.Lock()


@contextmanager
def emulated(
    arch: int = 80, seed: int = 0, library: nvcc.HostLibrary | None = None, **options: Any
) -> Iterator[Session]:
    """backend="cuda" takes CPU tensors, as compiled for compute capability `arch` / 10, in a schedule that `seed` picks;
    `library` has the launches, where not all of them are to be compiled."""
    session = Session(arch, seed, library, options)
    hook = _HOOK(session.launch)
    ops = {name: functools.partial(session.call, getattr(torch.ops.fastcl_emulated, name)) for name in OPS}
    reason, ops_before, facts_before = choice.reason, launches.ops, launches.facts_of

    def emulated_reason(name: str, device: torch.device, dtype: torch.dtype, *pair: PairFunction) -> str | None:
        return None if name == "cuda" and device.type == "cpu" else reason(name, device, dtype, *pair)

    # Filling by torch would hide what was never written; the schedule's allocator fills with bits that no kernel writes.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    with _running:
        session.schedule.emulated_begin(hook)
        choice.reason, launches.ops = emulated_reason, SimpleNamespace(**ops)
        launches.facts_of = lambda device: session.facts
        try:
            yield session
        finally:
            choice.reason, launches.ops = reason, ops_before
            launches.facts_of = facts_before
            torch.utils.deterministic.fill_uninitialized_memory = fill
            session.schedule.emulated_end()


__all__ = ["EVERYTHING", "Session", "emulated"]
