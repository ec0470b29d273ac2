"""Kernels compiled by nvcc against torch in fp64, the host-code path, and mutations of the compiled code."""

import math
import pathlib
import re

import pytest

from tools import ptxemu
from tools.ptxemu import Module, nvcc

from .launching import needs_nvcc, needs_torch

pytestmark = [pytest.mark.slow, needs_nvcc, needs_torch]
torch = pytest.importorskip("torch")
HERE = pathlib.Path(__file__).parent / "kernels"
TAU, LOG2E = 0.07, 1.4426950408889634


def unit(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1).bfloat16()


def reference(X, Y):
    return torch.logsumexp(X.double() @ Y.double().T / TAU, 1)


@pytest.fixture(scope="module")
def lse_ptx():
    return nvcc.compile_ptx(HERE / "lse_sm80.cu", "sm_80")


@pytest.fixture(scope="module")
def mixed():
    return nvcc.compile_module(HERE / "mixed.cu", "sm_80", extra=["--expt-relaxed-constexpr"])


def run_lse(module, X, Y, seed=0, n=None, **kw):
    N, D, M = X.shape[0], X.shape[1], Y.shape[0]
    n = n or N
    out, total = torch.full((n,), float("nan")), torch.zeros(1)
    stats = module.launch(
        f"lse_fwd<64, 64, {D}>",
        (n + 63) // 64,
        128,
        192 * (D + 8) * 2,
        [X, Y, out, total, n, M, LOG2E / TAU],
        seed=seed,
        uninitialized=[out],
        readonly=[X, Y],
        **kw,
    )
    return out, total, stats


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("N,M", [(64, 64), (100, 77), (1, 1), (130, 200)])
def test_lse(lse_ptx, N, M, D):
    X, Y = unit(N, D, 0), unit(M, D, 1)
    for seed in (0, 5):
        out, total, stats = run_lse(Module(lse_ptx), X, Y, seed)
        want = reference(X, Y)
        assert (out - want).abs().max() < 3e-6 and abs(total.item() - want.sum().item()) < 1e-3
    blocks = math.ceil(N / 64) * math.ceil(M / 64)
    assert stats.mma_flops == blocks * 2 * 64 * 64 * D
    assert stats.atomics == 4 * math.ceil(N / 64)
    assert stats.bank_conflicts == 0 and stats.coalescing == 1.0
    assert stats.mufu >= blocks * 64 * 64
    assert stats.roofline("a100").seconds > 0 and "ESTIMATE" in str(stats.roofline("h100"))


def test_order_independent(lse_ptx):
    X, Y, m, keep = unit(130, 64, 0), unit(100, 64, 1), Module(lse_ptx), {}
    ptxemu.assert_order_independent(lambda s: keep.update(out=run_lse(m, X, Y, s)[0]), lambda: keep["out"])


def test_bounds_are_exact(lse_ptx):
    X, Y = unit(130, 64, 0), unit(100, 64, 1)
    with pytest.raises(ptxemu.OutOfBounds) as e:
        run_lse(Module(lse_ptx), X[:129].clone(), Y, n=130)
    assert re.search(r"lse_sm80\.cu:1\d$", e.value.source)  # the function copy16


