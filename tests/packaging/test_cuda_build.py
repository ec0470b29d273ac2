"""Where setup.py finds the CUDA toolkit, and the flags that it gives to nvcc; a stand-in nvcc answers as nvcc does."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from setuptools.errors import CompileError

from .conftest import ROOT

NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  *) echo '#$ _SPACE_= '; echo "#$ TOP={top}/bin/.." >&2; echo '#$ LIBRARIES=  "-L{top}/bin/../lib64"' ;;
esac
"""


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastcl_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit, and on the path a script in another folder that leads to its nvcc."""
    home = tmp_path / "cuda-13.0"
    for folder in (home / "bin", tmp_path / "local" / "bin"):
        folder.mkdir(parents=True)
        nvcc = folder / "nvcc"
        nvcc.write_text(NVCC.format(top=home))
        nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/local/bin:/usr/bin:/bin")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return home


def torch_with_cuda(version: str | None) -> SimpleNamespace:
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=version))


def test_the_toolkit_is_the_one_that_nvcc_names(setup: ModuleType, toolkit: Path) -> None:
    cuda = setup.Cuda.find(torch_with_cuda("13.0"))
    assert (cuda.home, cuda.version) == (toolkit, "13.0.88")
    assert cuda.archs == ["8.0", "9.0+PTX", "10.0", "12.0+PTX"]
    assert cuda.library_dirs == [f"{toolkit}/lib64"]


def test_cuda_home_comes_first(setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup.Cuda.find(torch_with_cuda("13.1")).nvcc == str(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(setup.LeftOut, match=r"^nvcc was not found \(looked in /nonexistent\)"):
        setup.Cuda.find(torch_with_cuda("13.0"))


def test_architectures(setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 12.0+PTX")
    assert setup.Cuda.find(torch_with_cuda("13.0")).arch_flags() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert setup.Cuda.find(torch_with_cuda("13.0")).hopper_flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert setup.Cuda.find(torch_with_cuda("13.0")).hopper_flags() == []
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(CompileError, match=r"expected names such as 9\.0 or 9\.0\+PTX, got 'Hopper'"):
        setup.Cuda.find(torch_with_cuda("13.0")).arch_flags()


def test_code_is_compressed_where_every_driver_takes_it(setup: ModuleType, toolkit: Path) -> None:
    """Drivers of before CUDA 12.4 do not, and nvcc 12 makes code for them; those of CUDA 13 all do."""
    for release, flags in (
        ("12.8.93", []),
        ("13.0.88", ["--compress-mode=size"]),
        ("14.1.2", ["--compress-mode=size"]),
    ):
        assert setup.Cuda("nvcc", toolkit, release, ["8.0"], []).size_flags() == flags


def test_the_default_is_what_nvcc_knows_of_it(setup: ModuleType, toolkit: Path) -> None:
    nvcc = toolkit / "bin" / "nvcc"
    known = "  --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_90a\\n' ;;"
    for script in (nvcc, toolkit.parent / "local" / "bin" / "nvcc"):
        script.write_text(NVCC.format(top=toolkit).replace('case "$1" in\n', f'case "$1" in\n{known}\n'))
    assert setup.Cuda.find(torch_with_cuda("13.0")).archs == ["8.0", "9.0+PTX"]


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "torch 2.13.0 is not a CUDA build"), ("12.8", "nvcc is 13.0.88, but torch was built with CUDA 12.8")],
)
def test_left_out(setup: ModuleType, toolkit: Path, version: str | None, reason: str) -> None:
    with pytest.raises(setup.LeftOut) as raised:
        setup.Cuda.find(torch_with_cuda(version))
    assert raised.value.reason == reason
    assert setup.REBUILD in raised.value.remedy


def test_asked_for_they_need_no_torch(setup: ModuleType, toolkit: Path) -> None:
    """As under build isolation; for a torch with a later CUDA the same kernels serve."""
    assert setup.Cuda.find(None).version == setup.Cuda.find(torch_with_cuda("14.1")).version == "13.0.88"


def test_parts_can_be_asked_for_and_refused(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible() -> None:
        raise setup.LeftOut("it is not there", "get it")

    facts: dict[str, dict[str, dict[str, str]]] = {"left_out": {}}
    assert setup.attempt("cuda", facts, impossible) is None
    assert facts["left_out"]["cuda"] == {"reason": "it is not there", "remedy": "get it"}
    monkeypatch.setenv("FASTCL_BUILD_CUDA", "0")
    assert setup.attempt("cuda", facts, lambda: 1) is None
    assert facts["left_out"]["cuda"]["reason"] == "FASTCL_BUILD_CUDA=0 was set when it was built"
    monkeypatch.setenv("FASTCL_BUILD_CUDA", "1")
    with pytest.raises(CompileError, match=r"FASTCL_BUILD_CUDA=1, but it is not there\. To mend"):
        setup.attempt("cuda", facts, impossible)
    monkeypatch.setenv("FASTCL_BUILD_CUDA", "yes")
    with pytest.raises(CompileError, match=r"FASTCL_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"):
        setup.attempt("cuda", facts, lambda: 1)


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "command"), [("x86_64", "g++"), ("aarch64", "aarch64-linux-gnu-g++")])
def test_every_glibc_from_2_28_on_has_what_is_asked_for(
    setup: ModuleType, machine: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linked here, where glibc may be newer: all that cudart takes of threads and loader, at versions of before 2.29."""
    if shutil.which(command) is None or platform.libc_ver()[0] != "glibc":
        pytest.skip(f"needs {command} and glibc")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    compiler = setup.Compiler([command], "", setup.CXX_FLAGS)
    graph = setup.Graph(tmp_path, [])
    glibc = graph.old_glibc(compiler)
    sources = [(ROOT / "csrc/cuda/glibc" / f"{Path(name).name}.cpp").read_text() for name in glibc]
    names = [name for text in sources for name in re.findall(r"OLD\((\w+)\)", text) if name != "name"]
    assert len(names) > 40
    declared = "\n".join(f'extern "C" void {name}();' for name in names)
    (tmp_path / "all.cpp").write_text(f"{declared}\nvoid all() {{ {' '.join(f'{name}();' for name in names)} }}\n")
    graph.rules += setup.rules(compiler, [], ["-shared", "-fPIC", "-fno-builtin", *glibc])
    graph.edges.append(f"build all.so: link all.cpp | {' '.join(glibc)}")
    graph.run(setup.find_ninja())
    said = subprocess.run(
        ["readelf", "-W", "--dyn-syms", tmp_path / "all.so"], capture_output=True, text=True, check=True
    ).stdout
    versions = dict(re.findall(r" (\w+)@GLIBC_([\d.]+)", said))
    assert set(names) <= set(versions)
    assert {name: version for name, version in versions.items() if tuple(map(int, version.split("."))) > (2, 28)} == {}
