"""The committed record of what nvcc made of the CUDA kernels; `make test-cuda-build` holds a build to it."""

from __future__ import annotations

import re

import pytest

from .compiled import RECORD, Kernel, recorded, regressions
from .emulation import CSRC

needs_record = pytest.mark.skipif(
    not RECORD.exists(),
    reason="no build is recorded yet: make test-cuda-build, then python -m tests.cuda.compiled build/cuda-*",
)
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]


@needs_record
def test_every_kernel_for_every_architecture_without_spills() -> None:
    record = recorded()
    names = {arch: {key.split(" ", 1)[1] for key in record if key.startswith(arch + " ")} for arch in ARCHITECTURES}
    assert all(names[arch] == names["sm_80"] for arch in ARCHITECTURES)
    assert not [key for key, kernel in record.items() if kernel.spills or kernel.blocks < 1]
    pairs = re.findall(r"::fastcl::pairs::(\w+)", (CSRC / "generated" / "pairs.h").read_text())
    for kernel in ("reduce_sum<float, {}>", "reduce_sum<double, {}>", "weigh<float, SumWeights<float, {}> >"):
        assert {kernel.format(pair) for pair in pairs} <= names["sm_80"]
    limited = {name for name in names["sm_80"] if "_limited" in name}
    kernels = ("reduce_sum_limited<{}>", "reduce_logsumexp_limited<{}>", "weigh_limited<{}, false>", "weigh_limited<{}, true>")
    assert limited == {kernel.format(dtype) for kernel in kernels for dtype in ("float", "double")}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "not in this build"),
        ({"sm_80 k": Kernel(40, 0, 0, 0, 8), "sm_80 l": Kernel(40, 0, 0, 0, 8)}, "not in the record"),
        ({"sm_80 k": Kernel(40, 16, 0, 0, 8)}, "spills, stack 16"),
        ({"sm_80 k": Kernel(49, 0, 0, 0, 8)}, "is \\(49"),
        ({"sm_80 k": Kernel(40, 0, 0, 0, 7)}, "is \\(40, 0, 0, 0, 7"),
    ],
)
def test_a_regression_is_named(found: dict[str, Kernel], said: str) -> None:
    before = {"sm_80 k": Kernel(40, 0, 0, 0, 8)}
    assert not regressions(before, before)
    assert re.search(said, "\n".join(regressions(found, before)))
