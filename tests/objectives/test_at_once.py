"""Losses in one call: against the definition in float64, and through everything that autograd may do around one node."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl.backends import extension
from fastcl.functional import at_once

pytestmark = pytest.mark.skipif(extension.library is None, reason="needs the CPU's kernels, which were not built")

Loss = Callable[..., Tensor]
F = fastcl.functional


def loss_of(name: str, **arguments: Any) -> Loss:
    return lambda x, y, **more: getattr(F, name)(x, y, **(arguments | more))


LOSSES: dict[str, Loss] = {
    "clip": loss_of("clip", logit_scale=20.0),
    "clip sum": loss_of("clip", logit_scale=7.0, reduction="sum"),
    "info_nce": loss_of("info_nce", temperature=0.1),
    "nt_xent": loss_of("nt_xent", temperature=0.2),
    "siglip": loss_of("siglip", logit_scale=10.0, logit_bias=-5.0),
    "dcl": loss_of("dcl"),
    "dhel": loss_of("dhel"),
    "dhel anchor": loss_of("dhel", form="anchor", reduction="sum"),
    "f_micl": loss_of("f_micl"),
    "f_micl sum": loss_of("f_micl", reduction="sum", mu=1.5, beta=0.7, alpha=3.0),
    "f_micl js": loss_of("f_micl", divergence="js", negatives="xx+yy"),
    "f_micl vlc": loss_of("f_micl", divergence="vlc", negatives="xy"),
    "f_micl tsallis": loss_of("f_micl", divergence="tsallis", q=1.5),
    "f_micl cosine": loss_of("f_micl", divergence="pearson", similarity="cosine"),
}
NUMBERS: dict[str, dict[str, float]] = {  # that may be learned
    "clip": {"logit_scale": 9.0},
    "nt_xent": {"temperature": 0.4},
    "info_nce": {"temperature": 0.2},
    "siglip": {"logit_scale": 8.0, "logit_bias": -3.0},
    "dcl": {"temperature": 0.3},
    "dhel": {"temperature": 0.3},
    "f_micl": {"beta": 0.8, "mu": 1.3},
}
MORE_COLUMNS = ("info_nce", "siglip")
SIDES = ("clip", "nt_xent", "f_micl", "f_micl js")


def rows(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    return x, x + torch.randn(n, d, generator=g)


def in_one_node(loss: Tensor) -> bool:
    return loss.grad_fn is not None and loss.grad_fn.name() == "_AtOnceBackward"


def check(loss: Loss, x: Tensor, y: Tensor, tolerance: float = 2e-5, **arguments: Any) -> None:
    """Value and gradients of these leaves (or views of leaves) against the definition's, in float64."""
    mine = [t for t in (x, y) if t.requires_grad]
    value = loss(x, y, **arguments)
    assert in_one_node(value) == bool(mine)
    exact_x = x.detach().double().requires_grad_(x.requires_grad)
    exact_y = exact_x if y is x else y.detach().double().requires_grad_(y.requires_grad)
    exact = loss(exact_x, exact_y, backend="reference", **arguments)
    torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=tolerance)
    if not mine:
        return
    found = torch.autograd.grad(3.0 * value, mine)
    wanted = torch.autograd.grad(3.0 * exact, [t for t in (exact_x, exact_y) if t.requires_grad])
    for g, e in zip(found, wanted, strict=True):
        assert g.dtype == torch.float32
        size = float(e.abs().amax())
        assert float((g.double() - e).abs().amax()) <= tolerance * max(size, 1e-30), (g, e)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str, normalize: bool) -> None:
    for n, d, wanted in ((2, 3, (True, True)), (5, 2, (True, False)), (33, 16, (False, True)), (300, 7, (True, True))):
        x, y = ((0.5 * t).requires_grad_(w) for t, w in zip(rows(n, d), wanted, strict=True))
        check(LOSSES[name], x, y, normalize=normalize)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [255, 257, 384, 385, 511, 512, 513])
