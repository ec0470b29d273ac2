"""Every way in which PyTorch differentiates: forward mode, torch.func, batched gradients, traced steps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx

import fastcl
from fastcl import functional, losses
from fastcl.dropin import open_clip
from fastcl.dropin.sentence_transformers import MultipleNegativesRankingLoss

from .cases import CASES, Case, two_views
from .witnesses import close, gradients, library, name_of, served

# Of the torch.jit that forward mode and torch.compile load, torch itself warns; of linearize's own tracing likewise.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]
N, D = 7, 4
WIDE = torch.float64


def of_rows(case: Case, backend: str | None = None, dtype: torch.dtype = WIDE, **changes: object):
    """The case as a function of its rows, the rows, and their gradients by autograd."""
    leaves = case.rows_of(N, D, dtype)
    arguments = case.arguments(0, N, D, leaves[0]) | changes
    rows = [x.detach() for x in leaves]

    def f(*rows: Tensor) -> Tensor:
        return library(case, rows, backend, **arguments)

    return f, rows, gradients(f(*leaves), leaves) if changes.get("reduction") != "none" else []


def derivative(gradients: list[Tensor], directions: list[Tensor]) -> Tensor:
    return sum(((g * d).sum() for g, d in zip(gradients, directions, strict=True)), torch.zeros((), dtype=WIDE))


def dual(f: Callable[..., Tensor], rows: list[Tensor], directions: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        value = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, rows, directions)))
        return torch.zeros_like(value.primal) if value.tangent is None else value.tangent


TRACED = ("nt_xent", "spectral")  # linearize takes a second to trace
FORWARD = {
    "dual numbers": dual,
    "jvp": lambda f, rows, d: torch.func.jvp(f, tuple(rows), tuple(d))[1],
    "linearize": lambda f, rows, d: torch.func.linearize(f, *rows)[1](*d),
    "jvp over vmap": lambda f, rows, d: torch.func.jvp(
        lambda *r: torch.func.vmap(f)(*(t[None] for t in r))[0], tuple(rows), tuple(d)
    )[1],
}


@pytest.mark.parametrize("backend", served(WIDE))
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_mode_is_the_gradient_along_a_direction(case: Case, backend: str) -> None:
    f, rows, of = of_rows(case, backend)
    directions = [torch.randn_like(x) for x in rows]
    for way, found in FORWARD.items():
        if way == "linearize" and case.name not in TRACED:
            continue
        close(found(f, rows, directions), derivative(of, directions), torch.ones((), dtype=WIDE), rtol=1e-9)


@pytest.mark.parametrize("backend", served(WIDE))
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_torch_func_has_the_gradients_of_backward(case: Case, backend: str) -> None:
    f, rows, of = of_rows(case, backend)
    every = tuple(range(len(rows)))

    def vjp(*rows: Tensor) -> tuple[Tensor, ...]:
        value, pull = torch.func.vjp(f, *rows)
        return pull(torch.ones_like(value))

    stacks = [torch.stack([x, torch.randn_like(x)]) for x in rows]
    ways = {
        "grad": lambda: torch.func.grad(f, every)(*rows),
        "vjp": lambda: vjp(*rows),
        "jacrev": lambda: torch.func.jacrev(f, every)(*rows),
        "vmap of grad": lambda: [g[0] for g in torch.func.vmap(torch.func.grad(f, every))(*stacks)],
    }
    for found in ways.values():
        for got, want in zip(found(), of, strict=True):
            close(got, want, torch.ones((), dtype=WIDE), rtol=1e-9)
    each = torch.stack([f(*(s[i] for s in stacks)) for i in range(2)])
    close(torch.func.vmap(f)(*stacks), each, torch.ones((), dtype=WIDE), rtol=1e-9)


@pytest.mark.parametrize("backend", served(WIDE))
def test_weights_along_a_direction_add_up_to_one_at_any_logit(backend: str) -> None:
    """Where log 2 is no digit of the log-sum-exp of two equal logits, either has one half still."""
    x, y = torch.full((2, 3), 1e16, dtype=WIDE), torch.full((2, 3), 1e16, dtype=WIDE)
    given = (lambda x: fastcl.pair_reduce(x, y, columns=True, backend=backend), (x,), (torch.ones_like(x),))
    for slope in torch.func.jvp(*given)[1]:
        close(slope, torch.full((2,), 3e16, dtype=WIDE), rtol=1e-12)


@pytest.mark.parametrize("norm", [1e-37, 1e-30, 1e-13, 1e-11])
def test_gradients_of_rows_about_the_clamp_do_not_vanish_under_a_transform(norm: float) -> None:
    """x / 1e-12 has a gradient over 1e-12: by way of 1e-12 over the row's largest it left float32."""
    x, y = (torch.nn.functional.normalize(t) * norm for t in two_views(4, 3))

    def f(x: Tensor, y: Tensor) -> Tensor:
        return fastcl.functional.spectral(x, y, normalize=True)

    for got, want in zip(torch.func.grad(f, (0, 1))(x.float(), y.float()), torch.func.grad(f, (0, 1))(x, y), strict=True):
        close(got, want, rtol=1e-4)


