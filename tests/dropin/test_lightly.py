"""NTXentLoss, DCLLoss and DCLWLoss beside lightly's, in one process."""

import copy
import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcl.dropin import lightly as ours

from . import originals
from .compare import assert_agree, two_views

SIZES = [(2, 5), (13, 7), (40, 16)]
TEMPERATURES = [0.02, 0.1, 0.5, 2.0]


def original(name: str, *arguments: object, **more: object) -> Callable[..., Tensor]:
    """lightly's DCLWLoss warns at every call that it copies a tensor."""
    loss = getattr(originals.lightly(), name)(*arguments, **more)

    def call(*inputs: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return loss(*inputs)

    return call


@pytest.mark.parametrize("name", ["NTXentLoss", "DirectCLRLoss", "DCLLoss", "DCLWLoss", "MACLLoss", "HypersphereLoss"])
def test_signatures(name: str) -> None:
    theirs, mine = getattr(originals.lightly(), name), getattr(ours, name)
    for method in ("__init__", "forward"):
        a, b = inspect.signature(getattr(mine, method)), inspect.signature(getattr(theirs, method))
        assert [(p.name, p.default) for p in a.parameters.values()] == [
            (p.name, p.default) for p in b.parameters.values()
        ]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
def test_two_views(name: str, n: int, d: int, temperature: float) -> None:
    assert_agree(getattr(ours, name)(temperature), original(name, temperature), two_views(n, d))


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
def test_defaults(name: str) -> None:
    assert_agree(getattr(ours, name)(), original(name), two_views(11, 6))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DirectCLRLoss", ()),
        ("DirectCLRLoss", (3, 0.2)),
        ("MACLLoss", ()),
        ("MACLLoss", (0.3, 0.2, 0.1)),
        ("MACLLoss", (0.05, 1.0, 0.0)),
        ("HypersphereLoss", ()),
        ("HypersphereLoss", (2.0, 0.3, 1.0)),
    ],
)
def test_others_of_two_views(name: str, arguments: tuple[float, ...]) -> None:
    assert_agree(getattr(ours, name)(*arguments), original(name, *arguments), two_views(13, 7))
    if name == "DirectCLRLoss":
        maps = [view.reshape(13, 7, 1, 1) for view in two_views(13, 7)]
        assert_agree(ours.DirectCLRLoss(*arguments), original(name, *arguments), maps)