def test_both_directions_of_a_few_hundred_rows(n: int, threads: int) -> None:
    """Up to 512 rows keep their exponentials, in blocks of rows and tiles of columns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for d, wanted in ((40, (True, True)), (3, (True, False)), (3, (False, True))):
            x, y = (t.requires_grad_(w) for t, w in zip(rows(n, d), wanted, strict=True))
            check(LOSSES["clip"], x, y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOSSES)
def test_layouts(name: str) -> None:
    x, y = rows(12, 10)
    wide = torch.randn(12, 20).requires_grad_()
    check(LOSSES[name], (leaf := x.clone().requires_grad_()), leaf)  # y is x
    check(LOSSES[name], wide[:, ::2], wide[:, 1::2])
    check(LOSSES[name], x.t().contiguous().t().requires_grad_(), y.requires_grad_())
    check(LOSSES[name], x, torch.randn(1, 10).requires_grad_().expand(12, 10), normalize=False)
    check(LOSSES[name], x, y.detach())
    with torch.no_grad():
        assert LOSSES[name](x, y).grad_fn is None
        check(LOSSES[name], x.detach(), y.detach())


@pytest.mark.parametrize("name", MORE_COLUMNS)
def test_rows_beyond_the_pairs(name: str) -> None:
    (x, _), (y, _) = rows(9, 6), rows(14, 6, 1)
    for normalize in (True, False):
        check(LOSSES[name], x.clone().requires_grad_(), y.clone().requires_grad_(), normalize=normalize)


@pytest.mark.parametrize("name", LOSSES)
def test_norms_from_one_end_of_the_range_to_the_other(name: str) -> None:
    x, y = rows(10, 8)
    norms = torch.tensor([1e-37, 1e37, 1e-13, 1e-11, 1e-20, 1e20, 1.0, 3e-12, 1e30, 0.0]).unsqueeze(1)
    x = torch.nn.functional.normalize(x.double()).mul(norms).float().requires_grad_()
    y = y.requires_grad_()
    value, exact_x = LOSSES[name](x, y), x.detach().double().requires_grad_()
    exact = LOSSES[name](exact_x, y.detach().double(), backend="reference")
    assert in_one_node(value)
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=2e-5)
    (found,), (wanted,) = torch.autograd.grad(1e-3 * value, x), torch.autograd.grad(1e-3 * exact, exact_x)
    for i in range(10):  # each on its own scale, and infinite where float32 has no such number
        error = (found[i].double() - wanted[i].float().double()).nan_to_num(0.0, math.inf, math.inf).abs().amax()
        assert float(error) <= 1e-4 * float(wanted[i].abs().amax()), (i, found[i], wanted[i])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_shows(name: str, poison: float) -> None:
    x, y = rows(6, 4)
    x[2, 1] = poison
    found = torch.autograd.grad(LOSSES[name](x.requires_grad_(), y), x)[0]
    assert LOSSES[name](x, y).isnan() and found[2].isnan().all()


@pytest.mark.parametrize("large", [60.0, 300.0, 3e4])
@pytest.mark.parametrize("name", ["clip", "info_nce", "nt_xent"])
def test_large_logits(name: str, large: float) -> None:
    argument = {"clip": "logit_scale"}.get(name, "temperature")
    value = large if name == "clip" else 1.0 / large
    x, y = (t.requires_grad_() for t in rows(40, 8))
    z = large  # z is rounded to 2^-24 of itself
    check(LOSSES[name], x, y, tolerance=max(2e-5, 4e-7 * z), **{argument: value})


@pytest.mark.parametrize("name", ["clip", "info_nce", "nt_xent"])
def test_rows_that_round_to_no_loss(name: str) -> None:
    """Aligned rows: weights far below float32's digits have gradients of their own size."""
    x = torch.eye(20).mul(2.0).add(0.01 * torch.randn(20, 20)).requires_grad_()
    for scale in (30.0, 70.0, 120.0):
        argument = {"logit_scale": scale} if name == "clip" else {"temperature": 1.0 / scale}
        check(LOSSES[name], x, (x.detach() + 0.01).requires_grad_(), tolerance=1e-3, **argument)


