"""Run the backend on an emulated GPU: the PTX that Triton's compiler makes for it, every check of tools/ptxemu on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tools.ptxemu import triton as ptxemu_triton

# `make test-gpu-emulated` runs everything; a plain test run takes what fits a few minutes.
EVERYTHING = os.environ.get("FASTCL_GPU_EMULATED") == "all"


@contextmanager
def emulated(arch: int, seed: int = 0, **options: object) -> Iterator[ptxemu_triton.Session]:
    """Triton compiles for compute capability `arch` / 10 and runs on the CPU, in a schedule that `seed` picks.

    Memory that nobody wrote counts as uninitialised: what torch.empty gave, until torch or a kernel has written it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = ptxemu_triton.activate(arch, seed=seed, **options)
    fresh: list[Tensor] = []
    original = torch.Tensor.new_empty

    def new_empty(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        fresh.append(original(self, *args, **kwargs))
        return fresh[-1]

    session.uninitialized = _Unwritten(fresh, session.written)  # type: ignore[assignment]
    torch.Tensor.new_empty = new_empty  # type: ignore[assignment]
    try:
        with session:
            yield session
    finally:
        torch.Tensor.new_empty = original  # type: ignore[method-assign]


class _Unwritten:
    """The tensors that neither torch nor a launched kernel was given to write; asked for at each launch."""

    def __init__(self, fresh: list[Tensor], written: set[int]) -> None:
        self.fresh, self.written = fresh, written

    def __iter__(self) -> Iterator[Tensor]:
        for t in self.fresh:
            # torch counts its own writes to a tensor in _version; a kernel's writes it does not see.
            if t.numel() and t._version == 0 and t.untyped_storage().data_ptr() not in self.written:
                yield t
