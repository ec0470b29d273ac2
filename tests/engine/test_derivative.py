"""A pair function of which `value` alone is written: its slope, for drawn expressions of the language, is autograd's."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcl
from fastcl.equation import codegen
from fastcl.equation.derivative import derived_slope
from fastcl.equation.language import Body, RefusedError
from fastcl.equation.pairs import PairFunction

from .combinations import pair_functions

Z = torch.linspace(-1.95, 1.95, 40, dtype=torch.float64)
K = (0.7, 1.3)
numbers = st.sampled_from(["0.0", "1.0", "-1.0", "0.5", "2.0", "-0.3", "3", "p", "q"])
bounds = st.sampled_from(["-0.4", "0.5", "p", "q - 1.0", "0.0"])


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """One more operation; every function within its domain, and of something that depends on z."""
    of_z = inner.map(lambda e: f"(z - {e})")
    sums = st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
    plain = ["sigmoid({0})", "softplus({0})", "-({0})", "1.0 / (1.5 + sigmoid({0}))"]
    plain += ["exp(minimum({0}, 2.0))", "expm1(minimum({0}, 2.0))"]
    positive = [
        "log(maximum({0}, 0.1))",
        "log1p(sigmoid({0}))",
        "rsqrt(1.0 + softplus({0}))",
        "pow(0.2 + sigmoid({0}), p)",
    ]
    clamps = ["maximum({0}, {1})", "minimum({0}, {1})", "select_less({0}, {1}, {0}, 2.0 * {0})"]
    functions = st.tuples(st.sampled_from(plain + positive + clamps), of_z, bounds)
    return sums | functions.map(lambda t: t[0].format(t[1], t[2]))


expressions = st.recursive(st.just("z") | st.just("z") | numbers, grown, max_leaves=8)
bodies = st.tuples(expressions, expressions, st.booleans()).map(
    lambda t: [f"s = {t[0]}", *(["s = s * s + z"] if t[2] else []), f"return ({t[1]}) * s + ({t[1]})"]
)
counter = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


def written(body: list[str], folder: Path) -> type:
    """A class whose `value` stands in a file, as a user's does."""
    path = folder / f"drawn_{next(counter)}.py"
    lines = "\n".join(f"        {line}" for line in body)
    path.write_text(
        f"from fastcl.equation.intrinsics import *\n\nclass Drawn:\n    @staticmethod\n    def value(z, p, q):\n{lines}\n"
    )
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(path.read_text(), str(path), "exec"), names)
    found: type = names["Drawn"]
    return found


def of(function: Any) -> torch.Tensor:
    answer = function(Z, *K)
    return answer if isinstance(answer, torch.Tensor) else torch.full_like(Z, answer)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(body=bodies)