def test_what_the_others_refuse() -> None:
    for call, message in (
        (lambda: ours.MACLLoss(1e-9), "temperature: expected a number >= 1e-8"),
        (lambda: ours.MACLLoss(alpha=2.0), r"alpha: expected a number in \[0, 1\]"),
        (lambda: ours.MACLLoss(A_0=-1.0), r"A_0: expected a number in \[0, 1\]"),
        (lambda: ours.DirectCLRLoss(0), "loss_dim"),
        (lambda: ours.HypersphereLoss(t=-1.0), "t: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_direct_clr_reads_columns_of_matrices_of_one_shape() -> None:
    u, v = two_views(5, 4)
    loss = ours.DirectCLRLoss(2)
    for arguments, kind, message in (
        ((u[0], v[0]), ValueError, r"out0: expected shape \(n, d\) or \(n, d, ...\), got \(4,\)"),
        ((u, v.tolist()), TypeError, "out1: expected a floating-point tensor, got list"),
        ((u, v[:, :3]), ValueError, r"out1: expected the shape of out0, \(5, 4\), got \(5, 3\)"),
    ):
        with pytest.raises(kind, match=message):
            loss(*arguments)


def test_sizes_of_a_bank_are_integers() -> None:
    for size, kind in (
        ("many", TypeError),
        ((3.0, 4), TypeError),
        ((True, 4), TypeError),
        ((3, -4), ValueError),
        ((3,), ValueError),
    ):
        with pytest.raises(kind, match=r"^memory_bank_size: expected "):
            ours.NTXentLoss(memory_bank_size=size)


def test_one_row() -> None:
    u, v = two_views(1, 5)
    assert_agree(ours.NTXentLoss(), original("NTXentLoss"), [u, v])
    assert ours.DCLLoss()(u, v).item() == original("DCLLoss")(u, v).item() == -float("inf")


def test_duplicate_rows_and_zero_rows() -> None:
    u, v = two_views(9, 5)
    u[3], v[3] = u[4], v[4]
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        assert_agree(getattr(ours, name)(), original(name), [u, v])
        assert_agree(getattr(ours, name)(), original(name), [1e6 * u, 1e-3 * v])


@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
def test_weights(sigma: float) -> None:
    assert_agree(ours.DCLWLoss(0.2, sigma), original("DCLWLoss", 0.2, sigma), two_views(12, 5))


def test_weight_function_gets_gradients_and_both_directions() -> None:
    def weight(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).square().sum(1) * a[:, 0]).exp()

    assert_agree(ours.DCLLoss(0.3, weight), original("DCLLoss", 0.3, weight), two_views(12, 5))


class TestMemoryBank:
    """Both banks start from the same rows and see the same batches."""

    @pytest.mark.parametrize("size", [24, 25, 3])
    def test_batches(self, size: int) -> None:
        mine, theirs = ours.NTXentLoss(0.1, (size, 6)).double(), originals.lightly().NTXentLoss(0.1, (size, 6)).double()
        theirs.memory_bank.bank.copy_(mine.memory_bank.bank)
        for step in range(6):
            batch = two_views(8, 6, seed=step)
            assert_agree(mine, theirs, batch)
            assert torch.allclose(mine.memory_bank.bank, theirs.memory_bank.bank, rtol=0.0, atol=1e-14)
            assert torch.equal(mine.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
    def test_the_bank_is_written_within_a_graph(self) -> None:
        """Batches that reach the end of the bank and begin at its start again, by one graph."""
        torch._dynamo.reset()
        torch.manual_seed(0)
        loss = ours.NTXentLoss(memory_bank_size=(11, 5))
        twin = copy.deepcopy(loss)
        compiled = torch.compile(twin, backend="eager", fullgraph=True)
        for step in range(4):
            rows = [x.float().requires_grad_() for x in two_views(4, 5, seed=step)]
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                value = compiled(*rows)
            torch.testing.assert_close(value, loss(*rows))
            torch.testing.assert_close(twin.memory_bank.bank, loss.memory_bank.bank)
            assert torch.equal(twin.memory_bank.bank_ptr, loss.memory_bank.bank_ptr)

    def test_without_gradient_the_bank_stays(self) -> None:
        loss = ours.NTXentLoss(0.1, (10, 6)).double()
        before = loss.memory_bank.bank.clone()
        loss(*two_views(4, 6))
        assert torch.equal(loss.memory_bank.bank, before)
        assert before.norm(dim=1).allclose(torch.ones(10).double(), atol=1e-6)

    def test_the_bank_gets_no_gradient_and_is_not_state(self) -> None:
        loss = ours.NTXentLoss(0.1, (10, 6))
        assert not loss.state_dict() and not loss.memory_bank.bank.requires_grad

    def test_half_precision_rows_meet_a_float_bank(self) -> None:
        loss = ours.NTXentLoss(0.1, (10, 6))
        u, v = (t.bfloat16().requires_grad_() for t in two_views(4, 6))
        loss(u, v).backward()
        assert u.grad is not None and u.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_near(dtype: torch.dtype) -> None:
    """The truth is the original in float64 on the same rounded rows; the bound is rounding the unit rows to the dtype."""
    u, v = (t.to(dtype) for t in two_views(33, 16))
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        truth = original(name, 0.5)(u.double(), v.double()).item()
        assert abs(getattr(ours, name)(0.5)(u, v).item() - truth) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["NTXentLoss", "DirectCLRLoss", "DCLLoss", "DCLWLoss", "MACLLoss", "HypersphereLoss"])
def test_an_error_of_rows_names_what_its_caller_gave(name: str) -> None:
    """Its own argument, whatever its formula's function calls it."""
    loss, x = getattr(ours, name)(), torch.randn(4, 3)
    names = tuple(inspect.signature(loss.forward).parameters)
    least = 2 if name == "HypersphereLoss" else 1
    for bad in (None, x.long(), x.to_sparse(), x[0], x[:3], x[:, :2]):
        for i, given in enumerate(((bad, x), (x, bad))):
            with pytest.raises((TypeError, ValueError), match=rf"^{names[i]}: |^{names[1]}: expected [^\n]*{names[0]}"):
                loss(*given)
    with pytest.raises(ValueError, match=f"^{names[0]}: expected at least {least} row"):
        loss(x[: least - 1], x[: least - 1])


def test_what_is_not_supported_raises() -> None:
    u, v = two_views(4, 3)
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        with pytest.raises(ValueError, match="temperature: expected a number > 0"):
            getattr(ours, name)(temperature=0.0)
        with pytest.raises(ValueError, match="one row for each row"):
            getattr(ours, name)()(u, v[:3])
        with pytest.raises(ValueError, match="at least 1 row"):
            getattr(ours, name)()(u[:0], v[:0])
    with pytest.raises(ValueError, match="sigma"):
        ours.DCLWLoss(sigma=-1.0)
    for size in (4096, -1, (1, 2, 3), (-1, 4)):
        with pytest.raises(ValueError, match="memory_bank_size"):
            ours.NTXentLoss(memory_bank_size=size)
    with pytest.raises(ValueError, match="width"):
        ours.NTXentLoss(memory_bank_size=(8, 4)).double()(u.requires_grad_(), v)
