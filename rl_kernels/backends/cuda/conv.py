"""The convolutions' ops, as implicit products.

A strided dgrad is one product for each phase of the stride, over the taps that meet it: no zero is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_kernels.backends.cuda import linear, product, resident, wgrad
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu.convolution import Geometry, as_matrix, as_pixels, is_product, phases
from rl_kernels.backends.gpu.operands import Asked, Recipe
from rl_kernels.ops import shapes


def mixed_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    op = "mixed_conv"
    spatial = shapes.conv_output_size(x.shape[2:], weights[0].shape[2:], stride, padding, dilation)
    memory_format = shapes.conv_memory_format(x, weights)
    size = (x.shape[0], weights[0].shape[0], *spatial)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)
    if y.numel() == 0:
        return y
    if is_product(weights[0], stride, padding, groups, x, y):
        linear.multiply(
            op,
            as_pixels(y),
            as_pixels(x),
            [as_matrix(weight) for weight in weights],
            coefficients,
            biases,
            transposed=False,
        )
        return y
    geometry = Geometry.of(x, y, weights[0], [-pad for pad in padding], dilation, stride)
    multiply(Product(op, y, x, Recipe(weights, coefficients), biases, geometry, groups, transposed=False))
    return y


def mixed_conv_dgrad(
    dy: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    op = "mixed_conv_dgrad"
    memory_format = shapes.conv_memory_format(dy, weights)
    dx = torch.empty(tuple(input_size), dtype=dy.dtype, device=dy.device, memory_format=memory_format)
    if dx.numel() == 0:
        return dx
    if is_product(weights[0], stride, padding, groups, dy, dx):
        linear.multiply(
            op,
            as_pixels(dx),
            as_pixels(dy),
            [as_matrix(weight) for weight in weights],
            coefficients,
            None,
            transposed=True,
        )
        return dx
    ones = [1] * len(stride)
    for pixels, taps, shifts, shift_steps in phases(weights[0].shape[2:], stride, padding, dilation):
        target = dx[(slice(None), slice(None), *pixels)]
        if target.numel() == 0:
            continue
        recipe = Recipe([weight[(slice(None), slice(None), *taps)] for weight in weights], coefficients)
        geometry = Geometry.of(dy, target, recipe.weights[0], shifts, shift_steps, ones)
        multiply(Product(op, target, dy, recipe, None, geometry, groups, transposed=True))
    return dx


def multiply(wanted: Product) -> None:
    """Write ``wanted.out`` by the kernel that fits it."""
    how = resident.plan(wanted)
    if how is None:
        product.multiply(wanted)
    else:
        resident.multiply(wanted, how)


def mixed_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    into: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    memory_format = shapes.conv_memory_format(x, weights)
    masks = weights_mask, coefficients_mask, biases_mask
    asked = Asked.of(
        lambda weight: torch.empty_like(weight, memory_format=memory_format),
        weights,
        coefficients,
        biases,
        *masks,
        into,
    )
    recipe = Recipe(weights, coefficients)
    geometry = Geometry.of(x, dy, weights[0], [-pad for pad in padding], dilation, stride)
    return wgrad.differentiate("mixed_conv_wgrad", dy, x, recipe, biases, asked, geometry, groups)
