"""Drawn expressions of the language, as the CPU's kernels compile them: on every instruction set, against torch and autograd; and
what a hostile class makes of its names, its comments and its numbers.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from fastcl.backends import extension, pair_libraries
from fastcl.equation.codegen import CPP_LINE, own_cpp
from fastcl.equation.derivative import derived_slope
from fastcl.equation.language import RefusedError

from ..engine.test_derivative import K, Z, bodies, folder, written

compiles = pytest.mark.skipif(
    extension.library is None or pair_libraries.compiler() is None,
    reason="needs the compiled kernels and a C++ compiler",
)
__all__ = ["folder"]

# value and slope of function k at each z, by the vectors of the instruction set.
DRIVER = """
template <class T, class Own> void evaluate(const T* z, int count, const T* k, T* out) {
  using V = fastcl::cpu::FASTCL_ISA::Simd<T>;
  const V constants[2] = {V(k[0]), V(k[1])};
  for (int i = 0; i < count; i += V::lanes) {
    Own::value(V::load(z + i), constants).store(out + i);
    Own::slope(V::load(z + i), constants).store(out + count + i);
  }
}
#define BOTH(k) {(void*)evaluate<float, fastcl::pairs::Own##k>, (void*)evaluate<double, fastcl::pairs::Own##k>},
"""


EVERY_INTRINSIC = [
    "exp(z) + log(z * z + 0.1)",
    "expm1(z) * expm1(p * z)",
    "log1p(z * z) + rsqrt(2.0 + z)",
    "sigmoid(z) * softplus(z)",
    "pow(z, 2.0) - pow(z, 3.0) + pow(z - 2.0, -3) * pow(z, 0)",
    "pow(2.0 + z, p) + maximum(z, q)",
    "minimum(z, p) * select_less(z, q, z * z, 2.0 * z)",
]


def of_class(cls: type, name: str = "drawn") -> type:
    cls.slope = staticmethod(derived_slope(cls))  # type: ignore[attr-defined]
    cls.constant_names, cls.name = ("p", "q"), name  # type: ignore[attr-defined]
    return cls


def library(texts: list[str], isa: str, place: Path) -> Any:
    """All of them in one library, which is quick: own_pair.h's macro is for one alone."""
    structs = []
    for k, text in enumerate(texts):
        lines = [line for line in text.splitlines() if not line.startswith(("#include", "FASTCL_OWN_PAIR"))]
        structs.append("\n".join(lines).replace("struct Own {", f"struct Own{k} {{"))
    table = "".join(f"BOTH({k})" for k in range(len(texts)))
    source = [
        '#include "cpu/own_pair.h"',
        *structs,
        DRIVER,
        f'extern "C" __attribute__((visibility("default"))) void* table[][2] = {{{table}}};',
        "",
    ]
    (place / f"{isa}.cpp").write_text("\n".join(source))
    facts = extension.facts()
    assert facts is not None
    flags = [*facts["cpu_flags"][isa], "-O1", "-w", "-shared", f"-I{pair_libraries.headers()}"]
    command = [*(pair_libraries.compiler() or []), *flags, f"{isa}.cpp", "-o", f"{isa}.so"]
    subprocess.run(command, cwd=place, check=True)
    return ctypes.CDLL(str(place / f"{isa}.so"))


def evaluated(opened: Any, k: int, dtype: torch.dtype, at: torch.Tensor = Z) -> tuple[torch.Tensor, torch.Tensor]:
    z, constants = at.to(dtype, copy=True), torch.tensor(K, dtype=dtype)
    z = torch.cat((z, z.new_zeros(-len(z) % 16)))  # whole vectors
    out = z.new_full((2, len(z)), math.nan)
    pointer = (ctypes.c_void_p * 2).from_address(
        ctypes.addressof(ctypes.c_char.in_dll(opened, "table")) + 2 * k * ctypes.sizeof(ctypes.c_void_p)
    )[int(dtype == torch.float64)]
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p])(pointer)
    function(z.data_ptr(), len(z), constants.data_ptr(), out.data_ptr())
    value, slope = out[:, : len(at)]
    return value, slope


