"""Every configuration of the convolution kernels, not only the one that the heuristic picks, over odd shapes."""

from __future__ import annotations

import functools
import itertools
import unittest.mock
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rl_kernels.backends import reference, triton
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import H100, Config, use_config
from rl_kernels.backends.triton import conv, depthwise
from rl_kernels.backends.triton.configs import CONV_CONFIGS, CONV_WGRAD_CONFIGS, FLOAT32_CONFIGS, RESIDENT_CONFIGS
from rl_kernels.ops import shapes
from rl_kernels.ops.values import Geometry
from tests.backends.calling import run

run_triton, run_reference = functools.partial(run, triton.BACKEND), functools.partial(run, reference.BACKEND)
SMALL = Config(32, 16, 16, 4, 2)
TINY = Config(16, 16, 16, 4, 2)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
IDENTIFIED = {
    config: "x".join(map(str, config[:3]))
    for config in (*CONV_CONFIGS, *CONV_WGRAD_CONFIGS, *FLOAT32_CONFIGS, *RESIDENT_CONFIGS)
}


class Shape(NamedTuple):
    """A convolution; sizes and kernel have an entry a dimension."""

    batch: int
    channels: int
    out: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


PLAIN = Shape(2, 5, 7, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1))
RAGGED = Shape(1, 70, 70, (5, 3), (2, 2), (2, 1), (1, 0), (1, 2))
SHORT = Shape(2, 5, 7, (5,), (2,), (2,), (1,), (1,))
SHORT_DEPTHWISE = Shape(2, 4, 4, (5,), (2,), (2,), (1,), (1,), 4)
DEPTHWISE = Shape(2, 6, 6, (7, 5), (3, 3), (2, 1), (1, 2), (1, 2), 6)
GROUPED = Shape(2, 6, 9, (9,), (3,), (3,), (2,), (2,), 3)
VOLUME = Shape(1, 4, 6, (4, 5, 6), (3, 2, 1), (2, 1, 3), (1, 0, 2), (1, 2, 3), 2)
SHAPES = (
    PLAIN,
    DEPTHWISE,
    GROUPED,
    Shape(2, 4, 6, (11,), (2,), (4,), (0,), (1,), 2),  # most phases of the stride meet no tap
    Shape(3, 8, 8, (7, 6), (1, 1), (2, 3), (1, 0), (1, 1)),
    Shape(2, 4, 2, (4, 7), (1, 1), (1, 1), (0, 0), (1, 1), 2),
    Shape(2, 3, 6, (8, 9), (5, 4), (2, 3), (2, 1), (1, 2)),
    Shape(2, 3, 6, (8, 9), (3, 4), (2, 2), (2, 1), (2, 2), 3),  # a group has one input and two outputs
    VOLUME,
    Shape(1, 4, 5, (3, 4, 5), (2, 3, 3), (1, 1, 1), (0, 1, 2), (2, 1, 1)),
    Shape(2, 3, 3, (13,), (4,), (2,), (2,), (3,), 3),
    Shape(1, 4, 4, (3, 4, 5), (2, 3, 3), (1, 2, 1), (0, 1, 2), (2, 1, 1), 4),
)


