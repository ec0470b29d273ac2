# mypy: disallow-untyped-defs=False
"""A pair function of a user's own in the CPU's kernels: what it computes, what it costs to have it made, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import doctor
from fastcl.backends import choice, extension, own_pairs, pair_libraries
from fastcl.equation.intrinsics import log1p, softplus
from fastcl.pairs import PairFunction

pytestmark = [
    pytest.mark.skipif(
        extension.library is None or pair_libraries.compiler() is None or pair_libraries._misfit() is not None,
        reason="needs the compiled kernels, their headers and a C++ compiler",
    ),
    pytest.mark.xdist_group("own pairs"),  # compiled once
]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Double(PairFunction, name="own_softplus"):
    """f(z) = w log(1 + e^z): that of fastcl again for w = 1. The local name is a word of C++."""

    w: float

    @staticmethod
    def value(z, w):
        double = softplus(z)
        return w * double


del PairFunction.registry[Double.name]  # this module's tests alone have it


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Double, compiled once for this module: the folder that keeps it."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(pair_libraries.COMPILE_VARIABLE)
        patch.setenv(pair_libraries.CACHE_VARIABLE, str(folder))
        patch.setattr(own_pairs, "_kernels", {})
        own_pairs.wait(Double(1.0))
        assert own_pairs.reason("cpu", Double(1.0)) is None
        yield folder


@pytest.fixture
def place(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh process's state and an empty folder for libraries."""
    monkeypatch.setitem(PairFunction.registry, Double.name, Double)
    monkeypatch.delenv(pair_libraries.COMPILE_VARIABLE, raising=False)
    monkeypatch.setenv(pair_libraries.CACHE_VARIABLE, str(tmp_path / "kept"))
    monkeypatch.setattr(own_pairs, "_kernels", {})
    return tmp_path / "kept"


