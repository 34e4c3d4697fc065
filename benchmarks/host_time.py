"""What a call of the CUDA kernels costs the host: everything but the GPU, measured without one.

``python -m benchmarks.host_time``: tensors of the host pose as a GPU's and each launch is caught where it would be
queued, after its parameters are filled. torch's own layer runs beside it, on tensors so small that what it computes
costs nothing. The thread's own time is taken, so that another process costs what it takes of caches and of the core's
clock, not its turns. Needs both extensions, built.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

import rl_kernels as rl
from benchmarks.record import git_state
from rl_kernels import _extension
from rl_kernels import functional as F
from rl_kernels._machine import machine, versions
from rl_kernels.backends.cuda import fast_path, kernels
from rl_kernels.backends.gpu.heuristics import H100
from rl_kernels.ops.values import Geometry, Recipe, Wanted

WAYS = ("ops alone, forward", "ops alone, forward + backward", "forward, no grad", "forward", "forward + backward")
"""Ops alone: the kernels' own calls without autograd, arguments and selection, beside torch's own products."""
H100_FACTS = (90, H100.multiprocessors, H100.shared_bytes)
SIZE = 8
ALL = Wanted((True, True), True, (True, True))

Step = Callable[[], Any]


class Side(NamedTuple):
    """What runs: a layer, its inputs that have gradients, and its ops, forward and backward."""

    step: Step
    inputs: Sequence[Tensor]
    forward: Step
    backward: Step


def layers() -> Iterator[tuple[str, Side, Side]]:
    """A name, and the sides of the CUDA kernels and of torch; of 8 features or 16 channels."""
    yield "linear", *linear()
    yield "conv", *conv()


def linear() -> tuple[Side, Side]:
    """Linear layers with biases."""
    coefficients = nn.Parameter(torch.full((2,), 0.5))
    first, own, second = (nn.Linear(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(3))
    x = torch.randn(SIZE, SIZE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.ones(SIZE, SIZE, dtype=torch.bfloat16)
    recipe = Recipe((first.weight, second.weight), coefficients, (first.bias, second.bias))
    mixed = Side(
        lambda: F.mixed_linear(x, *recipe),
        [x, coefficients, *first.parameters(), *second.parameters()],
        lambda: kernels.mixed_linear(x, recipe),
        lambda: (kernels.mixed_linear_dgrad(dy, recipe), kernels.mixed_linear_wgrad(dy, x, recipe, ALL)),
    )
    return mixed, Side(
        lambda: own(x),
        [x, *own.parameters()],
        lambda: nn.functional.linear(x, own.weight, own.bias),
        lambda: (dy @ own.weight, dy.t() @ x, dy.sum(0)),
    )


def conv() -> tuple[Side, Side]:
    """Convolutions of three by three taps with biases."""
    layout = torch.channels_last
    coefficients = nn.Parameter(torch.full((2,), 0.5))
    first, own, second = (nn.Conv2d(16, 16, 3, padding=1, dtype=torch.bfloat16) for _ in range(3))
    for layer in (first, own, second):
        layer.weight.data = layer.weight.data.to(memory_format=layout)
    assert first.bias is not None and second.bias is not None
    x = torch.randn(1, 16, 4, 4, dtype=torch.bfloat16).to(memory_format=layout).requires_grad_()
    dy = torch.ones(1, 16, 4, 4, dtype=torch.bfloat16).to(memory_format=layout)
    recipe = Recipe((first.weight, second.weight), coefficients, (first.bias, second.bias))
    how, size = Geometry((1, 1), (1, 1), (1, 1), 1), (1, 16, 4, 4)
    mixed = Side(
        lambda: F.mixed_conv2d(x, *recipe, 1, 1),
        [x, coefficients, *first.parameters(), *second.parameters()],
        lambda: kernels.mixed_conv(x, recipe, how),
        lambda: (kernels.mixed_conv_dgrad(dy, recipe, size, how), kernels.mixed_conv_wgrad(dy, x, recipe, ALL, how)),
    )
    backward = torch.ops.aten.convolution_backward
    options = [16], *how[:3], False, (0, 0), 1, (True, True, True)
    return mixed, Side(
        lambda: own(x),
        [x, *own.parameters()],
        lambda: nn.functional.conv2d(x, own.weight, own.bias, padding=1),
        lambda: backward(dy, x, own.weight, *options),
    )


def microseconds(run: Callable[[], object], rounds: int, calls: int = 5) -> dict[str, float]:
    """The least and the median of the rounds' means, of the thread's own time: what waits for a core is not counted."""
    for _ in range(min(rounds, 100)):
        run()
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        found.append((time.thread_time() - start) / calls * 1e6)
    return {"least": round(min(found), 1), "median": round(statistics.median(found), 1)}


def with_backward(side: Side) -> Callable[[], object]:
    """The step and its gradients; not their addition to ``.grad``, which is torch's own and the same for all."""
    gradient = torch.ones_like(side.step())
    return lambda: torch.autograd.grad(side.step(), side.inputs, gradient)


def every_way(side: Side, rounds: int) -> list[dict[str, float]]:
    """As ``WAYS`` names them."""
    with torch.no_grad():
        ops = [side.forward, lambda: (side.forward(), side.backward()), side.step]
        found = [microseconds(run, rounds) for run in ops]
    return [*found, microseconds(side.step, rounds), microseconds(with_backward(side), rounds)]


def measured(rounds: int) -> Iterator[dict[str, Any]]:
    """Microseconds a call of every layer and way, torch's own beside."""
    cuda = _extension.EXTENSION.module.cuda
    before, fast_path.has_gpu = fast_path.has_gpu, lambda: True
    try:
        for name, mixed, own in layers():
            cuda.pose(H100_FACTS, None)
            try:
                with rl.use_backend("cuda"):
                    fast_path.tell()
                    ours = every_way(mixed, rounds)
            finally:
                cuda.end_pose()
            theirs = every_way(own, rounds)
            for way, one, other in zip(WAYS, ours, theirs, strict=True):
                yield {"layer": name, "way": way, "cuda": one, "torch": other}
    finally:
        fast_path.has_gpu = before
        fast_path.tell()


@click.command()
@click.option("--rounds", default=300, show_default=True, help="Of five calls each.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write a record as well.")
def main(rounds: int, output: Path | None) -> None:
    """Print microseconds a call: the least and the median of the rounds."""
    torch.set_num_threads(1)
    load = [round(value, 1) for value in os.getloadavg()]
    print(f"load {load[0]} on {os.cpu_count()} cores; least and median of {rounds} rounds, us a call")
    cells = []
    for cell in measured(rounds):
        cells.append(cell)
        ours, theirs = cell["cuda"], cell["torch"]
        said = f"cuda {ours['least']} {ours['median']}; torch {theirs['least']} {theirs['median']}"
        print(f"{cell['layer']}, {cell['way']}: {said}", flush=True)
    if output is not None:
        about: dict[str, Any] = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
        }
        about |= {"versions": versions(), "git": git_state(), "load": load, "rounds": rounds, "unit": "us a call"}
        output.write_text(json.dumps(about | {"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
