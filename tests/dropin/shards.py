"""One of several gloo processes: drop-ins and originals on the same shards. Run by test_across_processes.py.

    python -m tests.dropin.shards RANK WORLD MEETING_FILE RESULT_FILE LIBRARY...

The result is {case: (ours, theirs)}, each the value and the gradients of this process.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from fastcl.dropin import lightly, open_clip, pytorch_metric_learning, sentence_transformers

from . import originals
from .compare import evaluate, rows, two_views, unit
from .test_sentence_transformers_guided import tokenizer

N, D = 5, 6


class Case(NamedTuple):
    """A name, the drop-in, the original, and the leaves of this process."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[[], Callable[..., Tensor]]
    leaves: list[Tensor]


def _views(rank: int) -> list[Tensor]:
    return two_views(N, D, seed=rank)


def open_clip_cases(rank: int, world: int) -> Iterator[Case]:
    """Every combination of the flags that matter across processes."""
    x, y = (unit(v) for v in _views(rank))
    numbers = [torch.tensor(12.0).double(), torch.tensor(-3.0).double()]
    here: dict[str, Any] = {"rank": rank, "world_size": world}
    for local in (False, True):
        for gradient in (False, True):
            flags = here | {"local_loss": local, "gather_with_grad": gradient}
            yield Case(
                f"ClipLoss local_loss={local} gather_with_grad={gradient}",
                open_clip.ClipLoss(**flags),
                lambda flags=flags: originals.open_clip().ClipLoss(**flags),
                [x, y, numbers[0]],
            )
            yield Case(
                f"ClipLoss, more texts, local_loss={local} gather_with_grad={gradient}",
                open_clip.ClipLoss(**flags),
                lambda flags=flags: partial(_more_texts, **flags),
                [x, torch.cat([y, unit(rows(3, D, seed=rank + 50))]), numbers[0]],
            )
    for route in (None, "bidir", "shift", "reduce", "gather"):
        flags = here | {"dist_impl": route}
        yield Case(
            f"SigLipLoss dist_impl={route}",
            open_clip.SigLipLoss(**flags),
            lambda flags=flags: originals.open_clip().SigLipLoss(**flags),
            [x, y, *numbers],
        )


def _more_texts(
    x: Tensor, y: Tensor, scale: Tensor, *, local_loss: bool, gather_with_grad: bool, rank: int, world_size: int
) -> Tensor:
    """The original's gathering and its two cross entropies, each of the rows that have a label."""
    how = (local_loss, gather_with_grad, rank, world_size)
    everyone, texts = originals.open_clip().gather_features(x, y, *how)
    shards = texts.chunk(world_size)
    texts = torch.cat([*(shard[:N] for shard in shards), *(shard[N:] for shard in shards)])
    labels = torch.arange(N * world_size)
    if not local_loss:
        z = scale * everyone @ texts.T
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.T[: len(labels)], labels)) / 2
    own = labels[rank * N : (rank + 1) * N]
    return (F.cross_entropy(scale * x @ texts.T, own) + F.cross_entropy(scale * y[:N] @ everyone.T, own)) / 2


def lightly_cases(rank: int, world: int) -> Iterator[Case]:
    """Gathered or not; with a bank, two batches, so that what others put into it shows."""
    for gather in (False, True):
        for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
            yield Case(
                f"{name} gather_distributed={gather}",
                getattr(lightly, name)(0.3, gather_distributed=gather),
                lambda name=name, gather=gather: getattr(originals.lightly(), name)(0.3, gather_distributed=gather),
                _views(rank),
            )

        def twice(loss: Any) -> Callable[..., Tensor]:
            loss = loss.double()
            loss.memory_bank.bank.copy_(unit(rows(12, D, seed=77)))

            def call(u: Tensor, v: Tensor) -> Tensor:
                loss(u, v)
                return loss(u, v)

            return call

        bank = (0.3, (12, D), gather)
        yield Case(
            f"NTXentLoss with a bank, gather_distributed={gather}",
            twice(lightly.NTXentLoss(*bank)),
            lambda bank=bank, twice=twice: twice(originals.lightly().NTXentLoss(*bank)),
            _views(rank),
        )


def pytorch_metric_learning_cases(rank: int, world: int) -> Iterator[Case]:
    """The wrapper, efficient or not, with and without references."""
    labels, references = (torch.arange(N) + rank) % 3, (torch.arange(N) + 2 * rank) % 4

    def bind(wrapper: Any, arguments: tuple[Any, ...]) -> Callable[..., Tensor]:
        return lambda x, *y: wrapper(x, labels, None, *y, *arguments)

    yield from pairs_by_index_cases(rank, world)
    for name, efficient in (
        ("MultiSimilarityLoss", False),
        ("MultiSimilarityLoss", True),
        ("NCALoss", False),
        ("NPairsLoss", False),
    ):
        yield Case(
            f"{name} efficient={efficient}",
            bind(
                pytorch_metric_learning.DistributedLossWrapper(getattr(pytorch_metric_learning, name)(), efficient), ()
            ),
            lambda name=name, efficient=efficient: bind(
                _wrapper()(getattr(originals.pytorch_metric_learning().losses, name)(), efficient), ()
            ),
            _views(rank)[:1],
        )
    for name in ("NTXentLoss", "SupConLoss"):
        for efficient, kind, arguments in (
            (False, "none", ()),
            (True, "none", ()),
            (False, "their own", (references,)),
            (False, "the same", (labels,)),
        ):
            loss = getattr(pytorch_metric_learning, name)(temperature=0.3)
            yield Case(
                f"{name} efficient={efficient} ref_labels={kind}",
                bind(pytorch_metric_learning.DistributedLossWrapper(loss, efficient), arguments),
                lambda name=name, efficient=efficient, arguments=arguments: bind(
                    _wrapper()(_loss(name), efficient), arguments
                ),
                _views(rank)[: 1 + len(arguments)],
            )


