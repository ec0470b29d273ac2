"""The day of the card: one command that proves and times every GPU path, in as many minutes as it is given.

    python -m bench.gpu_day [--minutes 8] [--out FOLDER] [--only PART ...]
    python -m bench.gpu_day --device cpu --rows 96        the command itself, tried without a card

Parts come in the order of what is worth most, right before quick: each is a process of its own with an end of its own, so that
a kernel that takes its device down ends one part. Results are written as they come, one a line, into FOLDER/parts; after each
part FOLDER/gpu_day.json holds all of them. A table of at most 60 lines is printed last and kept as gpu_day.md, beside
gpu_day.png. Needs no network and no git. Rivals come by `pip install --no-deps memeff==0.3.1 inf-cl==1.2.1
siglip-kernel==0.1.2`, or from wheels in FOLDER/wheels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import ROOT

MINUTES = 8.0
LINES = 60
GRACE = 20.0  # seconds that a part may take to come to its end
LEAST = 8.0  # seconds; a part that is allowed less is not begun
BUILD = 150.0
TIMED = ("clip-64k", "siglip-64k", "nt-xent-32k", "f-micl-64k", "clip-32k-wide", "clip-4k-wide", "clip-1k", "clip-256")
# Seconds that each may take: right before quick, and small before large.
PARTS: dict[str, float] = {
    "facts": 15.0, "losses": 65.0, "forms": 50.0, "large": 30.0, "graphs": 25.0, "threads": 10.0, "sanitizers": 55.0,
    "dispatch": 30.0, **dict.fromkeys(TIMED[:4], 35.0), **dict.fromkeys(TIMED[4:], 15.0),
}  # fmt: skip

Result = dict[str, Any]


def build(seconds: float, root: Path = ROOT, device: str = "cuda") -> str:
    """The libraries beside the sources: the one that was carried here where it opens, else built for this machine's torch.

    On a CPU the CUDA kernels are not asked for, which no torch without CUDA opens.
    """
    right = "not e.reason and not e.cuda_reason" if device.startswith("cuda") else "not e.reason"
    probe = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"from fastcl.backends import extension as e; print({right}, e.reason, e.cuda_reason)",
    ]
    link = root / "fastcl" / "triton_kernels"
    if not link.exists() and find_spec("fastcl.triton_kernels") is None:
        link.symlink_to("../triton_kernels")  # what an editable install maps

    def opens() -> str:
        done = subprocess.run(probe, cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() or done.stderr.strip()[-300:]

    if opens().startswith("True"):
        return "the extension that is here opens"
    begun, was = time.monotonic(), opens()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", "FASTCL_BUILD_AVX512": "0", "FASTCL_BUILD_AMX": "0", **os.environ}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"NOT BUILT in {seconds:.0f} s: {was}"
    said = opens()
    if not said.startswith("True"):
        return f"NOT BUILT, status {done.returncode}: {said} {(done.stdout + done.stderr)[-800:]}"
    return f"built in {time.monotonic() - begun:.0f} s"


def rivals(folder: Path) -> str:
    """Installs the wheels that travelled, if any, where the parts find them."""
    wheels, site = sorted((folder / "wheels").glob("*.whl")), folder / "site"
    if not wheels:
        return ""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
        *map(str, wheels),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    return f"{len(wheels)} wheels installed" if done.returncode == 0 else f"wheels: {done.stderr.strip()[-200:]}"


# ---- a part ---------------------------------------------------------------------------------------------------------------


def results_of(name: str, chosen: argparse.Namespace) -> Iterator[Result]:
    """What a part finds, one after the other."""
    import torch

    from . import gpu_checks, gpu_timing
    from .measure import environment, quiet

    quiet()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"expected a CUDA device, got none with torch {torch.__version__}; `fastcl doctor` says why")
    day = gpu_checks.Day(device, chosen.rows, time.monotonic() + chosen.seconds)
    if name == "facts":
        yield environment() | gpu_checks.facts(device)
    elif name == "dispatch":
        yield from gpu_timing.dispatch(day)
    elif name in TIMED:
        yield from gpu_timing.timed(day, name)
    else:
        yield from getattr(gpu_checks, name)(day)


def part(name: str, chosen: argparse.Namespace) -> int:
    """Runs a part here and writes each result at once: what comes after may take the device down."""
    with (chosen.out / "parts" / f"{name}.jsonl").open("w") as file:
        for result in results_of(name, chosen):
            file.write(json.dumps(result, default=str) + "\n")
            file.flush()
    return 0


def in_process(name: str, arguments: list[str], seconds: float) -> str | None:
    """Runs a part in a process of its own; why it ended badly, or None. All that it started ends with it."""
    command = [sys.executable, "-m", "bench.gpu_day", "--one", name, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"ended after {seconds + GRACE:.0f} s"
    last = (said.strip().splitlines() or [""])[-1][:300]
    return None if process.returncode == 0 else f"ended with {process.returncode}: {last}"


Run = Callable[[str, list[str], float], str | None]


def everything(chosen: argparse.Namespace, run: Run, clock: Callable[[], float] = time.monotonic) -> Result:
    """All parts, one after the other, until the minutes are used up; the JSON is written after each."""
    end = clock() + 60.0 * chosen.minutes
    (chosen.out / "parts").mkdir(parents=True, exist_ok=True)
    results: Result = {"device": chosen.device, "built": build(BUILD, device=chosen.device), "rivals": rivals(chosen.out)}
    results["parts"] = {}
    passed = ["--device", chosen.device, "--out", str(chosen.out.resolve())]
    passed += ["--rows", str(chosen.rows)] if chosen.rows else []
    for name in chosen.only or PARTS:
        left = end - clock()
        file = chosen.out / "parts" / f"{name}.jsonl"
        file.unlink(missing_ok=True)
        begun = clock()
        allowance = min(PARTS[name], left - GRACE)
        why: str | None = "no time was left"
        if allowance >= LEAST:
            why = run(name, ["--seconds", f"{allowance:.0f}", *passed], allowance)
        lines = file.read_text().splitlines() if file.exists() else []
        found = {"results": [json.loads(line) for line in lines if line.endswith("}")], "seconds": clock() - begun}
        results["parts"][name] = found | ({"ended": why} if why else {})
        (chosen.out / "gpu_day.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {clock() - begun:.0f} s{', ' + why if why else ''}", file=sys.stderr, flush=True)
    return results


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything (default {MINUTES:g})")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_day", help="the folder (default out/gpu_day)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command itself")
    parser.add_argument("--rows", type=int, help="another number of rows, to try the command itself")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, run: Run = in_process) -> int:
    from .gpu_table import failures, plotted, table

    chosen = arguments_of(arguments)
    if chosen.one:
        return part(chosen.one, chosen)
    results = everything(chosen, run)
    text = "\n".join(table(results, LINES))
    (chosen.out / "gpu_day.md").write_text(text + "\n")
    print(text)
    with contextlib.suppress(ImportError):  # matplotlib is not everywhere
        from . import plots

        plots.cases(plotted(results), chosen.out / "gpu_day.png")
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
