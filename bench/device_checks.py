"""Every loss on a device against the float64 definition, by every route to its kernels, before anything is timed there.

Every case of tests/objectives: its first arguments in each dtype by each route, all its arguments in float32 by the first route.
A case that raises is an answer, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl.backends import choice
from fastcl.precision import dot_precision
from tests.objectives.cases import CASES, Case
from tests.objectives.test_precision import RAW
from tests.objectives.witnesses import gradients, library

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Result = dict[str, Any]


class Route(NamedTuple):
    """A way to the kernels: a backend, and the form that is asked of it."""

    name: str
    backend: str
    settings: dict[str, str] = {}  # noqa: RUF012  never written to


# Tiles of a few hundred rows, so that a small problem turns every loop over tiles.
FORMS = {
    "cuda": ("FASTCL_CUDA", "FASTCL_WORKSPACE_MB", ("auto", "strip", "fused", "hopper")),
    "triton": ("FASTCL_TRITON", "FASTCL_WORKSPACE_MB", ("auto", "strip", "fused")),
}


def forms_of(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The forms of a backend: not Triton's fused one where a compiler that leaves out a fence has it refused."""
    names = FORMS[backend][2]
    if backend != "triton":
        return names
    from fastcl.triton_kernels import tuning

    kind = tuning.kind_of(dtype, dot_precision(torch.empty(0, dtype=dtype)))
    return tuple(n for n in names if n != "fused" or not tuning.unfenced(tuning.architecture(device), kind))


def routes(device: torch.device, dtype: torch.dtype, small_tiles: bool = False) -> list[Route]:
    """Every route that serves this device and dtype, but the definition; the first is what `auto` picks."""
    found = []
    for backend, why in choice.explain(device, dtype):
        if why is not None or backend == "reference":
            continue
        if backend not in FORMS:
            found.append(Route(backend, backend))
            continue
        form, workspace, _ = FORMS[backend]
        tiles = {workspace: "0.5"} if small_tiles else {}
        values = forms_of(backend, device, dtype)
        found += [Route(f"{backend} {value}", backend, {form: value} | tiles) for value in values]
    return found


@contextmanager
def setting(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for as long as this lasts."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Item(NamedTuple):
    """A loss, which of its arguments, and the rows."""

    case: str
    index: int
    n: int
    d: int
    dtype: torch.dtype


def wanted(sizes: Sequence[tuple[int, int]], every_argument: bool, cases: Sequence[Case] = CASES) -> Iterator[Item]:
    """The first arguments of every loss in each dtype; or all the others, in float32."""
    for dtype in (torch.float32,) if every_argument else DTYPES:
        for case in cases:
            for index in list(case.sets())[1:] if every_argument else (0,):
                for n, d in sizes:
                    yield Item(case.id, index, n, d, dtype)


def allowed(case: Case, arguments: dict[str, Any], value: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Absolute error of the value, relative error of the gradient: what torch's own operations make of the dtype, and a little.

    A logit is known to eps times its size. Measured with the CPU kernels, whose sums are as long: 6 eps of values and 13 of
    gradients in float32, 1 and 5 in half precision, whose gradients are rounded once more.
    """
    eps, logits = torch.finfo(dtype).eps, case.logits(arguments)
    size = max(float(value.abs().max()), case.terms(arguments))
    if dtype == torch.float64:
        return 1e-9 * max(1.0, logits) * size, 1e-9 * max(1.0, logits)
    if dtype == torch.float32:
        return 16 * eps * max(1.0, logits) * size, 16 * eps * max(1.0, logits)
    return eps * max(size, 2.0 * logits), 8 * eps


def named(identity: str) -> Case:
    return next(case for case in CASES if case.id == identity)


class Truth(NamedTuple):
    """A problem with its definition's answer in float64, on the CPU."""

    rows: list[Tensor]
    arguments: dict[str, Any]
    value: Tensor
    gradients: list[Tensor]


def given(item: Item) -> tuple[list[Tensor], dict[str, Any]]:
    """The rows and the arguments, on the CPU."""
    case = named(item.case)
    rows = [x.detach() for x in case.rows_of(item.n, item.d, item.dtype)]
    arguments = case.arguments(item.index, item.n, item.d, rows[0])
    if not arguments.get("normalize", True) or case.name in RAW:
        rows = [x / item.d**0.5 for x in rows]  # rows of length about 1, as these losses expect them
    return rows, arguments


@lru_cache(maxsize=1)  # the routes to one item come one after the other
def definition(item: Item) -> Truth:
    case, (rows, arguments) = named(item.case), given(item)
    exact = [x.double().requires_grad_() for x in rows]
    value = library(case, exact, "reference", **arguments)
    # Times n: gradients of a mean would be subnormal in float16.
    return Truth(rows, arguments, value.detach(), list(gradients(item.n * value, exact)))


def check(item: Item, route: Route, device: torch.device) -> Result:
    """One loss by one route on the device."""
    found: Result = item._asdict() | {"route": route.name, "dtype": str(item.dtype).removeprefix("torch.")}
    try:
        case, truth = named(item.case), definition(item)
        leaves = [x.to(device).requires_grad_() for x in truth.rows]
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in truth.arguments.items()}
        with setting(route.settings):
            value = library(case, leaves, route.backend, **arguments)
            pairs = list(zip(gradients(item.n * value, leaves), truth.gradients, strict=True))
        relative = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs if b.any()]
        difference = float((value.detach().cpu().double() - truth.value).abs().max())
    except Exception as error:
        return found | {"right": False, "failed": first_line(error)}
    of_value, of_gradient = allowed(case, truth.arguments, truth.value, item.dtype)
    gradient = max(relative, default=0.0)
    right = difference <= of_value and gradient <= of_gradient  # NaN is not
    return found | {
        "value_error": difference, "gradient_error": gradient, "allowed": [of_value, of_gradient], "right": right,
    }  # fmt: skip


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:240]
