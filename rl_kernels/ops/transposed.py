"""Transposed convolutions: the dgrad of a convolution, called as a forward. No op of their own.

With filters ``(in, out / groups, *kernel)`` the layer's x is the dy of a convolution from ``out`` to ``in`` channels,
and its y is that one's dx. So its gradients are those of the dgrad: a convolution, and a wgrad.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels.ops.autograd import CONV, mixed_dgrad
from rl_kernels.ops.checks import check_activation, check_biases, check_recipe, check_sources, shape_of
from rl_kernels.ops.conv import check_geometry
from rl_kernels.ops.mix import mix, mixed_bias
from rl_kernels.ops.sharding import are_distributed, conv_on_shards
from rl_kernels.ops.values import Geometry, Recipe
from rl_kernels.ops.ways import autocast_cast, autocast_dtype, needs_composite


def mixed_conv_transpose(x: Tensor, recipe: Recipe, output_padding: Sequence[int], geometry: Geometry) -> Tensor:
    """The transposed convolution of ``x``, by the way that fits (``ways.py``).

    Args:
        x: ``(batch, in, *spatial)``.
        recipe: weights ``(in, out / groups, *kernel)``, coefficients ``(N,)`` or ``Outer`` ones joined, biases
            ``(out,)``.
        output_padding: one number a spatial dimension, as the geometry's.
        geometry: of the convolution whose dgrad this is, as torch's arguments.

    Returns:
        ``(batch, out, *spatial)``, laid out as torch lays it out.

    Raises:
        RuntimeError: what does not fit, as the ops raise it; or DTensors that torch's own would get wrong.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return mixed_conv_transpose(*autocast_cast(dtype, x, recipe), output_padding, geometry)
    _check(x, recipe, output_padding, geometry)
    # torch.jit writes sizes down as tensors, which no op takes for the shape of its output.
    if needs_composite((x, *recipe.tensors())) or torch.jit.is_tracing():
        return _in_plain_torch(x, recipe, output_padding, geometry)
    y = _product(x, recipe, output_padding, geometry)
    mixed = mixed_bias(recipe, x.dtype)
    return y if mixed is None else y + mixed.view(-1, *(1,) * len(output_padding))


def _product(x: Tensor, recipe: Recipe, output_padding: Sequence[int], geometry: Geometry) -> Tensor:
    """y without its bias."""
    recipe = recipe._replace(biases=None)
    if all(more < step for more, step in zip(output_padding, geometry.stride, strict=True)):
        return mixed_dgrad(CONV, x, recipe, _output_shape(x, recipe, output_padding, geometry), geometry)
    # A convolution of so large an image would have a larger output than x: the whole product, cut and padded after.
    whole = geometry._replace(padding=[0] * len(output_padding))
    y = mixed_dgrad(CONV, x, recipe, _output_shape(x, recipe, whole.padding, whole), whole)
    ends = zip(reversed(geometry.padding), reversed(output_padding), strict=True)
    return aten.pad(y, [side for pad, more in ends for side in (-pad, more - pad)])


def _in_plain_torch(x: Tensor, recipe: Recipe, output_padding: Sequence[int], geometry: Geometry) -> Tensor:
    """The composite way, which materialises the mixed weight."""
    if are_distributed(x, recipe):
        local = functools.partial(mixed_conv_transpose, output_padding=output_padding, geometry=geometry)
        return conv_on_shards(local, x, recipe)
    stride, padding, dilation, groups = geometry
    convolution = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)[len(stride) - 1]
    weight, bias = mix(recipe.weights, recipe.coefficients, x.dtype), mixed_bias(recipe, x.dtype)
    y: Tensor = convolution(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return y


def _output_shape(x: Tensor, recipe: Recipe, output_padding: Sequence[int], geometry: Geometry) -> list[int]:
    weight = recipe.weights[0]
    stride, padding, dilation, groups = geometry
    spatial = [
        (size - 1) * step - 2 * pad + dil * (kernel - 1) + more + 1
        for size, kernel, step, pad, dil, more in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
        )
    ]
    return [x.shape[0], weight.shape[1] * groups, *spatial]


# Checks, in the words of a transposed convolution: the op would speak of the convolution that it is the dgrad of.


def _check(x: Tensor, recipe: Recipe, output_padding: Sequence[int], geometry: Geometry) -> None:
    weights, coefficients, biases = recipe
    dim = len(geometry.stride) + 2
    check_sources("weights", weights)
    if coefficients.dim() != 3 and coefficients.shape != (len(weights),):
        raise RuntimeError(
            f"coefficients: got shape {shape_of(coefficients)}, expected ({len(weights)},): a transposed "
            "convolution has one a source, since its output channels are not the first dimension of its weights"
        )
    check_recipe(Recipe(weights, coefficients), dim, f"{dim} dimensions (in, out / groups, *kernel)")
    weight = weights[0]
    check_activation("x", x, weight)
    check_geometry(weight, geometry, channels="input")
    if biases is not None:
        check_biases(biases, weights, weight.shape[1] * geometry.groups)
    if x.dim() != dim:
        raise RuntimeError(f"x: got shape {shape_of(x)}, expected {dim} dimensions (batch, in, *spatial)")
    if x.shape[1] != weight.shape[0]:
        raise RuntimeError(
            f"x: got {x.shape[1]} channels (shape {shape_of(x)}), expected {weight.shape[0]} for weights of "
            f"{shape_of(weight)}"
        )
    if any(size < 1 for size in x.shape[2:]):
        raise RuntimeError(f"x: got spatial size {shape_of(x)[2:]}, expected 1 or more in each dimension")
    for more, step, dil in zip(output_padding, geometry.stride, geometry.dilation, strict=True):
        if not 0 <= more < max(step, dil):
            raise RuntimeError(
                f"output_padding: got {list(output_padding)}, expected 0 or more, and less than the stride "
                f"{list(geometry.stride)} or the dilation {list(geometry.dilation)}"
            )
    shape = _output_shape(x, recipe, output_padding, geometry)
    if any(size < 0 for size in shape[2:]):
        raise RuntimeError(
            f"padding: got {list(geometry.padding)}, of which spatial size {shape_of(x)[2:]} and kernel size "
            f"{shape_of(weight)[2:]} leave {shape[2:]}, expected 0 or more in each dimension"
        )
