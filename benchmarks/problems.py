"""A case's tensors, and the plain, the mixed and the two-product form of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as aten

from benchmarks.cases import AttentionCase, BlockCase, Case, ConvCase, LinearCase
from rl_kernels import functional as F

Parameters = Sequence[Tensor]
COEFFICIENTS = (0.7, 0.4)  # Unequal, so that a rival that swaps them is caught.


@dataclass(frozen=True)
class Problem:
    """One layer, two sources and what multiplies them. No tensor here requires gradients: rivals make leaves of them.

    Attributes:
        case: where it comes from.
        x: the input.
        gradient: of the output, as dense and in the same layout.
        names: of a source's parameters.
        sources: the parameters of the previous and of the next neighbour.
        plain: the layer on a source's parameters, ``plain(x, parameters)``.
        mixed: the layer of this package, ``mixed(x, previous, next, coefficients)``.
        two_products: ``a * layer(x; W1) + b * layer(x; W2)`` for every linear map, ``two_products(x, previous, next,
            a, b)``.
        depth: how many layers' roundings pile up in the output.
        kinks: whether a rounding may switch a unit on or off (ReLU), and with it that unit's whole gradient.
    """

    case: Case
    x: Tensor
    gradient: Tensor
    names: tuple[str, ...]
    sources: tuple[Parameters, Parameters]
    plain: Callable[[Tensor, Parameters], Tensor]
    mixed: Callable[[Tensor, Parameters, Parameters, Tensor], Tensor]
    two_products: Callable[[Tensor, Parameters, Parameters, Tensor, Tensor], Tensor]
    depth: int = 1
    kinks: bool = False


def build(case: Case, device: str, seed: int = 0) -> Problem:
    """Make the tensors of a case of one layer or block, from a seed."""
    make = _Maker(getattr(torch, case.dtype), device, seed)
    if isinstance(case, LinearCase):
        return _linear(case, make)
    if isinstance(case, ConvCase):
        return _conv(case, make)
    if isinstance(case, AttentionCase):
        return _attention(case, make)
    assert isinstance(case, BlockCase), f"case: got {type(case).__name__}, expected one of a layer or a block"
    return _block(case, make)


class _Maker:
    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, layout: str = "NCHW") -> Tensor:
        values = (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(self.dtype)
        return values.contiguous(memory_format=_memory_format(layout)) if len(shape) == 4 else values


def _memory_format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def _linear(case: LinearCase, make: _Maker) -> Problem:
    def source() -> Parameters:
        return make(case.n, case.k, scale=case.k**-0.5), make(case.n)

    def plain(x: Tensor, parameters: Parameters) -> Tensor:
        return aten.linear(x, *parameters)

    def mixed(x: Tensor, previous: Parameters, following: Parameters, coefficients: Tensor) -> Tensor:
        (w1, b1), (w2, b2) = previous, following
        return F.mixed_linear(x, (w1, w2), coefficients, (b1, b2))

    def two_products(x: Tensor, previous: Parameters, following: Parameters, a: Tensor, b: Tensor) -> Tensor:
        return a * aten.linear(x, *previous) + b * aten.linear(x, *following)

    x, gradient = make(case.m, case.k), make(case.m, case.n)
    return Problem(case, x, gradient, ("weight", "bias"), (source(), source()), plain, mixed, two_products)


def _conv(case: ConvCase, make: _Maker) -> Problem:
    fan_in = case.in_channels // case.groups * case.kernel**2
    options: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "groups": case.groups}

    def source() -> Parameters:
        shape = (case.out_channels, case.in_channels // case.groups, case.kernel, case.kernel)
        return make(*shape, scale=fan_in**-0.5, layout=case.layout), make(case.out_channels)

    def plain(x: Tensor, parameters: Parameters) -> Tensor:
        weight, bias = parameters
        return aten.conv2d(x, weight, bias, **options)

    def mixed(x: Tensor, previous: Parameters, following: Parameters, coefficients: Tensor) -> Tensor:
        (w1, b1), (w2, b2) = previous, following
        return F.mixed_conv2d(x, (w1, w2), coefficients, (b1, b2), **options)

    def two_products(x: Tensor, previous: Parameters, following: Parameters, a: Tensor, b: Tensor) -> Tensor:
        return a * plain(x, previous) + b * plain(x, following)

    x = make(case.batch, case.in_channels, case.size, case.size, layout=case.layout)
    gradient = make(case.batch, case.out_channels, case.out_size, case.out_size, layout=case.layout)
    return Problem(case, x, gradient, ("weight", "bias"), (source(), source()), plain, mixed, two_products)


def _attention(case: AttentionCase, make: _Maker) -> Problem:
    features, heads = case.features, case.heads

    def source() -> Parameters:
        scale = 1 / math.sqrt(features)
        return (
            *(make(3 * features, features, scale=scale), make(3 * features)),
            *(make(features, features, scale=scale), make(features)),
        )

    def plain(x: Tensor, parameters: Parameters) -> Tensor:
        in_weight, in_bias, out_weight, out_bias = parameters
        output, _ = aten.multi_head_attention_forward(
            *(x, x, x, features, heads, in_weight, in_bias, None, None, False, 0.0, out_weight, out_bias),
            need_weights=False,
        )
        return output

    def mixed(x: Tensor, previous: Parameters, following: Parameters, coefficients: Tensor) -> Tensor:
        in_weights, in_biases, out_weights, out_biases = zip(previous, following, strict=True)
        output, _ = F.mixed_multi_head_attention(
            *(x, x, x, features, heads, in_weights, in_biases, None, None, False, 0.0, out_weights, out_biases),
            need_weights=False,
            coefficients=coefficients,
        )
        return output

    def two_products(x: Tensor, previous: Parameters, following: Parameters, a: Tensor, b: Tensor) -> Tensor:
        joined = a * aten.linear(x, *previous[:2]) + b * aten.linear(x, *following[:2])
        # (tokens, batch, 3 * features) to three of (batch, heads, tokens, features / heads)
        q, k, v = joined.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4)
        attended = aten.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
        return a * aten.linear(attended, *previous[2:]) + b * aten.linear(attended, *following[2:])

    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    x, gradient = (make(case.tokens, case.batch, features) for _ in range(2))
    return Problem(case, x, gradient, names, (source(), source()), plain, mixed, two_products, depth=4)


def _block(case: BlockCase, make: _Maker) -> Problem:
    channels, layout = case.channels, case.layout

    def source() -> Parameters:
        parameters: list[Tensor] = []
        for _ in range(2):
            weight = make(channels, channels, 3, 3, scale=(9 * channels) ** -0.5, layout=layout)
            parameters += (weight, 1 + make(channels, scale=0.1), make(channels, scale=0.1))
        return parameters

    def body(x: Tensor, convolve: Callable[[Tensor, int], Tensor], affine: Sequence[Tensor]) -> Tensor:
        # Batch statistics in both modes, so that both time the same function.
        y = aten.relu(aten.batch_norm(convolve(x, 0), None, None, affine[0], affine[1], training=True))
        return aten.relu(aten.batch_norm(convolve(y, 3), None, None, affine[2], affine[3], training=True) + x)

    def affine_of(parameters: Parameters) -> list[Tensor]:
        return [parameters[1], parameters[2], parameters[4], parameters[5]]

    def plain(x: Tensor, parameters: Parameters) -> Tensor:
        return body(x, lambda y, j: aten.conv2d(y, parameters[j], padding=1), affine_of(parameters))

    def mixed(x: Tensor, previous: Parameters, following: Parameters, coefficients: Tensor) -> Tensor:
        pairs = zip(affine_of(previous), affine_of(following), strict=True)
        affine = [F.mix(pair, coefficients) for pair in pairs]
        return body(x, lambda y, j: F.mixed_conv2d(y, (previous[j], following[j]), coefficients, padding=1), affine)

    def two_products(x: Tensor, previous: Parameters, following: Parameters, a: Tensor, b: Tensor) -> Tensor:
        def convolve(y: Tensor, j: int) -> Tensor:
            return a * aten.conv2d(y, previous[j], padding=1) + b * aten.conv2d(y, following[j], padding=1)

        pairs = zip(affine_of(previous), affine_of(following), strict=True)
        return body(x, convolve, [a * p + b * q for p, q in pairs])

    names = ("conv1.weight", "norm1.weight", "norm1.bias", "conv2.weight", "norm2.weight", "norm2.bias")
    x, gradient = (make(case.batch, channels, case.size, case.size, layout=layout) for _ in range(2))
    return Problem(case, x, gradient, names, (source(), source()), plain, mixed, two_products, depth=4, kinks=True)
