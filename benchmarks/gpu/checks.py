"""A backend's kernels held against the float64 reference, as ``qualify`` does it: a line of JSON a check, at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch

from rl_kernels.backends import Case
from rl_kernels.backends.selection import registered
from rl_kernels.ops.schema import OPS
from rl_kernels.qualify.correctness import check, in_a_line, trials_of


def checked(backend_name: str, op: str, dtypes: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Every check of an op, the types by turns, so that a run that is cut has seen something of all."""
    backend = next(found for found in registered() if found.name == backend_name)
    cases = [Case(op, device.type, getattr(torch, dtype)) for dtype in dtypes]
    for case in cases:
        if reason := backend.why_not(case):
            yield {"backend": backend_name, "op": op, "dtype": case.dtype_name, "refused": reason}
    served = [case for case in cases if backend.why_not(case) is None]
    trials = {case: trials_of(backend, case) for case in served}
    for number in range(max(map(len, trials.values()), default=0)):
        for case in served:
            if number >= len(trials[case]):
                continue
            trial, start = trials[case][number], time.perf_counter()
            try:
                wrong = check(backend, trial, case, device)
            except Exception as error:  # Whatever breaks is what is looked for.
                wrong = [in_a_line(error)]
            found = {"backend": backend_name, "op": op, "dtype": case.dtype_name, "ok": not wrong}
            where = {"config": trial.name or "default", "problem": str(trial.problem)}
            yield found | where | {"s": round(time.perf_counter() - start, 3)} | ({"wrong": wrong} if wrong else {})


@click.command()
@click.option("--backend", required=True)
@click.option("--op", type=click.Choice(OPS), required=True)
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16",), show_default=True)
@click.option("--device", default="cuda", show_default=True)
def main(backend: str, op: str, dtypes: tuple[str, ...], device: str) -> None:
    """Check one op of a backend; the exit status is 1 if a kernel is wrong."""
    wrong = False
    with torch.no_grad():
        for line in checked(backend, op, dtypes, torch.device(device)):
            wrong |= not line.get("ok", True)
            print(json.dumps(line), flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
