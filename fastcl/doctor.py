"""Says what fastcl runs on here: versions, what was built, and which backend serves each dtype, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import cast

import torch
from torch import distributed as dist

from .backends import choice, extension, pair_libraries
from .distributed import GATHER_LIMIT
from .equation.names import Backend
from .equation.problem import accumulation_dtype
from .functional import clip
from .version import __version__

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTH = 110
LOGIT_SCALE = 20.0  # of the checks


def main(argv: Sequence[str]) -> int:
    """Prints the report.

    Args:
        argv: --json for one JSON object, --check to compute with every backend that serves this machine; --help.

    Returns:
        0; with --check 1 where a backend is wrong, or where kernels that this checkout builds are not in use. Without it a missing
        part is no error, since the pure PyTorch backend serves everything.
    """
    parser = argparse.ArgumentParser(prog="fastcl doctor", description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: each section's pairs of name and text"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="hold value and gradient of each backend on 64 rows against float64; exit 1 for a fault",
    )
    chosen = parser.parse_args(argv)
    sections = dict(report())
    faults = 0
    if chosen.check:
        found = list(checked())
        faults = sum(not right for _, _, right in found)
        sections["Checks, 64 rows against float64"] = [(name, text) for name, text, _ in found]
        if extension.library is None:
            faults += 1
    if chosen.json:
        print(json.dumps(sections, indent=2))
    else:
        print("\n\n".join("\n".join([title, *table(rows)]) for title, rows in sections.items()))
    return 1 if faults else 0


def report() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The sections of the report: title, and names with texts."""
    yield "Versions", list(versions())
    yield "Machine", list(machine())
    yield "Compiled extension", list(built())
    for device in devices():
        yield f"Backends for {device.type} tensors", list(served(device))
    yield "Pair functions of your own", list(own_pair_functions())
    yield "Several processes", list(across_processes())


def checked() -> Iterator[tuple[str, str, bool]]:
    """Value and gradient of CLIP on 64 rows by each backend and dtype: name, text, and whether it is right.

    Allowed are 8 eps of the rows' dtype, or of a logit in the dtype that it is accumulated in; in units of the largest gradient.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2, 64, 32, generator=generator, dtype=torch.float64), dim=2)
    for device in devices():
        for name in choice.MODULES:
            for dtype in DTYPES:
                if choice.reason(name, device, dtype) is not None:
                    continue
                x, y = rows.to(device=device, dtype=dtype)
                value, gradient = _clip(x, y, name)
                true_value, true_gradient = _clip(x.double(), y.double(), "reference")
                error = abs(value - true_value) / abs(true_value)
                off = float((gradient.double() - true_gradient).abs().max() / true_gradient.abs().max())
                allowed = 8 * max(torch.finfo(dtype).eps, LOGIT_SCALE * torch.finfo(accumulation_dtype(dtype)).eps)
                right = bool(error <= allowed and off <= allowed)
                verdict = "right" if right else f"WRONG: allowed are {allowed:.0e}"
                label = f"{name}, {str(dtype).removeprefix('torch.')}" + (f", {device}" if device.type != "cpu" else "")
                yield label, f"{verdict} (value off by {error:.0e}, gradient by {off:.0e})", right


def _clip(x: torch.Tensor, y: torch.Tensor, backend: str) -> tuple[float, torch.Tensor]:
    x = x.detach().requires_grad_()
    value = clip(x, y, logit_scale=LOGIT_SCALE, normalize=False, backend=cast(Backend, backend))
    return value.item(), torch.autograd.grad(value, x)[0]


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
    oldest = ".".join(map(str, extension.OLDEST_TORCH))
    yield "built for", f"{facts['machine']}, torch {oldest} and later, any Python"
    yield "compiler", str(facts["compiler"])
    yield "instruction sets", ", ".join(facts["cpu_isas"]) or "none"
    if library:
        yield "usable here", ", ".join(library.usable_isas())
        yield "chosen", chosen_isa(library)
    archs = ", ".join(facts["cuda_archs"])
    yield "CUDA kernels", f"{archs}, by nvcc {facts['nvcc']}" if archs else "none"
    for part, why in facts["left_out"].items():
        yield f"left out: {part}", f"{why['reason']}. To mend it: {why['remedy']}"


def chosen_isa(library: extension.Library) -> str:
    """The instruction set of the CPU kernels, or what is wrong with the one that was asked for."""
    asked = os.environ.get("FASTCL_CPU_ISA")
    try:
        chosen: str = library.chosen_isa()
    except ValueError as error:
        return str(error)
    if asked:
        return f"{chosen} (FASTCL_CPU_ISA={asked})"
    if extension.preferred:
        return f"{chosen} ({extension.preferred.why()}; fastcl tune --forget takes the widest, FASTCL_CPU_ISA another)"
    return f"{chosen} (the widest; fastcl tune measures which is the quickest, FASTCL_CPU_ISA takes another)"


def own_pair_functions() -> Iterator[tuple[str, str]]:
    """Whether they can be compiled into the CPU's kernels, and where what is compiled is kept."""
    if (why := pair_libraries.unavailable()) is not None:
        yield "CPU", f"served in pure PyTorch: {why}"
        return
    command = pair_libraries.compiler() or []
    yield "CPU", f"compiled at first use, by {pair_libraries.version_of(tuple(command))}"
    reason = pair_libraries.unkept()
    yield "kept in", str(pair_libraries.folder()) if reason is None else f"memory, for one process: {reason}"


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
