"""f' from f: the derivative of a checked expression of the language, by the chain rule on its syntax tree, simplified.

The result is text of the same language, so that it goes on to C++, CUDA and Triton as a slope written by hand does. At the bound of
a clamp, and where the two sides of a select meet, it is what PyTorch's autograd says.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from typing import Any, TypeGuard

from . import intrinsics
from .language import INTRINSICS, SOURCE, Body, RefusedError, strip_parentheses

Node = ast.expr
CLAMPS = {"maximum", "minimum", "select_less"}


def derived_slope(cls: type) -> Callable[..., Any]:
    """The slope of a class of which `value` alone is written.

    Args:
        cls: a pair function; its `value` is read from its source.

    Returns:
        slope(z, *constants), with its text in the attribute that language.Body reads.

    Raises:
        RefusedError: `value` uses something outside the language, or its source cannot be read.
    """
    body = Body(cls, "value")
    try:
        body.check()
        text = slope_text(body)
    except RecursionError:
        raise RefusedError(
            f"{body.where}: expected an expression of fewer operations; give parts of it local names"
        ) from None
    names: dict[str, Any] = {name: getattr(intrinsics, name) for name in INTRINSICS}
    exec(
        compile(text, f"<slope of {cls.__name__}>", "exec"), names
    )  # of a checked tree: nothing but the language is in it
    slope: Callable[..., Any] = names["slope"]
    setattr(slope, SOURCE, text)
    return slope


def slope_text(body: Body) -> str:
    """The source of `slope` of a checked body."""
    return _Slope(body).text()


def _literal(value: float) -> Node:
    return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)


def _value(node: Node) -> float | None:
    match node:
        case ast.Constant(value=float() | int() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=float() | int() as number)):
            return -float(number)
    return None


def _masked(node: Node) -> bool:
    """Whether it is a select one side of which is 0."""
    match node:
        case ast.Call(func=ast.Name(id="select_less"), args=[_, _, less, otherwise]):
            return 0.0 in (_value(less), _value(otherwise))
    return False


def _inside(select: Node, change: Callable[[Node], Node]) -> Node:
    """The select of what becomes of its two sides. Its 0 meets no infinity: autograd hands nothing on there either."""
    assert isinstance(select, ast.Call)
    return _call("select_less", *select.args[:2], *map(change, select.args[2:]))


def _neg(a: Node) -> Node:
    if (value := _value(a)) is not None:
        return _literal(-value if value else 0.0)
    if _masked(a):
        return _inside(a, _neg)
    return a.operand if isinstance(a, ast.UnaryOp) else ast.UnaryOp(ast.USub(), a)


def _add(a: Node, b: Node) -> Node:
    if _value(a) == 0.0:
        return b
    return a if _value(b) == 0.0 else ast.BinOp(a, ast.Add(), b)


def _sub(a: Node, b: Node) -> Node:
    if _value(b) == 0.0:
        return a
    return _neg(b) if _value(a) == 0.0 else ast.BinOp(a, ast.Sub(), b)


def _mul(a: Node, b: Node) -> Node:
    first, second = _value(a), _value(b)
    if 0.0 in (first, second):
        return _literal(0.0)
    if first is not None and second is not None:
        return _literal(first * second)
    if second is not None:  # numbers come first, so that they meet
        return _mul(b, a)
    if first == 1.0:
        return b
    if first == -1.0:
        return _neg(b)
    if _masked(a):
        return _inside(a, lambda side: _mul(side, b))
    if _masked(b):
        return _inside(b, lambda side: _mul(a, side))
    if isinstance(a, ast.UnaryOp) and first is None:
        return _neg(_mul(a.operand, b))
    if isinstance(b, ast.UnaryOp):
        return _neg(_mul(a, b.operand))
    if isinstance(b, ast.BinOp) and isinstance(b.op, ast.Div) and _value(b.left) == 1.0:
        return _div(a, b.right)
    if (
        first is not None
        and isinstance(b, ast.BinOp)
        and isinstance(b.op, ast.Mult)
        and (inner := _value(b.left)) is not None
    ):
        return _mul(_literal(first * inner), b.right)
    return ast.BinOp(a, ast.Mult(), b)


def _div(a: Node, b: Node) -> Node:
    if _value(a) == 0.0:
        return _literal(0.0)
    if _masked(a):
        return _inside(a, lambda side: _div(side, b))
    return a if _value(b) == 1.0 else ast.BinOp(a, ast.Div(), b)


def _call(name: str, *arguments: Node) -> Node:
    return ast.Call(ast.Name(name), list(arguments), [])


class _Slope:
    """The derivative of a body, statement by statement: each local name that depends on z gets one for its derivative."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.slopes: dict[str, Node] = {body.argument: _literal(1.0)} | {c: _literal(0.0) for c in body.constants}
        self.current = {name: name for name in self.slopes}  # a local that is assigned twice is two names
        self.reached = {body.argument}  # names that z reaches, be it in steps alone, whose slope is 0
        self.known: dict[str, Node] = {}  # calls that a local name holds
        self.lines: list[tuple[str, Node]] = []

    def text(self) -> str:
        """The source of `slope`, without the locals that it does not need."""
        for name, value in self.body.assignments:
            self.current[name] = self._assign(name, self._named(value))
        returned = self.of(self._named(self.body.returned))
        needed = _names(returned)
        kept: list[str] = []
        for name, value in reversed(self.lines):
            if name in needed:
                needed = (needed - {name}) | _names(value)
                kept.append(f"    {name} = {_text(value)}")
        arguments = ", ".join([self.body.argument, *self.body.constants])
        return "\n".join([f"def slope({arguments}):", *reversed(kept), f"    return {_text(returned)}", ""])

    def _assign(self, name: str, value: Node) -> str:
        """A line of its own for the value, and one for its derivative where that is more than a number or a name."""
        while name in self.slopes or name in INTRINSICS:
            name += "_"
        self.slopes[name] = _literal(0.0)  # so that no line takes it meanwhile
        self.lines.append((name, value))
        if isinstance(value, ast.Call):
            self.known[ast.dump(value)] = ast.Name(name)
        if _names(value) & self.reached:
            self.reached.add(name)
        self.slopes[name] = self._slope_of(name, self.of(value))
        return name

    def _slope_of(self, name: str, slope: Node) -> Node:
        """The slope of a local, with a line of its own for what is more than a number, a name, or a select of such."""
        if isinstance(slope, (ast.Constant, ast.Name)) or _value(slope) is not None:
            return slope
        if _masked(slope):
            return _inside(slope, lambda side: self._slope_of(name, side))
        if _sums_selects(slope):
            return ast.BinOp(self._slope_of(name, slope.left), slope.op, self._slope_of(name, slope.right))
        fresh = f"{name}_slope"
        while fresh in self.slopes:
            fresh += "_"
        self.slopes[fresh] = _literal(0.0)
        self.lines.append((fresh, slope))
        return ast.Name(fresh)

    def _named(self, node: Node) -> Node:
        """The expression with the module's constants as literals and a local name for every call that depends on z."""
        outer = self

        class Names(ast.NodeTransformer):
            def visit_Name(self, name: ast.Name) -> Node:
                if name.id in outer.current:
                    return ast.copy_location(ast.Name(outer.current[name.id]), name)
                number = outer.body.number(name.id)
                return name if number is None else ast.copy_location(_literal(number), name)

            def visit_Call(self, call: ast.Call) -> Node:
                assert isinstance(call.func, ast.Name)
                found = ast.copy_location(
                    ast.Call(ast.Name(call.func.id), [self.visit(a) for a in call.args], []), call
                )
                if not _names(found) & outer.reached:
                    raise outer.body.refusal(
                        call, "an argument that depends on z; make the number itself a constant of the class"
                    )
                if call.func.id in CLAMPS:
                    return found
                if ast.dump(found) not in outer.known:
                    outer._assign(f"{call.func.id}_{len(outer.lines)}", found)
                return outer.known[ast.dump(found)]

        named: Node = Names().visit(copy.deepcopy(node))
        return named

    def constant(self, node: Node) -> bool:
        """Whether z does not reach it."""
        return all(_value(self.slopes.get(name, _literal(0.0))) == 0.0 for name in _names(node))

    def of(self, node: Node) -> Node:
        """d node / d z."""
        match node:
            case ast.Constant():
                return _literal(0.0)
            case ast.Name(id=name):
                return self.slopes[name]
            case ast.UnaryOp(operand=operand):
                return _neg(self.of(operand))
            case ast.BinOp(op=ast.Add(), left=a, right=b):
                return _add(self.of(a), self.of(b))
            case ast.BinOp(op=ast.Sub(), left=a, right=b):
                return _sub(self.of(a), self.of(b))
            case ast.BinOp(op=ast.Mult(), left=a, right=b):
                if ast.dump(a) == ast.dump(b):
                    return _mul(_literal(2.0), _mul(a, self.of(a)))
                return _add(_mul(self.of(a), b), _mul(a, self.of(b)))
            case ast.BinOp(op=ast.Div(), left=a, right=b):
                return _div(_sub(self.of(a), _mul(_div(a, b), self.of(b))), b)
            case ast.Call(func=ast.Name(id=name), args=args):
                return self._of_call(node, name, args)
        raise self.body.refusal(node, "an expression that has a derivative")

    def _of_call(self, node: ast.Call, name: str, args: list[Node]) -> Node:
        a, slope, held = args[0], self.of(args[0]), self.known.get(ast.dump(node), node)
        if name == "select_less":
            return self._selected(a, args[1], self.of(args[2]), self.of(args[3]))
        if any(not self.constant(other) for other in args[1:]):
            raise self.body.refusal(node, f"a second argument of {name} that does not depend on z")
        if name == "maximum":
            return self._selected(a, args[1], _literal(0.0), slope)
        if name == "minimum":  # clamp hands its gradient on at the bound itself
            return self._selected(args[1], a, _literal(0.0), slope)
        outer: dict[str, Callable[[], Node]] = {
            "exp": lambda: held,
            "expm1": lambda: _call("exp", a),
            "log": lambda: _div(_literal(1.0), a),
            "log1p": lambda: _div(_literal(1.0), _add(_literal(1.0), a)),
            "rsqrt": lambda: _div(_mul(_literal(-0.5), held), a),
            "sigmoid": lambda: _mul(held, _call("sigmoid", _neg(a))),
            "softplus": lambda: _call("sigmoid", a),
            "pow": lambda: _mul(args[1], _call("pow", a, _sub(args[1], _literal(1.0)))),
        }
        if name not in outer:
            raise self.body.refusal(node, f"a function with a derivative, one of {sorted({*outer, *CLAMPS})}")
        return self._chain(slope, outer[name]())

    def _chain(self, slope: Node, factor: Node) -> Node:
        """slope * factor, which may be infinite: a sum of selects is multiplied term by term."""
        if _sums_selects(slope):
            join = _add if isinstance(slope.op, ast.Add) else _sub
            return join(self._chain(slope.left, factor), self._chain(slope.right, factor))
        return _mul(slope, factor)

    def _selected(self, a: Node, b: Node, less: Node, otherwise: Node) -> Node:
        """select_less of two slopes."""
        return less if ast.dump(less) == ast.dump(otherwise) else _call("select_less", a, b, less, otherwise)


def _sums_selects(node: Node) -> TypeGuard[ast.BinOp]:
    """Whether it is a sum or a difference, a term of which is a select with a 0."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))):
        return False
    return any(_masked(term) or _sums_selects(term) for term in (node.left, node.right))


def _names(node: Node) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id not in INTRINSICS}


def _text(node: Node) -> str:
    return strip_parentheses(ast.unparse(ast.fix_missing_locations(node)))