PROBLEMS = [
    ("dot", "identity", "logsumexp", "all"),
    ("sqdist", "identity", "logsumexp", "off_diagonal"),
    ("dot", "softplus", "sum", "off_diagonal"),
    ("sqdist", fastcl.pairs.Power(-0.5, 1e-3), "sum", "all"),
    ("dot", "square", "sum", "all"),
    ("dot", "identity", "sum", "off_diagonal"),
]


@pytest.mark.parametrize("backend", served(WIDE))
@pytest.mark.parametrize(("operand", "pair", "reduce", "mask"), PROBLEMS)
def test_every_argument_of_the_op_has_its_direction(operand, pair, reduce, mask, backend: str) -> None:
    """Each alone, since a tangent that is dropped hides among others; r and c, against autograd through `reference`."""
    given = {
        "x": torch.randn(6, 3, dtype=WIDE), "y": torch.randn(5, 3, dtype=WIDE), "scale": torch.tensor(0.7, dtype=WIDE),
        "shift": torch.tensor(0.3, dtype=WIDE), "bias_x": torch.randn(6, dtype=WIDE), "bias_y": torch.randn(5, dtype=WIDE),
    }  # fmt: skip

    def both(backend: str, name: str) -> Callable[[Tensor], Tensor]:
        def f(value: Tensor) -> Tensor:
            settings = {"operand": operand, "pair": pair, "reduce": reduce, "mask": mask, "columns": True}
            return torch.cat(fastcl.pair_reduce(**given | {name: value}, **settings, backend=backend))

        return f

    for name, value in given.items():
        direction = torch.randn_like(value)
        want = torch.func.jvp(both("reference", name), (value,), (direction,))[1]
        got = torch.func.jvp(both(backend, name), (value,), (direction,))[1]
        assert want.any()
        close(got, want, torch.ones((), dtype=WIDE), rtol=1e-9)


@pytest.mark.parametrize("backend", served(torch.float32))
def test_columns_have_directions_however_large_their_logits(backend: str) -> None:
    """c in float32 is off by more than exponents may be: weights of exp(z - c) were infinite, or all 0."""
    x, y = 1e3 * torch.randn(40, 4), 1e3 * torch.randn(40, 4) + 1e4

    def c(scale: Tensor) -> Tensor:
        return fastcl.pair_reduce(x, y, scale=scale, columns=True, backend=backend)[1]

    value, got = torch.func.jvp(c, (torch.tensor(473.0),), (torch.tensor(473.0),))
    torch.testing.assert_close(got, value)  # of one large term each: c is as the scale


@pytest.mark.parametrize("normalize", [True, False])
def test_forward_mode_of_what_modules_and_dropins_learn(normalize: bool) -> None:
    """A tangent on a scale, a bias or a positive alone."""
    x, y = torch.randn(N, D), torch.randn(N, D)
    functions = {
        "scale": lambda t: functional.clip(x, y, logit_scale=t, normalize=normalize),
        "temperature": lambda t: functional.info_nce(x, y, temperature=t, normalize=normalize),
        "bias": lambda t: functional.siglip(x, y, logit_scale=2.0, logit_bias=t, normalize=normalize),
        "mu": lambda t: functional.spectral(x, y, mu=t, normalize=normalize),
        "positive": lambda t: fastcl.pair_total(x, y, outer="contrast", positive=t.expand(N), mask="off_diagonal"),
        "open_clip": lambda t: open_clip.ClipLoss()(x, y, t),
        "open_clip, bias": lambda t: open_clip.SigLipLoss()(x, y, torch.tensor(2.0), t),
    }
    for f in functions.values():
        t = torch.tensor(1.7)
        (want,) = torch.autograd.grad(f(learned := t.clone().requires_grad_()), learned)
        assert want != 0.0
        for got in (torch.func.jacfwd(f)(t), torch.func.grad(f)(t), torch.func.jvp(f, (t,), (torch.ones(()),))[1]):
            close(got, want, torch.ones(()), rtol=1e-5)


def test_a_module_by_functional_call() -> None:
    module, x, y = losses.CLIPLoss(), torch.randn(N, D), torch.randn(N, D)
    parameters = dict(module.named_parameters())
    want = dict(zip(parameters, torch.autograd.grad(module(x, y), list(parameters.values())), strict=True))
    detached = {name: p.detach() for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x, y))

    for name, got in torch.func.grad(loss)(detached).items():
        close(got, want[name], torch.ones(()), rtol=1e-5)
    along = torch.func.jvp(loss, (detached,), ({name: torch.ones_like(p) for name, p in detached.items()},))[1]
    close(along, torch.stack([g.sum() for g in want.values()]).sum(), torch.ones(()), rtol=1e-5)


