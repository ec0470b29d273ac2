"""The compiled libraries of kernels: whether they fit this torch and this processor, and loading them if so.

They call torch by its stable C interface, and serve torch 2.10 and later and any Python; libfastcl_cuda.so brings the CUDA runtime
of its nvcc, and needs a driver that knows it, as a torch with CUDA of that major version does. What is damaged can end the process
the moment it is opened: so the decision is made from the facts that the build wrote beside them (build_facts.json), before.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..equation.problem import SIGNATURES
from . import cache_folder
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from . import tuned

PACKAGE = Path(__file__).resolve().parents[1]
FACTS = Path(__file__).parent.with_name("build_facts.json")
CPU, CUDA = "libfastcl_cpu.so", "libfastcl_cuda.so"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall <fastcl's wheel, or the folder of its source>"
_said: list[str] = []  # the libraries that a warning at import was about
OLDEST_TORCH = (2, 10)  # its stable interface is the first with threads and typed memory


class Library:
    """The CPU kernels, opened: torch.ops.fastcl has them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def usable_isas(self) -> list[str]:
        """The instruction sets built that this processor has; narrowest first."""
        names: str = torch.ops.fastcl.cpu_usable_isas()
        return names.split()

    def chosen_isa(self) -> str:
        """The one that the kernels run with; ValueError where FASTCL_CPU_ISA names none of them."""
        name: str = torch.ops.fastcl.cpu_chosen_isa()
        return name

    def told_what_was_measured(self) -> tuned.Measured | None:
        """Has the kernels take the set that `fastcl tune` kept, before they choose; None where none is kept or one is asked for."""
        if os.environ.get("FASTCL_CPU_ISA") or not cache_folder.holds(cache_folder.MEASURED):
            return None
        from . import tuned  # where there is something to read: an import is to take no longer than it must

        found = tuned.kept(self.usable_isas)
        takes = getattr(torch.ops.fastcl, "cpu_prefer_isa", None)  # a library that was built before there was a choice has none
        return found if found and takes and takes(found.isa) else None


def facts() -> dict[str, Any] | None:
    """What the last build wrote: versions, instruction sets, CUDA architectures, what was left out and why.

    Returns:
        The content of build_facts.json, or None where there was no build, or the file cannot be read or says something else.
    """
    try:
        content = json.loads(FACTS.read_text(encoding="utf-8"))
        libraries = dict(content["libraries"])
        left_out = content["left_out"]
        words = [why[word] for why in left_out.values() for word in ("reason", "remedy")]
        words += [*libraries, *content["cpu_isas"], *content["cuda_archs"], content["machine"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return content if all(isinstance(word, str) for word in words) else None


def too_old() -> str | None:
    """Why no kernel serves this torch; None where it is new enough."""
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers is None or tuple(map(int, numbers.groups())) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f"the kernels need torch {oldest} or later, and this is {torch.__version__}: pip install --upgrade torch"


def misfit(built: dict[str, Any], path: Path) -> str | None:
    """Why the library that these facts describe must not be opened by this process; None when it fits."""
    if (machine := built.get("machine")) != platform.machine():
        return f"it was built for processors of the kind {machine}, and this is {platform.machine()}; rebuild it: {REBUILD}"
    if path.name == CUDA and _major(built.get("nvcc")) == math.inf:
        return f"the facts of its build name no nvcc, but {built.get('nvcc')}; rebuild it: {REBUILD}"
    if built.get("problem") != SIGNATURES:
        return f"it was built from other sources than these, and takes other arguments; rebuild it: {REBUILD}"
    try:
        damaged = built["libraries"].get(path.name) != fingerprint(path)
    except OSError as error:
        return f"it cannot be read ({error}); rebuild it: {REBUILD}"
    return f"{path.name} is not what was built (an interrupted copy?); rebuild it: {REBUILD}" if damaged else None


def shadowed() -> Path | None:
    """The installed fastcl that this checkout stands before: Python looks first in the folder that it is run in."""
    if not (PACKAGE.parent / "csrc" / "torch_abi.h").exists():
        return None
    others = (Path(entry, "fastcl").resolve() for entry in sys.path)
    return next((path for path in others if path != PACKAGE and (path / "__init__.py").exists()), None)


def _major(version: object) -> float:
    """13 of 13.0.88; infinite where that is no version."""
    number = re.match(r"\d+", str(version))
    return float(number[0]) if number else math.inf


def open_library(name: str, part: str) -> tuple[Path | None, str | None]:
    """Opens a library, and thereby registers its kernels; warns where one is there but cannot be used.

    Returns:
        Its path and None; or None and the reason, with what mends it.
    """
    built, path = facts(), FACTS.with_name(name)
    if built is None and not path.exists():
        return None, f"the compiled kernels were not built; build them: {REBUILD}"
    if why := too_old():
        return None, why
    if built is None:
        why = f"{FACTS.name}, which says what it was built for, is missing or damaged; rebuild it: {REBUILD}"
    elif cause := built["left_out"].get(part):
        return None, f"the compiled kernels were left out: {cause['reason']}. To mend it: {cause['remedy']}"
    elif name == CUDA and torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not a CUDA build; install one that is"
    elif name == CUDA and math.inf > (made := _major(built.get("nvcc"))) > _major(torch.version.cuda):
        # Said, and not warned of: one wheel is for all, and Triton's kernels serve here.
        why = f"it was built by nvcc {built['nvcc']}, and this torch has CUDA {torch.version.cuda}"
        return None, f"{why}; install a torch with CUDA {made:.0f} or later, or rebuild it: {REBUILD}"
    else:
        why = misfit(built, path)
    if why is None:
        try:
            torch.ops.load_library(path)
            return path, None
        except (OSError, RuntimeError) as error:
            why = f"it cannot be opened ({error}); rebuild it: {REBUILD}"
    message = f"fastcl's compiled {name} is not used, and fastcl runs without its kernels: {why}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    _said.append(path.name)
    return None, why


@cache
def warn_once() -> None:
    """Says at the first use of CPU tensors that they are served slowly, and why; not where that was said or asked for."""
    if CPU not in _said and "FASTCL_BUILD_CPU=0" not in str(reason):
        message = f"fastcl runs on pure PyTorch, which is slower than its kernels: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


if other := shadowed():
    message = f"fastcl is that of the checkout {PACKAGE.parent}, in place of the one installed in {other}"
    warnings.warn(f"{message}; for the installed one, run Python from another folder", RuntimeWarning, stacklevel=2)

# At import, once, under the import lock: `library` is the CPU kernels or None, `reason` says why it is None, and `cuda_reason` why
# there are no CUDA kernels. `preferred` is what `fastcl tune` measured, where that has a say.
_path, reason = open_library(CPU, "cpu")
library = None if _path is None else Library(_path)
preferred = None if library is None else library.told_what_was_measured()
_, cuda_reason = open_library(CUDA, "cuda")
