"""Module: parsed PTX, and launches of its kernels on CPU tensors, numpy arrays and scalars."""

import ctypes
import json
import shutil
import struct
import subprocess

from . import _build
from .errors import from_fault
from .stats import Stats

_SIGNED = {"s8": "b", "s16": "h", "s32": "i", "s64": "q"}
_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _storage(x):
    """(key, address, bytes, offset) of the memory behind a tensor or array; None for scalars."""
    if hasattr(x, "untyped_storage"):
        if x.device.type != "cpu":
            raise TypeError("ptxemu takes CPU tensors")
        s = x.untyped_storage()
        return s.data_ptr(), s.nbytes(), x.data_ptr() - s.data_ptr() if s.nbytes() else 0
    if hasattr(x, "__array_interface__") and getattr(x, "ndim", 0) + getattr(x, "size", 0) > 0 and hasattr(x, "base"):
        root = x
        while getattr(root, "base", None) is not None and hasattr(root.base, "__array_interface__"):
            root = root.base
        address = root.__array_interface__["data"][0]
        return address, root.nbytes, x.__array_interface__["data"][0] - address
    return None


def make_options(
    seed=0,
    threads=0,
    racecheck=True,
    global_racecheck=True,
    strict_same_value=False,
    initcheck=True,
    registers=True,
    rounding="rz",
    approx_noise=False,
    max_instructions=1_000_000_000,
    smem_limit=0,
    warp_racecheck=False,
):
    """The keyword options of every launch.

    seed: 0 runs warps and CTAs in order; any other value randomises the schedule reproducibly.   threads: host threads, 0 = automatic
    (one if the kernel has order-sensitive atomics, so that results are reproducible).   racecheck / global_racecheck / initcheck /
    registers: switch a checker off.   strict_same_value: two unordered writes of the same value are a race too.   rounding: "rz" (tensor
    cores truncate) or "rn".   approx_noise: perturb .approx results within their documented error.   smem_limit: bytes per CTA, 0 = the
    architecture's.   warp_racecheck: global memory that warps of one CTA access with no barrier between, too (atomics and fences
    between warps do not order them for this check)."""
    if rounding not in ("rz", "rn"):
        raise ValueError("rounding must be 'rz' or 'rn'")
    return _build.Options(
        seed=seed,
        max_instructions=max_instructions,
        threads=threads,
        shared_races=racecheck,
        global_races=global_racecheck,
        strict_same_value=strict_same_value,
        init_shared=initcheck,
        init_global=initcheck,
        registers=registers,
        rounding_nearest=rounding == "rn",
        approx_noise=approx_noise,
        smem_limit=smem_limit,
        warp_races=warp_racecheck,
    )


# As CU_TENSOR_MAP_DATA_TYPE_* and CU_TENSOR_MAP_SWIZZLE_* are numbered.
_TYPES = ("uint8", "uint16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64", "bfloat16")
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


