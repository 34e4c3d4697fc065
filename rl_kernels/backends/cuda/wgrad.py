"""The gradients of sources and coefficients: the host's side of ``csrc/cuda/wgrad.cuh``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.cuda.params import (
    COPIED_BYTES,
    GeometryParams,
    RecipeParams,
    WgradParams,
    addresses,
    all_strides,
    group_strides,
    is_vector,
    strides5,
)
from rl_kernels.backends.gpu.convolution import Geometry
from rl_kernels.backends.gpu.heuristics import Config, Work, cdiv, choose, device_of
from rl_kernels.backends.gpu.operands import Asked, Recipe, arithmetic, bits


def differentiate(
    op: str,
    dy: Tensor,
    x: Tensor,
    recipe: Recipe,
    biases: Sequence[Tensor] | None,
    asked: Asked,
    geometry: Geometry,
    groups: int,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Write what is asked for, for convolutions and linear layers.

    Args:
        op: whose call this is.
        dy: (batch, out, *pixels), of any strides.
        x: (batch, in, *sizes), of any strides.
        recipe: of W, whose dimensions are (out, in, *taps).
        biases: as many as sources.
        asked: which gradients, and where they go.
        geometry: of the convolution; of one tap for linear layers.
        groups: of the channels of each.

    Returns:
        What the op returns.
    """
    dots = None
    if asked.product and recipe.weights[0].numel() > 0:
        dots = _products(op, dy, x, recipe, asked, geometry, groups)
    sums = None
    if asked.sums(biases):
        sums = dy.sum([0, *range(2, dy.dim())], dtype=torch.float32)
        for j, wanted in enumerate(asked.biases_mask):
            if wanted:
                asked.biases[j].copy_(sums * recipe.coefficients[j])
    if asked.coefficients_mask:
        # Shares are added in float64, in their order.
        total = (
            torch.zeros_like(asked.coefficients, dtype=torch.float64)
            if dots is None
            else dots.sum(1, dtype=torch.float64)
        )
        if biases is not None and sums is not None:
            for j, bias in enumerate(biases):
                terms = sums.double() * bias.double()
                total[j] += terms if recipe.per_channel else terms.sum()
        asked.coefficients.copy_(total)
    return asked.outputs


def _products(
    op: str, dy: Tensor, x: Tensor, recipe: Recipe, asked: Asked, geometry: Geometry, groups: int
) -> Tensor | None:
    """Write the sources' gradients; returns the shares of <G, W_j>, (source, part) or (source, part, out), if asked."""
    linear = dy.dim() == 2
    pixels, taps = dy.numel() // dy.shape[1], math.prod(geometry.taps)
    features, channels = dy.shape[1] // groups, x.shape[1] // groups
    columns = taps * channels
    dtype = x.dtype
    device = device_of(x.device)
    work = Work(
        rows=features,
        columns=columns,
        depth=pixels,
        row_bytes=dtype.itemsize,
        column_bytes=dtype.itemsize,
        scratch_bytes=0,
        slowness=arithmetic(dtype, not linear).slowness,
        repeats=groups,
    )
    config, splits, steps = choose(work, configs.usable(configs.WGRADS, work, dtype.itemsize, device), device)
    across = cdiv(columns, config.columns)
    tiles = cdiv(features, config.rows) * across
    dots = partial = None
    if asked.coefficients_mask:
        shares = (across, dy.shape[1]) if recipe.per_channel else (tiles * groups,)
        dots = recipe.coefficients.new_empty((len(recipe.weights), *shares), dtype=torch.float32)
    if splits > 1:
        partial = dy.new_empty((splits, dy.shape[1], columns), dtype=torch.float32)
    gradients = [g if wanted else None for g, wanted in zip(asked.weights, asked.weights_mask, strict=True)]
    whole = channels if taps > 1 else None
    spread = channels if groups > 1 or taps > 1 else None
    apart = whole is None or whole % (COPIED_BYTES // dtype.itemsize) == 0
    params = WgradParams(
        recipe=RecipeParams.of(recipe, groups, False, channels, taps),
        gradients=addresses(gradients),
        gradient_strides=all_strides(gradients),
        gradient_group_strides=group_strides(gradients, groups),
        dots=0 if dots is None else extension.address(dots),
        partial=0 if partial is None else extension.address(partial),
        dy=extension.address(dy),
        x=extension.address(x),
        dy_strides=strides5(dy),
        x_strides=strides5(x),
        geometry=GeometryParams.of(geometry, channels),
        pixels=pixels,
        features=features,
        channels=channels,
        steps=steps,
        splits=splits,
        stages=config.stages,
        groups=groups,
        vector_dy=is_vector(dy, features if groups > 1 else None),
        vector_x=is_vector(x, spread),
        # What is copied at once is as much of dW as of W, also in float32.
        vector_gradients=bits([g is not None and is_vector(g, whole) and apart for g in gradients]),
        added=bits(asked.added),
        wide=bits([g is not None and g.dtype != dtype for g in gradients]),
        per_channel=recipe.per_channel,
    )
    layer, shape = "linear" if linear else "conv", f"{config.rows}x{config.columns}_{configs.NAMES[dtype]}"
    threads, operands = 32 * config.warps, (dy, x, *recipe.weights)
    stage_bytes = (config.rows + config.columns) * configs.STEP_BYTES
    shared_bytes = max(stage_bytes * config.stages, _staged_bytes(config))
    extension.launch(op, f"{layer}_wgrad_{shape}", (tiles, groups, splits), threads, shared_bytes, params, operands)
    if splits > 1:
        extension.launch(op, f"{layer}_wgrad_reduce_{shape}", (tiles, groups, 1), threads, 0, params, operands)
    return dots


def _staged_bytes(config: Config) -> int:
    """Of the epilogue: 16 rows of each warp above another, in float32."""
    return 4 * 16 * (config.rows // configs.WARP_ROWS) * (config.columns + 8)
