"""The C++ kernels as the contract wants them: values in, flat arguments to C++."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rl_kernels._extension import EXTENSION
from rl_kernels.ops.values import Geometry, Gradients, Recipe, Wanted

_C = EXTENSION.module


def mixed_linear(x: Tensor, recipe: Recipe) -> Tensor:
    return _C.mixed_linear(x, *recipe)


def mixed_linear_dgrad(dy: Tensor, recipe: Recipe) -> Tensor:
    return _C.mixed_linear_dgrad(dy, recipe.weights, recipe.coefficients)


def mixed_linear_wgrad(dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted) -> Gradients:
    return Gradients(*_C.mixed_linear_wgrad(dy, x, *recipe, *wanted))


def mixed_conv(x: Tensor, recipe: Recipe, geometry: Geometry) -> Tensor:
    return _C.mixed_conv(x, *recipe, *geometry)


def mixed_conv_dgrad(dy: Tensor, recipe: Recipe, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    return _C.mixed_conv_dgrad(dy, recipe.weights, recipe.coefficients, input_size, *geometry)


def mixed_conv_wgrad(dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, geometry: Geometry) -> Gradients:
    return Gradients(*_C.mixed_conv_wgrad(dy, x, *recipe, *wanted, *geometry))
