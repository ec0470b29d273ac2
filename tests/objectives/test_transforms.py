"""What PyTorch does around an objective: autocast, torch.compile, checkpointing, inference mode, threads, other defaults."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastcl

from .cases import CASES, Case
from .witnesses import close, double_loop, gradients, library, name_of, served

N, D = 9, 6
SINGLE = torch.float32


def of_size(case: Case, n: int, dtype: torch.dtype = SINGLE):
    """Leaves and arguments that fit them."""
    rows = case.rows_of(n, D, dtype)
    return rows, case.arguments(0, n, D, rows[0])


def sharpness(case: Case, arguments: dict) -> float:
    """What multiplies an error of a cosine on its way into the value."""
    return max(case.logits(arguments), case.terms(arguments))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_autocast_rounds_rows_and_nothing_else(case: Case) -> None:
    """The op's rows become bfloat16, as mm's would; value and gradients stay float32, and right to bfloat16's precision."""
    rows, arguments = of_size(case, N)
    arguments |= {"normalize": True}
    exact = [x.detach().double().requires_grad_() for x in rows]
    truth = double_loop(case, exact, **arguments)
    wanted = gradients(truth, exact)
    eps = 2 * torch.finfo(torch.bfloat16).eps
    for backend in served(torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            value = library(case, rows, backend, **arguments)
        assert value.dtype == torch.float32
        scale = torch.tensor(max(sharpness(case, arguments), float(truth.detach().abs())))
        close(value, truth, scale, rtol=eps)
        for got, want in zip(gradients(value, rows), wanted, strict=True):
            assert got.dtype == torch.float32
            close(got, want, want.abs().max() * sharpness(case, arguments), rtol=eps)
            # A gradient can be wrong by the factor above only if it has the right direction.
            assert (
                not want.any()
                or torch.nn.functional.cosine_similarity(got.flatten().double(), want.flatten(), 0) > 0.99
            )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rows_of_the_other_half_precision_under_autocast(case: Case) -> None:
    rows, arguments = of_size(case, N, torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        value = library(case, rows, None, **arguments)
    assert value.dtype == SINGLE
    assert all(torch.isfinite(g).all() for g in gradients(value, rows))


# Of the Function that torch.compile traces, and of the torch.jit that it loads, torch itself warns.
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# One of each kind: a softmax, a column twin, an energy, a pooled form, two reductions in one, labels, and no pairs at all.
COMPILED = ("nt_xent", "clip", "f_micl", "uniformity", "hard_negative", "sup_con", "minc")


def of_one_name(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
    """A backend that looks at each Function's forward: what it returns is no second name of another intermediate.

    The compiler of torch 2.11 gives such a Function no gradient at all, and says nothing.
    """
    for name, body in graph.named_modules():
        if not name.rpartition(".")[2].startswith("fwd_body"):
            continue
        *nodes, end = body.graph.nodes
        held = [n for n in nodes if isinstance(n.meta.get("example_value"), torch.Tensor) and n.op != "placeholder"]
        stored = [n.meta["example_value"].untyped_storage()._cdata for n in held]
        returned = [held.index(n) for n in torch.utils._pytree.tree_leaves(end.args[0][0]) if n in held]
        assert [held[i] for i in returned if stored.count(stored[i]) > 1] == []
        SEEN.append(name)
    return graph


SEEN: list[str] = []


@compiling
@pytest.mark.parametrize("name", ["clip", "f_micl", "uniformity"])
def test_no_function_returns_a_second_name(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    torch._dynamo.reset()
    SEEN.clear()
    rows, arguments = of_size(case, N)
    torch.compile(lambda *rows: library(case, rows, None, **arguments), backend=of_one_name)(*rows)
    assert SEEN


@compiling
@pytest.mark.parametrize("case", [c for c in CASES if c.name in COMPILED and not c.label], ids=name_of)
def test_compiles_whole_for_any_size(case: Case) -> None:
    """fullgraph: no graph break and no host read; dynamic: one graph for every n."""
    torch._dynamo.reset()

    def run(*rows: torch.Tensor, **arguments: object) -> torch.Tensor:
        return library(case, rows, None, **arguments)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (N, N + 4):
        rows, arguments = of_size(case, n)
        with torch.compiler.set_stance("fail_on_recompile" if n > N else "default"):
            value = compiled(*rows, **arguments)
        plain = library(case, rows, None, **arguments)
        close(value, plain, rtol=1e-6)
        for got, want in zip(gradients(value, rows), gradients(plain, rows), strict=True):
            close(got, want, rtol=1e-6)


LISTED: dict[str, dict[str, float]] = {
    "info_nce": {"temperature": 0.2},
    "clip": {"logit_scale": 5.0},
    "nt_xent": {"temperature": 0.2},
    "siglip": {"logit_scale": 10.0, "logit_bias": -5.0},
}


@compiling
@pytest.mark.parametrize("name", LISTED)
def test_listed_positives_compile_whole_for_any_size(name: str) -> None:
    """One graph for every batch and list: no message of an error that is not raised may ask for a size."""
    torch._dynamo.reset()

    def run(x, y, i, j):
        return getattr(fastcl.functional, name)(x, y, positives=(i, j), **LISTED[name])

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 17, 33):
        x, y = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(n)).unbind()
        i = torch.arange(2 * n + 3) % n
        j = (i * 3 + torch.arange(2 * n + 3) // n + 1) % n
        with torch.compiler.set_stance("fail_on_recompile" if n > 9 else "default"):
            value = compiled(x, y, i, j)
        close(value, run(x, y, i, j), rtol=1e-6)


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip"])
def test_compiles_with_inductor(name: str) -> None:
    """The default compiler, and a temperature that is learnt."""
    torch._dynamo.reset()
    case = next(c for c in CASES if c.name == name and c.scalars)
    (scalar, value_of), *_ = case.scalars.items()
    compiled = torch.compile(lambda rows, **arguments: library(case, rows, None, **arguments), fullgraph=True)
    found = []
    for call in (compiled, lambda rows, **arguments: library(case, rows, None, **arguments)):
        rows, arguments = of_size(case, N)
        learnt = torch.tensor(value_of, requires_grad=True)
        value = call(rows, **arguments | {scalar: learnt})
        found.append([value.detach(), *gradients(value, [*rows, learnt])])
    for got, want in zip(*found, strict=True):
        close(got, want, torch.ones(()), rtol=2e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_checkpointed(case: Case, reentrant: bool) -> None:
    """A first pass without gradients, then one with: the op must notice which it is."""
    rows, arguments = of_size(case, N)
    value = checkpoint(lambda *r: library(case, r, None, **arguments), *rows, use_reentrant=reentrant)
    plain = library(case, rows, None, **arguments)
    # Reentrant checkpoints work with .backward() only.
    value.backward()
    for x, want in zip(rows, gradients(plain, rows), strict=True):
        assert torch.equal(torch.zeros_like(x) if x.grad is None else x.grad, want)


def _saved(context: object, op: object, *args: object, **given: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_checkpointed_with_every_result_saved(case: Case) -> None:
    """Selective checkpoints refuse what changes in place a result that they hold."""
    rows, arguments = of_size(case, 2 * N)
    value = checkpoint(
        lambda *r: library(case, r, None, **arguments),
        *rows,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _saved),
    )
    plain = gradients(library(case, rows, None, **arguments), rows)
    for got, want in zip(gradients(value, rows), plain, strict=True):
        close(got, want, rtol=2e-6)


def test_float16_checkpointed() -> None:
    """A learnt factor's steepness is saved, and unpacked once."""
    x, y = (torch.randn(N, 8, dtype=torch.float16, requires_grad=True) for _ in range(2))
    loss = fastcl.losses.CLIPLoss()
    plain = gradients(loss(x, y), [x, y])
    found = torch.autograd.grad(checkpoint(loss, x, y, use_reentrant=False), [x, y])
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("backend", served(SINGLE))
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_without_gradients(case: Case, backend: str) -> None:
    """no_grad, inference mode and rows that want no gradient give the same value."""
    rows, arguments = of_size(case, N)
    value = library(case, rows, backend, **arguments)
    with torch.no_grad():
        quiet = library(case, rows, backend, **arguments)
    with torch.inference_mode():
        inference = library(case, [x.detach().clone() for x in rows], backend, **arguments)
    plain = library(case, [x.detach() for x in rows], backend, **arguments)
    assert value.requires_grad
    assert not any(v.requires_grad for v in (quiet, inference, plain))
    assert all(torch.equal(v, value) for v in (quiet, inference, plain))


def _without_a_graph(value: object) -> object:
    """Its tensors, as a frozen teacher under inference mode makes them."""
    with torch.inference_mode():
        return tree_map_only(torch.Tensor, lambda t: t.detach().clone(), value)


@pytest.mark.parametrize("backend", served(SINGLE))
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_features_made_under_inference_mode(case: Case, backend: str) -> None:
    """Whatever wants no gradient may come from there; no graph keeps such a tensor, and the gradient is that of any other."""
    for index in case.sets():
        rows = case.rows_of(N, D, SINGLE)
        arguments = case.arguments(index, N, D, rows[0]) | {
            name: torch.tensor(value, dtype=SINGLE) for name, value in case.scalars.items()
        }
        given, of_given = [x.detach() for x in rows], _without_a_graph(arguments)
        teacher = _without_a_graph(given)
        for reduction in ("mean", "none") if case.rows else ("mean",):
            for own in range(len(rows)):
                found = []
                for others, more in ((given, arguments), (teacher, of_given)):
                    x = given[own].clone().requires_grad_(own not in case.detached)
                    value = library(case, [*others[:own], x, *others[own + 1 :]], backend, reduction=reduction, **more)
                    found.append([value.detach(), *gradients(value.sum(), [x])])
                assert all(map(torch.equal, *found)), f"{reduction}, input {own}, arguments {index}"
        assert torch.equal(library(case, given, backend, **arguments), library(case, teacher, backend, **of_given))


@pytest.mark.parametrize("backend", served(SINGLE))
@pytest.mark.parametrize("normalize", [True, False])
def test_modules_take_features_made_under_inference_mode(normalize: bool, backend: str) -> None:
    """Where their rows are kept, or cut, or a learned scale is."""
    losses, way = fastcl.losses, {"normalize": normalize, "backend": backend}
    (x, y), queue = torch.randn(2, N, D), losses.MoCoQueue(D, length=2 * N)
    queue.enqueue(_without_a_graph(y))
    index = torch.arange(N)
    modules = (
        (losses.CLIPLoss(**way), (y,)),
        (losses.SigLIPLoss(reduction="none", **way), (y,)),
        (losses.MINCLoss(D, **way), (y,)),
        (losses.SogCLRLoss(N, **way), (y, index)),
        (losses.MoCoLoss(**way), (y, queue.rows)),
        (losses.MatryoshkaLoss(losses.CLIPLoss(**way), (4, D)), (y,)),
        (losses.MatryoshkaLoss(losses.InfoNCELoss(reduction="none", **way), (4, D)), (y,)),
    )
    for loss, others in modules:
        found = []
        for given in (others, _without_a_graph(others)):
            at, own = x.clone().requires_grad_(), copy.deepcopy(loss)
            found.append(gradients(own(at, *given).sum(), [at, *own.parameters()]))
        assert all(map(torch.equal, *found)), loss


def test_threads_do_not_disturb_each_other() -> None:
    jobs = [(case, *of_size(case, 60)) for case in CASES]
    wanted = [[v := library(c, r, None, **a), *gradients(v, r)] for c, r, a in jobs]
    wrong: list[str] = []

    def work() -> None:
        for (case, rows, arguments), want in zip(jobs, wanted, strict=True):
            value = library(case, rows, None, **arguments)
            got = [value, *gradients(value, rows)]
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                wrong.append(case.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_default_dtype_does_not_matter(case: Case) -> None:
    rows, arguments = of_size(case, N)
    value = library(case, rows, None, **arguments)
    torch.set_default_dtype(torch.float64)
    try:
        again = library(case, rows, None, **arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32
    assert torch.equal(again, value)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_meta_tensors_have_the_right_shape(case: Case) -> None:
    """Shapes alone are enough: no value is read on the way."""
    for reduction in ("mean", "none") if case.rows else ("mean",):
        rows, arguments = of_size(case, N)
        chosen = arguments | ({"reduction": reduction} if case.rows else {})
        real = library(case, rows, None, **chosen)
        moved = tree_map_only(torch.Tensor, lambda t: t.to("meta"), chosen)
        shadow = library(case, [x.to("meta") for x in rows], None, **moved)
        assert shadow.device.type == "meta"
        assert (shadow.shape, shadow.dtype) == (real.shape, real.dtype)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_old_tracer_is_told_what_to_use_instead(case: Case) -> None:
    """Whatever it meets first otherwise, a list of booleans or a size that is a tensor, says nothing of what to do."""
    rows, arguments = of_size(case, N)
    held = tuple(x.detach() for x in rows)
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.trace(lambda *r: library(case, r, None, **arguments), held, check_trace=False)
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.trace(lambda x: fastcl.pair_total(x, outer="sum"), held[:1], check_trace=False)
