"""Steps with large batches through encoders that hold few rows at a time (GradCache), for any loss.

    1. embed chunk by chunk without a graph            rows of the whole batch, no activations
    2. one loss of all embeddings                      its gradient in each embedding
    3. embed chunk by chunk again, with a graph, and push each chunk's gradient through it

The parameters get the gradients of the loss of the whole batch; activations are those of one chunk, and the encoders run forward
twice. Source: Gao et al. 2021 (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from .equation.arguments import integer, kind_of
from .precision import stacked
from .progress import bar

DRIFT = 0.05  # of the largest entry: beyond any rounding (bfloat16 layers under autocast: 1%), below dropout drawn anew


def cached_step(
    encoders: Callable[..., Any] | Sequence[Callable[..., Any]],
    batches: Sequence[Any],
    loss: Callable[..., Tensor],
    *,
    chunk: int | Sequence[int],
    scaler: torch.amp.GradScaler | None = None,
    ddp: nn.Module | Sequence[nn.Module] = (),
    progress: bool = False,
) -> Tensor:
    """The loss of the whole batch, with its gradients accumulated in every parameter, as loss(...).backward() would leave them.

        cached_step([images, texts], [pixels, tokens], fastcl.losses.CLIPLoss(), chunk=64)
        cached_step([model], [(pixels, tokens)], lambda x, y, scale: clip(x, y, logit_scale=scale), chunk=64)

    It equals the step that embeds in the same chunks and keeps every graph, to rounding: random states are those of the first pass,
    so that dropout repeats; autocast is that of the call. Layers that look across rows (BatchNorm) see chunks, as in gradient
    accumulation, and their buffers move once. Source: Gao et al. 2021 (arXiv 2101.06983).

    Args:
        encoders: one for each batch, the same one several times where towers are shared; or a single one for all. Each returns a
            tensor (rows of its chunk, ...), a tuple of such tensors, or a dictionary; one with a single element, such as a learned
            scale, is taken to be the same for every chunk (one of shape (1,) with chunk=1 is its row).
        batches: what each encoder gets. Tensors and lists are cut along their rows; a tuple is its positional arguments, a
            dictionary its keyword arguments; everything else goes to each chunk as it is.
        loss: called with the tensors of all encoders in order, those of dictionaries by name (each name from one encoder); returns
            a tensor with one element. Its own parameters get their gradients too.
        chunk: how many rows an encoder holds at a time, or one number for each encoder; the last chunk may be smaller.
        scaler: scales the loss before its gradients are formed.
        ddp: modules that wait for their peers at the end of a backward (DistributedDataParallel, fully_shard), where they are not
            the encoders or inside them but called by a function: all but the last chunk that calls one go without. (fully_shard
            meets its peers in each forward too: there every rank needs as many chunks.)
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        The loss without a graph, not scaled.

    Raises:
        ValueError: for batches, chunks or rows that do not fit, one name from two encoders, or a loss that is no single number.
        TypeError: for an encoder that returns something else, or a single tensor in place of a sequence.
        RuntimeError: where gradients are not recorded, or for an encoder that does not repeat itself; the gradients are then those
            of something else, discard them.

    Examples:
        >>> encoder, loss = torch.nn.Linear(8, 4), fastcl.losses.CLIPLoss()
        >>> images, texts = torch.randn(64, 8), torch.randn(64, 8)
        >>> value = fastcl.cached_step(encoder, (images, texts), loss, chunk=16)
        >>> encoder.weight.grad.shape
        torch.Size([4, 8])
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "fastcl.cached_step: expected gradients to be recorded, got a call under torch.no_grad() or torch.inference_mode(), "
            "where there are none to accumulate; call it outside, or take the loss of fastcl.cached_embeddings there"
        )
    replay = Replay(encoders, batches, chunk, ddp, progress)
    leaves = [t.requires_grad_(t.is_floating_point()) for t in replay.embed()]
    value = replay.call(loss, leaves)
    with _without_autocast(replay.devices):
        (value if scaler is None else scaler.scale(value)).backward()
    replay.backward([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    return value.detach()


def cached_embeddings(
    encoders: Callable[..., Any] | Sequence[Callable[..., Any]],
    batches: Sequence[Any],
    *,
    chunk: int | Sequence[int],
    ddp: nn.Module | Sequence[nn.Module] = (),
    progress: bool = False,
) -> tuple[Tensor, ...]:
    """The embeddings of whole batches, whose backward embeds again: cached_step for trainers that call backward themselves.

        x, y = cached_embeddings([images, texts], [pixels, tokens], chunk=64);   loss(x, y).backward()

    Gradients of parameters are accumulated where they belong, in `.grad`; torch.autograd.grad does not see the parameters.

    Args:
        encoders, batches, chunk, ddp, progress: see fastcl.cached_step.

    Returns:
        The tensors of all encoders in order, those of dictionaries in the order of their names' appearance.

    Raises:
        ValueError, TypeError: see fastcl.cached_step.
        RuntimeError: from backward, for an encoder that does not repeat itself.

    Examples:
        >>> encoder, loss = torch.nn.Linear(8, 4), fastcl.losses.CLIPLoss()
        >>> x, y = fastcl.cached_embeddings(encoder, (torch.randn(64, 8), torch.randn(64, 8)), chunk=16)
        >>> loss(x, y).backward()
        >>> encoder.weight.grad.shape
        torch.Size([4, 8])
    """
    replay = Replay(encoders, batches, chunk, ddp, progress)
    leaves = replay.embed()
    if not torch.is_grad_enabled():
        return tuple(leaves)
    found: tuple[Tensor, ...] = _Embedded.apply(torch.ones((), requires_grad=True), replay, leaves)
    return found


class _Embedded(torch.autograd.Function):
    """The embeddings of a first pass; the gradient makes the second."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, replay: Replay, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.replay = replay
        ctx.mark_non_differentiable(*(t for t in leaves if not t.is_floating_point()))
        return tuple(leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.replay.backward(list(gradients))
        return None, None, None


class _Job:
    """One chunk of one batch: who embeds it, its rows, and the random states before it."""

    def __init__(self, encoder: int, start: int, stop: int) -> None:
        self.encoder, self.start, self.stop = encoder, start, stop
        self.random: tuple[Tensor, list[int], list[Tensor]] | None = None


class Replay:
    """Both passes over all chunks.

    Args:
        encoders, batches, chunk, ddp, progress: see cached_step. chunk may also hold the sizes of all chunks of each batch.
    """

    def __init__(self, encoders: Any, batches: Any, chunk: Any, ddp: Any, progress: bool) -> None:
        for name, given in (("encoders", encoders), ("batches", batches)):
            if isinstance(given, (Tensor, Mapping)) or not (callable(given) or isinstance(given, Iterable)):
                advice = "" if given is None else f"; pass [{name}]"
                got = "one tensor" if isinstance(given, Tensor) else kind_of(given)
                raise TypeError(f"{name}: expected a sequence, one for each tower, got {got}{advice}")
        batches = list(batches)
        self.encoders = [encoders] * len(batches) if callable(encoders) else list(encoders)
        for i, encoder in enumerate(self.encoders):
            if not callable(encoder):
                raise TypeError(f"encoders[{i}]: expected a module or a function, got {kind_of(encoder)}")
        if not batches or len(batches) != len(self.encoders):
            raise ValueError(f"batches: expected one for each encoder, {len(self.encoders)}, got {len(batches)}")
        self.batches, self.progress = batches, progress
        chunks = list(chunk) if isinstance(chunk, Sequence) else [chunk] * len(batches)
        if len(chunks) != len(batches):
            raise ValueError(f"chunk: expected a number, or one for each encoder, {len(batches)}, got {len(chunks)}")
        sizes = [_sizes(_rows(batch, i), c) for i, (batch, c) in enumerate(zip(batches, chunks, strict=True))]
        self.jobs = [job for i, parts in enumerate(sizes) for job in _jobs(i, parts)]
        self.modules = list(dict.fromkeys(e for e in self.encoders if isinstance(e, nn.Module)))
        given = [ddp] if isinstance(ddp, nn.Module) else list(ddp)
        inside = (part for module in self.modules for part in module.modules())
        self.waiting = list(dict.fromkeys(m for m in (*given, *inside) if _waits(m)))
        self.last: dict[nn.Module, _Job] = {}  # of each module that waits, the last chunk that calls it
        tensors = [t for batch in batches for t in _tensors(batch)]
        tensors += [next(m.parameters(), None) for m in self.modules] + [p for m in given for p in m.parameters()][:1]
        self.devices = sorted({t.device.type for t in tensors if t is not None} | {"cpu"})
        self.tensors = [t for t in tensors if t is not None]
        self.autocast = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _with_autocast(self.devices)
        ]
        self.shapes: list[list[bool]] = []  # of each encoder, which of its outputs are rows
        self.names: list[Any] = []
        self.leaves: list[Tensor] = []

    def embed(self) -> list[Tensor]:
        """The first pass: every output of every encoder, of all rows."""
        parts: list[list[list[Tensor]]] = [[] for _ in self.encoders]
        with torch.no_grad(), ExitStack() as stack, bar("embed", len(self.jobs), "chunk", self.progress) as shown:
            now: list[_Job] = []
            for module in self.waiting:
                hook = module.register_forward_pre_hook(lambda m, _: self.last.__setitem__(m, now[-1]))
                stack.callback(hook.remove)
            for job in self.jobs:
                now.append(job)
                job.random = (torch.get_rng_state(), *get_device_states(*self.tensors))
                names, found = _outputs(self._run(job), job)
                if not parts[job.encoder]:
                    rows = job.stop - job.start
                    self.names.append(names)
                    self.shapes.append([t.dim() > 1 or (t.dim() == 1 and (t.shape[0] > 1 or rows == 1)) for t in found])
                self._check_rows(job, found)
                parts[job.encoder].append(found)
                shown.update(1)
        self.buffers = [(b, b.clone()) for m in self.modules if m.training for b in m.buffers()]
        self.leaves = [
            stacked(*chunks) if are_rows else chunks[0].clone()
            for found, kinds in zip(parts, self.shapes, strict=True)
            for chunks, are_rows in zip(zip(*found, strict=True), kinds, strict=True)
        ]
        return [t.detach() for t in self.leaves]

    def backward(self, gradients: list[Tensor]) -> None:
        """The second pass: each chunk's share of the gradients, through its encoder."""
        drift = [t.new_zeros((), dtype=torch.float32) for t in self.leaves]
        first = [sum(len(kinds) for kinds in self.shapes[:i]) for i in range(len(self.shapes))]
        last = {job.encoder: job for job in self.jobs}
        with bar("embed again", len(self.jobs), "chunk", self.progress) as shown:
            for job in self.jobs:
                with ExitStack() as stack:
                    for module in self.waiting:
                        if self.last.get(module) is not job:
                            stack.enter_context(_not_waiting(module))
                    with torch.enable_grad(), self._as_before(job):
                        found = _outputs(self._run(job), job)[1]
                    outputs, shares = [], []
                    for k, (t, are_rows) in enumerate(
                        zip(found, self.shapes[job.encoder], strict=True), first[job.encoder]
                    ):
                        rows: Any = slice(job.start, job.stop) if are_rows else ...
                        drift[k] = torch.maximum(drift[k], _apart(t.detach(), self.leaves[k][rows]))
                        if t.requires_grad and (are_rows or last[job.encoder] is job):
                            outputs.append(t)
                            shares.append(gradients[k][rows].to(t.dtype))
                    if outputs:
                        with _without_autocast(self.devices):
                            torch.autograd.backward(outputs, shares)
                shown.update(1)
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        self._check_drift(drift)

    def call(self, loss: Callable[..., Tensor], leaves: list[Tensor]) -> Tensor:
        """The loss of these outputs: by position, or by name where an encoder names them."""
        rest = list(leaves)
        positional: list[Tensor] = []
        named: dict[str, Tensor] = {}
        for names, kinds in zip(self.names, self.shapes, strict=True):
            own, rest = rest[: len(kinds)], rest[len(kinds) :]
            if names is None:
                positional += own
                continue
            if twice := sorted(named.keys() & set(names)):
                raise ValueError(
                    f"encoders: expected outputs of different names, got {twice[0]!r} from two of them; wrap one of the encoders "
                    "in a function that returns a tensor, or other names"
                )
            named |= dict(zip(names, own, strict=True))
        value = loss(*positional, **named)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a tensor with one element, got {got}; return what to call backward on")
        return value

    def _run(self, job: _Job) -> Any:
        encoder, batch = self.encoders[job.encoder], _cut(self.batches[job.encoder], job.start, job.stop)
        if isinstance(batch, tuple):
            return encoder(*batch)
        return encoder(**batch) if isinstance(batch, Mapping) else encoder(batch)

    @contextmanager
    def _as_before(self, job: _Job) -> Iterator[None]:
        """The random states and the autocast of the first pass; in backward neither is the caller's."""
        assert job.random is not None
        cpu, indices, states = job.random
        kind = next((d for d in self.devices if d != "cpu"), "cuda")
        with torch.random.fork_rng(devices=indices, device_type=kind), ExitStack() as stack:
            torch.set_rng_state(cpu)
            set_device_states(indices, states, device_type=kind)
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield

    def _check_rows(self, job: _Job, found: list[Tensor]) -> None:
        for t, are_rows in zip(found, self.shapes[job.encoder], strict=True):
            if are_rows and t.shape[0] != job.stop - job.start:
                raise ValueError(
                    f"encoders[{job.encoder}]: expected {job.stop - job.start} rows for a chunk of as many, got shape "
                    f"{tuple(t.shape)}; return one row for each row of the batch"
                )

    def _check_drift(self, drift: list[Tensor]) -> None:
        for leaf, apart in zip(self.leaves, drift, strict=True):
            size = leaf if leaf.dtype != torch.bool else leaf.byte()
            if leaf.numel() and float(apart) > DRIFT * float(size.abs().amax()):
                raise RuntimeError(
                    "encoders: expected the same rows in both passes, and they differ by more than rounding; draw random numbers "
                    "from torch's own generators (not from a torch.Generator, Python or NumPy), and keep no state in forward"
                )


def _sizes(rows: int, chunk: Any) -> list[int]:
    if isinstance(chunk, Sequence):
        return list(chunk)
    chunk = integer("chunk", chunk, least=1, expected="a number of rows >= 1")
    return [min(chunk, rows - start) for start in range(0, max(rows, 1), chunk)]


def _jobs(encoder: int, sizes: list[int]) -> Iterator[_Job]:
    start = 0
    for size in sizes:
        yield _Job(encoder, start, start + size)
        start += size


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [part for value in batch.values() for part in _parts(value)]
    if isinstance(batch, tuple):
        return [part for value in batch for part in _parts(value)]
    return [batch] if isinstance(batch, list) or (isinstance(batch, Tensor) and batch.dim()) else []


def _tensors(batch: Any) -> list[Tensor]:
    return [part for part in _parts(batch) if isinstance(part, Tensor)]


def _rows(batch: Any, index: int) -> int:
    counts = {len(part) for part in _parts(batch)}
    if len(counts) != 1:
        got = f"{sorted(counts)} rows" if counts else f"{type(batch).__name__} without any"
        raise ValueError(f"batches[{index}]: expected tensors or lists of one number of rows, got {got}")
    return counts.pop()


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Mapping):
        return {name: _cut(value, start, stop) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_cut(value, start, stop) for value in batch)
    return batch[start:stop] if isinstance(batch, list) or (isinstance(batch, Tensor) and batch.dim()) else batch


def _outputs(found: Any, job: _Job) -> tuple[tuple[str, ...] | None, list[Tensor]]:
    """Names, where the encoder gave some, and tensors."""
    names = tuple(found) if isinstance(found, Mapping) else None
    tensors = (
        list(found.values()) if names is not None else list(found) if isinstance(found, (tuple, list)) else [found]
    )
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        got = ", ".join(type(t).__name__ for t in tensors) or "nothing"
        raise TypeError(
            f"encoders[{job.encoder}]: expected a tensor, a tuple of tensors or a dictionary of tensors, got {got}; "
            "wrap it in a function that returns its embeddings"
        )
    return names, tensors


def _apart(now: Tensor, before: Tensor) -> Tensor:
    """How far an output of the second pass is from the first at most; whole numbers and booleans are the same, or all too far."""
    exact = not (now.is_floating_point() or now.is_complex())
    apart = torch.where(now != before, torch.inf, 0.0) if exact else (now - before).abs()
    return apart.amax().float() if apart.numel() else before.new_zeros((), dtype=torch.float32)


def _waits(module: Any) -> bool:
    return hasattr(module, "no_sync") or hasattr(module, "set_requires_gradient_sync")


@contextmanager
def _not_waiting(module: Any) -> Iterator[None]:
    """Gradients stay with this process: DistributedDataParallel's no_sync, or fully_shard's setting."""
    if hasattr(module, "no_sync"):
        with module.no_sync():
            yield
        return
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def _with_autocast(devices: Sequence[str]) -> list[str]:
    return [device for device in devices if torch.amp.is_autocast_available(device)]


@contextmanager
def _without_autocast(devices: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in _with_autocast(devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


__all__ = ["cached_embeddings", "cached_step"]
