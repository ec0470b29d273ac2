"""Whole losses by csrc/cuda/aligned.cpp: against the definition in float64, and launch by launch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.backends.aligned import Told
from fastcl.backends.cuda import aligned, launches
from fastcl.equation.problem import CUDA_ALIGNED
from fastcl.functional import at_once
from tests.objectives.test_at_once import LOSSES, NUMBERS, F, Loss, loss_of

from .emulation import EVERYTHING, emulated

SUMS = [name for name in LOSSES if name.startswith(("siglip", "f_micl"))]
# Either view with itself is a sweep of its own, forward too.
OWN_SWEEPS = ("dhel", "f_micl js")
# n = 8: one ragged block; 140: two, and groups for stacked views; 260: their period; d: multiples of nothing, and wide rows.
SIZES = ((8, 5), (140, 33), (260, 136)) if EVERYTHING else ((9, 5), (140, 33))
# Half of what separates two numbers of the rows' dtype near 1: weights are rounded to it, and so is each entry of a gradient.
UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-12}


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def rows(n: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    return x.to(dtype), (x + torch.randn(n, d, generator=g)).to(dtype)


def leaves(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in given)


def in_one_node(loss: Tensor) -> bool:
    """Whether the node is _AtOnce; of float16 rows loss_scaling.py has one before and after it."""
    node = loss.grad_fn
    if node is not None and node.name() == "_LeaveBackward":
        node = node.next_functions[0][0]
    return node is not None and node.name() == "_AtOnceBackward"


def as_swept(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Rows in float64 with the values that the kernels multiply, whose gradient is that of the rows before they were rounded."""
    x = torch.nn.functional.normalize(x, eps=1e-12) if normalize else x
    if dtype == torch.float32:  # tf32: what rounds is within the tolerance
        return x
    return x + (x.detach().to(dtype).double() - x.detach())


