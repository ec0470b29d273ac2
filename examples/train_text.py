"""Words find their definitions: two towers trained by the CLIP loss, at several batch sizes for the same time each.

    python -m examples.train_text
    torchrun --nproc-per-node 2 -m examples.train_text --batch-sizes 1024 16384

Every text is a bag of hashed n-grams of characters (EmbeddingBag, then a linear map). With several processes the rows of a batch
are spread over them, DistributedDataParallel averages gradients, and the loss is that of the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fastcl import Ranks, functional, losses

from .texts import Bags, Pairs, bags, load

BATCH_SIZES = (256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Result:
    """One training: recalls in [0, 1] of the right definition among the first k of all held-out ones."""

    batch_size: int
    steps: int
    seconds: float
    loss: float
    loss_share: float  # of the time of a step, forward and backward
    recall_1: float
    recall_10: float


class Tower(nn.Module):
    """A text as the mean of its n-grams' vectors, through a linear map."""

    def __init__(self, buckets: int, d: int) -> None:
        super().__init__()
        self.grams = nn.EmbeddingBag(buckets, d, mode="mean")
        self.map = nn.Linear(d, d)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        rows: Tensor = self.map(self.grams(ids, offsets))
        return rows


class Towers(nn.Module):
    """Words and definitions, each with a tower of its own."""

    def __init__(self, buckets: int, d: int) -> None:
        super().__init__()
        self.words, self.glosses = Tower(buckets, d), Tower(buckets, d)
        self.logit_scale = losses.LogitScale(1 / 0.07, 100.0)

    def forward(self, words: tuple[Tensor, Tensor], glosses: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.words(*words), self.glosses(*glosses), self.logit_scale()


class Stopwatch:
    """The time between marks of the loss: the end of the towers' forward, and the gradients' return to them."""

    def __init__(self) -> None:
        self.total = self.since = 0.0

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self, *_: Any) -> None:
        self.total += time.perf_counter() - self.since


def train(
    pairs: tuple[Bags, Bags], batch_size: int, seconds: float, args: argparse.Namespace
) -> tuple[Towers, dict[str, float]]:
    """Train for so many seconds; the towers and how it went."""
    torch.manual_seed(args.seed)
    rank, world = _rank(), _world()
    towers = Towers(args.buckets, args.dim)
    model = DistributedDataParallel(towers) if world > 1 else towers
    optimizer = torch.optim.Adam(towers.parameters(), lr=args.learning_rate)
    group = dist.group.WORLD if world > 1 else None
    shuffler = torch.Generator().manual_seed(args.seed)  # the same batches on every rank
    watch, loss, steps, order = Stopwatch(), torch.zeros(()), 0, torch.empty(0, dtype=torch.int64)
    begin = time.perf_counter()
    bar = tqdm(
        total=seconds,
        desc=f"batch {batch_size}",
        unit="s",
        bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}",
        disable=rank > 0,
    )
    while _again(time.perf_counter() - begin < seconds):
        if order.numel() < batch_size:
            order = torch.randperm(len(pairs[0]), generator=shuffler)
        rows, order = order[:batch_size], order[batch_size:]
        mine = rows.tensor_split(world)[rank]
        optimizer.zero_grad()
        x, y, scale = model(*(side.take(mine) for side in pairs))
        x.register_hook(watch.stop)  # its gradient is the last thing that the loss computes
        watch.start()
        loss = functional.clip(x, y, logit_scale=scale, group=Ranks(group, strategy=args.strategy))
        loss.backward()
        optimizer.step()
        steps += 1
        bar.n = min(seconds, time.perf_counter() - begin)
        bar.set_postfix(steps=steps, loss=f"{loss.item():.3f}")
    bar.close()
    took = time.perf_counter() - begin
    return towers, {"steps": steps, "seconds": took, "loss": loss.item(), "loss_share": watch.total / took}


