"""The kernels timed beside their rivals: a line of JSON a cell, at once, the device's time and the host's apart."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import click
import torch
from torch.nn import functional as aten

from rl_kernels.backends.selection import registered
from rl_kernels.ops.composite import CONV, LINEAR
from rl_kernels.ops.mix import mix, mixed_bias
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Call
from rl_kernels.qualify.correctness import in_a_line
from rl_kernels.qualify.problems import Problem, make_call
from rl_kernels.qualify.timing import kernel_of
from rl_kernels.testing import Clock

CEILING = "ceiling"
ROUNDS = 5


def _conv(batch: int, channels: int, size: int) -> Problem:
    return Problem(batch, channels, channels, (3, 3), (size, size), padding=1, layout="channels_last")


PROBLEMS = {
    "linear 4096x4096x4096": Problem(4096, 4096, 4096),
    "linear 16x4096x4096": Problem(16, 4096, 4096),
    "conv 256x14x14 b256": _conv(256, 256, 14),
    "linear 1x4096x4096": Problem(1, 4096, 4096),
    "linear 512x4096x4096": Problem(512, 4096, 4096),
    "linear 64x4096x4096": Problem(64, 4096, 4096),
    "conv 64x56x56 b64": _conv(64, 64, 56),
    "linear 8192x4096x4096": Problem(8192, 4096, 4096),
    "linear 16384x4096x4096": Problem(16384, 4096, 4096),
    "linear 128x768x3072": Problem(128, 768, 3072),
}
"""The most telling first: tokens x out x in, channels x pixels and images."""
SMALL = {"linear 16x32x48": Problem(16, 32, 48), "conv 8x6x6 b2": _conv(2, 8, 6)}


def ceiling(call: Call) -> Callable[[], Any]:
    """Torch's own product on a weight that was mixed before: what no kernel that mixes can be expected to beat."""
    recipe, geometry, activation = call.recipe, call.geometry, call.activation
    family = LINEAR if geometry is None else CONV
    weight = mix(recipe.weights, recipe.coefficients, activation.dtype)
    if call.x is not None:
        return partial(family.wgrad, activation, call.x, weight, geometry)
    if call.op.endswith("dgrad"):
        return partial(family.dgrad, activation, weight, call.input_size or (), geometry)
    bias = mixed_bias(recipe, activation.dtype)
    if geometry is None:
        return partial(aten.linear, activation, weight, bias)
    return partial(aten.conv2d, activation, weight, bias, *geometry)


def cell(name: str, problem: Problem, op: str, rivals: Sequence[str], clock: Clock, seconds: float) -> dict[str, Any]:
    """Time an op of a problem by all rivals in turns, with cold caches: medians of the rounds."""
    found: dict[str, Any] = {"cell": name, "op": op}
    call = make_call(problem, op, torch.bfloat16, clock.device)
    ready: dict[str, Callable[[], Any]] = {CEILING: ceiling(call)}
    backends = {backend.name: backend for backend in registered()}
    for rival in rivals:
        if reason := backends[rival].why_not_call(call):
            found[rival] = {"refused": reason}
        else:
            ready[rival] = partial(kernel_of(rival, op), *call.operands)
    samples: dict[str, list[float]] = {}
    for rival, run in list(ready.items()):
        try:
            run()  # Compiles, or chooses.
            found[rival] = {"host_us": round(1e6 * clock.host_seconds(run), 1)}
            samples[rival] = []
        except Exception as error:  # Whatever one breaks on, the others are timed.
            found[rival] = {"failed": in_a_line(error)}
            del ready[rival]
    end = time.perf_counter() + seconds
    for number in range(ROUNDS):
        for rival, run in ready.items():
            samples[rival].append(clock.seconds(run))
        if number and time.perf_counter() > end:
            break
    medians = {rival: statistics.median(values) for rival, values in samples.items()}
    for rival, median in medians.items():
        found[rival] |= {"us": round(1e6 * median, 2), "of_ceiling": round(medians[CEILING] / median, 3)}
    return found | {"rounds": len(samples[CEILING]), "tflops": round(_tflops(problem, medians[CEILING]), 1)}


def _tflops(problem: Problem, seconds: float) -> float:
    """Of the ceiling."""
    return 2e-12 * problem.multiplications / seconds


def timed(
    problems: dict[str, Problem], rivals: Sequence[str], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """All cells, the most telling first: every op of a problem before the next problem."""
    clock = Clock(device, cold=True)
    for name, problem in problems.items():
        for op in OPS:
            if ("conv" in op) == bool(problem.kernel):
                try:
                    yield cell(name, problem, op, rivals, clock, seconds)
                except Exception as error:  # Memory, say: the next one's turn comes.
                    yield {"cell": name, "op": op, "failed": in_a_line(error)}


@click.command()
@click.option("--backend", "rivals", multiple=True, required=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--cell-seconds", default=1.5, show_default=True)
@click.option("--small", is_flag=True, help="Two tiny problems, for a rehearsal.")
@click.option("--skip", default=0, help="Problems that were timed before.")
def main(rivals: tuple[str, ...], device: str, cell_seconds: float, small: bool, skip: int) -> None:
    """Time the backends beside torch's product on a weight mixed before."""
    problems = SMALL if small else dict(list(PROBLEMS.items())[skip:])
    with torch.no_grad():
        for line in timed(problems, rivals, torch.device(device), cell_seconds):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
