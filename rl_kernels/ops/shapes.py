"""Shapes and memory formats that every implementation of an op agrees on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_kernels.ops.values import Geometry, Gradients, Recipe, Wanted


def as_rows(tensor: Tensor) -> Tensor:
    """``(*, features)`` as ``(rows, features)``; also where there are no elements, and -1 would be ambiguous."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def conv_output_size(input_size: Sequence[int], kernel_size: Sequence[int], geometry: Geometry) -> list[int]:
    """The spatial size of a convolution's output, one entry a spatial dimension.

    Args:
        input_size: spatial, as is ``kernel_size``.
        kernel_size: of the filter.
        geometry: its groups do not matter.
    """
    stride, padding, dilation, _ = geometry
    return [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(input_size, kernel_size, stride, padding, dilation, strict=True)
    ]


# Memory formats: torch's rule. A result is channels_last if the activation is, or if the first source is.


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch would call ``tensor`` channels_last (or channels_last_3d) by its strides."""
    if tensor.dim() not in (4, 5):
        return False
    stride = tensor.stride()
    if stride[1] != 1:
        return False
    # torch decides sizes of 1 by walking the strides from channels outwards (c10 is_channels_last_strides_*).
    least: Any = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if tensor.shape[dim] == 0 or stride[dim] < least or (dim == 0 and least == stride[1]):
            return False
        least = stride[dim] * max(tensor.shape[dim], 1)
    return True


def conv_memory_format(activation: Tensor, weights: Sequence[Tensor]) -> torch.memory_format:
    """The memory format of a convolution's results, given ``x`` (or ``dy``) and the sources."""
    if is_channels_last(activation) or is_channels_last(weights[0]):
        return torch.channels_last if activation.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def empty_conv_output(x: Tensor, recipe: Recipe, geometry: Geometry) -> Tensor:
    """The output of a convolution of ``x``, uninitialised, in its memory format."""
    weight = recipe.weights[0]
    spatial = conv_output_size(x.shape[2:], weight.shape[2:], geometry)
    memory_format = conv_memory_format(x, recipe.weights)
    size = (x.shape[0], weight.shape[0], *spatial)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def empty_conv_input(dy: Tensor, recipe: Recipe, input_size: Sequence[int]) -> Tensor:
    """The gradient of a convolution's input, uninitialised, in its memory format."""
    memory_format = conv_memory_format(dy, recipe.weights)
    return torch.empty(tuple(input_size), dtype=dy.dtype, device=dy.device, memory_format=memory_format)


def empty_gradients(like: Callable[[Tensor], Tensor], recipe: Recipe, wanted: Wanted) -> Gradients:
    """The outputs of a wgrad, uninitialised: ``like(weight)`` for a weight, ``(0,)`` for what is not wanted."""
    weights, coefficients, biases = recipe
    return Gradients(
        [like(weight) if want else weight.new_empty(0) for weight, want in zip(weights, wanted.weights, strict=True)],
        torch.empty_like(coefficients, memory_format=torch.contiguous_format)
        if wanted.coefficients
        else coefficients.new_empty(0),
        [bias.new_empty(bias.shape if want else 0) for bias, want in zip(biases or (), wanted.biases, strict=True)],
    )