def definition(loss: Loss, x: Tensor, y: Tensor, normalize: bool, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss of the rows as the kernels multiply them, in float64, and leaves of its own."""
    mine = [t.detach().double().requires_grad_() for t in ((x,) if y is x else (x, y))]
    u, v = (as_swept(t, x.dtype, normalize) for t in (mine[0], mine[-1]))
    return loss(u, v, backend="reference", normalize=False, **arguments), mine


def close(found: Tensor, exact: Tensor, dtype: torch.dtype, terms: Tensor | float = 0.0) -> None:
    """A gradient: its error against its own size, and that of what was added up to it."""
    assert found.dtype == dtype and found.shape == exact.shape
    size = max(float(exact.norm()), float(terms))
    assert float((found.double() - exact).norm()) <= 3.0 * UNIT[dtype] * size, (found, exact)


def check(loss: Loss, x: Tensor, y: Tensor, normalize: bool = True, upstream: float = 3.0, **arguments: Any) -> None:
    """Value and gradients of what wants some."""
    value = loss(x, y, backend="cuda", normalize=normalize, **arguments)
    exact, mine = definition(loss, x, y, normalize, **arguments)
    assert in_one_node(value)
    tolerance = 2e-3 if x.dtype == torch.float32 else 2e-5
    torch.testing.assert_close(value.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    given = (x,) if y is x else (x, y)
    found = torch.autograd.grad(upstream * value, [t for t in given if t.requires_grad])
    wanted = torch.autograd.grad(upstream * exact, [t for t, of in zip(mine, given, strict=True) if of.requires_grad])
    for f, w in zip(found, wanted, strict=True):
        close(f, w, x.dtype, 2.0 * w.norm())


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str) -> None:
    with emulated():
        for n, d in SIZES:
            check(LOSSES[name], *leaves(*rows(n, d)))


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("f_micl") or "cosine" in name])
def test_rows_as_they_are(name: str) -> None:
    with emulated():
        check(LOSSES[name], *leaves(*(0.3 * t for t in rows(20, 7))), normalize=False)


@pytest.mark.parametrize("name", LOSSES)
def test_the_launches_of_a_loss(name: str) -> None:
    """Three forward and at most three backward, and nothing of torch's between them."""
    x, y = leaves(*rows(10, 12))
    own = name in OWN_SWEEPS
    with emulated() as session:
        value = LOSSES[name](x, y, backend="cuda")
        assert session.names == ["aligned_rows", *["fused_rows"] * (1 + own), "aligned_finish"]
        session.names.clear()
        torch.autograd.grad(value, (x, y))
        assert session.names[-1] == "aligned_gradients" and set(session.names[:-1]) == {"fused_gradient"}
        assert len(session.names) <= 3
        session.names.clear()
        torch.autograd.grad(LOSSES[name](x, y.detach(), backend="cuda"), x)
        assert len(session.names) <= (5 if not own else 6)
        session.names.clear()
        with torch.no_grad():
            assert LOSSES[name](x, y, backend="cuda").grad_fn is None
        assert len(session.names) == 3 + own


def test_at_most_2048_rows_are_three_launches_and_more_take_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    assert aligned.MOST == 2048
    monkeypatch.setattr(aligned, "MOST", 9)
    with emulated() as session:
        session.tamper = lambda name, struct: None
        assert in_one_node(F.clip(*leaves(*rows(9, 8)), logit_scale=3.0, backend="cuda"))
        assert not in_one_node(F.clip(*leaves(*rows(10, 8)), logit_scale=3.0, backend="cuda"))


@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip", "f_micl js"])
def test_nothing_of_the_size_of_the_pairs_is_allocated(name: str) -> None:
    n, d, largest = 600, 16, 0
    pairs = (2 * n if name == "nt_xent" else n) ** 2

    def watch(kernel: str, struct: list[int]) -> None:
        nonlocal largest
        begin = ctypes.c_uint64()
        for word in struct:
            size = session.schedule.emulated_block(ctypes.c_uint64(word), ctypes.byref(begin)) if word >> 20 else 0
            largest = max(largest, size)

    with emulated() as session:
        session.tamper = watch
        LOSSES[name](*leaves(*rows(n, d)), backend="cuda").backward()
    assert 2 * n * d <= largest <= pairs // 2  # bytes: pairs of 16 bits would take four times as many


@pytest.mark.parametrize("name", LOSSES)
def test_one_view_alone(name: str) -> None:
    x, y = rows(12, 9)
    with emulated():
        check(LOSSES[name], *leaves(x), y)
        if name not in ("f_micl", "f_micl sum", "f_micl tsallis", "f_micl cosine", "dhel anchor"):
            check(LOSSES[name], x, *leaves(y))
        leaf = leaves(x)[0]
        check(LOSSES[name], leaf, leaf)


@pytest.mark.parametrize("name", ["info_nce", "siglip"])
def test_rows_beyond_the_pairs(name: str) -> None:
    (x, _), (y, _) = rows(9, 6), rows(14, 6, seed=1)
    with emulated():
        check(LOSSES[name], *leaves(x, y))


@pytest.mark.parametrize("name", ["clip", "nt_xent", "dhel"])
def test_float16(name: str) -> None:
    """Weights of 4e-6 too, of which float16 has six bits: they are kept in a unit of their own."""
    with emulated():
        check(LOSSES[name], *leaves(*rows(20, 9, torch.float16)))
        x = torch.eye(16).mul(2.0).add(0.01 * torch.randn(16, 16)).half()
        if name != "dhel":
            arguments = {"logit_scale": 9.0} if name == "clip" else {"temperature": 1.0 / 9.0}
            check(LOSSES[name], *leaves(x, x), upstream=16.0, **arguments)


@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip", "f_micl", "f_micl vlc"])
def test_float32_as_tf32(name: str, tf32: None) -> None:
    with emulated():
        check(LOSSES[name], *leaves(*rows(20, 9, torch.float32)))


def test_strides_of_any_kind() -> None:
    wide = torch.randn(24, 26).bfloat16()
    with emulated():
        for x, y in ((wide[:, ::2], wide[:, 1::2]), (wide.t()[:13, :8].t()[:, ::1], wide[::3, :13])):
            check(LOSSES["clip"], x.detach().requires_grad_(), y.detach().requires_grad_())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", NUMBERS)
def test_learned_numbers(name: str, normalize: bool) -> None:
    numbers = NUMBERS[name]
    if name == "f_micl" and not normalize:
        return
    x, y = leaves(*(t if normalize else 0.3 * t for t in rows(70, 11)))
    mine = {key: torch.tensor(v, requires_grad=True) for key, v in numbers.items()}
    exact = {key: torch.tensor(v, dtype=torch.float64, requires_grad=True) for key, v in numbers.items()}
    function = loss_of(name)
    with emulated(seed=3):
        value = function(x, y, backend="cuda", normalize=normalize, **mine)
        assert in_one_node(value)
        found = torch.autograd.grad(value, [x, *mine.values()], retain_graph=True)
        alone = torch.autograd.grad(value, list(mine.values()))  # the count of finished blocks is 0 again
    definition_, (exact_x, _) = definition(function, x, y, normalize, **exact)
    wanted = torch.autograd.grad(definition_, [exact_x, *exact.values()])
    close(found[0], wanted[0], x.dtype, 2.0 * wanted[0].norm())
    for f, again, w in zip(found[1:], alone, wanted[1:], strict=True):
        assert torch.equal(f, again) and f.dtype == torch.float32
        torch.testing.assert_close(f.double(), w, rtol=8 * UNIT[x.dtype], atol=2 * UNIT[x.dtype])


def test_every_schedule_has_the_same_bits() -> None:
    x, y = leaves(*rows(140, 9))
    scale = torch.tensor(8.0, requires_grad=True)
    found = []
    for seed in (0, 1, 2):
        with emulated(seed=seed):
            value = F.clip(x, y, logit_scale=scale, backend="cuda")
            found.append((value.detach(), *torch.autograd.grad(value, (x, y, scale))))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


# ---- ends of the range ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "nt_xent", "f_micl"])
def test_norms_from_one_end_of_the_range_to_the_other(name: str) -> None:
    x, y = rows(10, 8)
    norms = torch.tensor([1e-37, 1e37, 1e-13, 1e-11, 1e-20, 1e20, 1.0, 3e-12, 1e30, 0.0]).unsqueeze(1)
    x = torch.nn.functional.normalize(x.double()).mul(norms).bfloat16().requires_grad_()
    with emulated():
        value = LOSSES[name](x, y, backend="cuda")
        (found,) = torch.autograd.grad(1e-3 * value, x)
    exact, (exact_x, _) = definition(LOSSES[name], x, y, True)
    torch.testing.assert_close(value.double(), exact.detach(), rtol=2e-5, atol=2e-5)
    (wanted,) = torch.autograd.grad(1e-3 * exact, exact_x)
    for i in range(10):  # each on its own scale, and infinite where bfloat16 has no such number
        error = (found[i].double() - wanted[i].bfloat16().double()).nan_to_num(0.0, math.inf, math.inf).norm()
        assert float(error) <= 8 * UNIT[x.dtype] * float(wanted[i].norm()) + 1e-40, (i, found[i], wanted[i])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip", "f_micl"])
def test_what_is_no_number_shows(name: str, poison: float) -> None:
    x, y = rows(6, 4)
    x[2, 1] = poison
    x.requires_grad_()
    with emulated():
        value = LOSSES[name](x, y, backend="cuda")
        assert value.isnan() and torch.autograd.grad(value, x)[0][2].isnan().all()


@pytest.mark.parametrize("large", [60.0, 300.0])
@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_large_logits(name: str, large: float) -> None:
    arguments = {"logit_scale": large} if name == "clip" else {"temperature": 1.0 / large}
    with emulated():
        check(LOSSES[name], *leaves(*rows(40, 8)), **arguments)


@pytest.mark.parametrize("name", ["clip", "nt_xent", "dhel"])
def test_rows_whose_normalisers_lie_far_apart(name: str) -> None:
    """One exponential no longer serves both terms of a weight: r and c go from some 3 to some 300."""
    lengths = torch.linspace(0.1, 5.0, 24).unsqueeze(1)
    arguments = {"logit_scale": 3.0} if name == "clip" else {"temperature": 1.0 / 3.0}
    with emulated():
        check(LOSSES[name], *leaves(*((lengths * t).bfloat16() for t in rows(24, 8))), normalize=False, **arguments)


# ---- autograd around the node ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "nt_xent", "siglip", "f_micl js"])
def test_backward_as_often_as_asked_and_of_many_upstreams(name: str) -> None:
    x, y = leaves(*rows(7, 5))
    with emulated():
        loss = LOSSES[name](x, y, backend="cuda")
        once = torch.autograd.grad(loss, [x, y], retain_graph=True)
        twice = torch.autograd.grad(loss, [x, y], torch.tensor(-2.0), retain_graph=True)
        for a, b in zip(once, twice, strict=True):
            assert torch.equal(b, -2.0 * a)
        upstream = torch.tensor([1.0, -0.5, 0.0])
        batched = torch.autograd.grad(loss, [x, y], upstream, is_grads_batched=True, retain_graph=True)
        for one, all_ in zip(once, batched, strict=True):
            torch.testing.assert_close(all_.float(), upstream[:, None, None] * one.float())
        with torch.autocast("cpu"):
            assert all(map(torch.equal, once, torch.autograd.grad(loss, [x, y], retain_graph=True)))
        with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
            torch.autograd.grad(loss, [x, y], create_graph=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_changed_in_place(normalize: bool) -> None:
    x, y = leaves(*rows(6, 4))
    with emulated():
        loss = F.clip(x, y, logit_scale=3.0, normalize=normalize, backend="cuda")
        with torch.no_grad():
            x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_queue_may_change_once_it_was_normalised() -> None:
    x, queue = rows(6, 4)
    x.requires_grad_()
    with emulated():
        loss = F.info_nce(x, queue, backend="cuda")
        wanted = torch.autograd.grad(F.info_nce(x, queue.clone(), backend="cuda"), x)[0]
        queue.zero_()
        assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


def test_saved_tensors_pass_hooks_of_their_own_dtype_alone() -> None:
    x, y = leaves(*rows(6, 4))
    with emulated():
        wanted = torch.autograd.grad(F.clip(x, y, logit_scale=3.0, backend="cuda"), [x, y])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            hooked = F.clip(x, y, logit_scale=3.0, backend="cuda")
        assert all(map(torch.equal, torch.autograd.grad(hooked, [x, y]), wanted))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t):
            cast = F.clip(x, y, logit_scale=3.0, backend="cuda")
        with pytest.raises(TypeError, match="in which the forward saved it"):
            cast.backward()


# ---- what is left to the formula ------------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = leaves(*rows(6, 8))
    wide = leaves(*rows(6, 264))
    half = leaves(*rows(6, 8, torch.float16))

    def clip(x: Tensor, y: Tensor, **more: Any) -> Tensor:
        return F.clip(x, y, logit_scale=3.0, backend="cuda", **more)

    with emulated() as session:
        session.tamper = lambda name, struct: None
        others = [
            clip(x.double(), y.double()),
            clip(x.float(), y.float()),  # exact float32
            clip(x, y, groups=torch.arange(6)),
            clip(x, y, reduction="none").sum(),
            clip(*wide),
            clip(x, y.detach()[:, ::1].clone().requires_grad_(), label_smoothing=0.1),
            F.siglip(*half, logit_scale=3.0, logit_bias=0.0, backend="cuda"),
            F.f_micl(x, y, normalize=False, backend="cuda"),
            F.clip(x, y, logit_scale=torch.tensor(3.0, dtype=torch.float64, requires_grad=True), backend="cuda"),
        ]
        with torch.autocast("cpu", torch.float16):
            others.append(clip(x, y))
        with torch.autocast("cpu", torch.bfloat16):
            assert in_one_node(clip(x, y))
        for form in ("strip", "hopper"):
            monkeypatch.setenv("FASTCL_CUDA", form)
            others.append(clip(x, y))
        monkeypatch.delenv("FASTCL_CUDA")
        assert not any(map(in_one_node, others))
        assert in_one_node(clip(x, y)) and in_one_node(clip(*half))
        session.names.clear()


def test_a_wide_loss_without_gradients_is_served() -> None:
    x, y = rows(6, 264)
    with emulated() as session:
        value = F.clip(x, y, logit_scale=3.0, backend="cuda")
        assert session.names == ["aligned_rows", "fused_rows", "aligned_finish"]
    exact, _ = definition(LOSSES["clip"], x, y, True, logit_scale=3.0)
    torch.testing.assert_close(value.double(), exact.detach(), rtol=2e-5, atol=2e-5)


# ---- the ops --------------------------------------------------------------------------------------------------------------


def told(**changes: Any) -> Told:
    whole = at_once.Whole(outer="contrast", reduce="logsumexp", columns=True)
    x, y = rows(6, 4)
    return at_once._told(whole, True, 1.0, 1.0, x, y)._replace(**changes)


def test_the_ops_take_what_the_fingerprint_says() -> None:
    with emulated():
        schema = torch.ops.fastcl_emulated.cuda_aligned_loss.default._schema
    assert str(schema).partition("(")[2].partition(") ->")[0] == CUDA_ALIGNED


def test_an_op_refuses_what_its_kernels_must_not_read() -> None:
    x, y = rows(6, 4)
    one = torch.tensor(1.0)
    facts = (108, 163 << 10)

    def forward(x: Tensor, y: Tensor, a: Tensor | None = one, **changes: Any) -> Any:
        return launches.ops.cuda_aligned_loss(
            x, y, a, None, 0.0, 0.0, *told(**changes), [True] * 4 + [False] * 2, *facts
        )

    with emulated() as session:
        for given in (
            (x, y[:3]), (x, y[:, :3]), (x[0], y), (x.double(), y.double()), (x, y.half()), (x, y, torch.ones(2)),
            (x, y, one.double()),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="expected"):
                forward(*given)
        for changes in (
            {"sides": "yx"}, {"outer": "pooled"}, {"sides": "xx"}, {"pair_numbers": [1.0]}, {"pair": "none"},
            {"positive": "none"}, {"operand": "none"},
        ):  # fmt: skip
            with pytest.raises(ValueError, match="expected"):
                forward(x, y, **changes)
        assert not session.names
        _, swept, state = forward(x, y)

        def backward(*given: Any) -> Any:
            return launches.ops.cuda_aligned_loss_backward(*given, *told(), [True] * 4 + [False] * 2, *facts)

        backward(one, x, y, swept, state, 6, 4)
        for given in (
            (one, x, y, swept[:5], state, 6, 4), (one, x, y, swept, state[:9], 6, 4), (one, x[:3], y, swept, state, 6, 4),
            (one, x, None, swept, state, 6, 4), (one.double(), x, y, swept, state, 6, 4), (one, x, y, swept, state, 12, 4),
            (one, x, y, swept, state, 6, 9), (one, x.float(), y, swept, state, 6, 4),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="expected"):
                backward(*given)
