"""CUDA C++ without a GPU: compile to PTX, or build a library whose <<<>>> launches run in the interpreter."""

import ctypes
import json
import os
import pathlib
import shutil

from . import _build
from .errors import from_fault
from .module import DeviceMemory, Module, _storage, make_options
from .stats import Stats


def nvcc_path():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for path in ([os.path.join(home, "bin", "nvcc")] if home else []) + [
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]:
        if path and os.path.exists(path):
            return path
    raise RuntimeError("nvcc not found: set CUDA_HOME")


def toolkit_include(nvcc):
    """The toolkit's own include folder, from nvcc itself: the nvcc on the path may be a script that calls the real one."""
    plan = _build.run([nvcc, "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull])
    top = next(line.partition("TOP=")[2] for line in plan.splitlines() if "TOP=" in line)
    return pathlib.Path(top.strip()) / "include"


def _flags(arch, include_dirs, defines, extra):
    arch = arch if str(arch).startswith("sm_") else f"sm_{arch}"
    out = [f"-arch={arch}", "-std=c++17", "-O3"]
    out += [f"-I{d}" for d in include_dirs]
    out += [
        f"-D{k}" if v is None else f"-D{k}={v}"
        for k, v in (defines.items() if isinstance(defines, dict) else ((d, None) for d in defines))
    ]
    return out + list(extra)


def _as_ptx(flag):
    """The flag of an architecture, for PTX alone. With -arch=compute_90a nvcc 13.0 makes PTX of compute_90 too, where
    what only sm_90a has is absent."""
    if not flag.startswith("-arch=sm_"):
        return flag
    name = flag.replace("-arch=sm_", "compute_")
    return f"-gencode=arch={name},code={name}"


def _key(path, flags):
    """Cache key: nvcc, the flags, and the preprocessed source (so that included files count)."""
    nvcc = nvcc_path()
    return _build.digest(_build.run([nvcc, "--version"]), flags, _build.run([nvcc, *flags, "-E", path]))


def compile_ptx(path, arch="sm_80", include_dirs=(), defines=(), extra=()):
    """PTX text of a .cu file (cached). Line information is included, so that errors can name the source line."""
    flags = _flags(arch, include_dirs, defines, ["-lineinfo", *extra])
    out = _build.cache_dir() / f"ptx-{_key(path, flags)}.ptx"
    if not out.exists():
        tmp = out.with_suffix(f".{os.getpid()}.tmp")
        _build.run([nvcc_path(), *flags, "-ptx", path, "-o", tmp])
        tmp.replace(out)
    return out.read_text()


def compile_module(path, arch="sm_80", include_dirs=(), defines=(), extra=()):
    return Module(compile_ptx(path, arch, include_dirs, defines, extra))


class HostLibrary:
    """A compiled library with C functions that launch kernels. call() passes tensors as device pointers (guarded copies, written
    back afterwards) and raises if a launch failed. .stats: one Stats per kernel launched by the last call.

    A process loads a file once: of several objects of one file, the last that was made or called has the launches, and when
    it goes, the one before it."""

    def __init__(self, path, modules, arch):
        self.library, self.modules, self.stats, self.path = (
            ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL),
            modules,
            [],
            path,
        )
        core = _build.library()
        shim = self.library.ptxemu_shim_setup
        shim.restype = ctypes.c_void_p
        shim.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int]
        self.library.ptxemu_shim_use.argtypes = self.library.ptxemu_shim_drop.argtypes = [ctypes.c_void_p]
        handles = (ctypes.c_void_p * len(modules))(*[m._handle for m in modules])
        self._table = shim(len(modules), handles, int("".join(c for c in str(arch).split("_")[-1] if c.isdigit())))
        self.library.ptxemu_shim_begin.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.library.ptxemu_shim_end.restype = ctypes.c_char_p
        self._core = core

    def __del__(self):
        if getattr(self, "_table", None):
            self.library.ptxemu_shim_drop(self._table)

    def call(self, name, *args, restype=ctypes.c_int, uninitialized=(), readonly=(), **options):
        """Call a C function. int and None (null) arguments pass as 64-bit integers or pointers, float as C float; use ctypes types
        for anything else. Returns the function's result."""
        memory = DeviceMemory()
        try:
            values, names = [], {}
            for k, a in enumerate(args):
                s = _storage(a)
                if s is not None:
                    names.setdefault(s[0], f"argument {k}")
                    values.append(ctypes.c_void_p(memory.address(a) or None))
                elif isinstance(a, bool) or isinstance(a, int):
                    values.append(ctypes.c_int64(a))
                elif isinstance(a, float):
                    values.append(ctypes.c_float(a))
                elif a is None:
                    values.append(ctypes.c_void_p(None))
                else:
                    values.append(a)
            for t in uninitialized:
                memory.mark_uninitialized(t)
            for t in readonly:
                memory.mark_read_only(t)
            f = getattr(self.library, name)
            f.restype = restype
            o = make_options(**options)
            self.library.ptxemu_shim_use(self._table)
            self.library.ptxemu_shim_begin(memory.handle, ctypes.byref(o))
            result = f(*values)
            log = json.loads(self.library.ptxemu_shim_end())
            memory.copy_back()
            self.stats = [Stats(r) for r in log if "error" not in r]
            for r in log:
                if "error" in r:
                    memory.locate(r, names)
                    raise from_fault(r)
            return result
        finally:
            memory.close()


