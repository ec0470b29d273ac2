"""The installed extension of a CUDA build of torch, on a machine without a GPU: `make test-cuda-build` runs it there.

python -I tests/cuda/built.py FOLDER    FOLDER holds the objects of the build
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import compiled
import torch

import fastcl
from fastcl import doctor
from fastcl.backends import choice, extension


def is_built_linked_and_opened() -> str:
    """libfastcl_cuda with every architecture that setup.py lists, in under fifteen minutes of two idle cores.

    Counted in the compilers' own seconds: beside other jobs a build of nine minutes had taken thirty.
    """
    facts = extension.facts()
    assert extension.library is not None, extension.reason
    assert extension.cuda_reason is None, extension.cuda_reason
    assert facts is not None and facts["nvcc"], facts
    assert len(facts["cuda_archs"]) >= 4, facts["cuda_archs"]
    assert facts["compilers_seconds"] < 2 * 900, f"the compilers took {facts['compilers_seconds']} s"
    for op in (
        "strip_reduce",
        "strip_weights",
        "strip_reduce_limited",
        "strip_weights_limited",
        "merge_parts",
        "fused_rows",
        "fused_gradient",
        "hopper_rows",
        "hopper_sweep",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcl::{op}", "CUDA"), op
    took = f"built in {facts['seconds']} s, {facts['compilers_seconds']} s of compilers"
    return f"torch {torch.__version__}, nvcc {facts['nvcc']}, {', '.join(facts['cuda_archs'])}: {took}"


def it_calls_torch_by_its_stable_interface_alone() -> str:
    """Of torch the C functions that csrc declares; the CUDA runtime within, no libcuda, no cuBLAS, no Python, an old glibc."""
    library = Path(fastcl.__file__).with_name(extension.CUDA)
    header = Path(__file__).parents[2] / "csrc" / "torch_abi.h"
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", header.read_text())) | {
        "aoti_torch_get_current_cuda_stream"
    }
    undefined = {line.split()[-1].partition("@")[0] for line in run("nm", "-D", "--undefined-only", str(library))}
    torchs = {name for name in undefined if "torch" in name}
    assert torchs <= declared, torchs - declared
    strange = [name for name in undefined if re.match(r"_ZN?K?\d*(?:2at|3c10|5torch)|_?Py|cuda|cu[A-Z]|cublas", name)]
    assert not strange, strange
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", str(library))}
    assert not [name for name in exported if name.startswith("cuda")], exported
    versions = set(re.findall(r"@GLIBC_2\.(\d+)", "\n".join(run("nm", "-D", "--undefined-only", str(library)))))
    assert max(map(int, versions)) <= 28, f"needs glibc 2.{max(map(int, versions))}: csrc/cuda/glibc"
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", "\n".join(run("readelf", "-d", str(library))))
    assert not [name for name in needed if re.match(r"libcu|libc10|libtorch\.|libtorch_python|libpython", name)], needed
    return f"{len(torchs)} functions of torch; {', '.join(needed)}; {library.stat().st_size >> 20} MB"


def run(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def cpu_tensors_go_to_the_cpu_kernels() -> str:
    """The same extension serves them, and rightly."""
    x, y = (torch.randn(50, 8).requires_grad_() for _ in range(2))
    assert choice.choose(None, x.device, x.dtype)[0] == "cpu"
    answers = []
    for backend in ("auto", "reference"):
        loss = fastcl.functional.clip(x, y, logit_scale=5.0, backend=backend)
        answers.append([loss.detach(), *torch.autograd.grad(loss, (x, y))])
    for mine, truth in zip(*answers, strict=True):
        torch.testing.assert_close(mine, truth)
    return f"clip of 50 rows: {answers[0][0].item():.6f}"


def without_a_driver_the_error_is_clear() -> str:
    """By name, by device, and from the doctor."""
    if torch.cuda.is_available():
        return "a GPU is here: nothing to refuse"
    x = torch.randn(4, 3)
    why = choice.reason("cuda", torch.device("cuda"), torch.float32)
    assert why is not None and "no GPU is visible to torch" in why, why
    for refused, error in (
        (lambda: fastcl.functional.clip(x, x, logit_scale=1.0, backend="cuda"), choice.BackendUnavailableError),
        (lambda: fastcl.functional.clip(x.cuda(), x.cuda(), logit_scale=1.0), RuntimeError),
    ):
        said = "served without a GPU"
        try:
            refused()
        except error as raised:
            said = str(raised)
        assert re.search(r"cuda|CUDA|NVIDIA", said), said
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        doctor.main([])
    assert "Backends for cuda tensors" in printed.getvalue(), printed.getvalue()
    assert "no GPU is visible to torch" in printed.getvalue(), printed.getvalue()
    return why


def nothing_spills_and_nothing_has_grown() -> str:
    """Against the committed record of registers, stack, shared memory and occupancy."""
    found = compiled.read(Path(sys.argv[1]))
    lost = compiled.regressions(found, compiled.recorded())
    assert not lost, "\n".join(lost)
    record = (
        "as recorded"
        if compiled.RECORD.exists()
        else f"NOT COMPARED: no record, python -m tests.cuda.compiled {sys.argv[1]}"
    )
    return f"{len(found)} kernels, {record}"


if __name__ == "__main__":
    for check in (
        is_built_linked_and_opened,
        it_calls_torch_by_its_stable_interface_alone,
        cpu_tensors_go_to_the_cpu_kernels,
        without_a_driver_the_error_is_clear,
        nothing_spills_and_nothing_has_grown,
    ):
        print(f"{check.__name__.replace('_', ' ')}: {check()}", flush=True)
