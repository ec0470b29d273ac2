"""What encoders keep between their calls moves once, and both passes see the same of it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastcl
from fastcl import losses
from fastcl.encoder_state import modules_of

from .towers import WIDTH, gradients, normed_tower, rows, same, step_with_every_graph, tower

LOSS = losses.NTXentLoss()


def test_buffers_move_once() -> None:
    batches, found = [rows(12, 0), rows(12, 1)], []
    for cached in (True, False):
        encoder = nn.Sequential(tower(0), nn.BatchNorm1d(WIDTH, dtype=torch.float64))
        torch.manual_seed(7)
        if cached:
            fastcl.cached_step(encoder, batches, losses.NTXentLoss(), chunk=4)
        else:
            step_with_every_graph([encoder, encoder], batches, losses.NTXentLoss(), 4)
        found.append([*encoder.buffers(), *gradients(encoder)])
    assert found[0][2] == 6
    same(*found)


class Towers(nn.Module):
    """A model whose tower is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(tower(0, 0.0), nn.BatchNorm1d(WIDTH, dtype=torch.float64))

    def encode(self, x: Tensor) -> Tensor:
        return self.tower(x)


class Holder:
    """A trainer of one's own."""

    def __init__(self, model: Towers) -> None:
        self.models = [model]

    def embed(self, x: Tensor) -> Tensor:
        return self.models[0].encode(x)

    __call__ = embed


class Slots:
    """A callable that keeps its model in a slot."""

    __slots__ = ("__model",)

    def __init__(self, model: Towers) -> None:
        self.__model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.__model.encode(x)


class Apart(nn.Module):
    """A module that keeps its model in a list, so that an optimizer does not find it."""

    def __init__(self, model: Towers) -> None:
        super().__init__()
        self.models = [model]

    def forward(self, x: Tensor) -> Tensor:
        return self.models[0].encode(x)


class Hidden:
    """A callable whose model cannot be found."""

    def __init__(self, model: Towers) -> None:
        self.holder = Holder(model)

    def __call__(self, x: Tensor) -> Tensor:
        return self.holder.embed(x)


GLOBAL: Any = None


def by_global(x: Tensor) -> Tensor:
    return torch.cat([encoded(part) for part in x.split(2)])


def encoded(x: Tensor) -> Tensor:
    return GLOBAL.encode(x)