def by_torch(cls: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The value, and its slope by autograd."""
    z = Z.to(dtype, copy=True).requires_grad_()
    value = cls.value(z, *K) + 0.0 * z
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def grading(got: torch.Tensor, true: torch.Tensor, rough: torch.Tensor) -> float:
    """The error in units of what torch itself errs in that dtype, and of the dtype's rounding."""
    allowed = 8 * (rough.double() - true).abs().max() + 64 * torch.finfo(got.dtype).eps * true.abs().max().clamp(
        min=1.0
    )
    return float(((got.double() - true).abs() / allowed).max())


@compiles
def test_drawn_expressions_on_every_instruction_set(folder: Path, tmp_path: Path) -> None:
    drawn: list[Any] = []

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(body=bodies)
    def draw(body: list[str]) -> None:
        drawn.append(of_class(written(body, folder)))

    draw()
    drawn += [of_class(written([f"return {call}"], folder)) for call in EVERY_INTRINSIC]
    texts = [own_cpp(cls) for cls in drawn]
    assert extension.library is not None
    for isa in extension.library.usable_isas():
        opened = library(texts, isa, tmp_path)
        for k, cls in enumerate(drawn):
            for dtype in (torch.float32, torch.float64):
                columns = zip(
                    evaluated(opened, k, dtype), by_torch(cls, torch.float64), by_torch(cls, dtype), strict=True
                )
                for what, (got, true, rough) in zip(("value", "slope"), columns, strict=True):
                    assert grading(got, true, rough) <= 1.0, (isa, dtype, what, texts[k])


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expm1_keeps_every_digit(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """Of what is near 0 too: to two units in the last place on every instruction set; and at the ends of what there is."""
    limits = torch.finfo(dtype)
    small = torch.logspace(-44 if dtype == torch.float32 else -322, 2, 4000, dtype=torch.float64)
    usual = torch.linspace(-40.0, 88.0, 4001, dtype=torch.float64)
    ends = torch.tensor([0.0, -0.0, limits.smallest_normal, limits.tiny / 4, 1e3, -1e3, math.inf, -math.inf, math.nan])
    z = torch.cat((small, -small, usual, usual / 64, ends.double())).to(dtype)
    exact = torch.expm1(z.double()) if dtype == torch.float32 else z.new_tensor([_expm1(float(t)) for t in z])
    assert extension.library is not None
    for isa in extension.library.usable_isas():
        opened = library([own_cpp(of_class(written(["return expm1(z)"], folder)))], isa, tmp_path)
        got, _ = evaluated(opened, 0, dtype, z)
        want = exact.to(dtype)
        units = (got.double() - exact).abs() / (limits.eps * exact.abs()).clamp(min=limits.smallest_normal * limits.eps)
        finite = want.isfinite() & (want != 0.0)
        assert torch.equal(got[~finite].nan_to_num(nan=7.0), want[~finite].nan_to_num(nan=7.0)), isa
        assert torch.equal(got.signbit()[want == 0.0], want.signbit()[want == 0.0]), isa
        assert float(units[finite].max()) <= 2.0, (isa, z[finite][units[finite].argmax()])


def _expm1(z: float) -> float:
    try:
        return math.expm1(z)
    except OverflowError:
        return math.inf


HOSTILE = [
    "int = sigmoid(z)", "T = softplus(z)", "k = z * p", "z_ = z", "v0 = z * q", "FASTCL_INLINE = z", "linux = exp(-z * z)",
    "\uff46\uff55 = z", "größe = z * 2.0", "asm = z", "__COUNTER__ = z", "NULL = -z", "struct = z + p",
]  # fmt: skip


@compiles
def test_words_of_the_user_do_not_reach_the_compiler(folder: Path, tmp_path: Path) -> None:
    """Locals that are words or macros of C++, names with quotes and newlines, and comments that end themselves."""
    classes = []
    for line in HOSTILE:
        local = line.partition(" ")[0]
        cls = of_class(written([line, f"return {local} * {local} + z"], folder), 'x"); }\n#include "/etc/passwd"\n//')
        cls.__name__ = 'Own {}; int evil() { return system("true"); }\n struct Rest'
        cls.__doc__ = "*/ \n int evil; /* \n# 1 \\ ??/"
        classes.append(cls)
    texts = [own_cpp(cls) for cls in classes]
    for text in texts:
        assert text.isascii() and not any(
            w in text for w in ("evil", "passwd", "linux", "asm", "__", "system", '"x', "//\n")
        )
    opened = library(texts, "baseline", tmp_path)
    for k, cls in enumerate(classes):
        (value, slope), (true, true_slope) = evaluated(opened, k, torch.float64), by_torch(cls, torch.float64)
        torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope, true_slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "number", ["1e400", "-1e400", "1e999 - 1e999", "10**400", f"1{'0' * 400}", "1j", "'1'", "b'1'", "..."]
)
def test_numbers_that_are_none_are_refused(number: str, folder: Path) -> None:
    with pytest.raises((RefusedError, ValueError), match=r"is outside the language|Exceeds the limit"):
        of_class(written([f"return z * {number}"], folder))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 10**400, True, "1", "1); system(", [1.0]])