def test_drawn_expressions(body: list[str], folder: Path) -> None:
    cls = written(body, folder)
    slope = derived_slope(cls)
    z = Z.clone().requires_grad_()
    value = cls.value(z, *K)  # type: ignore[attr-defined]
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        assert torch.equal(of(slope), torch.zeros_like(Z))
        return
    (expected,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(of(slope), expected, rtol=1e-11, atol=1e-11)


ROOTS_OF_CLAMPS = (
    ["m = maximum(z, 0.0)", "return pow(m, p)"],
    ["return pow(2.0 * maximum(z, 0.0), p)"],
    ["return pow(maximum(-z, 0.0), p)"],
    ["return pow(maximum(maximum(z, 0.0) - 0.5, 0.0), p)"],
    ["return pow(maximum(z - 1.0, 0.0) - minimum(z + 1.0, 0.0), p)"],
    ["s = maximum(z, 0.0)", "return log1p(pow(s, p)) / (q + s)"],
    ["s = select_less(z, 0.0, 0.0, z * z) * 0.5", "t = s / q", "return q - pow(t, p)"],
)


@pytest.mark.parametrize("body", ROOTS_OF_CLAMPS, ids=" ; ".join)
def test_where_a_clamp_hands_nothing_on_an_infinite_factor_is_nothing(body: list[str], folder: Path) -> None:
    """The root of what a clamp holds at 0: autograd masks the infinite slope there, a product of the two would be NaN."""
    cls = written(body, folder)
    slope, z = derived_slope(cls), Z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(cls.value(z, *K).sum(), z)  # type: ignore[attr-defined]
    assert expected.isfinite().all() and (expected == 0.0).any()
    torch.testing.assert_close(of(slope), expected, rtol=1e-12, atol=1e-12)


def test_a_step_of_z_may_go_into_a_function(folder: Path) -> None:
    """Its slope is 0, and yet z reaches it."""
    cls = written(["s = select_less(z, 0.0, p, q)", "return exp(-s) * z"], folder)
    torch.testing.assert_close(of(derived_slope(cls)), torch.exp(-torch.where(Z < 0.0, *map(torch.tensor, K))).double())


def test_constants_alone_may_decide(folder: Path) -> None:
    cls = written(["return select_less(p, 0.5, z, q * z * z)"], folder)
    torch.testing.assert_close(of(cls.value), K[1] * Z * Z)  # type: ignore[attr-defined]
    torch.testing.assert_close(of(derived_slope(cls)), 2.0 * K[1] * Z)


def test_their_cpp_means_the_same(folder: Path) -> None:
    """Value and derived slope of a few drawn expressions, generated, compiled and run in double."""
    drawn: list[type] = []

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(body=bodies)
    def draw(body: list[str]) -> None:
        cls = written(body, folder)
        cls.slope = staticmethod(derived_slope(cls))  # type: ignore[attr-defined]
        cls.__name__ = f"Drawn{len(drawn)}"
        cls.constant_names, cls.name = ("p", "q"), f"drawn{len(drawn)}"  # type: ignore[attr-defined]
        drawn.append(cls)

    draw()
    header = codegen.cpp_header({cls.name: cls for cls in drawn})  # type: ignore[attr-defined]
    calls = "".join(f"print<fastcl::pairs::{c.__name__}>();\n" for c in drawn)
    (folder / "generated").mkdir()
    (folder / "generated" / "drawn.h").write_text(header)
    source = folder / "drawn.cpp"
    zs = ", ".join(repr(float(z)) for z in Z)
    source.write_text(
        f'#include <cstdio>\n#include "generated/drawn.h"\nconst double k[] = {{{K[0]}, {K[1]}}}, zs[] = {{{zs}}};\n'
        "template <class Pair> void print() {\n"
        '  for (double z : zs) std::printf("%.17g %.17g\\n", Pair::value(z, k), Pair::slope(z, k));\n}\n'
        f"int main() {{\n{calls}}}\n"
    )
    (folder / "intrinsics.h").write_text(
        f'#include "{Path(__file__).resolve().parents[2] / "csrc" / "intrinsics.h"}"\n'
    )
    subprocess.run(["g++", "-std=c++20", "-O1", "-w", str(source), "-o", str(folder / "drawn")], check=True)
    lines = subprocess.run([folder / "drawn"], check=True, capture_output=True, text=True).stdout.split()
    got = torch.tensor([float(x) for x in lines], dtype=torch.float64).reshape(len(drawn), len(Z), 2)
    for cls, columns in zip(drawn, got, strict=True):
        for function, column in ((cls.value, columns[:, 0]), (cls.slope, columns[:, 1])):  # type: ignore[attr-defined]
            torch.testing.assert_close(column, of(function), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pair", list(pair_functions()), ids=lambda p: p.name)
def test_slopes_written_by_hand_are_the_derived_ones(pair: PairFunction) -> None:
    z = torch.linspace(-0.9, 2.0, 53, dtype=torch.float64)
    derived = derived_slope(type(pair))(z, *pair.constants)
    derived = derived if isinstance(derived, torch.Tensor) else torch.full_like(z, derived)
    torch.testing.assert_close(derived, pair.df(z), rtol=1e-13, atol=1e-15)


REFUSED = {
    "tanh(z)": "'tanh(z)' is outside the language",
    "pow(2.0, z)": "expected a second argument of pow that does not depend on z",
    "maximum(0.0, z)": "expected a second argument of maximum that does not depend on z",
    "exp(z, z)": "expected 1 argument of exp",
    "z if z < 0.0 else -z": "is outside the language",
    "exp(*z)": "is outside the language",
    "(lambda: z)()": "is outside the language",
    "__import__('os').getcwd()": "is outside the language",
    "z[0]": "'z[0]' is outside the language",
    "'text'": "is outside the language",
    "True * z": "'True' is outside the language",
}


@pytest.mark.parametrize("expression", REFUSED)
def test_what_is_refused_is_named_with_its_place(expression: str, folder: Path) -> None:
    with pytest.raises(RefusedError) as error:
        derived_slope(written(["s = z", f"return s + {expression}"], folder))
    said = str(error.value)
    assert REFUSED[expression] in said and "line 7, column " in said and "Drawn.value" in said


def test_no_text_but_the_language_is_compiled(folder: Path) -> None:
    """A name, a string and a decorator that would run something are refused, or read as nothing but numbers."""
    for expression in ("z + fastcl_gone", "z + __name__", "exp.__globals__", "z + (s := 1.0)", "f'{z}'"):
        with pytest.raises(RefusedError):
            derived_slope(written([f"return {expression}"], folder))
    shadowed = written(["return exp(z)"], folder)
    shadowed.value.__globals__["exp"] = lambda z: z  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="this module has another of that name"):
        derived_slope(shadowed)


def test_a_class_whose_source_cannot_be_read_says_so() -> None:
    program = (
        "from fastcl.pairs import PairFunction\n"
        "class Mine(PairFunction, name='mine'):\n    @staticmethod\n    def value(z):\n        return z * z\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "expected a function whose source can be read" in done.stderr and "or write its slope too" in done.stderr


def test_value_alone_serves_a_reduction_with_gradients(folder: Path) -> None:
    path = folder / "mine.py"
    path.write_text(
        "from fastcl.equation.intrinsics import exp\nfrom fastcl.pairs import PairFunction\n\n"
        "class Mine(PairFunction, name='mine_of_a_test'):\n    @staticmethod\n    def value(z):\n        return z * exp(-z)\n"
    )
    names: dict[str, Any] = {"__name__": "mine"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    try:
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        total = lambda x: fastcl.pair_total(x, outer="sum", pair=names["Mine"](), reduce="sum", backend="blocked")  # noqa: E731
        z = x @ x.T
        torch.testing.assert_close(total(x), (z * torch.exp(-z)).sum())
        assert torch.autograd.gradcheck(total, x)
    finally:
        del PairFunction.registry["mine_of_a_test"]


def test_bodies_keep_their_derived_text(folder: Path) -> None:
    cls = written(["return exp(z)"], folder)
    cls.slope = staticmethod(derived_slope(cls))  # type: ignore[attr-defined]
    assert Body(cls, "slope").argument == "z"
