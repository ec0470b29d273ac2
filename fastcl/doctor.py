"""Says what fastcl runs on here: versions, what was built, and which backend serves each dtype, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from types import ModuleType

import torch
from torch import distributed as dist

from .backends import choice, extension
from .distributed import GATHER_LIMIT
from .version import __version__

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTH = 110


def main(argv: Sequence[str]) -> int:
    """Prints the report.

    Args:
        argv: none are taken, but for --help.

    Returns:
        0: a missing part is no error, since the pure PyTorch backend serves everything.
    """
    argparse.ArgumentParser(prog="fastcl doctor", description=__doc__).parse_args(argv)
    print("\n".join(report()))
    return 0


def report() -> Iterator[str]:
    """The lines of the report."""
    yield "Versions"
    yield from table(versions())
    yield "\nMachine"
    yield from table(machine())
    yield "\nCompiled extension"
    yield from table(built())
    for device in devices():
        yield f"\nBackends for {device.type} tensors"
        yield from table(served(device))
    yield "\nSeveral processes"
    yield from table(across_processes())


def versions() -> Iterator[tuple[str, str]]:
    """fastcl and what it runs on."""
    yield "fastcl", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    try:
        yield "triton", importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield "triton", "not installed: pip install triton (needed on GPUs only)"


def machine() -> Iterator[tuple[str, str]]:
    """The operating system, the processor and the GPUs."""
    yield "system", platform.platform()
    threads = torch.get_num_threads()
    yield "processor", f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads in torch"
    yield "torch's kernels", torch.backends.cpu.get_cpu_capability()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def built() -> Iterator[tuple[str, str]]:
    """What the last build made, what it left out, and what is in use."""
    facts, library = extension.facts(), extension.library
    yield "in use", "yes" if library else f"no: {extension.reason}"
    if facts is None:
        return
    yield "built for", f"torch {facts['torch']}, {facts['python']}"
    yield "compiler", str(facts["compiler"]) + (f" and nvcc {facts['nvcc']}" if facts["nvcc"] else "")
    yield "instruction sets", ", ".join(facts["cpu_isas"]) or "none"
    if library:
        yield "usable here", ", ".join(library.usable_isas())
        yield "chosen", chosen_isa(library)
    yield "CUDA kernels", ", ".join(facts["cuda_archs"]) or "none"
    for part, why in facts["left_out"].items():
        yield f"left out: {part}", f"{why['reason']}. To mend it: {why['remedy']}"


def chosen_isa(library: ModuleType) -> str:
    """The instruction set of the CPU kernels, or what is wrong with the one that was asked for."""
    asked = os.environ.get("FASTCL_CPU_ISA")
    try:
        chosen: str = library.chosen_isa()
    except ValueError as error:
        return str(error)
    return f"{chosen} ({f'FASTCL_CPU_ISA={asked}' if asked else 'the widest; FASTCL_CPU_ISA takes another'})"


def devices() -> Iterator[torch.device]:
    """The CPU, and the accelerator if torch has one, or is a CUDA build that sees none."""
    yield torch.device("cpu")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        yield torch.device("cuda")
    if torch.accelerator.is_available():
        yield torch.device(torch.accelerator.current_accelerator() or "cpu")


def served(device: torch.device) -> Iterator[tuple[str, str]]:
    """For each dtype the backend that `auto` takes, then why not each other one; equal dtypes together."""
    asked = os.environ.get(choice.ENVIRONMENT_VARIABLE)
    if asked:
        yield "asked for", f"{choice.ENVIRONMENT_VARIABLE}={asked} (the following is what auto takes)"
    for answers, dtypes in groupby(DTYPES, lambda dtype: choice.explain(device, dtype)):
        auto = next(name for name, reason in answers if reason is None)
        yield ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes), f"{auto} (auto)"
        for name, reason in answers:
            if name != auto:
                yield f"  {name}", "can serve it too" if reason is None else f"no: {reason}"


def across_processes() -> Iterator[tuple[str, str]]:
    """What torch.distributed can do, and which strategy `auto` takes."""
    if not dist.is_available():
        yield "torch.distributed", "not in this build of torch"
        return
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    yield "torch.distributed", ", ".join(name for name, there in found.items() if there) or "neither gloo nor nccl"
    yield (
        "strategy='auto'",
        f"gathers the rows of all ranks while they take at most {GATHER_LIMIT >> 20} MiB on a rank, and passes shards round a "
        "ring above",
    )


def table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Name and text in two columns, the text wrapped."""
    pairs = list(rows)
    column = max(len(name) for name, _ in pairs) + 4
    for name, text in pairs:
        yield textwrap.fill(
            text, WIDTH, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