@pytest.fixture
def compiler(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quick compiler: it writes down that it ran, and copies what was compiled above. Tests put other lines into it."""
    (prepared,) = kept.glob("pair-*.so")
    (tmp_path / "prepared.so").write_bytes(prepared.read_bytes()[: -pair_libraries.DIGEST])
    written(tmp_path, f"cp {tmp_path / 'prepared.so'} pair.so")
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    return tmp_path


def written(place: Path, line: str) -> None:
    lines = ["#!/bin/sh", '[ "$1" = --version ] && exec echo a compiler of a test', f"echo ran >> {place / 'log'}"]
    path = place / "compiler"
    path.write_text("\n".join([*lines, line, ""]))
    path.chmod(0o755)


def runs(place: Path) -> int:
    return len((place / "log").read_text().splitlines()) if (place / "log").exists() else 0


X, Y = torch.randn(2, 150, 24, generator=torch.Generator().manual_seed(0)).unbind()


def answers(pair: str | PairFunction, dtype: torch.dtype, backend: str = "cpu", **given: object) -> list[torch.Tensor]:
    """r, c and a total with their gradients."""
    x, y = (t.to(dtype, copy=True).requires_grad_() for t in (X, Y))
    arguments = {"pair": pair, "reduce": "sum", "scale": 0.3, "backend": backend, **given}
    r, c = fastcl.pair_reduce(x, y, columns=True, **arguments)
    total = fastcl.pair_total(x, y, outer="sum", **arguments)
    itself = fastcl.pair_total(x, outer="sum", **arguments)
    upstream = torch.linspace(-1.0, 2.0, len(r), dtype=r.dtype)
    sums = (torch.dot(r, upstream) + torch.dot(c, upstream), total, itself)
    return [t.detach() for t in (r, c, total, itself)] + [
        g for s in sums for g in torch.autograd.grad(s, (x, y), allow_unused=True) if g is not None
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [{}, {"operand": "sqdist", "mask": "off_diagonal", "scale": -0.02}], ids=str)
def test_it_is_the_one_that_is_built_in(
    dtype: torch.dtype, given: dict[str, object], place: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pair_libraries.CACHE_VARIABLE, str(kept))
    for own, built_in in zip(answers(Double(1.0), dtype, **given), answers("softplus", dtype, **given), strict=True):
        assert torch.equal(own, built_in)
    for own, true in zip(
        answers(Double(2.5), dtype, **given), answers(Double(2.5), torch.float64, "reference", **given), strict=True
    ):
        eps = torch.finfo(dtype).eps
        assert (own.double() - true).abs().max() <= 32 * eps * true.abs().max().clamp(min=1.0)


def test_the_torch_form_serves_while_it_is_compiled(place: Path, compiler: Path) -> None:
    written(compiler, f"while [ ! -e {compiler}/go ]; do sleep 0.02; done; cp {compiler}/prepared.so pair.so")
    assert choice.choose("auto", CPU, torch.float32, Double(1.0))[0] == "blocked"
    r = fastcl.pair_reduce(X, Y, pair=Double(1.0), reduce="sum")
    assert "is being compiled" in str(choice.reason("cpu", CPU, torch.float32, Double(1.0)))
    (compiler / "go").touch()
    own_pairs.wait(Double(1.0))
    assert choice.choose("auto", CPU, torch.float32, Double(3.0))[0] == "cpu"
    torch.testing.assert_close(fastcl.pair_reduce(X, Y, pair=Double(1.0), reduce="sum"), r)
    assert runs(compiler) == 1 and [p.suffix for p in sorted(place.iterdir())] == [".lock", ".so"]


PROGRAM = """
import threading, torch, fastcl
from fastcl.backends import choice, own_pairs
from fastcl.pairs import PairFunction
from tests.cpu.test_own_pairs import Double
PairFunction.registry[Double.name] = Double
x = torch.ones(3, 2)
def ask():
    fastcl.pair_reduce(x, pair=Double(1.0), reduce="sum", backend="cpu")
threads = [threading.Thread(target=ask) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
print(choice.choose("auto", x.device, x.dtype, Double(1.0))[0])
"""


def test_two_processes_and_eight_threads_compile_it_once(place: Path, compiler: Path) -> None:
    written(compiler, f"sleep 1; cp {compiler}/prepared.so pair.so")
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        out, said = process.communicate(timeout=120)
        assert out.strip() == "cpu", said
    assert runs(compiler) == 1


def served_in_torch(reason: str) -> None:
    """With one warning that says why; the answer is right all the same."""
    own_pairs.wait(Double(1.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            r = fastcl.pair_reduce(X, Y, pair=Double(1.0), reduce="sum")
    assert len(said) == 1 and "serves the pair function 'own_softplus' in pure PyTorch" in str(said[0].message)
    assert reason in str(said[0].message)
    torch.testing.assert_close(r, fastcl.pair_reduce(X, Y, pair="softplus", reduce="sum"))
    with pytest.raises(fastcl.BackendUnavailableError, match="its kernel for the pair function 'own_softplus' could"):
        fastcl.pair_reduce(X, Y, pair=Double(1.0), reduce="sum", backend="cpu")


WRONG = {
    "echo 'pair.cpp:1: error: a word too many' >&2; exit 1": "failed: pair.cpp:1: error: a word too many",
    "exit 3": "failed: without a message",
    "printf half > pair.so; kill -9 $$": "was ended by signal 9",
    "printf half > pair.so": "pair.so",
    "exit 0": "pair.so",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_compiler_that_fails(line: str, place: Path, compiler: Path) -> None:
    written(compiler, line)
    served_in_torch(WRONG[line])
    assert runs(compiler) == 1
    assert not [p for p in place.iterdir() if p.name.startswith("writing")]
    assert all(pair_libraries._kept(p) is None for p in place.glob("*.so"))


def test_a_compiler_that_takes_too_long(place: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_libraries, "PATIENCE", 0.2)
    written(compiler, "sleep 60")
    began = time.monotonic()
    served_in_torch("took longer than")
    assert time.monotonic() - began < 10


def test_what_does_not_mean_the_same_does_not_serve(place: Path, compiler: Path) -> None:
    """A library of another function, as from a broken compiler, is held against the torch form first."""

    @dataclass(frozen=True)
    class Other(PairFunction, name="own_other"):
        w: float

        @staticmethod
        def value(z, w):
            return w * log1p(z * z)

    try:
        own_pairs.wait(Other(1.0))
        with pytest.warns(
            RuntimeWarning, match=r"its value at z = -7\.31 is .* by the compiled kernel and .* by torch"
        ):
            assert "could not be made" in str(own_pairs.reason("cpu", Other(1.0)))
    finally:
        del PairFunction.registry["own_other"]


def test_no_compiler_is_said_by_doctor_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert choice.choose("auto", CPU, torch.float32, Double(1.0))[0] == "blocked"
    with pytest.raises(fastcl.BackendUnavailableError, match=r"no C\+\+ compiler was found \(tried no-such-compiler\)"):
        choice.choose("cpu", CPU, torch.float32, Double(1.0))
    assert dict(doctor.own_pair_functions())["CPU"].startswith("served in pure PyTorch: no C++ compiler was found")
    monkeypatch.setenv("CXX", "g++ '-O1")  # a quotation that does not end
    assert pair_libraries.compiler() is None
    monkeypatch.delenv("CXX")
    assert dict(doctor.own_pair_functions())["kept in"] == str(place)


def test_a_compiler_and_a_folder_from_where_the_process_stands(
    place: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compiler)
    monkeypatch.setenv("CXX", "./compiler")
    monkeypatch.setenv(pair_libraries.CACHE_VARIABLE, ".")
    for _ in range(2):
        monkeypatch.setattr(own_pairs, "_kernels", {})
        own_pairs.wait(Double(1.0))
        assert own_pairs.reason("cpu", Double(1.0)) is None
    assert runs(compiler) == 1


@pytest.mark.parametrize("trouble", ["a file stands there", "full", "open to all"])
def test_a_folder_that_keeps_nothing_is_no_error(
    trouble: str, place: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "full":

        def full(content: bytes, path: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pair_libraries, "_keep", full)
    elif trouble == "open to all":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.write_text("")
    own_pairs.wait(Double(1.0))
    assert own_pairs.reason("cpu", Double(1.0)) is None
    assert not place.is_dir() or not list(place.glob("*.so"))
    if trouble != "full":
        assert dict(doctor.own_pair_functions())["kept in"].startswith("memory, for one process: ")


@pytest.mark.parametrize("damage", ["none", "cut short", "another byte", "open to all"])
def test_a_kept_library_that_is_damaged_is_not_opened(
    damage: str, place: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_pairs.wait(Double(1.0))
    (path,) = place.glob("pair-*.so")
    content = path.read_bytes()
    path.unlink()  # it is open: what follows is another file
    if damage == "another byte":
        content = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    path.write_bytes(content[: len(content) // 2] if damage == "cut short" else content)
    path.chmod(0o666 if damage == "open to all" else 0o600)
    monkeypatch.setattr(own_pairs, "_kernels", {})
    own_pairs.wait(Double(1.0))
    assert own_pairs.reason("cpu", Double(1.0)) is None
    assert runs(compiler) == (1 if damage == "none" else 2)


def test_a_child_that_was_forked_meanwhile_begins_anew(place: Path, compiler: Path) -> None:
    written(compiler, f"sleep 0.5; cp {compiler}/prepared.so pair.so")
    own_pairs.reason("cpu", Double(1.0))
    child = os.fork()
    if child == 0:
        try:
            own_pairs.wait(Double(1.0))
            os._exit(0 if own_pairs.reason("cpu", Double(1.0)) is None else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    own_pairs.wait(Double(1.0))
    assert own_pairs.reason("cpu", Double(1.0)) is None


def test_a_child_that_ends_meanwhile_leaves_the_compiler_alone(place: Path, compiler: Path) -> None:
    written(compiler, f"sleep 0.5; cp {compiler}/prepared.so pair.so")
    own_pairs.reason("cpu", Double(1.0))
    while not runs(compiler):
        time.sleep(0.02)
    child = os.fork()
    if child == 0:
        pair_libraries._end_all()  # as at its exit
        os._exit(0)
    os.waitpid(child, 0)
    own_pairs.wait(Double(1.0))
    assert own_pairs.reason("cpu", Double(1.0)) is None and not pair_libraries._places


def test_threads_that_ask_while_it_is_made_get_right_answers(place: Path, compiler: Path) -> None:
    written(compiler, f"sleep 0.3; cp {compiler}/prepared.so pair.so")
    true, wrong = fastcl.pair_reduce(X, Y, pair="softplus", reduce="sum"), []

    def ask() -> None:
        while not own_pairs._kernel(Double(1.0)).done.is_set():
            if not torch.allclose(fastcl.pair_reduce(X, Y, pair=Double(1.0), reduce="sum"), true):
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and runs(compiler) == 1


@dataclass(frozen=True)
class Nine(PairFunction, name="own_nine"):
    """One constant more than the kernels hold."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f_: float
    g: float
    h: float
    i: float

    @staticmethod
    def value(z, a, b, c, d, e, f_, g, h, i):
        return z * (a + b + c + d + e + f_ + g + h + i)


del PairFunction.registry[Nine.name]


def test_more_constants_than_the_kernels_hold(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PairFunction.registry, Nine.name, Nine)
    pair = Nine(*[1.0] * 9)
    assert "at most 8 constants" in str(own_pairs.reason("cpu", pair))
    assert choice.choose("auto", CPU, torch.float32, pair)[0] == "blocked"
    torch.testing.assert_close(
        fastcl.pair_reduce(X, Y, pair=pair, reduce="sum"), 9.0 * (X @ Y.T).sum(1), rtol=1e-5, atol=1e-3
    )
