"""Wrong values for every parameter of every public function, class and metric: an error of ours, whose advice works."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_origin

import numpy as np
import pytest
import torch

import fastcl
import fastcl.functional as F
from fastcl import losses, metrics
from fastcl.dropin import lightly, open_clip, pytorch_metric_learning
from fastcl.equation import names

from .cases import CASES

X, Y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
OURS = re.compile(
    r"^(\w+(\[\d\])?|power: \w+): .*expected .*(got|infinite)|^\w+: .*(needs|is one number|has no|stay within)",
    re.DOTALL,
)


with warnings.catch_warnings():  # of torch's own about kinds of tensors that are new, or will go
    warnings.simplefilter("ignore")
    QUANTIZED = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    ONE_QUANTIZED = torch.quantize_per_tensor(torch.tensor([0.5]), 0.1, 0, torch.qint8)
    CSR, JAGGED = X.to_sparse_csr(), torch.nested.nested_tensor([X[:4], X[:2]], layout=torch.jagged)
    NESTED = torch.nested.nested_tensor([X[0], X[1, :2]])
PARAMETER = torch.nn.Parameter(torch.tensor(1.0))

# Values of no parameter's kind, by what annotations say of it.
NO_BOOLEAN = ["no", None, 1, 0, 1.0, np.array([True, False]), torch.tensor([True, False]), torch.tensor(True)]
NO_BOOLEAN += [PARAMETER, NESTED, JAGGED]
NO_INTEGER = ["3", None, True, 1.5, np.float32(2.0), torch.tensor(3), 0, -1, NESTED]
NO_NUMBER = [
    "0.5", True, np.bool_(True), [0.5], 1j, float("nan"), float("inf"), 10**400, np.array([0.5, 0.5]), np.array("0.5"),
    torch.tensor([0.5, 0.5]), torch.tensor(1), torch.tensor(0.5 + 0j), torch.tensor(True), torch.empty((), device="meta"),
    torch.tensor([0.5]).to(torch.float8_e4m3fn), torch.tensor([0.5]).to_sparse(),
    ONE_QUANTIZED, NESTED, object(),
]  # fmt: skip
NO_NAME = [
    "meen",
    "",
    1,
    b"mean",
    np.array("mean"),
    np.array(["mean", "sum"]),
    torch.tensor([1.0, 2.0]),
    PARAMETER,
    NESTED,
    ["mean"],
    object(),
]
NO_GROUPS = [
    [0] * 6,
    np.zeros(6, int),
    LABELS.int(),
    LABELS[:3],
    LABELS.float(),
    LABELS.to("meta"),
    LABELS.to_sparse(),
    "0",
    0,
]
NO_ROWS = [
    None, [[1.0]], X.numpy(), X.long(), X.to(torch.complex64), X.to(torch.float8_e4m3fn), X.to_sparse(), CSR, X[0],
    QUANTIZED, JAGGED, NESTED, "x",
]  # fmt: skip


def wrong(name: str, annotation: str) -> list[Any]:
    if name in ("bins", "d", "length", "size"):
        return NO_INTEGER
    if annotation == "bool":
        return NO_BOOLEAN
    if "Positive" in annotation or annotation.startswith("float"):
        return NO_NUMBER + ([0.0, -1.0, 5e-324, 1e-320] if "Positive" in annotation else [])
    if get_origin(getattr(names, annotation.removesuffix(" | None"), None)) is Literal:
        return NO_NAME
    return []


def calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Each public function once, with right rows and arguments."""
    for case in {case.name: case for case in reversed(CASES)}.values():
        rows = tuple(x.detach().float() for x in case.rows_of(6, 4))
        yield f"functional.{case.name}", getattr(F, case.name), rows, case.arguments(0, 6, 4, rows[0])
    for name, function in ((name, getattr(metrics, name)) for name in metrics.__all__):
        if not inspect.isfunction(function):
            continue
        yield f"metrics.{name}", function, (X, Y) if "y" in inspect.signature(function).parameters else (X,), {}


FUNCTIONS = list(calls())


def raises_ours(call: Callable[[], Any], what: str) -> Exception:
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert OURS.match(str(raised.value)), f"{what}: {raised.value}"
    return raised.value