WAYS: dict[str, Any] = {
    "module": lambda m: m.tower,
    "bound method": lambda m: m.encode,
    "partial": lambda m: functools.partial(m.encode),
    "partial of arguments": lambda m: functools.partial(lambda model, x: model.encode(x), m),
    "closure": lambda m: lambda x: m.encode(x),
    "closure of a list": lambda m: (lambda models: lambda x: models[0].encode(x))([m]),
    "closure of a function": lambda m: (lambda f: lambda x: f(x))(lambda x: m.encode(x)),
    "default": lambda m: lambda x, m=m: m.encode(x),
    "method of an object": lambda m: Holder(m).embed,
    "object that is called": lambda m: Holder(m),
    "slot": lambda m: Slots(m),
    "list of a module": lambda m: Apart(m),
    "list of a part": lambda m: nn.Sequential(Apart(m)),
    "set": lambda m: (lambda models: lambda x: next(iter(models)).encode(x))({m}),
    "deque": lambda m: (lambda models: lambda x: models[0].encode(x))(deque([m])),
    "list met within lists first": lambda m: (
        lambda models: (lambda a, b: lambda x: (a, b[0].encode(x))[1])([[models]], models)
    )([m]),
    "closure of an object": lambda m: (lambda holder: lambda x: holder.models[0].encode(x))(Holder(m)),
    "compiled": lambda m: torch.compile(m.encode, backend="eager"),
    "decorated": lambda m: torch.autocast("cpu", enabled=False)(m.encode),
    "global": lambda m: by_global,
    "named in ddp": lambda m: Hidden(m),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("root_trains", [True, False])
def test_buffers_move_once_wherever_the_module_is_held(
    way: str, root_trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part trains and what holds it does not."""
    batches, found = [rows(12, 0), rows(12, 1)], []
    for cached in (True, False):
        model = Towers()
        monkeypatch.setitem(globals(), "GLOBAL", model)
        model.training = model.tower.training = root_trains
        encoder = WAYS[way](model)
        if cached:
            named = [model] if way == "named in ddp" else []
            fastcl.cached_step(encoder, batches, losses.NTXentLoss(), chunk=4, ddp=named)
        else:
            step_with_every_graph([encoder, encoder], batches, losses.NTXentLoss(), 4)
        found.append([*model.buffers(), *gradients(model)])
    assert found[0][2] == (12 if way == "global" else 6)  # which cuts each chunk in two
    same(*found)


def test_buffers_stay_where_later_calls_left_them() -> None:
    """A graph between the passes moves them too, and its backward finds what it saved."""
    batches, found = [rows(12, 0), rows(12, 1)], []
    for cached in (True, False):
        model, loss = Towers(), losses.NTXentLoss()
        if cached:
            x, y = fastcl.cached_embeddings(model.encode, batches, chunk=4)
        else:
            x, y = (torch.cat([model.encode(part) for part in b.split(4)]) for b in batches)
        (loss(x, y) + model.encode(rows(5, 2)).square().sum()).backward()
        found.append([*model.buffers(), *gradients(model)])
    assert found[0][2] == 7
    same(*found)


class Centred(nn.Module):
    """A buffer that forward reads alone, and another method moves in place, by another tensor, or past its version."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(5, 16).double(), nn.Linear(16, WIDTH).double()
        self.register_buffer("centre", torch.zeros(16, dtype=torch.float64))
        self.moves = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.linear(x) - (1 + self.moves) * self.centre))

    def move(self, way: str) -> None:
        self.moves += 1
        if way == "another":
            self.centre = self.centre + 0.1
        else:
            (self.centre.data if way == "unseen" else self.centre).add_(0.1)


@pytest.mark.parametrize("way", ["in place", "another", "unseen"])
@pytest.mark.parametrize("lazily", [True, False])
def test_a_loss_may_move_what_encoders_read(way: str, lazily: bool) -> None:
    """The second pass sees it as the first did, and it stays as the loss left it."""
    batches, found = [rows(11, 0), rows(11, 1)], []
    for cached in (True, False):
        torch.manual_seed(1)
        encoder = Centred()
        encoder.move(way)

        def loss(a: Tensor, b: Tensor, encoder: Centred = encoder) -> Tensor:
            encoder.move(way)
            return LOSS(a, b)

        if not cached:
            step_with_every_graph([encoder, encoder], batches, loss, 4)
        elif lazily:
            loss(*fastcl.cached_embeddings(encoder, batches, chunk=4)).backward()
        else:
            fastcl.cached_step(encoder, batches, loss, chunk=4)
        assert encoder.moves == 2
        found.append([*encoder.buffers(), *gradients(encoder)])
    same(*found)


