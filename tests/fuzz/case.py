"""One call of fastcl as text: what builds its tensors, and what is called. It is run in several ways, and printed as a script."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import textwrap
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastcl
from fastcl.backends.workspace import WORKSPACE_VARIABLE
from fastcl.equation.checks import is_dtensor

from . import formula


@dataclass(frozen=True)
class Case:
    """A call.

    function: its path below fastcl. statements: lines that build its tensors, `name = ...` first. positional, keywords: its
    arguments, as text. settings: of an nn.Module's constructor, as text. wants: which tensors want gradients. upstream: the
    factor of the upstream gradient. autocast: a dtype, or "". inside: what runs within it, the "forward", the "backward" or "both".
    derive: how gradients are asked for: "grad", by "func" (torch.func.grad), "batched" (is_grads_batched), "jvp", a direction, or
        "twice", the gradient of a gradient.
    spoiled: an argument that must be refused.
    held: how a module comes to be called: as it was built (""), as a "copy", "pickled", or, by the name of a setting, as a subclass
        that states it as a property.
    steps: by how much its own parameters have moved since it was built.
    sizes: rows of each rank, of which there is one for one process. workspace: megabytes that tiles may take, or "".
    """

    function: str
    statements: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    keywords: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] | None = None
    wants: tuple[str, ...] = ()
    upstream: float = 1.0
    backend: str = "auto"
    autocast: str = ""
    inside: str = "both"
    compiled: bool = False
    derive: str = "grad"
    spoiled: str = ""
    held: str = ""
    steps: float = 0.0
    threads: int = 1
    workspace: str = ""
    sizes: tuple[int, ...] = (1,)
    strategy: str = "auto"
    gradient: str = "exact"
    sharded: tuple[str, ...] = ()  # which tensors are cut over ranks
    placed: bool = False  # as DTensors, which bring their ranks with them
    odd: tuple[str, str] | None = (
        None  # what the last rank passes under a name in place of what the others do; "" for nothing
    )

    @property
    def owner(self) -> Any:
        """The function, or the class of the module."""
        return resolve(self.function)

    @property
    def takes_backend(self) -> bool:
        return "backend" in inspect.signature(self.owner).parameters

    @property
    def around_forward(self) -> str:
        """The dtype of autocast around the call."""
        return self.autocast if self.inside != "backward" else ""

    @property
    def around_backward(self) -> str:
        """The dtype of autocast around the backward."""
        return self.autocast if self.inside != "forward" and self.derive not in ("func", "jvp") else ""

    def tensors(self) -> dict[str, Any]:
        """Everything that the statements name."""
        space: dict[str, Any] = {"torch": torch, "fastcl": fastcl, "rows": formula.rows}
        known = set(space)
        exec("\n".join(self.statements), space)
        return {name: value for name, value in space.items() if name not in known and not name.startswith("__")}

    def script(self) -> str:
        """What a person runs to see it."""
        way = {"backend": repr(self.backend)} if self.takes_backend else {}
        given = [
            *self.positional,
            *(f"{k}={v}" for k, v in (self.keywords | ({} if self.settings is not None else way)).items()),
        ]
        call = f"fastcl.{self.function}"
        if self.settings is not None:
            settings = {k: v for k, v in self.settings.items() if k != self.held} | way
            if self.held in self.settings:  # a property of a subclass
                stated = f"{{{self.held!r}: property(lambda self: {self.settings[self.held]})}}"
                call = f"type('Held', ({call},), {stated})"
            call = f"{call}({', '.join(f'{k}={v}' for k, v in settings.items())})"
            copied = {"copy": "copy.deepcopy({})", "pickled": "pickle.loads(pickle.dumps({}))"}
            call = copied.get(self.held, "{}").format(call)
        if self.compiled:
            call = f'torch.compile({call}, backend="aot_eager")'
        call = f"value = {call}({', '.join(given)})"
        if self.around_forward:
            call = f'with torch.autocast("cpu", torch.{self.autocast}):\n    {call}'
        lines = [*self.statements, *(f"{name}.requires_grad_()" for name in self.wants), call, "print(value)"]
        if self.derive == "jvp":
            ad = "torch.autograd.forward_ad"
            duals = [
                f"{n} = {ad}.make_dual({n}, {n} * rows({n}.numel(), 1, 3).view_as({n}).sign().to({n}))"
                for n in self.wants
            ]
            body = "\n".join([*duals, call, f"print({ad}.unpack_dual(value))"])
            lines = [*self.statements, f"with {ad}.dual_level():", textwrap.indent(body, "    ")]
        elif self.wants:
            g = f"{self.upstream!r} * " if self.upstream != 1.0 else ""
            lines += [
                "values = value if isinstance(value, tuple) else (value,)",
                f"total = {g}sum((v * rows(v.numel(), 1, 9).float().view(v.shape)).nan_to_num(0, 0, 0).sum() for v in values)",
                f"print(torch.autograd.grad(total, [{', '.join(self.wants)}], allow_unused=True))",
            ]
            ways = {
                "func": "# by torch.func.grad",
                "batched": "# with is_grads_batched=True, two gradients alike",
                "twice": "# with create_graph=True, and the gradient of sum(g * rows(g.numel(), 1, 4)) of these",
            }
            if self.around_backward:
                lines[-1] = f'with torch.autocast("cpu", torch.{self.autocast}):\n    {lines[-1]}'
            lines += [ways[self.derive]] if self.derive in ways else []
            lines += [f"# its parameters moved by {self.steps!r} first"] if self.steps else []
        if self.threads > 1:
            lines.insert(0, f"torch.set_num_threads({self.threads})")
        if self.workspace:
            lines.insert(0, f'os.environ["{WORKSPACE_VARIABLE}"] = "{self.workspace}"')
        head = [
            *(
                f"import {name}"
                for name in ("copy", "os", "pickle", "numpy")
                if any(f"{name}." in line for line in lines)
            ),
            "import torch",
            "import fastcl",
            "",
            inspect.getsource(formula.rows).replace("Tensor", "torch.Tensor"),
        ]
        lines += [f"# the last rank passes {self.odd[0]}={self.odd[1]}"] if self.odd else []
        lines += ["# rows as DTensors, sharded over all ranks (Shard(0)), without group="] if self.placed else []
        lines += [f"# {self.spoiled} must be refused by a ValueError or a TypeError"] if self.spoiled else []
        if len(self.sizes) > 1:
            cut = f"# over {len(self.sizes)} ranks: {', '.join(self.sharded)} cut to rows {self.sizes} each, with"
            lines.insert(0, f"{cut} group=fastcl.Ranks(dist.group.WORLD, {self.gradient!r}, {self.strategy!r})")
        return "\n".join([*head, *lines])


def resolve(path: str) -> Any:
    """fastcl.a.b; the two ops where they are defined, so that plain PyTorch can stand in for them."""
    found: Any = fastcl.ops if path in ("pair_reduce", "pair_total") else fastcl
    for name in path.split("."):
        found = getattr(found, name)
    return found


@dataclass
class Found:
    """What a call gave: its values and its gradients by name."""

    values: list[Tensor]
    gradients: dict[str, Tensor]


Change = Callable[[str, Tensor], Tensor]


def run(
    case: Case,
    change: Change | None = None,
    backend: str | None = None,
    group: Any = None,
    number: Any = None,
    function: Any = None,
) -> Found:
    """The call, with each floating tensor as `change(name, tensor)` makes it, and each number as `number(name, value)` does.

    function: what stands in for the case's own, and chooses no backend.
    """
    tensors = {
        name: change(name, value) if change and isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.tensors().items()
    }
    if group is not None:
        rank = torch.distributed.get_rank(group)
        start = sum(case.sizes[:rank])
        for name in case.sharded:
            whole = tensors[name]
            tensors[name] = whole[start : start + case.sizes[rank]].detach()
            if case.placed:
                tensors[name] = on_mesh(tensors[name], whole)
        if case.odd and rank == len(case.sizes) - 1:
            case = passing(case, *case.odd, tensors)
    for name in case.wants:  # a leaf
        value = tensors[name].detach() if not isinstance(tensors[name], nn.Parameter) else tensors[name]
        tensors[name] = value.requires_grad_()

    def evaluated(given: dict[str, str], leaves: dict[str, Tensor] | None = None) -> dict[str, Any]:
        space = {"torch": torch, "fastcl": fastcl, "numpy": numpy, **tensors, **(leaves or {})}
        found = {k: eval(v, space) for k, v in given.items()}
        return found if number is None else {k: number(k, v) for k, v in found.items()}

    chosen: dict[str, Any] = {"backend": backend or case.backend} if case.takes_backend and function is None else {}
    if group is not None and not case.placed and "group" in inspect.signature(case.owner).parameters:
        chosen["group"] = fastcl.Ranks(group, case.gradient, case.strategy)
    settings = None if case.settings is None else evaluated(case.settings) | chosen
    torch.set_num_threads(case.threads)
    limit = {WORKSPACE_VARIABLE: case.workspace} if case.workspace else {}
    with warnings.catch_warnings(), patch.dict(os.environ, limit):
        warnings.simplefilter("ignore")
        call = function or case.owner
        leaves = {name: tensors[name] for name in case.wants}
        if settings is not None:
            call, learned = held(case, settings, leaves)
            leaves |= learned
        before = {name: (t, t._version) for name, t in (tensors | leaves).items() if isinstance(t, Tensor)}
        if case.compiled:
            torch._dynamo.reset()
            call = torch.compile(call, backend="aot_eager", fullgraph=True)

        def values_of(leaves: dict[str, Tensor]) -> list[Tensor]:
            keywords = evaluated(case.keywords, leaves) | (chosen if settings is None else {})
            with autocast(case.around_forward):
                return local(call(*((tensors | leaves)[name] for name in case.positional), **keywords))

        found = derived(case, values_of, leaves, group)
        found.gradients = {name: g.to_local() if is_dtensor(g) else g for name, g in found.gradients.items()}
        changed = [name for name, (t, version) in before.items() if t._version != version]
        if changed:
            raise AssertionError(f"{', '.join(changed)}: modified by the call")
        return found


def passing(case: Case, name: str, text: str, tensors: dict[str, Any]) -> Case:
    """The case with that under the name, among the tensors too; without it where the text is empty."""
    if name not in case.positional:
        return replace(case, keywords=case.keywords | {name: text})
    if text:
        tensors[name] = eval(text, {"torch": torch, **tensors})
        return case
    return replace(case, positional=tuple(n for n in case.positional if n != name))


def on_mesh(rows: Tensor, whole: Tensor) -> Tensor:
    """Own rows as those of a DTensor over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    shape, stride = whole.shape, whole.contiguous().stride()
    placed: Tensor = DTensor.from_local(
        rows.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    return placed


def local(value: Any) -> list[Tensor]:
    """What all ranks hold alike is a plain tensor."""
    return [v.to_local() if is_dtensor(v) else v for v in flat(value)]


def held(case: Case, settings: dict[str, Any], leaves: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module of the case, and its parameters: under the names of the leaves that it was given, or under its own."""
    if case.held in settings:
        value = settings.pop(case.held)
        module = type("Held", (case.owner,), {case.held: property(lambda self: value)})(**settings)
    else:
        module = case.owner(**settings)
    given = {id(leaf): name for name, leaf in leaves.items()}
    names = [given.get(id(parameter), name) for name, parameter in module.named_parameters()]
    if case.held == "copy":
        module = copy.deepcopy(module)
    elif case.held == "pickled":
        module = pickle.loads(pickle.dumps(module))
    learned = dict(zip(names, module.parameters(), strict=True))
    for name, parameter in learned.items():
        if name not in leaves:
            parameter.data.add_(case.steps)
    return module, learned


def autocast(dtype: str) -> Any:
    """The context of that dtype, or none."""
    return torch.autocast("cpu", getattr(torch, dtype)) if dtype else nullcontext()


Values = Callable[[dict[str, Tensor]], list[Tensor]]


def derived(case: Case, values_of: Values, leaves: dict[str, Tensor], group: Any) -> Found:
    """Values, and gradients by the way that the case asks for them."""
    if case.derive == "jvp" and leaves:
        return _directional(values_of, leaves)
    if case.derive == "func" and leaves:

        def total_and_values(leaves: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
            values = values_of(leaves)
            return _total(case, values, group), values

        detached = {name: leaf.detach() for name, leaf in leaves.items()}
        gradients, values = torch.func.grad(total_and_values, has_aux=True)(detached)
        return Found([v.detach() for v in values], gradients)
    values = values_of(leaves)
    gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if leaves and any(v.requires_grad for v in values):
        total = _total(case, values, group)
        batched = {"grad_outputs": total.new_ones(2), "is_grads_batched": True} if case.derive == "batched" else {}
        with autocast(case.around_backward):
            answer = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, create_graph=case.derive == "twice", **batched
            )
        if case.derive == "twice":
            answer = _of_gradients(answer, leaves, _parts(case, group))
        for name, g in zip(leaves, answer, strict=True):
            if g is not None:
                gradients[name] = g[1] if batched else g
    return Found([v.detach() for v in values], gradients)


def _total(case: Case, values: list[Tensor], group: Any) -> Tensor:
    """What is differentiated; what is not finite has no gradient to compare."""
    given = zip(values, upstreams(case, values, group), strict=True)
    total = [(v * g).nan_to_num(0.0, 0.0, 0.0).sum() * case.upstream for v, g in given]
    return torch.stack([t.to(total[0]) for t in total]).sum() if len(total) > 1 else total[0]


def _parts(case: Case, group: Any) -> dict[str, tuple[int, int]]:
    """Of each tensor that is cut over ranks: which of its rows this one has, the first and how many follow those."""
    if group is None:
        return {}
    rank = torch.distributed.get_rank(group)
    return {name: (sum(case.sizes[:rank]), sum(case.sizes[rank + 1 :])) for name in case.sharded}


def _of_gradients(
    gradients: tuple[Tensor | None, ...], leaves: dict[str, Tensor], parts: dict[str, tuple[int, int]]
) -> tuple[Tensor | None, ...]:
    """The gradients of a sum of these, each entry times a number: of a rank's own rows, of the whole tensor's."""
    terms = []
    for name, g in zip(leaves, gradients, strict=True):
        if g is None or not g.requires_grad:
            continue
        before, after = (g.shape[1:].numel() * n for n in parts.get(name, (0, 0)))
        factor = formula.rows(before + g.numel() + after + 1, 1, 4)[before : before + g.numel()]
        terms.append((g * factor.view_as(g).to(g)).double().sum())
    if not terms:
        return (None,) * len(leaves)
    return torch.autograd.grad(torch.stack(terms).sum(), list(leaves.values()), allow_unused=True)


def _directional(values_of: Values, leaves: dict[str, Tensor]) -> Found:
    """Derivatives along a direction, by dual numbers; they are held to what gradients are.

    Of signs: their products with a tensor are exact in its dtype, as they are in the wider one that is the truth.
    """
    with forward_ad.dual_level():
        along = {
            name: formula.rows(max(t.numel(), 1), 1, 3)[: t.numel()].view_as(t).sign().to(t.dtype)
            for name, t in leaves.items()
        }
        # PyTorch makes no dual of a tensor that is in one place several times.
        apart = {
            name: t.detach().clone() if torch._debug_has_internal_overlap(t) else t.detach()
            for name, t in leaves.items()
        }
        duals = {name: forward_ad.make_dual(t, t * along[name]) for name, t in apart.items()}
        found = [forward_ad.unpack_dual(v) for v in values_of(duals)]
    tangents = {f"value {i}": torch.zeros_like(v) if t is None else t for i, (v, t) in enumerate(found)}
    return Found([v for v, _ in found], tangents)


def upstreams(case: Case, values: list[Tensor], group: Any) -> list[Tensor]:
    """The upstream gradient of each value: of a rank's own rows, its part."""
    found = []
    for v in values:
        whole = v.numel()
        if group is not None and v.dim():
            rank = torch.distributed.get_rank(group)
            views = v.numel() // max(1, case.sizes[rank])
            whole = max(1, views) * sum(case.sizes)
        g = formula.rows(whole, 1, 9).float().to(v.dtype)  # the same number in every dtype
        if whole != v.numel():
            start = sum(case.sizes[:rank])
            g = g.view(-1, sum(case.sizes))[:, start : start + case.sizes[rank]]
        found.append(g.reshape(v.shape))
    return found


def flat(value: Any) -> list[Tensor]:
    """Numbers and tensors in whatever holds them, as tensors."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return flat(list(value.values()))
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in flat(part)]
    return [torch.tensor(float(value), dtype=torch.float64)]
