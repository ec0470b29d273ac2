"""The compiled extension fastcl._C: whether it fits this torch and this processor, and loading it if so.

A library built for another torch can crash the process the moment it is opened, so the decision is made from
the facts that the build wrote beside it (build_facts.json), before it is opened.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FACTS = Path(__file__).parent.with_name("build_facts.json")
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall <folder of the fastcl source>"


def facts() -> dict[str, Any] | None:
    """What the last build wrote: versions, instruction sets, CUDA architectures, what was left out and why.

    Returns:
        The content of build_facts.json, or None where there was no build or the file cannot be read.
    """
    try:
        content = json.loads(FACTS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def misfit(built: dict[str, Any]) -> str | None:
    """Why the library that these facts describe must not be opened by this process; None when it fits."""
    needs = [
        ("Python", "python", sysconfig.get_config_var("SOABI")),
        ("torch", "torch", str(torch.__version__)),
        ("a torch with CUDA", "torch_cuda", torch.version.cuda),
    ]
    for name, key, here in needs:
        if built.get(key) != here:
            return f"it was built for {name} {built.get(key)}, and this is {here}; rebuild it: {REBUILD}"
    return None


def open_library() -> tuple[ModuleType | None, str | None]:
    """Opens fastcl._C, and thereby registers its kernels; warns where a library is there but cannot be used.

    Returns:
        The module and None; or None and the reason, with what mends it.
    """
    built = facts()
    if built is None:
        return None, f"the compiled extension was not built; build it: {REBUILD}"
    if cause := built.get("left_out", {}).get("cpu"):
        return None, f"the compiled extension was left out: {cause['reason']}. To mend it: {cause['remedy']}"
    why = misfit(built)
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
