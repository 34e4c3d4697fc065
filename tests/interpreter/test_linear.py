"""Every configuration of the linear kernels, not only the one that the heuristic picks, over odd shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rl_kernels.backends import reference, triton
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.backends.triton.configs import FLOAT32_CONFIGS, PRODUCT_CONFIGS, WGRAD_CONFIGS
from tests.backends.calling import run

run_triton, run_reference = functools.partial(run, triton.BACKEND), functools.partial(run, reference.BACKEND)
SHAPES = ((1, 13, 26), (13, 257, 1), (26, 1, 257), (257, 26, 13), (150, 130, 70))
"""Tokens, out_features, in_features."""
SMALL = Config(32, 32, 16, 4, 2)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
IDENTIFIED = {config: "x".join(map(str, config[:3])) for config in (*PRODUCT_CONFIGS, *WGRAD_CONFIGS, *FLOAT32_CONFIGS)}


class Problem:
    """One layer's tensors, and what float64 makes of them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        sources: int = 2,
        per_channel: bool = False,
        dtype: torch.dtype = torch.float32,
        source_dtype: torch.dtype | None = None,
    ):
        tokens, out_features, in_features = shape
        source_dtype = source_dtype or dtype
        self.x, self.dy = torch.randn(tokens, in_features).to(dtype), torch.randn(tokens, out_features).to(dtype)
        self.weights = [torch.randn(out_features, in_features).to(source_dtype) for _ in range(sources)]
        self.biases = [torch.randn(out_features).to(source_dtype) for _ in range(sources)]
        self.coefficients = torch.randn((sources, out_features) if per_channel else (sources,))

    def wide(self) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
        return (
            self.x.double(),
            self.dy.double(),
            [weight.double() for weight in self.weights],
            self.coefficients.double(),
            [bias.double() for bias in self.biases],
        )

    def check_forward(self, biased: bool) -> None:
        x, _, weights, coefficients, biases = self.wide()
        found = run_triton("mixed_linear", self.x, self.weights, self.coefficients, self.biases if biased else None)
        assert_close(found, run_reference("mixed_linear", x, weights, coefficients, biases if biased else None))

    def check_dgrad(self) -> None:
        _, dy, weights, coefficients, _ = self.wide()
        found = run_triton("mixed_linear_dgrad", self.dy, self.weights, self.coefficients)
        assert_close(found, run_reference("mixed_linear_dgrad", dy, weights, coefficients))

    def check_wgrad(
        self, weights_mask: Sequence[bool], coefficients_mask: bool, biases_mask: Sequence[bool] | None
    ) -> None:
        x, dy, weights, coefficients, biases = self.wide()
        masks = (weights_mask, coefficients_mask, biases_mask or ())
        biased = biases_mask is not None
        found = run_triton(
            "mixed_linear_wgrad",
            self.dy,
            self.x,
            self.weights,
            self.coefficients,
            self.biases if biased else None,
            *masks,
        )
        expected = run_reference("mixed_linear_wgrad", dy, x, weights, coefficients, biases if biased else None, *masks)
        dtype = self.x.dtype
        for name, ours, truth in (
            *((f"weight {j}", a, b) for j, (a, b) in enumerate(zip(found[0], expected[0], strict=True))),
            *((f"bias {j}", a, b) for j, (a, b) in enumerate(zip(found[2], expected[2], strict=True))),
        ):
            assert_close(ours, truth, dtype, name)
        # A sum that cancels is measured by what is summed.
        g = dy.t() @ x
        spread = torch.stack([(g * w).norm() for w in weights]) + (dy.sum(0).norm() if biased else 0.0)
        assert found[1].shape == expected[1].shape
        if coefficients_mask:
            assert float((found[1].double() - expected[1]).abs().max()) <= 4 * TOLERANCE[dtype] * float(spread.max())


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None, name: str = "") -> None:
    assert found.shape == expected.shape, name
    error = float((found.double() - expected).norm())
    assert error <= TOLERANCE[dtype or found.dtype] * float(expected.norm()) + 1e-30, name


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("config", (*PRODUCT_CONFIGS, *FLOAT32_CONFIGS), ids=IDENTIFIED.get)
def test_product(config: Config, splits: int) -> None:
    with use_config(config, splits):
        for sources, shape in enumerate(SHAPES[:4], start=1):
            problem = Problem(shape, sources, per_channel=sources % 2 == 0)
            problem.check_forward(biased=sources != 3)
            problem.check_dgrad()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("config", (*WGRAD_CONFIGS, *FLOAT32_CONFIGS), ids=IDENTIFIED.get)