def load_host_library(*sources, arch="sm_80", include_dirs=(), defines=(), extra=()):
    """Compile .cu (and .cpp) files with a plain C launch interface into a library and load it. The unmodified host code, with its
    <<<>>> launches and cudaFuncSetAttribute calls, is linked against src/cudart_shim.cpp instead of the CUDA runtime."""
    nvcc = nvcc_path()
    flags = _flags(arch, include_dirs, defines, [*extra])
    shim = _build.SOURCE / "cudart_shim.cpp"
    core = _build.core_library()
    keys = [_key(s, flags) for s in sources]
    # -Bsymbolic: the library calls its own shim even where the process (a CUDA build of torch) has loaded the real runtime.
    # -z defs: all symbols must resolve: a runtime function that the shim lacks fails here, by name.
    link = ["-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic"]
    out = _build.cache_dir() / f"host-{_build.digest(*keys, shim.read_text(), core, *link)}.so"
    ptx = {k: out.with_suffix(f".{k}.ptx") for k, s in enumerate(sources) if str(s).endswith(".cu")}
    if not out.exists():
        import tempfile

        with tempfile.TemporaryDirectory(dir=_build.cache_dir()) as tmp:
            objects = []
            for k, (s, key) in enumerate(zip(sources, keys, strict=True)):
                # Kept by source: another emulator, or a change in one file, compiles the others not again.
                made = _build.cache_dir() / f"launches-{_build.digest(key, 'object of one architecture')}.o"
                if not made.exists():
                    # With PTX inside instead of machine code ptxas does not run, and the PTX is kept for the interpreter.
                    host = [_as_ptx(flag) for flag in flags]
                    keep = ["-lineinfo", "--keep", "--keep-dir", tmp]
                    _build.run([nvcc, *host, *keep, "-Xcompiler", "-fPIC", "-c", s, "-o", os.path.join(tmp, "made.o")])
                    for text in pathlib.Path(tmp).glob("*.ptx"):
                        shutil.move(text, made.with_suffix(".ptx"))
                    shutil.move(os.path.join(tmp, "made.o"), made)
                objects.append(made)
                if k in ptx:
                    shutil.copy(made.with_suffix(".ptx"), ptx[k])
            objects.append(os.path.join(tmp, "shim.o"))
            include = toolkit_include(nvcc)
            _build.run(
                [
                    os.environ.get("CXX", "g++"),
                    "-std=c++17",
                    "-O1",
                    "-fPIC",
                    f"-I{include}",
                    "-c",
                    shim,
                    "-o",
                    objects[-1],
                ]
            )
            _build.run(
                [
                    os.environ.get("CXX", "g++"),
                    *link,
                    *objects,
                    core,
                    f"-Wl,-rpath,{core.parent}",
                    "-o",
                    os.path.join(tmp, "lib.so"),
                ]
            )
            shutil.move(os.path.join(tmp, "lib.so"), out)
    return HostLibrary(out, [Module(path.read_text()) for path in ptx.values()], arch)
