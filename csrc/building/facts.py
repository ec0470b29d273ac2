"""What fastcl/build_facts.json says of a build, for `fastcl doctor`, for the loader and for pair functions compiled at run time."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import runpy
from pathlib import Path
from typing import Any

from . import CSRC, ROOT

FACTS = "build_facts.json"
# What a user's own pair function is compiled with at run time (fastcl/backends/own_pairs.py).
OWN_PAIR = "cpu/own_pair.h"
# Of the package by its file: to import fastcl is to import torch, which a build does without.
fingerprint = runpy.run_path(str(ROOT / "fastcl" / "backends" / "fingerprint.py"))["fingerprint"]


def headers_of(name: str) -> dict[str, str]:
    """A header of csrc/ and all of csrc/ that it includes: names with digests of what they say."""
    found: dict[str, str] = {}
    waiting = [CSRC / name]
    while waiting:
        path = waiting.pop()
        key = path.relative_to(CSRC).as_posix()
        if key not in found:
            text = path.read_bytes()
            found[key] = hashlib.sha256(text).hexdigest()
            included = re.findall(r'^#include "(.*)"', text.decode(), re.MULTILINE)
            waiting += [Path(os.path.normpath(path.parent / other)) for other in included]
    return dict(sorted(found.items()))


def problem_of(source: Path) -> str:
    """The arguments of the ops: a library that takes others would read them wrong."""
    values = {
        node.targets[0].id: node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return "; ".join(str(ast.literal_eval(values[name])) for name in ("PROBLEM", "ALIGNED", "CUDA_ALIGNED"))


def report(facts: dict[str, Any]) -> None:
    made = f"built for {', '.join(facts['cpu_isas'])}" if facts["cpu_isas"] else "built no kernels"
    made += f" and for CUDA {', '.join(facts['cuda_archs'])}" if facts["cuda_archs"] else ""
    print(f"fastcl: {made} in {facts['seconds']} s")
    for part, why in facts["left_out"].items():
        print(f"fastcl: left out {part}: {why['reason']}. To mend it: {why['remedy']}")