def test_wgrad(config: Config, splits: int) -> None:
    with use_config(config, splits):
        for sources, shape in enumerate(SHAPES[:4], start=1):
            problem = Problem(shape, sources, per_channel=sources % 2 == 0)
            problem.check_wgrad([True] * sources, True, [True] * sources if sources != 3 else None)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
def test_many_tiles(splits: int, per_channel: bool) -> None:
    """More tiles than a group holds, in both directions, and ragged at every edge."""
    with use_config(SMALL, splits):
        for shape in SHAPES:
            problem = Problem(shape, per_channel=per_channel)
            problem.check_forward(biased=True)
            problem.check_dgrad()
            problem.check_wgrad([True, True], True, [True, True])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_only_what_is_wanted(biased: bool, per_channel: bool) -> None:
    flags = (False, True)
    for splits, first, second, coefficients, *biases in itertools.product((1, 2), *([flags] * (5 if biased else 3))):
        problem = Problem((26, 13, 40), per_channel=per_channel)
        with use_config(SMALL, splits):
            problem.check_wgrad([first, second], coefficients, biases if biased else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source_dtype", [None, torch.float32])
def test_half_precision(dtype: torch.dtype, source_dtype: torch.dtype | None) -> None:
    """Also on float32 sources, as under autocast."""
    problem = Problem((26, 40, 257), dtype=dtype, source_dtype=source_dtype)
    problem.check_forward(biased=True)
    problem.check_dgrad()
    problem.check_wgrad([True, True], True, [True, True])


def test_any_strides() -> None:
    for transpose in (False, True):
        problem = Problem((26, 40, 33))
        problem.x, problem.dy = strided(problem.x, transpose), strided(problem.dy, transpose)
        problem.weights = [strided(problem.weights[0], not transpose), problem.weights[1]]
        problem.biases[0] = torch.randn(80)[::2]
        problem.coefficients = torch.randn(40, 4)[:, ::2].t() if transpose else torch.randn(4)[::2]
        problem.check_forward(biased=True)
        problem.check_dgrad()
        problem.check_wgrad([True, True], True, [True, True])
    problem.dy = problem.dy[:, :1].expand(26, 40)
    problem.check_dgrad()
    problem.check_wgrad([True, True], True, [True, True])


def strided(tensor: Tensor, transpose: bool) -> Tensor:
    """The same values with gaps between them, which are NaN."""
    rows, columns = tensor.shape
    storage = torch.full((2 * columns, 3 * rows) if transpose else (3 * rows, 2 * columns), torch.nan)
    view = storage.t()[::3, ::2] if transpose else storage[::3, ::2]
    return view.copy_(tensor)


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0)])
def test_nothing_to_sum(shape: tuple[int, int, int]) -> None:
    problem = Problem(shape)
    problem.check_forward(biased=True)
    problem.check_dgrad()
    problem.check_wgrad([True, True], True, [True, True])


def test_infinite_coefficients_stay_in_their_place() -> None:
    """A tile's edge is 0 times an infinite coefficient: nan, if it were multiplied."""
    problem = Problem((3, 5, 20))
    problem.x, problem.weights = problem.x.abs(), [weight.abs() for weight in problem.weights]
    problem.coefficients = torch.tensor([torch.inf, 1.0])
    with use_config(SMALL):
        y = run_triton("mixed_linear", problem.x, problem.weights, problem.coefficients, None)
    assert bool((y == torch.inf).all())


def test_a_zero_coefficient_does_not_hide_an_infinite_source() -> None:
    problem = Problem((3, 5, 20))
    problem.coefficients = torch.tensor([1.0, 0.0])
    problem.weights[1][2, 3] = torch.inf
    y = run_triton("mixed_linear", problem.x, problem.weights, problem.coefficients, None)
    assert bool(y[:, 2].isnan().all()) and int(y.isnan().sum()) == 3


def test_same_bits_every_time() -> None:
    problem = Problem((257, 70, 130))
    with use_config(SMALL, 5):
        runs = [
            run_triton(
                "mixed_linear_wgrad",
                problem.dy,
                problem.x,
                problem.weights,
                problem.coefficients,
                problem.biases,
                (True, True),
                True,
                (True, True),
            )
            for _ in range(2)
        ]
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0] + runs[0][2], runs[1][0] + runs[1][2], strict=True))
