"""Where the Triton backend serves, and the one clear error where it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastcl
from fastcl import triton_kernels
from fastcl.backends.choice import BackendUnavailableError, choose

CPU = torch.device("cpu")


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    with pytest.raises(BackendUnavailableError) as caught:
        choose("triton", device, dtype)
    return str(caught.value)


def test_cpu_tensors_are_refused_outside_interpreter_and_emulator() -> None:
    pytest.importorskip("triton")
    message = refusal(CPU, torch.float32)
    assert message.startswith("backend 'triton' cannot serve cpu tensors of torch.float32: its kernels need a GPU")
    assert "backend='blocked'" in message
    with pytest.raises(BackendUnavailableError, match="its kernels need a GPU"):
        fastcl.pair_reduce(torch.randn(3, 4), torch.randn(5, 4), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_dtypes_that_no_kernel_takes_are_refused(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert "float32, float16 and bfloat16" in refusal(CPU, dtype)


def test_a_cuda_device_that_torch_does_not_see_is_refused() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "no GPU is visible to torch" in refusal(torch.device("cuda"), torch.float32)


def test_other_devices_are_refused() -> None:
    pytest.importorskip("triton")
    assert "these are on xpu" in refusal(torch.device("xpu"), torch.float32)


def test_without_triton_fastcl_imports_and_says_so() -> None:
    """As on Windows and macOS."""
    script = """
import sys
sys.modules["triton"] = None
import fastcl, fastcl.triton_kernels, torch
try:
    fastcl.pair_reduce(torch.randn(3, 4), torch.randn(5, 4), backend="triton")
except fastcl.BackendUnavailableError as error:
    print(error)
print(fastcl.pair_reduce(torch.randn(3, 4), torch.randn(5, 4)).shape)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "Triton is not installed" in out
    assert "`pip install triton` on Linux, or backend='blocked'" in out
    assert "torch.Size([3])" in out


def test_the_module_is_a_backend() -> None:
    for name in ("rows", "gradients", "total", "unavailable"):
        assert callable(getattr(triton_kernels, name))
