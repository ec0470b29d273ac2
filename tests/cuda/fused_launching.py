"""The fused launches of csrc/cuda/fused.h on CPU tensors: their structs in ctypes, and the PTX under tools/ptxemu."""

from __future__ import annotations

import ctypes
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.backends import reference
from fastcl.equation.masks import KINDS as MASKS
from fastcl.equation.problem import OPERANDS, REDUCTIONS, Problem
from tools.ptxemu import nvcc
from tools.ptxemu.errors import from_fault
from tools.ptxemu.module import DeviceMemory, make_options
from tools.ptxemu.stats import Stats

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# The kernels know a pair function by its place in this list.
PAIRS = re.findall(r'^  X\("(\w+)"', (CSRC / "generated" / "pairs.h").read_text(), re.MULTILINE)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

P, I64, I32, F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


class Struct(ctypes.Structure):
    """A launch's argument; tensors may be given for its pointers."""


class Equation(Struct):
    _fields_ = [
        ("operand", I32), ("mask", I32), ("reduce", I32), ("pair", I32), ("constants", F64 * 2), ("diff", I64), ("period", I64),
        ("scale", P), ("shift", P), ("norm_x", P), ("norm_y", P), ("bias_x", P), ("bias_y", P), ("group_x", P), ("group_y", P),
    ]  # fmt: skip


class Weighting(Struct):
    _fields_ = [("g", P), ("h", P), ("r", P), ("c", P), ("reference", P)]


class Sides(Struct):
    _fields_ = [
        ("x", P), ("y", P), ("x_stride", I64), ("y_stride", I64), ("n", I64), ("m", I64), ("d", I64), ("dtype", I32),
    ]  # fmt: skip


class Rows(Struct):
    _fields_ = [
        ("equation", Equation), ("sides", Sides), ("ctas", I64), ("splits", I64), ("row_parts", P), ("col_parts", P),
        ("triangle", I32), ("resident", I32), ("stages", I32),
    ]  # fmt: skip


class Merge(Struct):
    _fields_ = [
        ("row_parts", P), ("col_parts", P), ("splits", I64), ("ctas", I64), ("size", I64), ("triangle", I32),
        ("logsumexp", I32), ("out", P),
    ]  # fmt: skip


class Factors(Struct):
    _fields_ = [
        ("weighting", Weighting), ("n", I64), ("m", I64), ("logsumexp", I32), ("x_factors", P), ("y_factors", P), ("single", P),
    ]  # fmt: skip


class Gradient(Struct):
    _fields_ = [
        ("equation", Equation), ("sides", Sides), ("x_factors", P), ("y_factors", P), ("single", P), ("wy", P), ("w_rows", P),
        ("values", P),
    ]  # fmt: skip


class Pack(Struct):
    _fields_ = [
        ("from_", P), ("from_stride", I64), ("rows", I64), ("d", I64), ("to", P), ("to_d", I64), ("dtype", I32),
    ]  # fmt: skip


class RefusedError(Exception):
    """A launch returned an error before anything ran."""


