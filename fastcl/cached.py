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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from . import chunks
from .encoder_ranks import hand_out, handing_out, not_waiting, refuse_static_graph, waits
from .encoder_state import Buffers, modules_of, own_parametrizations, refuse_hooks, unchanged, versions_of
from .equation.arguments import kind_of
from .precision import stacked
from .progress import bar

DRIFT = 0.05  # of the largest entry: beyond any rounding (bfloat16 layers under autocast: 1%), below dropout drawn anew
KEPT = 16  # rows of each output that are kept aside, to compare with where the caller writes into all of them


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

    It equals the step that embeds in the same chunks and keeps every graph, to rounding. Both passes see the same random states and
    start from the same buffers, so that dropout and spectral_norm repeat; autocast is that of the call. Layers that look across
    rows (BatchNorm) see chunks, as in gradient accumulation, and torch.nn.utils.parametrize.cached() caches within a chunk.

    Buffers move once: those of every module that is an encoder or in `ddp`, that a bound method, a functools.partial or an object
    holds (its own attributes), or that a function has in its closure, its defaults or the globals it names, be it by a further
    function of its file. With them go the numbers, names and flags of a module whose buffers move, be it in a call of the encoder
    or of the loss. A copy of all of them is held until the second pass. Those of modules reached in another way (name them in
    `ddp`), and other state, move twice. Hooks of parameters (register_hook) see the gradient of each chunk, not the sum.
    Source: Gao et al. 2021 (arXiv 2101.06983).

    Args:
        encoders: one for each batch, the same one several times where towers are shared; or a single one for all. Each returns a
            tensor (rows of its chunk, ...), a tuple of such tensors, or a dictionary; one with a single element, such as a learned
            scale, is taken to be the same for every chunk (one of shape (1,) with chunk=1 is its row).
        batches: what each encoder gets. Tensors and lists are cut along their rows; a tuple is its positional arguments, a
            dictionary its keyword arguments; everything else goes to each chunk as it is.
        loss: called with the tensors of all encoders in order, those of dictionaries by name (each name from one encoder), which it
            may write into; returns a tensor with one element. Its own parameters get their gradients too.
        chunk: how many rows an encoder holds at a time, or one number for each encoder; the last chunk may be smaller.
        scaler: scales the loss before its gradients are formed.
        ddp: modules that encoders call and that are not found in them as above. Where modules wait for their peers at the end of a
            backward (DistributedDataParallel, fully_shard), all but the last chunk that calls one go without. (fully_shard meets
            its peers in each forward too: there every rank needs as many chunks. One of which only a registered method is called
            meets them in each backward too. DistributedDataParallel hands out buffers as each tower starts.)
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        The loss without a graph, not scaled.

    Raises:
        ValueError: for batches, chunks or rows that do not fit, one name from two encoders, a loss that is no single number, or
            DistributedDataParallel(static_graph=True) around what is called for several chunks; also for several chunks and a
            parameter of the encoders with a register_post_accumulate_grad_hook (an optimizer in the backward), which would run
            for each.
        TypeError: for an encoder that returns something else, or a single tensor in place of a sequence.
        RuntimeError: where gradients are not recorded, or for an encoder whose rows differ in the second pass by more than 5% of
            the largest entry (the first 16 are compared where a loss wrote into them); the gradients are then those of something
            else, discard them.

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
    gradients: list[Tensor] = []

    def add(found: list[Tensor]) -> None:
        gradients[:] = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found

    outputs = _Embedded.apply(torch.ones((), requires_grad=True), add, replay.embed())
    value = replay.call(loss, outputs)
    with _without_autocast(replay.devices):
        (value if scaler is None else scaler.scale(value)).backward()
    replay.backward(gradients or [torch.zeros_like(t) for t in outputs])
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
        The tensors of all encoders in order, those of dictionaries in the order of their names' appearance. They may be written
        into, as those of an encoder.

    Raises:
        ValueError, TypeError: see fastcl.cached_step.
        RuntimeError: from backward, for an encoder that does not repeat itself, or whose parameters were changed in place since.

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
    found: tuple[Tensor, ...] = _Embedded.apply(torch.ones((), requires_grad=True), replay.backward, leaves)
    return found