def test_buffers_that_the_second_pass_alone_moves_stay_so() -> None:
    """By a hook of the backward; not those that the first pass moved and the loss took back."""
    encoder = tower(0, 0.0)
    for name in ("calls", "backwards"):
        encoder.register_buffer(name, torch.zeros(()))
    encoder.register_forward_pre_hook(lambda *_: (encoder.calls.add_(1), None)[1])
    encoder[4].register_full_backward_hook(lambda *_: (encoder.backwards.add_(1), None)[1])
    batches = [rows(12, 0), rows(12, 1)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        assert encoder.calls == 6
        encoder.calls.zero_()
        return LOSS(a, b)

    fastcl.cached_step(encoder, batches, loss, chunk=4)
    assert encoder.calls == 0 and encoder.backwards == 6


class Counting(nn.Module):
    """State that makes each output: a buffer written in place, and one replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, WIDTH).double()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean) * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("make", [normed_tower, Counting])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lazily", [True, False])
def test_state_in_buffers_repeats(make: Any, shared: bool, lazily: bool) -> None:
    """The second pass starts where the first did, and visits chunks in its order."""
    batches, found = [rows(11, 0), rows(11, 1)], []
    for cached in (True, False):
        torch.manual_seed(1)
        encoders = [make()] * 2 if shared else [make(), make()]
        if not cached:
            step_with_every_graph(encoders, batches, LOSS, 4)
        elif lazily:
            LOSS(*fastcl.cached_embeddings(encoders, batches, chunk=4)).backward()
        else:
            fastcl.cached_step(encoders, batches, LOSS, chunk=4)
        found.append([t for e in encoders for t in e.buffers()] + gradients(*dict.fromkeys(encoders)))
    same(*found)


@pytest.mark.parametrize("under", [torch.no_grad, torch.inference_mode])
def test_without_gradients_buffers_move_once(under: Any) -> None:
    model = Towers()
    with under():
        fastcl.cached_embeddings(model.encode, [rows(12, 0)], chunk=4)
    assert model.tower[1].num_batches_tracked == 3


def test_modules_are_not_searched_for_in_large_containers_and_other_files() -> None:
    """Each once, and cycles end."""
    model, many = Towers(), [nn.Linear(1, 1)] * 101
    cycle: list[Any] = [model]
    cycle.append(cycle)
    assert modules_of([lambda x: (model, many, cycle, F.relu, x), model]) == [model]


class Making(Counting):
    """As Counting, of which the buffers are made by the first call, which a flag tells of."""

    def __init__(self) -> None:
        super().__init__()
        del self.mean, self.calls
        self.register_buffer("calls", None)
        self.made = False

    def forward(self, x: Tensor) -> Tensor:
        if self.calls is None:
            self.calls = x.new_zeros(())
        if not self.made:
            self.register_buffer("mean", torch.zeros_like(x[0]))
            self.made = True
        return super().forward(x)


class Resizing(nn.Module):
    """A buffer that grows in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, WIDTH).double()
        self.register_buffer("seen", torch.zeros(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.seen)
        self.seen.resize_(n + 1)[n] = x.detach().mean()
        return self.linear(x) * (1 + 0.1 * len(self.seen))


class Expanded(nn.Module):
    """A buffer of equal entries, replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, WIDTH).double()
        self.register_buffer("scales", torch.ones(1, dtype=torch.float64).expand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.scales = (self.scales[:1] + 0.1).expand(WIDTH)
        return self.linear(x) * self.scales


@pytest.mark.parametrize("make", [Making, Resizing, Expanded])
@pytest.mark.parametrize("called", [False, True])
def test_buffers_that_are_made_or_take_another_shape_move_once(make: Any, called: bool) -> None:
    batches, found = [rows(11, 0), rows(11, 1)], []
    for cached in (True, False):
        torch.manual_seed(1)
        encoder = make()
        if called:
            encoder(rows(3, 2))
        if cached:
            fastcl.cached_step(encoder, batches, LOSS, chunk=4)
        else:
            step_with_every_graph([encoder, encoder], batches, LOSS, 4)
        found.append([*encoder.buffers(), *gradients(encoder)])
    same(*found)


def test_lazy_buffers_move_once() -> None:
    batches, found = [rows(11, 0), rows(11, 1)], []
    for cached in (True, False):
        encoder = nn.Sequential(tower(1), nn.LazyBatchNorm1d(dtype=torch.float64))
        encoder[0][0].uncalled = nn.LazyLinear(3)
        torch.manual_seed(1)
        if cached:
            fastcl.cached_step(encoder, batches, LOSS, chunk=4)
        else:
            step_with_every_graph([encoder, encoder], batches, LOSS, 4)
        found.append([*encoder.buffers(), *gradients(encoder[0][4], encoder[1])])
    assert int(encoder[1].num_batches_tracked) == 6
    same(*found)


LAYOUTS = {
    "coo": lambda: torch.eye(5, dtype=torch.float64).to_sparse(),
    "csr": lambda: torch.eye(5, dtype=torch.float64).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("moves", ["never", "by another", "in place"])
def test_buffers_of_every_layout_serve(layout: str, moves: str) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, WIDTH).double()
            self.register_buffer("mixed", LAYOUTS[layout]())

        def forward(self, x: Tensor) -> Tensor:
            if layout in ("coo", "csr"):
                x = (self.mixed @ x.mT).mT
            if moves == "by another":
                self.mixed = self.mixed * 1.1
            elif moves == "in place":
                self.mixed.mul_(1.1)
            return self.linear(x)

    batches, found = [rows(11, 0), rows(11, 1)], []
    for cached in (True, False):
        torch.manual_seed(1)
        encoder = Mixing()
        if cached:
            fastcl.cached_step(encoder, batches, LOSS, chunk=4)
        else:
            step_with_every_graph([encoder, encoder], batches, LOSS, 4)
        mixed = encoder.mixed.to_dense() if layout in ("coo", "csr") else torch.cat(list(encoder.mixed.unbind()))
        found.append([mixed, *gradients(encoder)])
    same(*found)


@pytest.mark.filterwarnings("ignore:The PyTorch API of Masked:UserWarning")
def test_buffers_that_torch_does_not_compare_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, float4 = tower(0), getattr(torch, "float4_e2m1fn_x2", torch.bits8)  # from torch 2.8 on
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it does not know these
    encoder.register_buffer("masked", masked_tensor(torch.ones(2), torch.tensor([True, False])))
    encoder.register_buffer("packed", torch.arange(4, dtype=torch.uint8).view(float4))
    encoder.register_forward_pre_hook(
        lambda *_: (encoder.packed.view(torch.uint8).add_(1), encoder.masked.mul_(2), None)[2]
    )
    fastcl.cached_step(encoder, [rows(12, 0), rows(12, 1)], LOSS, chunk=4)
    assert encoder.packed.view(torch.uint8).tolist() == [6, 7, 8, 9]
    assert encoder.masked.to_tensor(0.0).tolist() == [2.0**6, 0.0]


@pytest.mark.parametrize("moving", [False, True])
def test_modules_that_the_first_call_makes_are_made_once(moving: bool) -> None:
    """Be it in a module with buffers that move."""
    made: list[nn.Module] = []

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.norm = tower(1, 0.0), None
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += moving
            if self.norm is None:
                self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
                made.append(self.norm)
            return self.norm(self.tower(x)) * (1 + self.calls)

    batches, found = [rows(12, 0), rows(12, 1)], []
    for cached in (True, False):
        encoder = Late()
        made.clear()
        if cached:
            fastcl.cached_step(encoder, batches, LOSS, chunk=4)
        else:
            step_with_every_graph([encoder, encoder], batches, LOSS, 4)
        assert made == [encoder.norm] and encoder.norm.num_batches_tracked == 6
        found.append([*encoder.buffers(), *gradients(encoder)])
    same(*found)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_scripted_modules_move_once() -> None:
    batches, found = [rows(11, 0), rows(11, 1)], []
    for cached in (True, False):
        encoder = nn.Sequential(tower(1, 0.0), nn.BatchNorm1d(WIDTH, dtype=torch.float64))
        scripted = torch.jit.script(encoder)
        if cached:
            fastcl.cached_step(scripted, batches, LOSS, chunk=4)
        else:
            step_with_every_graph([scripted, scripted], batches, LOSS, 4)
        found.append([*scripted.buffers(), *gradients(scripted)])
    same(*found)


class Moving(nn.Module):
    """A buffer that is moved in place, a count of its moves, and values that only one of both passes sets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, WIDTH).double()
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))
        self.count, self.cached, self.hooked = 0, None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        if torch.is_grad_enabled():
            self.load, self.cached = 1.0, None
        else:
            self.cached = x
        return self.linear(x - self.mean / (1 - 0.9**self.count))


