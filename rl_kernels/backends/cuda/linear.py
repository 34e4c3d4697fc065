"""The linear ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rl_kernels.backends.cuda import product, small, wgrad
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu.convolution import Geometry
from rl_kernels.backends.gpu.operands import Asked, Recipe
from rl_kernels.ops import shapes


def mixed_linear(x: Tensor, weights: Sequence[Tensor], coefficients: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weights[0].shape[0])
    if y.numel() > 0:
        multiply("mixed_linear", shapes.as_rows(y), shapes.as_rows(x), weights, coefficients, biases, transposed=False)
    return y


def mixed_linear_dgrad(dy: Tensor, weights: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    dx = dy.new_empty(*dy.shape[:-1], weights[0].shape[1])
    if dx.numel() > 0:
        rows = shapes.as_rows(dx), shapes.as_rows(dy)
        multiply("mixed_linear_dgrad", *rows, weights, coefficients, None, transposed=True)
    return dx


def mixed_linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
    into: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    masks = weights_mask, coefficients_mask, biases_mask
    asked = Asked.of(lambda weight: weight.new_empty(weight.shape), weights, coefficients, biases, *masks, into)
    dy, x = shapes.as_rows(dy), shapes.as_rows(x)
    geometry = Geometry.of(x, dy, weights[0], (), (), ())
    recipe = Recipe(weights, coefficients)
    return wgrad.differentiate("mixed_linear_wgrad", dy, x, recipe, biases, asked, geometry, 1)


def multiply(
    op: str,
    out: Tensor,
    activation: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    transposed: bool,
) -> None:
    """``out (tokens, features) = activation (tokens, reduction) W^T``."""
    geometry = Geometry.of(activation, out, weights[0], (), (), ())
    wanted = Product(op, out, activation, Recipe(weights, coefficients), biases, geometry, 1, transposed)
    if small.serves(wanted):
        small.multiply(wanted)
    else:
        product.multiply(wanted)
