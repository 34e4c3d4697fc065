"""The ops of linear layers: ``y = x W^T + b``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rl_kernels.ops.checks import check_activation, check_dy, check_recipe, check_wanted, shape_of
from rl_kernels.ops.schema import GRADIENTS, RECIPE, WANTED, declare
from rl_kernels.ops.shapes import empty_gradients
from rl_kernels.ops.values import Call, Gradients

# y (*, out) of x (*, in).


def _check_forward(call: Call) -> None:
    x, weights = call.x if call.x is not None else call.activation, call.recipe.weights
    check_recipe(call.recipe, 2, "(out_features, in_features)")
    check_activation("x", x, weights[0])
    in_features = weights[0].shape[1]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(
            f"x: got shape {shape_of(x)}, expected (*, {in_features}) for weights of {shape_of(weights[0])}"
        )


def _fake_forward(call: Call) -> Tensor:
    return call.activation.new_empty(*call.activation.shape[:-1], call.recipe.weights[0].shape[0])


def _flops(activation: Sequence[int], weights: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(activation[:-1]) * weights[0][0] * weights[0][1]


FORWARD = declare(
    "mixed_linear", f"(Tensor x, {RECIPE}, Tensor[]? biases) -> Tensor", _check_forward, _fake_forward, _flops
)

# dx (*, in) of dy (*, out).


def _check_dgrad(call: Call) -> None:
    dy, weights = call.activation, call.recipe.weights
    check_recipe(call.recipe, 2, "(out_features, in_features)")
    check_activation("dy", dy, weights[0])
    out_features = weights[0].shape[0]
    if dy.dim() == 0 or dy.shape[-1] != out_features:
        raise RuntimeError(
            f"dy: got shape {shape_of(dy)}, expected (*, {out_features}) for weights of {shape_of(weights[0])}"
        )


def _fake_dgrad(call: Call) -> Tensor:
    return call.activation.new_empty(*call.activation.shape[:-1], call.recipe.weights[0].shape[1])


DGRAD = declare("mixed_linear_dgrad", f"(Tensor dy, {RECIPE}) -> Tensor", _check_dgrad, _fake_dgrad, _flops)

# The recipe's gradients, of dy (*, out) and x (*, in) with the same leading dimensions.


def _check_wgrad(call: Call) -> None:
    assert call.x is not None and call.wanted is not None
    _check_forward(call)
    check_dy(call.activation, (*call.x.shape[:-1], call.recipe.weights[0].shape[0]), call.x)
    check_wanted(call.recipe, call.wanted)


def _fake_wgrad(call: Call) -> Gradients:
    assert call.wanted is not None
    return empty_gradients(lambda weight: weight.new_empty(weight.shape), call.recipe, call.wanted)


def _flops_wgrad(dy: Any, _x: Any, weights: Any, *rest: Any, **__: Any) -> int:
    _, _, weights_mask, coefficients_mask, *_ = rest
    return _flops(dy, weights) if coefficients_mask or any(weights_mask) else 0


WGRAD = declare(
    "mixed_linear_wgrad",
    f"(Tensor dy, Tensor x, {RECIPE}, Tensor[]? biases, {WANTED}) -> {GRADIENTS}",
    _check_wgrad,
    _fake_wgrad,
    _flops_wgrad,
)
