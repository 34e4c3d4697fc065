"""The ops of convolutions in one to three dimensions, by the length of ``stride``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from rl_kernels.ops.checks import check_activation, check_dy, check_recipe, check_wanted, shape_of
from rl_kernels.ops.schema import GEOMETRY, GRADIENTS, RECIPE, WANTED, declare
from rl_kernels.ops.shapes import (
    conv_memory_format,
    conv_output_size,
    empty_conv_input,
    empty_conv_output,
    empty_gradients,
)
from rl_kernels.ops.values import Call, Geometry, Gradients, Recipe


def _geometry(call: Call) -> Geometry:
    assert call.geometry is not None
    return call.geometry


def _check_recipe(recipe: Recipe, geometry: Geometry) -> None:
    dim = len(geometry.stride) + 2
    check_recipe(recipe, dim, f"{dim} dimensions (out, in / groups, *kernel)")


def check_geometry(weight: Tensor, geometry: Geometry, channels: str = "output") -> None:
    """Raise unless ``geometry`` fits ``weight``, whose first dimension is a layer's ``channels``."""
    stride, padding, dilation, groups = geometry
    spatial = len(stride)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != spatial or any(value < least for value in values):
            raise RuntimeError(f"{name}: got {list(values)}, expected {spatial} integers of {least} or more")
    if any(size < 1 for size in weight.shape[2:]):
        raise RuntimeError(
            f"weights[0]: got shape {shape_of(weight)}, expected a kernel of 1 or more in each dimension"
        )
    if groups < 1:
        raise RuntimeError(f"groups: got {groups}, expected 1 or more")
    if weight.shape[0] % groups != 0:
        raise RuntimeError(f"groups: got {groups}, expected a divisor of the {weight.shape[0]} {channels} channels")


# y (batch, out, *spatial) of x (batch, in, *spatial), by weights (out, in / groups, *kernel).


def _check_forward(call: Call) -> None:
    geometry = _geometry(call)
    _check_recipe(call.recipe, geometry)
    x, weight = call.activation if call.x is None else call.x, call.recipe.weights[0]
    check_activation("x", x, weight)
    check_geometry(weight, geometry)
    _check_input(x, weight, geometry)


def _check_input(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    spatial, groups = len(geometry.stride), geometry.groups
    if x.dim() != spatial + 2:
        raise RuntimeError(f"x: got shape {shape_of(x)}, expected {spatial + 2} dimensions (batch, in, *spatial)")
    channels = weight.shape[1] * groups
    if x.shape[1] != channels:
        raise RuntimeError(
            f"x: got {x.shape[1]} channels (shape {shape_of(x)}), expected {channels} for weights of "
            f"{shape_of(weight)} with groups={groups}"
        )
    for size, kernel, pad, dil in zip(x.shape[2:], weight.shape[2:], geometry.padding, geometry.dilation, strict=True):
        if size + 2 * pad < dil * (kernel - 1) + 1:
            raise RuntimeError(
                f"x: got spatial size {shape_of(x)[2:]}, expected at least the kernel's extent: kernel size "
                f"{shape_of(weight)[2:]} with dilation {list(geometry.dilation)} and padding {list(geometry.padding)}"
            )


def _fake_forward(call: Call) -> Tensor:
    return empty_conv_output(call.activation, call.recipe, _geometry(call))


def _flops_forward(x: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(x, weights[0], out_shape, transposed=False)


FORWARD = declare(
    "mixed_conv",
    f"(Tensor x, {RECIPE}, Tensor[]? biases, {GEOMETRY}) -> Tensor",
    _check_forward,
    _fake_forward,
    _flops_forward,
)

# dx, of shape input_size, of dy (batch, out, *spatial).


def _check_dgrad(call: Call) -> None:
    dy, input_size, geometry = call.activation, call.input_size, _geometry(call)
    assert input_size is not None
    spatial = len(geometry.stride)
    _check_recipe(call.recipe, geometry)
    weight = call.recipe.weights[0]
    check_activation("dy", dy, weight)
    check_geometry(weight, geometry)
    channels = weight.shape[1] * geometry.groups
    if len(input_size) != weight.dim() or input_size[1] != channels:
        raise RuntimeError(f"input_size: got {list(input_size)}, expected (batch, {channels}, {spatial} spatial sizes)")
    out_size = conv_output_size(input_size[2:], weight.shape[2:], geometry)
    check_dy(dy, (input_size[0], weight.shape[0], *out_size))


def _fake_dgrad(call: Call) -> Tensor:
    assert call.input_size is not None
    return empty_conv_input(call.activation, call.recipe, call.input_size)


def _flops_dgrad(dy: Any, weights: Any, *_: Any, **__: Any) -> int:
    # A multiplication for each pair that the forward multiplies, once more.
    return conv_flop_count(dy, weights[0], dy, transposed=False)


DGRAD = declare(
    "mixed_conv_dgrad",
    f"(Tensor dy, {RECIPE}, SymInt[] input_size, {GEOMETRY}) -> Tensor",
    _check_dgrad,
    _fake_dgrad,
    _flops_dgrad,
)

# The recipe's gradients, of dy (batch, out, *spatial) and x.


def _check_wgrad(call: Call) -> None:
    assert call.x is not None and call.wanted is not None
    _check_forward(call)
    weight = call.recipe.weights[0]
    spatial = conv_output_size(call.x.shape[2:], weight.shape[2:], _geometry(call))
    check_dy(call.activation, (call.x.shape[0], weight.shape[0], *spatial), call.x)
    check_wanted(call.recipe, call.wanted)


def _fake_wgrad(call: Call) -> Gradients:
    assert call.x is not None and call.wanted is not None
    memory_format = conv_memory_format(call.x, call.recipe.weights)
    return empty_gradients(
        lambda weight: torch.empty_like(weight, memory_format=memory_format), call.recipe, call.wanted
    )


def _flops_wgrad(dy: Any, x: Any, weights: Any, *rest: Any, **__: Any) -> int:
    _, _, weights_mask, coefficients_mask, *_ = rest
    if not (coefficients_mask or any(weights_mask)):
        return 0
    return conv_flop_count(x, weights[0], dy, transposed=False)


WGRAD = declare(
    "mixed_conv_wgrad",
    f"(Tensor dy, Tensor x, {RECIPE}, Tensor[]? biases, {WANTED}, {GEOMETRY}) -> {GRADIENTS}",
    _check_wgrad,
    _fake_wgrad,
    _flops_wgrad,
)
