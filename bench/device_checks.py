"""Every loss on a device against the float64 definition, before anything is timed there.

    python -m bench.device_checks [--device cuda] [--backend triton] [--out checks.json]

Every case of tests/objectives, its first arguments in half precision and all of them in float32, at a ragged size and at one that
fills tiles: values and gradients to the rows. A loss that fails, or that crashes, gets no figure in bench.gpu_report.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastcl.backends import choice
from tests.objectives.cases import CASES, Case
from tests.objectives.test_precision import RAW
from tests.objectives.witnesses import gradients, library

from .measure import quiet

SIZES = ((203, 37), (256, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SKIPPED = ("reference",)

Result = dict[str, Any]


def served(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that serve this device and dtype, without the definition."""
    return [b for b in choice.MODULES if b not in SKIPPED and choice.reason(b, device, dtype) is None]


def wanted(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[Case, int, int, int, torch.dtype]]:
    """(case, index of its arguments, n, d, dtype)."""
    for dtype in DTYPES:
        for case in CASES:
            for index in case.sets() if dtype == torch.float32 else range(1):
                for n, d in sizes:
                    yield case, index, n, d, dtype


def allowed(case: Case, arguments: dict[str, Any], value: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Absolute error of the value, relative error of the gradient: what torch's own operations make of the dtype, and a little.

    A logit is known to eps times its size. Measured with the CPU kernels, whose sums are as long: 6 eps of values and 13 of
    gradients in float32, 1 and 5 in half precision, whose gradients are rounded once more.
    """
    eps, logits = torch.finfo(dtype).eps, case.logits(arguments)
    size = max(float(value.abs().max()), case.terms(arguments))
    if dtype == torch.float32:
        return 16 * eps * max(1.0, logits) * size, 16 * eps * max(1.0, logits)
    return eps * max(size, 2.0 * logits), 8 * eps


def tensors_on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def check(case: Case, index: int, n: int, d: int, dtype: torch.dtype, device: torch.device, backend: str) -> Result:
    """One loss on the device; a backend that raises is an answer, too."""
    rows = [x.detach() for x in case.rows_of(n, d, dtype)]
    arguments = case.arguments(index, n, d, rows[0])
    if not arguments.get("normalize", True) or case.name in RAW:
        rows = [(x / d**0.5) for x in rows]  # rows of length about 1, as these losses expect them
    found: Result = {"loss": case.name, "case": case.id, "arguments": index, "n": n, "d": d, "backend": backend}
    found["dtype"] = str(dtype).removeprefix("torch.")
    try:
        exact = [x.double().requires_grad_() for x in rows]
        truth = library(case, exact, "reference", **arguments)
        leaves = [x.to(device).requires_grad_() for x in rows]
        value = library(case, leaves, backend, **tensors_on(device, arguments))
        # Times n: gradients of a mean would be subnormal in float16.
        pairs = zip(gradients(n * value, leaves), gradients(n * truth, exact), strict=True)
        relative = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs if b.any()]
        difference = float((value.detach().cpu().double() - truth.detach()).abs().max())
    except Exception as error:
        return found | {"right": False, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    of_value, of_gradient = allowed(case, arguments, truth.detach(), dtype)
    gradient = max(relative, default=0.0)
    right = difference <= of_value and gradient <= of_gradient  # NaN is not
    return found | {
        "value_error": difference, "gradient_error": gradient, "allowed": [of_value, of_gradient], "right": right,
    }  # fmt: skip


def check_all(
    device: torch.device, names: Sequence[str] | None = None, sizes: Sequence[tuple[int, int]] = SIZES,
    save: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:  # fmt: skip
    """All losses by each backend that serves the device; `save` is called as they come."""
    results: list[Result] = []
    todo = [(item, b) for item in wanted(sizes) for b in served(device, item[4]) if names is None or b in names]
    with tqdm(todo, unit="check", file=sys.stderr) as bar:
        for item, backend in bar:
            bar.set_postfix_str(f"{item[0].id}, {backend}", refresh=False)
            results.append(check(*item, device, backend))
            if len(results) % 50 == 0 or len(results) == len(todo):
                save(results)
    return results


def wrong(results: Sequence[Result], loss: str, backend: str, dtype: str) -> str | None:
    """Why this loss has no figure with this backend and dtype, or None."""
    mine = [r for r in results if (r["loss"], r["backend"], r["dtype"]) == (loss, backend, dtype)]
    if not mine:
        return "its device check did not run"
    failed = [r for r in mine if not r["right"]]
    if not failed:
        return None
    first = failed[0]
    why = first.get("failed") or f"errors {first['value_error']:.0e}, {first['gradient_error']:.0e}"
    return f"failed {len(failed)} of {len(mine)} device checks, first {first['case']} at {first['n']} x {first['d']}: {why}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.device_checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", nargs="+", help="only these (default: all that serve the device)")
    parser.add_argument("--out", type=Path, help="the JSON")
    chosen = parser.parse_args(arguments)
    quiet()

    def save(results: list[Result]) -> None:
        if chosen.out is not None:
            chosen.out.write_text(json.dumps(results, indent=1) + "\n")

    results = check_all(torch.device(chosen.device), chosen.backend, save=save)
    failed = [r for r in results if not r["right"]]
    for r in failed:
        print(json.dumps(r))
    print(f"{len(results) - len(failed)} of {len(results)} device checks passed on {chosen.device}")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
