"""What modules keep of all ranks' rows, and drop-ins, under torch.compile over two ranks: no graph break, and equal to without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fastcl import functional, losses
from fastcl.dropin import lightly, open_clip
from fastcl.dropin import pytorch_metric_learning as pml
from fastcl.dropin.sentence_transformers import MultipleNegativesRankingLoss

from .compiled import ROWS, D, here, rows, same, whole


class Queued(losses.MoCoLoss):
    """MoCo with its queue, whose keys learn to be short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        torch.manual_seed(0)
        self.queue = losses.MoCoQueue(D, 11, sharded=self.sharded_queue)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = super().forward(x, y, self.queue.rows)
        self.queue.enqueue(y)
        return (loss if loss.dim() == 0 else (loss * x[:, 0]).sum()) + y.square().mean()


STATES: dict[str, Callable[[], nn.Module]] = {
    "sogclr": lambda: losses.SogCLRLoss(9, group=here()),
    "sogclr without a group": lambda: losses.SogCLRLoss(9),
    "fast_clip": lambda: losses.FastCLIPLoss(9, temperature=nn.Parameter(torch.tensor(0.5)), rho=2.0, group=here("ring", "exact")),
    "minc": lambda: losses.MINCLoss(D, ema=0.7, group=here()),
    "minc without a group": lambda: losses.MINCLoss(D, ema=0.7, gha=True),
    "queue": lambda: Queued(group=here()),
    "queue of rows": lambda: Queued(reduction="none", group=here()),
    "queue in parts": lambda: Queued(sharded_queue=True, group=here("ring")),
}  # fmt: skip


def kept(name: str, backend: str, who: tuple[int, ...], rank: int, world: int) -> float:
    """Modules with what they keep, three steps and an evaluation: value, gradients and state, from the second step on one graph.

    Those of `who` run the graph, which has but for the op's own bits where a part of the formula is in it.
    """
    # Those norm rows in the graph.
    exact = backend == "aot_eager" and "queue" not in name and name != "sogclr without a group"
    plain = STATES[name]()
    ours, counter = copy.deepcopy(plain), CompileCounterWithBackend(backend)
    step = whole(ours, counter) if rank in who else ours
    data = {"index": torch.tensor([7, 2, 0, 5, 2])[: ROWS[rank]] + rank} if hasattr(plain, "log_u") else {}
    for k in range(4):
        x, y = (t.detach() + 0.1 * k for t in rows(rank))
        if name.startswith("minc"):
            data = {"target_u": x, "target_v": y}
        if k == 3:
            plain.eval(), ours.eval()
        leaves = [[x.clone().requires_grad_(), y.clone().requires_grad_(), *m.parameters()] for m in (plain, ours)]
        found = []
        for call, mine in zip((plain, step), leaves, strict=True):
            value = call(*mine[:2], **data)
            gradients = torch.autograd.grad(value, mine, allow_unused=True)
            filled = [torch.zeros_like(t) if g is None else g for t, g in zip(mine, gradients, strict=True)]
            found.append([value.detach(), *filled])
        states = [[*m.buffers(), *m.state_dict().values()] for m in (plain, ours)]
        for a, b in zip(found[0] + states[0], found[1] + states[1], strict=True):
            torch.testing.assert_close(b, a, **({"rtol": 0.0, "atol": 0.0} if exact else {}))
        if k == 1:
            first = counter.frame_count
        assert k != 2 or counter.frame_count == first, (first, counter.frame_count)
    return 0.0


LABELS = torch.tensor([0, 1, 0, 1])
DROPINS: dict[str, Callable[[int], nn.Module]] = {
    "open_clip": partial(open_clip.ClipLoss, world_size=2),
    "open_clip, local": partial(open_clip.ClipLoss, True, True, world_size=2),
    **{f"open_clip, {way}": partial(open_clip.SigLipLoss, world_size=2, dist_impl=way) for way in ("bidir", "reduce", "gather")},
    "lightly": lambda rank: lightly.NTXentLoss(gather_distributed=True),
    "lightly, bank": lambda rank: lightly.NTXentLoss(memory_bank_size=(7, D), gather_distributed=True),
    "lightly, dcl": lambda rank: lightly.DCLLoss(gather_distributed=True),
    "pytorch_metric_learning": lambda rank: pml.DistributedLossWrapper(pml.SupConLoss()),
    "sentence_transformers": lambda rank: MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=True),
}  # fmt: skip


def dropins(name: str, who: tuple[int, ...], rank: int, world: int) -> float:
    """Drop-ins over ranks, with their checks and gathering, twice: as without, up to the rounding of what the graph works out."""
    torch.manual_seed(0)
    plain = DROPINS[name](rank=rank)
    calls = []
    for module in (plain, copy.deepcopy(plain)):
        calls.append(lambda x, y, module=module: module(x, y))
        if name.startswith("open_clip"):
            calls[-1] = lambda x, y, module=module: module(x, y, x.square().mean().exp(), 0.5)
        elif name.startswith("pytorch"):
            calls[-1] = lambda x, y, module=module: module(x * y, LABELS)
        elif name.startswith("sentence"):
            calls[-1] = lambda x, y, module=module: module.compute_loss_from_embeddings([x, y])
    step = whole(calls[1]) if rank in who else calls[1]
    for _ in range(2):
        same(calls[0], rows(rank, n=4, dtype=torch.float64), step, tolerance=1e-13)
    return 0.0


def placed(sizes: tuple[int, int], rank: int, world: int) -> float:
    """Rows that are DTensors, of which the ranks have different numbers: one op for a loss, and for their own values.

    With a rank without rows torch itself fails to compile what is done with such values.
    """
    mesh = init_device_mesh("cpu", (world,))
    shape, own = torch.Size([sum(sizes), D]), slice(0, sizes[rank])
    leaves = [
        DTensor.from_local(t.detach()[own], mesh, [Shard(0)], shape=shape, stride=(D, 1)).requires_grad_()
        for t in rows(rank, n=4)
    ]
    for reduction in ("mean", "none") if all(sizes) else ("mean", "sum"):
        torch._dynamo.reset()
        step = partial(functional.nt_xent, reduction=reduction)
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        found = [(value := call(*leaves).sum(), *torch.autograd.grad(value, leaves)) for call in (step, compiled)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a.full_tensor(), b.full_tensor())
    return 0.0


CHECKS: dict[str, Callable[[int, int], float]] = {
    **{f"state, {name}": partial(kept, name, "aot_eager", (0, 1)) for name in STATES},
    **{
        f"state, {name}, one rank": partial(kept, name, "aot_eager", (0,))
        for name in ("sogclr", "minc", "queue of rows")
    },
    "placed": partial(placed, (3, 2)),
    "placed, a rank without rows": partial(placed, (3, 0)),
    "state, queue of rows, inductor": partial(kept, "queue of rows", "inductor", (0, 1)),
    **{
        f"{name}, ranks {who}": partial(dropins, name, who)
        for name, who in zip(DROPINS, cycle(((0, 1), (1,))), strict=False)
    },
}