def test_plain_values_go_with_buffers_and_others_stay() -> None:
    batches, found = [rows(11, 0), rows(11, 1)], []
    for cached in (True, False):
        torch.manual_seed(1)
        encoder = Moving()
        encoder.linear.weight.register_hook(lambda g, e=encoder: setattr(e, "hooked", e.hooked + 1))
        if cached:
            fastcl.cached_step(encoder, batches, LOSS, chunk=4)
        else:
            step_with_every_graph([encoder, encoder], batches, LOSS, 4)
        assert encoder.load == 1.0 and encoder.cached is None and encoder.hooked > 0
        found.append([torch.tensor(float(encoder.count)), *encoder.buffers(), *gradients(encoder)])
    same(*found)


def test_graphs_that_saved_a_buffer_find_it() -> None:
    found = []
    for cached in (True, False):
        model = Towers()
        before = model.encode(rows(5, 2))
        x = fastcl.cached_embeddings(model.encode, [rows(12, 0)], chunk=12)[0] if cached else model.encode(rows(12, 0))
        (x.square().sum() + (before * rows(5, 3)[:, :1]).sum()).backward()
        found.append([*model.buffers(), *gradients(model)])
    same(*found)


@pytest.mark.parametrize("make", [weight_norm, spectral_norm])
@pytest.mark.parametrize("lazily", [True, False])
def test_parametrised_weights_are_cached_within_a_chunk(make: Any, lazily: bool) -> None:
    """Of one chunk, so that the plain step makes each weight as often."""
    batches, loss, found = [rows(11, 0)], lambda x: LOSS(x, x.roll(1, 1)), []
    for cached in (True, False):
        torch.manual_seed(1)
        encoder = nn.Sequential(make(nn.Linear(5, 16)), nn.GELU(), nn.Linear(16, WIDTH)).double()
        with parametrize.cached():
            if not cached:
                step_with_every_graph([encoder], batches, loss, 11)
            elif lazily:
                loss(*fastcl.cached_embeddings(encoder, batches, chunk=11)).backward()
            else:
                fastcl.cached_step(encoder, batches, loss, chunk=11)
        found.append([*encoder.buffers(), *gradients(encoder)])
    same(*found)


