"""The gradients of sources and coefficients: the host's side of ``csrc/cuda/wgrad.cuh``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.cuda.configs import KERNELS
from rl_kernels.backends.cuda.params import (
    COPIED_BYTES,
    CorrelationParams,
    RecipeParams,
    WgradParams,
    addresses,
    all_strides,
    group_strides,
    is_vector,
    strides5,
    vectors,
)
from rl_kernels.backends.gpu.convolution import Correlation
from rl_kernels.backends.gpu.heuristics import Choice, Work, cdiv, choose, device_of
from rl_kernels.backends.gpu.operands import GradientBuffers, StridedRecipe, arithmetic, bits
from rl_kernels.ops.values import Gradients


class Differentiation(NamedTuple):
    """What a wgrad is asked for, of a convolution or a linear layer.

    Attributes:
        op: whose call this is.
        dy: (batch, out, *pixels), of any strides.
        x: (batch, in, *sizes), of any strides.
        recipe: of W, whose dimensions are (out, in, *taps), and of the bias.
        buffers: which gradients are wanted, and where they go.
        correlation: which pixels meet; of one tap for linear layers.
        groups: of the channels of each.
    """

    op: str
    dy: Tensor
    x: Tensor
    recipe: StridedRecipe
    buffers: GradientBuffers
    correlation: Correlation
    groups: int = 1

    @property
    def linear(self) -> bool:
        """Whether this is a linear layer's."""
        return self.dy.dim() == 2


def differentiate(asked: Differentiation) -> Gradients:
    """Write what is asked for; returns what the op returns."""
    dy, recipe, wanted = asked.dy, asked.recipe, asked.buffers.wanted
    gradients, biases = asked.buffers.gradients, recipe.biases or ()
    dots = None
    if wanted.product and recipe.weights[0].numel() > 0:
        dots = _products(asked)
    sums = None
    if any(wanted.biases) or (wanted.coefficients and biases):
        sums = dy.sum([0, *range(2, dy.dim())], dtype=torch.float32)
        for j, want in enumerate(wanted.biases):
            if want:
                gradients.biases[j].copy_(sums * recipe.coefficients[j])
    if wanted.coefficients:
        # Shares are added in float64, in their order.
        total = (
            torch.zeros_like(gradients.coefficients, dtype=torch.float64)
            if dots is None
            else dots.sum(1, dtype=torch.float64)
        )
        if sums is not None:
            for j, bias in enumerate(biases):
                terms = sums.double() * bias.double()
                total[j] += terms if recipe.per_channel else terms.sum()
        gradients.coefficients.copy_(total)
    return gradients


def _products(asked: Differentiation) -> Tensor | None:
    """Write the sources' gradients; returns the shares of <G, W_j>, (source, part) or (source, part, out), if asked."""
    dy, recipe = asked.dy, asked.recipe
    config, splits, _ = choice = _choose(asked)
    out, columns = dy.shape[1], asked.x.shape[1] // asked.groups * math.prod(asked.correlation.taps)
    across = cdiv(columns, config.columns)
    tiles = cdiv(out // asked.groups, config.rows) * across
    dots = partial = None
    if asked.buffers.wanted.coefficients:
        shares = (across, out) if recipe.per_channel else (tiles * asked.groups,)
        dots = recipe.coefficients.new_empty((len(recipe.weights), *shares), dtype=torch.float32)
    if splits > 1:
        partial = dy.new_empty((splits, out, columns), dtype=torch.float32)
    params = _params(asked, choice, dots, partial)
    layer, shape = "linear" if asked.linear else "conv", f"{config.rows}x{config.columns}_{configs.ELEMENTS[dy.dtype]}"
    kernel, operands = f"{layer}_wgrad_{shape}", (dy, asked.x, *recipe.weights)
    shared_bytes = max(config.stages * KERNELS[kernel].stage_bytes, KERNELS[kernel].epilogue_bytes)
    extension.launch(asked.op, kernel, (tiles, asked.groups, splits), shared_bytes, params, operands)
    if splits > 1:
        reduction = f"{layer}_wgrad_reduce_{shape}"
        extension.launch(asked.op, reduction, (tiles, asked.groups, 1), 0, params, operands)
    return dots


def _choose(asked: Differentiation) -> Choice:
    dy, x, groups = asked.dy, asked.x, asked.groups
    size, device = dy.element_size(), device_of(x.device)
    work = Work(
        rows=dy.shape[1] // groups,
        columns=math.prod(asked.correlation.taps) * (x.shape[1] // groups),
        depth=dy.numel() // dy.shape[1],
        row_bytes=size,
        column_bytes=size,
        scratch_bytes=0,
        slowness=arithmetic(dy.dtype, not asked.linear).slowness,
        repeats=groups,
    )
    return choose(work, configs.usable(configs.WGRADS, work, size, device), device)


def _params(asked: Differentiation, choice: Choice, dots: Tensor | None, partial: Tensor | None) -> WgradParams:
    dy, x, recipe, groups = asked.dy, asked.x, asked.recipe, asked.groups
    buffers, wanted = asked.buffers.gradients.weights, asked.buffers.wanted.weights
    gradients = [buffer if want else None for buffer, want in zip(buffers, wanted, strict=True)]
    features, channels = dy.shape[1] // groups, x.shape[1] // groups
    whole = channels if math.prod(asked.correlation.taps) > 1 else None
    # What is copied at once is as much of dW as of W, also where dW is float32.
    apart = whole is None or whole % (COPIED_BYTES // dy.element_size()) == 0
    return WgradParams(
        recipe=RecipeParams.of(recipe, groups, whole),
        gradients=addresses(gradients),
        gradient_strides=all_strides(gradients),
        gradient_group_strides=group_strides(gradients, groups),
        dots=0 if dots is None else extension.address(dots),
        partial=0 if partial is None else extension.address(partial),
        dy=extension.address(dy),
        x=extension.address(x),
        dy_strides=strides5(dy),
        x_strides=strides5(x),
        correlation=CorrelationParams.of(asked.correlation, channels),
        pixels=dy.numel() // dy.shape[1],
        features=features,
        channels=channels,
        steps=choice.steps,
        splits=choice.splits,
        stages=choice.config.stages,
        groups=groups,
        vector_dy=is_vector(dy, features if groups > 1 else None),
        vector_x=is_vector(x, channels if groups > 1 else whole),
        vector_gradients=vectors(gradients, whole) if apart else 0,
        added=bits(asked.buffers.added),
        wide=bits([gradient is not None and gradient.dtype != dy.dtype for gradient in gradients]),
        per_channel=recipe.per_channel,
    )
