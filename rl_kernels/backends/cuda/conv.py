"""The convolutions' ops, as implicit products.

A strided dgrad is one product for each phase of the stride, over the taps that meet it: no zero is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_kernels.backends.cuda import linear, product, resident, wgrad
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.cuda.wgrad import Differentiation
from rl_kernels.backends.gpu.convolution import Correlation, as_matrix, as_pixels, is_product, phases
from rl_kernels.backends.gpu.operands import GradientBuffers, StridedRecipe
from rl_kernels.ops.shapes import conv_memory_format, empty_conv_input, empty_conv_output
from rl_kernels.ops.values import Geometry, Gradients, Recipe, Wanted


def mixed_conv(x: Tensor, recipe: Recipe, geometry: Geometry) -> Tensor:
    y = empty_conv_output(x, recipe, geometry)
    if y.numel() == 0:
        return y
    weight = recipe.weights[0]
    if is_product(weight, geometry, x, y):
        linear.multiply("mixed_conv", as_pixels(y), as_pixels(x), _as_linear(recipe))
        return y
    correlation = Correlation.of_forward(x, y, weight, geometry)
    multiply(Product("mixed_conv", y, x, StridedRecipe(recipe), correlation, geometry.groups))
    return y


def mixed_conv_dgrad(dy: Tensor, recipe: Recipe, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    op, weights = "mixed_conv_dgrad", recipe.weights
    dx = empty_conv_input(dy, recipe, input_size)
    if dx.numel() == 0:
        return dx
    if is_product(weights[0], geometry, dy, dx):
        linear.multiply(op, as_pixels(dx), as_pixels(dy), _as_linear(recipe), transposed=True)
        return dx
    ones = (1,) * len(geometry.stride)
    for pixels, taps, shifts, shift_steps in phases(weights[0].shape[2:], geometry):
        target = _part(dx, pixels)
        if target.numel() == 0:
            continue
        meeting = Recipe([_part(weight, taps) for weight in weights], recipe.coefficients)
        correlation = Correlation.of(dy, target, meeting.weights[0], shifts, shift_steps, ones)
        multiply(Product(op, target, dy, StridedRecipe(meeting), correlation, geometry.groups, transposed=True))
    return dx


def mixed_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    recipe: Recipe,
    wanted: Wanted,
    geometry: Geometry,
    into: Sequence[Tensor | None] | None = None,
) -> Gradients:
    memory_format = conv_memory_format(x, recipe.weights)
    buffers = GradientBuffers.of(
        lambda weight: torch.empty_like(weight, memory_format=memory_format), recipe, wanted, into
    )
    correlation = Correlation.of_forward(x, dy, recipe.weights[0], geometry)
    asked = Differentiation("mixed_conv_wgrad", dy, x, StridedRecipe(recipe), buffers, correlation, geometry.groups)
    return wgrad.differentiate(asked)


def multiply(asked: Product) -> None:
    """Write ``asked.out`` by the kernel that fits it."""
    plan = resident.plan(asked)
    if plan is None:
        product.multiply(asked)
    else:
        resident.multiply(asked, plan)


def _as_linear(recipe: Recipe) -> Recipe:
    """The recipe of a filter of one tap as that of a linear layer."""
    return recipe._replace(weights=[as_matrix(weight) for weight in recipe.weights])


_WHOLE = slice(0, None, 1)


def _part(tensor: Tensor, spatial: Sequence[slice]) -> Tensor:
    """A part of an image or filter; itself where that is all of it, for indexing takes microseconds."""
    if all(part == _WHOLE for part in spatial):
        return tensor
    return tensor[(slice(None), slice(None), *spatial)]
