"""Metrics along a training run: computed every few steps, kept in a CSV file, in TensorBoard, or in both."""

from __future__ import annotations

import csv
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..equation.arguments import integer, kind_of
from .dimensions import effective_rank
from .spread import alignment, uniformity

Metric: TypeAlias = Callable[[Tensor, Tensor | None], float]


# By def, so that a Recorder in a module goes to other processes with it.
def _alignment(x: Tensor, y: Tensor | None) -> float:
    return float("nan") if y is None else alignment(x, y)


def _uniformity(x: Tensor, y: Tensor | None) -> float:
    return uniformity(x)


def _effective_rank(x: Tensor, y: Tensor | None) -> float:
    return effective_rank(x)


METRICS: dict[str, Metric] = {"alignment": _alignment, "uniformity": _uniformity, "effective_rank": _effective_rank}


class Recorder:
    """Records alignment, uniformity and effective rank of embeddings while they are learned.

    It is called with every step's rows, and computes on those of step 0, every, 2 every and so on. In a LightningModule's
    `training_step` call it with `self.global_step`; Hugging Face's Trainer takes `trainer_callback`.

    Args:
        every: steps from one record to the next, >= 1.
        csv: the file to append to; a header is written to a new one. None for no file.
        tensorboard: the folder of the events, or a SummaryWriter that is there. None for neither.
        metrics: name -> function of x and y (None where none was given) that returns a number; None for the three.

    Raises:
        ValueError: for a number below 1, or a CSV file of other columns.
        TypeError: for metrics that are no functions by their names, or no place to record in; in a call, for a step that is no
            integer, or a metric that returns no number.
        ImportError: for a folder of TensorBoard's events where tensorboard is not installed.

    Examples:
        >>> recorder = fastcl.metrics.Recorder(every=100)
        >>> for step in range(200):
        ...     x = torch.eye(4)
        ...     if (found := recorder(step, x, x)) is not None:
        ...         print(step, {name: round(value, 3) for name, value in found.items()})
        0 {'alignment': 0.0, 'uniformity': -4.0, 'effective_rank': 4.0}
        100 {'alignment': 0.0, 'uniformity': -4.0, 'effective_rank': 4.0}
    """

    def __init__(
        self,
        *,
        every: int = 100,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | Any = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self.every = integer("every", every, least=1)
        self.metrics = dict(METRICS) if metrics is None else _known(metrics)
        for name, place in (("csv", csv), ("tensorboard", tensorboard)):
            writer = name == "tensorboard" and hasattr(place, "add_scalar")
            if not (place is None or isinstance(place, (str, os.PathLike)) or writer):
                kind = "a file" if name == "csv" else "a folder or a SummaryWriter"
                raise TypeError(f"{name}: expected {kind}, got {kind_of(place)}; pass its path")
        self.csv = None if csv is None else _file_of(Path(csv), ["step", *self.metrics])
        self.writer = _writer(tensorboard) if isinstance(tensorboard, (str, os.PathLike)) else tensorboard

    def due(self, step: int) -> bool:
        """Whether a call at this step computes; for rows that would be made for it alone."""
        return step % self.every == 0

    def __call__(self, step: int, x: Tensor, y: Tensor | None = None) -> dict[str, float] | None:
        """The metrics of these rows, recorded; None at steps between.

        Args:
            step: the number of the step.
            x: (n, d) floating, n >= 2.
            y: (n, d), the positives of x; without it there is no alignment (NaN).

        Returns:
            Name -> number, or None.
        """
        try:
            step = operator.index(step)  # else a file's column would hold the text of a tensor
        except TypeError:
            raise TypeError(f"step: expected an integer, got {kind_of(step)}; pass int(step)") from None
        if not self.due(step):
            return None
        with torch.no_grad():
            found = {name: _number(name, metric(x, y)) for name, metric in self.metrics.items()}
        if self.csv is not None:
            with self.csv.open("a", newline="") as file:
                csv.writer(file).writerow([step, *found.values()])
        if self.writer is not None:
            for name, value in found.items():
                self.writer.add_scalar(f"embeddings/{name}", value, step)
            self.writer.flush()
        return found

    def trainer_callback(self, embed: Callable[[Any], tuple[Tensor, Tensor | None]]) -> Any:
        """A callback for Hugging Face's Trainer, which records on its first process.

        Args:
            embed: from the model to x and y, for instance of rows that are held out.

        Returns:
            A transformers.TrainerCallback.

        Raises:
            ImportError: transformers is not installed.
        """
        from transformers import TrainerCallback  # type: ignore[attr-defined, unused-ignore]

        recorder = self

        class Recording(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if recorder.due(state.global_step) and state.is_world_process_zero:
                    with torch.no_grad():
                        recorder(state.global_step, *embed(model))

        return Recording()


def _number(name: str, value: Any) -> float:
    """What a metric has returned."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"metrics: expected a number from {name!r}, got {kind_of(value)}; return one for all rows"
        ) from None


def _known(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: expected a dictionary of names and functions of x and y, got {kind_of(metrics)}")
    for name, metric in metrics.items():
        if not isinstance(name, str) or not callable(metric):
            raise TypeError(f"metrics: expected names and functions of x and y, got {name!r}: {kind_of(metric)}")
    return dict(metrics)


def _file_of(path: Path, columns: list[str]) -> Path:
    """The file with these columns, made where there is none: a run that is resumed goes on in it."""
    if path.is_dir():
        raise ValueError(f"csv: expected a file, got the folder {path}; pass {path / 'metrics.csv'}")
    if path.exists() and path.stat().st_size:
        try:
            with path.open(newline="") as file:
                found = next(csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"csv: expected a file of commas and text, got {path} ({error}); pass another file"
            ) from None
        if found != columns:
            raise ValueError(
                f"csv: expected a file with the columns {columns}, got {found} in {path}; pass another file"
            )
        with path.open("rb+") as whole:  # a run that was killed as it wrote leaves a row without its end
            whole.seek(-1, os.SEEK_END)
            if whole.read() != b"\n":
                whole.write(b"\r\n")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(columns)
    return path


def _writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: expected the package tensorboard, which is not installed; pip install tensorboard, or pass csv="
        ) from error
    return SummaryWriter(os.fspath(folder))
