"""The products of forward and dgrad: the host's side of ``csrc/cuda/product.cuh``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rl_kernels.backends.convolution import Geometry
from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.cuda.params import (
    GeometryParams,
    ProductParams,
    ProductReductionParams,
    RecipeParams,
    addresses,
    is_vector,
    strides5,
    vector_strides,
)
from rl_kernels.backends.gpu import Recipe, arithmetic
from rl_kernels.backends.heuristics import Config, Device, Work, cdiv, choose, device_of

KEPT_BYTES = 24 * 256
"""Of shared memory, beside the stages: where a convolution's pixels lie, of the largest tile."""
REDUCE_THREADS = 256
MOST_BLOCKS = 1 << 16
"""Of a reduction; its threads go on where there is more."""


def multiply(
    op: str,
    out: Tensor,
    activation: Tensor,
    recipe: Recipe,
    biases: Sequence[Tensor] | None,
    geometry: Geometry,
    groups: int,
    transposed: bool,
) -> None:
    """``out (batch, features, *pixels) = activation (batch, channels, *sizes) W^T``, of any kind of layer.

    Args:
        op: whose call this is.
        out: of any strides.
        activation: of any strides.
        recipe: of W, whose dimensions are (out, in, *taps).
        biases: as many as sources.
        geometry: of the convolution; of one tap for linear layers.
        groups: of features and channels.
        transposed: whether the channels are W's output channels, and the features its inputs.
    """
    linear = out.dim() == 2
    pixels, taps = out.numel() // out.shape[1], math.prod(geometry.taps)
    features, channels = out.shape[1] // groups, activation.shape[1] // groups
    dtype = activation.dtype
    device = _device(activation.device, linear)
    work = Work(
        rows=features,
        columns=pixels,
        depth=taps * channels,
        row_bytes=recipe.bytes,
        column_bytes=dtype.itemsize,
        scratch_bytes=0,
        slowness=arithmetic(dtype, not linear).slowness,
        repeats=groups,
    )
    config, splits, steps = choose(work, configs.usable(configs.PRODUCTS, work, dtype.itemsize, device), device)
    target = out if splits == 1 else out.new_empty((splits, pixels, out.shape[1]), dtype=torch.float32)
    spread = groups > 1 or taps > 1
    params = ProductParams(
        recipe=RecipeParams.of(recipe, groups, transposed, channels, taps),
        biases=addresses(biases or ()),
        bias_strides=vector_strides(biases or ()),
        activation=extension.address(activation),
        out=extension.address(target),
        activation_strides=strides5(activation),
        out_strides=strides5(out),
        geometry=GeometryParams.of(geometry, channels),
        pixels=pixels,
        features=features,
        channels=channels,
        steps=steps,
        splits=splits,
        stages=config.stages,
        groups=groups,
        vector_activation=is_vector(activation, channels if spread else None),
        vector_out=is_vector(out, features) if splits == 1 else features % 4 == 0,
    )
    layer, way = "linear" if linear else "conv", "dgrad" if transposed else "forward"
    kind = "pair" if len(recipe.weights) == 2 and not recipe.per_channel else "general"
    name = configs.NAMES[dtype]
    tiles = cdiv(features, config.rows) * cdiv(pixels, config.columns)
    operands = (activation, *recipe.weights)
    extension.launch(
        op,
        f"{layer}_{way}_{kind}_{config.rows}x{config.columns}_{name}",
        (tiles, groups, splits),
        32 * config.warps,
        max(_stage_bytes(config, len(recipe.weights)) * config.stages, _staged_bytes(config)),
        params,
        operands,
    )
    if splits > 1:
        params.out = extension.address(out)
        blocks = min(cdiv(out.numel(), REDUCE_THREADS), MOST_BLOCKS)
        reduction = ProductReductionParams(params, extension.address(target))
        extension.launch(op, f"{layer}_reduce_{name}", (blocks, 1, 1), REDUCE_THREADS, 0, reduction, operands)


@functools.lru_cache(maxsize=64)
def _device(device: torch.device, linear: bool) -> Device:
    """With the shared memory that is left for the stages."""
    found = device_of(device)
    return found if linear else found._replace(shared_bytes=found.shared_bytes - KEPT_BYTES)


def _stage_bytes(config: Config, sources: int) -> int:
    """Of a stage: every source's tile, and the activation's."""
    return (sources * config.rows + config.columns) * configs.STEP_BYTES


def _staged_bytes(config: Config) -> int:
    """Of the epilogue: 32 columns of each warp beside another, in float32."""
    beside = {8: 2, 4: 1 if config.rows == 128 else 2}[config.warps]
    return 4 * 32 * beside * (config.rows + 4)
