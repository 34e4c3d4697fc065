"""``Outer`` coefficients in every kernel: ragged tiles in all directions, strides, memory formats, panels."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels.backends import reference, triton
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.backends.triton import conv, linear, outer
from rl_kernels.backends.triton.epilogue import Epilogue
from rl_kernels.ops.shapes import conv_output_size
from rl_kernels.ops.values import Geometry
from tests.backends.calling import run
from tests.interpreter.test_conv import GROUPED, VOLUME, Shape, resident_calls

run_triton, run_reference = functools.partial(run, triton.BACKEND), functools.partial(run, reference.BACKEND)
SMALL, TINY = Config(32, 16, 16, 4, 2), Config(16, 16, 16, 4, 2)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LINEAR = Shape(20, 37, 35, (), (), (), (), ())
DENSE = Shape(1, 19, 35, (5, 3), (2, 1), (2, 1), (1, 0), (1, 2))
FLAT = Shape(2, 5, 7, (7,), (3,), (1,), (1,), (1,))
PRODUCT = Shape(2, 20, 18, (3, 5), (1, 1), (1, 1), (0, 0), (1, 1))
PHASES = Shape(1, 5, 7, (6, 7), (4, 3), (2, 3), (2, 1), (1, 2))
CHANNELS = Shape(1, 6, 6, (5, 4), (3, 2), (2, 1), (1, 2), (1, 2), 6)


class Problem:
    """One layer's tensors, and what float64 makes of them; linear if the shape has no size."""

    def __init__(self, shape: Shape, sources: int = 2, rank: int = 3, dtype: torch.dtype = torch.float32):
        self.op, self.geometry, spatial = "mixed_linear", Geometry([], [], [], 1), [*shape.size]
        if shape.size:
            self.op = "mixed_conv"
            self.geometry = Geometry([*shape.stride], [*shape.padding], [*shape.dilation], shape.groups)
            spatial = conv_output_size(shape.size, shape.kernel, self.geometry)
        filters = (shape.out, shape.channels // shape.groups, *shape.kernel)
        self.x = torch.randn(shape.batch, shape.channels, *shape.size).to(dtype)
        self.dy = torch.randn(shape.batch, shape.out, *spatial).to(dtype)
        self.weights = [torch.randn(filters).to(dtype) for _ in range(sources)]
        self.biases: list[Tensor] | None = [torch.randn(shape.out).to(dtype) for _ in range(sources)]
        self.coefficients = torch.randn(sources, rank, shape.out + math.prod(filters[1:]))

    def channels_last(self) -> Problem:
        """The last source, the coefficients and the rank's order stay as they are."""
        memory_format = torch.channels_last if self.x.dim() == 4 else torch.channels_last_3d
        self.x, self.dy = self.x.to(memory_format=memory_format), self.dy.to(memory_format=memory_format)
        self.weights[0] = self.weights[0].to(memory_format=memory_format)
        return self

    def both(self, op: str, *arguments: Any) -> tuple[Any, Any]:
        """What Triton and, in float64, the reference make of a call."""
        geometry = self.geometry if self.op == "mixed_conv" else ()
        return run_triton(op, *arguments, *geometry), run_reference(op, *widened(arguments), *geometry)

    def check_products(self) -> None:
        assert_close(*self.both(self.op, self.x, self.weights, self.coefficients, self.biases))
        size = [[*self.x.shape]] if self.op == "mixed_conv" else []
        assert_close(*self.both(f"{self.op}_dgrad", self.dy, self.weights, self.coefficients, *size))

    def check_wgrad(self) -> None:
        every = [True] * len(self.weights)
        masks = every, True, every if self.biases else []
        arguments = self.dy, self.x, self.weights, self.coefficients, self.biases, *masks
        found, expected = self.both(f"{self.op}_wgrad", *arguments)
        assert found[1].shape == self.coefficients.shape
        out = self.weights[0].shape[0]
        for ours, truth in zip((*found[0], *found[2]), (*expected[0], *expected[2]), strict=True):
            assert_close(ours, truth)
        for part in (slice(0, out), slice(out, None)):
            assert_close(found[1][..., part], expected[1][..., part], 4 * TOLERANCE[self.x.dtype])

    def check(self) -> None:
        self.check_products()
        self.check_wgrad()


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(map(widened, value)) if isinstance(value, list | tuple) else value


def assert_close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert found.shape == expected.shape
    error = float((found.double() - expected).norm())
    assert error <= (tolerance or TOLERANCE[found.dtype]) * float(expected.norm()) + 1e-30


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", [LINEAR, PRODUCT, DENSE, GROUPED], ids=["linear", "one tap", "dense", "grouped"])
def test_many_tiles(shape: Shape, splits: int) -> None:
    problem = Problem(shape)
    with use_config(SMALL, splits):
        (problem.channels_last() if shape is PRODUCT else problem).check()


@pytest.mark.parametrize("shape", [PHASES, CHANNELS, VOLUME], ids=["phases", "depthwise", "3d"])
def test_memory_formats(shape: Shape) -> None:
    """As the heuristic picks: K is in the order of the dimensions, whatever the order in memory."""
    Problem(shape, 3, 2).channels_last().check()
    Problem(shape, 1, 5).check_products()


@pytest.mark.parametrize("transposed", [False, True])
def test_resident(transposed: bool) -> None:
    config, many = Config(16, 128, 16, 4, 2), Shape(2, 13, 16, (9, 20), (3, 2), (1, 1), (1, 0), (1, 1))
    shape = many._replace(stride=(2, 1)) if transposed else many
    with use_config(config):
        assert resident_calls(Problem(shape, dtype=torch.bfloat16).check_products) >= 2


@pytest.mark.parametrize("shape", [LINEAR, FLAT], ids=["linear", "conv"])
def test_any_strides(shape: Shape) -> None:
    problem = Problem(shape._replace(batch=2))
    wide = torch.full((problem.coefficients.shape[2], 3, 2, 5), torch.nan)
    problem.coefficients = wide[..., 1].permute(2, 1, 0).copy_(problem.coefficients)
    problem.weights[1] = problem.weights[1].transpose(0, 1).contiguous().transpose(0, 1)
    problem.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for shape in (LINEAR, FLAT):
        Problem(shape, dtype=dtype).check()
    problem = Problem(LINEAR)
    problem.x, problem.dy = problem.x.to(dtype), problem.dy.to(dtype)
    problem.check_products()


@pytest.mark.parametrize("shape", [LINEAR, FLAT, CHANNELS], ids=["linear", "conv", "depthwise"])
def test_nothing_to_sum(shape: Shape) -> None:
    Problem(shape._replace(batch=0)).check()


def test_no_inputs() -> None:
    problem = Problem(LINEAR._replace(channels=0))
    problem.check()


@pytest.mark.parametrize(
    "shape",
    [LINEAR, DENSE, GROUPED, CHANNELS, Shape(1, 8, 80, (3,), (2,), (1,), (0,), (1,), 2)],
    ids=["linear", "conv", "groups", "depthwise", "parts of groups"],
)
def test_panels(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of a tile go to a bounded workspace: where they do not fit, a layer is taken in panels."""
    seen: list[outer.Panel] = []
    shares: list[int] = []
    panels, finish = outer.panels, Epilogue.finish

    def spied(layer: outer.Panel, configs: tuple[Config, ...]) -> Any:
        rows = shape.out // 3
        while few and outer._rows_at_once(layer, configs) < rows:
            monkeypatch.setattr(heuristics, "WORKSPACE_BYTES", heuristics.WORKSPACE_BYTES + 64)
        for part in panels(layer, configs):
            seen.append(part)
            yield part

    def finishing(epilogue: Epilogue, *arguments: Any) -> None:
        shares.append(4 * epilogue.dots.numel())
        finish(epilogue, *arguments)

    monkeypatch.setattr(linear, "panels", spied)
    monkeypatch.setattr(conv, "panels", spied)
    monkeypatch.setattr(Epilogue, "finish", finishing)
    problem = Problem(shape)
    for few in (False, True):
        seen.clear()
        if few:
            monkeypatch.setattr(heuristics, "WORKSPACE_BYTES", 64)
        with use_config(SMALL):  # As low, and as narrow, as any tile for float32.
            problem.check_wgrad()
        assert sum(part.dy.shape[1] for part in seen) == shape.out
        assert len(seen) >= 3 if few else len(seen) == 1
    assert max(shares[1:]) <= heuristics.WORKSPACE_BYTES


def test_infinite_coefficients_stay_in_their_place() -> None:
    """A tile's edge is 0 times an infinite coefficient: nan, if it were multiplied."""
    for shape in (LINEAR._replace(batch=3), FLAT._replace(padding=(0,)), CHANNELS._replace(padding=(0, 0))):
        problem = Problem(shape)
        problem.x, problem.weights = problem.x.abs(), [weight.abs() for weight in problem.weights]
        problem.coefficients = problem.coefficients.abs()
        problem.coefficients[0, 1] = torch.inf
        geometry = problem.geometry if shape.size else ()
        y = run_triton(problem.op, problem.x, problem.weights, problem.coefficients, None, *geometry)
        assert bool((y == torch.inf).all())
