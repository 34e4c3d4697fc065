"""What a call of the CUDA kernels costs the host: everything but the GPU, measured without one.

``python -m benchmarks.host_time``: tensors of the host pose as a GPU's and each launch is caught where it would be
queued, after its parameters are filled. torch's own layer runs beside it, on tensors so small that what it computes
costs nothing. Needs both extensions, built.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import click
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels import _extension
from rl_kernels import functional as F
from rl_kernels.backends.cuda import fast_path
from rl_kernels.backends.gpu.heuristics import H100

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


def microseconds(run: Callable[[], object], rounds: int = 300, calls: int = 5) -> tuple[float, float]:
    """The least and the median of the rounds' means, of the thread's own time: what waits for a core is not counted."""
    for _ in range(100):
        run()
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        found.append((time.thread_time() - start) / calls * 1e6)
    return min(found), statistics.median(found)


def with_backward(step: Step, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """The step and its gradients; not their addition to ``.grad``, which is torch's own and the same for all."""
    gradient = torch.ones_like(step())
    return lambda: torch.autograd.grad(step(), inputs, gradient)


@click.command()
def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    cuda = _extension.EXTENSION.module.cuda
    fast_path.has_gpu = lambda: True
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; least and median of 300 rounds, us a call")
    for name, step, inputs, own, others in steps():
        cuda.pose(H100_FACTS, None)
        with rl.use_backend("cuda"):
            fast_path.tell()
            ours = [microseconds(step), microseconds(with_backward(step, inputs))]
            with torch.no_grad():
                ours.insert(0, microseconds(step))
        cuda.end_pose()
        with torch.no_grad():
            theirs = [microseconds(own)]
        theirs += [microseconds(own), microseconds(with_backward(own, others))]
        for what, one, other in zip(("forward, no grad", "forward", "forward + backward"), ours, theirs, strict=True):
            print(f"{name}, {what}: cuda {one[0]:.1f} {one[1]:.1f}; torch {other[0]:.1f} {other[1]:.1f}")


if __name__ == "__main__":
    main()