def test_attributes_that_run_code_are_not_asked() -> None:
    class Lookups(Mapping):
        def __getitem__(self, name: str) -> Any:
            raise KeyError(name)

        def __iter__(self) -> Any:
            return iter(["missing"])

        def __len__(self) -> int:
            return 1

    model = Towers()
    model.settings = Lookups()
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    model.deep = deep
    assert modules_of([model]) == [model]


class Refusing:
    """As a proxy of nothing: every question is an error."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    __class__ = __dict__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


class RefusingKind(type):
    """Of classes that answer nothing either."""

    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError(name)


class RefusingDict(dict):
    """With methods of its own."""

    __iter__ = __len__ = values = lambda self: 1 / 0


class RefusingList(list):
    """With methods of its own."""

    __iter__ = __len__ = lambda self: 1 / 0


class RefusingAttributes:
    """A model is among those that it does not show."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_no_code_of_what_is_found_runs() -> None:
    """Of proxies, containers and classes; what containers hold is found all the same."""
    model, kind = Towers(), RefusingKind("Kind", (), {})
    refusing = (Refusing(), RefusingDict(a=[Refusing()]), object.__new__(kind))
    assert modules_of([lambda: refusing, *refusing]) == []
    for holder in (RefusingDict(a=model), RefusingList([model]), RefusingAttributes(model)):
        assert modules_of([lambda holder=holder: holder]) == [model]
    vars(model)["held"] = refusing[0]
    fastcl.cached_step(model.encode, [rows(12, 0), rows(12, 1)], LOSS, chunk=4)
