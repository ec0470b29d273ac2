"""Triton launches through the real compiler and the interpreter, against torch in fp64; mutations of Triton's PTX."""

import pathlib
import re
import sys
import warnings

import pytest

from tools import ptxemu
from tools.ptxemu import Module
from tools.ptxemu import triton as emulated

from .launching import needs_triton

pytestmark = needs_triton
torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "kernels"))
TAU = 0.07


@pytest.fixture(params=[80, 90])
def session(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with emulated.activate(request.param) as s:
            yield s


def unit(n, d, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1).to(dtype)


CASES = [
    (torch.bfloat16, "ieee", 3e-6, 6e-3),
    (torch.float16, "ieee", 3e-6, 1e-3),
    (torch.float32, "tf32", 5e-3, 1e-2),
    (torch.float32, "tf32x3", 5e-6, 1e-5),
]


@pytest.mark.parametrize("dtype,prec,tol,gtol", CASES)
@pytest.mark.parametrize("warps", [4, 8])
def test_lse(session, dtype, prec, tol, gtol, warps):
    from tools.ptxemu.tests.kernels.triton_lse import lse_bwd, lse_fwd

    N, M, D = 150, 101, 64
    X, Y, out = unit(N, D, dtype, 0), unit(M, D, dtype, 1), torch.empty(N)
    session.uninitialized = [out]
    lse_fwd[lambda m: (triton.cdiv(N, m["BM"]),)](
        X, Y, out, N, M, 1 / TAU, D, D, D=D, BM=64, BN=64, BD=32, PREC=prec, num_warps=warps, num_stages=3
    )
    x, y = X.double().requires_grad_(), Y.double().requires_grad_()
    want = torch.logsumexp(x @ y.T / TAU, 1)
    assert (out - want).abs().max() < tol
    if session.capability == 90 and dtype != torch.float32:
        assert any(k.startswith("wgmma.mma_async") for k in session.stats[-1].by_opcode)
    assert session.stats[-1].mma_flops >= 2 * N * M * D
    g = torch.randn(N, generator=torch.Generator().manual_seed(2))
    (want * g).sum().backward()
    dx, dy = torch.empty(N, D), torch.zeros(M, D)
    session.uninitialized = [dx]
    lse_bwd[(triton.cdiv(N, 64),)](
        X,
        Y,
        want.detach().float(),
        g,
        dx,
        dy,
        N,
        M,
        1 / TAU,
        D,
        D,
        D=D,
        BM=64,
        BN=64,
        PREC=prec,
        num_warps=warps,
        num_stages=2,
    )
    for a, b in ((dx, x.grad), (dy, y.grad)):
        assert (a - b).abs().max() / b.abs().max() < gtol
    assert session.stats[-1].atomics > 0


def test_misc_and_autotune(session):
    from tools.ptxemu.tests.kernels.triton_lse import add_one, misc

    N, B = 200, 256
    x, o, oi = (
        torch.randn(N, generator=torch.Generator().manual_seed(0)),
        torch.zeros(8 + 3 * B),
        torch.zeros(32, dtype=torch.int32),
    )
    misc[(1,)](x, o, oi, N, B=B, num_warps=4)
    i = torch.arange(N)
    assert abs(o[0] - torch.logsumexp(x, 0)) < 1e-5 and oi[0] == x.argmax()
    assert (o[8 : 8 + N] - x.cumsum(0)).abs().max() < 1e-4 and torch.equal(o[8 + B + B - N : 8 + 2 * B], x.sort()[0])
    want = x.sigmoid() + x.abs().sqrt() + (x.abs() + 1).rsqrt() + torch.erf(x) + x / 3 + i // 3 + i % 5
    assert (o[8 + 2 * B : 8 + 2 * B + N] - want).abs().max() < 1e-4 and oi[2:18].tolist() == [16] * 16
    n = len(session.stats)
    x, o = torch.randn(100), torch.zeros(100)
    add_one.cache.clear()
    add_one[lambda m: (triton.cdiv(100, m["B"]),)](x, o, 100)
    assert torch.equal(o, x + 1) and len(session.stats) - n >= 5  # every configuration ran, then the best one


def test_out_of_bounds_is_reported(session):
    from tools.ptxemu.tests.kernels.triton_lse import add_one

    x, o = torch.randn(100), torch.zeros(99)
    with pytest.raises(ptxemu.OutOfBounds) as e:
        add_one.fn[(4,)](x, o, 100, B=32, num_warps=1)
    assert "triton_lse.py" in e.value.source


COMMON = [
    ("bar.sync", r"bar\.sync\s+0;", "", True),
    ("wait_group", r"cp\.async\.wait_group\s+\w+\s*;", "", True),
    ("shuffle distance", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 2,", r"\1, 4,", False),
    ("dropped predicate", r"@%p\d+ (st\.global)", r"\1", False),
    ("add for sub", r"sub\.f32", "add.f32", False),
]
MUTATIONS = {
    80: COMMON
    + [
        (
            "ldmatrix transposed",
            r"(ldmatrix\.sync\.aligned\.m8n8\.x4)(\.trans)?(\.shared)",
            lambda m: m[1] + ("" if m[2] else ".trans") + m[3],
            False,
        )
    ],
    90: COMMON
    + [
        ("wgmma wait", r"wgmma\.wait_group\.sync\.aligned \d;", "", True),
        ("proxy fence", r"fence\.proxy\.async\.shared::cta;", "", True),
        ("wgmma transposed", r"(wgmma\.mma_async[^;]*), 0;", r"\1, 1;", False),
        (
            "swizzle",
            r"(or\.b64\s+%rd\d+, %rd\d+, )(-?\d{16,});",
            lambda m: f"{m[1]}{(int(m[2]) ^ 3 << 62) & 2**64 - 1};",
            False,
        ),
        ("wgmma scale-d", r"(wgmma\.mma_async[^;]*\}, %rd\d+, %rd\d+), [^,]*,", r"\1, 0,", False),
    ],
}


@pytest.mark.parametrize("capability", [80, 90])
def test_mutants_are_caught(monkeypatch, capability):
    """Drop every barrier and every asynchronous wait of Triton's own forward kernel, and other single changes."""
    from tools.ptxemu.tests.kernels.triton_lse import lse_fwd

    N, M, D = 130, 150, 64
    X, Y, out = unit(N, D, torch.bfloat16, 0), unit(M, D, torch.bfloat16, 1), torch.zeros(N)
    want = torch.logsumexp(X.double() @ Y.double().T / TAU, 1)
    seen = {}
    original = Module.launch

    def launch(self, *a, **k):
        seen["args"] = a, k
        return original(self, *a, **k)

    monkeypatch.setattr(Module, "launch", launch)
    with emulated.activate(capability):
        k = lse_fwd[(3,)](
            X, Y, out, N, M, 1 / TAU, D, D, D=D, BM=64, BN=64, BD=32, PREC="ieee", num_warps=4, num_stages=3
        )
    text = k.asm["ptx"]
    assert (out - want).abs().max() < 3e-6
    monkeypatch.undo()
    args, kw = seen["args"]
    survivors, count = [], 0
    for name, pattern, new, every in MUTATIONS[capability]:
        hits = list(re.finditer(pattern, text))
        assert hits, name
        for n in range(len(hits)) if every else sorted({0, len(hits) // 2}):
            h = hits[n]
            mutant = text[: h.start()] + (new(h) if callable(new) else h.expand(new)) + text[h.end() :]
            count += 1
            for seed in (0, 1):
                out.zero_()
                try:
                    Module(mutant).launch(*args, **{**kw, "seed": seed})
                except ptxemu.PtxError:
                    break
                if not (out - want).abs().max() < 1e-4:
                    break
            else:
                survivors.append(f"{name} #{n}")
    assert count > 10
    # A barrier that only separates accesses of one warp, or accesses that a later barrier separates too, is redundant.
    assert len(survivors) <= REDUNDANT, survivors


REDUNDANT = 2