@pytest.mark.parametrize(("name", "function", "rows", "arguments"), FUNCTIONS, ids=[call[0] for call in FUNCTIONS])
def test_every_parameter_of_every_function(name: str, function: Any, rows: Any, arguments: dict[str, Any]) -> None:
    for parameter, p in inspect.signature(function).parameters.items():
        for value in wrong(parameter, str(p.annotation)):
            if p.default is not None or value is not None:
                given = arguments | {parameter: value}
                raises_ours(lambda given=given: function(*rows, **given), f"{name}({parameter}={value!r})")


def settings_of(kind: type) -> dict[str, Any]:
    needed = {
        "MINCLoss": {"d": 4},
        "SogCLRLoss": {"size": 9},
        "FastCLIPLoss": {"size": 9},
        "MoCoQueue": {"d": 4},
        "LogitScale": {"initial": 2.0},
    }
    return dict(needed.get(kind.__name__, {}))


CLASSES = [getattr(losses, name) for name in losses.__all__ if name != "Objective"]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_setting_of_every_class_at_construction(kind: type) -> None:
    of_function = inspect.signature(kind.function).parameters if hasattr(kind, "function") else {}
    for parameter, p in inspect.signature(kind).parameters.items():
        annotation = str(of_function[parameter].annotation if parameter in of_function else p.annotation)
        if parameter in ("device", "dtype"):
            continue
        for value in [torch.tensor(0), PARAMETER, NESTED] if parameter == "group" else wrong(parameter, annotation):
            if (p.default is None and value is None) or (isinstance(value, torch.Tensor) and value.is_meta):
                continue
            given = settings_of(kind) | {parameter: value}
            raises_ours(lambda given=given: kind(**given), f"{kind.__name__}({parameter}={value!r})")


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.FMICLLoss(divergence="tsallis"),
        lambda: losses.FMICLLoss(q=2.0),
        lambda: losses.FMICLLoss(similarity="cosine", beta=2.0),
        lambda: losses.KCLLoss(kernel="riesz", t=0.0),
        lambda: losses.FMIAlphaLoss(alpha=-300.0),
        lambda: losses.FMIAlphaLoss(alpha=1e-45),
        lambda: losses.DebiasedLoss(tau_plus=1.0),
        lambda: losses.HardNegativeLoss(beta=-1.0),
        lambda: losses.UniformityLoss(reduction="sum"),
        lambda: losses.MINCLoss(4, ema=1.0),
        lambda: losses.SogCLRLoss(9, gamma=1.5),
        lambda: losses.CLIPLoss(logit_scale=200.0),
    ],
)
def test_settings_that_do_not_go_together_at_construction(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|has no"):
        make()


@pytest.mark.parametrize(
    "value", [np.float64(0.1), np.float32(0.1), np.float16(0.1), np.array(0.1), np.array(0.1, np.float32)]
)
def test_numbers_of_numpy_are_numbers(value: Any) -> None:
    assert F.info_nce(X, Y, temperature=value) == F.info_nce(X, Y, temperature=float(value))
    assert F.clip(X, Y, logit_scale=value) == F.clip(X, Y, logit_scale=float(value))
    assert losses.NTXentLoss(temperature=value)(X, Y) == F.nt_xent(X, Y, temperature=float(value))
    assert F.f_mi_alpha(X, Y, eps=value) == F.f_mi_alpha(X, Y, eps=float(value))
    assert torch.equal(fastcl.pair_reduce(X, Y, scale=value), fastcl.pair_reduce(X, Y, scale=float(value)))


def test_integers_and_booleans_of_numpy() -> None:
    two = np.int64(2)
    assert F.kcl(X, Y, t=two) == F.kcl(X, Y, t=2)
    assert metrics.retrieval_accuracy(X, Y, k=np.array([1, 2])) == metrics.retrieval_accuracy(X, Y, k=(1, 2))
    assert losses.MoCoQueue(np.int64(4), length=np.int32(8)).rows.shape == (8, 4)
    assert F.clip(X, Y, logit_scale=2.0, normalize=np.bool_(False)) == F.clip(X, Y, logit_scale=2.0, normalize=False)
    mask = fastcl.off_diagonal(two, np.int64(0))
    assert torch.equal(fastcl.pair_reduce(X, Y, mask=mask), fastcl.pair_reduce(X, Y, mask=fastcl.off_diagonal(2, 0)))


@pytest.mark.parametrize("value", NO_ROWS, ids=lambda v: type(v).__name__)
def test_advice_about_rows_works(value: Any) -> None:
    """What an error advises is done, until the call goes through or there is no more advice."""
    follow(lambda v: F.nt_xent(v, v), value, "u")


@pytest.mark.parametrize("value", NO_GROUPS[:-2], ids=lambda v: type(v).__name__)
def test_advice_about_groups_works(value: Any) -> None:
    follow(lambda v: F.sup_con(X, v), value, "labels")


@pytest.mark.parametrize("value", NO_NUMBER, ids=lambda v: type(v).__name__)
def test_advice_about_numbers_works(value: Any) -> None:
    follow(lambda v: F.nt_xent(X, Y, temperature=v), value, "temperature")
    follow(lambda v: F.f_mi_alpha(X, Y, eps=v), value, "eps")


def follow(call: Callable[[Any], Any], value: Any, name: str) -> None:
    for _ in range(4):
        try:
            call(value)
        except (ValueError, TypeError) as error:
            advised = re.search(
                r"(?:pass|e\.g\.|its parts,) ((?:torch\.|float\()?[\w.]+\([^;]*\)|\w+\.[\w.()]+)|with (\.[\w.()]+)",
                str(error),
            )
            if advised is None or (isinstance(value, torch.Tensor) and value.is_meta):
                return
            code = advised[1] or f"{name}{advised[2]}"
            value = eval(code.removesuffix(" (it takes no gradient)"), {"torch": torch, "float": float, name: value})
        else:
            return
    raise AssertionError("advice in circles")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float32, torch.float64])
