"""The package installs as a wheel, editable, from its source distribution, and without a compiler; and then it works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastcl.backends import extension

from .conftest import Environment, run

pytestmark = pytest.mark.slow

MakeTree = Callable[[], Path]
LIBRARY = f"fastcl/{extension.CPU}"

# The op against its equation, by whatever backend `auto` takes.
ONE_OP = """
import torch, fastcl
x, y = torch.arange(6.0).reshape(3, 2) / 7, torch.arange(8.0).reshape(4, 2) / 5
torch.testing.assert_close(fastcl.pair_reduce(x, y), torch.logsumexp(x @ y.T, 1))
"""
WHERE = "import fastcl, fastcl.triton_kernels as t; print(fastcl.__file__); print(t.__file__)\n"
# A pair function of a user's own, compiled against the headers that are installed.
OWN_PAIR = """
import torch, fastcl
from fastcl.equation.intrinsics import exp

class Mine(fastcl.pairs.PairFunction, name="mine"):
    @staticmethod
    def value(z):
        return z * exp(-z)

x = torch.arange(6.0).reshape(3, 2) / 7
z = x @ x.T
r = fastcl.pair_reduce(x, pair=Mine(), reduce="sum", backend="cpu")
torch.testing.assert_close(r, (z * torch.exp(-z)).sum(1))
"""
LOADED = "from fastcl.backends import extension; print(extension.library is not None, extension.reason)\n"


def where(environment: Environment, cwd: Path | None = None) -> list[Path]:
    return [Path(line).parent for line in environment.execute(WHERE, cwd).split()]


def doctor(environment: Environment) -> str:
    """What `fastcl doctor` says, on one line."""
    return " ".join(run([environment.python.with_name("fastcl"), "doctor"], environment.folder).split())


def test_wheel(make_tree: MakeTree, environment: Environment) -> None:
    tree = make_tree()
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        tree / "dist",
    ]
    run([*build, tree], tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-py3-none-linux" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"fastcl/{path.relative_to(tree / 'fastcl')}" for path in (tree / "fastcl").rglob("*.py")}
    kernels = {f"fastcl/triton_kernels/{path.name}" for path in (tree / "triton_kernels").glob("*.py")}
    built = json.loads(zipfile.ZipFile(wheel).read("fastcl/build_facts.json"))
    headers = {f"fastcl/csrc/{name}" for name in built["headers"]}
    expected = sources | kernels | headers | {"fastcl/py.typed", "fastcl/build_facts.json", LIBRARY}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("/licenses/LICENSE") for name in names)

    environment.install(wheel)
    site = environment.folder / "lib"
    assert all(folder.is_relative_to(site) for folder in where(environment))
    environment.execute(ONE_OP)
    assert environment.execute(LOADED).split() == ["True", "None"]
    assert "in use yes" in doctor(environment)
    (environment.folder / "mine.py").write_text(OWN_PAIR)
    environment.execute("import mine", env={"FASTCL_CACHE": str(environment.folder / "kept")})
    assert list((environment.folder / "kept").glob("pair-*.so"))


def test_editable(make_tree: MakeTree, environment: Environment) -> None:
    tree = make_tree()
    environment.install("--editable", tree)
    places = [tree / "fastcl", tree / "triton_kernels"]
    assert where(environment) == places
    assert where(environment, cwd=tree) == places
    assert where(environment, cwd=tree / "fastcl") == places
    environment.execute(ONE_OP)
    assert environment.execute(LOADED).split() == ["True", "None"]

    # An edit to a Python file is seen at once.
    (tree / "fastcl" / "version.py").write_text('__version__ = "9.9"\n')
    assert environment.execute("import fastcl; print(fastcl.__version__)") == "9.9\n"

    # A later build without kernels does not leave the old ones behind.
    environment.install("--editable", tree, env={"FASTCL_BUILD_CPU": "0"})
    assert not (tree / LIBRARY).exists()
    assert "FASTCL_BUILD_CPU=0 was set when it was built" in environment.execute(LOADED)
    environment.execute(ONE_OP)


def test_source_distribution(make_tree: MakeTree, environment: Environment, tmp_path: Path) -> None:
    tree = make_tree()
    backend = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    run([sys.executable, "-c", backend], tree)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for folder in ("csrc", "triton_kernels", "fastcl"):
        files = {path.relative_to(tree) for path in (tree / folder).rglob("*") if path.is_file()}
        # Notes, which the code needs none of, and what Python made of the modules beside them.
        files -= {path for path in files if path.suffix in (".md", ".pyc")}
        assert {path for path in files if not (unpacked / path).is_file()} == set()

    # Every header is there: the objects of `make setup` would be compiled again if one of their headers were gone.
    (tree / "build").rename(unpacked / "build")
    environment.install(unpacked)
    assert environment.execute(LOADED).split() == ["True", "None"]
    environment.execute(ONE_OP)


@pytest.mark.parametrize("missing", ["CXX names none", "PATH has none"])
def test_without_what_a_build_needs(
    missing: str, make_tree: MakeTree, environment: Environment, tmp_path: Path
) -> None:
    env = {"CXX": "/nonexistent/g++"}
    reason = "no C++ compiler was found (tried /nonexistent/g++)"
    if missing == "PATH has none":
        (tmp_path / "empty").mkdir()
        env, reason = (
            {"PATH": str(tmp_path / "empty"), "CXX": ""},
            "no C++ compiler was found (tried g++, clang++, c++)",
        )
    tree = make_tree()
    said = environment.install(tree, env=env)
    assert f"fastcl: left out cpu: {reason}" in said
    assert "-py3-none-any.whl" in said  # it runs anywhere
    environment.execute(ONE_OP)
    said = doctor(environment)
    assert f"in use no: the compiled kernels were left out: {reason}" in said
    assert "--no-build-isolation" in said
    assert "apt install" in said


def test_wanted_kernels_that_cannot_be_built_are_an_error(make_tree: MakeTree, environment: Environment) -> None:
    env = {"CXX": "/nonexistent/g++", "FASTCL_BUILD_CPU": "1"}
    with pytest.raises(subprocess.CalledProcessError) as raised:
        environment.install(make_tree(), env=env)
    assert "FASTCL_BUILD_CPU=1, but no C++ compiler was found" in raised.value.output


def test_a_source_that_does_not_compile_is_an_error(make_tree: MakeTree, environment: Environment) -> None:
    tree = make_tree()
    (tree / "csrc" / "cpu" / "wrong.cpp").write_text("int wrong( {\n")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        environment.install(tree)
    assert "fastcl's kernels did not compile" in raised.value.output
    assert "FASTCL_BUILD_CPU=0" in raised.value.output


def test_a_changed_source_alone_is_compiled_again(make_tree: MakeTree) -> None:
    tree = make_tree()
    for source in (tree / "csrc").glob("c*/**/*.cpp"):  # a small build
        if source.name != "tensors.cpp":
            source.unlink()
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    baseline_only = {f"FASTCL_BUILD_{isa}": "0" for isa in ("AVX2", "AVX512", "AMX")}
    run(build, tree, baseline_only)
    assert json.loads((tree / "fastcl" / "build_facts.json").read_text())["cpu_isas"] == ["baseline"]
    os.utime(tree / "csrc" / "isa.cpp")
    compiled = [line for line in run(build, tree, baseline_only).splitlines() if " -c " in line]
    assert len(compiled) == 1
    assert "csrc/isa.cpp" in compiled[0]
