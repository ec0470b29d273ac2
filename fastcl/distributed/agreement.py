"""One small all-gather before anything large: every rank makes the same call, and every rank's call is right.

A rank first makes all checks of its own call (a rehearsal: shapes and settings, no data), then tells the others
a digest of the call, its number of rows, and whether it failed. If all is well that is all. Otherwise the ranks exchange the
calls in words, and all raise the same error: none is left waiting for a message that never comes.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import batch, transforms
from ..backends import choice
from ..equation.arguments import unexpected
from ..equation.problem import accumulation_dtype
from . import in_graph
from .ranks import check_settings
from .shards import checked
from .wire import Wire

ROWS = 16  # more tensors of rows, and numbers of rows, than any objective has
COUNTS = ("pairs",)  # arguments that are a number of rows, hence each rank's own
WEIGHTS = ("positives[2]",)  # vectors of numbers that are no setting: one for each of what is each rank's own
REHEARSED: set[tuple[Any, ...]] = set()  # calls whose checks have passed in this process


class MismatchError(ValueError):
    """Ranks of one group made different calls."""


class Call:
    """What a rank calls: a function, its tensors and its settings. Making one never raises: a call that is wrong says so later.

    Args:
        function: what is called, or makes all checks of what is.
        args, kwargs: of it.
        settings: what else must be the same on every rank, by name.
        name: of what is called; None for the function's.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.function, self.name, self.unlike = function, name or function.__name__, None
        self.settings, self.words = settings or {}, {}
        self.arguments: dict[str, Any] = {}
        self.rows: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.refusal: RuntimeError | None = None
        try:
            self.arguments = bound(function, args, kwargs)
        except (TypeError, ValueError) as error:
            told = any(not name.isidentifier() for name in kwargs)
            self.unlike = error if told else TypeError(f"{self.name}(): {error}")
            return
        self.arguments.pop("group", None)
        self.refusal = transforms.refusal("group=", self.arguments.values())
        values = dict(_leaves(self.arguments | self.settings))
        self.rows = {
            name: t for name, t in values.items() if isinstance(t, Tensor) and (_are_rows(t) or _are_weights(name, t))
        }
        self.counts = {name: n for name, n in values.items() if name in COUNTS and _is_size(n)}
        described = {
            name: "a number of rows" if name in self.counts else _described(value, name in self.rows)
            for name, value in values.items()
        }
        if (
            self.refusal is None
        ):  # else there is nothing to compare: a transform's tensors describe themselves otherwise
            self.words = {"objective": self.name, "grad mode": str(torch.is_grad_enabled())} | described

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return next((t.device for t in self.rows.values()), torch.device("cpu"))

    def numbers(self) -> list[int]:
        """The digest of the call in words, then the number of rows of each of its tensors."""
        digest = hashlib.blake2b(repr(self.words).encode(), digest_size=8).digest()
        rows = [*(t.shape[0] for t in self.rows.values()), *self.counts.values()][:ROWS]
        return [int.from_bytes(digest, "little", signed=True), *rows, *([0] * (ROWS - len(rows)))]

    def rehearse(self) -> Exception | None:
        """The error that this rank's own call would raise, if any.

        Checks compare sizes with each other, so that they pass or fail alike for small tensors of the same pattern, which take
        no time; what was found with them is found again with the true sizes, for the message.
        """
        if self.unlike is not None:
            return self.unlike
        if self.refusal is not None:
            return self.refusal
        small, devices = self._pattern(), sorted({str(t.device) for t in self.rows.values()})
        pattern = tuple(small[n] for n in self._sizes())
        key = (repr(self.words), pattern, tuple(devices))
        if key in REHEARSED:
            return None
        if (
            len(devices) < 2
            and self._attempt(lambda t: t.new_ones([small.get(n, n) for n in t.shape], device="cpu"), small) is None
        ):
            if len(REHEARSED) >= 4096:
                REHEARSED.clear()
            REHEARSED.add(key)
            return None
        return self._attempt((lambda t: t.to("meta")) if len(devices) < 2 else (lambda t: t))

    def _pattern(self) -> dict[int, int]:
        """Each size of the call and a small one: the same are the same, larger is larger, nothing is nothing."""
        return {n: i for i, n in enumerate(sorted({*self._sizes(), 0, 1}))}

    def _sizes(self) -> list[int]:
        return [*(n for t in self.rows.values() for n in t.shape), *self.counts.values()]

    def _attempt(self, made: Callable[[Tensor], Tensor], small: dict[int, int] | None = None) -> Exception | None:
        try:
            check_settings(self.settings)
            arguments = {name: _mapped(value, made) for name, value in self.arguments.items()}
            arguments |= {name: n if small is None else small[n] for name, n in self.counts.items()}
            with torch.no_grad(), batch.over(Rehearsal(self.device)):
                self.function(**arguments)
        except Exception as error:
            return error
        return None


