"""A progress bar, where one is asked for: tqdm's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class _NoBar:
    def update(self, done: int) -> None:
        """Show nothing."""


def bar(name: str, total: int, unit: str, progress: bool) -> AbstractContextManager[Any]:
    """A progress bar of `total` units, or something that shows nothing.

    Raises:
        ImportError: a bar is wanted and tqdm is not installed.
    """
    if not progress:
        return nullcontext(_NoBar())
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: expected tqdm for a progress bar, which is not installed; pip install tqdm"
        ) from error
    shown: AbstractContextManager[Any] = tqdm(total=total, desc=name, unit=unit, unit_scale=True)
    return shown