@torch.no_grad()
def recalls(towers: Towers, test: tuple[Bags, Bags], at: tuple[int, ...] = (1, 10)) -> list[float]:
    """How often the right definition is among the first k, of all held-out ones; a tie counts against it."""
    everything = torch.arange(len(test[0]))
    x, y = (
        nn.functional.normalize(t(*side.take(everything)))
        for t, side in zip((towers.words, towers.glosses), test, strict=True)
    )
    better = torch.cat(
        [
            (a @ y.T >= (a * b).sum(1, keepdim=True)).sum(1) - 1
            for a, b in zip(x.split(1024), y.split(1024), strict=True)
        ]
    )
    return [float((better < k).float().mean()) for k in at]


def plot(results: list[Result], title: str, path: Path) -> None:
    """Recall and the loss's share against the batch size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = [r.batch_size for r in results]
    left.plot(sizes, [r.recall_1 for r in results], "o-", label="recall@1")
    left.plot(sizes, [r.recall_10 for r in results], "s-", label="recall@10")
    left.set(xscale="log", xlabel="batch size", ylabel="recall on held-out pairs", title=title)
    left.legend()
    right.plot(sizes, [100 * r.loss_share for r in results], "o-")
    right.set(
        xscale="log", xlabel="batch size", ylabel="% of the time", ylim=(0, 100), title="the loss, forward and backward"
    )
    for axis in (left, right):
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Train at every batch size, print the table, write the plot; the results."""
    args = _parser().parse_args(arguments)
    if "RANK" in os.environ and not dist.is_initialized():  # under torchrun
        dist.init_process_group("gloo")
    pairs: Pairs = load(args.wordnet)
    held_out = min(args.held_out, len(pairs) // 4)
    train_pairs, test_pairs = pairs.split(held_out, args.seed)
    first = _rank() == 0
    if first:
        print(pairs.note or f"WordNet: {len(train_pairs):,} pairs to train on, {held_out:,} held out")
    train_bags, test_bags = (
        (bags(p.words, args.buckets), bags(p.glosses, args.buckets)) for p in (train_pairs, test_pairs)
    )
    results = []
    for size in sorted({min(size, len(train_pairs)) for size in args.batch_sizes}):
        towers, went = train(train_bags, size, args.seconds, args)
        recall = recalls(towers, test_bags)
        results.append(Result(size, int(went["steps"]), went["seconds"], went["loss"], went["loss_share"], *recall))
        if first:
            r = results[-1]
            print(
                f"batch {size:6d}  {r.steps:6d} steps in {r.seconds:.0f} s  loss {r.loss:.3f} ({r.loss_share:.0%} of the time)"
                f"  recall@1 {r.recall_1:.3f}  recall@10 {r.recall_10:.3f}"
            )
    if first:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train_text.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
        plot(
            results,
            f"{held_out:,} definitions, {args.seconds:.0f} s each, {_world()} process(es)",
            folder / "train_text.png",
        )
        print(f"wrote {folder / 'train_text.png'} and {folder / 'train_text.json'}")
    return results


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _again(mine: bool) -> bool:
    """Rank 0's word, so that all ranks make as many steps."""
    if _world() == 1:
        return mine
    word = torch.tensor([int(mine)])
    dist.broadcast(word, 0)
    return bool(word.item())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--wordnet", help="folder with WordNet's data.noun and the like")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES), help="of the whole batch, over all processes"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of training at each batch size")
    parser.add_argument("--held-out", type=int, default=5000, help="pairs, at most a quarter of all")
    parser.add_argument("--dim", type=int, default=128, help="width of an embedding")
    parser.add_argument("--buckets", type=int, default=2**15, help="for hashed n-grams")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of Adam, at every batch size")
    parser.add_argument("--strategy", default="auto", choices=["auto", "gather", "ring"], help="see fastcl.distributed")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and batches")
    parser.add_argument("--out", default="out", help="folder for the plot and the numbers")
    return parser


if __name__ == "__main__":
    try:
        main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