class Problem:
    """One layer's tensors, and what float64 makes of them."""

    def __init__(
        self,
        shape: Shape,
        sources: int = 2,
        per_channel: bool = False,
        dtype: torch.dtype = torch.float32,
        source_dtype: torch.dtype | None = None,
    ):
        source_dtype = source_dtype or dtype
        self.geometry = Geometry(list(shape.stride), list(shape.padding), list(shape.dilation), shape.groups)
        spatial = shapes.conv_output_size(shape.size, shape.kernel, self.geometry)
        self.x = torch.randn(shape.batch, shape.channels, *shape.size).to(dtype)
        self.dy = torch.randn(shape.batch, shape.out, *spatial).to(dtype)
        filters = (shape.out, shape.channels // shape.groups, *shape.kernel)
        self.weights = [torch.randn(filters).to(source_dtype) for _ in range(sources)]
        self.biases = [torch.randn(shape.out).to(source_dtype) for _ in range(sources)]
        self.coefficients = torch.randn((sources, shape.out) if per_channel else (sources,))

    def wide(self) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
        return (
            self.x.double(),
            self.dy.double(),
            [weight.double() for weight in self.weights],
            self.coefficients.double(),
            [bias.double() for bias in self.biases],
        )

    def channels_last(self) -> Problem:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        memory_format = formats[self.x.dim()]
        self.x, self.dy = self.x.to(memory_format=memory_format), self.dy.to(memory_format=memory_format)
        self.weights[0] = self.weights[0].to(memory_format=memory_format)  # The others stay as they are.
        return self

    def check_forward(self, biased: bool) -> None:
        x, _, weights, coefficients, biases = self.wide()
        found = run_triton(
            "mixed_conv", self.x, self.weights, self.coefficients, self.biases if biased else None, *self.geometry
        )
        expected = run_reference("mixed_conv", x, weights, coefficients, biases if biased else None, *self.geometry)
        assert_close(found, expected)
        memory_format = shapes.conv_memory_format(self.x, self.weights)
        assert found.stride() == torch.empty(found.shape, memory_format=memory_format).stride()

    def check_dgrad(self) -> None:
        _, dy, weights, coefficients, _ = self.wide()
        size = list(self.x.shape)
        found = run_triton("mixed_conv_dgrad", self.dy, self.weights, self.coefficients, size, *self.geometry)
        expected = run_reference("mixed_conv_dgrad", dy, weights, coefficients, size, *self.geometry)
        assert_close(found, expected)
        memory_format = shapes.conv_memory_format(self.dy, self.weights)
        assert found.stride() == torch.empty(found.shape, memory_format=memory_format).stride()

    def check_wgrad(
        self, weights_mask: Sequence[bool], coefficients_mask: bool, biases_mask: Sequence[bool] | None
    ) -> None:
        x, dy, weights, coefficients, biases = self.wide()
        masks = (weights_mask, coefficients_mask, biases_mask or ())
        biased = biases_mask is not None
        found = run_triton(
            "mixed_conv_wgrad",
            self.dy,
            self.x,
            self.weights,
            self.coefficients,
            self.biases if biased else None,
            *masks,
            *self.geometry,
        )
        expected = run_reference(
            "mixed_conv_wgrad", dy, x, weights, coefficients, biases if biased else None, *masks, *self.geometry
        )
        dtype = self.x.dtype
        memory_format = shapes.conv_memory_format(self.x, self.weights)
        for j, (ours, truth) in enumerate(zip(found[0], expected[0], strict=True)):
            assert_close(ours, truth, dtype, f"weight {j}")
            if weights_mask[j]:
                assert ours.stride() == torch.empty_like(self.weights[j], memory_format=memory_format).stride()
        for j, (ours, truth) in enumerate(zip(found[2], expected[2], strict=True)):
            assert_close(ours, truth, dtype, f"bias {j}")
        assert found[1].shape == expected[1].shape
        if coefficients_mask:
            # A sum that cancels is measured by what is summed.
            unit = run_reference("mixed_conv_wgrad",
                dy, x, weights, torch.ones_like(coefficients), None, [True] * len(weights), False, (), *self.geometry,
            )[0][0]  # fmt: skip
            sums = dy.sum([0, *range(2, dy.dim())]).norm() if biased else 0.0
            spread = torch.stack([(unit * w).norm() for w in weights]) + sums
            error = float((found[1].double() - expected[1]).abs().max()) if found[1].numel() > 0 else 0.0
            assert error <= 4 * TOLERANCE[dtype] * float(spread.max())

    def check(self, biased: bool = True) -> None:
        everything = [True] * len(self.weights)
        self.check_forward(biased)
        self.check_dgrad()
        self.check_wgrad(everything, True, everything if biased else None)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None, name: str = "") -> None:
    assert found.shape == expected.shape, name
    error = float((found.double() - expected).norm())
    assert error <= TOLERANCE[dtype or found.dtype] * float(expected.norm()) + 1e-30, name


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("config", (*CONV_CONFIGS, *FLOAT32_CONFIGS), ids=IDENTIFIED.get)
def test_correlate(config: Config, splits: int) -> None:
    with use_config(config, splits):
        for sources, shape in enumerate((SHORT, RAGGED, VOLUME, GROUPED), start=1):
            problem = Problem(shape, sources, per_channel=sources % 2 == 0)
            problem.check_forward(biased=sources != 3)
            problem.check_dgrad()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("config", (*CONV_WGRAD_CONFIGS, *FLOAT32_CONFIGS), ids=IDENTIFIED.get)
def test_wgrad(config: Config, splits: int) -> None:
    with use_config(config, splits):
        for sources, shape in enumerate((SHORT, RAGGED, VOLUME, GROUPED), start=1):
            problem = Problem(shape, sources, per_channel=sources % 2 == 0)
            problem.check_wgrad([True] * sources, True, [True] * sources if sources != 3 else None)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape.size + shape.kernel)))
def test_every_geometry(shape: Shape, per_channel: bool) -> None:
    """As the heuristic picks, in both memory formats."""
    Problem(shape, per_channel=per_channel).check()
    if len(shape.size) > 1:
        Problem(shape, 3, per_channel).channels_last().check(biased=not per_channel)


@pytest.mark.parametrize("sources", [1, 2, 3, 4])
def test_sources(sources: int) -> None:
    for shape, per_channel in itertools.product((SHORT, SHORT_DEPTHWISE), (False, True)):
        Problem(shape, sources, per_channel).check()


