"""The named cases: a loss, a shape, and the matrix products that its work is counted in (2 n m d flops each)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """n rows a view, d columns; `gemms` of size n x n x d (2n x 2n x d for nt_xent) that forward and backward take at least."""

    name: str
    loss: str
    n: int
    d: int
    gemms: float

    @property
    def flops(self) -> float:
        rows = 2 * self.n if self.loss == "nt_xent" else self.n
        return self.gemms * 2.0 * rows * rows * self.d

    def resized(self, n: int) -> Case:
        return Case(self.name, self.loss, n, self.d, self.gemms)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Two views of one batch, with cosines of positives about 0.45: the loss is neither at chance nor near zero.

        Near zero the baselines lose digits that fastcl keeps (the positive stays outside its reduction): not the point here.
        """
        generator = torch.Generator().manual_seed(self.n * 1000 + self.d)
        x = torch.randn(self.n, self.d, generator=generator)
        y = x + 2.0 * torch.randn(self.n, self.d, generator=generator)
        return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


# GEMM counts: rows and columns 4; one direction 3; x with itself 2 (log-sum-exp) or 3/2 (sum), twice for both views.
CASES = {
    case.name: case
    for case in (
        Case("clip-8k", "clip", 8192, 128, 4),
        Case("clip-8k-wide", "clip", 8192, 512, 4),
        Case("clip-2k", "clip", 2048, 128, 4),
        Case("info-nce-8k", "info_nce", 8192, 128, 3),
        Case("simclr-4k", "nt_xent", 4096, 128, 2),
        Case("siglip-8k", "siglip", 8192, 128, 3),
        Case("fmicl-js-8k", "f_micl_js", 8192, 128, 1.5),
        Case("kcl-8k", "kcl", 8192, 128, 3),
        Case("spectral-64k", "spectral", 65536, 128, 6 * 128 / 65536),
    )
}
HEADLINE = ("clip-8k", "clip-8k-wide", "simclr-4k", "fmicl-js-8k")
