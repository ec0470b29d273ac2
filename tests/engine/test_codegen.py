"""Pair functions are written once: the generated files are fresh, mean the same, and all else is refused by name."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.equation import codegen, intrinsics, language, pairs
from fastcl.equation.pairs import PairFunction

from .combinations import pair_functions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this tree, where the package itself may be one that was installed."""
    monkeypatch.setattr(codegen, "ROOT", ROOT)


def test_generated_files_are_fresh() -> None:
    for path, text in codegen.generated().items():
        assert path.read_text() == text, f"{path.name} is stale; run `python -m fastcl.equation.codegen`"


def test_check_reports_a_stale_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stale = ROOT / "csrc" / "generated" / "pairs.h"
    monkeypatch.setattr(codegen, "generated", lambda: {stale: "something else"})
    assert codegen.main(["--check"]) == 1
    assert capsys.readouterr().out == "stale: csrc/generated/pairs.h; run `python -m fastcl.equation.codegen`\n"


def test_an_installed_package_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside it are other packages, and triton_kernels is the name of one."""
    monkeypatch.setattr(codegen, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        codegen.main([])
    assert "run it in the folder of the fastcl source" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pair", list(pair_functions()), ids=lambda p: p.name)
def test_slope_is_the_derivative_of_value(pair: PairFunction) -> None:
    z = torch.linspace(-0.9, 2.0, 53, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(pair.f(z).sum(), z)
    torch.testing.assert_close(pair.df(z), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pair", list(pair_functions()), ids=lambda p: p.name)
def test_nan_passes_through(pair: PairFunction) -> None:
    z = torch.tensor([float("nan")])
    assert pair.f(z).isnan().all()
    assert pair.name == "identity" or pair.df(z).isnan().all()


REFUSED = {
    "a comparison": ("z > 0.0", "'z > 0.0' is outside the language"),
    "an unknown function": ("cosh(z)", "'cosh(z)' is outside the language"),
    "an attribute": ("z.exp()", "'z.exp()' is outside the language"),
    "a power operator": ("z ** 2", "'z ** 2' is outside the language"),
    "a conditional": ("z if z else 1.0", "'z if z else 1.0' is outside the language"),
    "an unknown name": ("z + unknown", "'unknown' is outside the language"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_all_else_is_refused_by_name(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expression, message = REFUSED[what]
    (tmp_path / "foreign_pair.py").write_text(
        f"class Foreign:\n    @staticmethod\n    def value(z):\n        return {expression}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_pair", raising=False)
    import foreign_pair  # type: ignore[import-not-found]

    body = language.Body(foreign_pair.Foreign, "value")
    with pytest.raises(language.RefusedError, match=r"Foreign\.value") as error:
        body.expression(body.returned, repr, "", {"z": "z"})
    assert message in str(error.value)


PROGRAM = """
#include <cstdio>
#include "generated/pairs.h"
template <class Pair, class T> void print(const char* name, T k0, T k1) {
  const T k[2] = {k0, k1};
  for (int i = 0; i <= 28; ++i) {
    const T z = T(-0.9) + T(i) * T(0.1);
    std::printf("%s %zu %.17g %.17g %.17g\\n", name, sizeof(T), double(z), double(Pair::value(z, k)), double(Pair::slope(z, k)));
  }
}
int main() {
"""


def test_header_means_the_same_in_float_and_double(tmp_path: Path) -> None:
    """The C++ of every pair function, compiled and run, against its PyTorch. (SIMD registers: tests/cpu.)"""
    by_name = {p.name: p for p in pair_functions()}
    calls = []
    for name, pair in by_name.items():
        k0, k1 = (*pair.constants, 0.0, 0.0)[:2]
        for scalar in ("float", "double"):
            calls.append(f'print<fastcl::pairs::{type(pair).__name__}, {scalar}>("{name}", {k0!r}, {k1!r});')
    source, binary = tmp_path / "pairs.cpp", tmp_path / "pairs"
    source.write_text(PROGRAM + "\n".join(calls) + "\n}\n")
    subprocess.run(["g++", "-std=c++20", "-O1", "-I", str(ROOT / "csrc"), str(source), "-o", str(binary)], check=True)
    lines = subprocess.run([binary], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(by_name) * 2 * 29
    for line in lines:
        name, size, *numbers = line.split()
        z, value, slope = (torch.tensor(float(t), dtype=torch.float64) for t in numbers)
        eps = 2e-15 if size == "8" else 1e-6
        for got, want in ((value, by_name[name].f(z)), (slope, by_name[name].df(z))):
            assert abs(got - want) <= eps * (1.0 + abs(want)), line


def test_every_intrinsic_of_the_language_has_its_torch_meaning() -> None:
    assert {
        "exp",
        "expm1",
        "log",
        "log1p",
        "sigmoid",
        "softplus",
        "rsqrt",
        "pow",
        "maximum",
        "minimum",
        "select_less",
    } == language.INTRINSICS
    assert all(hasattr(intrinsics, name) for name in language.INTRINSICS)


def test_a_user_pair_function_works_at_once_on_pure_pytorch() -> None:
    import fastcl

    @dataclass(frozen=True)
    class Cube(PairFunction, name="cube"):
        """f(z) = z^3."""

        @staticmethod
        def value(z: Any) -> Any:
            return z * z * z

        @staticmethod
        def slope(z: Any) -> Any:
            return 3.0 * z * z

    try:
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        loss = fastcl.pair_total(x, outer="sum", pair=Cube(), reduce="sum", backend="blocked")
        torch.testing.assert_close(loss, ((x @ x.T) ** 3).sum())
        assert torch.autograd.gradcheck(
            lambda x: fastcl.pair_total(x, outer="sum", pair=Cube(), reduce="sum", backend="blocked"), x
        )
    finally:
        del PairFunction.registry["cube"]
    assert "cube" not in pairs.PairFunction.registry
