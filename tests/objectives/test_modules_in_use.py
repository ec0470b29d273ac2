"""Modules in use: scales with a bound, copies and saves with a group, texts without numbers, names of arguments."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import AveragedModel

from fastcl import Ranks, functional, losses

from .test_modules import MODULES, STATEFUL

D = 4
X, Y = (torch.randn(6, D, generator=torch.Generator().manual_seed(s)) for s in (1, 2))


@pytest.fixture
def world() -> Iterator[None]:
    """torch.distributed with one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_scale_beyond_its_bound_comes_back_and_goes_no_further(dtype: torch.dtype, training: bool) -> None:
    scale = losses.LogitScale(50.0, 100.0).to(dtype).train(training)
    with torch.no_grad():
        scale.log.fill_(5.5)
    before = scale.log.detach().clone()
    for upstream, moves in ((1.0, True), (-1.0, False)):
        factor = scale()
        assert factor.shape == ()
        torch.testing.assert_close(float(factor.detach()), 100.0, rtol=1e-5, atol=0.0)
        (gradient,) = torch.autograd.grad(factor, scale.log, torch.tensor(upstream, dtype=factor.dtype))
        torch.testing.assert_close(gradient.item(), 100.0 if moves else 0.0, rtol=1e-2, atol=0.0)
    assert torch.equal(scale.log, before), "the parameter was clamped in place"


def test_a_master_copy_keeps_the_bound() -> None:
    """An optimiser of its own copy in float32, which is written back to the parameter after each step."""
    scale = losses.LogitScale(90.0, 100.0).bfloat16()
    master = scale.log.detach().float().requires_grad_()
    optimizer = torch.optim.SGD([master], lr=1e-3)
    for sign in [-1.0] * 20 + [1.0] * 3:
        (gradient,) = torch.autograd.grad(scale(), scale.log, torch.tensor(sign))
        master.grad = gradient.float()
        optimizer.step()
        with torch.no_grad():
            scale.log.copy_(master)
        assert float(scale().detach()) <= 100.001
        assert float(master.detach()) < 4.75  # one step beyond log(100) = 4.605
    assert float(master.detach()) < 4.605


@pytest.mark.parametrize("cls", [losses.CLIPLoss, losses.SigLIPLoss])
def test_numbers_of_older_checkpoints_load(cls: type[losses.CLIPLoss]) -> None:
    module = cls(logit_scale=20.0)
    assert {tuple(p.shape) for p in module.parameters()} == {(1,)}  # FSDP2 shards no 0-dim parameter
    old = {name: t.reshape(()) + 0.5 for name, t in module.state_dict().items()}
    for learnable in (True, False):
        fresh = cls(learnable=learnable)
        fresh.load_state_dict(copy.deepcopy(old))
        assert {name: float(t) for name, t in fresh.state_dict().items()} == {name: float(t) for name, t in old.items()}


@pytest.mark.parametrize("name", ["world", "mesh", "part", "ranks"])
@pytest.mark.parametrize("cls", MODULES.values(), ids=MODULES)
@pytest.mark.usefixtures("world")
def test_copies_keep_the_group_and_saves_name_it(cls: type[losses.Objective], name: str) -> None:
    group = {
        "world": lambda: dist.group.WORLD,
        "mesh": lambda: init_device_mesh("cpu", (1,)),
        "part": lambda: dist.new_group([0]),
        "ranks": lambda: Ranks(dist.group.WORLD, "exact", "ring"),
    }
    module = cls(**STATEFUL.get(cls.function.__name__, {}), group=group[name]())
    model = nn.Sequential(nn.Linear(D, D))
    model.loss = module
    for twin in (copy.deepcopy(module), copy.copy(module), AveragedModel(model).module.loss):
        assert twin.group is module.group
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for saved in (pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False).loss):
        assert "ranks=(0,)" in repr(saved)
        again = pickle.loads(pickle.dumps(saved))
        if cls is losses.InfoNCELoss:  # the ranks are all that run: the group is found again
            assert torch.equal(again(X, Y), module(X, Y))


def test_copies_of_what_is_compiled_in_place_are_modules_of_their_own() -> None:
    """`compile()` keeps a call bound to its module: a copy with it had the loss, and the gradients, of the original."""
    loss = losses.CLIPLoss(learnable=True)
    loss.compile(backend="eager")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), AveragedModel(nn.ModuleList([loss])).module[0]):
        with torch.no_grad():
            twin.logit_scale.log.zero_()
        value = twin(X, Y)
        value.backward()
        torch.testing.assert_close(value, functional.clip(X, Y, logit_scale=1.0))
        assert twin.logit_scale.log.grad is not None and loss.logit_scale.log.grad is None
    shallow = copy.copy(losses.InfoNCELoss(temperature=0.5))
    shallow.compile(backend="eager")
    other = copy.copy(shallow)
    other.temperature = 0.05
    torch.testing.assert_close(other(X, Y), functional.info_nce(X, Y, temperature=0.05))


