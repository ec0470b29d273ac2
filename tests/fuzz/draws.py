"""Strategies for whole calls, by kind."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.internal.conjecture.engine import ConjectureRunner

from fastcl.distributed import CONVENTIONS, STRATEGIES
from fastcl.equation.problem import accumulation_dtype
from fastcl.functional.reduction import REDUCTIONS

from .case import Case, resolve
from .drawing import FLOATS, Draw, Drawing, distance, mask, pair, sizes, way
from .public import BY_CALL, arguments_of, documented, names_of, public


def derive(drawing: Drawing) -> str:
    """How gradients are asked for; second ones of rows that are not rounded to half precision on the way."""
    twice = ("twice",) if drawing.dtype in ("float32", "float64") else ()
    return str(drawing.one_of(*["grad"] * 9, "jvp", "jvp", "func", "batched", *twice))


@st.composite
def objectives(draw: Draw, path: str) -> Case:
    """A call of a function of rows."""
    drawing = Drawing(draw, path, draw(st.sampled_from(FLOATS)))
    function = resolve(path)
    parameters = arguments_of(function)
    given = drawing.arguments(parameters, documented(function))
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {k: v for k, v in given.items() if k not in positional}
    if "reduction" in inspect.signature(function).parameters:
        keywords["reduction"] = repr(
            drawing.one_of(*(("mean",) if "only" in documented(function).get("reduction", "") else REDUCTIONS))
        )
    return drawing.case(
        positional=tuple(given[name] for name in positional if name in given),
        keywords=keywords,
        **(way(drawing) | {"derive": derive(drawing)}),
    )


@st.composite
def modules(draw: Draw, path: str) -> Case:
    """A module built from its settings, and called."""
    module = resolve(path)
    drawing = Drawing(draw, f"functional.{module.function.__name__}", draw(st.sampled_from(FLOATS)))
    of_class = inspect.signature(module).parameters
    said = documented(module.function) | documented(module)
    rows = [p for p in arguments_of(module.forward) if p.name != "self" and p.name not in of_class]
    given = drawing.arguments([p for p in rows if p.default is not None or "group" in p.name], said)
    settings = drawing.arguments([p for p in of_class.values() if p.name not in BY_CALL], said, learned=True)
    if "size" in settings:  # of a data set, whose samples the index is of
        drawing.statements.append(f"index = torch.arange({drawing.n}).flip(0)")
        settings["size"] = repr(drawing.n + 2)
    settings = {
        k: v for k, v in settings.items() if not (k in drawing.wants and "Tensor" not in str(of_class[k].annotation))
    }
    if "only" not in said.get("reduction", ""):
        settings["reduction"] = repr(drawing.one_of(*REDUCTIONS))
    drawing.path = path
    positional = [p.name for p in rows if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in given]
    keywords = {k: v for k, v in given.items() if k not in positional}
    # A property in place of a setting that is a number or a boolean.
    stated = [k for k in settings if k in module.settings and k not in (*drawing.wants, "reduction")]
    held = drawing.one_of("", "", "", "", "copy", "pickled", *stated[:2])
    return drawing.case(
        positional=tuple(given[n] for n in positional),
        keywords=keywords,
        settings=settings,
        held=held,
        # The definition has no such property: where a parameter stands in its place, that would move alone.
        steps=0.0 if held in stated else drawing.one_of(0.0, 0.0, 0.0, -0.5, 0.5, 4.0),
        **way(drawing),
    )


@st.composite
def numbers(draw: Draw, path: str) -> Case:
    """A metric."""
    drawing = Drawing(draw, path, draw(st.sampled_from(FLOATS)))
    function = resolve(path)
    parameters = arguments_of(function)
    given = drawing.arguments(parameters, documented(function))
    drawing.wants.clear()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in given]
    keywords = {k: v for k, v in given.items() if k not in positional}
    return drawing.case(
        positional=tuple(given[n] for n in positional), keywords=keywords, **(way(drawing) | {"compiled": False})
    )


@st.composite
def ops(draw: Draw, path: str, dtypes: Sequence[str] = FLOATS, limited: int = 20) -> Case:
    """The engine itself: any operand, pair function, mask, biases; limited: per cent of masks with limits."""
    drawing = Drawing(draw, path, draw(st.sampled_from(dtypes)))
    n, alone = drawing.n, drawing.maybe(40)
    m = n if alone else draw(st.one_of(st.just(n), sizes))
    positional = [drawing.rows("x", n)] + ([] if alone else [drawing.rows("y", m)])
    drawing.wants += [name for name in positional if drawing.maybe(80)]
    outer = drawing.one_of("sum", "sum", "contrast", "pooled") if path == "pair_total" else "none"
    reduce = "logsumexp" if outer in ("contrast", "pooled") else drawing.one_of("sum", "logsumexp", "logsumexp")
    distant = reduce == "logsumexp" and drawing.maybe(35)
    keywords = {
        "operand": repr("dot" if distant else drawing.one_of("dot", "sqdist")),
        "reduce": repr(reduce),
        "mask": mask(drawing, n, m, alone, limited),
    }
    closed = False
    if reduce == "sum":
        keywords["pair"] = pair(drawing)
        closed = keywords["pair"].endswith(("Identity()", "Square()")) and drawing.maybe(60)
    if closed:  # and often a diagonal, which a closed form takes out again
        keywords |= {"operand": repr("dot"), "mask": repr(drawing.one_of("off_diagonal", "off_diagonal", "all"))}
    # Half of them bring z near 1, whatever the norms are; some to where z and its weights round apart, or near float32's end.
    size = drawing.one_of(0, 0, 0, 0, 0, 0, 2, 5, 7, 37)
    usual = min(max(10.0 ** (size - 2 * drawing.exponent), 1e-37), 3e38) if size or drawing.maybe(50) else 1.0
    keywords["scale"] = (
        distance(drawing, positional, keywords["mask"]) if distant else drawing.scalar("scale", "", usual)
    )
    if drawing.maybe(40):
        keywords["shift"] = drawing.scalar("shift", "", 0.0)
    for name, length in (("bias_x", n), ("bias_y", m), ("positive", n)):
        if (outer == "contrast") if name == "positive" else (not alone and not closed and drawing.maybe(30)):
            # Well above: each row's weight is small, and the loss with it.
            above = drawing.one_of(0, 0, 30, 70) if name == "positive" else 0
            drawing.statements.append(
                f"{name} = (rows({length}, 1, 7)[:, 0] * {drawing.one_of(1, 10, 1e3)} + {above}).float()"
            )
            keywords[name] = name
            drawing.wants += [name] if drawing.maybe(60) else []
    if path == "pair_total":
        keywords["outer"] = repr(outer)
    elif not alone and drawing.maybe(40):
        keywords["columns"] = "True"
    return drawing.case(positional=tuple(positional), keywords=keywords, **(way(drawing) | {"derive": derive(drawing)}))


KINDS_OF_CALL = {"objectives": objectives, "modules": modules, "metrics": numbers, "ops": ops}


WRONG = {
    "bool": ("'no'", "None", "2", "torch.ones(2)"),
    "name": ("'nonsense'", "3", "torch.ones(2)"),
    "int": ("1.5", "'3'", "True", "None"),
    "number": (
        "float('nan')",
        "float('inf')",
        "'0.5'",
        "True",
        "10**400",
        "torch.ones(2)",
        "torch.tensor(3)",
        "[1.0]",
        "torch.ones((), device='meta')",
        "torch.ones((), dtype=torch.float8_e4m3fn)",
    ),
    # Beyond what results of these rows hold, or what its inverse does.
    "number beside float64": ("1e309", "-1e309"),
    "number beside float32": ("1e39", "-1e300", "1e300"),
    "positive beside float64": ("5e-324", "1e-320"),
    "positive beside float32": ("1e-45", "1e-320", "1e-39"),
    "matrix": (
        "{}.numpy()",
        "{}.tolist()",
        "{}.long()",
        "{}[0]",
        "{}[None]",
        "{}.to(torch.float8_e4m3fn)",
        "{}.to_sparse()",
    ),
    "group": (
        "'world'",
        "3",
        "fastcl.Ranks(None, gradient='ddq')",
        "fastcl.Ranks(None, strategy='')",
        "fastcl.Ranks(None, strategy=3)",
    ),
    "groups": ("{}.tolist()", "{}.float()", "{}.int()", "torch.cat([{0}, {0}[:1]])", "{}[None]"),
}


def wrongs(sort: str, wide: bool) -> tuple[str, ...]:
    """Values that no argument of that sort takes, beside float64 rows or narrower ones."""
    if sort not in ("number", "positive"):
        return WRONG[sort]
    beside = "float64" if wide else "float32"
    ends = [f"{kind} beside {beside}" for kind in ("number", "positive")[: 1 + (sort == "positive")]]
    return (*WRONG["number"], *(value for kind in ends for value in WRONG[kind]))


@st.composite
def spoiled(draw: Draw) -> Case:
    """A call one of whose arguments must be refused, or is not known."""
    kind, path = draw(st.sampled_from([(k, p) for k, paths in public().items() for p in paths]))
    case = replace(draw(KINDS_OF_CALL[kind](path)), wants=(), derive="grad", autocast="", held="", steps=0.0)
    called = resolve(path)
    settings = case.settings is not None
    known = {p.name: p for p in arguments_of(called.forward if settings else called)} | (
        dict(inspect.signature(called).parameters) if settings else {}
    )
    tensors = case.tensors()

    def sort_of(name: str) -> str:
        annotation = str(known[name].annotation) if name in known else ""
        if name in tensors and tensors[name].dim():
            return "groups" if not tensors[name].is_floating_point() else "matrix" if tensors[name].dim() == 2 else ""
        if name == "group" or annotation in ("bool", "int"):
            return "group" if name == "group" else annotation
        if names_of(path, name):
            return "name"
        number = "Tensor" not in annotation.replace("float | Tensor", "") and (
            "float" in annotation or annotation.startswith(("Positive", "Number", "Real"))
        )
        return ("positive" if annotation.startswith("Positive") else "number") if number else ""

    given = {*case.positional, *case.keywords, *(case.settings or ())}
    places = sorted((name, sort_of(name)) for name in given | (known.keys() - {"self"}) if sort_of(name))
    if not places:
        reject()
    name, sort = draw(st.sampled_from([*places, ("nonsense", "")]))
    if name == "backend":
        return replace(case, backend=draw(st.sampled_from(("", "nonsense", "cpu "))), spoiled=name)
    wide = any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors.values())
    wrong = draw(st.sampled_from(wrongs(sort, wide))) if sort else "1"
    if sort in ("matrix", "groups"):
        if not tensors[name].numel() or name not in (*case.positional, *case.keywords.values()):
            reject()  # positives may have taken it out
        return replace(case, statements=(*case.statements, f"{name} = {wrong.format(name)}"), spoiled=name)
    into_settings = settings and name in inspect.signature(called).parameters
    into = (
        {"settings": {**(case.settings or {}), name: wrong}}
        if into_settings
        else {"keywords": case.keywords | {name: wrong}}
    )
    return replace(case, spoiled=name, **into)


@st.composite
def over_ranks(draw: Draw, world: int, paths: Sequence[str] | None = None) -> Case:
    """An objective or a module, of these paths or of all, its rows cut over ranks."""
    if paths is None and draw(st.integers(0, 24)) == 0:
        return draw(queues(world))
    known = [(k, p) for k in ("objectives", "modules") for p in public()[k] if paths is None or p in paths]
    kind, path = draw(st.sampled_from(known))
    case = draw(KINDS_OF_CALL[kind](path))
    if not case.positional:  # what takes *views is not drawn yet
        reject()
    case = replace(case, keywords={k: v for k, v in case.keywords.items() if k not in ("guide", "positives")})
    tensors = case.tensors()
    n = len(tensors[case.positional[0]])
    whole = {"statistic"} | (
        {"queue"} if case.keywords.get("sharded_queue", (case.settings or {}).get("sharded_queue")) != "True" else set()
    )
    named = [
        name
        for name in (*case.positional, *case.keywords.values())
        if name in tensors and tensors[name].dim() and name not in whole
    ]
    # Rows and groups are cut; a number in a tensor is everybody's.
    sharded = tuple(name for name in named if tensors[name].dim() == 2 or not tensors[name].is_floating_point())
    # Each rank's share of a gradient is rounded to its dtype, and shares cancel.
    widest = min(
        torch.finfo(accumulation_dtype(tensors[name].dtype)).eps for name in sharded if tensors[name].dim() == 2
    )
    narrow = any(torch.finfo(tensors[name].dtype).eps > widest for name in case.wants if name not in sharded)
    if narrow or any(len(tensors[name]) != n for name in sharded):
        reject()
    cuts = sorted(draw(st.integers(0, n)) for _ in range(world - 1))
    sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True))
    strategies = (*STRATEGIES, "ring")  # by it alone normalisers are those of more pairs than a kernel sees
    how = {name: draw(st.sampled_from(names)) for name, names in (("strategy", strategies), ("gradient", CONVENTIONS))}
    # There is no second derivative over ranks: each that is asked for must be refused, or right.
    halves = any(torch.finfo(tensors[name].dtype).bits == 16 for name in sharded if tensors[name].dim() == 2)
    twice = case.derive == "twice" or (not halves and not case.autocast and draw(st.integers(0, 5)) == 0)
    derive = "twice" if twice else "grad"
    case = replace(case, sizes=sizes, sharded=sharded, derive=derive, **how)
    kind_of_call = draw(st.sampled_from(("group", "group", "group", "group", "odd", "placed")))
    if kind_of_call == "odd":
        last = [name for name in case.positional if tensors[name].dim() == 2][-1]
        odds = [
            ("nonsense", "1"),
            (case.positional[-1], ""),
            (last, f"{last}.tolist()"),
            (last, f"torch.cat([{last}, {last}], 1)"),
        ]
        odd = draw(st.sampled_from(odds if tensors[last].shape[1] else odds[:2]))
        return replace(case, odd=odd, spoiled=f"{odd[0]} on one rank", wants=(), derive="grad", autocast="")
    if kind_of_call == "placed" and kind == "objectives" and may_be_placed(case, tensors):
        step = -(-n // world)
        sizes = tuple(max(0, min(step, n - rank * step)) for rank in range(world))
        return replace(case, sizes=sizes, placed=True, gradient="exact", derive="grad", autocast="")
    return case


def may_be_placed(case: Case, tensors: dict[str, Any]) -> bool:
    """Whether its rows may be DTensors: of objectives whose tensors are rows and numbers, and whose value is a number."""
    matrices = {name for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.dim() > 1}
    return matrices == set(case.sharded) and case.keywords.get("reduction") in ("'mean'", "'sum'")


@st.composite
def queues(draw: Draw, world: int) -> Case:
    """Keys for a queue that all ranks fill, of which one rank's are none."""
    odd = draw(st.sampled_from((("k", "k[:, :4]"), ("k", "k.long()"), ("k", ""), ("k", "k[0]"), ("nonsense", "1"))))
    statements = ("queue = fastcl.losses.MoCoQueue(6, 8)", f"k = rows({draw(st.integers(2, 9))}, 6).float()")
    return Case(
        "losses.MoCoQueue.enqueue",
        statements,
        ("queue", "k"),
        sizes=(1,) * world,
        odd=odd,
        spoiled=f"{odd[0]} on one rank",
    )


