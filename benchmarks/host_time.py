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
from typing import Any

import click
import torch
from torch import Tensor, nn

import rl_kernels as rl
from benchmarks.record import git_state
from rl_kernels import _extension
from rl_kernels import functional as F
from rl_kernels._machine import machine, versions
from rl_kernels.backends.cuda import fast_path
from rl_kernels.backends.gpu.heuristics import H100

WAYS = ("forward, no grad", "forward", "forward + backward")
H100_FACTS = (90, H100.multiprocessors, H100.shared_bytes)
SIZE = 8

Step = Callable[[], Tensor]
Inputs = Sequence[Tensor]


def steps() -> Iterator[tuple[str, Step, Inputs, Step, Inputs]]:
    """A name, then of the CUDA kernels and of torch a step and what has gradients; of 8 features or 16 channels."""
    dtype = torch.bfloat16
    coefficients = nn.Parameter(torch.full((2,), 0.5))
    first, own, second = (nn.Linear(SIZE, SIZE, dtype=dtype) for _ in range(3))
    x = torch.randn(SIZE, SIZE, dtype=dtype, requires_grad=True)
    mixed = [x, coefficients, *first.parameters(), *second.parameters()]
    recipe = (first.weight, second.weight), coefficients, (first.bias, second.bias)
    yield "linear", lambda: F.mixed_linear(x, *recipe), mixed, lambda: own(x), [x, *own.parameters()]

    layout = torch.channels_last
    one, conv, two = (nn.Conv2d(16, 16, 3, padding=1, dtype=dtype) for _ in range(3))
    for layer in (one, conv, two):
        layer.weight.data = layer.weight.data.to(memory_format=layout)
    assert one.bias is not None and two.bias is not None
    image = torch.randn(1, 16, 4, 4, dtype=dtype).to(memory_format=layout).requires_grad_()
    mixed = [image, coefficients, *one.parameters(), *two.parameters()]
    filters = (one.weight, two.weight), coefficients, (one.bias, two.bias)
    yield "conv", lambda: F.mixed_conv2d(image, *filters, 1, 1), mixed, lambda: conv(image), [image, *conv.parameters()]


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


def with_backward(step: Step, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """The step and its gradients; not their addition to ``.grad``, which is torch's own and the same for all."""
    gradient = torch.ones_like(step())
    return lambda: torch.autograd.grad(step(), inputs, gradient)


def three_ways(step: Step, inputs: Inputs, rounds: int) -> list[dict[str, float]]:
    """Of a step, as ``WAYS`` names them."""
    with torch.no_grad():
        first = microseconds(step, rounds)
    return [first, microseconds(step, rounds), microseconds(with_backward(step, inputs), rounds)]


def measured(rounds: int) -> Iterator[dict[str, Any]]:
    """Microseconds a call of every layer and way, torch's own beside."""
    cuda = _extension.EXTENSION.module.cuda
    before, fast_path.has_gpu = fast_path.has_gpu, lambda: True
    try:
        for name, step, inputs, own, others in steps():
            cuda.pose(H100_FACTS, None)
            try:
                with rl.use_backend("cuda"):
                    fast_path.tell()
                    ours = three_ways(step, inputs, rounds)
            finally:
                cuda.end_pose()
            theirs = three_ways(own, others, rounds)
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