class Launcher(NamedTuple):
    """The launches, compiled for one architecture, in the schedule of `seed`."""

    library: nvcc.HostLibrary
    seed: int = 0
    in_place: tuple[Tensor, ...] = ()  # tensors too large to copy; the kernel sees them where they are

    def __call__(
        self, name: str, struct: type[Struct], fresh: Iterable[Tensor] = (), inout: Iterable[Tensor] = (), **fields: Any
    ) -> list[Stats]:
        """Launch; `fresh` counts as uninitialised, `inout` is read and written, every other tensor is read-only."""
        memory, names = DeviceMemory(), {}
        try:
            for t in self.in_place:
                memory.lib.ptxemu_memory_add(
                    memory.handle, t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
                )
            value = self._fill(struct, fields, memory, names)
            fresh = list(fresh)
            for t in fresh:
                memory.mark_uninitialized(t)
            written = {t.untyped_storage().data_ptr() for t in (*fresh, *inout)}
            for t in names.values():
                if t.untyped_storage().data_ptr() not in written:
                    memory.mark_read_only(t)
            options = make_options(seed=self.seed)
            shared = self.library.library
            shared.ptxemu_shim_begin(memory.handle, ctypes.byref(options))
            error = getattr(shared, f"fastcl_cuda_{name}")(ctypes.byref(value), None)
            log = json.loads(shared.ptxemu_shim_end())
            memory.copy_back()
            for record in log:
                if "error" in record:
                    memory.locate(record, {t.untyped_storage().data_ptr(): key for key, t in names.items()})
                    raise from_fault(record)
            if error:
                raise RefusedError(f"{name}: cudaError {error}")
            return [Stats(record) for record in log]
        finally:
            memory.close()

    def _fill(
        self, struct: type[Struct], fields: dict[str, Any], memory: DeviceMemory, names: dict[str, Tensor]
    ) -> Struct:
        value = struct()
        for name, kind in struct._fields_:
            given = fields.get(name)
            if given is None:
                continue
            if isinstance(given, Tensor):
                if any(given.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in self.in_place):
                    given = given.data_ptr()
                else:
                    names[name], given = given, memory.address(given)
            elif isinstance(given, dict):
                given = self._fill(kind, given, memory, names)
            elif isinstance(given, (tuple, list)):
                given = kind(*given)
            setattr(value, name, given)
        return value


# Once for each: compiling them takes most of the time of the tests that use them.
@functools.cache
def few(folder: Path | None = None, arch: int = 80) -> nvcc.HostLibrary:
    """The launches of fused_few.cu, with the headers of `folder` (those of the package unless told)."""
    include = [CSRC / "cuda" if folder is None else folder / "cuda"]
    return nvcc.load_host_library(Path(__file__).with_name("fused_few.cu"), arch=f"sm_{arch}", include_dirs=include)


def equation(p: Problem, swapped: bool = False) -> dict[str, Any]:
    """The Equation of a problem, as its fields; swapped: y against x."""
    m = p.mask
    group_y = m.group_x if m.group_y is None else m.group_y
    y = p.x if p.y is None else p.y
    norms = [None, None]
    if p.operand == "sqdist":
        norms = [t.float().square().sum(1) for t in (p.x, y)]
    sides = [norms, [p.bias_x, p.bias_y], [m.group_x, group_y]]
    if swapped:
        sides = [s[::-1] for s in sides]
    (norm_x, norm_y), (bias_x, bias_y), (group_x, group_y) = sides
    diff = m.row_offset - m.col_offset
    return {
        "operand": OPERANDS.index(p.operand), "mask": MASKS.index(m.kind), "reduce": REDUCTIONS.index(p.reduce),
        "pair": PAIRS.index(p.pair.name), "constants": (*p.pair.constants, 0.0, 0.0)[:2], "diff": -diff if swapped else diff,
        "period": m.period,
        "scale": p.scale, "shift": p.shift, "norm_x": norm_x, "norm_y": norm_y, "bias_x": bias_x, "bias_y": bias_y,
        "group_x": group_x, "group_y": group_y,
    }  # fmt: skip


def sides(p: Problem, swapped: bool = False) -> dict[str, Any]:
    """The FusedSides of a problem whose rows the kernels can take as they are."""
    x, y = p.x, p.x if p.y is None else p.y
    if swapped:
        x, y = y, x
    return {
        "x": x, "y": y, "x_stride": x.stride(0), "y_stride": y.stride(0), "n": len(x), "m": len(y), "d": x.shape[1],
        "dtype": DTYPES[x.dtype],
    }  # fmt: skip


class Shape(NamedTuple):
    """How the forward sweep is cut up."""

    ctas: int = 2
    splits: int = 1
    resident: bool = False
    stages: int = 3


