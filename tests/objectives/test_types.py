"""What a type checker makes of the modules: every setting that a constructor takes, and none that it does not."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

from fastcl import losses

from .test_modules import MODULES

ROOT = Path(__file__).parents[2]
NAMES = sorted(cls.__name__ for cls in MODULES.values())


def mypy(source: str, tmp_path: Path) -> list[str]:
    """What mypy says of a user's file, a line for each error; the cache is the one that `make lint` fills."""
    file = tmp_path / "user.py"
    file.write_text("import torch, fastcl\nfrom fastcl import functional, losses\n" + source)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if ": error:" in line]


def defaults(name: str) -> str:
    """A call of the constructor that names every setting, with its default."""
    parameters = inspect.signature(getattr(losses, name)).parameters
    given = (f"{key}={8 if p.default is p.empty else p.default!r}" for key, p in parameters.items())
    return f"losses.{name}({', '.join(given)})"


def required(name: str) -> str:
    """What a call of the constructor must begin with."""
    return "8, " * sum(p.default is p.empty for p in inspect.signature(getattr(losses, name)).parameters.values())


def test_constructors_take_every_setting_and_nothing_else(tmp_path: Path) -> None:
    right = [defaults(name) for name in NAMES] + [f"losses.{n}({required(n)}backend='cpu')" for n in NAMES]
    right += ["losses.InfoNCELoss(temperature=torch.ones(()))", "losses.CLIPLoss(logit_scale=losses.LogitScale(2.0))"]
    rows = "torch.eye(4), torch.eye(4)"
    right += [  # what comes back follows from what is asked for
        f"fastcl.pair_reduce({rows}, scale=2.0).sum()",
        f"fastcl.pair_reduce({rows}, columns=True)[1].sum()",
        f"functional.f_micl({rows}, divergence='js').backward()",
        f"functional.f_micl({rows}, return_terms=True).positive",
    ]
    wrong = [f"losses.{n}({required(n)}bakend='cpu')" for n in NAMES]
    wrong += [f"losses.{n}({required(n)}backend='gpu', reduction='max')" for n in NAMES]
    wrong += [f"fastcl.pair_reduce({rows}, {what})" for what in ("operand='dott'", "colums=True")]
    wrong += [f"functional.f_micl({rows}, divergence='kll')", "functional.cilp", "losses.ClipLoss", "fastcl.clip"]
    wrong += ["losses.MINCLoss()", "losses.CLIPLoss(normalize='yes')", "losses.KCLLoss(0.5)"]
    said = mypy("\n".join([*right, *wrong]) + "\n", tmp_path)
    first = 3 + len(right)
    assert [line for line in said if int(line.split(":")[1]) < first] == []
    assert {int(line.split(":")[1]) for line in said} == set(range(first, first + len(wrong)))
