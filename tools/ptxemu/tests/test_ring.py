"""A ring of stages between the copy engine and wgmma, as Hopper kernels have it: right in any schedule, and no order left out of it goes unseen."""

import pathlib

import pytest

from tools.ptxemu import Deadlock, MissingWait, Module, SharedRace, TensorMap, Uninitialized, nvcc

from .launching import needs_nvcc, needs_torch

pytestmark = [pytest.mark.slow, needs_nvcc, needs_torch]
torch = pytest.importorskip("torch")
SOURCE = pathlib.Path(__file__).parent / "kernels" / "ring_sm90.cu"


@pytest.fixture(scope="module")
def ptx():
    text = nvcc.compile_ptx(SOURCE, "sm_90a")
    assert ".target sm_90a" in text
    return text


def product(text, seed=0, swizzle=128):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 320, generator=generator).bfloat16() for _ in range(2))
    c = torch.empty(64, 64)
    maps = [TensorMap(a, (64, 64), swizzle), TensorMap(b, (64, 64), swizzle), TensorMap(c, (64, 64))]
    Module(text).launch("ring", 1, 160, 0, [*maps, 5], seed=seed, uninitialized=[c], max_instructions=3_000_000)
    return c, a.double() @ b.double().T


@pytest.mark.parametrize("seed", range(4))
def test_product(ptx, seed):
    got, want = product(ptx, seed)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_a_launch_from_host_code_runs_what_only_sm_90a_has():
    """`-arch=sm_90a` once made an image of compute_90 beside the right one, and the empty one ran."""
    library = nvcc.load_host_library(SOURCE, arch="sm_90a")
    assert [k for m in library.modules for k in m.kernels] == ["ring"]


# What is left out or changed in the source; how the emulator sees it, in some schedule.
MISTAKES = {
    "no proxy fence before the store": ("fence.proxy.async.shared::cta;", "", SharedRace),
    "wrong transaction count": (", 16384;", ", 16400;", Deadlock),
    "a phase too short": (", 16384;", ", 8192;", (MissingWait, SharedRace, Deadlock)),
    "the box is read before its phase": (
        "wait(full + 8 * s, k >> 1 & 1);",
        "",
        (MissingWait, SharedRace, Uninitialized),
    ),
    "a stage is released by one warp too few": ("[%0], 4;", "[%0], 3;", (SharedRace, MissingWait)),
    "a stage is released while it is multiplied": ("wgmma.wait_group.sync.aligned 0;", "", (SharedRace, MissingWait)),
    "the store is not waited for": ("cp.async.bulk.wait_group.read 0;", "", MissingWait),
}


def mistaken(old, new, tmp_path):
    text = SOURCE.read_text()
    assert text.count(old) == 1, old
    path = tmp_path / "ring.cu"
    path.write_text(text.replace(old, new))
    return nvcc.compile_ptx(path, "sm_90a")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen(name, tmp_path):
    old, new, expected = MISTAKES[name]
    text = mistaken(old, new, tmp_path)
    with pytest.raises(expected):
        [product(text, seed) for seed in range(4)]


def test_another_swizzle_than_the_descriptors_gives_another_product(ptx):
    got, want = product(ptx, swizzle=0)
    assert (got.double() - want).abs().max() > 1
