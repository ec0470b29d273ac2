"""The closed forms wait for no device: a CUDA graph captures them, groups included. Tensor cores take products of 16-bit rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl import functional, pair_reduce, pair_total, precision
from fastcl.backends import choice, closed_form, reference
from fastcl.backends.visits import classes
from fastcl.equation.masks import KINDS, Mask, across_groups, within_groups
from fastcl.equation.names import Backend
from tests.triton.problems import all_wanted, problem, upstream


@pytest.mark.parametrize("pair", ["identity", "square"])
@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("m", [12, None])
def test_no_size_depends_on_a_value(m: int | None, mask: str, pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    monkeypatch.setattr("fastcl.backends.row_dot.in_one_pass", lambda *rows: False)  # as on a GPU
    p = problem(9, m, 3, pair=pair, mask=mask, columns=m is not None)
    p = p.__class__(**{**p.__dict__, "reduce": "sum"})
    up = upstream(p)
    with FakeTensorMode(allow_non_fake_inputs=True):
        r, c = closed_form.rows(p)
        closed_form.gradients(p, r, c, up.g, up.h, all_wanted(p))
        closed_form.total(p, None, "sum", all_wanted(p))


def test_classes_name_equal_groups_equally() -> None:
    groups = torch.tensor([7, -3, 7, 2**40, -3, 0])
    index = classes(groups)
    assert torch.equal(index[:, None] == index, groups[:, None] == groups)
    assert int(index.min()) >= 0 and int(index.max()) < len(groups)
    assert classes(groups[:0]).shape == (0,)


class Products(TorchDispatchMode):
    """Matrix products by name and dtypes; those of 16 bits into float32, which CUDA alone has, are taken here for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" not in op.__name__:
            return op(*args, **(kwargs or {}))
        self.seen.append((op.__name__, {t.dtype for t in args if isinstance(t, Tensor)}))
        if op is torch.ops.aten.mm.dtype and args[0].device.type == "cpu":
            return args[0].float() @ args[1].float()
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["all", "off_diagonal"])
@pytest.mark.parametrize("m", [120, None])
def test_tensor_cores_take_the_products_of_half_rows(
    m: int | None, mask: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product has both operands in 16 bits, and what was split in two for that is lost in no result's rounding."""
    monkeypatch.setattr(closed_form, "on_tensor_cores", lambda x: x.dtype == dtype)
    p = problem(150, m, 24, pair="square", mask=mask, columns=m is not None, dtype=dtype)
    up = upstream(p)
    with Products() as products:
        (r, c), form = closed_form.rows(p), closed_form._form(p)
        found = [r, c, *form.gradients(up.g, up.h, all_wanted(p)).gradients(torch.float32)]
        value, sums = form.total(all_wanted(p))
        found += [value, *sums.gradients(torch.float32)]
    assert {("mm.dtype", frozenset({dtype}))} == {(name, frozenset(kinds)) for name, kinds in products.seen}
    exact = p.__class__(**{**p.__dict__, "x": p.x.double(), "y": None if p.y is None else p.y.double()})
    wanted = [*reference.rows(exact), *reference.gradients(exact, r, c, up.g, up.h, all_wanted(p))]
    total = reference.total(exact, None, "sum", all_wanted(p))
    for mine, theirs in zip(found, [*wanted, total[0], *total[1]], strict=True):
        if theirs is not None:
            assert (
                float((mine.double() - theirs).norm() / theirs.norm()) < 4e-5
            )  # a quarter of float16's eps was 2.4e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuda_rows_of_16_bits_go_to_tensor_cores(dtype: torch.dtype) -> None:
    """On fake CUDA tensors: no product of float32, unless torch lets float16 add up in float16."""
    p = problem(40, None, 8, pair="square", mask="all", dtype=dtype)

    def products() -> set[str]:
        with FakeTensorMode():
            given = {k: v for k, v in p.__dict__.items() if isinstance(v, Tensor)}
            on_card = p.__dict__ | {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") for k, v in given.items()}
            with Products() as seen:
                closed_form.rows(p.__class__(**on_card))
        return {name for name, _ in seen.seen}

    assert products() == {"mm.dtype"}
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        assert ("mm.dtype" in products()) == (dtype == torch.bfloat16)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = before


def test_other_rows_are_multiplied_as_before() -> None:
    assert not any(precision.on_tensor_cores(torch.ones(2, 2, dtype=t)) for t in (torch.float32, torch.bfloat16))


def test_what_is_infinite_or_nothing_stays_so() -> None:
    a = torch.eye(2, dtype=torch.float16)
    for entry in (float("inf"), float("nan"), 0.0, 3e38, 1e-30):
        b = torch.full((2, 2), entry)
        with Products():
            torch.testing.assert_close(
                precision.narrow_product(a, b), a.float() @ b, equal_nan=True, rtol=1e-6, atol=0.0
            )


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
@pytest.mark.parametrize("power", [-15, -11, 11, 15])
def test_squares_of_a_scale_leave_the_range_where_z_does_not(power: int, backend: Backend) -> None:
    """z near 1 of rows of any norm: the Gram form meets the scale twice and rows four times."""
    if reason := choice.reason(backend, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)).mul(10.0**power)
    arguments: dict[str, Any] = {
        "operand": "dot",
        "pair": "square",
        "reduce": "sum",
        "shift": 0.5,
        "scale": 10.0 ** (-2 * power),
    }
    found, expected = [], []
    for rows, into, way in ((x, found, backend), (x.double(), expected, "reference")):
        rows = rows.clone().requires_grad_()
        r = pair_reduce(rows, mask="off_diagonal", backend=way, **arguments)
        assert isinstance(r, Tensor)
        into += [r.detach(), torch.autograd.grad(r.sum(), rows)[0]]
    for got, exact in zip(found, expected, strict=True):
        assert float(((got - exact).abs() / exact.abs().amax()).max()) < 4e-6


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("norm", [1e19, 1e20, 1e22])
@pytest.mark.parametrize(
    ("operand", "pair", "reduce"),
    [
        ("dot", "identity", "sum"),
        ("sqdist", "identity", "sum"),
        ("dot", "square", "sum"),
        ("sqdist", "softplus", "sum"),
        ("sqdist", "identity", "logsumexp"),
    ],
)
def test_products_of_rows_leave_the_range_where_z_does_not(
    operand: str, pair: str, reduce: str, norm: float, itself: bool, backend: Backend
) -> None:
    """Rows whose products are beyond float32, and a scale that brings them back; the gradient of the scale is infinite."""
    if reason := choice.reason(backend, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(0)
    sides = [torch.randn(rows, 6, generator=g).mul(norm) for rows in ((24,) if itself else (24, 30))]
    scale = torch.tensor(1e-37)
    arguments: dict[str, Any] = {"operand": operand, "pair": pair, "reduce": reduce, "mask": "off_diagonal"}
    found, expected = [], []
    for wide, into, way in ((False, found, backend), (True, expected, "reference")):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (*sides, scale)]
        r = pair_reduce(*leaves[:-1], scale=leaves[-1], backend=way, **arguments)
        assert isinstance(r, Tensor)
        into += [r.detach(), *torch.autograd.grad(r.sum(), leaves)]
    for got, exact in zip(found[:-1], expected[:-1], strict=True):
        assert float(((got - exact).abs() / exact.abs().amax()).max()) < 1e-5
    of_scale = expected[-1].float()
    assert torch.equal(found[-1], of_scale) if of_scale.isinf() else abs(float(found[-1] / of_scale) - 1.0) < 1e-5


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_terms_of_a_sum_leave_the_range_where_it_does_not(backend: Backend, itself: bool) -> None:
    """x_i1 (y_11 + y_21 + ...) and x_i2 (...) of opposite signs, each beyond float32; the scale's gradient likewise."""
    x = torch.tensor([[1.8, 1.8], [1.0, -2.3], [1.0, 0.3]]) * 1e19
    found = []
    for way, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        scale = torch.ones((), dtype=dtype, requires_grad=True)
        rows = [x.to(dtype)] if itself else [x.to(dtype), x.to(dtype)]
        total = pair_total(*rows, pair="identity", reduce="sum", mask="off_diagonal", outer="sum", scale=scale, backend=way)
        r = pair_reduce(*rows, pair="identity", reduce="sum", mask="off_diagonal", scale=scale.detach(), backend=way)
        assert isinstance(r, Tensor)
        found.append([r, total, *torch.autograd.grad(total, scale)])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), exact.detach(), rtol=1e-5, atol=1e33)


