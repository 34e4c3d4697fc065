"""The convolutions: each as the products, or the sums, that serve it best.

One tap without stride is a linear layer over pixels (``linear.py``). A filter of its own for every channel is no
product (``depthwise.py``); a filter of few channels stays on chip (``resident.py``); all others are implicit products
(``dense.py``). A strided dgrad is a correlation for each phase of the stride, over the taps that meet it: no zero is
multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.convolution import (
    Correlation,
    as_filter,
    as_matrix,
    as_pixels,
    is_product,
    parts,
    phases,
)
from rl_kernels.backends.gpu.heuristics import Work
from rl_kernels.backends.gpu.operands import GradientBuffers, StridedRecipe, arithmetic, on_device
from rl_kernels.backends.triton import dense, depthwise, linear, resident
from rl_kernels.backends.triton.configs import CONV_WGRAD_CONFIGS, choose_resident, usable
from rl_kernels.backends.triton.epilogue import Epilogue
from rl_kernels.backends.triton.outer import Panel, panels
from rl_kernels.ops.shapes import conv_memory_format, empty_conv_input, empty_conv_output
from rl_kernels.ops.values import Geometry, Gradients, Recipe, Wanted


def mixed_conv(x: Tensor, recipe: Recipe, geometry: Geometry) -> Tensor:
    y, weight = empty_conv_output(x, recipe, geometry), recipe.weights[0]
    strided = StridedRecipe(recipe)
    if is_product(weight, geometry, x, y):
        _multiply(y, x, strided, transposed=False)
        return y
    correlation = Correlation.of_forward(x, y, weight, geometry)
    with on_device(x):
        for out, near in parts(y, x, geometry.groups):
            correlate(out, near, strided, correlation, geometry.groups, transposed=False)
    return y


def mixed_conv_dgrad(dy: Tensor, recipe: Recipe, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    dx = empty_conv_input(dy, recipe, input_size)
    if is_product(recipe.weights[0], geometry, dy, dx):
        _multiply(dx, dy, StridedRecipe(recipe), transposed=True)
        return dx
    every = _phases(dx, dy, recipe, geometry)
    with on_device(dy):
        for out, near in parts(dx, dy, geometry.groups):
            for pixels, strided, correlation in every:
                target = out if pixels is None else out[pixels]
                correlate(target, near, strided, correlation, geometry.groups, transposed=True)
    return dx


class _Phase(NamedTuple):
    """What of dx a correlation of its own makes: the pixels that meet the same taps; None for all pixels."""

    pixels: tuple[slice, ...] | None
    recipe: StridedRecipe
    correlation: Correlation


def _phases(dx: Tensor, dy: Tensor, recipe: Recipe, geometry: Geometry) -> list[_Phase]:
    weight, ones = recipe.weights[0], (1,) * len(geometry.stride)
    channels, found = (slice(None), slice(None)), []
    for pixels, taps, shifts, shift_steps in phases(weight.shape[2:], geometry):
        if set(geometry.stride) == {1}:  # One phase, of all pixels and taps: no view of any tensor is needed.
            correlation = Correlation.of(dy, dx, weight, shifts, shift_steps, ones)
            return [_Phase(None, StridedRecipe(recipe), correlation)]
        of_phase = StridedRecipe(recipe, taps)
        target = dx[(*channels, *pixels)]
        correlation = Correlation.of(dy, target, of_phase.weights[0], shifts, shift_steps, ones)
        found.append(_Phase((*channels, *pixels), of_phase, correlation))
    return found


def mixed_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    recipe: Recipe,
    wanted: Wanted,
    geometry: Geometry,
    into: Sequence[Tensor | None] | None = None,
) -> Gradients:
    weight, memory_format = recipe.weights[0], conv_memory_format(x, recipe.weights)
    if is_product(weight, geometry, dy, x):
        return _multiply_gradients(dy, x, recipe, wanted, into, memory_format)
    buffers = GradientBuffers.of(
        lambda weight: torch.empty_like(weight, memory_format=memory_format), recipe, wanted, into
    )
    if weight.shape[0] == 0:
        buffers.gradients.coefficients.zero_()
        return buffers.gradients
    correlation = Correlation.of_forward(x, dy, weight, geometry)
    tiles = usable(CONV_WGRAD_CONFIGS, arithmetic(x.dtype, convolution=True))
    with on_device(x):
        for part in panels(Panel(dy, x, recipe, buffers, geometry.groups), tiles):
            strided = StridedRecipe(part.recipe)
            if weight.numel() == 0 or not wanted.product:
                epilogue = Epilogue(strided, part.buffers, 0, 0)
            elif weight.shape[1] == 1 and weight.shape[0] == geometry.groups:
                epilogue = depthwise.wgrad(part.dy, part.x, strided, part.buffers, correlation)
            else:
                epilogue = dense.wgrad(part.dy, part.x, strided, part.buffers, correlation, part.groups)
            within = [0, *range(2, dy.dim())]
            epilogue.finish(part.dy.sum(within, dtype=torch.float32)[None] if wanted.sums(recipe) else None)
    return buffers.gradients


# Convolutions of one tap, whose pixels are tokens.


def _multiply(out: Tensor, activation: Tensor, recipe: StridedRecipe, transposed: bool) -> None:
    if out.numel() > 0:
        linear.multiply(as_pixels(out), as_pixels(activation), recipe, transposed, convolution=True)


def _multiply_gradients(
    dy: Tensor,
    x: Tensor,
    recipe: Recipe,
    wanted: Wanted,
    into: Sequence[Tensor | None] | None,
    memory_format: torch.memory_format,
) -> Gradients:
    matrices = recipe._replace(weights=[as_matrix(weight) for weight in recipe.weights])
    if into is not None:
        into = [None if buffer is None else as_matrix(buffer) for buffer in into]
    found = linear.wgrad(as_pixels(dy), as_pixels(x), matrices, wanted, into, convolution=True)
    dweights = [
        as_filter(gradient, x.dim() - 2, memory_format) if want else gradient
        for gradient, want in zip(found.weights, wanted.weights, strict=True)
    ]
    return found._replace(weights=dweights)


# All others.


def correlate(
    out: Tensor,
    activation: Tensor,
    recipe: StridedRecipe,
    correlation: Correlation,
    groups: int,
    transposed: bool,
) -> None:
    """``out (batch, features, *pixels)`` from ``activation (batch, channels, *sizes)``, by the kernel that fits them.

    Transposed: channels are the weights' output channels, and not their inputs.
    """
    if out.numel() == 0:
        return
    features, channels = out.shape[1] // groups, activation.shape[1] // groups
    if features == channels == 1:
        depthwise.correlate(out, activation, recipe, correlation)
        return
    numbers = arithmetic(activation.dtype, convolution=True)
    work = Work(
        rows=features,
        columns=out.numel() // out.shape[1],
        depth=channels,
        row_bytes=recipe.bytes,
        column_bytes=activation.element_size(),
        scratch_bytes=activation.element_size(),
        slowness=numbers.slowness,
        taps=math.prod(correlation.taps),
        repeats=groups,
        max_splits=heuristics.SPLITS[-1] if _is_dense(out) else 1,
        terms=recipe.terms,
    )
    on_chip = choose_resident(work, heuristics.device_of(activation.device))
    if on_chip is None:
        dense.correlate(out, activation, recipe, correlation, groups, transposed, work)
    else:
        resident.correlate(out, activation, recipe, correlation, groups, transposed, *on_chip)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor that is not empty has no gaps between its elements."""
    farthest = sum([(size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)])
    return tensor.numel() == 1 + farthest
