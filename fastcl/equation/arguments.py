"""Arguments that are no rows (booleans, integers, numbers, names), checked by what the signature says of them.

    @declared
    def loss(x: Tensor, *, temperature: Positive = 0.07, normalize: bool = True) -> Tensor: ...

Python numbers are checked, NumPy's are taken for them; values of tensors are never read (that would wait for a device).
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from importlib import import_module
from numbers import Real as AnyReal
from types import CodeType, NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeAlias, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Check: TypeAlias = Callable[[str, Any, Tensor | None], Any]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NUMBER, REAL = "a number or a tensor with one element", "a number"
# The largest number of a dtype, and the least whose inverse is within its range with room to spare.
LIMITS = {dtype: (torch.finfo(dtype).max, torch.finfo(dtype).tiny) for dtype in (torch.float64, torch.float32)}


def kind_of(value: Any) -> str:
    """The dtype of a tensor, the type of anything else."""
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__


def shown(value: Any) -> str:
    """A value as an error prints it; integers of hundreds of digits by their size."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


# ---- one argument each: (name, value, the rows that it goes with, if there are any) -> the value to take ---------------------


def boolean(name: str, value: Any, rows: Tensor | None = None) -> bool:
    """True or False, NumPy's too."""
    if isinstance(value, (bool, torch.SymBool)):
        return value  # type: ignore[return-value]
    if _is_scalar(value, "b"):
        return bool(value)
    got = repr(value)
    if isinstance(value, Tensor):
        got = "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    raise TypeError(f"{name}: expected True or False, got {got}; pass one of them")