def agree(wire: Wire, call: Call, asking: bool = False) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """The number of rows that each rank has of each tensor of rows of the call, then its numbers of rows.

    Args:
        wire: the ranks.
        call: this rank's.
        asking: whether this rank asks all others for their gradients in one call.

    Returns:
        These numbers, and whether one of the ranks asks.

    Raises:
        MismatchError: ranks call different objectives, or with other dtypes, widths or settings.
        Exception: whatever the first rank whose own call is wrong raised, on every rank.
    """
    error = call.rehearse()
    mine = torch.tensor([int(error is not None) + 2 * asking, *call.numbers()], device=wire.device)
    states, digests, *rows = wire.everywhere(mine).T.tolist()
    if any(state % 2 for state in states) or len(set(digests)) > 1:
        _raise(wire, call, error)
    return tuple(tuple(n) for n in rows[: len(call.rows) + len(call.counts)]), max(states) > 1


def _raise(wire: Wire, call: Call, error: Exception | None) -> None:
    found: list[Any] = [None] * wire.world
    failure = None if error is None else (type(error).__name__, str(error))
    dist.all_gather_object(found, (call.words, failure), group=wire.group)
    calls = [words for words, _ in found]
    for rank, words in enumerate(calls if all(calls) else ()):  # where one has none, that is what to say
        for name in dict.fromkeys([*calls[0], *words]):  # in the same order on every rank
            here, there = (_of_name(name, call) for call in (calls[0], words))
            if here != there and (name == "objective" or calls[0]["objective"] == words["objective"]):
                raise MismatchError(
                    f"{name}: expected the same on every rank, got {here:.200} on rank 0 and {there:.200} on rank {rank}; "
                    "make the same call on every rank of the group, with its own rows"
                )
    for rank, (words, failure) in enumerate(found):
        if failure is not None and (all(calls) or not words):
            kind, message = failure
            raise _again(kind, f"{message} (on rank {rank} of {wire.world})")


def _of_name(name: str, words: dict[str, str]) -> str:
    """What a call says of an argument; one that is a list says it of each of its tensors."""
    return words.get(name, "tensors" if f"{name}[0]" in words else "nothing")


def _again(kind: str, message: str) -> Exception:
    known = (ValueError, TypeError, NotImplementedError, choice.BackendUnavailableError)
    return next((k(message) for k in known if k.__name__ == kind), RuntimeError(f"{kind}: {message}"))


