"""The Triton kernels as they are compiled for sm_80, executed, against the reference in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rl_kernels.backends import reference
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.backends.triton import conv, linear, offline
from rl_kernels.ops.values import Geometry, Gradients, Recipe, Wanted
from tests.emulated.machine.launch_triton import Launched, catching, run_triton

TOLERANCE = {torch.float32: 3e-3, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
CONFIG = Config(32, 32, 32, 4, 3)


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        error = TOLERANCE[one.dtype]
        torch.testing.assert_close(one.double(), other, rtol=error, atol=error * float(other.abs().max()))


class Problem:
    """One layer's recipe and input."""

    def __init__(
        self, shape: Sequence[int], activation: Sequence[int], dtype: torch.dtype, per_channel: bool, sources: int = 2
    ):
        weights = [torch.randn(*shape).to(dtype) for _ in range(sources)]
        biases = [torch.randn(shape[0]).to(dtype) for _ in range(sources)]
        self.recipe = Recipe(weights, torch.randn((sources, shape[0]) if per_channel else (sources,)), biases)
        self.x = torch.randn(*activation).to(dtype)

    def without_biases(self) -> Problem:
        """The problem of a layer that has none."""
        other = copy.copy(self)
        other.recipe = self.recipe._replace(biases=None)
        return other

    def lay_out(self, layout: torch.memory_format) -> None:
        """Give the sources a memory format."""
        weights = [weight.to(memory_format=layout) for weight in self.recipe.weights]
        self.recipe = self.recipe._replace(weights=weights)

    @property
    def wide(self) -> Recipe:
        """The recipe in float64."""
        weights, coefficients, biases = self.recipe
        wide_biases = None if biases is None else [bias.double() for bias in biases]
        return Recipe([weight.double() for weight in weights], coefficients.double(), wide_biases)


def flat(gradients: Gradients) -> list[Tensor]:
    return [*gradients.weights, gradients.coefficients, *gradients.biases]


@pytest.mark.parametrize(
    ("shape", "dtype", "per_channel", "splits"),
    [
        ((37, 90, 80), torch.bfloat16, False, 1),
        ((37, 90, 80), torch.bfloat16, True, 2),
        ((37, 90, 70), torch.bfloat16, False, 1),
        ((33, 64, 45), torch.float16, True, 1),
        ((33, 40, 80), torch.float16, False, 2),
        ((37, 40, 80), torch.float32, False, 1),
        ((33, 36, 45), torch.float32, True, 2),
    ],
)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype, per_channel: bool, splits: int) -> None:
    tokens, out, in_ = shape
    problem = Problem((out, in_), (tokens, in_), dtype, per_channel)
    dy = torch.randn(tokens, out).to(dtype)
    wanted = Wanted([True, True], True, [True, True])
    launches: list[Launched] = []

    def execute(launched: Launched) -> None:
        launches.append(launched)
        run_triton(launched, seed=len(launches))

    with use_config(CONFIG, splits), offline.tf32(True), catching("sm_80", execute):
        y = linear.mixed_linear(problem.x, problem.recipe)
        dx = linear.mixed_linear_dgrad(dy, problem.without_biases().recipe)
        gradients = linear.mixed_linear_wgrad(dy, problem.x, problem.recipe, wanted)
    if in_ % 16 == 0:
        assert "cp.async.cg" in launches[0].compiled.asm["ptx"], "the copies are not asynchronous: they test less"
    x, wide_dy = problem.x.double(), dy.double()
    assert_close([y], [reference.mixed_linear(x, problem.wide)])
    assert_close([dx], [reference.mixed_linear_dgrad(wide_dy, problem.wide)])
    assert_close(flat(gradients), flat(reference.mixed_linear_wgrad(wide_dy, x, problem.wide, wanted)))


@pytest.mark.parametrize(("channels", "groups", "channels_last"), [(32, 1, True), (20, 1, False), (16, 16, True)])
def test_conv(channels: int, groups: int, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    problem = Problem((channels, channels // groups, 3, 3), (2, channels, 5, 6), torch.bfloat16, False)
    x = problem.x.to(memory_format=layout)
    dy = torch.randn(2, channels, 5, 6).bfloat16().to(memory_format=layout)
    problem.lay_out(layout)
    geometry = Geometry([1, 1], [1, 1], [1, 1], groups)
    wanted = Wanted([True, True], True, [True, True])
    with use_config(CONFIG, 1), catching("sm_80", run_triton):
        y = conv.mixed_conv(x, problem.recipe, geometry)
        dx = conv.mixed_conv_dgrad(dy, problem.without_biases().recipe, x.shape, geometry)
        gradients = conv.mixed_conv_wgrad(dy, x, problem.recipe, wanted, geometry)
    wide = x.double(), dy.double()
    assert_close([y], [reference.mixed_conv(wide[0], problem.wide, geometry)])
    assert_close([dx], [reference.mixed_conv_dgrad(wide[1], problem.wide, x.shape, geometry)])
    expected = reference.mixed_conv_wgrad(wide[1], wide[0], problem.wide, wanted, geometry)
    assert_close(flat(gradients), flat(expected))