@pytest.mark.parametrize("config", RESIDENT_CONFIGS, ids=IDENTIFIED.get)
def test_resident(config: Config) -> None:
    """A filter that stays on chip: one block of channels, of which some are missing, and several tiles of pixels."""
    some = config.rows - 3
    with use_config(config):
        for per_channel, shape in (
            (False, Shape(3, some, config.rows, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1))),
            (True, Shape(2, config.rows, some, (9, 20), (3, 2), (2, 1), (1, 0), (1, 2))),
            (True, Shape(1, 6, 10, (30,), (3,), (1,), (1,), (1,), 2)),
            (False, Shape(1, 5, 3, (4, 5, 3), (2, 2, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2))),
        ):
            problem = Problem(shape, 2 + per_channel, per_channel, dtype=torch.bfloat16)
            assert resident_calls(problem.check_forward, per_channel) >= 1
            assert resident_calls(problem.check_dgrad) >= 1
            if len(shape.size) == 2:
                problem.channels_last().check_forward(biased=False)
                problem.check_dgrad()


def resident_calls(check: Callable[..., None], *arguments: bool) -> int:
    """How often the resident kernel runs."""
    with unittest.mock.patch.object(conv.resident, "correlate", wraps=conv.resident.correlate) as spy:
        check(*arguments)
    return spy.call_count


@pytest.mark.parametrize("per_channel", [False, True])
def test_many_tiles(per_channel: bool) -> None:
    """Several tiles in every direction, groups and taps, all of them ragged."""
    for shape in (RAGGED, Shape(1, 70, 72, (4, 3), (2, 1), (1, 1), (1, 0), (1, 1), 2)):
        for splits in (1, 4):
            with use_config(SMALL, splits):
                Problem(shape, per_channel=per_channel).check_forward(biased=True)
                Problem(shape, per_channel=per_channel).check_dgrad()
        with use_config(Config(32, 32, 16, 4, 2), 2):
            Problem(shape, per_channel=per_channel).check_wgrad([True, True], True, [True, True])


def test_depthwise_many_blocks() -> None:
    """Several blocks of channels and of pixels, in both layouts, and a sum in several parts."""
    shape = Shape(2, 130, 130, (4, 3), (2, 1), (1, 1), (1, 0), (1, 1), 130)
    Problem(shape, per_channel=True).channels_last().check()
    shape = Shape(2, 2, 2, (1100,), (2,), (1,), (1,), (1,), 2)
    Problem(shape).check()
    assert depthwise.splits_of(2 * 1101, 1024, 4, 4, H100) == (3, 1)


def test_depthwise_long_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of pixels to a program, as where there are more of them than the device runs at once."""
    monkeypatch.setattr(heuristics, "device_of", lambda device: H100._replace(multiprocessors=1))
    assert depthwise.splits_of(2 * 2301, 1024, 2, 4, heuristics.device_of(torch.device("cpu"))) == (2, 3)
    Problem(Shape(2, 1, 1, (2300,), (2,), (1,), (1,), (1,), 1)).check()
    Problem(Shape(2, 2, 2, (1100,), (2,), (1,), (1,), (1,), 2)).check()


@pytest.mark.parametrize("shape", [SHORT, SHORT_DEPTHWISE])
@pytest.mark.parametrize("biased", [False, True])
def test_only_what_is_wanted(biased: bool, shape: Shape) -> None:
    flags = (False, True)
    for splits, first, second, coefficients, *biases in itertools.product((1, 2), *([flags] * (5 if biased else 3))):
        if splits == 2 and shape is SHORT_DEPTHWISE:
            continue  # It splits by itself.
        problem = Problem(shape, per_channel=first == coefficients)
        with use_config(TINY, splits):
            problem.check_wgrad([first, second], coefficients, biases if biased else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source_dtype", [None, torch.float32])
def test_half_precision(dtype: torch.dtype, source_dtype: torch.dtype | None) -> None:
    """Also on float32 sources, as under autocast."""
    for shape in (Shape(2, 20, 22, (4, 5), (2, 3), (2, 1), (1, 1), (1, 1)), DEPTHWISE):
        problem = Problem(shape, per_channel=shape is DEPTHWISE, dtype=dtype, source_dtype=source_dtype)
        problem.check()
        problem.channels_last().check()


def test_a_product() -> None:
    """One tap, no stride: the linear kernels, where channels are innermost."""
    for shape in (
        Shape(2, 6, 9, (3, 5), (1, 1), (1, 1), (0, 0), (1, 1)),
        Shape(2, 6, 9, (2, 3, 2), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    ):
        problem = Problem(shape, per_channel=True).channels_last()
        assert conv.is_product(problem.weights[0], problem.geometry, problem.x, problem.dy)
        problem.check()
        problem.check_wgrad([True, False], False, [False, True])
        Problem(shape).check()


@pytest.mark.parametrize("shape", [PLAIN, DEPTHWISE, GROUPED, VOLUME])
def test_any_strides(shape: Shape) -> None:
    problem = Problem(shape)
    problem.x, problem.dy = strided(problem.x), strided(problem.dy)
    problem.weights = [strided(problem.weights[0]), problem.weights[1]]
    problem.biases[0] = torch.randn(2 * shape.out)[::2]
    problem.coefficients = torch.randn(shape.out, 4)[:, ::2].t()
    problem.check()
    problem.coefficients = torch.randn(4)[::2]
    problem.dy = problem.dy[:1, :1].expand(problem.dy.shape)
    problem.check_dgrad()
    problem.check_wgrad([True, True], True, [True, True])


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them, which are NaN, and the dimensions in another order."""
    storage = torch.full([2 * size + 1 for size in reversed(tensor.shape)], torch.nan)
    view = storage.permute(*reversed(range(tensor.dim())))[(slice(1, None, 2),) * tensor.dim()]
    return view.copy_(tensor)