def integer(
    name: str,
    value: Any,
    rows: Tensor | None = None,
    *,
    least: int | None = None,
    most: int = 2**62,
    expected: str | None = None,
) -> int:
    """An integer, from `least` on; `expected` says which in other words."""
    # Asked in this order: torch.compile has no hasattr of the sizes that it traces.
    if isinstance(value, (bool, Tensor)) or not (isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")):
        raise TypeError(f"{name}: expected an integer, got {kind_of(value)}; pass {_whole(name, value)}")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {kind_of(value)}; pass an int") from None
    least = -most if least is None else least
    if not least <= value <= most:
        ends = f"> {least - 1}" if most == 2**62 and least >= 0 else f"from {least} to {most}"
        raise ValueError(f"{name}: expected {expected or f'an integer {ends}'}, got {shown(value)}")
    return value


def _whole(name: str, value: Any) -> str:
    """What to pass in its place: int() takes a float, and not just anything."""
    return f"int({name})" if isinstance(value, float) else "an int"


def real(name: str, value: Any, rows: Tensor | None = None, expected: str = REAL) -> float:
    """A finite Python number within the range of the rows' results; NumPy's scalars and arrays without dimensions are numbers."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a number, got a tensor{_as_float(name, value)}")
    if type(value) is not float and type(value) is not int and not isinstance(value, (torch.SymFloat, torch.SymInt)):
        if isinstance(value, bool) or not (isinstance(value, AnyReal) or _is_scalar(value, "fiu")):
            raise TypeError(f"{name}: expected {expected}, got {kind_of(value)}")
        if not isinstance(value, int):
            value = float(value)
    largest = LIMITS[_dtype_of(rows)][0]
    if not -largest <= value <= largest:
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{name}: expected a finite number, got {value}")
        raise _out_of_range(name, value, rows, "")
    # No op takes an integer beyond 64 bits; within 53 it stays what was given.
    return float(value) if isinstance(value, int) and not -(2**53) < value < 2**53 else value


def positive_real(name: str, value: Any, rows: Tensor | None = None) -> float:
    """A finite Python number > 0 with a finite inverse."""
    return _positive(name, real(name, value, rows), rows)


def number(name: str, value: Any, rows: Tensor | None = None) -> float | Tensor:
    """A finite Python number, or a floating tensor with one element."""
    if not isinstance(value, Tensor):
        return real(name, value, rows, NUMBER)
    dense(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: expected a number or a floating-point tensor, got {kind_of(value)}; convert it with {cast(value)}"
        )
    if value.numel() != 1:
        raise ValueError(f"{name}: expected {NUMBER}, got shape {tuple(value.shape)}")
    if rows is not None and value.is_meta and not rows.is_meta:
        raise ValueError(f"{name}: expected the device of the rows, {rows.device}, got meta, which holds no value")
    return value


def positive_number(name: str, value: Any, rows: Tensor | None = None) -> float | Tensor:
    """A finite number > 0 with a finite inverse, or a tensor with one element (whose value is not read)."""
    value = number(name, value, rows)
    return value if isinstance(value, Tensor) else _positive(name, value, rows)


def one_of(argument: str, value: Any, allowed: Sequence[str]) -> str:
    """`value` if it is one of the allowed names; otherwise an error with the nearest name."""
    choices = f"expected one of {', '.join(map(repr, allowed))}"
    if not isinstance(value, str):
        got = "None" if value is None else kind_of(value)
        raise TypeError(f"{argument}: {choices}, got {got}; pass its name")
    if value in allowed:
        return allowed[allowed.index(value)]  # not the value: it may be a member of an enumeration
    raise ValueError(f"{argument}: {choices}, got {value!r}{meant(value, allowed)}")


# What the field calls some of fastcl's names, without underscores: none is near in letters, or another name is nearer.
ALSO_CALLED = {
    "simclr": ("nt_xent",), "simclrloss": ("NTXentLoss",), "cpc": ("info_nce",), "sigmoid": ("siglip",),
    "sigmoidloss": ("SigLIPLoss",), "supervisedcontrastive": ("sup_con",), "supervisedcontrastiveloss": ("SupConLoss",),
    "multiplenegativesranking": ("info_nce",), "multiplenegativesrankingloss": ("InfoNCELoss",), "gor": ("spread_out",),
    "tau": ("temperature", "logit_scale"), "temp": ("temperature", "logit_scale"), "temperature": ("logit_scale",),
    "scale": ("logit_scale", "temperature"), "logitscale": ("temperature",), "bias": ("logit_bias",),
    "margin": ("false_negative_margin",), "processgroup": ("group",),
}  # fmt: skip
INVERSES = {"temperature", "tau", "temp"}, {"scale", "logitscale"}  # what is one over the other


def meant(name: str, known: Iterable[str]) -> str:
    """The end of an error: the name for what the field calls so, or the nearest by its last part, whatever its letters' case."""
    by_last = {each.rpartition(".")[2]: each for each in known}
    asked = name.lower().replace("_", "")
    called = next((each for each in ALSO_CALLED.get(asked, ()) if each in by_last), None)
    if called is not None:
        over = any(asked in one and called.replace("_", "") in other for one, other in (INVERSES, INVERSES[::-1]))
        return f"; did you mean {by_last[called]!r}" + (f", which is 1 / {name}?" if over else "?")
    spelt = {each.lower(): full for each, full in by_last.items()}
    near = get_close_matches(name.lower(), spelt, n=1)
    return f"; did you mean {spelt[near[0]]!r}?" if near else ""


def said(message: str, value: bool = False) -> dict[str, None]:
    """A TypeError (`value`: a ValueError) of a call, as a keyword that nobody writes: it travels as any wrong call does, and
    `unexpected` tells it. In words, since torch.compile traces no exception.
    """
    return {f"{'Value' if value else 'Type'}Error: {message}": None}


def unexpected(function: str, name: str, known: Iterable[str]) -> TypeError | ValueError:
    """The error of a keyword that is not taken, as Python words it, with the nearest that is; of one of `said` its error."""
    kind, _, message = name.partition(": ")
    if message and kind in ("TypeError", "ValueError"):
        return TypeError(message) if kind == "TypeError" else ValueError(message)
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{meant(name, known)}")


def absent(module: str, *within: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module: of its submodules `within` those that are imported at first use.

    Of any other name the error, with the nearest public one of the module and of these.
    """

    def get(name: str) -> Any:
        if name in within:
            return import_module(f"{module}.{name}")
        places = (*(import_module(f"{module}.{each}") for each in within), sys.modules[module])
        near = [f"{place.__name__}.{each}" for place in places for each in place.__all__]
        hint = "" if name.startswith("_") else meant(name, near)
        raise AttributeError(f"module {module!r} has no attribute {name!r}{hint}")

    return get


def names(*allowed: str) -> Check:
    """The check of a name."""
    return lambda name, value, rows: one_of(name, value, allowed)


Positive: TypeAlias = Annotated[float | Tensor, positive_number]
PositiveReal: TypeAlias = Annotated[float, positive_real]


# ---- what a tensor must be, and what makes it so -------------------------------------------------------------------------------


def dense(name: str, x: Tensor) -> None:
    """A plain strided tensor."""
    if x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; join its parts, torch.cat({name}.unbind())"
        )
    if x.layout != torch.strided:
        layout = str(x.layout).removeprefix("torch.").replace("_", " ")
        raise TypeError(f"{name}: expected a dense tensor, got a {layout} one; convert it, e.g. {name}.to_dense()")


def cast(x: Tensor, to: str = "float") -> str:
    """The call that makes this tensor one of floats (or of `long`)."""
    if x.is_quantized:
        return ".dequantize()" if to == "float" else f".int_repr().{to}()"
    return f".real.{to}()" if x.is_complex() else f".{to}()"


def no_tensor(name: str, value: Any, rows: Tensor | None = None) -> Any:
    """A group, by what it is not: what else it may be is asked where it is used."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a ProcessGroup or one dimension of a DeviceMesh, got a tensor; "
            "torch.distributed.group.WORLD is the group of all"
        )
    return value


def as_tensor(name: str, x: Any, more: str = "") -> str:
    """The advice for rows, numbers or groups that came in something else."""
    takes = isinstance(x, (list, tuple)) or getattr(getattr(x, "dtype", None), "kind", "-") in "fiub"
    return f"; pass torch.as_tensor({name}{more})" if takes else ""


def _as_float(name: str, x: Tensor) -> str:
    if x.is_nested or x.numel() != 1:
        return "" if x.is_nested else f" of shape {tuple(x.shape)}; pass one number"
    return "; pass a Python number" if x.is_meta else f"; pass float({name}) (it takes no gradient)"


def _is_scalar(value: Any, kinds: str) -> bool:
    """A NumPy scalar, or an array without dimensions, of one of these kinds."""
    return getattr(value, "ndim", None) == 0 and getattr(getattr(value, "dtype", None), "kind", "-") in kinds


def _dtype_of(rows: Tensor | None) -> torch.dtype:
    """That of the results of these rows; before there are any, the widest."""
    return torch.float64 if rows is None or rows.dtype == torch.float64 else torch.float32


def _positive(name: str, value: float, rows: Tensor | None) -> float:
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {shown(value)}")
    if value < LIMITS[_dtype_of(rows)][1]:
        raise _out_of_range(name, value, rows, ", as its inverse must be")
    return value


def _out_of_range(name: str, value: float, rows: Tensor | None, more: str) -> ValueError:
    dtype = str(_dtype_of(rows)).removeprefix("torch.")
    advice = "bring it nearer to 1" + ("" if dtype == "float64" else ", or pass float64 rows")
    return ValueError(f"{name}: expected a number within the range of {dtype}{more}, got {shown(value)}; {advice}")


# ---- whole signatures ----------------------------------------------------------------------------------------------------------

_KINDS: dict[Any, Check] = {bool: boolean, int: integer, float: real}


def check_of(annotation: Any) -> Check | None:
    """The check that an annotation asks for; None where it says nothing that is checked here."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [kind for kind in options if kind is not NoneType]
    if set(kinds) == {float, Tensor}:
        found: Check | None = number
    elif len(kinds) != 1:
        return None
    elif get_origin(kinds[0]) is Literal:
        found = names(*get_args(kinds[0]))
    elif get_origin(kinds[0]) is Annotated:
        found = next((part for part in kinds[0].__metadata__ if callable(part)), None)
    else:
        found = _KINDS.get(kinds[0])
    return found if found is None or len(kinds) == len(options) else _optional(found)


def _optional(check: Check) -> Check:
    return lambda name, value, rows: None if value is None else check(name, value, rows)


@cache
def _code(annotation: str) -> CodeType:
    """Some hundred arguments share a dozen annotations: compiling each once halves what they add to the import."""
    return compile(annotation.strip(), "<annotation>", "eval")


def checks_of(annotations: Mapping[str, Any], namespace: dict[str, Any]) -> dict[str, Check]:
    """The checks that these annotations ask for, by name."""
    found = {}
    for name, annotation in annotations.items():
        if isinstance(annotation, str):
            try:
                annotation = eval(_code(annotation), namespace)
            except (NameError, TypeError):  # names for type checkers alone
                continue
        check = check_of(annotation)
        if check is not None:
            found[name] = check
    return found


def checks_of_fields(cls: type, types: Mapping[str, Any]) -> dict[str, Check]:
    """The checks of the fields of a class, by name; one of an executed text has a module that is not among those imported."""
    return checks_of(types, getattr(sys.modules.get(cls.__module__), "__dict__", {}))


@cache
def checks_of_function(function: Callable[..., Any]) -> dict[str, Check]:
    """The checks of a function's arguments, by name; an objective and its module ask for the same."""
    function = inspect.unwrap(function)
    annotations = {name: p.annotation for name, p in inspect.signature(function).parameters.items()}
    return checks_of(annotations, getattr(function, "__globals__", {}))


def declared(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its arguments checked first, and its numbers in tensors at least as wide as the results of its rows.

    A half-precision temperature is widened before anything is made of it: its inverse has no half-precision digits to lose.
    """
    table = checks_of_function(function)
    known = inspect.signature(function).parameters
    parameters = enumerate(known.items())
    places = tuple((-1 if p.kind is p.KEYWORD_ONLY else k, name) for k, (name, p) in parameters if name in table)
    names_known = frozenset(known)  # none of these functions takes any other

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._get_tracing_state() is not None:
            raise not_traced()
        rows = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 2), None)
        given: list[Any] = list(args)
        for k, name in places:
            if 0 <= k < len(given):
                given[k] = _taken(table[name], name, given[k], rows)
            elif name in kwargs:
                kwargs[name] = _taken(table[name], name, kwargs[name], rows)
        for name in kwargs:
            if name not in names_known:
                raise unexpected(function.__name__, name, known)
        return function(*given, **kwargs)

    return call


def not_traced() -> RuntimeError:
    """The error of a call within torch.jit.trace, whose tracer takes no list of booleans and makes tensors of sizes."""
    return RuntimeError(
        "fastcl: expected a call outside torch.jit.trace, which records neither the op nor sizes; use torch.export.export or "
        "torch.compile, or trace the model without its loss"
    )


def _taken(check: Check, name: str, value: Any, rows: Tensor | None) -> Any:
    value = check(name, value, rows)
    if rows is not None and isinstance(value, Tensor):
        return value.to(torch.promote_types(value.dtype, _dtype_of(rows))).reshape(())
    return value
