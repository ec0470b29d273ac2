"""The compiled extension fastcl._C: whether it fits this torch and this processor, and loading it if so.

A library built for another torch can crash the process the moment it is opened, so the decision is made from
the facts that the build wrote beside it (build_facts.json), before it is opened.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
import warnings
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FACTS = Path(__file__).parent.with_name("build_facts.json")
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall <folder of the fastcl source>"


def facts() -> dict[str, Any] | None:
    """What the last build wrote: versions, instruction sets, CUDA architectures, what was left out and why.

    Returns:
        The content of build_facts.json, or None where there was no build, or the file cannot be read or says something else.
    """
    try:
        content = json.loads(FACTS.read_text(encoding="utf-8"))
        left_out = content["left_out"]
        words = [why[word] for why in left_out.values() for word in ("reason", "remedy")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return content if all(isinstance(word, str) for word in words) else None


def fingerprint(path: Path) -> list[int]:
    """The size of a file and a checksum of 64 samples of it, its end among them: what an interrupted copy gets wrong.

    Opening a library that was cut short ends the process (SIGBUS); reading all of one with many CUDA kernels takes a while.
    setup.py writes the same beside what it builds.
    """
    size, check = path.stat().st_size, 0
    with path.open("rb") as opened:
        for k in range(64):
            opened.seek(max(0, size - 4096) * k // 63)
            check = zlib.crc32(opened.read(4096), check)
    return [size, check]


def misfit(built: dict[str, Any], path: Path) -> str | None:
    """Why the library that these facts describe must not be opened by this process; None when it fits."""
    needs = [
        ("Python", "python", sysconfig.get_config_var("SOABI")),
        ("torch", "torch", str(torch.__version__)),
        ("a torch with CUDA", "torch_cuda", torch.version.cuda),
    ]
    for name, key, here in needs:
        if built.get(key) != here:
            return f"it was built for {name} {built.get(key)}, and this is {here}; rebuild it: {REBUILD}"
    try:
        damaged = "library" in built and built["library"] != fingerprint(path)
    except OSError as error:
        return f"it cannot be read ({error}); rebuild it: {REBUILD}"
    return f"{path.name} is not what was built (an interrupted copy?); rebuild it: {REBUILD}" if damaged else None


def open_library() -> tuple[ModuleType | None, str | None]:
    """Opens fastcl._C, and thereby registers its kernels; warns where a library is there but cannot be used.

    Returns:
        The module and None; or None and the reason, with what mends it.
    """
    built, path = facts(), FACTS.with_name(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    if built is None and not path.exists():
        return None, f"the compiled extension was not built; build it: {REBUILD}"
    if built is None:
        why: str | None = (
            f"{FACTS.name}, which says what it was built for, is missing or damaged; rebuild it: {REBUILD}"
        )
    elif cause := built["left_out"].get("cpu"):
        return None, f"the compiled extension was left out: {cause['reason']}. To mend it: {cause['remedy']}"
    else:
        why = misfit(built, path)
    if why is None:
        try:
            return importlib.import_module("fastcl._C"), None
        except ImportError as error:
            why = f"it cannot be opened ({error}); rebuild it: {REBUILD}"
    message = f"fastcl's compiled extension is not used, and fastcl runs on pure PyTorch: {why}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None, why


# At import, once, under the import lock: `library` is fastcl._C or None, and `reason` says why it is None.
library, reason = open_library()
