"""Tensors whose elements lie more than 2^31 apart: their offsets need 64 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rl_kernels.backends import reference, triton
from rl_kernels.backends.gpu.heuristics import Config, use_config
from tests.backends.calling import run

run_triton, run_reference = functools.partial(run, triton.BACKEND), functools.partial(run, reference.BACKEND)
FAR = (1 << 30) + 8
"""Elements between rows: the third one is out of a 32-bit offset's reach."""
Spread = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def spread() -> Spread:
    """Puts the rows of a tensor far apart, in memory that is never touched between them."""
    storage = torch.zeros(2 * FAR + (1 << 16), dtype=torch.float16)

    def spread_rows(tensor: Tensor) -> Tensor:
        rows = storage.as_strided(tensor.shape, (FAR, *tensor[0].contiguous().stride()))
        return rows.copy_(tensor)

    return spread_rows


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found.double() - expected).norm()) <= 2e-3 * float(expected.norm())


def random(*shape: int) -> Tensor:
    return torch.randn(shape).half()


@pytest.mark.parametrize("splits", [1, 2])
def test_linear(spread: Spread, splits: int) -> None:
    x, dy, weights, coefficients = random(3, 20), random(3, 5), [random(5, 20) for _ in range(2)], torch.randn(2)
    few = [weight[:3] for weight in weights]
    with use_config(Config(16, 16, 16, 4, 2), splits):
        assert_close(
            run_triton("mixed_linear", spread(x), weights, coefficients, None),
            run_reference("mixed_linear", x.double(), [w.double() for w in weights], coefficients.double(), None),
        )
        assert_close(
            run_triton("mixed_linear_dgrad", spread(dy), weights, coefficients),
            run_reference("mixed_linear_dgrad", dy.double(), [w.double() for w in weights], coefficients.double()),
        )
        assert_close(
            run_triton("mixed_linear", x, [spread(few[0]), few[1]], coefficients, None),
            run_reference("mixed_linear", x.double(), [w.double() for w in few], coefficients.double(), None),
        )
        masks = [True, True], True, []
        found = run_triton("mixed_linear_wgrad", dy[:, :3], spread(x), few, coefficients, None, *masks)
        truth = (dy[:, :3].double(), x.double(), [w.double() for w in few], coefficients.double())
        expected = run_reference("mixed_linear_wgrad", *truth, None, *masks)
        for ours, right in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
            assert_close(ours, right)
        # The gradients come dense: only the source that is read for <G, W_j> is far apart.
        found = run_triton("mixed_linear_wgrad", dy[:, :3], x, [spread(few[0]), few[1]], coefficients, None, *masks)
        assert_close(found[1], expected[1])


@pytest.mark.parametrize("groups", [1, 4])
def test_conv(spread: Spread, groups: int) -> None:
    """Images far apart, in a dense convolution and in a depthwise one."""
    x, dy = random(3, 4, 5, 4), random(3, 4, 5, 4)
    weights, coefficients = [random(4, 4 // groups, 3, 3) for _ in range(2)], torch.randn(2)
    geometry = [1, 1], [1, 1], [1, 1], groups
    wide = [w.double() for w in weights], coefficients.double()
    with use_config(Config(16, 16, 16, 4, 2)):
        assert_close(
            run_triton("mixed_conv", spread(x), weights, coefficients, None, *geometry),
            run_reference("mixed_conv", x.double(), *wide, None, *geometry),
        )
        assert_close(
            run_triton("mixed_conv_dgrad", spread(dy), weights, coefficients, list(x.shape), *geometry),
            run_reference("mixed_conv_dgrad", dy.double(), *wide, list(x.shape), *geometry),
        )
        masks = [True, True], True, []
        found = run_triton("mixed_conv_wgrad", dy, spread(x), weights, coefficients, None, *masks, *geometry)
        expected = run_reference("mixed_conv_wgrad", dy.double(), x.double(), *wide, None, *masks, *geometry)
        for ours, right in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
            assert_close(ours, right)


def test_resident(spread: Spread) -> None:
    x, weights, coefficients = random(3, 4, 5, 4), [random(4, 4, 3, 3) for _ in range(2)], torch.randn(2)
    geometry = [1, 1], [1, 1], [1, 1], 1
    with use_config(Config(16, 128, 16, 4, 2)):
        assert_close(
            run_triton("mixed_conv", spread(x), weights, coefficients, None, *geometry),
            run_reference(
                "mixed_conv", x.double(), [w.double() for w in weights], coefficients.double(), None, *geometry
            ),
        )


def test_outer_coefficients(spread: Spread) -> None:
    x, dy, weights = random(3, 20), random(3, 3), [random(3, 20) for _ in range(2)]
    coefficients, masks = torch.randn(2, 2, 23), ([False, False], True, [])
    wide = [w.double() for w in weights], coefficients.double()
    with use_config(Config(16, 16, 16, 4, 2)):
        far = [spread(weights[0]), weights[1]]
        assert_close(
            run_triton("mixed_linear", x, far, coefficients, None),
            run_reference("mixed_linear", x.double(), *wide, None),
        )
        found = run_triton("mixed_linear_wgrad", dy, x, far, coefficients, None, *masks)
        expected = run_reference("mixed_linear_wgrad", dy.double(), x.double(), *wide, None, *masks)
        assert_close(found[1], expected[1])