def pairs_by_index_cases(rank: int, world: int) -> Iterator[Case]:
    """Indices within the rows of all processes, own first; and a memory of them, over two batches."""
    labels, own = (torch.arange(N) + rank) % 3, torch.arange(N)
    indices = (own, (own + 3) % (N * world), own, (own + 1) % (N * world))

    def twice(wrapper: Any) -> Callable[..., Tensor]:
        def call(x: Tensor) -> Tensor:
            wrapper(x.flip(0), labels)
            return wrapper(x, labels)

        return call

    def memory(loss: Any) -> Any:
        return originals.pytorch_metric_learning().losses.CrossBatchMemory(loss, D, memory_size=3 * N).double()

    for name in ("NTXentLoss", "SupConLoss"):
        loss = getattr(pytorch_metric_learning, name)(temperature=0.3)
        for efficient in (False, True):
            yield Case(
                f"{name} efficient={efficient} indices_tuple",
                partial(
                    pytorch_metric_learning.DistributedLossWrapper(loss, efficient),
                    labels=labels,
                    indices_tuple=indices,
                ),
                lambda name=name, efficient=efficient: partial(
                    _wrapper()(_loss(name), efficient), labels=labels, indices_tuple=indices
                ),
                _views(rank)[:1],
            )
        yield Case(
            f"{name} in CrossBatchMemory",
            twice(pytorch_metric_learning.DistributedLossWrapper(memory(loss))),
            lambda name=name: twice(_wrapper()(memory(_loss(name)))),
            _views(rank)[:1],
        )


def _loss(name: str) -> Any:
    return getattr(originals.pytorch_metric_learning().losses, name)(temperature=0.3)


def _wrapper() -> Any:
    return originals.pytorch_metric_learning().utils.distributed.DistributedLossWrapper


def sentence_transformers_cases(rank: int, world: int) -> Iterator[Case]:
    """All directions, both partitions, all kinds of hardness."""
    columns = [*_views(rank), rows(N, D, seed=rank + 500)]
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    for arguments in (
        {},
        {"directions": every},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 4.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 4.0, "directions": every},
        {"hardness_mode": "all_negatives", "hardness_strength": 4.0},
    ):
        more: dict[str, Any] = arguments | {"gather_across_devices": True}
        mine = sentence_transformers.MultipleNegativesRankingLoss(nn.Identity(), **more)
        yield Case(
            f"MultipleNegativesRankingLoss {arguments}",
            lambda *t, loss=mine: loss.compute_loss_from_embeddings(list(t), None),
            lambda more=more: _ranking(more),
            columns,
        )

    guides = [*_views(rank + 50), rows(N, D, seed=rank + 550)]
    for name, arguments in product(
        ("GISTEmbedLoss", "CachedGISTEmbedLoss"),
        ({}, {"margin": -0.3, "contrast_positives": False, "temperature": 0.3}),
    ):
        more = arguments | {"gather_across_devices": True}
        mine = _guided(getattr(sentence_transformers, name), more)
        yield Case(
            f"{name} {arguments}",
            lambda *t, loss=mine: loss.compute_loss_from_embeddings(list(t), guides),
            lambda more=more: _by_guide(more, guides),
            columns,
        )


def _guided(cls: Any, arguments: dict[str, Any]) -> Any:
    """The class around models that are never asked: of these it looks at the tokenizer alone."""
    model = nn.Sequential(nn.Identity())
    model.tokenizer, model.max_seq_length = tokenizer(["word"]), 8
    return cls(model, model, **arguments)


def _by_guide(arguments: dict[str, Any], guides: list[Tensor]) -> Callable[..., Tensor]:
    """The original on columns that are embedded, by the model and by the guide."""
    losses = originals.sentence_transformers().sentence_transformer.losses
    cached = _guided(losses.CachedGISTEmbedLoss, arguments | {"mini_batch_size": 2})

    def call(*t: Tensor) -> Tensor:
        value: Tensor = cached.calculate_loss([[column] for column in t], [[guide] for guide in guides])
        return value

    return call


def _ranking(arguments: dict[str, Any]) -> Callable[..., Tensor]:
    losses = originals.sentence_transformers().sentence_transformer.losses
    loss = losses.MultipleNegativesRankingLoss(nn.Identity(), **arguments)
    return lambda *t: loss.compute_loss_from_embeddings(list(t), None)


LIBRARIES: dict[str, Callable[[int, int], Iterator[Case]]] = {
    "open_clip": open_clip_cases,
    "lightly": lightly_cases,
    "pytorch_metric_learning": pytorch_metric_learning_cases,
    "sentence_transformers": sentence_transformers_cases,
}


def main(rank: int, world: int, meeting: str, result: str, *libraries: str) -> None:
    """Every case, ours and theirs; what was found goes to a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for library in libraries:
        for case in LIBRARIES[library](rank, world):
            ours = evaluate(case.ours, case.leaves)
            with warnings.catch_warnings():  # of the originals: deprecated collectives, copied tensors
                warnings.simplefilter("ignore")
                theirs = evaluate(case.theirs(), case.leaves)
            found[f"{library}: {case.name}"] = ours, theirs
    torch.save(found, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