def rows(launch: Launcher, p: Problem, shape: Shape = Shape()) -> tuple[Tensor, Tensor | None, Stats]:  # noqa: B008
    """r, c when asked, and what the sweep counted."""
    n, m, triangle = p.n, p.m, p.y is None
    lse = p.reduce == "logsumexp"
    blocks, tiles = -(-n // 128), -(-m // 128)
    ctas, splits = min(shape.ctas, blocks), min(shape.splits, tiles)
    part = (2,) if lse else (1,)
    row_parts = torch.empty(splits, n, *part)
    col_parts = torch.empty(ctas, m, *part) if p.columns or triangle else None
    stats = launch(
        "fused_rows", Rows, fresh=[t for t in (row_parts, col_parts) if t is not None], equation=equation(p), sides=sides(p),
        ctas=ctas, splits=splits, row_parts=row_parts, col_parts=col_parts, triangle=triangle, resident=shape.resident,
        stages=shape.stages,
    )[0]  # fmt: skip
    r, c = torch.empty(n), torch.empty(m)
    sizes = {"splits": splits, "ctas": ctas, "triangle": triangle, "logsumexp": lse}
    launch(
        "fused_merge",
        Merge,
        fresh=[r],
        row_parts=row_parts,
        col_parts=col_parts if triangle else None,
        size=n,
        out=r,
        **sizes,
    )
    if not p.columns:
        return r, None, stats
    launch("fused_merge", Merge, fresh=[c], col_parts=col_parts, size=m, out=c, **sizes)
    return r, c, stats


class Weights(NamedTuple):
    """Upstream gradients and the reductions that they belong to; absent ones are None."""

    g: Tensor | None
    h: Tensor | None
    r: Tensor | None
    c: Tensor | None
    reference: Tensor | None = None

    def swapped(self) -> Weights:
        return Weights(self.h, self.g, self.c, self.r, self.reference)


def gradient(
    launch: Launcher, p: Problem, weights: Weights, swapped: bool = False, values: Tensor | None = None
) -> tuple[Tensor, Tensor, Stats]:
    """W Y and W 1 (swapped: W^T X and W^T 1), and what the sweep counted; `values` receives the row sums of f."""
    both = sides(p, swapped)
    n, m, d = both["n"], both["m"], both["d"]
    weights = weights.swapped() if swapped else weights
    x_factors, y_factors = torch.empty(-(-n // 128) * 128, 2), torch.empty(-(-m // 128) * 128, 2)
    single = torch.ones(1, dtype=torch.int32)
    launch(
        "fused_factors", Factors, fresh=[x_factors, y_factors], inout=[single], weighting=weights._asdict(), n=n, m=m,
        logsumexp=p.reduce == "logsumexp", x_factors=x_factors, y_factors=y_factors, single=single,
    )  # fmt: skip
    wy, w_rows = torch.empty(n, d), torch.empty(n)
    written = [t for t in (wy, w_rows, values) if t is not None]
    stats = launch(
        "fused_gradient", Gradient, fresh=written, equation=equation(p, swapped), sides=both, x_factors=x_factors,
        y_factors=y_factors, single=single, wy=wy, w_rows=w_rows, values=values,
    )[0]  # fmt: skip
    return wy, w_rows, stats


def exact_weights(p: Problem, weights: Weights) -> Tensor:
    """W in float64."""
    x, y = p.x.double(), (p.x if p.y is None else p.y).double()
    u = x @ y.T if p.operand == "dot" else torch.cdist(x, y).square()
    z = p.scale.double() * u + p.shift.double()
    z = z if p.bias_x is None else z + p.bias_x.double()[:, None]
    z = z if p.bias_y is None else z + p.bias_y.double()
    w = torch.zeros_like(z)
    if p.reduce == "sum":
        slope = p.pair.df(z)
        for own, shape in ((weights.g, (-1, 1)), (weights.h, (1, -1))):
            w = w if own is None else w + slope * own.double().view(shape)
    else:
        for own, log, shape in ((weights.g, weights.r, (-1, 1)), (weights.h, weights.c, (1, -1))):
            if own is not None and log is not None:
                w = w + own.double().view(shape) * torch.exp(z - log.double().view(shape))
    keep = reference.visited(p.mask, torch.arange(p.n), torch.arange(p.m))
    return w if keep is None else torch.where(keep, w, 0.0)
