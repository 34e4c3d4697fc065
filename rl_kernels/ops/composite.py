"""The ops in plain aten, which torch can differentiate, batch and shard: they materialise the mixed weight.

A forward takes a recipe, as the op does. The gradients are products alone, of a weight that is mixed already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels.ops.mix import accumulate_dtype, factors, mix, mixed_bias, outer_gradient
from rl_kernels.ops.shapes import as_rows
from rl_kernels.ops.values import Geometry, Recipe, Wanted

MaybeGradients = tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]
"""``Gradients``, with None for what is not wanted."""


class Composite(NamedTuple):
    """One kind of layer in plain aten.

    Attributes:
        forward: ``(x, recipe, geometry)``.
        dgrad: ``(dy, mixed weight, shape of x, geometry)``.
        wgrad: ``(dy, x, a tensor shaped as the weight, geometry)``: the gradient of the mixed weight.
        channel_dim: where the output has its channels.
    """

    forward: Callable[[Tensor, Recipe, Geometry | None], Tensor]
    dgrad: Callable[[Tensor, Tensor, Sequence[int], Geometry | None], Tensor]
    wgrad: Callable[[Tensor, Tensor, Tensor, Geometry | None], Tensor]
    channel_dim: int

    def sum_to_channels(self, dy: Tensor, dtype: torch.dtype) -> Tensor:
        """``dy`` summed over everything but its channels: the gradient of a mixed bias."""
        channel = self.channel_dim % dy.dim()
        others = [dim for dim in range(dy.dim()) if dim != channel]
        return dy.sum(others, dtype=dtype) if others else dy.to(dtype)

    def bias_gradients(self, dy: Tensor, recipe: Recipe, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """The gradients of the biases, which need no product."""
        if recipe.biases is None or not any(wanted):
            return [None] * len(wanted)
        total, coefficients = self.sum_to_channels(dy, recipe.coefficients.dtype), recipe.bias_coefficients
        return [
            (coefficients[j] * total).to(bias.dtype) if want else None
            for j, (bias, want) in enumerate(zip(recipe.biases, wanted, strict=True))
        ]

    def gradients(
        self, dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, geometry: Geometry | None
    ) -> MaybeGradients:
        """The whole wgrad."""
        weights, coefficients, biases = recipe
        compute = accumulate_dtype(weights[0].dtype)
        dbiases = self.bias_gradients(dy, recipe, wanted.biases)
        if not wanted.product:
            return [None] * len(weights), None, dbiases
        g = self.wgrad(dy.to(compute), x.to(compute), weights[0].to(compute), geometry)
        dweights = [
            (factor * g).to(weight.dtype) if want else None
            for factor, weight, want in zip(factors(coefficients, g.shape), weights, wanted.weights, strict=True)
        ]
        if not wanted.coefficients:
            return dweights, None, dbiases
        if recipe.is_outer:
            return dweights, outer_gradient(g, weights, coefficients), dbiases
        # A dimension more, so that there is one to sum where the sources are vectors.
        within = list(range(1, g.dim() + 1))
        rows = torch.stack([(g * weight).unsqueeze(-1).sum(within) for weight in weights])
        if biases is not None:
            total = self.sum_to_channels(dy, compute)
            rows = rows + torch.stack([total * bias for bias in biases])
        return dweights, rows if recipe.per_channel else rows.sum(1), dbiases


# Linear layers, which have no geometry.


def _linear(x: Tensor, recipe: Recipe, _: Geometry | None) -> Tensor:
    return aten.linear(x, mix(recipe.weights, recipe.coefficients, x.dtype), mixed_bias(recipe, x.dtype))


def _linear_dgrad(dy: Tensor, weight: Tensor, _input_size: Sequence[int], _: Geometry | None) -> Tensor:
    return dy @ weight


def _linear_wgrad(dy: Tensor, x: Tensor, _like: Tensor, _: Geometry | None) -> Tensor:
    return as_rows(dy).t() @ as_rows(x)


# Convolutions, which have one.


def _conv(x: Tensor, recipe: Recipe, geometry: Geometry | None) -> Tensor:
    assert geometry is not None
    weight = mix(recipe.weights, recipe.coefficients, x.dtype)
    convolution = (aten.conv1d, aten.conv2d, aten.conv3d)[len(geometry.stride) - 1]
    return convolution(x, weight, mixed_bias(recipe, x.dtype), *geometry)


def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    assert geometry is not None
    stride, padding, dilation, groups = geometry
    rest = (None, stride, padding, dilation, False, [0] * len(stride), groups, mask)
    return torch.ops.aten.convolution_backward(dy, x, weight, *rest)


def _conv_dgrad(dy: Tensor, weight: Tensor, input_size: Sequence[int], geometry: Geometry | None) -> Tensor:
    return _conv_backward(dy, dy.new_empty(tuple(input_size)), weight, geometry, [True, False, False])[0]


def _conv_wgrad(dy: Tensor, x: Tensor, like: Tensor, geometry: Geometry | None) -> Tensor:
    return _conv_backward(dy, x, like, geometry, [False, True, False])[1]


LINEAR = Composite(_linear, _linear_dgrad, _linear_wgrad, channel_dim=-1)
CONV = Composite(_conv, _conv_dgrad, _conv_wgrad, channel_dim=1)