_Receiver = Callable[[list[Tensor]], None]


class _Embedded(torch.autograd.Function):
    """The embeddings of a first pass, which the caller may write into; their gradients go to a function."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, then: _Receiver, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.then = then
        ctx.mark_non_differentiable(*(t for t in leaves if not t.is_floating_point()))
        return tuple(leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.then(list(gradients))
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
        given = list(chunk) if isinstance(chunk, Sequence) else [chunk] * len(batches)
        if len(given) != len(batches):
            raise ValueError(f"chunk: expected a number, or one for each encoder, {len(batches)}, got {len(given)}")
        sizes = [chunks.sizes(chunks.rows(batch, i), given[i]) for i, batch in enumerate(batches)]
        self.jobs = [job for i, parts in enumerate(sizes) for job in _jobs(i, parts)]
        self.modules = modules_of([*self.encoders, *([ddp] if isinstance(ddp, nn.Module) else ddp)])
        self.waiting = list(dict.fromkeys(part for m in self.modules for part in m.modules() if waits(part)))
        self.last: dict[nn.Module, _Job] = {}  # of each module that waits, the last chunk that calls it
        tensors = [t for batch in batches for t in chunks.tensors(batch)]
        tensors += [p for m in self.modules for p in list(m.parameters())[:1]]
        self.tensors = [t for t in tensors if not t.is_meta]
        self.devices = sorted({t.device.type for t in self.tensors} | {"cpu"})
        self.autocast = [
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _with_autocast(self.devices)
        ]
        self.shapes: list[list[bool]] = []  # of each encoder, which of its outputs are rows
        self.names: list[Any] = []
        self.leaves: list[Tensor] = []
        self.buffers, self.recorded = Buffers(), torch.is_grad_enabled()

    def embed(self) -> list[Tensor]:
        """The first pass: every output of every encoder, of all rows."""
        parts: list[list[list[Tensor]]] = [[] for _ in self.encoders]
        with torch.no_grad(), ExitStack() as stack, bar("embed", len(self.jobs), "chunk", self.progress) as shown:
            for module in self.waiting:
                stack.callback(module.register_forward_pre_hook(self._note_last).remove)
            if self.recorded:
                refuse_hooks(self.modules, len(self.jobs))
                self.handing_out = handing_out(self.waiting)
                stack.enter_context(hand_out(self.handing_out, self._starts, again=False))
                self._note_buffers(stack)
            for job in self.jobs:
                job.random = (torch.get_rng_state(), *get_device_states(*self.tensors))
                with own_parametrizations():
                    names, found = _outputs(self._run(job), job)
                if not parts[job.encoder]:
                    rows = job.stop - job.start
                    self.names.append(names)
                    self.shapes.append([t.dim() > 1 or (t.dim() == 1 and (t.shape[0] > 1 or rows == 1)) for t in found])
                self._check_rows(job, found)
                parts[job.encoder].append(found)
                shown.update(1)
        self.buffers.note_moved()
        self.parameters = versions_of(self.modules)
        self.leaves = [
            stacked(*cut) if are_rows else cut[0].clone()
            for found, kinds in zip(parts, self.shapes, strict=True)
            for cut, are_rows in zip(zip(*found, strict=True), kinds, strict=True)
        ]
        self.largest = [_largest(t) for t in self.leaves]
        self.kept = [t[:KEPT].clone() if t.dim() else t.clone() for found in parts for t in found[0]]
        self.versions = [0 if t.is_inference() else t._version for t in self.leaves]
        return [t.detach() for t in self.leaves]

    def _note_last(self, module: nn.Module, _: Any) -> None:
        if self.recorded and self.last.get(module, self.now) is not self.now:
            refuse_static_graph(module)
        self.last[module] = self.now

    def _note_buffers(self, stack: ExitStack) -> None:
        """As the first pass starts; DistributedDataParallel hands out those of the first rank when it is called."""
        called: set[nn.Module] = set()

        def note(module: nn.Module, _: Any) -> None:
            if module not in called:
                called.add(module)
                self.buffers.note(module)

        for module in self.modules:
            self.buffers.note(module)
        for module in self.waiting:
            if isinstance(module, DistributedDataParallel) and module.will_sync_module_buffers():
                stack.callback(module.module.register_forward_pre_hook(note).remove)

    def backward(self, gradients: list[Tensor]) -> None:
        """The second pass: each chunk's share of the gradients, through its encoder."""
        drift = [t.new_zeros((), dtype=torch.float32) for t in self.leaves]
        written = [not t.is_inference() and t._version != v for t, v in zip(self.leaves, self.versions, strict=True)]
        first = [sum(len(kinds) for kinds in self.shapes[:i]) for i in range(len(self.shapes))]
        begin, last = ({job.encoder: job for job in jobs} for jobs in (reversed(self.jobs), self.jobs))
        with (
            unchanged(self.parameters),
            self.buffers.as_before(),
            hand_out(self.handing_out, self._starts, again=True),
            bar("embed again", len(self.jobs), "chunk", self.progress) as shown,
        ):
            for job in self.jobs:
                with ExitStack() as stack:
                    stack.enter_context(own_parametrizations())  # of the backward too, where checkpoints call modules
                    for module in self.waiting:
                        if self.last.get(module, job) is not job:
                            stack.enter_context(not_waiting(module))
                    with torch.enable_grad(), self._as_before(job):
                        found = _outputs(self._run(job), job)[1]
                    outputs, shares = [], []
                    for k, (t, are_rows) in enumerate(
                        zip(found, self.shapes[job.encoder], strict=True), first[job.encoder]
                    ):
                        rows: Any = slice(job.start, job.stop) if are_rows else ...
                        if not written[k]:
                            drift[k] = torch.maximum(drift[k], _apart(t.detach(), self.leaves[k][rows]))
                        elif begin[job.encoder] is job:
                            drift[k] = _apart((t.detach()[:KEPT] if are_rows else t.detach()), self.kept[k])
                        if t.requires_grad and (are_rows or last[job.encoder] is job):
                            outputs.append(t)
                            shares.append(gradients[k][rows].to(t.dtype))
                    if outputs:
                        with _without_autocast(self.devices):
                            torch.autograd.backward(outputs, shares)
                shown.update(1)
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

    def _starts(self) -> bool:
        """Whether this is the first chunk of a tower."""
        return self.now.start == 0

    def _run(self, job: _Job) -> Any:
        self.now = job
        encoder, batch = self.encoders[job.encoder], chunks.cut(self.batches[job.encoder], job.start, job.stop)
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
        for largest, apart in zip(self.largest, drift, strict=True):
            if float(apart) > DRIFT * float(largest):
                raise RuntimeError(
                    "encoders: expected the same rows in both passes, and they differ by more than rounding; draw random numbers "
                    "from torch's own generators (not from a torch.Generator, Python or NumPy), and keep what forward changes in "
                    "buffers of a module that is an encoder or given by ddp="
                )


def _jobs(encoder: int, sizes: list[int]) -> Iterator[_Job]:
    start = 0
    for size in sizes:
        yield _Job(encoder, start, start + size)
        start += size


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


def _largest(t: Tensor) -> Tensor:
    size = t if t.dtype != torch.bool else t.byte()
    return size.abs().amax() if t.numel() else size.new_zeros(())


def _with_autocast(devices: Sequence[str]) -> list[str]:
    return [device for device in devices if torch.amp.is_autocast_available(device)]


@contextmanager
def _without_autocast(devices: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in _with_autocast(devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


__all__ = ["cached_embeddings", "cached_step"]
