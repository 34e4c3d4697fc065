"""Every option of every kind of layer turned on and off: what a kernel's host function takes and drops is seen here."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rl_kernels.backends import reference, triton
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.ops.shapes import conv_output_size
from rl_kernels.ops.values import Geometry, Wanted
from tests.backends.calling import run

run_triton, run_reference = functools.partial(run, triton.BACKEND), functools.partial(run, reference.BACKEND)
TINY = Config(16, 16, 16, 4, 2)
BUFFERS = ("none", "of the sources' dtype", "float32", "mixed")


class Kind(NamedTuple):
    """A kind of layer: the shapes of its x and of a source, and of a convolution its geometry."""

    op: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry | tuple[()] = ()


KINDS = {
    "linear": Kind("mixed_linear", (9, 12), (13, 12)),
    "one tap": Kind("mixed_conv", (2, 6, 3, 5), (9, 6, 1, 1), Geometry([1, 1], [0, 0], [1, 1], 1)),
    "dense": Kind("mixed_conv", (2, 6, 5, 4), (10, 3, 1, 2), Geometry([2, 1], [1, 0], [1, 2], 2)),
    "depthwise": Kind("mixed_conv", (2, 6, 5, 4), (6, 1, 2, 1), Geometry([1, 2], [0, 1], [2, 1], 6)),
}


class Layer:
    """A layer's tensors in float16, and what the reference makes of them in float64, each result once."""

    def __init__(self, kind: Kind, sources: int, per_channel: bool, biased: bool, rank: int = 0):
        self.kind = kind
        out = kind.weight[0]
        self.x = halves(*kind.x)
        self.weights = [halves(*kind.weight) for _ in range(sources)]
        columns = math.prod(kind.weight[1:])
        shape = (sources, rank, out + columns) if rank else (sources, out) if per_channel else (sources,)
        self.coefficients = torch.randn(shape)
        self.biases = [halves(out) for _ in range(sources)] if biased else None
        if kind.geometry:
            size = conv_output_size(kind.x[2:], kind.weight[2:], kind.geometry)
            self.dy = halves(kind.x[0], out, *size)
            self.x, self.dy = (tensor.to(memory_format=torch.channels_last) for tensor in (self.x, self.dy))
        else:
            self.dy = halves(kind.x[0], out)
        self.every = Wanted([True] * sources, True, [True] * sources if biased else [])
        self.expected = self.gradients(self.every, wide=True)

    def gradients(self, wanted: Wanted, into: Sequence[Tensor | None] | None = None, wide: bool = False) -> Any:
        call = run_reference if wide else run_triton
        tensors = (self.dy, self.x, self.weights, self.coefficients, self.biases)
        arguments = widened(tensors) if wide else tensors
        return call(f"{self.kind.op}_wgrad", *arguments, *wanted, *self.kind.geometry, into=into)

    def buffers(self, wanted: Wanted, filled: str) -> list[Tensor | None] | None:
        """What the sources' gradients are added to, where they are wanted."""
        if filled == "none":
            return None
        dtypes: dict[str, tuple[torch.dtype | None, ...]] = {
            "of the sources' dtype": (torch.float16,),
            "float32": (torch.float32,),
            "mixed": (torch.float32, None, torch.float16),
        }
        chosen = zip(wanted.weights, itertools.cycle(dtypes[filled]), strict=False)
        return [
            torch.randn(self.kind.weight).to(dtype) if want and dtype is not None else None for want, dtype in chosen
        ]

    def check_wgrad(self, wanted: Wanted, filled: str) -> None:
        into = self.buffers(wanted, filled)
        before = [None if buffer is None else buffer.clone() for buffer in into or [None] * len(self.weights)]
        found = self.gradients(wanted, into)
        for j, (gradient, truth, start) in enumerate(zip(found[0], self.expected[0], before, strict=True)):
            if start is None:
                assert_close(gradient, truth if wanted.weights[j] else truth[:0, 0])
            else:
                assert_close(into[j], truth + start)  # type: ignore[index]
        assert_close(found[1], self.expected[1] if wanted.coefficients else self.expected[1][:0].flatten())
        for want, gradient, truth in zip(wanted.biases, found[2], self.expected[2], strict=True):
            assert_close(gradient, truth if want else truth[:0])

    def check_products(self) -> None:
        geometry = self.kind.geometry
        tensors = (self.x, self.weights, self.coefficients, self.biases)
        expected = run_reference(self.kind.op, *widened(tensors), *geometry)
        assert_close(run_triton(self.kind.op, *tensors, *geometry), expected)
        size = (list(self.x.shape),) if geometry else ()
        tensors = (self.dy, self.weights, self.coefficients)
        expected = run_reference(f"{self.kind.op}_dgrad", *widened(tensors), *size, *geometry)
        assert_close(run_triton(f"{self.kind.op}_dgrad", *tensors, *size, *geometry), expected)


def halves(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def widened(arguments: Any) -> Any:
    if isinstance(arguments, Tensor):
        return arguments.double()
    return None if arguments is None else [widened(argument) for argument in arguments]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape[0] == expected.shape[0] and found.numel() == expected.numel()
    if found.numel() > 0:
        error = float((found.double() - expected).abs().max())
        assert error <= 4e-3 * float(expected.abs().max()) + 1e-3


def combinations(sources: int, biased: bool) -> Iterator[Wanted]:
    """Every combination of gradients; for four sources all, and those of one source, with each other's bias."""
    masks = list(itertools.product((False, True), repeat=sources))
    if sources == 4:
        some = [mask for mask in masks if sum(mask) in (1, 4)]
        yield from (Wanted(mask, j % 2 == 0, mask[::-1] if biased else ()) for j, mask in enumerate(some))
        return
    for weights, coefficients, biases in itertools.product(masks, (False, True), masks if biased else [()]):
        yield Wanted(weights, coefficients, biases)


@pytest.mark.parametrize("sources", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option(kind: str, sources: int) -> None:
    for biased in (False, True):
        layers = [Layer(KINDS[kind], sources, per_channel, biased) for per_channel in (False, True)]
        for layer in layers:
            layer.check_products()
        # Each combination once; drawn for it are what is added to, the form of the coefficients, and one or two sums.
        draw = random.Random(0)
        for wanted in combinations(sources, biased):
            with use_config(TINY, draw.choice((1, 2))):
                draw.choice(layers).check_wgrad(wanted, draw.choice(BUFFERS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_outer_coefficients(kind: str) -> None:
    for sources, biased, rank in ((1, True, 5), (2, False, 1), (2, True, 3)):
        layer, draw = Layer(KINDS[kind], sources, False, biased, rank), random.Random(0)
        layer.check_products()
        for wanted in combinations(sources, biased):
            with use_config(TINY, draw.choice((1, 2))):
                layer.check_wgrad(wanted, draw.choice(BUFFERS))
