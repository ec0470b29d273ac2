"""An installed fastcl, in an environment of torch and nothing more: `make test-wheel` runs it.

python tests/packaging/installed.py [--without-kernels]
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("error", "fastcl", RuntimeWarning)  # of its own: torch 2.15 warns of Python 3.13.0

import torch  # noqa: E402

import fastcl  # noqa: E402
from fastcl import doctor  # noqa: E402
from fastcl.backends import choice, extension  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # the tests' tables; behind what is installed, so that the sources here shadow nothing

from tests.objectives.cases import CASES  # noqa: E402

WITHOUT_KERNELS = "--without-kernels" in sys.argv


def it_is_the_installed_one() -> str:
    """Not the sources beside this file; the kernels are in use, or what they need is said, at first use once."""
    assert not Path(fastcl.__file__).is_relative_to(ROOT / "fastcl"), fastcl.__file__
    if not WITHOUT_KERNELS:
        assert extension.library is not None, extension.reason
        return f"kernels: {extension.library.chosen_isa()}"
    assert extension.library is None and "need torch 2.10 or later" in str(extension.reason), extension.reason
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            fastcl.pair_reduce(torch.ones(3, 2))
    assert sum("need torch 2.10 or later" in str(w.message) for w in said) == 1, said
    assert "need torch 2.10 or later" in dict(doctor.built())["in use"]
    return str(extension.reason)


def cuda_kernels_are_there_where_torch_can_run_them() -> str:
    """Opened, and on a machine without a GPU too; or the reason, without a warning."""
    facts = extension.facts()
    assert facts is not None
    made, here = (re.match(r"\d+", str(version)) for version in (facts["nvcc"], torch.version.cuda))
    fits = not WITHOUT_KERNELS and made is not None and here is not None and int(made[0]) <= int(here[0])
    assert (extension.cuda_reason is None) == fits, extension.cuda_reason
    for op in ("strip_reduce", "fused_rows", "fused_gradient", "hopper_sweep") if fits else ():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcl::{op}", "CUDA"), op
    return str(
        extension.cuda_reason or f"opened under CUDA {torch.version.cuda}; built for {', '.join(facts['cuda_archs'])}"
    )


def every_objective_is_right() -> str:
    """Value and gradients in float32 by each backend, beside the reference in float64."""
    served = [name for name in choice.MODULES if choice.reason(name, torch.device("cpu"), torch.float32) is None]
    assert set(served) >= {"reference", "blocked", *(() if WITHOUT_KERNELS else ("cpu",))}, served
    for case in CASES:
        rows = case.rows_of(9, 5)
        arguments = case.arguments(0, 9, 5, rows[0])
        answers = {}
        for backend in ("truth", *(served if case.backend else ("auto",))):
            dtype = torch.float64 if backend == "truth" else torch.float32
            leaves = [x.detach().to(dtype).requires_grad_() for x in rows]
            given = dict(arguments)
            if case.backend:
                given["backend"] = "reference" if backend == "truth" else backend
            value = getattr(fastcl.functional, case.name)(*leaves, **given)
            value = value if isinstance(value, torch.Tensor) else value[0]
            answers[backend] = [value, *torch.autograd.grad(value, leaves, allow_unused=True)]
        for backend, found in answers.items():
            for got, want in zip(found, answers["truth"], strict=True):
                if want is not None:
                    off = (got.double() - want).abs().max() / want.abs().max().clamp_min(1.0)
                    assert off < 1e-4, (case.id, backend, float(off))
    return f"{len(CASES)} by {', '.join(served)}"


def it_compiles_in_one_graph() -> str:
    """torch.compile(fullgraph=True), forward and backward; a torch before 2.10 may break the graph."""
    x, y = (torch.randn(12, 5).requires_grad_() for _ in range(2))
    loss = lambda x, y: fastcl.functional.clip(x, y, logit_scale=5.0)  # noqa: E731
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=not WITHOUT_KERNELS)
    for got, want in zip(*(torch.autograd.grad(f(x, y), (x, y)) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(got, want)
    return "as eager"


def on_rank(rank: int, folder: str) -> None:
    """One of two processes: the loss over both is that of one process with all rows."""
    if WITHOUT_KERNELS:  # what it says of them was looked at above
        warnings.simplefilter("ignore", RuntimeWarning)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, y = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    mine = [t[4 * rank : 4 * rank + 4].clone().requires_grad_() for t in (x, y)]
    loss = fastcl.functional.clip(*mine, logit_scale=5.0, group=torch.distributed.group.WORLD)
    loss.backward()
    torch.testing.assert_close(loss.detach(), fastcl.functional.clip(x, y, logit_scale=5.0))
    torch.distributed.destroy_process_group()
    # gloo's threads can abort an interpreter that ends while they do: seen once, on the first run under a new torch.
    os._exit(0)


def two_ranks_agree() -> str:
    """Over gloo."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (folder,), 2)
    return "as one process"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, fastcl {fastcl.__version__}", flush=True)
    for check in (
        it_is_the_installed_one,
        cuda_kernels_are_there_where_torch_can_run_them,
        every_objective_is_right,
        it_compiles_in_one_graph,
        two_ranks_agree,
    ):
        print(f"  {check.__name__.replace('_', ' ')}: {check()}", flush=True)