def _leaves(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of a list of tensors one by one."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            yield from ((f"{name}[{i}]", v) for i, v in enumerate(value))
        else:
            yield name, value


def _mapped(value: Any, made: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return [_mapped(v, made) for v in value]
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return made(value.detach()) if dense else value


def _are_rows(t: Tensor) -> bool:
    """A matrix, or one group or label for each row; vectors of numbers are settings."""
    return not t.is_nested and (t.dim() == 2 or (t.dim() == 1 and not t.is_floating_point()))


def _are_weights(name: str, t: Tensor) -> bool:
    return name in WEIGHTS and not t.is_nested and t.dim() == 1


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)


def _described(value: Any, rows: bool) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_nested:
        return f"nested {value.dtype}"
    shape = ", ".join(["rows" if rows and i == 0 else str(n) for i, n in enumerate(value.shape)])
    grad = ", with gradient" if value.requires_grad and torch.is_grad_enabled() else ""
    return f"{str(value.dtype).removeprefix('torch.')} ({shape}) on {value.device.type}{grad}"


class Rehearsal:
    """A union of nobody, for the rehearsal of a call: it makes every check of a call and computes nothing.

    Args:
        device: where the rows really are, for the choice of a backend.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pair_reduce(self, x: Tensor, y: Tensor | None = None, **arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        p, backend = checked(x, y, arguments)
        choice.choose(backend, self.device, x.dtype, p.pair)
        r = x.new_empty(p.n, dtype=accumulation_dtype(x.dtype))
        return (r, r.new_empty(p.m)) if p.columns else r

    def pair_total(
        self, x: Tensor, y: Tensor | None = None, *, outer: str, positive: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        r = self.pair_reduce(x, y, **arguments)
        assert isinstance(r, Tensor)
        return r.sum()

    def count(self, x: Tensor) -> int:
        return max(x.shape[0], 2)  # whether there are too few rows is for the whole batch to say

    def first(self, x: Tensor) -> int:
        return 0

    def total(self, values: Tensor) -> Tensor:
        return values.sum()

    def softmax(self, values: Tensor) -> Tensor:
        return values

    def largest(self, value: Tensor) -> Tensor:
        return value

    def summed(self, matrix: Tensor) -> Tensor:
        return matrix


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, with defaults filled in; those of a `*views` are views[0], views[1], ... (see `named`)."""
    signature = inspect.signature(function)
    for name in kwargs:
        if not name.isidentifier():
            raise unexpected(function.__name__, name, signature.parameters)
    arguments = signature.bind(*args, **kwargs)
    arguments.apply_defaults()
    found = dict(arguments.arguments)
    several = _several(signature)
    if several is None:
        return found
    return {f"{several}[{k}]": value for k, value in enumerate(found.pop(several))} | found


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which may be called with what `bound` found, by names alone."""
    several = _several(inspect.signature(function))
    if several is None:
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        listed = [kwargs.pop(name) for name in [*kwargs] if name.startswith(f"{several}[")]
        return function(*args, *listed, **kwargs)

    return call


def _several(signature: inspect.Signature) -> str | None:
    """The name of a `*views`."""
    return next((name for name, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL), None)


def agreed(
    check: Callable[..., None],
    across: Callable[[Any], dict[str, Any] | None],
    even: tuple[str, ...] = (),
    over: Callable[[Any], Any] | None = None,
) -> Any:
    """Decorate a method that talks to all ranks, so that they agree on its call first, as objectives with group= do.

    Args:
        check: takes what the method takes, and makes all checks of it; the method makes them again. Of the module it asks what
            `across` says, and nothing else.
        across: of the module; the settings that all ranks must share, or None where the call stays within this process.
        even: arguments of which every rank must have as many rows.
        over: of the module; the process group of these ranks. None for that of all.
    """

    def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
        checked = Checked(check, method, even)
        name, agree_on = checked.name, checked.agree

        @wraps(method)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = transforms.keepable((args, kwargs))
            settings = across(module) if dist.is_available() and dist.is_initialized() else None
            group = dist.group.WORLD if settings is None or over is None else over(module)
            if settings is not None and dist.get_world_size(group) > 1:
                if not (in_graph.traced() and in_graph.agreed(name, args, kwargs, settings, group)):
                    agree_on(args, kwargs, settings, group)
                elif not _passes(check, module, args, kwargs):
                    return torch.zeros(())  # the op in the graph raises, on all ranks, before this is anything
            return method(module, *args, **kwargs)

        return call

    return decorated


def _passes(check: Callable[..., None], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call passes its checks."""
    try:
        check(module, *args, **kwargs)
    except (ValueError, TypeError):
        return False
    return True


class Checked:
    """The checks of a method that talks to all ranks; a graph finds them by the method's name."""

    known: ClassVar[dict[str, Checked]] = {}

    def __init__(self, check: Callable[..., None], method: Callable[..., Any], even: tuple[str, ...]) -> None:
        self.check, self.method, self.even = check, method.__qualname__, even
        self.name = f"{method.__module__}:{method.__qualname__}"
        self.known[self.name] = self

    @torch._disable_dynamo
    def agree(self, args: tuple[Any, ...], kwargs: dict[str, Any], settings: dict[str, Any], group: Any) -> None:
        """Raise on all ranks what is wrong with the call of one."""
        call = Call(MethodType(self.check, SimpleNamespace(**settings)), args, kwargs, settings, self.method)
        layouts, _ = agree(Wire(group), call)
        for name, layout in zip(call.rows, layouts, strict=False):
            if name.split("[")[0] not in self.even:
                continue
            odd = next((k for k, n in enumerate(layout) if n != layout[0]), None)
            if odd is not None:
                raise ValueError(
                    f"{name}: expected as many rows on every rank, got {layout[0]} on rank 0 and {layout[odd]} on rank {odd}; "
                    "drop the last, smaller batch"
                )
