"""Every objective as a module: the function's value, its defaults, and a state that saves, copies and moves."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import losses

from .cases import CASES, SIZES, Case
from .test_cases import public_functions
from .witnesses import close, gradients, library, name_of, sets_of

N, D = SIZES
MODULES: dict[str, type[losses.Objective]] = {
    cls.function.__name__: cls
    for cls in (getattr(losses, name) for name in losses.__all__)
    if inspect.isclass(cls) and hasattr(cls, "function")
}
# Those that keep a state are tested by themselves, in test_minc.py and test_normalizers.py.
STATEFUL = {"minc": {"d": 4}, "sogclr": {"size": 9}, "fast_clip": {"size": 9}}
SETS = [(case, index) for case, index in sets_of() if case.name not in STATEFUL]


def module_and_rows(
    case: Case, index: int, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, list[Tensor], dict, dict]:
    """The module with its settings, leaves, what is given at the call, and all arguments of the function."""
    rows = case.rows_of(N, D, dtype)
    arguments = case.arguments(index, N, D, rows[0])
    cls = MODULES[case.name]
    settings = {k: v for k, v in arguments.items() if k in cls.settings}
    data = {k: v for k, v in arguments.items() if k not in cls.settings}
    return cls(**settings), rows, data, arguments


def test_a_module_of_the_same_name_stands_beside_each_function() -> None:
    assert set(MODULES) == public_functions()
    for function, cls in MODULES.items():
        assert cls.__name__.lower() == function.replace("_", "") + "loss"


@pytest.mark.parametrize(("case", "index"), SETS, ids=name_of)
def test_the_module_is_its_function(case: Case, index: int) -> None:
    module, rows, data, arguments = module_and_rows(case, index)
    value, wanted = module(*rows, **data), library(case, rows, None, **arguments)
    # A scale that is learnt by its logarithm is a float32 parameter.
    rtol = 1e-5 if any(True for _ in module.parameters()) else 1e-12
    close(value, wanted, rtol=rtol)
    for got, want in zip(gradients(value, rows), gradients(wanted, rows), strict=True):
        close(got, want, rtol=rtol)


@pytest.mark.parametrize("name", [c.name for c in CASES if not c.label and c.name not in STATEFUL])
def test_defaults_are_the_functions(name: str) -> None:
    function = inspect.signature(getattr(fastcl.functional, name)).parameters
    module = inspect.signature(MODULES[name]).parameters
    for key, parameter in function.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and key in MODULES[name].settings:
            if parameter.default is inspect.Parameter.empty:
                assert module[key].default is not inspect.Parameter.empty, f"{key} needs a default in the module"
            else:
                assert module[key].default == parameter.default, key


@pytest.mark.parametrize("case", [c for c in CASES if not c.label and c.name not in STATEFUL], ids=name_of)
def test_copies_and_saves(case: Case) -> None:
    module, rows, data, _ = module_and_rows(case, 0)
    value = module(*rows, **data)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    fresh = type(module)()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    fresh_settings = {k: getattr(module, k) for k in module.settings if not isinstance(getattr(module, k), nn.Module)}
    for key, setting in fresh_settings.items():
        setattr(fresh, key, setting)
    for twin in (*twins, fresh):
        assert torch.equal(twin(*rows, **data), value)
        assert repr(twin) == repr(module)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.scalars and not c.label and c.name not in STATEFUL], ids=name_of
)
def test_settings_may_be_parameters_or_buffers(case: Case) -> None:
    for name, value in case.scalars.items():
        for wrap in (nn.Parameter, lambda t: t):
            rows = case.rows_of(N, D)
            arguments = case.arguments(0, N, D, rows[0]) | {name: wrap(torch.tensor(value))}
            cls = MODULES[case.name]
            module = cls(**{k: v for k, v in arguments.items() if k in cls.settings})
            data = {k: v for k, v in arguments.items() if k not in cls.settings}
            assert name in module.state_dict()
            assert (name in dict(module.named_parameters())) == (wrap is nn.Parameter)
            module(*rows, **data).backward()
            if wrap is nn.Parameter:
                assert torch.isfinite(getattr(module, name).grad)
                assert getattr(module, name).grad != 0
            assert getattr(module.double(), name).dtype == torch.float64


@pytest.mark.parametrize("name", [c.name for c in CASES if not c.label])
def test_the_settings_show_and_unknown_ones_are_errors(name: str) -> None:
    cls = MODULES[name]
    given: dict[str, Any] = STATEFUL.get(name, {})
    module = cls(**given)
    for key in cls.settings:
        value = getattr(module, key)
        if key == "group":  # shown where a group is given
            continue
        if value is not None and not isinstance(value, (nn.Module, Tensor)):
            assert f"{key}=" in repr(module)
    with pytest.raises(TypeError, match="temprature"):
        cls(**given, temprature=0.1)
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', 'none', got 'meen'"):
        cls(**given, reduction="meen")
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'bloked'"):
        cls(**given, backend="bloked")


@pytest.mark.parametrize("name", MODULES)
def test_a_setting_that_is_given_at_the_call_is_named(name: str) -> None:
    module = MODULES[name](**STATEFUL.get(name, {}))
    advice = f"make {type(module).__name__}({{0}}=...), or call fastcl.functional.{name}"
    for setting in module.settings:
        said = f"{setting}: expected as a setting of the module, got it at its call; {advice.format(setting)}"
        with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
            module(torch.eye(4), torch.eye(4), **{setting: 0.5})


def test_clip_learns_its_scale_and_never_exceeds_its_bound() -> None:
    """Radford et al. 2021: initialised at 1 / 0.07, clipped at 100."""
    x, y = CASES[0].rows_of(N, D, torch.float32)
    loss = losses.CLIPLoss()
    (parameter,) = loss.parameters()
    torch.testing.assert_close(parameter.detach().exp(), torch.tensor([1 / 0.07]))
    loss(x, y).backward()
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    fastcl.functional.clip(x, y, logit_scale=scale).backward()
    # d/d log scale = scale d/d scale
    torch.testing.assert_close(parameter.grad[0], scale.grad * scale.detach(), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        parameter.fill_(10.0)
    torch.testing.assert_close(loss(x, y), fastcl.functional.clip(x, y, logit_scale=100.0), rtol=1e-5, atol=1e-6)
    loss.zero_grad()
    loss(x, y).backward()
    assert parameter.grad is not None
    assert torch.isfinite(parameter.grad)
    fixed = losses.CLIPLoss(logit_scale=5.0, learnable=False)
    assert not list(fixed.parameters())
    torch.testing.assert_close(fixed(x, y), fastcl.functional.clip(x, y, logit_scale=5.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [losses.CLIPLoss, losses.SigLIPLoss])
def test_a_scale_that_is_given_is_the_one_that_is_set_later(cls: Any) -> None:
    """A parameter is a scale, not its logarithm, without a bound; so is a tensor, which none takes later."""
    x, y = CASES[0].rows_of(N, D, torch.float32)
    assert torch.equal(
        cls(logit_scale=torch.tensor([7.0]))(x, y), cls(logit_scale=nn.Parameter(torch.tensor(7.0)))(x, y)
    )
    for scale in (nn.Parameter(torch.tensor(120.0)), losses.LogitScale(20.0)):
        given, later = cls(logit_scale=scale), cls()
        later.logit_scale = scale
        assert given.logit_scale is later.logit_scale is scale
        assert torch.equal(given(x, y), later(x, y))
        assert dict(given.named_parameters()).keys() == dict(later.named_parameters()).keys()


@pytest.mark.parametrize("cls", [losses.CLIPLoss, losses.SigLIPLoss])
def test_a_bound_is_checked_whatever_the_scale_is(cls: Any) -> None:
    for scale in (7.0, torch.tensor(7.0), nn.Parameter(torch.tensor(7.0))):
        with pytest.raises(ValueError, match="largest_scale: expected"):
            cls(logit_scale=scale, largest_scale=1e39)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: losses.LogitScale(-1.0), "initial: expected a number > 0"),
        (lambda: losses.LogitScale(8.0, largest=2.5), "initial: expected at most largest = 2.5, got 8"),
        (lambda: losses.LogitScale(8.0, largest=0.0), "largest: expected a number > 0"),
        (lambda: losses.CLIPLoss(logit_scale=1e39), "logit_scale: expected a number within the range of float32"),
        (lambda: losses.CLIPLoss(logit_scale=200.0), "logit_scale: expected at most largest_scale = 100.0, got 200"),
        (lambda: losses.SigLIPLoss(largest_scale=0.0), "largest_scale: expected a number > 0"),
        (lambda: losses.SigLIPLoss(logit_scale=None), "logit_scale: expected a number or a tensor with one element"),
        (lambda: losses.CLIPLoss(logit_scale=torch.ones(2)), "logit_scale: expected a number or a tensor with one"),
    ],
)
def test_an_error_of_a_scale_names_what_its_caller_gave(make: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(said)}"):
        make()


def test_a_module_works_inside_functional_call() -> None:
    x, y = CASES[0].rows_of(N, D, torch.float32)
    loss = losses.InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.2)))
    by_call = torch.func.functional_call(loss, {"temperature": torch.tensor(0.3)}, (x, y))
    torch.testing.assert_close(by_call, fastcl.functional.info_nce(x, y, temperature=0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learnable", [True, False])
def test_a_learned_number_is_one_that_float32_holds(learnable: bool) -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        fastcl.losses.SigLIPLoss(logit_bias=1e300, learnable=learnable)
