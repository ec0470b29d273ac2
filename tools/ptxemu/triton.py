"""Triton without a GPU: kernel[grid](cpu_tensors) compiles with the real compiler and runs in the interpreter.

import ptxemu.triton
with ptxemu.triton.activate(capability=80) as session:
    my_kernel[grid](x, y, n, BLOCK=64)
print(session.stats[-1])
"""

import importlib

from .module import Module, _storage

_state = {"session": None, "ptx": {}, "modules": {}, "patched": False}
LIMITS = {80: (166912, 108), 86: (101376, 84), 89: (101376, 128), 90: (232448, 132)}


class Session:
    """Options of the launches and their results. .stats: one Stats per launch. .seed and .options may be changed between launches.
    .uninitialized: tensors that hold nothing yet (initcheck)."""

    def __init__(self, capability, seed, options):
        self.capability, self.seed, self.options, self.stats, self.uninitialized = (
            capability,
            seed,
            options,
            [],
            [],
        )
        self.written = set()  # addresses of the storages that were arguments of a launch so far
        self.previous = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        deactivate()


def _ptx(kernel):
    text = kernel.asm["ptx"]
    return text.decode() if isinstance(text, bytes) else text


def _flatten(args, types):
    for a, t in zip(args, types):
        if isinstance(t, (tuple, list)):
            yield from _flatten(a, t)
        elif t != "constexpr":
            yield a, t


class _Utils:
    def get_device_properties(self, device):
        shared, sms = LIMITS[_state["session"].capability]
        return dict(
            max_shared_mem=shared,
            multiprocessor_count=sms,
            warpSize=32,
            max_num_regs=65536,
            sm_clock_rate=1410000,
            mem_clock_rate=1215000,
            mem_bus_width=5120,
        )

    def load_binary(self, name, binary, shared, device, *rest):
        return name, bytes(binary), 64, 0, 1024  # module, function, registers, spills, maximum threads

    def unload_module(self, module):
        pass

    def __getattr__(self, name):
        raise NotImplementedError(f"ptxemu.triton: the driver function {name} is not available without a GPU")


class _Launcher:
    def __init__(self, src, metadata):
        self.types, self.metadata = list(src.signature.values()), metadata

    def __call__(self, gx, gy, gz, stream, function, *rest):
        md, session = self.metadata, _state["session"]
        args = rest[-len(self.types) :] if self.types else ()
        values = []
        for a, t in _flatten(args, self.types):
            if isinstance(t, str) and t.startswith(("tensordesc", "nvTmaDesc")):
                raise NotImplementedError(f"ptxemu.triton: argument of type {t} (host-side tensor descriptor)")
            values.append(_cast(a, t))
        for scratch in ("global_scratch_size", "profile_scratch_size"):
            if getattr(md, scratch, 0):
                raise NotImplementedError(f"ptxemu.triton: {scratch} > 0")
        if not all(int(g) > 0 for g in (gx, gy, gz)):
            return
        if function not in _state["modules"]:
            _state["modules"][function] = Module(_state["ptx"][function])
        module = _state["modules"][function]
        name = module.find(md.name)
        info = module.kernels.get(name)
        if info:
            values += [0] * (len(info["params"]) - len(values))  # scratch pointers
        threads = (info or {}).get("reqntid") or 32 * md.num_warps
        here = {_storage(v)[0] for v in values if _storage(v)}
        session.stats.append(
            module.launch(
                name,
                (gx, gy, gz),
                threads,
                md.shared,
                values,
                seed=session.seed,
                uninitialized=[t for t in session.uninitialized if _storage(t)[0] in here],
                **session.options,
            )
        )
        session.written.update(here)


def _cast(value, kind):
    if isinstance(kind, str) and kind in ("fp16", "bf16", "fp32", "f32", "fp64") and not isinstance(value, float):
        return float(value)
    if isinstance(value, bool):
        return int(value)
    return value


class _Driver:
    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target, self.utils, self.launcher_cls = GPUTarget("cuda", capability, 32), _Utils(), _Launcher

    @classmethod
    def is_active(cls):
        return True

    def get_current_device(self):
        return self.target.arch  # Triton caches compiled kernels by device: one "device" per architecture

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_device_interface(self):
        return importlib.import_module("torch").cuda

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_empty_cache_for_benchmark(self):
        import torch

        return torch.empty(0)

    def clear_cache(self, cache):
        pass

    def get_benchmarker(self):
        """Autotuning runs every configuration once (so that each is checked) and keeps the first."""
        state = {"t": 0.0}

        def bench(fn, quantiles=None, **kw):
            fn()
            state["t"] += 1.0
            return [state["t"]] * (len(quantiles) if quantiles else 1) if quantiles else state["t"]

        return bench


def _patch():
    if _state["patched"]:
        return
    from triton.compiler import compiler

    original = compiler.CompiledKernel._init_handles

    def init_handles(self):
        if _state["session"] is not None:
            _state["ptx"][bytes(self.asm["cubin"])] = _ptx(self)
        return original(self)

    compiler.CompiledKernel._init_handles = init_handles
    _state["patched"] = True


def activate(capability=80, seed=0, **options):
    """Make the interpreter Triton's active driver. options: those of Module.launch. Usable as a context manager."""
    from triton.runtime import driver

    if capability not in LIMITS:
        raise ValueError(f"capability must be one of {sorted(LIMITS)}")
    _patch()
    session = Session(capability, seed, options)
    try:
        session.previous = driver._active
    except AttributeError:
        session.previous = None
    _state["session"] = session
    driver.set_active(_Driver(capability))
    return session


def deactivate():
    from triton.runtime import driver

    session, _state["session"] = _state["session"], None
    if session is not None:
        if session.previous is not None:
            driver.set_active(session.previous)
        else:
            driver._active = None
