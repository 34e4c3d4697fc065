"""The linear ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rl_kernels.backends.cuda import product, skinny, wgrad
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.cuda.wgrad import Differentiation
from rl_kernels.backends.gpu.convolution import Correlation
from rl_kernels.backends.gpu.operands import GradientBuffers, StridedRecipe
from rl_kernels.ops.shapes import as_rows
from rl_kernels.ops.values import Gradients, Recipe, Wanted


def mixed_linear(x: Tensor, recipe: Recipe) -> Tensor:
    y = x.new_empty(*x.shape[:-1], recipe.weights[0].shape[0])
    if y.numel() > 0:
        multiply("mixed_linear", as_rows(y), as_rows(x), recipe)
    return y


def mixed_linear_dgrad(dy: Tensor, recipe: Recipe) -> Tensor:
    dx = dy.new_empty(*dy.shape[:-1], recipe.weights[0].shape[1])
    if dx.numel() > 0:
        multiply("mixed_linear_dgrad", as_rows(dx), as_rows(dy), recipe, transposed=True)
    return dx


def mixed_linear_wgrad(
    dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, into: Sequence[Tensor | None] | None = None
) -> Gradients:
    buffers = GradientBuffers.of(lambda weight: weight.new_empty(weight.shape), recipe, wanted, into)
    dy, x = as_rows(dy), as_rows(x)
    correlation = Correlation.of_linear(x, dy, recipe.weights[0])
    return wgrad.differentiate(
        Differentiation("mixed_linear_wgrad", dy, x, StridedRecipe(recipe), buffers, correlation)
    )


def multiply(op: str, out: Tensor, activation: Tensor, recipe: Recipe, transposed: bool = False) -> None:
    """Compute ``out (tokens, features) = activation (tokens, channels) W^T``, or with W where it is transposed."""
    correlation = Correlation.of_linear(activation, out, recipe.weights[0])
    asked = Product(op, out, activation, StridedRecipe(recipe), correlation, transposed=transposed)
    if skinny.serves(asked):
        skinny.multiply(asked)
    else:
        product.multiply(asked)
