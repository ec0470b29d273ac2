"""Libraries of one pair function each, compiled for this processor and kept on disk.

What is compiled is codegen.own_cpp's text against the headers that the CPU kernels were built from. A kept library is named by all
that it is made of (text, headers, flags, compiler, version), ends with a digest of its bytes, and comes into its folder whole, by
rename. Processes that want the same one wait for the one that compiles it. A folder that cannot be written is no error.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..version import __version__
from . import cache_folder, extension
from .cache_folder import CACHE_VARIABLE, folder, unkept

COMPILE_VARIABLE = "FASTCL_COMPILE_PAIRS"
PATIENCE = 120.0  # seconds that a compiler, or another process that compiles the same, is waited for
DIGEST = 32  # bytes
_running: set[subprocess.Popen[str]] = set()
_places: set[str] = set()  # of what runs


class CompilerError(RuntimeError):
    """The compiler failed; the message is its own."""


def unavailable() -> str | None:
    """Why nothing can be compiled here, with what mends it; None where it can."""
    if os.environ.get(COMPILE_VARIABLE) == "0":
        return f"{COMPILE_VARIABLE}=0 is set; unset it to have it compiled"
    if extension.library is None:
        return extension.reason
    if why := _misfit():
        return why
    if compiler() is None:
        tried = os.environ.get("CXX") or "g++, clang++, c++"
        return f"no C++ compiler was found (tried {tried}); apt install g++ (or conda install cxx-compiler), or set CXX"
    return None


@cache
def _misfit() -> str | None:
    facts = extension.facts() or {}
    for name, digest in facts.get("headers", {}).items():
        try:
            found = hashlib.sha256((headers() / name).read_bytes()).hexdigest()
        except OSError as error:
            return f"a header of its kernels cannot be read ({error}); reinstall fastcl"
        if found != digest:
            return f"{name} is not the header that the kernels were built from; rebuild them: {extension.REBUILD}"
    if not facts.get("headers") or not facts.get("cpu_flags"):
        return f"the kernels were built without the headers that it needs; rebuild them: {extension.REBUILD}"
    return None


def headers() -> Path:
    """csrc: beside the package's modules where it was installed, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def compiler() -> list[str] | None:
    """The command named by CXX, else the first of g++, clang++ and c++; None where there is none."""
    named = os.environ.get("CXX")
    try:
        tried = [shlex.split(named)] if named else [["g++"], ["clang++"], ["c++"]]
    except ValueError:  # a quotation that does not end
        return None
    for command in tried:
        if command and (program := shutil.which(command[0])):
            return [os.path.abspath(program), *command[1:]]
    return None


@cache
def version_of(command: tuple[str, ...]) -> str:
    """The first line of what the compiler says of itself."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def opened(source: str) -> ctypes.CDLL:
    """The library of this source: the one kept, else compiled now, and kept where that is possible.

    Raises:
        CompilerError: it does not compile.
        OSError: there is nowhere to compile it, or what was compiled cannot be opened.
    """
    command, flags = compiler() or ["c++"], _flags()
    made_of = [source, (extension.facts() or {}).get("headers"), command, version_of(tuple(command)), flags]
    key = hashlib.sha256(json.dumps([*made_of, platform.machine(), __version__]).encode()).hexdigest()
    if unkept() is not None:
        return _compiled(source, command, flags, None)
    path = folder() / f"pair-{key}.so"
    if (kept := _kept(path)) is not None:
        return kept
    with _locked(path.with_suffix(".lock")):
        return _kept(path) or _compiled(source, command, flags, path)


def _flags() -> list[str]:
    assert extension.library is not None
    flags = list((extension.facts() or {})["cpu_flags"][extension.library.chosen_isa()])
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return [*flags, "-w", *shared]


def _kept(path: Path) -> ctypes.CDLL | None:
    """The library at that place, where it is whole and ours."""
    try:
        content = path.read_bytes()
        if cache_folder.is_ours(path) and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]:
            return ctypes.CDLL(str(path))
    except OSError:
        pass
    return None


def _keep(content: bytes, path: Path) -> None:
    cache_folder.write(path, content + hashlib.sha256(content).digest())


def _compiled(source: str, command: list[str], flags: list[str], path: Path | None) -> ctypes.CDLL:
    with _place() as place:
        Path(place, "pair.cpp").write_text(source)
        run([*command, *flags, f"-I{headers()}", "pair.cpp", "-o", "pair.so"], place)
        library = Path(place, "pair.so")
        if path is not None:
            with contextlib.suppress(OSError):  # the folder is full
                _keep(library.read_bytes(), path)
                if (kept := _kept(path)) is not None:
                    return kept
        return ctypes.CDLL(str(library))


@contextlib.contextmanager
def _place() -> Iterator[str]:
    """A folder for a compiler's files: where the system sweeps, so that nothing of a killed process stays among the libraries."""
    place = tempfile.mkdtemp(prefix="fastcl-")
    _places.add(place)  # no TemporaryDirectory: a child that was forked meanwhile would remove it when it ends
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _places.discard(place)


def run(command: list[str], place: str) -> None:
    """Runs the compiler there, in a session of its own, so that it ends with all that it started.

    Raises:
        CompilerError: it fails, is killed, or takes longer than PATIENCE.
    """
    try:
        process = subprocess.Popen(
            command, cwd=place, env={**os.environ, "LC_ALL": "C"}, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise CompilerError(f"{command[0]} cannot be run ({error})") from None
    _running.add(process)
    try:
        _, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        _end(process)
        process.communicate()
        raise CompilerError(f"{command[0]} took longer than {PATIENCE:.0f} s, and was ended") from None
    finally:
        _running.discard(process)
    if process.returncode:
        lines = [line.strip() for line in said.splitlines() if "error" in line]
        status = f"was ended by signal {-process.returncode}" if process.returncode < 0 else "failed"
        raise CompilerError(
            f"{command[0]} {status}: {lines[0] if lines else said.strip()[:200] or 'without a message'}"
        )


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


@atexit.register
def _end_all() -> None:
    for process in list(_running):
        _end(process)
    for place in list(_places):
        shutil.rmtree(place, ignore_errors=True)


def _begin_anew() -> None:
    """In a forked child, whose end must not end what its parent compiles."""
    _running.clear()
    _places.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes, where the file system can do that. The system lets go when a process ends."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):  # said, since a child that was forked meanwhile holds the file too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


__all__ = [
    "CACHE_VARIABLE",
    "CompilerError",
    "compiler",
    "folder",
    "headers",
    "opened",
    "unavailable",
    "unkept",
    "version_of",
]
