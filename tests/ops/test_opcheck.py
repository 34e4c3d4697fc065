"""torch's own checks of a registered op: schema, autograd registration, fake tensors (strides too), AOT dispatch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import rl_kernels as rl
from rl_kernels.backends import registered
from tests.ops.test_gradcheck import CONVOLUTIONS

BACKENDS = [backend.name for backend in registered()]
LAYOUTS = ("contiguous", "channels_last")


def random(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    value = torch.randn(shape, dtype=torch.float32).to(dtype)
    if layout == "channels_last" and value.dim() in (4, 5):
        value = value.to(memory_format=torch.channels_last if value.dim() == 4 else torch.channels_last_3d)
    return value.requires_grad_()


def recipe(n: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Any:
    weights = [random(shape, dtype, layout) for _ in range(n)]
    return weights, random((n,), torch.float32), [random(shape[:1], dtype) for _ in range(n)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_linear(n: int, dtype: torch.dtype, backend: str) -> None:
    weights, coefficients, biases = recipe(n, (5, 7), dtype)
    x, dy = random((2, 3, 7), dtype), random((2, 3, 5), dtype)
    with rl.use_backend(backend):
        opcheck(torch.ops.rl_kernels.mixed_linear, (x, weights, coefficients, biases))
        opcheck(torch.ops.rl_kernels.mixed_linear, (x, weights, coefficients, None))
        opcheck(torch.ops.rl_kernels.mixed_linear_dgrad, (dy, weights, coefficients))
        opcheck(
            torch.ops.rl_kernels.mixed_linear_wgrad,
            (dy, x, weights, coefficients, biases, [True] * n, True, [True] * n),
        )
        opcheck(torch.ops.rl_kernels.mixed_linear_wgrad, (dy, x, weights, coefficients, None, [False] * n, True, []))
        opcheck(torch.ops.rl_kernels.mixed_linear_wgrad, (dy, x, weights, coefficients, None, [True] * n, False, []))


def conv_cases() -> list[Any]:
    """Every convolution on every backend; in all pairs of layouts on those that choose their own panels."""
    contiguous = (LAYOUTS[0], LAYOUTS[0])
    pairs = [(x, w) for x in LAYOUTS for w in LAYOUTS]
    return [
        pytest.param(name, layouts, backend, id="-".join((name, *layouts, backend)))
        for backend in BACKENDS
        for name, (_, _, size, *_) in CONVOLUTIONS.items()
        for layouts in ([contiguous] if backend == "reference" or len(size) == 1 else pairs)
    ]


@pytest.mark.parametrize(("name", "layouts", "backend"), conv_cases())
def test_conv(name: str, layouts: tuple[str, str], backend: str) -> None:
    inside, outside, size, kernel, stride, padding, dilation, groups = CONVOLUTIONS[name]
    geometry = (list(stride), list(padding), list(dilation), groups)
    weights, coefficients, biases = recipe(2, (outside * groups, inside, *kernel), torch.float32, layouts[1])
    x = random((2, inside * groups, *size), torch.float32, layouts[0])
    with rl.use_backend(backend):
        dy = torch.randn_like(
            torch.ops.rl_kernels.mixed_conv(x, weights, coefficients, biases, *geometry)
        ).requires_grad_()
        opcheck(torch.ops.rl_kernels.mixed_conv, (x, weights, coefficients, biases, *geometry))
        opcheck(torch.ops.rl_kernels.mixed_conv_dgrad, (dy, weights, coefficients, list(x.shape), *geometry))
        for masks in (([True, True], True, [True, False]), ([False, True], False, [False, False])):
            opcheck(torch.ops.rl_kernels.mixed_conv_wgrad, (dy, x, weights, coefficients, biases, *masks, *geometry))