def test_numbers_in_narrow_tensors_are_widened_first(dtype: torch.dtype, rows: torch.dtype) -> None:
    """A temperature of few digits is that number: its inverse, its logarithm and its square have those of the results."""
    number = torch.tensor([0.1403], dtype=dtype)
    x, y = X.to(rows), Y.to(rows)
    eps = torch.finfo(torch.float64 if rows == torch.float64 else torch.float32).eps
    for function, name, more in (
        (F.info_nce, "temperature", {}), (F.nt_xent, "temperature", {}), (F.dcl, "sigma", {}), (F.dhel, "temperature", {}),
        (F.moco_v3, "temperature", {}), (F.spectral, "mu", {}), (F.f_micl, "mu", {}), (F.f_micl, "beta", {"divergence": "rkl"}),
        (F.kcl, "t", {"kernel": "imq"}), (F.debiased, "temperature", {}), (F.uniformity, "t", {}),
        (F.hard_negative, "beta", {}), (F.siglip, "logit_scale", {"logit_bias": -2.0}),
    ):  # fmt: skip
        given = {"moco_v3": (x, y, x, y), "uniformity": (x,)}.get(function.__name__, (x, y))
        found = function(*given, **{name: number}, **more)
        right = function(*given, **{name: number.double()}, **more)
        assert found.dtype == right.dtype
        assert abs(found - right) <= 4.0 * eps * (1.0 + abs(right)), function.__name__


@pytest.mark.parametrize("value", NO_BOOLEAN, ids=repr)
def test_booleans_of_the_dropins(value: Any) -> None:
    for make in (
        lambda: lightly.NTXentLoss(gather_distributed=value),
        lambda: lightly.DCLLoss(gather_distributed=value),
        lambda: open_clip.ClipLoss(local_loss=value),
        lambda: open_clip.ClipLoss(gather_with_grad=value),
        lambda: pytorch_metric_learning.DistributedLossWrapper(pytorch_metric_learning.SupConLoss(), efficient=value),
    ):
        with pytest.raises(TypeError, match="expected True or False, got"):
            make()


@pytest.mark.parametrize("case", [case for case in CASES if case.scalars], ids=lambda case: case.id)
def test_a_long_integer_is_the_float_that_it_is(case: Any) -> None:
    """No op takes an integer beyond 64 bits."""
    rows = case.rows_of(6, 4, torch.float32)
    given = case.arguments(0, 6, 4, rows[0])

    def answer(name: str, value: float) -> Any:
        try:
            return getattr(F, case.name)(*rows, **given | {name: value}).sum().detach()
        except ValueError as error:
            return re.sub(r"got .*?;", "", str(error))

    for name in case.scalars:
        for value in (10**20, -(10**20)):
            whole, real = answer(name, value), answer(name, float(value))
            assert whole == real if isinstance(real, str) else torch.equal(whole.nan_to_num(), real.nan_to_num())
