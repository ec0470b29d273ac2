"""The main job: learn to see without labels, by every objective of fastcl in turn, and what each is worth and costs.

    make demo      or      python -m examples.train_images --help

One small encoder (three convolutions and a linear map to --dim unit rows) is trained by each objective from the same weights on
the same views: each image turned, resized, moved, its contrast changed, a square of it erased, noise added. Then it is frozen.

How the embeddings are judged. On undistorted digits raw pixels already give 89% (neighbours) and 90% (linear) from 10 labels per
class, and an untrained encoder 73% and 80%, which leaves little to see. What the training claims to give is invariance: so
the classifiers (5 nearest neighbours, and logistic regression) get 10 labelled images of each class, as they are, and are
asked about held-out images which were turned, resized, moved and noised at random; the mean of 5 draws of the labelled ones.
The distortions are of the kind that the training saw, on images that it did not see.
The settings of objectives.py were chosen by results on the digits' own held-out images, so digits flatter them all a little:
read the margins over the untrained encoder there, not the ranking. Fashion-MNIST took no part in that choice.
The classifiers work on the very rows that the loss works on, since the degeneration that the f-MICL paper predicts for RKL and
Neyman is one of these rows. Beside them stand the untrained encoder (mean of 5 seeds, with batch statistics of these images) and
raw pixels.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fastcl
from fastcl.backends import choice

from . import figure, loss_cost
from .images import HOW_TO_GET_IT, Images, load
from .objectives import OBJECTIVES
from .training import Quality, Schedule, Trained, assess, assess_pixels, train, untrained

UNTRAINED_SEEDS = 5
EPOCHS = {"digits": 40.0}  # 40 steps
# Of 60000 images: 18 steps, so that all objectives together take under four minutes on two cores.
EPOCHS_ELSEWHERE = 0.31
ROWS, WIDTH, ROUNDS = 8192, 128, 3


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_images",
        description="Contrastive training on real images by every objective of fastcl: what each is worth and what it costs.",
        epilog=f"Fashion-MNIST: {HOW_TO_GET_IT}",
    )
    add = parser.add_argument
    add("--data", default="auto", help="digits, fashion-mnist, a folder with the idx files of MNIST, or auto (default): "
        "Fashion-MNIST where it is found, otherwise digits")  # fmt: skip
    add("--objectives", default="all", help=f"all (default), or some of these, with commas: {', '.join(OBJECTIVES)}")
    add("--epochs", type=positive_number, help="passes over the images (default: 40 for digits, otherwise 0.31)")
    add(
        "--batch-size",
        type=positive,
        default=1024,
        help="images of a step, of which two views each are taken (default: 1024)",
    )
    add("--dim", type=positive, default=64, help="width of an embedding (default: 64)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of weights, views and draws (default: 0); the same seed on as many threads gives the same accuracies",
    )
    add("--backend", choices=choice.NAMES, help="of fastcl (default: the best for this machine)")
    add(
        "--output",
        type=Path,
        default=Path("out/train_images"),
        help="folder of the picture and the numbers (default: %(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help="a trial in seconds: digits, 4 epochs, small batches, the cost of one loss at n = 1024, without torch.compile",
    )
    chosen = parser.parse_args(argv)
    names = list(OBJECTIVES) if chosen.objectives == "all" else [name.strip() for name in chosen.objectives.split(",")]
    unknown = [name for name in names if name not in OBJECTIVES]
    if unknown:
        parser.error(f"--objectives: expected some of {', '.join(OBJECTIVES)}; got {', '.join(map(repr, unknown))}")
    chosen.objectives = names
    if chosen.quick and chosen.data == "auto":
        chosen.data = "digits"
    return chosen


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {value}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {value}")
    return value


def train_all(
    images: Images, names: list[str], schedule: Schedule, backend: str | None
) -> tuple[Quality, list[Trained]]:
    """The untrained encoder's quality, and each objective's training, with one progress bar for all."""
    drawn = [
        assess(untrained(images, schedule.dim, schedule.seed + k), images, schedule.seed)
        for k in range(UNTRAINED_SEEDS)
    ]
    before = Quality(*np.mean([list(asdict(quality).values()) for quality in drawn], axis=0).tolist())
    trained = []
    steps, quiet = schedule.steps(images), 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=steps * len(names), unit="step", mininterval=quiet, dynamic_ncols=True) as bar:

        def report(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        for name in names:
            bar.set_description(OBJECTIVES[name].title, refresh=False)
            model, losses, seconds = train(images, OBJECTIVES[name], schedule, backend, report)
            trained.append(Trained(OBJECTIVES[name].title, assess(model, images, schedule.seed), losses, seconds))
    return before, trained


def quality_table(pixels: tuple[float, float], before: Quality, trained: list[Trained]) -> str:
    """Accuracies, gains and spread, one line for each objective."""
    lines = [
        f"{'':17}  {'kNN':>5}  {'linear':>6}  {'gain kNN':>8}  {'linear':>6}  {'alignment':>9}  {'uniformity':>10}  "
        f"{'top direction':>13}  {'loss, first and last':>21}  {'seconds':>7}",
        f"{'raw pixels':17}  {100 * pixels[0]:4.1f}%  {100 * pixels[1]:5.1f}%",
        _quality_line("untrained", before),
    ]
    for one in trained:
        gains = f"{100 * (one.quality.knn - before.knn):+8.1f}  {100 * (one.quality.linear - before.linear):+6.1f}"
        course = f"{one.losses[0]:10.3f} {one.losses[-1]:10.3f}  {one.seconds:7.1f}"
        lines.append(f"{_quality_line(one.title, one.quality, gains)}  {course}")
    return "\n".join(lines)


def _quality_line(title: str, q: Quality, gains: str = 16 * " ") -> str:
    return (
        f"{title:17}  {100 * q.knn:4.1f}%  {100 * q.linear:5.1f}%  {gains}  {q.alignment:9.2f}  {q.uniformity:10.2f}  "
        f"{100 * q.top_direction:12.0f}%"
    )


def degeneration(trained: list[Trained]) -> str:
    """What the paper predicts for RKL and Neyman, beside what was seen."""
    chosen = {one.title: one.quality for one in trained}
    failing = {title: chosen[title] for title in _degenerate() if title in chosen}
    sound = {title: q for title, q in chosen.items() if title.startswith("f-MICL") and title not in failing}
    if not failing or not sound:
        return ""
    low, high = (100 * pick(q.top_direction for q in sound.values()) for pick in (min, max))
    widest = max(q.uniformity for q in sound.values())
    paragraphs = [
        "The paper predicts that RKL and Neyman fail, since their negatives are not strictly convex in the squared distance. "
        "RKL's is linear: any arrangement with mean zero is as good as another. Neyman's is concave: it wants two opposite "
        f"points. For the other divergences the best direction holds {low:.0f} to {high:.0f}% of the energy, and uniformity is at "
        f"most {widest:.2f}."
    ]
    for title, q in failing.items():
        seen = 100 * q.top_direction > 1.25 * high or q.uniformity > 0.75 * widest
        paragraphs.append(
            f"{title}: {100 * q.top_direction:.0f}% and {q.uniformity:.2f}. "
            + (
                "It degenerates, as predicted."
                if seen
                else "No collapse: nothing spreads its rows, but nothing pulls those of different images together either, so "
                "that in a training as short as this they keep the spread that the encoder started with."
            )
        )
    return "\n".join(textwrap.fill(paragraph, 118, subsequent_indent="  ") for paragraph in paragraphs)


def _degenerate() -> list[str]:
    return [entry.title for entry in OBJECTIVES.values() if entry.degenerate]


def cost_table(costs: list[loss_cost.Cost]) -> str:
    """Time and memory of each loss in each way, and how many times those of fastcl."""
    lines = [f"{'':10}  {'':14}  {'time':>10}  {'':>6}  {'peak memory':>11}"]
    ours = {c.loss: c for c in costs if c.way == "fastcl"}
    for c in costs:
        own = ours[c.loss]
        if c.seconds is None or c.peak is None:
            lines.append(f"{c.loss:10}  {_way(c.way):14}  could not be measured: {c.why}")
            continue
        times = f"{c.seconds / own.seconds:5.1f}x" if own.seconds else ""
        memory = f"{c.peak / own.peak:5.1f}x" if own.peak else ""
        lines.append(
            f"{c.loss:10}  {_way(c.way):14}  {1e3 * c.seconds:7.0f} ms  {times:>6}  {c.peak / 2**20:7.0f} MiB  {memory:>6}"
        )
    return "\n".join(lines)


def _way(way: str) -> str:
    return {"fastcl": "fastcl", "eager": "eager PyTorch", "compile": "torch.compile"}[way]


def machine() -> str:
    versions = f"fastcl {fastcl.__version__}, torch {torch.__version__}"
    return f"{versions}, {platform.machine()} CPU, {_threads()}, float32"


def _threads() -> str:
    n = torch.get_num_threads()
    return f"{n} thread{'s' if n > 1 else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    chosen, start = arguments(argv), time.perf_counter()
    try:
        images, source = load(chosen.data)
    except (FileNotFoundError, ValueError) as error:
        print(f"train_images: {error}", file=sys.stderr)
        return 2
    n = images.train.shape[0]
    epochs = chosen.epochs or (4 if chosen.quick else EPOCHS.get(images.name, EPOCHS_ELSEWHERE))
    schedule = Schedule(epochs, min(256 if chosen.quick else chosen.batch_size, n), chosen.dim, seed=chosen.seed)
    about = (
        f"{images.name}: {n} images of {images.side} x {images.side} pixels, {images.test.shape[0]} held out; "
        f"{schedule.steps(images)} steps of {schedule.batch_size} images, embeddings of {schedule.dim}"
    )
    print(f"Images: {source}\n{about}\n{machine()}\n", flush=True)
    before, trained = train_all(images, chosen.objectives, schedule, chosen.backend)
    pixels = assess_pixels(images, chosen.seed)
    print(f"\nFrom 10 labels per class, on distorted held-out images\n{quality_table(pixels, before, trained)}\n")
    print(degeneration(trained), flush=True)

    rows = ROWS
    names: tuple[str, ...] = tuple(loss_cost.MEASURED)
    ways: tuple[str, ...] = loss_cost.WAYS
    if chosen.quick:
        rows, names, ways = 1024, ("f_micl",), ("fastcl", "eager")
    on_what = f"n = {rows}, d = {WIDTH}, float32, CPU, {_threads()}"
    print(f"\nThe loss alone, forward and backward: {on_what} (medians of {ROUNDS}, taken in turn)")
    with tqdm(total=len(names) * (len(ways) + 1), unit="measurement", leave=False, dynamic_ncols=True) as bar:

        def report(what: str) -> None:
            bar.set_description(what)
            bar.update()

        costs = loss_cost.measure(names, ways, rows, WIDTH, chosen.backend, ROUNDS, report)
    print(cost_table(costs))

    chosen.output.mkdir(parents=True, exist_ok=True)
    picture, numbers = chosen.output / "train_images.png", chosen.output / "train_images.json"
    figure.draw(picture, about, before, trained, set(_degenerate()), costs, on_what)
    results = {
        "about": about,
        "machine": machine(),
        "seed": chosen.seed,
        "raw_pixels": pixels,
        "untrained": asdict(before),
    }
    results |= {"trained": [asdict(one) for one in trained], "costs": [asdict(cost) for cost in costs]}
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{picture} and {numbers} written; {time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
