"""What tells a whole library of kernels from one that was cut short: asked when it is built and before it is opened.

setup.py runs this file by itself, without torch and without the package.
"""

from __future__ import annotations

import zlib
from pathlib import Path


def fingerprint(path: Path) -> list[int]:
    """The size of a file and a checksum of 64 samples of it, its end among them: what an interrupted copy gets wrong.

    Opening a library that was cut short ends the process (SIGBUS); reading all of one with many CUDA kernels takes a while.
    """
    size, check = path.stat().st_size, 0
    with path.open("rb") as opened:
        for k in range(64):
            opened.seek(max(0, size - 4096) * k // 63)
            check = zlib.crc32(opened.read(4096), check)
    return [size, check]