def test_constants_of_the_module_that_are_no_numbers_are_refused(number: object, folder: Path) -> None:
    cls = written(["return z * z"], folder)
    path = folder / "of_module.py"
    path.write_text("LIMIT = None\n\ndef value(z, p, q):\n    return z * LIMIT\n")
    names: dict[str, Any] = {"__name__": "of_module"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    cls.value = staticmethod(names["value"])  # type: ignore[attr-defined]
    names["LIMIT"] = number
    with pytest.raises(RefusedError, match="'LIMIT' is outside the language"):
        derived_slope(cls)


def test_numbers_at_the_ends_of_their_range_are_numbers(folder: Path) -> None:
    text = own_cpp(of_class(written(["return z * 1e308 + 5e-324 - 1e16 * z + 3"], folder)))  # type: ignore[arg-type]
    assert all(f"T({n})" in text for n in ("1e+308", "5e-324", "1e+16", "3.0"))


@pytest.mark.parametrize(
    "line",
    [
        '    return z; } system("x"); {', "    return z; // x", "    return x;", "    return T(inf);",
        "    return T(nan);", "#include <x>",
        "    return intrinsics::system(z);", "    return k[8];", "    const T int = z;",
        "    return z;\n    return z;", "    return v;",
        "    return T(0x1p3);", "    return T(1) = z;", "    asm(z);", "    return \\\n;",
    ],
)  # fmt: skip
def test_the_last_look_at_a_line_lets_nothing_else_through(line: str) -> None:
    assert CPP_LINE.fullmatch(line) is None


def test_a_file_that_was_edited_is_refused(folder: Path) -> None:
    """The text of another function would be compiled for the one that runs."""
    cls = written(["return z * z"], folder)
    path = Path(cls.value.__code__.co_filename)  # type: ignore[attr-defined]
    path.write_text(path.read_text().replace("z * z", "z + z"))
    with pytest.raises(RefusedError, match=r"got another one: the file was edited after its import; start Python anew"):
        derived_slope(cls)


def test_a_name_of_an_enclosing_function_is_refused(folder: Path) -> None:
    """The module may have another number under that name, or another function under an intrinsic's."""

    def around(scale: float) -> Any:
        def value(z, p, q):  # type: ignore[no-untyped-def]
            return scale * z

        return value

    cls = type("Mine", (), {"value": staticmethod(around(2.0))})
    with pytest.raises(RefusedError, match="got 'scale' of an enclosing function; make it a constant of the class"):
        derived_slope(cls)


def test_an_expression_too_deep_is_refused_in_words(folder: Path) -> None:
    with pytest.raises(RefusedError, match="expected an expression of fewer operations"):
        of_class(written([f"return {'z + ' * 900}z"], folder))