@st.composite
def compiled(draw: Draw) -> Case:
    """A function under torch.compile, which makes tensors of NumPy's numbers."""
    case = draw(objectives(draw(st.sampled_from(public()["objectives"]))))
    if any("numpy." in value for value in case.keywords.values()):
        reject()
    return replace(case, compiled=True, backend="auto", derive="grad")


@st.composite
def interpreted(draw: Draw) -> Case:
    """The engine's Triton kernels, in Triton's interpreter."""
    case = draw(
        ops(draw(st.sampled_from(public()["ops"])), dtypes=("float32", "float16"))
    )  # the interpreter's bfloat16 is wrong
    if max(max(t.shape, default=0) for t in case.tensors().values()) > 65:
        reject()  # the kernels' own tiles are small
    return replace(case, backend="triton", autocast="", threads=1, derive="grad")


@st.composite
def emulated(draw: Draw, path: str | None = None) -> Case:
    """The engine's CUDA kernels for limits and guides, in the emulator."""
    case = draw(ops(path or draw(st.sampled_from(public()["ops"])), limited=100))
    if max(max(t.shape, default=0) for t in case.tensors().values()) > 200:
        reject()  # a pair takes some microseconds
    return replace(case, backend="cuda", autocast="", threads=1, derive="grad")


def each_anew() -> Any:
    """Within the context Hypothesis draws each case for itself.

    By default it also changes those that it has drawn, by repeating their parts: of ours four in ten came twice, and whatever was
    rare in the first ones stayed so.
    """
    return patch.object(ConjectureRunner, "generate_mutations_from", lambda *_: None, create=True)


def cases(kind: str, paths: Sequence[str] | None = None) -> st.SearchStrategy[Case]:
    """Any call of that kind, of these paths or of all; "kernels" are those that a processor's kernels may serve."""
    if kind == "spoiled":
        return spoiled()
    if kind == "kernels":
        return st.one_of(cases("ops"), cases("objectives")).map(lambda case: replace(case, backend="auto"))
    known = [path for path in public()[kind] if paths is None or path in paths]
    return st.sampled_from(known).flatmap(KINDS_OF_CALL[kind])
