"""What other versions of Triton and torch make of this package, on a machine without a GPU.

    python -m tools.versions triton 3.3.1 3.6.0 [--arch sm_90 sm_80] [--every] [--emulated]
    python -m tools.versions torch 2.10.0 2.14.1 [--tests PATH ...]

Each version is installed once, into a folder of its own under build/versions: Triton beside the torch that runs this, torch in an
environment of its own, into which the package is built. Triton compiles one of each kernel, with --every all that tuning.py has,
and with --emulated runs them under tools/ptxemu; torch imports, answers `fastcl doctor --check` and passes the tests
named. Logs lie beside, and the last lines printed are rows of a Markdown table. The status is 1 where a version failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "versions"
SHORT = (
    "tests/engine",
    "tests/objectives/test_values.py",
    "tests/objectives/test_op.py",
    "tests/packaging/test_doctor.py",
    "tests/packaging/test_objects.py::test_the_declarations_are_those_of_torch",
)
BESIDE = ("numpy", "setuptools>=77", "wheel", "ninja", "pytest>=8", "pytest-benchmark>=5", "pytest-xdist", "hypothesis")


class StepError(Exception):
    """A step that did not do what it should; its log says more."""


def ran(log: Path, command: Sequence[str | Path], **settings: str) -> str:
    """What the command printed, kept in `log`."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise StepError(f"{log.relative_to(ROOT)}: {(done.stdout + done.stderr).strip().splitlines()[-1][:200]}")
    return done.stdout


def triton(version: str, chosen: argparse.Namespace) -> Iterator[str]:
    """Cells of the table: what each architecture compiled, and what the emulator ran."""
    folder = FOLDER / f"triton-{version}"
    if not (folder / "triton").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={version}"]
        ran(FOLDER / f"triton-{version}.install.log", install)
    beside = {"PYTHONPATH": f"{folder}", "TRITON_CACHE_DIR": f"{folder}.cache"}
    for arch in chosen.arch:
        log = FOLDER / f"triton-{version}.{arch}.log"
        few = [] if chosen.every else ["--few"]
        said = ran(log, [sys.executable, "-m", "tests.triton.entries", "--try", *few, arch], **beside).splitlines()
        wrong = [line for line in said if not line.endswith("| builds")]
        yield f"{len(said) - len(wrong)} of {len(said)}" + "".join(f"; {line.split(' ', 1)[1]}" for line in wrong)
    if chosen.emulated:
        tests = ["tests/triton/test_emulated.py", "tests/triton/test_capture.py", "tests/triton/test_availability.py"]
        yield tested(FOLDER / f"triton-{version}.emulated.log", Path(sys.executable), tests, **beside)


def torch(version: str, chosen: argparse.Namespace) -> Iterator[str]:
    """Cells of the table: what was built, the devices that doctor finds right, the tests."""
    folder = FOLDER / f"torch-{version}"
    python = folder / "bin" / "python"

    def log(step: str) -> Path:
        return FOLDER / f"torch-{version}.{step}.log"

    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        ran(log("install"), [python, "-m", "pip", "install", "-q", f"torch=={version}", *BESIDE])
        (folder / "ready").touch()
    alone = ("--no-build-isolation", "--no-deps", "--no-index", "--verbose")
    ran(log("build"), [python, "-m", "pip", "install", *alone, "--editable", "."], FASTCL_BUILD_CUDA="0")
    facts = "import torch, fastcl.backends.extension as e; print(torch.__version__, e.library.chosen_isa())"
    yield ran(log("import"), [python, "-W", "error", "-c", facts]).strip()
    ran(log("doctor"), [python, "-m", "fastcl", "doctor", "--check"])
    yield "right"
    yield tested(log("tests"), python, chosen.tests)


def tested(log: Path, python: Path, tests: Sequence[str], **settings: str) -> str:
    """The last line of a run of pytest."""
    said = ran(log, [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], OMP_NUM_THREADS="1", **settings)
    return re.sub(r" in .*| \(.*", "", said.strip().splitlines()[-1].strip("= "))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=("triton", "torch"))
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--arch", nargs="+", default=["sm_90", "sm_80"], help="default sm_90 sm_80")
    parser.add_argument("--every", action="store_true", help="compile every entry of tuning.py")
    parser.add_argument("--emulated", action="store_true", help="run the kernels under tools/ptxemu, too")
    parser.add_argument("--tests", nargs="+", default=list(SHORT), help="paths for pytest; a short suite unless told")
    chosen = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows, failed = [], False
    for version in chosen.versions:
        begun, cells = time.monotonic(), [f"{chosen.package} {version}"]
        try:
            cells += {"triton": triton, "torch": torch}[chosen.package](version, chosen)
            failed |= any(";" in cell for cell in cells)
        except StepError as error:
            cells.append(f"FAILED: {error}")
            failed = True
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], f"{time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
