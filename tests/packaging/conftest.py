"""A copy of the source tree, and virtual environments that see this one's torch but not its fastcl."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ninja
import pytest

ROOT = Path(__file__).resolve().parents[2]
MADE = shutil.ignore_patterns("*.so", "build_facts.json", "__pycache__")


def run(command: list[str | Path], cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What the command prints, both streams together.

    Raises:
        subprocess.CalledProcessError: it fails; its note holds what it printed.
    """
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("FASTCL_")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**surroundings, "MAX_JOBS": "1", **(env or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, done.args, done.stdout)
        error.add_note(done.stdout) if hasattr(error, "add_note") else print(done.stdout)
        raise error
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment with this one's packages, of which fastcl is not one."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> str:
        """pip install, from source and without the network."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed", "--verbose"]
        return run([*pip, "install", *options, *arguments], self.folder, env)

    def execute(self, program: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """What the program prints; run in an empty folder unless another is named."""
        return run([self.python, "-W", "always", "-c", program], cwd or self.folder, env)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A new virtual environment."""
    return make_environment(tmp_path / "environment")


def make_environment(folder: Path) -> Environment:
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    environment = Environment(folder)
    # A folder named in a .pth file is searched, but the .pth files inside it are not read: the fastcl that is installed
    # here as editable stays out of sight.
    site = Path(environment.execute("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Another ninja would compile everything anew: the log of what was compiled is good for one version alone.
    (environment.folder / "bin" / "ninja").symlink_to(Path(ninja.BIN_DIR, "ninja").resolve())
    return environment


@pytest.fixture(scope="session")
def make_tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of the source tree, with the compiled objects of `make setup`, so that only what differs is compiled."""

    def make() -> Path:
        tree = tmp_path_factory.mktemp("tree", numbered=True)
        for name in ("fastcl", "csrc", "triton_kernels"):
            shutil.copytree(ROOT / name, tree / name, ignore=MADE)
        for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
            if (ROOT / name).exists():
                shutil.copy2(ROOT / name, tree / name)
        # Not those for a CUDA build of torch, which no test here installs.
        for objects in (ROOT / "build").glob("cpu-*"):
            shutil.copytree(objects, tree / "build" / objects.name)
        return tree

    return make