@pytest.mark.usefixtures("world")
def test_ranks_in_a_module_of_the_callers_own() -> None:
    """Copied and saved as those in our modules are."""
    ranks = Ranks(dist.group.WORLD, "exact", "ring")
    own = nn.Module()
    own.ranks = ranks
    assert copy.deepcopy(own).ranks is ranks
    saved = pickle.loads(pickle.dumps(own)).ranks
    assert (saved.gradient, saved.strategy) == ("exact", "ring")
    assert torch.equal(losses.InfoNCELoss(group=saved)(X, Y), losses.InfoNCELoss(group=ranks)(X, Y))
    with pytest.raises(TypeError, match="group: expected a process group, got Ranks"):
        Ranks(ranks)  # type: ignore[arg-type]


def test_a_saved_group_that_cannot_be_found_says_so(world: None) -> None:
    module = losses.InfoNCELoss(group=dist.group.WORLD)
    text = pickle.dumps(module)
    dist.destroy_process_group()
    loaded = pickle.loads(text)
    with pytest.raises(
        ValueError, match=r"torch.distributed does not run; call .*init_process_group first, or leave group out"
    ):
        loaded(X, Y)
    loaded.group = None
    assert loaded(X, Y).isfinite()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loaded.group = type(pickle.loads(text).group)((1, 3), False)
    with pytest.raises(
        ValueError, match=r"saved with a group of the ranks \[1, 3\], and groups are not saved; set its `group`"
    ):
        loaded(X, Y)


def test_texts_need_no_numbers() -> None:
    with torch.device("meta"):
        made = [losses.CLIPLoss(), losses.SigLIPLoss(), losses.MoCoQueue(D, 16), losses.MINCLoss(D)]
    made += [losses.InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.1))).to("meta"), losses.KCLLoss().to("meta")]
    assert "float32 on meta" in str(made[0])
    real = losses.CLIPLoss()
    with FakeTensorMode():
        made.append(losses.CLIPLoss())
        assert all(str(module) for module in (*made, real))


def test_a_subclass_keeps_what_it_defines() -> None:
    class Learned(losses.InfoNCELoss):
        reduction = "sum"

        def __post_init__(self) -> None:
            super().__post_init__()
            self.log = nn.Parameter(torch.tensor([0.2]).log())

        @property
        def temperature(self) -> Tensor:
            return self.log.exp()

    module = Learned()
    torch.testing.assert_close(module(X, Y), functional.info_nce(X, Y, temperature=0.2, reduction="sum"))
    module(X, Y).backward()
    assert module.log.grad is not None
    assert isinstance(inspect.getattr_static(Learned, "temperature"), property)
    with pytest.raises(TypeError, match="temperature"):
        Learned(temperature=0.3)

    class Cooler(losses.InfoNCELoss):
        temperature = 0.05

    torch.testing.assert_close(Cooler()(X, Y), functional.info_nce(X, Y, temperature=0.05))


@pytest.mark.parametrize("cls", [losses.CLIPLoss, losses.SigLIPLoss])
def test_a_subclass_states_a_scale(cls: type[losses.Objective]) -> None:
    """A property in place of the learned scale and bias: there are no parameters then, and the loss is that of the numbers."""
    stated = {"logit_scale": 3.0} | ({"logit_bias": -2.0} if cls is losses.SigLIPLoss else {})
    module = type("Stated", (cls,), {name: property(lambda _, v=value: v) for name, value in stated.items()})()
    assert not list(module.parameters())
    torch.testing.assert_close(module(X, Y), cls.function(X, Y, **stated))


def test_a_subclass_states_a_number_of_numpy() -> None:
    class Stated(losses.InfoNCELoss):
        @property
        def temperature(self) -> np.float32:
            return np.float32(0.25)

    torch.testing.assert_close(Stated()(X, Y), functional.info_nce(X, Y, temperature=0.25))


@pytest.mark.parametrize("cls", MODULES.values(), ids=MODULES)
def test_arguments_have_names(cls: type[losses.Objective]) -> None:
    """Those of the function that are no settings, and nothing of its own keeping."""
    given = STATEFUL.get(cls.function.__name__, {})
    own = ("statistic", "log_u", "return_log_u") if given else ()
    wanted = [name for name in inspect.signature(cls.function).parameters if name not in (*cls.settings, *own)]
    if "size" in given:
        wanted.insert(2, "index")
    module = cls(**given)
    assert list(inspect.signature(module.forward).parameters) == wanted
    assert "self" not in wanted


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, of its strict export
@pytest.mark.parametrize("strict", [True, False])
def test_export_by_names(strict: bool) -> None:
    n = torch.export.Dim("n", min=2, max=512)
    for shapes in ({"x": {0: n}, "y": {0: n}}, ({0: n}, {0: n})):
        program = torch.export.export(losses.CLIPLoss(), (X, Y), dynamic_shapes=shapes, strict=strict)
        torch.testing.assert_close(program.module()(X[:3], Y[:3]), losses.CLIPLoss()(X[:3], Y[:3]))


@pytest.mark.parametrize("setting", ["gradient", "strategy"])
def test_names_are_checked_without_a_group(setting: str) -> None:
    for function in (functional.info_nce, functional.nt_xent, functional.alignment, functional.kcl):
        with pytest.raises(ValueError, match=f"{setting}: expected one of"):
            function(X, Y, group=Ranks(None, **{setting: "rign"}))