def test_learned_numbers() -> None:
    x, y = (t.requires_grad_() for t in rows(11, 5))
    for name, numbers in NUMBERS.items():
        loss = loss_of(name)
        for normalize in (True, False):
            mine = {key: torch.tensor(v, requires_grad=True) for key, v in numbers.items()}
            exact = {key: torch.tensor(v, dtype=torch.float64, requires_grad=True) for key, v in numbers.items()}
            value = loss(x, y, normalize=normalize, **mine)
            definition = loss(x.double(), y.double(), normalize=normalize, backend="reference", **exact)
            found = torch.autograd.grad(value, [x, *mine.values()])
            wanted = torch.autograd.grad(definition, [x, *exact.values()])
            for f, w in zip(found, wanted, strict=True):
                torch.testing.assert_close(f.double(), w.double(), rtol=5e-5, atol=5e-5)


# ---- autograd around the node ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIDES)
def test_backward_as_often_as_asked(name: str) -> None:
    x, y = (t.requires_grad_() for t in rows(7, 5))
    loss = LOSSES[name](x, y)
    once = torch.autograd.grad(loss, [x, y], retain_graph=True)
    with torch.no_grad():
        twice = torch.autograd.grad(loss, [x, y], retain_graph=True)
    both = torch.autograd.grad(loss, [x, y], torch.tensor(-2.0), retain_graph=True)
    for a, b, c in zip(once, twice, both, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, -2.0 * a)
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(loss, [x, y], create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        loss.backward(create_graph=True)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("normalize", [True, False])
def test_batched_gradients(name: str, normalize: bool) -> None:
    x, y = (t.requires_grad_() for t in rows(6, 4))
    loss = LOSSES[name](x, y, normalize=normalize)
    upstream = torch.tensor([1.0, -0.5, 0.0])
    batched = torch.autograd.grad(loss, [x, y], upstream, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(upstream):
        for one, all_ in zip(torch.autograd.grad(loss, [x, y], g, retain_graph=True), batched, strict=True):
            torch.testing.assert_close(all_[i], one)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", [*SIDES, "dcl"])
@pytest.mark.parametrize("which", ["x", "y"])
def test_a_backward_that_something_watches_of_one_view_alone(name: str, normalize: bool, which: str) -> None:
    x, y = rows(6, 4)
    mine = (x if which == "x" else y).requires_grad_()
    loss = LOSSES[name](x, y, normalize=normalize)
    (wanted,) = torch.autograd.grad(loss, mine, retain_graph=True, allow_unused=True)
    with torch.autocast("cpu"):
        (cast,) = torch.autograd.grad(loss, mine, retain_graph=True, allow_unused=True)
    (batched,) = torch.autograd.grad(loss, mine, torch.tensor([1.0, -2.0]), is_grads_batched=True, allow_unused=True)
    torch.testing.assert_close(cast, wanted)
    torch.testing.assert_close(batched, torch.stack([wanted, -2.0 * wanted]))


def test_what_an_infinite_logit_leaves_is_no_nan() -> None:
    """softplus(-inf) is 0 for the value and for every gradient, also for those of the numbers."""
    x = torch.tensor([[1e20, 0.0], [0.0, 1e20]]).requires_grad_()
    y = x.detach().clone()  # matching rows have z = inf, all others 0
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (1.0, -5.0))
    value = F.siglip(x, y, logit_scale=scale, logit_bias=bias, normalize=False)
    assert in_one_node(value)
    torch.testing.assert_close(value, torch.nn.functional.softplus(torch.tensor(-5.0)))
    of_scale, of_bias = torch.autograd.grad(value, [scale, bias], retain_graph=True)
    assert of_scale == 0.0 and of_bias.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()
    one = torch.ones(3, 1)
    assert F.siglip(one, -one, logit_scale=torch.tensor(math.inf), logit_bias=0.0) == math.inf


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", SIDES)
def test_rows_changed_in_place(name: str, normalize: bool) -> None:
    x, y = (t.requires_grad_() for t in rows(6, 4))
    loss = LOSSES[name](x, y, normalize=normalize)
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_queue_may_change_once_it_was_normalised() -> None:
    x, queue = rows(6, 4)
    x.requires_grad_()
    loss = F.info_nce(x, queue)
    wanted = torch.autograd.grad(F.info_nce(x, queue.clone()), x)[0]
    queue.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", SIDES)
def test_saved_tensors_pass_hooks_checkpoints_and_anomaly_mode(name: str) -> None:
    x, y = (t.requires_grad_() for t in rows(6, 4))
    wanted = torch.autograd.grad(LOSSES[name](x, y), [x, y])
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.clone(), lambda t: t):
        hooked = LOSSES[name](x, y)
    assert packed
    with torch.autograd.detect_anomaly(check_nan=True):
        watched = torch.autograd.grad(LOSSES[name](x, y), [x, y])
    again = [torch.autograd.grad(checkpoint(LOSSES[name], x, y, use_reentrant=False), [x, y])]
    for found in (torch.autograd.grad(hooked, [x, y]), watched, *again):
        assert all(map(torch.equal, found, wanted))
    x.grad = y.grad = None
    checkpoint(LOSSES[name], x, y, use_reentrant=True).backward()
    assert torch.equal(x.grad, wanted[0]) and torch.equal(y.grad, wanted[1])


