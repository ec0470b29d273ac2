"""Importing fastcl prints nothing and changes nothing of the process but the modules that are loaded."""

from __future__ import annotations

import json
import sys

import pytest

from .conftest import ROOT, run
from .test_installs import ONE_OP

pytestmark = pytest.mark.slow

STATE = """
import json, os, random, signal, sys, threading, warnings
import numpy, torch, torch._dynamo, torch.library

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "random": torch.random.get_rng_state().tolist(),
        "other random": (repr(random.getstate()), repr(numpy.random.get_state())),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "denormals": float(torch.tensor(1e-310, dtype=torch.float64) * 1),
        "precision": torch.get_float32_matmul_precision(),
        "warnings": [repr(entry) for entry in warnings.filters],
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "signals": [repr(signal.getsignal(number)) for number in signal.valid_signals()],
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(warnings.showwarning)],
        "numpy errors": numpy.geterr(),
        "cuda": torch.cuda.is_initialized(),
    }

before = state()
print("BEFORE")
import fastcl, fastcl.functional, fastcl.losses
print("AFTER")
after = state()
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def test_import_is_quiet_and_changes_nothing() -> None:
    said = run([sys.executable, "-W", "always", "-c", STATE], ROOT)
    quiet, _, changed = said[said.index("BEFORE") + len("BEFORE\n") :].partition("AFTER\n")
    assert quiet == ""
    assert json.loads(changed) == {}


@pytest.mark.parametrize("extra", [["triton"], ["numpy"], ["numpy", "triton"]])
def test_torch_alone_is_enough(extra: list[str]) -> None:
    """Neither the import nor the doctor nor a loss needs a package of the extras."""
    absent = ["matplotlib", "sklearn", "tqdm", "pytest", "open_clip", "lightly", *extra]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent}, None))\n{ONE_OP}"
    program += "import fastcl.functional, fastcl.losses\nfrom fastcl.__main__ import main; main(['doctor'])"
    assert "Backends for cpu tensors" in run([sys.executable, "-c", program], ROOT)


def test_import_loads_no_module_of_torch_that_torch_has_not_loaded() -> None:
    """torch._dynamo, and sympy with it, takes longer to import than torch itself; one decorator had brought it."""
    program = "import sys, torch; before = set(sys.modules); import fastcl; print(*sorted(set(sys.modules) - before))"
    modules = run([sys.executable, "-c", program], ROOT).split()
    came = {name.split(".")[0] for name in modules}
    assert "fastcl" in came
    assert came & {"torch", "sympy", "numpy", "triton", "networkx"} == set()
    # Losses and metrics come at first use: half of what there is, and with it a pass of Python's collector over all of torch.
    late = ("fastcl.functional", "fastcl.losses", "fastcl.metrics", "fastcl.dropin", "fastcl.bench", "fastcl.doctor")
    assert not [name for name in modules if name.startswith(late)]


def test_what_comes_at_first_use_is_there() -> None:
    program = "import fastcl; print(fastcl.losses.CLIPLoss.__name__, fastcl.metrics.rank.__name__, *sorted(dir(fastcl)))"
    said = run([sys.executable, "-c", program], ROOT).split()
    assert said[:2] == ["CLIPLoss", "rank"]
    assert {"losses", "metrics", "functional"} <= set(said)


def test_first_use_may_be_in_a_compiled_graph() -> None:
    program = """
import torch, fastcl
x = torch.randn(8, 3, requires_grad=True)
torch.compile(lambda x: fastcl.functional.nt_xent(x, x.flip(0)), backend="aot_eager", fullgraph=True)(x).backward()
print(bool(x.grad.isfinite().all()))"""
    assert run([sys.executable, "-c", program], ROOT).split()[-1] == "True"