class TensorMap:
    """An argument for a CUtensorMap parameter (or for a pointer to one): a tiled map of a tensor or array, boxes of `box`
    elements, both innermost dimension first. dims and strides (in bytes, of all dimensions but the innermost) are the
    tensor's own unless given; element: the name of a CU_TENSOR_MAP_DATA_TYPE in lower case."""

    def __init__(self, tensor, box, swizzle=0, element=None, dims=None, strides=None, nan_fill=False):
        self.tensor, self.box, self.swizzle, self.nan_fill = tensor, box, swizzle, nan_fill
        self.element = element or str(tensor.dtype).replace("torch.", "")
        size = tensor.element_size() if hasattr(tensor, "element_size") else tensor.itemsize
        steps = tensor.stride() if hasattr(tensor, "untyped_storage") else [s // size for s in tensor.strides]
        self.dims = dims or tuple(tensor.shape)[::-1]
        self.strides = strides or tuple(s * size for s in steps)[::-1][1:]

    def encode(self, address):
        out = ctypes.create_string_buffer(128)
        rank = len(self.dims)
        bad = _build.library().ptxemu_tensor_map_encode(
            out,
            _TYPES.index(self.element),
            rank,
            address,
            (ctypes.c_uint64 * rank)(*self.dims),
            (ctypes.c_uint64 * rank)(*self.strides),
            (ctypes.c_uint32 * rank)(*self.box),
            None,
            0,
            _SWIZZLES[self.swizzle],
            0,
            int(self.nan_fill),
        )
        if bad:
            raise ValueError(f"cuTensorMapEncodeTiled refuses this map: CUresult {bad}")
        return out.raw


class DeviceMemory:
    """Guarded copies of host memory: a block per storage, with unmapped space around it, so that no access out of bounds can
    land in another tensor. copy_back() returns what the kernel wrote."""

    def __init__(self):
        self.lib = _build.library()
        self.handle = self.lib.ptxemu_memory_new()
        self.blocks = {}  # host address -> (device address, bytes, keepalive)

    def close(self):
        if self.handle:
            self.lib.ptxemu_memory_free(self.handle)
            self.handle = None

    def address(self, x):
        host, size, offset = _storage(x)
        if host == 0 or size == 0:
            return 0
        if host not in self.blocks:
            device = self.lib.ptxemu_memory_allocate(self.handle, size, 0)
            if not device:
                raise from_fault(json.loads(self.lib.ptxemu_result()))
            ctypes.memmove(device, host, size)
            self.blocks[host] = (device, size, x)
        return self.blocks[host][0] + offset

    def copy_back(self):
        for host, (device, size, _) in self.blocks.items():
            ctypes.memmove(host, device, size)

    def mark_uninitialized(self, x):
        host, size, _ = _storage(x)
        if size and self.lib.ptxemu_memory_uninitialized(self.handle, self.blocks[host][0], size):
            raise from_fault(json.loads(self.lib.ptxemu_result()))

    def mark_read_only(self, x):
        host, size, _ = _storage(x)
        if size:
            self.lib.ptxemu_memory_read_only(self.handle, self.blocks[host][0], 1)

    def locate(self, fault, names):
        """Say which argument an address is near."""
        a = fault.get("address")
        if a is None or a < 1 << 32:
            return
        for host, (device, size, _) in self.blocks.items():
            if device - (1 << 26) <= a < device + size + (1 << 26):
                fault["where"] = f"{names[host]}, byte {a - device} of {size}"


def _dims(v):
    v = (v,) if isinstance(v, int) else tuple(int(x) for x in v)
    return (ctypes.c_uint32 * 3)(*(v + (1, 1, 1))[:3])


class Module:
    """Parsed PTX. Kernels that use an unsupported instruction are listed in .broken with the reason; launching one raises."""

    def __init__(self, ptx):
        self._lib = _build.library()
        self._handle = self._lib.ptxemu_module_load(ptx.encode() if isinstance(ptx, str) else ptx)
        if not self._handle:
            raise from_fault(json.loads(self._lib.ptxemu_result()))
        info = json.loads(self._lib.ptxemu_module_info(self._handle))
        self.target, self.kernels, self.broken, self.symbols = (
            info["target"],
            info["kernels"],
            info["broken"],
            info["symbols"],
        )

    def __del__(self):
        if getattr(self, "_handle", None):
            self._lib.ptxemu_module_free(self._handle)
            self._handle = None

    def find(self, name):
        """The full name of a kernel: exact, or a unique part of the mangled or demangled name."""
        every = list(self.kernels) + list(self.broken)
        if name in every:
            return name
        plain = dict(zip(every, every))
        if shutil.which("c++filt") and every:
            plain = dict(
                zip(
                    every,
                    subprocess.run(["c++filt"], input="\n".join(every), stdout=subprocess.PIPE, text=True).stdout.split(
                        "\n"
                    ),
                )
            )
        hits = [k for k in every if name in k or name in plain[k]]
        if len(hits) != 1:
            raise KeyError(f"{name!r} names {len(hits)} kernels of {[plain[k] for k in every]}")
        return hits[0]

    def _pack(self, name, args, memory):
        params = self.kernels[name]["params"]
        if len(args) != len(params):
            raise TypeError(f"{name} takes {len(params)} arguments, got {len(args)}")
        out = bytearray(self.kernels[name]["param_bytes"])
        for i, (value, (kind, offset, size)) in enumerate(zip(args, params)):
            scalar = size <= 8 and kind[0] != "x" and not (kind == "b8" and size > 1)
            if isinstance(value, TensorMap):
                value = value.encode(memory.address(value.tensor))
            if _storage(value) is not None and not (
                hasattr(value, "shape") and value.shape == () and not hasattr(value, "untyped_storage")
            ):
                if size != 8:
                    raise TypeError(f"argument {i}: a tensor for a {size}-byte parameter")
                data = struct.pack("<Q", memory.address(value))
            elif isinstance(value, (bytes, bytearray)):
                data = bytes(value)
            elif value is None:
                data = bytes(size)
            elif not scalar:
                raise TypeError(f"argument {i}: a struct of {size} bytes is passed as bytes")
            elif isinstance(value, float) or "float" in type(value).__name__:
                if kind in ("f16", "b16") and size == 2:
                    data = struct.pack("<e", float(value))
                elif kind[0] in "su":
                    raise TypeError(f"argument {i}: a float for an integer parameter")
                else:
                    data = struct.pack("<d" if size == 8 else "<f", float(value))
            else:
                value = int(value)
                if kind in ("f32", "f64"):
                    data = struct.pack("<d" if size == 8 else "<f", float(value))
                else:
                    if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
                        raise OverflowError(f"argument {i}: {value} does not fit {size} bytes")
                    data = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
            if len(data) != size:
                raise TypeError(f"argument {i}: {len(data)} bytes for a parameter of {size}")
            out[offset : offset + size] = data
        return bytes(out)

    def launch(
        self,
        kernel,
        grid,
        block,
        shared_bytes=0,
        args=(),
        seed=0,
        *,
        uninitialized=(),
        readonly=(),
        memory=None,
        cluster=None,
        **options,
    ):
        """Run a kernel and return its Stats. Tensors and arrays are updated in place, their storage is the only global memory the kernel
        may touch. uninitialized / readonly: the arguments (the tensors themselves) that hold nothing yet / must not be written.
        cluster: CTAs of a cluster, as grid and block; as the kernel was compiled unless given.
        Further options: see make_options."""
        name = self.find(kernel)
        own = memory is None
        memory = memory or DeviceMemory()
        try:
            if name in self.broken:
                data = b""
            else:
                data = self._pack(name, list(args), memory)
            names = {}
            for i, a in enumerate(args):
                s = _storage(a.tensor if isinstance(a, TensorMap) else a)
                if s is not None:
                    names.setdefault(s[0], f"argument {i}")
            for t in uninitialized:
                memory.mark_uninitialized(t)
            for t in readonly:
                memory.mark_read_only(t)
            o = make_options(seed=seed, **options)
            failed = self._lib.ptxemu_launch(
                self._handle,
                name.encode(),
                _dims(grid),
                _dims(block),
                None if cluster is None else _dims(cluster),
                shared_bytes,
                data,
                len(data),
                memory.handle,
                ctypes.byref(o),
            )
            result = json.loads(self._lib.ptxemu_result())
            if own:
                memory.copy_back()
            if failed:
                memory.locate(result, names)
                raise from_fault(result)
            return Stats(result)
        finally:
            if own:
                memory.close()


def assert_order_independent(run, outputs, seeds=(0, 1, 2, 3), rtol=0.0, atol=0.0):
    """Call run(seed) for every seed and compare the arrays returned by outputs() with those of the first seed. With rtol = atol = 0 the
    results must be bitwise equal; kernels with floating-point atomics need a tolerance."""
    import numpy as np

    first = None
    for seed in seeds:
        run(seed)
        got = outputs()
        got = got if isinstance(got, (tuple, list)) else (got,)
        got = [(g.detach().to(dtype=_wide(g)).numpy() if hasattr(g, "detach") else np.asarray(g)).copy() for g in got]
        if first is None:
            first = got
            continue
        for k, (a, b) in enumerate(zip(first, got)):
            same = (
                np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
                if rtol == atol == 0
                else np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
            )
            if not same:
                bad = np.flatnonzero((a != b).ravel())
                raise AssertionError(
                    f"output {k} depends on the schedule: seeds {seeds[0]} and {seed} differ in {bad.size} elements, first at {bad[0]}: "
                    f"{a.ravel()[bad[0]]!r} and {b.ravel()[bad[0]]!r}"
                )


def _wide(t):
    import torch

    return {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(t.dtype, t.dtype)
