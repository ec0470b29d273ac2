"""Build the C++ core on first use, into a cache directory outside the source tree ($PTXEMU_CACHE, default ~/.cache/ptxemu)."""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

SOURCE = pathlib.Path(__file__).resolve().parent / "src"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-g0",
]


def cache_dir():
    root = os.environ.get("PTXEMU_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptxemu"
    )
    os.makedirs(root, exist_ok=True)
    return pathlib.Path(root)


def digest(*parts):
    h = hashlib.sha256()
    for p in parts:
        p = p if isinstance(p, bytes) else str(p).encode()
        h.update(len(p).to_bytes(8, "little") + p)
    return h.hexdigest()[:20]


def run(command, **kw):
    r = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)
    if r.returncode:
        raise RuntimeError(f"command failed ({r.returncode}): {' '.join(map(str, command))}\n{r.stdout[-8000:]}")
    return r.stdout


def _machine():
    try:
        with open("/proc/cpuinfo") as f:
            return next((line for line in f if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine()


def core_library():
    """Path of the shared library, building it if the sources, the flags, the compiler or the CPU changed."""
    cxx = os.environ.get("CXX", "g++")
    files = sorted(SOURCE.glob("*.cpp")) + sorted(SOURCE.glob("*.h"))
    key = digest(*[f.name + "\0" + f.read_text() for f in files], FLAGS, run([cxx, "--version"]), _machine())
    out = cache_dir() / f"libptxemu-{key}.so"
    if out.exists():
        return out
    with tempfile.TemporaryDirectory(dir=cache_dir()) as tmp:
        units = [f for f in files if f.suffix == ".cpp" and f.name != "cudart_shim.cpp"]
        objects = [os.path.join(tmp, f.stem + ".o") for f in units]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda p: run([cxx, *FLAGS, "-c", p[0], "-o", p[1]]), zip(units, objects)))
        run([cxx, "-shared", *objects, "-lpthread", "-o", os.path.join(tmp, "lib.so")])
        shutil.move(os.path.join(tmp, "lib.so"), out)
    return out


class Options(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64), ("max_instructions", ctypes.c_uint64)] + [
        (n, ctypes.c_uint32)
        for n in (
            "threads",
            "shared_races",
            "global_races",
            "strict_same_value",
            "init_shared",
            "init_global",
            "registers",
            "rounding_nearest",
            "approx_noise",
            "smem_limit",
            "warp_races",
        )
    ]


@functools.lru_cache(None)
def library():
    lib = ctypes.CDLL(str(core_library()), mode=ctypes.RTLD_GLOBAL)
    p, u64, u32, s, i = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_int
    for name, result, args in (
        ("result", s, []),
        ("module_load", p, [s]),
        ("module_free", None, [p]),
        ("module_info", s, [p]),
        ("memory_new", p, []),
        ("memory_free", None, [p]),
        ("memory_allocate", u64, [p, u64, u64]),
        ("memory_release", None, [p, u64]),
        ("memory_add", None, [p, u64, u64]),
        ("memory_uninitialized", i, [p, u64, u64]),
        ("memory_read_only", None, [p, u64, i]),
        ("memory_valid", i, [p, u64, u64]),
        (
            "tensor_map_encode",
            i,
            [p, i, u32, u64, ctypes.POINTER(u64), ctypes.POINTER(u64), ctypes.POINTER(u32), p, i, i, i, i],
        ),
        (
            "launch",
            i,
            [p, s, *[ctypes.POINTER(u32)] * 3, u32, p, u32, p, ctypes.POINTER(Options)],
        ),
    ):
        f = getattr(lib, "ptxemu_" + name)
        f.restype, f.argtypes = result, args
    return lib
