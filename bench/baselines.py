"""What fastcl is compared with: the strongest honest way to each loss that a PyTorch user has, and whether it can run here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcl.bench.losses import EAGER, SCALE, SIGLIP_BIAS, SIGLIP_SCALE, TEMPERATURE, Method, labels, units
from fastcl.bench.peaks import free_memory
from tests.dropin import originals

from .cases import Case
from .formulas import FASTCL, chunked_clip, linear_cross_entropy, row_chunks, spectral_gram

CHUNKS = (128, 256, 512, 1024, 2048)
MOST_MEMORY = 0.5  # the part of the free memory that a method may take
DROPIN = "make setup  (requirements/dropin.txt)"


@dataclass(frozen=True)
class Baseline:
    """One way to a loss.

    name: in tables. make: from a chunk size (or 0) to the method; it may import a library or compile. choices: the chunk
    sizes to sweep. squares: how many matrices of rows x rows floats it holds at its peak, about; size: its peak bytes from
    (rows, d) where that is no such number. most_rows: above them it takes minutes. module, command: what must be importable,
    and what installs it. ahead: the reason, if it is not beaten. compiles: at its first call, for one shape or formula.
    cuda_only: has no CPU form. never: why it cannot run this case. backend: of fastcl, where one is asked for.
    """

    name: str
    make: Callable[[int], Method]
    choices: tuple[int, ...] = (0,)
    squares: float = 0.0
    size: Callable[[int, int], float] | None = None
    most_rows: int | None = None
    module: str = ""
    command: str = ""
    ahead: str = ""
    compiles: bool = False
    cuda_only: bool = False
    never: str = ""
    backend: str = ""

    def bytes_needed(self, rows: int, d: int) -> float:
        return self.size(rows, d) if self.size else 4.0 * self.squares * rows * rows

    def absent(self, case: Case, free: float | None = None, device: str = "cpu") -> str | None:
        """Why it has no figure for this case, or None when it can run."""
        if self.module == "torch" and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy; {self.command}"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed; {self.command}"
        if self.cuda_only and device != "cuda":
            return f"serves cuda tensors, and these are on {device}"
        if self.never:
            return self.never
        if self.most_rows is not None and case.rows > self.most_rows:
            return f"left out above {self.most_rows:,} rows, where a call takes minutes"
        free, needed = free_memory() if free is None else free, self.bytes_needed(case.rows, case.d)
        if needed > MOST_MEMORY * free:
            return f"needs about {needed / 1e9:,.0f} GB; {MOST_MEMORY:.0%} of the {free / 1e9:,.0f} GB that are free may be used"
        return None


# ---- libraries ------------------------------------------------------------------------------------------------------------


def _open_clip(choice: int) -> Method:
    loss = originals.open_clip().ClipLoss()
    return lambda x, y: loss(*units(x, y), SCALE)


def _open_clip_siglip(choice: int) -> Method:
    loss = originals.open_clip().SigLipLoss()
    return lambda x, y: loss(*units(x, y), SIGLIP_SCALE, SIGLIP_BIAS)


def _lightly(choice: int) -> Method:
    loss = originals.lightly().NTXentLoss(temperature=TEMPERATURE)
    return lambda x, y: loss(x, y)


def _pytorch_metric_learning(choice: int) -> Method:
    loss = originals.pytorch_metric_learning().losses.NTXentLoss(temperature=TEMPERATURE)
    return lambda x, y: loss(torch.cat([x, y]), torch.cat([labels(x), labels(x)]))


def _keops(choice: int) -> Method:
    """LazyTensor never holds the matrix, and compiles one scalar loop a formula: an oracle written by others, not a rival."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it finds and compiles
        import pykeops
        from pykeops.torch import LazyTensor

        pykeops.set_verbose(False)

    def method(x: Tensor, y: Tensor) -> Tensor:
        x, y = units(x, y)
        rows: Any = LazyTensor(x[:, None, :].contiguous())
        z = SCALE * (rows | LazyTensor(y[None, :, :].contiguous()))
        return ((z.logsumexp(1) + z.logsumexp(0)).squeeze(-1) / 2 - SCALE * (x * y).sum(1)).mean()

    return method


# ---- all of one loss ------------------------------------------------------------------------------------------------------


def baselines(loss: str) -> list[Baseline]:
    """fastcl first, then everything that it is held against."""
    whole = "it holds the n x n matrix and so saves the products with which fastcl recomputes it"
    found = [
        Baseline("fastcl", lambda choice: FASTCL[loss]),
        Baseline("eager", lambda choice: EAGER[loss], squares=5 if loss != "kcl" else 9, ahead=whole),
        Baseline(
            "torch.compile", lambda choice: torch.compile(EAGER[loss], dynamic=False), squares=3, compiles=True,
            ahead=whole,
        ),
    ]  # fmt: skip
    if loss == "clip":
        found += [
            Baseline("chunked recompute", chunked_clip, CHUNKS),
            Baseline("open_clip", _open_clip, squares=5, module="open_clip", command=DROPIN),
        ]  # fmt: skip
    else:
        found += [Baseline("row chunks", partial(row_chunks, loss), CHUNKS)] if loss != "spectral" else []
    if loss in ("clip", "info_nce"):
        found.append(
            Baseline(
                "F.linear_cross_entropy", partial(linear_cross_entropy, both=loss == "clip"), CHUNKS, module="torch",
                command='make setup TORCH="torch==2.13.0"',
            )
        )  # fmt: skip
    if loss == "clip":  # last, since it may compile for a minute
        found.append(
            Baseline(
                "KeOps",
                _keops,
                most_rows=1024,
                module="pykeops",
                compiles=True,
                command="pip install --no-deps -r requirements/bench.txt",
            )
        )
    if loss == "siglip":
        found.append(Baseline("open_clip", _open_clip_siglip, squares=6, module="open_clip", command=DROPIN))
    if loss == "nt_xent":
        found.append(Baseline("lightly", _lightly, squares=6, module="lightly", command=DROPIN))
        found.append(
            Baseline(
                "pytorch-metric-learning", _pytorch_metric_learning, module="pytorch_metric_learning", command=DROPIN,
                size=lambda rows, d: 16.5 * rows**3,  # a row of negatives for every positive pair
            )
        )  # fmt: skip
    if loss == "spectral":
        why = "both take the same d x d products, and are bound by their passes over the n x d rows"
        found.append(Baseline("torch Gram", lambda choice: spectral_gram, ahead=why))
        found.append(
            Baseline(
                "torch.compile of the Gram",
                lambda choice: torch.compile(spectral_gram, dynamic=False),
                ahead=why,
                compiles=True,
            )
        )
    return found


def methods(loss: str, n: int) -> dict[str, Callable[[], Method]]:
    """Name -> maker of each method that can run here, with the middle chunk size of those that have one."""
    case = Case("", loss, n, 128, 0)
    present = [baseline for baseline in baselines(loss) if baseline.absent(case) is None]
    return {b.name: partial(b.make, b.choices[len(b.choices) // 2]) for b in present}
