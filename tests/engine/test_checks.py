"""Every bad input gets its one clear error, word for word: what was expected, what came, what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcl
from fastcl.backends import choice
from fastcl.equation import pairs

X, Y = torch.zeros(4, 3), torch.zeros(5, 3)
G4, G5 = torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)


def reduce(*sides: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: fastcl.pair_reduce(*sides, **settings)


def total(*sides: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: fastcl.pair_total(*sides, **settings)


PAIR_NAMES = (
    "['cosine_js', 'exp', 'identity', 'log', 'log1p', 'power', 'rsqrt1p', 'sigmoid_squared', 'softplus', 'square']"
)
DTYPES = "float64, float32, bfloat16 or float16"

ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (reduce([1.0]), TypeError, "x: expected a tensor, got list; pass torch.as_tensor(x)"),
    (reduce(X.long(), Y), TypeError, f"x: expected {DTYPES}, got int64; convert it, e.g. x.float()"),
    (reduce(X[0], Y), ValueError, "x: expected a matrix (rows, d), got shape (3,); flatten or unsqueeze it"),
    (reduce(X, Y.double()), TypeError, "y: expected the dtype of x, float32, got float64; convert one of them"),
    (reduce(X, Y.to("meta")), ValueError, "y: expected the device of x, cpu, got meta; move one of them"),
    (
        reduce(X, Y[:, :2]),
        ValueError,
        "y: expected rows of the width of x, d = 3, got d = 2; project both to one width",
    ),
    (
        reduce(X, Y, operand="sqdits"),
        ValueError,
        "operand: expected one of 'dot', 'sqdist', got 'sqdits'; did you mean 'sqdist'?",
    ),
    (
        reduce(X, Y, reduce="logsumexps"),
        ValueError,
        "reduce: expected one of 'sum', 'logsumexp', got 'logsumexps'; did you mean 'logsumexp'?",
    ),
    (
        reduce(X, Y, pair="sofplus", reduce="sum"),
        ValueError,
        f"pair: expected one of {PAIR_NAMES}, got 'sofplus'; did you mean 'softplus'?",
    ),
    (
        reduce(X, Y, pair="power", reduce="sum"),
        ValueError,
        "pair: 'power' needs constants; pass fastcl.pairs.Power(p=..., eps=...)",
    ),
    (
        reduce(X, Y, pair=torch.exp, reduce="sum"),
        TypeError,
        "pair: expected a name or a fastcl.pairs.PairFunction, got builtin_function_or_method",
    ),
    (lambda: pairs.Power(p=1.0, eps=0.0), ValueError, "power: eps: expected a number > 0, got 0.0"),
    (
        reduce(X, Y, pair="exp"),
        ValueError,
        "pair: reduce='logsumexp' goes with pair='identity' only, got 'exp'; use reduce='sum'",
    ),
    (
        reduce(X, Y, mask="of_diagonal"),
        ValueError,
        "mask: expected one of 'all', 'off_diagonal', 'across_groups', 'within_groups', got 'of_diagonal'; "
        "did you mean 'off_diagonal'?",
    ),
    (
        reduce(X, Y, mask="across_groups"),
        ValueError,
        "mask: 'across_groups' needs groups; pass fastcl.across_groups(group_x, group_y)",
    ),
    (
        reduce(X, Y, mask=X),
        TypeError,
        "mask: expected a name or a fastcl.Mask, got Tensor; build one with fastcl.off_diagonal()",
    ),
    (
        reduce(X, mask=fastcl.off_diagonal(0, 1)),
        ValueError,
        "mask: x with itself needs equal offsets, got row_offset=0 and col_offset=1; pass y=x",
    ),
    (
        reduce(X, Y, mask=fastcl.across_groups(G4.int(), G5)),
        TypeError,
        "group_x: expected an int64 tensor, got int32; convert it with .long()",
    ),
    (
        reduce(X, Y, mask=fastcl.across_groups(G5, G5)),
        ValueError,
        "group_x: expected shape (4,), one group for each row of x, got (5,)",
    ),
    (
        reduce(X, Y, mask=fastcl.within_groups(G4)),
        ValueError,
        "group_y: expected shape (5,), one group for each row of y, got (4,)",
    ),
    (
        reduce(X, mask=fastcl.within_groups(G4, G4.clone())),
        ValueError,
        "mask: x with itself needs one vector of groups, got group_x and group_y; leave group_y out or pass y=x",
    ),
    (reduce(X, columns=True), ValueError, "columns: x with itself (y=None) takes no columns; pass y=x"),
    (reduce(X, bias_x=torch.zeros(4)), ValueError, "bias_x: x with itself (y=None) takes no bias_x; pass y=x"),
    (
        reduce(X, Y, bias_y=torch.zeros(4)),
        ValueError,
        "bias_y: expected shape (5,), one value for each row of y, got (4,)",
    ),
    (
        reduce(X, Y, bias_x=G4),
        TypeError,
        "bias_x: expected a floating-point tensor, got int64; convert it with .float()",
    ),
    (reduce(X, Y, scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    (reduce(X, Y, scale="1"), TypeError, "scale: expected a number or a tensor with one element, got str"),
    (
        reduce(X, Y, shift=torch.zeros(2)),
        ValueError,
        "shift: expected a number or a tensor with one element, got shape (2,)",
    ),
    (
        reduce(X, Y, shift=torch.tensor(1)),
        TypeError,
        "shift: expected a number or a floating-point tensor, got int64; convert it with .float()",
    ),
    (
        total(X, Y, outer="contrast"),
        ValueError,
        "positive: expected a vector exactly when outer='contrast', got none with outer='contrast'",
    ),
    (
        total(X, Y, outer="sum", positive=torch.zeros(4)),
        ValueError,
        "positive: expected a vector exactly when outer='contrast', got one with outer='sum'",
    ),
    (
        total(X, Y, outer="contrast", positive=torch.zeros(5)),
        ValueError,
        "positive: expected shape (4,), one value for each row of x, got (5,)",
    ),
    (
        total(X, Y, outer="pooled", pair="exp", reduce="sum"),
        ValueError,
        "outer: 'pooled' goes with reduce='logsumexp' only, got 'sum'; use outer='sum'",
    ),
    (
        total(X, Y, outer="mean"),
        ValueError,
        "outer: expected one of 'sum', 'contrast', 'pooled', got 'mean'",
    ),
    (
        reduce(X, Y, backend="trition"),
        ValueError,
        "backend: expected one of 'auto', 'reference', 'blocked', 'cpu', 'triton', 'cuda', got 'trition'; did you mean 'triton'?",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[m[:60] for _, _, m in ERRORS])
def test_message(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    assert str(error.value) == message


def test_environment_variable_is_read_at_each_call_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "bloked")
    with pytest.raises(
        ValueError, match=r"^FASTCL_BACKEND: expected one of .* got 'bloked'; did you mean 'blocked'\?$"
    ):
        fastcl.pair_reduce(X, Y)
    monkeypatch.setenv("FASTCL_BACKEND", "blocked")
    assert choice.choose(None, torch.device("cpu"), torch.float32)[0] == "blocked"
    assert choice.choose("reference", torch.device("cpu"), torch.float32)[0] == "reference"


def test_an_unavailable_backend_says_why() -> None:
    with pytest.raises(
        fastcl.BackendUnavailableError, match=r"^backend 'cuda' cannot serve cpu tensors of torch.float32: "
    ):
        fastcl.pair_reduce(X, Y, backend="cuda")
    assert issubclass(fastcl.BackendUnavailableError, RuntimeError)


def test_explain_names_every_backend_with_a_reason_or_none() -> None:
    answers = dict(choice.explain(torch.device("cpu"), torch.float32))
    assert set(answers) == set(choice.MODULES)
    assert answers["blocked"] is None and answers["reference"] is None
    assert isinstance(answers["cuda"], str)
