"""First, second and third derivatives of every op against finite differences, in float64, through both bindings."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import rl_kernels as rl
from rl_kernels import functional as F

GRANULARITIES = ("scalar", "channel")
# (in, out) per group, size, kernel, stride, padding, dilation, groups
CONVOLUTIONS = {
    "conv1d": (2, 3, (7,), (3,), (2,), (1,), (1,), 1),
    "conv1d-dilated": (1, 2, (6,), (2,), (1,), (2,), (3,), 2),
    "conv2d": (3, 2, (3, 4), (2, 3), (1, 1), (0, 1), (1, 1), 1),
    "conv2d-strided": (2, 3, (5, 4), (3, 2), (2, 3), (1, 0), (1, 1), 1),
    "conv2d-grouped-dilated": (1, 2, (5, 4), (2, 2), (1, 2), (1, 1), (2, 1), 3),
    "conv2d-depthwise": (1, 1, (3, 3), (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "conv2d-pointwise": (2, 3, (2, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "conv3d": (2, 1, (2, 3, 3), (1, 2, 2), (1, 2, 1), (0, 1, 0), (1, 1, 2), 1),
    "conv3d-grouped": (1, 2, (2, 2, 3), (2, 1, 2), (1, 1, 1), (1, 0, 0), (1, 1, 1), 2),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def recipe(n: int, granularity: str, out: int, shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    coefficients = random(n) if granularity == "scalar" else random(n, out)
    return [random(*shape) for _ in range(n)], coefficients, [random(out) for _ in range(n)]


def convolution(name: str, n: int, granularity: str) -> Any:
    inside, outside, size, kernel, stride, padding, dilation, groups = CONVOLUTIONS[name]
    x = random(2, inside * groups, *size)
    sources = recipe(n, granularity, outside * groups, (outside * groups, inside, *kernel))
    return x, sources, (list(stride), list(padding), list(dilation), groups)


@pytest.mark.parametrize("backend", ["reference", "streamed", "cpu"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("batch", [(3,), (), (2, 1, 2)], ids=str)
def test_linear(batch: tuple[int, ...], n: int, granularity: str, backend: str) -> None:
    x = random(*batch, 3)
    weights, coefficients, biases = recipe(n, granularity, 5, (5, 3))

    def run(x: Tensor, coefficients: Tensor, *sources: Tensor) -> Tensor:
        return F.mixed_linear(x, sources[:n], coefficients, sources[n:] or None)

    with rl.use_backend(backend):
        assert gradcheck(run, (x, coefficients, *weights, *biases), check_batched_grad=True)
        assert gradgradcheck(run, (x, coefficients, *weights, *biases))
        assert gradgradcheck(run, (x, coefficients, *weights), fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "streamed", "cpu"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv(name: str, n: int, granularity: str, backend: str) -> None:
    x, (weights, coefficients, biases), geometry = convolution(name, n, granularity)
    convolve = getattr(F, f"mixed_{name.split('-')[0]}")

    def run(x: Tensor, coefficients: Tensor, *sources: Tensor) -> Tensor:
        return convolve(x, sources[:n], coefficients, sources[n:], *geometry)

    with rl.use_backend(backend):
        assert gradcheck(run, (x, coefficients, *weights, *biases), fast_mode=n != 2, check_batched_grad=True)
        assert gradgradcheck(run, (x, coefficients, *weights, *biases), fast_mode=True)


def flat(outputs: Any) -> tuple[Tensor, ...]:
    dweights, dcoefficients, dbiases = outputs
    return (*dweights, dcoefficients, *dbiases)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_registered_ops(kind: str, n: int, granularity: str) -> None:
    """The ops called as ``torch.ops`` calls them: their registered formulas, up to the third derivative."""
    if kind == "linear":
        x, geometry, dgrad_geometry = random(4, 3), (), ()
        weights, coefficients, biases = recipe(n, granularity, 2, (2, 3))
        forward, dgrad, wgrad = (
            torch.ops.rl_kernels.mixed_linear,
            torch.ops.rl_kernels.mixed_linear_dgrad,
            torch.ops.rl_kernels.mixed_linear_wgrad,
        )
    else:
        x, (weights, coefficients, biases), geometry = convolution("conv2d-grouped-dilated", n, granularity)
        dgrad_geometry = (list(x.shape), *geometry)
        forward, dgrad, wgrad = (
            torch.ops.rl_kernels.mixed_conv,
            torch.ops.rl_kernels.mixed_conv_dgrad,
            torch.ops.rl_kernels.mixed_conv_wgrad,
        )
    dy = random(*forward(x, weights, coefficients, biases, *geometry).shape)

    def run_forward(x: Tensor, coefficients: Tensor, *sources: Tensor) -> Tensor:
        return forward(x, list(sources[:n]), coefficients, list(sources[n:]), *geometry)

    def run_dgrad(dy: Tensor, coefficients: Tensor, *weights: Tensor) -> Tensor:
        return dgrad(dy, list(weights), coefficients, *dgrad_geometry)

    def run_wgrad(dy: Tensor, x: Tensor, coefficients: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        masks = ([True] * n, True, [True] * n)
        return flat(wgrad(dy, x, list(sources[:n]), coefficients, list(sources[n:]), *masks, *geometry))

    for run, arguments in (
        (run_forward, (x, coefficients, *weights, *biases)),
        (run_dgrad, (dy, coefficients, *weights)),
        (run_wgrad, (dy, x, coefficients, *weights, *biases)),
    ):
        assert gradcheck(run, arguments)
        assert gradgradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("wanted", ["weights", "coefficients", "biases"])
def test_part_of_a_wgrad(wanted: str) -> None:
    """A wgrad asked for one kind of gradient only has right derivatives too."""
    weights, coefficients, biases = recipe(2, "scalar", 2, (2, 3))
    dy, x = random(4, 2), random(4, 3)
    masks = ([wanted == "weights", False], wanted == "coefficients", [False, wanted == "biases"])

    def run(dy: Tensor, x: Tensor, coefficients: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        outputs = torch.ops.rl_kernels.mixed_linear_wgrad(
            dy, x, list(sources[:2]), coefficients, list(sources[2:]), *masks
        )
        return tuple(tensor for tensor in flat(outputs) if tensor.numel())

    assert gradcheck(run, (dy, x, coefficients, *weights, *biases))
    assert gradgradcheck(run, (dy, x, coefficients, *weights, *biases), fast_mode=True)


def test_mix() -> None:
    for granularity in GRANULARITIES:
        weights, coefficients, _ = recipe(3, granularity, 2, (2, 3, 2))

        def run(coefficients: Tensor, *weights: Tensor) -> Tensor:
            return F.mix(weights, coefficients)

        assert gradcheck(run, (coefficients, *weights))
        assert gradgradcheck(run, (coefficients, *weights))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_attention(cross: bool, granularity: str) -> None:
    query, key = random(2, 1, 4), random(3, 1, 4)
    packed, out = [random(12, 4) for _ in range(2)], [random(4, 4) for _ in range(2)]
    biases = [random(12) for _ in range(2)]
    shapes = ((2,), (2,)) if granularity == "scalar" else ((2, 12), (2, 4))
    mixing = [random(*shape) for shape in shapes]

    def run(query: Tensor, key: Tensor, c: Tensor, c_out: Tensor, *weights: Tensor) -> Any:
        other = key if cross else query
        settings = (4, 2, weights[:2], weights[4:], None, None, False, 0.0, weights[2:4], None)
        return F.mixed_multi_head_attention(query, other, other, *settings, coefficients=c, out_coefficients=c_out)

    arguments = (query, key, *mixing, *packed, *out, *biases)
    assert gradcheck(run, arguments, fast_mode=True)
    assert gradgradcheck(run, arguments, fast_mode=True)
