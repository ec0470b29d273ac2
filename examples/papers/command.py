"""The command line of the papers' experiments: cells times seeds, in processes of one thread each."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..images import load
from ..train_images import machine, positive, positive_number
from . import cells, results
from .cells import Cell, Paper, Record

Task = tuple[str, Cell, int, str]


def arguments(names: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.papers{names}",
        description="The papers' experiments: docs/papers.md reads the results.",
    )
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("out/papers"),
        help="folder of records, tables and figures (default: %(default)s)",
    )
    add("--resume", action="store_true", help="keep the records that are there, and do what is missing")
    add("--seeds", type=positive, default=3, help="trainings of each cell (default: %(default)s)")
    add("--jobs", type=positive, default=2, help="processes of one thread each (default: %(default)s)")
    add("--epochs", type=positive_number, help="passes over the images, in place of each cell's own: for a trial")
    add("--part", help="only the experiments whose name begins so")
    add(
        "--fashion", default="fashion-mnist", help="where Fashion-MNIST is: as --data of examples.train_images takes it"
    )
    add("--draw", action="store_true", help="train nothing: the table and the figure of the records that are there")
    return parser.parse_args(argv)


def main(papers: Sequence[Paper], argv: Sequence[str] | None = None) -> int:
    """Run, write and print the papers' experiments one after the other."""
    chosen = arguments(f".{papers[0].name}" if len(papers) == 1 else "", argv)
    chosen.output.mkdir(parents=True, exist_ok=True)
    sources = {"digits": "digits", "fashion-mnist": chosen.fashion}
    try:
        load(chosen.fashion)
    except (FileNotFoundError, ValueError) as error:
        print(f"Without the cells on Fashion-MNIST: {error}", file=sys.stderr)
        del sources["fashion-mnist"]
    for paper in papers:
        wanted = [_shortened(cell, chosen.epochs) for cell in paper.cells if cell.part.startswith(chosen.part or "")]
        wanted = [cell for cell in wanted if cell.data in sources]
        path = chosen.output / f"{paper.name}.jsonl"
        if not (chosen.resume or chosen.draw):
            path.unlink(missing_ok=True)
        done = {results.key(record["cell"], record["seed"]) for record in results.read(path)}
        todo: list[Task] = [
            (paper.name, cell, seed, sources[cell.data])
            for seed in range(chosen.seeds)
            for cell in wanted
            if results.key(cell, seed) not in done
        ]
        if not chosen.draw:
            _train(paper, todo, chosen.jobs, path)
        _write(paper, results.summaries(wanted, results.read(path)), chosen.output)
    return 0


def _shortened(cell: Cell, epochs: float | None) -> Cell:
    return cell if epochs is None else replace(cell, schedule=replace(cell.schedule, epochs=epochs))


def _train(paper: Paper, todo: list[Task], jobs: int, path: Path) -> None:
    with tqdm(total=len(todo), unit="training", desc=paper.title, dynamic_ncols=True) as bar:
        for record in _records(todo, jobs):
            results.append(path, record)
            knn = "diverged" if record["quality"] is None else f"{100 * record['quality']['knn']:.1f}%"
            bar.set_postfix_str(f"{record['cell']['title']}: {knn}", refresh=False)
            bar.update()


def _records(todo: list[Task], jobs: int) -> Iterator[Record]:
    """As they come; here for one job, otherwise from fresh processes, since a forked one may inherit locks of torch's threads."""
    if jobs == 1:
        yield from (cells.run(*task) for task in todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        waiting = [pool.submit(cells.run, *task) for task in todo]
        try:
            yield from (one.result() for one in as_completed(waiting))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write(paper: Paper, found: list[results.Summary], output: Path) -> None:
    if not found:
        print(f"{paper.title}: no records in {output}", file=sys.stderr)
        return
    spent = sum(record["seconds"] for one in found for record in one.records)
    trainings = sum(len(one.records) for one in found)
    about = f"{trainings} trainings, {spent / 60:.0f} minutes of process time. {machine()}."
    text = f"{results.table(found)}\n\nMeans and standard deviations over seeds. {about}\n"
    if more := paper.remarks(found):
        text += f"\n{more}\n"
    (output / f"{paper.name}.txt").write_text(text)
    print(f"\n{paper.title}\n\n{text}")
    paper.draw(found, output / f"{paper.name}.png")