@pytest.mark.parametrize("groups", [1, 2])
def test_nothing_to_sum(groups: int) -> None:
    """An empty batch, with and without channels; the reference leaves no channels to us."""
    for channels in (2, 6):
        problem = Problem(PLAIN._replace(batch=0, channels=channels, out=2 * groups, groups=groups))
        problem.check()
    problem = Problem(PLAIN._replace(channels=0, out=6))
    y = run_triton("mixed_conv", problem.x, problem.weights, problem.coefficients, problem.biases, *problem.geometry)
    mixed = sum(c * bias for c, bias in zip(problem.coefficients, problem.biases, strict=True))
    torch.testing.assert_close(y, mixed.view(1, -1, 1, 1).expand_as(y))
    masks = ([True, True], True, [True, True])
    _, dc, _ = run_triton(
        "mixed_conv_wgrad",
        problem.dy,
        problem.x,
        problem.weights,
        problem.coefficients,
        problem.biases,
        *masks,
        *problem.geometry,
    )
    total = problem.dy.sum([0, 2, 3])
    torch.testing.assert_close(dc, torch.stack([total @ bias for bias in problem.biases]))
    problem = Problem(PLAIN._replace(out=0))
    dx = run_triton(
        "mixed_conv_dgrad", problem.dy, problem.weights, problem.coefficients, [*problem.x.shape], *problem.geometry
    )
    assert not bool(dx.any())
    _, dc, _ = run_triton(
        "mixed_conv_wgrad",
        problem.dy,
        problem.x,
        problem.weights,
        problem.coefficients,
        problem.biases,
        *masks,
        *problem.geometry,
    )
    assert not bool(dc.any())


def test_infinite_coefficients_stay_in_their_place() -> None:
    """A tile's edge is 0 times an infinite coefficient: nan, if it were multiplied."""
    for shape in (PLAIN._replace(padding=(0, 0)), DEPTHWISE._replace(padding=(0, 0))):
        problem = Problem(shape)
        problem.x, problem.weights = problem.x.abs(), [weight.abs() for weight in problem.weights]
        problem.coefficients = torch.tensor([torch.inf, 1.0])
        y = run_triton("mixed_conv", problem.x, problem.weights, problem.coefficients, None, *problem.geometry)
        assert bool((y == torch.inf).all())


def test_strided_dgrad_multiplies_no_zeros() -> None:
    """An infinite weight reaches only the pixels that its tap meets."""
    problem = Problem(Shape(1, 2, 2, (6,), (3,), (2,), (1,), (1,)), sources=1)
    problem.dy, problem.weights = problem.dy.abs(), [problem.weights[0].abs()]
    problem.coefficients = torch.ones(1)
    problem.weights[0][:, :, 1] = torch.inf
    dx = run_triton("mixed_conv_dgrad", problem.dy, problem.weights, problem.coefficients, [1, 2, 6], *problem.geometry)
    assert bool((dx[..., ::2] == torch.inf).all()) and bool(dx[..., 1::2].isfinite().all())


def test_same_bits_every_time() -> None:
    for shape in (RAGGED, DEPTHWISE):
        problem = Problem(shape)
        with use_config(TINY._replace(rows=32, columns=32), 5):
            runs = [
                run_triton("mixed_conv_wgrad",
                    problem.dy, problem.x, problem.weights, problem.coefficients, problem.biases,
                    (True, True), True, (True, True), *problem.geometry,
                )
                for _ in range(2)
            ]  # fmt: skip
        assert torch.equal(runs[0][1], runs[1][1])
        assert all(torch.equal(a, b) for a, b in zip(runs[0][0] + runs[0][2], runs[1][0] + runs[1][2], strict=True))