def mutants(ptx):
    """(name, mutated text): one change each, in the code that the D = 64 instance executes."""
    start = re.search(r"\.entry \w*Li64ELi64ELi64E\w*\(", ptx).start()
    end = ptx.index("\n}\n", start)
    for name, pattern, new in (
        ("drop bar.sync", r"bar\.sync\s+0;", ""),
        ("drop wait_group", r"cp\.async\.wait_group \d;", ""),
        ("drop commit_group", r"cp\.async\.commit_group;", ""),
        (
            "ldmatrix transposed",
            r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared",
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared",
        ),
        ("shuffle mode", r"shfl\.sync\.bfly", "shfl.sync.up"),
        ("dropped predicate", r"@%p\d+ (st\.global|red\.global|atom\.global)", r"\1"),
        ("add for sub", r"sub\.f32 ", "add.f32 "),
    ):
        hits = list(re.finditer(pattern, ptx[start:end]))
        for k in sorted(
            {0, len(hits) // 2, len(hits) - 1} if name not in ("drop bar.sync", "drop wait_group") else range(len(hits))
        ):
            if hits:
                h = hits[k]
                yield f"{name} #{k}", ptx[: start + h.start()] + h.expand(new) + ptx[start + h.end() :]
    for k, h in enumerate(re.finditer(r"ldmatrix\.\S+ \{[^}]*\}, \[%r\d+(\+\d+)?\]", ptx[start:end])):
        if k % 9 == 0:
            yield f"ldmatrix address #{k}", ptx[: start + h.end() - 1] + "+16" + ptx[start + h.end() - 1 :]


def test_mutants_are_caught(lse_ptx):
    """Planted bugs: every one must raise, or give a wrong answer under at least one of the schedules."""
    X, Y = unit(130, 64, 0), unit(150, 64, 1)
    want = reference(X, Y)
    survivors, kinds = [], {}
    for name, text in mutants(lse_ptx):
        caught = None
        for seed in (0, 1):
            try:
                out, total, _ = run_lse(Module(text), X, Y, seed)
            except ptxemu.PtxError as e:
                caught = type(e).__name__
                break
            if not (out - want).abs().max() < 1e-4 or not abs(total.item() - want.sum().item()) < 1e-2:
                caught = "wrong result"
                break
        kinds.setdefault(name.split(" #")[0], []).append(caught)
        if not caught:
            survivors.append(name)
    assert not survivors, survivors
    assert (
        set(kinds["drop bar.sync"]) <= {"SharedRace", "MissingWait", "Uninitialized"}
        and len(kinds["drop bar.sync"]) >= 2
    )
    assert set(kinds["drop wait_group"]) <= {"MissingWait"} and kinds["ldmatrix transposed"] and kinds["shuffle mode"]


def test_host_library():
    lib = nvcc.load_host_library(HERE / "lse_sm80.cu")
    X, Y = unit(100, 128, 0), unit(77, 128, 1)
    out, total = torch.empty(100), torch.zeros(1)
    assert lib.call("lse_fwd_bf16", X, Y, out, total, 100, 77, 128, LOG2E / TAU, None, uninitialized=[out]) == 0
    assert (out - reference(X, Y)).abs().max() < 3e-6 and len(lib.stats) == 1
    assert (
        lib.call("lse_fwd_bf16", X, Y, out, total, 100, 77, 96, LOG2E / TAU, None) == 1
    )  # cudaErrorInvalidValue from the host code
    with pytest.raises(ptxemu.OutOfBounds):
        lib.call("lse_fwd_bf16", X[:50].clone(), Y, out, total, 100, 77, 128, LOG2E / TAU, None)


def test_several_host_libraries_of_one_file():
    """Each launches its own modules, in any order, and goes without taking the others' along."""
    first = nvcc.load_host_library(HERE / "lse_sm80.cu")
    text = next(first.path.parent.glob(f"{first.path.stem}.*.ptx")).read_text()
    assert "0f3F317218" in text  # log 2
    X, Y = unit(20, 64, 0), unit(30, 64, 1)
    want = reference(X, Y)

    def answer(library):
        out, total = torch.empty(20), torch.zeros(1)
        assert library.call("lse_fwd_bf16", X, Y, out, total, 20, 30, 64, LOG2E / TAU, None) == 0
        return out

    def halved():
        return nvcc.HostLibrary(first.path, [Module(text.replace("0f3F317218", "0f3EB17218"))], "sm_80")

    second, third = halved(), halved()
    for library, factor in ((first, 1.0), (second, 0.5), (first, 1.0), (third, 0.5)):
        assert (answer(library) - factor * want).abs().max() < 3e-6
    del library, second  # not the one in use
    assert (answer(first) - want).abs().max() < 3e-6
    assert (answer(third) - want / 2).abs().max() < 3e-6
    del third  # the one in use
    assert (answer(first) - want).abs().max() < 3e-6


def test_host_library_symbols_and_memory():
    lib = nvcc.load_host_library(HERE / "mixed.cu", extra=["--expt-relaxed-constexpr"])
    a, o = torch.arange(64.0), torch.zeros(64)
    assert lib.call("run_symbols", a, o, 64) == 0 and len(lib.stats) == 2
    f = torch.tensor([1.0, 2, 3, 4]).repeat(16)
    assert torch.equal(o, (a * f + 0.5) * f + 0.5)


def close(out, want, tol):
    out, want = out.double(), want.double()
    assert (out - want).abs().max() <= tol * want.abs().max().clamp(min=1), (out - want).abs().max()


def test_mixed_kernels(mixed):
    torch.manual_seed(0)
    L = mixed.launch
    n = 300
    a, o = torch.randn(n), torch.zeros(n)
    L("k_math", 3, 128, 0, [a, o, n])
    x, p, i = a.double(), a.double().abs(), torch.arange(n)
    close(
        o,
        2 * x.exp()
        + (p + 1).log()
        + p.log1p()
        + x.tanh()
        + (p + 1).rsqrt()
        + p.sqrt()
        + 1 / (x * x + 1)
        + (p + 2).log()
        + torch.fmod(a, 0.7).double()
        + p**1.5
        + torch.erf(x)
        + i // 7
        + i % 5
        + x.sin()
        + (3 * x).cos(),
        2e-6,
    )
    a, o = torch.randn(n).double(), torch.zeros(n).double()
    L("k_double", 3, 128, 0, [a, o, n])
    close(o, a * 2 + a.exp() + (a.abs() + 1).log() + a.abs().sqrt() + a.float().double() + a.trunc(), 1e-14)
    a, o = torch.randn(400), torch.zeros(400)
    L("k_vector", 1, 128, 0, [a, o, 100])
    assert torch.equal(o.view(-1, 4), a.view(-1, 4) * torch.tensor([1.0, 1, 1, 2]) + torch.tensor([1.0, 0, 0, 0]))
    a, o = torch.randn(128).bfloat16(), torch.zeros(128).bfloat16()
    L("k_bf16x2", 1, 64, 0, [a, o, 64])
    assert torch.equal(o, ((a + a) * torch.tensor([0.5, 0.25]).repeat(64).bfloat16()))
    a, o = torch.randn(64).half(), torch.zeros(64).half()
    L("k_half", 1, 64, 0, [a, o, 64])
    close(o, a.double() ** 2 + a.double().exp(), 2e-3)
    for k in ("k_cub", "k_cg"):
        a, o = torch.randn(128), torch.zeros(1)
        L(k, 1, 128, 0, [a, o])
        close(o, a.double().sum().view(1), 1e-5)
    a, o = torch.randn(n), torch.zeros(1, dtype=torch.int64)
    L("k_argmax", 3, 128, 0, [a, o, n])
    assert (o.item() & 0xFFFFFFFF) == a.argmax().item()
    a, o = torch.randint(0, 64, (64,), dtype=torch.int32), torch.zeros(64)
    L("k_local", 1, 64, 0, [a, o])
    assert torch.equal(o, a * 1.5)
    a, o = torch.randint(-9, 9, (32,), dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    L("k_vote", 1, 32, 0, [a, o])
    b = sum(1 << i for i in range(32) if a[i] > 0)
    assert (
        o
        == bin(b).count("1")
        + (b & -b).bit_length()
        + 32
        - b.bit_length()
        + int((a > 5).any())
        + a.sum()
        + a[3]
        + (a > 0).sum()
    ).all()
    a, o = torch.randn(512), torch.zeros(512)
    L("k_pipe", 1, 128, 0, [a, o])
    assert torch.equal(o, a.view(128, 4).flip(0).reshape(-1))
    for seed in (0, 1, 2, 3):
        a, p, c, o = torch.randn(128), torch.zeros(4), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        L("k_last_block", 4, 32, 0, [a, p, c, o], seed=seed)
        close(o, a.double().sum().view(1), 1e-5)
    a, o = torch.ones(128).bfloat16(), torch.zeros(2).bfloat16()
    L("k_atomic_bf16", 1, 64, 0, [a, o])
    assert o.tolist() == [64, 64]
    a, o = torch.randint(1, 99, (64,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    L("k_diverge", 1, 64, 0, [a, o])

    def collatz(x):
        c = 0
        while x > 1:
            x, c = (3 * x + 1 if x & 1 else x >> 1), c + 1
        return c

    assert o.tolist() == [collatz(x) for x in a.tolist()]
    L("k_assert", 1, 64, 0, [a])
    a[5] = -1
    with pytest.raises(ptxemu.Trap):
        L("k_assert", 1, 64, 0, [a])