# ---- what is left to the formula ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp itself
@pytest.mark.parametrize("name", SIDES)
def test_transforms_take_the_formula(name: str) -> None:
    x, y = rows(6, 4)
    wanted = torch.autograd.grad(LOSSES[name](x.requires_grad_(), y), x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(LOSSES[name])(x, y), wanted)
    _, tangent = torch.func.jvp(lambda x: LOSSES[name](x, y), (x,), (torch.ones_like(x),))
    assert float((tangent - wanted.sum()).abs()) < 1e-5 * float(wanted.abs().sum())  # whose terms cancel


@pytest.mark.parametrize("name", SIDES)
def test_what_the_kernels_do_not_serve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (t.requires_grad_() for t in rows(6, 4))

    class Own(Tensor):
        pass

    others = [
        LOSSES[name](x.double(), y.double()),
        LOSSES[name](x.bfloat16(), y.bfloat16()),
        LOSSES[name](x, y, backend="blocked"),
        LOSSES[name](x, y, backend="reference"),
        LOSSES[name](x.as_subclass(Own), y),
    ]
    with torch.autocast("cpu"):
        others.append(LOSSES[name](x, y))
    monkeypatch.setenv("FASTCL_BACKEND", "blocked")
    others.append(LOSSES[name](x, y))
    assert not any(map(in_one_node, others))


def test_settings_that_bend_torch() -> None:
    """Another default dtype is not taken for that of the numbers."""
    x, y = (t.requires_grad_() for t in rows(6, 4))
    wanted = F.clip(x, y, logit_scale=3.0)
    torch.set_default_dtype(torch.float64)
    try:
        found = F.clip(x, y, logit_scale=3.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert in_one_node(found) and torch.equal(found, wanted)
    with torch.inference_mode():
        assert torch.equal(F.clip(x, y, logit_scale=3.0), wanted)


@pytest.mark.parametrize("name", SIDES)
def test_errors_are_the_formulas(name: str) -> None:
    x, y = rows(6, 4)
    for bad, error in (
        ((x, y[:, :3]), ValueError),
        ((x, y[:3]), ValueError),
        ((x, y.double()), TypeError),
        ((x.tolist(), y), TypeError),
        ((x[0], y[0]), ValueError),
    ):
        if name.startswith("clip") and bad[1] is not None and len(bad[1]) == 3:
            continue  # rows beyond the pairs are its own
        with pytest.raises(error):
            LOSSES[name](*bad)


def test_a_kernel_refuses_what_it_must_not_read() -> None:
    x, y = rows(6, 4)
    _, *told = at_once._told(at_once.Whole(outer="contrast", reduce="logsumexp", columns=True), True, 1.0, 1.0, x, y)
    one, none = torch.tensor(1.0), torch.tensor(0.0)
    op, backward = torch.ops.fastcl.cpu_aligned_loss, torch.ops.fastcl.cpu_aligned_loss_backward
    for given in (
        (x, y[:3], one, none), (x, y[:, :3], one, none), (x[0], y, one, none), (x.double(), y.double(), one, none),
        (x, y, torch.ones(2), none), (x, y, one, one.double()),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            op(*given, True, *told, [True] * 2 + [False] * 4)
    with pytest.raises((ValueError, TypeError)):
        op(x, y, one, none, True, "yx", *told[1:], [False] * 6)
    with pytest.raises((ValueError, TypeError)):
        backward(one, x, y, x[:3], y, True)
