"""The instruction set that `fastcl tune` measured to be the quickest on this machine, as it is kept in the user's cache folder.

It is read once, when the kernels are opened (extension.py), and handed to them before they choose: a process runs with one set from
its first call to its last, so that the same call gives the same bits. Nothing is measured then, and nothing decided anew. What
cannot be read, is another user's, or was measured of another processor or other sets counts as none, without a word.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cache_folder

EVEN = 1.05  # of times: what is nearer to the best is a tie
# Of /proc/cpuinfo: what is one processor's alone. Of virtual machines the name says little.
FACTS = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "CPU implementer",
    "CPU variant",
    "CPU part",
    "CPU revision",
)


class Measured:
    """What was chosen, and from what. A plain class: the import of fastcl may read one, and a NamedTuple takes longer to make.

    Args:
        isa: the set chosen.
        milliseconds: the median of each set that was measured.
        processor: of which kind, see processor().
        usable: the sets that were there, narrowest first.
        threads: torch's, at that time.
        date: ISO.
    """

    def __init__(
        self, isa: str, milliseconds: dict[str, float], processor: str, usable: list[str], threads: int, date: str
    ) -> None:  # fmt: skip
        self.isa, self.milliseconds, self.processor, self.usable = isa, milliseconds, processor, usable
        self.threads, self.date = threads, date

    def why(self) -> str:
        """In words, for `fastcl doctor`."""
        others = {isa: time for isa, time in self.milliseconds.items() if isa != self.isa}
        when = f"on {self.date}, on {self.threads} thread{'s' * (self.threads != 1)}"
        if not others:
            return f"fastcl tune found no other above baseline {when}"
        other = min(others, key=others.__getitem__)
        ratio = others[other] / self.milliseconds[self.isa]
        if ratio < EVEN:
            return f"fastcl tune found it even with {other}, which is narrower, {when}"
        return f"fastcl tune measured it {ratio:.2f} times as fast as {other} {when}"


def quickest(milliseconds: Mapping[str, float], usable: Sequence[str]) -> str:
    """The widest of the sets within 5% of the least time.

    Args:
        milliseconds: one time > 0 or more, by set.
        usable: all sets, narrowest first.
    """
    least = min(milliseconds.values())
    return max((isa for isa, time in milliseconds.items() if time <= EVEN * least), key=usable.index)


def processor() -> str:
    """What tells this kind of processor from others."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as facts:
            text = facts.read(2048)  # of the first core: the whole is long where there are many
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip()
    pairs = (line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in pairs}
    return ", ".join([platform.machine(), *(f"{name} {known[name]}" for name in FACTS if name in known)])


def path() -> Path:
    """Where it is kept.

    Raises:
        OSError: there is no place for it.
    """
    return cache_folder.folder() / cache_folder.MEASURED


def kept(usable: Callable[[], list[str]]) -> Measured | None:
    """What counts here, or None.

    Args:
        usable: says the sets that were built and that this processor has; asked where there is something to hold against it.
    """
    try:
        place = path()
        # Before it is read: a pipe or a device would hold the import up.
        if not (place.is_file() and cache_folder.is_ours(place) and cache_folder.is_ours(place.parent)):
            return None
        found = measured(json.loads(place.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None
    here = usable()
    return found if found.usable == here and found.isa in here and found.processor == processor() else None


def measured(content: Any) -> Measured:
    """What a file says.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, OverflowError: it is no such file.
    """
    times = {str(isa): float(time) for isa, time in content["milliseconds"].items()}
    found = Measured(
        str(content["isa"]), times, str(content["processor"]), list(map(str, content["usable"])), int(content["threads"]),
        str(content["date"])[:10],
    )  # fmt: skip
    if found.isa not in times or not all(0.0 < time < math.inf for time in times.values()):
        raise ValueError(f"milliseconds: expected times > 0 with that of {found.isa}, got {times}")
    return found


def keep(found: Measured) -> str | None:
    """Keeps it for processes that start from now on; why it cannot be kept, or None."""
    if (why := cache_folder.unkept()) is not None:
        return why
    try:
        cache_folder.write(path(), (json.dumps(vars(found), indent=1) + "\n").encode())
    except OSError as error:
        return f"{error}; set {cache_folder.CACHE_VARIABLE} to a folder that can be written"
    return None


def forget() -> bool:
    """Removes what is kept; whether there was something.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        path().unlink()
    except FileNotFoundError:
        return False
    return True
