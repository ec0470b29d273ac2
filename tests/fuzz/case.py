"""One call of fastcl as text: what builds its tensors, and what is called. It is run in several ways, and printed as a script."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastcl

from . import formula


@dataclass(frozen=True)
class Case:
    """A call.

    function: its path below fastcl. statements: lines that build its tensors, `name = ...` first. positional, keywords: its
    arguments, as text. settings: of an nn.Module's constructor, as text. wants: which tensors want gradients. upstream: the
    factor of the upstream gradient. autocast: a dtype for the forward, or "". inside: whether the backward runs within it too.
    sizes: rows of each rank, of which there is one for one process.
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
    inside: bool = False
    compiled: bool = False
    threads: int = 1
    sizes: tuple[int, ...] = (1,)
    strategy: str = "auto"
    gradient: str = "exact"
    sharded: tuple[str, ...] = ()  # which tensors are cut over ranks

    @property
    def owner(self) -> Any:
        """The function, or the class of the module."""
        return resolve(self.function)

    @property
    def takes_backend(self) -> bool:
        return "backend" in inspect.signature(self.owner).parameters

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
            call = f"{call}({', '.join(f'{k}={v}' for k, v in (self.settings | way).items())})"
        if self.compiled:
            call = f'torch.compile({call}, backend="aot_eager")'
        call = f"value = {call}({', '.join(given)})"
        if self.autocast:
            call = f'with torch.autocast("cpu", torch.{self.autocast}):\n    {call}'
        lines = [*self.statements, *(f"{name}.requires_grad_()" for name in self.wants), call, "print(value)"]
        if self.wants:
            g = f"{self.upstream!r} * " if self.upstream != 1.0 else ""
            lines += [
                "values = value if isinstance(value, tuple) else (value,)",
                f"total = {g}sum((v * rows(v.numel(), 1, 9).float().view(v.shape)).nan_to_num(0, 0, 0).sum() for v in values)",
                f"print(torch.autograd.grad(total, [{', '.join(self.wants)}], allow_unused=True))",
            ]
            if self.inside and self.autocast:
                lines[-1] = f'with torch.autocast("cpu", torch.{self.autocast}):\n    {lines[-1]}'
        if self.threads > 1:
            lines.insert(0, f"torch.set_num_threads({self.threads})")
        head = ["import torch", "import fastcl", "", inspect.getsource(formula.rows).replace("Tensor", "torch.Tensor")]
        if len(self.sizes) > 1:
            cut = f"# over {len(self.sizes)} ranks: {', '.join(self.sharded)} cut to rows {self.sizes} each, with"
            lines.insert(0, f"{cut} group=dist.group.WORLD, strategy={self.strategy!r}, gradient={self.gradient!r}")
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
    case: Case, change: Change | None = None, backend: str | None = None, group: Any = None, number: Any = None
) -> Found:
    """The call, with each floating tensor as `change(name, tensor)` makes it, and each number as `number(name, value)` does."""
    tensors = {
        name: change(name, value) if change and isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.tensors().items()
    }
    if group is not None:
        rank = torch.distributed.get_rank(group)
        start = sum(case.sizes[:rank])
        for name in case.sharded:
            tensors[name] = tensors[name][start : start + case.sizes[rank]].detach()
    for name in case.wants:
        value = tensors[name].detach() if not isinstance(tensors[name], nn.Parameter) else tensors[name]
        tensors[name] = value.requires_grad_()
    space = {"torch": torch, "fastcl": fastcl, **tensors}
    evaluated = lambda given: {k: eval(v, space) for k, v in given.items()}  # noqa: E731
    keywords, settings = evaluated(case.keywords), evaluated(case.settings or {})
    if number is not None:
        keywords, settings = ({k: number(k, v) for k, v in given.items()} for given in (keywords, settings))
    chosen = settings if case.settings is not None else keywords
    if case.takes_backend:
        chosen["backend"] = backend or case.backend
    if group is not None:
        chosen |= {"group": group, "strategy": case.strategy, "gradient": case.gradient}
    torch.set_num_threads(case.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = case.owner(**settings) if case.settings is not None else case.owner
        leaves = {name: tensors[name] for name in case.wants}
        if case.settings is not None:
            for name, parameter in call.named_parameters():
                if all(parameter is not leaf for leaf in leaves.values()):
                    leaves[name] = parameter
        if case.compiled:
            torch._dynamo.reset()
            call = torch.compile(call, backend="aot_eager", fullgraph=True)
        within = lambda on: torch.autocast("cpu", getattr(torch, case.autocast)) if on else nullcontext()  # noqa: E731
        with within(case.autocast):
            values = flat(call(*(tensors[name] for name in case.positional), **keywords))
        gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        if leaves and any(v.requires_grad for v in values):
            # What is not finite has no gradient to compare.
            total = sum(
                (v * g).nan_to_num(0.0, 0.0, 0.0).sum() * case.upstream
                for v, g in zip(values, upstreams(case, values, group), strict=True)
            )
            with within(case.autocast and case.inside):
                answer = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            gradients |= {name: g for name, g in zip(leaves, answer, strict=True) if g is not None}
    return Found([v.detach() for v in values], gradients)


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
