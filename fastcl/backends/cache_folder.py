"""The user's folder for what is worth keeping from one process to the next: compiled pair functions, and what was measured here."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

CACHE_VARIABLE = "FASTCL_CACHE"
MEASURED = "instruction-set.json"  # the file of tuned.py


def folder() -> Path:
    """FASTCL_CACHE, else fastcl in the platform's folder for caches; it need not be there.

    Raises:
        OSError: there is no such place.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).absolute()
    if sys.platform != "darwin" and (named := os.environ.get("XDG_CACHE_HOME")):
        return Path(named, "fastcl")
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastcl"


def holds(name: str) -> bool:
    """Whether there is a file of this name in the folder."""
    try:
        return os.path.exists(folder() / name)
    except OSError:
        return False


def unkept() -> str | None:
    """Why nothing is kept from one process to the next; None where it is. Makes the folder."""
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_ours(place):
            return f"{place} belongs to another user, or all may write to it; set {CACHE_VARIABLE} to a folder of yours"
        return None if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written; set {CACHE_VARIABLE}"
    except OSError as error:
        return f"{error}; set {CACHE_VARIABLE} to a folder that can be written"


def is_ours(path: Path) -> bool:
    """Whether nobody else but the system's administrator can have put there what we would run or believe."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o002


def write(path: Path, content: bytes) -> None:
    """Puts a file of the folder there whole, or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix="writing-")
    try:
        with open(handle, "wb") as opened:
            opened.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
