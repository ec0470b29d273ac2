"""The launches of csrc/cuda/sm_90a/launch.h on CPU tensors: their structs in ctypes, and the PTX under tools/ptxemu."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastcl.equation.problem import Problem
from tools.ptxemu import nvcc
from tools.ptxemu.stats import Stats

from . import fused_launching as fused
from .fused_launching import CSRC, I32, I64, Launcher, P, Struct, Weights, equation, sides

EXTRA = ("-std=c++20", "--expt-relaxed-constexpr")
LOG2E = math.log2(math.e)


class Tiles(Struct):
    _fields_: ClassVar = [
        ("equation", fused.Equation), ("sides", fused.Sides), ("x0", I64), ("y0", I64), ("ctas", I64), ("splits", I64),
        ("triangle", I32), ("both", I32), ("reference", P), ("row_parts", P), ("col_parts", P),
        ("value_parts", P), ("x_factors", P), ("y_factors", P), ("single", P), ("unit", P), ("peaks", P), ("weights", P),
        ("pitch", I64), ("wy", P), ("wy_columns", I64),
    ]  # fmt: skip


class Product(Struct):
    _fields_: ClassVar = [
        ("weights", P), ("m", I64), ("n", I64), ("pitch", I64), ("transposed", I32), ("dtype", I32), ("z", P), ("z_stride", I64),
        ("d", I64), ("unit", P), ("splits", I64), ("out", P), ("columns", I64),
    ]  # fmt: skip


class HopperMerge(Struct):
    _fields_: ClassVar = [
        ("row_parts", P), ("col_parts", P), ("splits", I64), ("ctas", I64), ("size", I64), ("block", I64), ("logsumexp", I32),
        ("reference", P), ("shift", P), ("out", P), ("doubtful", P),
    ]  # fmt: skip


class Careful(Struct):
    _fields_: ClassVar = [("rows", fused.Rows), ("doubtful", P)]


class Replace(Struct):
    _fields_: ClassVar = [("merge", HopperMerge), ("careful", fused.Merge)]


@functools.cache
def everything() -> nvcc.HostLibrary:
    """All launches of the folder, and those of the fused form that go with them."""
    return _library(*sorted(CSRC.glob("cuda/sm_90a/*.cu")), *sorted(CSRC.glob("cuda/fused*.cu")))


@functools.cache
def few(folder: Path = CSRC) -> nvcc.HostLibrary:
    """The launches of hopper_few.cu, with the headers of `folder`: quick to compile, and so to compile again with a mistake."""
    return _library(Path(__file__).with_name("hopper_few.cu"), include=folder)


def _library(*sources: Path, include: Path = CSRC) -> nvcc.HostLibrary:
    return nvcc.load_host_library(*sources, arch="sm_90a", include_dirs=[include, include / "cuda"], extra=EXTRA)


class Shape(NamedTuple):
    """How a sweep is cut up."""

    ctas: int = 2
    splits: int = 1


def general(p: Problem, sums: bool = False) -> bool:
    terms = p.operand == "sqdist" or p.bias_x is not None or p.bias_y is not None
    return p.reduce == "sum" or sums or terms or p.mask.kind.endswith("groups")


def block(p: Problem, weights: bool = False, sums: bool = False) -> int:
    """hopper_block of launch.h."""
    d = p.x.shape[1]
    if general(p, sums):
        return 128
    if weights:
        return 256 if d <= 256 or d > 768 else 128
    return 256 if d <= 384 or d > 768 else 192 if d <= 512 else 128


def bound(p: Problem) -> Tensor:
    """The reference of a log-sum-exp: 60 under what no z exceeds but for the shift, in base 2."""
    y = p.x if p.y is None else p.y
    nx, ny = (t.float().norm(dim=1).max() for t in (p.x, y))
    a = p.scale.float()
    z = a.abs() * nx * ny if p.operand == "dot" else a.clamp_min(0) * (nx + ny) ** 2
    for b in (p.bias_x, p.bias_y):
        z = z if b is None else z + b.amax()
    return (z * LOG2E - 60).ceil().reshape(1)


def rows(launch: Launcher, p: Problem, shape: Shape = Shape()) -> tuple[Tensor, Tensor | None, bool, Stats]:  # noqa: B008
    """r, c when asked, whether the guard saw a small sum, and what the sweep counted."""
    n, m, triangle, lse = p.n, p.m, p.y is None, p.reduce == "logsumexp"
    ctas = min(shape.ctas, -(-n // block(p)))
    reference, doubtful = bound(p) if lse else None, torch.zeros(1, dtype=torch.int32)
    row_parts = torch.empty(shape.splits, n)
    col_parts = torch.empty(ctas, m) if p.columns or triangle else None
    stats = launch(
        "hopper_rows", Tiles, fresh=[t for t in (row_parts, col_parts) if t is not None], equation=equation(p), sides=sides(p),
        ctas=ctas, splits=shape.splits, triangle=triangle, reference=reference, row_parts=row_parts, col_parts=col_parts,
    )[0]  # fmt: skip
    merge = {"splits": shape.splits, "ctas": ctas, "block": block(p) if triangle else 0, "logsumexp": lse}

    def merged(size: int, **parts: Tensor | None) -> Tensor:
        out = torch.empty(size)
        launch(
            "hopper_merge", HopperMerge, fresh=[out], inout=[doubtful], size=size, reference=reference, shift=p.shift, out=out,
            doubtful=doubtful, **merge, **parts,
        )  # fmt: skip
        return out

    r = merged(n, row_parts=row_parts, col_parts=col_parts if triangle else None)
    return r, merged(m, col_parts=col_parts) if p.columns else None, bool(doubtful), stats


class Strip(NamedTuple):
    """What hopper_weights gives: W as (m, n), W 1, W^T 1, the column sums of f, and what it counted."""

    weights: Tensor
    w_rows: Tensor | None
    w_cols: Tensor | None
    values: Tensor | None
    peak: Tensor | None
    stats: Stats


def weigh(
    launch: Launcher, p: Problem, w: Weights, shape: Shape = Shape(), sums: bool = False,  # noqa: B008
    corner: tuple[int, int, int, int] | None = None, unit: Tensor | None = None, peaks: bool = False,
    wy: Tensor | None = None,
) -> Strip:  # fmt: skip
    """`corner`: rows [i0, i1) of x and [j0, j1) of y alone; `wy`: hopper_sweep, which adds W Y to it."""
    x, y = p.x, p.x if p.y is None else p.y
    i0, i1, j0, j1 = corner or (0, p.n, 0, p.m)
    x_factors, y_factors = torch.empty(-(-p.n // 128) * 128, 2), torch.empty(-(-p.m // 128) * 128, 2)
    single = torch.ones(1, dtype=torch.int32)
    launch(
        "fused_factors", fused.Factors, fresh=[x_factors, y_factors], inout=[single], weighting=w._asdict(), n=p.n, m=p.m,
        logsumexp=p.reduce == "logsumexp", x_factors=x_factors, y_factors=y_factors, single=single,
    )  # fmt: skip
    xs, ys, lse = x[i0:i1], y[j0:j1], p.reduce == "logsumexp"
    n, m = len(xs), len(ys)
    ctas = min(shape.ctas, -(-n // (128 if wy is not None else block(p, True, sums))))
    pitch = -(-n // 8) * 8
    strip = torch.empty(m, pitch, dtype=x.dtype)
    w_rows, w_cols = (torch.empty(shape.splits, n), torch.empty(ctas, m)) if sums else (None, None)
    values = torch.empty(ctas, m) if sums and not lse else None
    top = torch.empty(8 * shape.splits, ctas) if peaks else None
    where = {**sides(p), "x": xs, "y": ys, "n": n, "m": m}
    stats = launch(
        "hopper_weights" if wy is None else "hopper_sweep", Tiles, inout=[] if wy is None else [wy],
        fresh=[t for t in (strip, w_rows, w_cols, values, top) if t is not None], equation=equation(p), sides=where,
        x0=i0, y0=j0, ctas=ctas, splits=shape.splits, both=w.g is not None and w.h is not None, reference=w.reference,
        row_parts=w_rows, col_parts=w_cols, value_parts=values, x_factors=x_factors, y_factors=y_factors, single=single, unit=unit,
        peaks=top, weights=None if peaks else strip, pitch=pitch, wy=wy, wy_columns=None if wy is None else wy.shape[1],
    )[0]  # fmt: skip
    summed = [None if t is None else t.sum(0) for t in (w_rows, w_cols, values)]
    return Strip(strip[:, :n], *summed, None if top is None else top.max(), stats)


def multiply(
    launch: Launcher, w: Tensor, z: Tensor, transposed: bool, splits: int = 1, **more: object
) -> tuple[Tensor, Stats]:
    """1 + A z, or the sum of the parts of several splits: A is the strip w, or its transpose."""
    rows, d = w.shape[1 if transposed else 0], z.shape[1]
    out = torch.ones(rows, d) if splits == 1 else torch.empty(splits, rows, d)
    given = {
        "m": w.shape[0], "n": w.shape[1], "pitch": w.stride(0), "z_stride": z.stride(0), "d": d, "splits": splits,
        "dtype": fused.DTYPES[z.dtype],
    }  # fmt: skip
    stats = launch(
        "hopper_product", Product, inout=[out] if splits == 1 else [], fresh=[] if splits == 1 else [out], weights=w, z=z,
        transposed=transposed, out=out, columns=d, **given | more,
    )[0]  # fmt: skip
    return out if splits == 1 else 1 + out.sum(0), stats