def test_attenuated_gradients_of_a_dropin() -> None:
    """Stop-gradients within a loss hold in every mode."""
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), hardness_mode="in_batch_negatives", hardness_strength=3.0)
    x, y = torch.randn(N, D, dtype=WIDE), torch.randn(N, D, dtype=WIDE)

    def f(x: Tensor) -> Tensor:
        return loss.compute_loss_from_embeddings([x, y])

    (want,) = torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)
    for got in (torch.func.grad(f)(x), torch.func.jacfwd(f)(x)):
        close(got, want, torch.ones((), dtype=WIDE), rtol=1e-9)


SECOND = {
    "forward over reverse": lambda f: torch.func.jacfwd(torch.func.grad(f)),
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.grad(f)),
    "reverse over forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("form", ["rows", "total"])
def test_second_derivatives_are_right_or_refused(form: str, way: str) -> None:
    """Over a gradient only `reference` has them; over forward mode, which is plain PyTorch, every backend."""
    x, y = torch.randn(4, 3, dtype=WIDE), torch.randn(5, 3, dtype=WIDE)

    def loss(backend: str) -> Callable[[Tensor], Tensor]:
        if form == "total":
            return lambda a: fastcl.pair_total(a, y, outer="pooled", backend=backend)
        return lambda a: fastcl.pair_reduce(a, y, backend=backend).square().sum()

    def dense(a: Tensor) -> Tensor:
        z = a @ y.T
        return torch.logsumexp(z.flatten(), 0) if form == "total" else torch.logsumexp(z, 1).square().sum()

    want = torch.func.hessian(dense)(x)
    close(SECOND[way](loss("reference"))(x), want, want.abs().max(), rtol=1e-10)
    if "over reverse" not in way:
        close(SECOND[way](loss("blocked"))(x), want, want.abs().max(), rtol=1e-10)
        return
    with pytest.raises(
        RuntimeError, match=r"a derivative of a gradient .* 'blocked' backend .* pass backend='reference'"
    ):
        SECOND[way](loss("blocked"))(x)


def test_levels_of_torch_func_do_not_hide_each_other() -> None:
    """A value computed within an inner transform keeps its derivative for the outer one."""
    x, y, d = (torch.randn(4, 3, dtype=WIDE) for _ in range(3))

    def nested(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda a: 2.0 * torch.func.jvp(f, (a,), (d,))[0] + torch.func.vjp(f, a)[0]

    ours, dense = lambda a: fastcl.pair_reduce(a, y).sum(), lambda a: torch.logsumexp(a @ y.T, 1).sum()
    want = torch.func.grad(nested(dense))(x)
    close(torch.func.grad(nested(ours))(x), want, want.abs().max(), rtol=1e-10)
    close(torch.func.jacfwd(nested(ours))(x), want, want.abs().max(), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.rows], ids=name_of)
def test_batched_gradients_are_those_one_by_one(case: Case, dtype: torch.dtype) -> None:
    f, rows, _ = of_rows(case, dtype=dtype, reduction="none")
    one_by_one = jacobian(f, tuple(rows))
    for got, want in zip(jacobian(f, tuple(rows), vectorize=True), one_by_one, strict=True):
        close(got, want, want.abs().max(), rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.label], ids=name_of)
def test_a_whole_step_is_traced(case: Case, mode: str) -> None:
    """Forward, loss and gradients by make_fx: the graph holds for other rows, so that no value was looked at on the way."""
    f, rows, _ = of_rows(case, dtype=torch.float32)

    def step(*rows: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in rows]
        return tuple(gradients(f(*leaves), leaves))

    if mode == "symbolic" and case.name in ("sup_con", "sincere", "minc", "sogclr", "fast_clip"):
        pytest.skip("its labels or its state are no input of the step, and real tensors meet no fake ones")
    graph = make_fx(step, tracing_mode=mode)(*rows)
    others = [torch.randn_like(x) for x in rows]
    for got, want in zip(graph(*others), step(*others), strict=True):
        close(got, want, want.abs().max(), rtol=1e-5)


@pytest.mark.parametrize("way", ["jvp", "grad"])
def test_transforms_compile_whole(way: str) -> None:
    torch._dynamo.reset()
    x, y, d = (torch.randn(N, D) for _ in range(3))

    def run(x: Tensor, d: Tensor) -> Tensor:
        def f(a: Tensor) -> Tensor:
            return functional.clip(a, y, logit_scale=3.0)

        return torch.func.jvp(f, (x,), (d,))[1] if way == "jvp" else torch.func.grad(f)(x)

    want = run(x, d)
    close(torch.compile(run, fullgraph=True, backend="aot_eager")(x, d), want, want.abs().max(), rtol=1e-5)
