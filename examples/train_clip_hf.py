"""A CLIP model of transformers learns captions of handwritten digits: by its own loss, and by `fastcl.patch("transformers")`.

    python -m examples.train_clip_hf
    python -m examples.train_clip_hf --batch-size 4096 --steps 20

The model is built from a configuration (nothing is downloaded), the training loop is the same for both, and so are the losses: with
the patch, return_loss=True forms no n x n logits. Each way runs in a process of its own, whose peak memory is compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import fastcl

from .images import Images, digits

WAYS = {"own": "the model's own loss", "patched": "fastcl.patch"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a drawing of {}", "the digit {}", "{} by hand", "somebody wrote {}")
WORDS = ["<pad>", "<end>", *NUMBERS, *sorted({w for c in CAPTIONS for w in c.split()} - {"{}"})]
LENGTH = 5


@dataclass(frozen=True)
class Result:
    """One training: the loss of each step, milliseconds a step, megabytes above the start, and how often the caption is right."""

    way: str
    losses: list[float]
    step_ms: float
    peak_mb: float
    accuracy: float


def tokens(captions: list[str]) -> Tensor:
    """(n, LENGTH) int64, each caption with its end."""
    ids = [[WORDS.index(word) for word in caption.split()] + [1] for caption in captions]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in ids])


def batch(images: Images, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """n images with a caption each."""
    at = torch.randint(len(images.train), (n,), generator=generator)
    kind = torch.randint(len(CAPTIONS), (n,), generator=generator)
    texts = [
        CAPTIONS[k].format(NUMBERS[label])
        for k, label in zip(kind.tolist(), images.train_labels[at].tolist(), strict=True)
    ]
    return {"pixel_values": images.train[at].expand(-1, 3, -1, -1), "input_ids": tokens(texts)}


def train(way: str, batch_size: int, steps: int) -> Result:
    """Train one model from the same start on the same batches."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    both = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = both | {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "pad_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=both | {"image_size": 8, "patch_size": 4}, projection_dim=64)
    )
    images, generator = digits(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, before, began = [], _peak_mb(), time.perf_counter()
    with fastcl.patch("transformers") if way == "patched" else nullcontext():
        for _ in tqdm(range(steps), desc=WAYS[way], disable=None):
            loss = model(**batch(images, batch_size, generator), return_loss=True).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    took = 1e3 * (time.perf_counter() - began) / steps
    return Result(way, losses, took, _peak_mb() - before, accuracy(model, images))


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Images) -> float:
    """The share of held-out images whose nearest caption is that of their digit."""
    x = model.eval().get_image_features(images.test.expand(-1, 3, -1, -1)).pooler_output
    y = model.get_text_features(tokens([CAPTIONS[0].format(number) for number in NUMBERS])).pooler_output
    found = (F.normalize(x) @ F.normalize(y).T).argmax(1)
    return float((found == images.test_labels).float().mean())


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def draw(path: Path, results: list[Result], batch_size: int) -> None:
    """Both losses over the steps, the second dashed over the first."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for result, style in zip(results, ("-", "--"), strict=True):
            label = f"{WAYS[result.way]}: {result.step_ms:.0f} ms a step, {result.peak_mb:.0f} MB"
            axes.plot(range(1, len(result.losses) + 1), result.losses, style, label=label)
        axes.set(xlabel="step", ylabel="loss", title=f"CLIPModel from a configuration, {batch_size} pairs a step, CPU")
        axes.legend()
        figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Train both ways, say what came of it, write a picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out"))
    given = parser.parse_args(arguments)
    results = []
    for way in WAYS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            results.append(process.submit(train, way, given.batch_size, given.steps).result())
    print(f"{'':22}  {'ms a step':>9}  {'peak MB':>7}  {'last loss':>9}  {'caption right':>13}")
    for r in results:
        print(f"{WAYS[r.way]:22}  {r.step_ms:9.0f}  {r.peak_mb:7.0f}  {r.losses[-1]:9.4f}  {100 * r.accuracy:12.1f}%")
    apart = max(abs(a - b) / abs(a) for a, b in zip(*(r.losses for r in results), strict=True))
    print(f"The losses differ by {apart:.1e} of their size at most.")
    given.out.mkdir(parents=True, exist_ok=True)
    draw(given.out / "train_clip_hf.png", results, given.batch_size)
    (given.out / "train_clip_hf.json").write_text(json.dumps([asdict(r) for r in results], indent=1))


if __name__ == "__main__":
    main()