@pytest.mark.parametrize("mask", ["all", "off_diagonal"])
@pytest.mark.parametrize("backend", ["cpu", "blocked"])
@pytest.mark.parametrize(("long", "short", "scale"), [(1e24, 1e27, 3.55e-38), (1e19, 1e-25, 1e6), (1e-34, 1e-34, -3e38)])
def test_squares_of_rows_far_from_one(long: float, short: float, scale: float, backend: Backend, mask: str) -> None:
    """Whose matrices, or products with weights, leave float32 where z and gradients do not."""
    generator = torch.Generator().manual_seed(0)
    x, y = (size * torch.randn(9, 2, generator=generator) for size in (long, short))
    found = []
    for way, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [rows.to(dtype).requires_grad_() for rows in (x, y)]
        total = pair_total(*leaves, pair="square", reduce="sum", mask=mask, scale=scale, outer="sum", backend=way)
        found.append([total.detach().double(), *(g.double() for g in torch.autograd.grad(total, leaves))])
    for mine, exact in zip(*found, strict=True):
        assert mine.isfinite().all()
        if abs(scale * long * short) > 1e-20:  # else z is 0 in float32
            assert (mine - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("mask", [within_groups, across_groups])
def test_many_rows_of_a_group_keep_their_digits(mask: Callable[[Tensor], Mask]) -> None:
    """As those of no group do: added one after the other they would lose sqrt(n) eps."""
    g = torch.Generator().manual_seed(0)
    x, groups = torch.rand(300_000, 2, generator=g), torch.randint(0, 2, (300_000,), generator=g)
    found = []
    for rows in (x.requires_grad_(), x.detach().double().requires_grad_()):
        r = pair_reduce(rows, reduce="sum", mask=mask(groups))
        assert isinstance(r, Tensor)
        found.append([r.detach(), *torch.autograd.grad(r.sum(), [rows])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
def test_rows_leave_the_range_where_their_total_does_not(backend: Backend) -> None:
    """r_1 = 4e38 and r_2 = -4e38 + 1e35."""
    x, y = torch.tensor([[2e19], [-1.9995e19]]), torch.full((2, 1), 1e19)
    found = pair_total(x, y, pair="identity", reduce="sum", outer="sum", backend=backend)
    torch.testing.assert_close(found.double(), (x.double() @ y.double().T).sum(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("pair", ["identity", "square"])
@pytest.mark.parametrize("m", [12, None])
def test_small_scales_of_long_rows_where_no_value_is_read(
    m: int | None, pair: str, tensor_cores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: products of rows of 1e25 leave float32, z does not."""
    monkeypatch.setattr("fastcl.backends.row_dot.in_one_pass", lambda *rows: False)
    monkeypatch.setattr("fastcl.transforms.values_are_stored", lambda t: False)
    monkeypatch.setattr(closed_form, "on_tensor_cores", lambda x: tensor_cores)
    dtype = torch.bfloat16 if tensor_cores else torch.float32
    # The clamp of the unit at 2^-32 leaves rows of 1e25 at 1e15, whose products of four still fit.
    p = problem(9, m, 3, pair=pair, mask="off_diagonal", length=1e25, dtype=dtype, scale=1e-18 if pair == "identity" else 1e-34)
    p = p.__class__(**{**p.__dict__, "reduce": "sum", "shift": torch.tensor(0.0)})
    with Products():
        value, got, _ = closed_form.total(p, None, "sum", all_wanted(p))
    truth, wanted, _ = reference.total(p, None, "sum", all_wanted(p))
    tolerance = 2e-2 if tensor_cores else 1e-4
    assert abs(value - truth) <= tolerance * abs(truth)
    for mine, right in zip(got, wanted, strict=True):
        if right is not None and right.isfinite().all():
            assert mine is not None
            assert (mine - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize(("longest", "d"), [(1, 16), (2, 16), (1, 2), (1, 1)])
@pytest.mark.parametrize("form", ["x", "x and y", "spectral"])
def test_a_diagonal_is_not_taken_out_of_what_it_makes_up(form: str, longest: int, d: int) -> None:
    """A long row, or two orthogonal ones: pairs with themselves had taken digits of the rest with them, in one column all."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(120, d, generator=generator) for _ in range(2))
    for rows in (x, y):
        rows[:longest] = 1e3 * torch.eye(d)[:longest]
        if d <= 2:
            rows[:longest] *= 1e3

    def call(x: Tensor, y: Tensor, backend: Backend | None = None) -> tuple[Tensor, ...]:
        leaves = [rows.detach().requires_grad_() for rows in (x, y)]
        if form == "spectral":
            value = functional.spectral(*leaves, mu=1e13, backend=backend)
        else:
            other = None if form == "x" else leaves[1]
            found = pair_reduce(leaves[0], other, pair="square", reduce="sum", mask="off_diagonal", backend=backend)
            assert isinstance(found, Tensor)
            value = found
        return value.detach(), *torch.autograd.grad(value.sum(), leaves[: 1 if form == "x" else 2])

    for mine, exact in zip(call(x, y), call(x.double(), y.double(), "reference"), strict=True):
        error = (mine - exact).reshape(len(exact) if exact.dim() else 1, -1).norm(dim=1)
        size = exact.reshape(len(error), -1).norm(dim=1)
        assert (error <= 2e-5 * size).all()  # eager's: 1e-5 at cosines of 0.01


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
@pytest.mark.parametrize("length", [1e2, 1e5])
def test_a_long_row_leaves_digits_to_rows_at_a_right_angle_to_it(length: float, backend: Backend) -> None:
    """In whose sums it has little part, where d x d matrices have it whole: of length 1e5 they were off by twice the sum."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(65, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    along = torch.nn.functional.normalize(y[0], dim=0)
    x, y[0] = x - 0.999 * (x @ along)[:, None] * along, length * along
    x, y = x.float(), y.float()
    got = pair_reduce(x, y, pair="square", reduce="sum", backend=backend)
    exact = pair_reduce(x.double(), y.double(), pair="square", reduce="sum", backend="reference")
    eager = (x @ y.T).square().sum(1)
    assert (got - exact).abs().max() <= 4 * (eager - exact).abs().max()


@pytest.mark.parametrize("backend", ["cpu", "blocked"])
@pytest.mark.parametrize("d", [2, 3, 4])
def test_the_second_moment_of_uniform_directions(d: int, backend: Backend) -> None:
    """Near 1 / d, which spread_out takes off: right to the rounding of the result, where d x d matrices rounded each their own."""
    for n in range(100, 140):
        x = torch.randn(n // 2, d, generator=torch.Generator().manual_seed(n))
        x = torch.nn.functional.normalize(torch.cat([x, -x]))
        given: dict[str, Any] = {"pair": "square", "reduce": "sum", "mask": "off_diagonal", "outer": "sum"}
        got, exact = (pair_total(rows, backend=way, **given) for rows, way in ((x, backend), (x.double(), "reference")))
        assert abs(float(got) / float(exact) - 1.0) <= 1.2e-7


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scale_of_0_takes_nothing_of_sums_beyond_the_dtype_that_may_not_be_looked_at() -> None:
    x, y = torch.full((5, 3), 1e19), torch.full((4, 3), 1e20)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(y, y)
        found = fastcl.pair_reduce(x, dual, pair="identity", reduce="sum", scale=0.0, shift=0.5)
        assert torch.autograd.forward_ad.unpack_dual(found).primal.tolist() == [2.0] * 5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_direction_takes_no_pair_with_itself_out_of_all_that_there_is() -> None:
    """Under dual numbers, too, rows say whether d x d matrices keep the digits of a sweep."""
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e12
    given: dict[str, Any] = {"pair": "square", "reduce": "sum", "mask": "off_diagonal", "scale": 100.0}
    exact = pair_reduce(x.double(), backend="reference", **given)
    with torch.autograd.forward_ad.dual_level():
        found = pair_reduce(torch.autograd.forward_ad.make_dual(x, x), **given)
        values = torch.autograd.forward_ad.unpack_dual(found).primal.double()
    assert ((values - exact).abs() <= 1e-5 * exact).all()
