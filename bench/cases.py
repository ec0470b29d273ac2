"""The named cases: a loss, a shape, and the matrix products that its work is counted in (2 n m d flops each)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcl.bench.measuring import views
from fastcl.bench.peaks import WARM_ROWS


@dataclass(frozen=True)
class Case:
    """n rows a view, d columns; `gemms` of size n x n x d (2n x 2n x d for nt_xent) that forward and backward take at least.

    weight: its part of a time budget, about the seconds that it takes on two idle cores of 2021.
    """

    name: str
    loss: str
    n: int
    d: int
    gemms: float
    weight: float = 1.0

    @property
    def rows(self) -> int:
        """Rows of the pair matrix: both views at once for nt_xent."""
        return 2 * self.n if self.loss == "nt_xent" else self.n

    @property
    def flops(self) -> float:
        return self.gemms * 2.0 * self.rows * self.rows * self.d

    def resized(self, n: int, d: int | None = None) -> Case:
        """The same loss at another size; products that are d x d (Gram) stay so."""
        gemms = self.gemms * (d or self.d) * self.n / (self.d * n) if self.loss == "spectral" else self.gemms
        return replace(self, n=n, d=d or self.d, gemms=gemms)

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Two views of one batch."""
        return views(self.n, self.d, dtype, device)

    def warm_inputs(self, compiles: bool) -> tuple[Tensor, Tensor]:
        """For a first call: a few rows, or all where a method compiles for one shape."""
        return self.inputs() if compiles else self.resized(min(self.n, WARM_ROWS)).inputs()


# GEMM counts: rows and columns 4; one direction 3; x with itself 2 (log-sum-exp) or 3/2 (sum), twice for both views;
# the d x d route of a quadratic loss 6. In the order in which they are measured.
CASES = {
    case.name: case
    for case in (
        Case("clip-8k", "clip", 8192, 128, 4, weight=50),
        Case("simclr-4k", "nt_xent", 4096, 128, 2, weight=40),
        Case("fmicl-js-8k", "f_micl_js", 8192, 128, 1.5, weight=28),
        Case("clip-8k-wide", "clip", 8192, 512, 4, weight=78),
        Case("spectral-64k", "spectral", 65536, 128, 6 * 128 / 65536, weight=24),
        Case("siglip-16k", "siglip", 16384, 128, 3, weight=64),
        Case("kcl-8k", "kcl", 8192, 128, 3, weight=40),
        Case("info-nce-8k", "info_nce", 8192, 128, 3, weight=32),
        Case("clip-32k", "clip", 32768, 128, 4, weight=92),
        Case("clip-2k", "clip", 2048, 128, 4, weight=14),
        Case("clip-1k", "clip", 1024, 128, 4, weight=26),
        Case("simclr-256", "nt_xent", 256, 128, 2, weight=20),
    )
}
HEADLINE = (
    "clip-8k",
    "clip-8k-wide",
    "simclr-4k",
    "siglip-16k",
    "fmicl-js-8k",
    "spectral-64k",
    "clip-1k",
    "simclr-256",
)
