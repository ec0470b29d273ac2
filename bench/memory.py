"""Peak memory of the methods of one case, in a process of its own that forks for each.

`python -m bench.memory CASE N D METHOD:CHUNK ...` prints one JSON line a method, as it ends: what one forward and backward adds
to the resident memory, and how long that one call took. The peak is reset just before it, since importing torch alone reaches
higher than a small loss does.
"""

from __future__ import annotations

import json
import sys

from fastcl.bench.peaks import in_fork, one_call

from .baselines import baselines
from .cases import CASES


def main(case_name: str, n: int, d: int, wanted: list[str]) -> None:
    case = CASES[case_name].resized(n, d)
    known = {baseline.name: baseline for baseline in baselines(case.loss)}
    for item in wanted:
        name, _, chunk = item.rpartition(":")
        baseline = known[name]
        answer = in_fork(
            lambda b=baseline, c=chunk: one_call(b.make(int(c)), case.inputs(), case.warm_inputs(b.compiles))
        )  # type: ignore[misc]
        print(json.dumps({"method": name, **answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
