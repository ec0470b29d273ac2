"""The small language of pair functions: what `value` and `slope` may say, parsed and checked.

+ - * /, unary minus, literals, the constants of the class, local names, float constants of the module, and the intrinsics of
intrinsics.py. All else is refused by name, with its line and column. Only a checked tree goes on: to C++, CUDA and Triton
(codegen.py), and to its own derivative (derivative.py).
"""

from __future__ import annotations
import __future__

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from types import CellType, CodeType, ModuleType
from typing import Any

from . import intrinsics

INTRINSICS = {
    name
    for name, value in vars(intrinsics).items()
    if inspect.isfunction(value) and value.__module__ == intrinsics.__name__
}
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
SOURCE = "fastcl_source"  # the attribute of a derived method that holds its text


class RefusedError(ValueError):
    """A pair function uses something outside the language."""


class Body:
    """One method of a pair function (value or slope), parsed: local assignments, then one returned expression."""

    def __init__(self, cls: type, method: str, where: str = "") -> None:
        function = getattr(cls, method)
        self.where = where or f"{cls.__name__}.{method}"
        if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
            kind = "one with a decorator" if inspect.isfunction(function) else type(function).__name__
            raise RefusedError(f"{self.where}: expected a function by `def`, got {kind}")
        if function.__code__.co_name == "<lambda>":
            raise RefusedError(f"{self.where}: expected a function by `def`, got a lambda; write it as one")
        self.globals: dict[str, Any] = function.__globals__
        self.file, self.first_line, text = self._text(function)
        tree = ast.parse(textwrap.dedent(text))
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef):
            raise RefusedError(f"{self.where}: expected a function by `def`, got {type(definition).__name__}")
        given = definition.args
        if given.vararg or given.kwarg or given.kwonlyargs or given.defaults or not (given.args or given.posonlyargs):
            raise RefusedError(f"{self.where}: expected the arguments z and the constants, got {ast.unparse(given)!r}")
        self.argument, *self.constants = [a.arg for a in (*given.posonlyargs, *given.args)]
        statements = [s for s in definition.body if not _is_docstring(s)]
        *assignments, last = statements or [definition.body[0]]
        if not isinstance(last, ast.Return) or last.value is None:
            raise RefusedError(f"{self.where}: expected a return at the end, got {type(last).__name__}")
        self.assignments = [self._assignment(s) for s in assignments]
        self.returned = last.value
        self._check_code(function, tree)

    def _check_code(self, function: Callable[..., Any], tree: ast.Module) -> None:
        """Refuse a text that is not what runs: a file that was edited after its import, or a name of an enclosing function."""
        code = function.__code__
        if code.co_freevars:
            held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
            if any(isinstance(value, ModuleType) for value in held):
                self.check()  # math.log, imported within a function
            raise RefusedError(
                f"{self.where}: expected numbers of the class or of its module, got {code.co_freevars[0]!r} of an enclosing "
                "function; make it a constant of the class"
            )
        if getattr(function, SOURCE, None) is not None:
            return
        tree.body[0].decorator_list = []  # type: ignore[attr-defined]
        flags = code.co_flags & __future__.annotations.compiler_flag
        (read,) = (
            c
            for c in compile(tree, self.file, "exec", flags=flags, dont_inherit=True).co_consts
            if isinstance(c, CodeType) and c.co_name == code.co_name
        )
        if _meaning(read) != _meaning(code):
            self.check()  # math.log is outside the language, and its code is another where this file imports math
            raise RefusedError(
                f"{self.where}: expected the text of the function in {self.file}, line {self.first_line}, got another one: the "
                "file was edited after its import; start Python anew"
            )

    def _text(self, function: Callable[..., Any]) -> tuple[str, int, str]:
        derived = getattr(function, SOURCE, None)
        if derived is not None:
            return "<derived>", 1, derived
        try:
            lines, first = inspect.getsourcelines(function)
        except (OSError, TypeError) as error:
            raise RefusedError(
                f"{self.where}: expected a function whose source can be read, got {error}; put the class into a file, or write its "
                "slope too"
            ) from None
        return inspect.getsourcefile(function) or "?", first, "".join(lines)

    def refusal(self, node: ast.AST, expected: str) -> RefusedError:
        """The error that names the text, its line and its column."""
        line = self.first_line + getattr(node, "lineno", 1) - 1
        return RefusedError(
            f"{self.where}: {ast.unparse(node)!r} is outside the language ({self.file}, line {line}, column "
            f"{getattr(node, 'col_offset', 0) + 1}); expected {expected}"
        )

    def _assignment(self, statement: ast.stmt) -> tuple[str, ast.expr]:
        if (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            return statement.targets[0].id, statement.value
        raise self.refusal(statement, "`name = expression`")

    def number(self, name: str) -> float | None:
        """The float that the module of the function gives this name."""
        value = self.globals.get(name)
        return _finite(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def expression(self, node: ast.expr, literal: Callable[[float], str], call: str, names: dict[str, str]) -> str:
        """The expression in the target language: `literal` prints numbers, `call` prefixes intrinsics, `names` maps names."""

        def emit(node: ast.expr) -> str:
            match node:
                case ast.Constant(value=float() | int() as number) if (
                    not isinstance(number, bool) and (found := _finite(number)) is not None
                ):
                    return literal(found)
                case ast.Name(id=name) if name in names:
                    return names[name]
                case ast.Name(id=name) if (found := self.number(name)) is not None:
                    return literal(found)
                case ast.UnaryOp(op=ast.USub(), operand=operand):
                    return f"(-{emit(operand)})"
                case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
                    return f"({emit(left)} {OPERATORS[type(op)]} {emit(right)})"
                case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in INTRINSICS:
                    self._check_call(node, name, args)
                    return f"{call}{name}({', '.join(strip_parentheses(emit(a)) for a in args)})"
                case ast.Call(func=ast.Attribute(attr=name)) if name in INTRINSICS:
                    raise self.refusal(node, f"{name} by its bare name, `from fastcl.equation.intrinsics import {name}`")
            raise self.refusal(node, f"+ - * /, literals, constants, local names or one of {sorted(INTRINSICS)}")

        return emit(node)

    def _check_call(self, node: ast.expr, name: str, args: list[ast.expr]) -> None:
        takes = len(inspect.signature(getattr(intrinsics, name)).parameters)
        if len(args) != takes or any(isinstance(a, ast.Starred) for a in args):
            raise self.refusal(node, f"{takes} argument{'s' * (takes > 1)} of {name}")
        # A user's own function of that name is not the intrinsic.
        if self.globals.get(name, getattr(intrinsics, name)) is not getattr(intrinsics, name):
            raise self.refusal(
                node, f"the {name} of fastcl.equation.intrinsics, and this module has another of that name"
            )

    def check(self) -> None:
        """Refuse what is outside the language.

        Raises:
            RefusedError: it names the text, its line and its column.
        """
        names = {self.argument: "z"} | {c: c for c in self.constants}
        taken = [name for name in (*names, *(name for name, _ in self.assignments)) if name in INTRINSICS]
        if taken:
            raise RefusedError(f"{self.where}: expected names that no intrinsic has, got {taken[0]!r}; choose another")
        for name, value in self.assignments:
            self.expression(value, repr, "", names)
            names[name] = name
        self.expression(self.returned, repr, "", names)


def numbers_of(function: Any) -> tuple[tuple[str, float], ...]:
    """The numbers of its module that a function reads, as they are now."""
    code = getattr(function, "__code__", None)
    if code is None:
        return ()
    given = ((name, function.__globals__.get(name)) for name in code.co_names)
    return tuple((name, value) for name, value in given if isinstance(value, (int, float)))


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """What a function does; its line numbers and its docstring are not in it."""
    numbers = [repr(c) for c in code.co_consts if isinstance(c, (int, float))]
    return code.co_code, numbers, code.co_names, code.co_varnames


def _finite(number: float) -> float | None:
    """The number as a float; None where that is no number of any dtype."""
    try:
        return float(number) if math.isfinite(number) else None
    except OverflowError:
        return None


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def strip_parentheses(text: str) -> str:
    """Drop one outer pair of parentheses when it encloses the whole expression."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]
