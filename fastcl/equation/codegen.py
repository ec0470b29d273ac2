"""Translate pairs.py to csrc/generated/pairs.h (C++ and CUDA) and triton_kernels/generated_pairs.py.

    python -m fastcl.equation.codegen            write both files
    python -m fastcl.equation.codegen --check    exit 1 when they are stale

The language is pairs.py's: + - * /, unary minus, literals, constants, local names, intrinsics; all else is refused by name.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from . import intrinsics, pairs
from .pairs import PairFunction

ROOT = Path(__file__).resolve().parents[2]
INTRINSICS = {
    name
    for name, value in vars(intrinsics).items()
    if inspect.isfunction(value) and value.__module__ == intrinsics.__name__
}
CONSTANT_SLOTS = 2
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


class RefusedError(ValueError):
    """A pair function uses something outside the language."""


class Body:
    """One method of a pair function (value or slope), parsed: local assignments, then one returned expression."""

    def __init__(self, cls: type[PairFunction], method: str) -> None:
        self.where = f"{cls.__name__}.{method}"
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, method))))
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef)
        self.argument, *self.constants = [argument.arg for argument in function.args.args]
        statements = [s for s in function.body if not _is_docstring(s)]
        *assignments, last = statements
        if not isinstance(last, ast.Return) or last.value is None:
            raise RefusedError(f"{self.where}: expected a return at the end, got {type(last).__name__}")
        self.assignments = [self._assignment(s) for s in assignments]
        self.returned = last.value

    def _assignment(self, statement: ast.stmt) -> tuple[str, ast.expr]:
        if (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            return statement.targets[0].id, statement.value
        raise RefusedError(f"{self.where}: expected `name = expression`, got {ast.unparse(statement)!r}")

    def expression(self, node: ast.expr, literal: Callable[[float], str], call: str, names: dict[str, str]) -> str:
        """The expression in the target language: `literal` prints numbers, `call` prefixes intrinsics, `names` maps names."""

        def emit(node: ast.expr) -> str:
            match node:
                case ast.Constant(value=float() | int() as number) if not isinstance(number, bool):
                    return literal(float(number))
                case ast.Name(id=name) if name in names:
                    return names[name]
                case ast.Name(id=name) if isinstance(getattr(pairs, name, None), float):
                    return literal(getattr(pairs, name))
                case ast.UnaryOp(op=ast.USub(), operand=operand):
                    return f"(-{emit(operand)})"
                case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
                    return f"({emit(left)} {OPERATORS[type(op)]} {emit(right)})"
                case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in INTRINSICS:
                    return f"{call}{name}({', '.join(_strip_parentheses(emit(a)) for a in args)})"
            raise RefusedError(
                f"{self.where}: {ast.unparse(node)!r} is outside the language; expected + - * /, literals, constants, "
                f"local names or one of {sorted(INTRINSICS)}"
            )

        return emit(node)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _strip_parentheses(text: str) -> str:
    """Drop one outer pair of parentheses when it encloses the whole expression."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]


def _statements(
    body: Body, literal: Callable[[float], str], call: str, names: dict[str, str], assign: str, end: str
) -> list[str]:
    names = dict(names)
    lines = []
    for name, value in body.assignments:
        lines.append(f"{assign}{name} = {_strip_parentheses(body.expression(value, literal, call, names))}{end}")
        names[name] = name
    lines.append(f"return {_strip_parentheses(body.expression(body.returned, literal, call, names))}{end}")
    return lines


def cpp_header(registry: dict[str, type[PairFunction]]) -> str:
    """csrc/generated/pairs.h: one struct for each pair function, and an X-macro over all."""
    out = [
        "// Generated by `python -m fastcl.equation.codegen` from fastcl/equation/pairs.py; do not edit.",
        "// T is float, double or a SIMD vector; k points to the constants, broadcast to T.",
        "#pragma once",
        '#include "../intrinsics.h"',
        "",
        "namespace fastcl::pairs {",
    ]
    for cls in registry.values():
        out += ["", f"struct {cls.__name__} {{", f"  // {(cls.__doc__ or '').strip()}"]
        for method in ("value", "slope"):
            body = Body(cls, method)
            names = {body.argument: "z"} | {c: f"k[{i}]" for i, c in enumerate(body.constants)}
            lines = _statements(body, lambda v: f"T({v!r})", "intrinsics::", names, "const T ", ";")
            source = " ".join(lines)
            z = "T z" if "z" in _words(source) else "T"
            k = "const T* k" if "k" in _words(source) else "const T*"
            out.append(f"  template <class T> static FASTCL_INLINE T {method}({z}, {k}) {{")
            out += [f"    {line}" for line in lines] + ["  }"]
        out.append("};")
    out += [
        "",
        "}  // namespace fastcl::pairs",
        "",
        "// X(name, struct, number of constants)",
        "#define FASTCL_FOR_EACH_PAIR(X) \\",
    ]
    rows = [
        f'  X("{name}", ::fastcl::pairs::{cls.__name__}, {len(cls.constant_names)})' for name, cls in registry.items()
    ]
    return "\n".join(out) + "\n" + " \\\n".join(rows) + "\n"


def triton_module(registry: dict[str, type[PairFunction]]) -> str:
    """triton_kernels/generated_pairs.py: two @triton.jit functions for each pair function, and a table of all."""
    out = [
        "# Generated by `python -m fastcl.equation.codegen` from fastcl/equation/pairs.py; do not edit.",
        '"""Pair functions and their slopes, for Triton. k0 and k1 are the constants, in the order of the class."""',
        "",
        "import triton",
        "import triton.language as tl  # noqa: F401  Triton's interpreter looks for it beside each function",
        "",
        "from . import intrinsics",
    ]
    for name, cls in registry.items():
        for method in ("value", "slope"):
            body = Body(cls, method)
            names = {body.argument: "z"} | {c: f"k{i}" for i, c in enumerate(body.constants)}
            lines = _statements(body, repr, "intrinsics.", names, "", "")
            arguments = ", ".join(["z"] + [f"k{i}" for i in range(CONSTANT_SLOTS)])
            out += ["", "", "@triton.jit", f"def {name}_{method}({arguments}):"] + [f"    {line}" for line in lines]
    rows = [f'    "{name}": ({name}_value, {name}_slope),' for name in registry]
    return "\n".join([*out, "", "", "PAIRS = {", *rows, "}"]) + "\n"


def _words(source: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in source).split())


def generated() -> dict[Path, str]:
    """Every generated file with its text."""
    registry = {n: c for n, c in PairFunction.registry.items() if c.__module__ == pairs.__name__}
    return {
        ROOT / "csrc" / "generated" / "pairs.h": cpp_header(registry),
        ROOT / "triton_kernels" / "generated_pairs.py": triton_module(registry),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcl.equation.codegen", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a generated file is stale")
    check = parser.parse_args(arguments).check
    stale = [p for p, text in generated().items() if not p.exists() or p.read_text() != text]
    for path in stale:
        if check:
            print(f"stale: {path.relative_to(ROOT)}; run `python -m fastcl.equation.codegen`")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated()[path])
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
