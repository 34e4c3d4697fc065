"""Kernels of the depthwise convolutions: a filter of its own for every channel, and no product of matrices."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.convolution import Correlation
from rl_kernels.backends.gpu.heuristics import Config, Device, cdiv
from rl_kernels.backends.gpu.operands import GradientBuffers, StridedRecipe, is_far, strides_of
from rl_kernels.backends.triton.epilogue import Epilogue
from rl_kernels.backends.triton.mix import load_factors, mixed_bias, mixed_tile, outer_factor
from rl_kernels.backends.triton.pixels import (
    UNSPECIALISED,
    coefficients_at_tap,
    is_inside,
    pixel_of,
    pixel_offset,
    tap_of,
    tap_offset,
    tap_pointers,
)

FINISH = Config(128, 1, 1, 4, 1)
"""The tile that finishes the gradients: channels, of one input each."""


@triton.jit(do_not_specialize=UNSPECIALISED)
def depthwise_kernel(
    out,
    activation,
    weights,
    coefficients,
    biases,
    pixels,
    channels,
    sizes,
    out_sizes,
    taps,
    first_shifts,
    shift_steps,
    pixel_steps,
    strides,
    out_strides,
    weight_strides,
    coefficient_strides,
    bias_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """out[n, channel, pixel] = sum over taps of activation[n, channel, input pixel] * W[channel, 0, tap]."""
    # Which channels and pixels, and where they lie.
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    program = tl.program_id(0)
    c = program % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    p = program // blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    if WIDE:
        p = (program // blocks).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        c = c.to(tl.int64)
    in_channels, in_pixels = c < channels, p < pixels
    n, d, h, w = pixel_of(p, out_sizes)
    from_d = d * pixel_steps[0] + first_shifts[0]
    from_h = h * pixel_steps[1] + first_shifts[1]
    from_w = w * pixel_steps[2] + first_shifts[2]
    activation_offsets = c[:, None] * strides[1] + pixel_offset(n, from_d, from_h, from_w, strides)[None, :]
    offsets = ()
    for j in tl.static_range(N):
        offsets = offsets + (c * weight_strides[j][0],)
    of_biases = load_factors(coefficients, coefficient_strides, c, in_channels, N, PER_CHANNEL, RANK)
    if RANK == 0:
        factors = of_biases

    # The sum.
    dtype: tl.constexpr = activation.dtype.element_ty
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for tap in tl.range(0, taps[0] * taps[1] * taps[2]):
        t_d, t_h, t_w = tap_of(tap, taps)
        at_d, at_h, at_w = t_d * shift_steps[0], t_h * shift_steps[1], t_w * shift_steps[2]
        inside = in_pixels & is_inside(from_d + at_d, from_h + at_h, from_w + at_w, sizes, DIMENSIONS)
        here = tap_pointers(weights, weight_strides, t_d, t_h, t_w, N)
        if RANK > 0:
            at_tap = coefficients_at_tap(coefficients, coefficient_strides, t_d, t_h, t_w, RANK)
            factors = ()
            for j in tl.static_range(N):
                factor = outer_factor(at_tap, coefficient_strides, j, c, in_channels, 0, True, -1, -1)
                factors = factors + (factor,)
        weight = mixed_tile(here, offsets, factors, in_channels, N, dtype)
        from_here = activation + tap_offset(t_d, t_h, t_w, shift_steps, strides)
        tile = tl.load(from_here + activation_offsets, mask=in_channels[:, None] & inside[None, :], other=0.0)
        total += weight.to(tl.float32)[:, None] * tile.to(tl.float32)

    # The bias, and where the block goes.
    if HAS_BIAS:
        total += mixed_bias(biases, bias_strides, of_biases, c, in_channels, N, dtype)[:, None]
    out_offsets = c[:, None] * out_strides[1] + pixel_offset(n, d, h, w, out_strides)[None, :]
    tl.store(out + out_offsets, total.to(out.dtype.element_ty), mask=in_channels[:, None] & in_pixels[None, :])


@triton.jit(do_not_specialize=UNSPECIALISED)
def depthwise_wgrad_kernel(
    partial,
    dy,
    x,
    pixels,
    channels,
    steps,
    sizes,
    out_sizes,
    taps,
    first_shifts,
    shift_steps,
    pixel_steps,
    strides,
    dy_strides,
    DIMENSIONS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """partial[split, tap, channel] = sum over pixels of dy[n, channel, pixel] * x[n, channel, input pixel]."""
    # Which channels, tap and part of the pixels.
    all_taps = taps[0] * taps[1] * taps[2]
    program, split = tl.program_id(0), tl.program_id(1)
    tap = program % all_taps
    t_d, t_h, t_w = tap_of(tap, taps)
    c = program // all_taps * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    t = tl.arange(0, BLOCK_PIXELS)
    if WIDE:
        c, t = c.to(tl.int64), t.to(tl.int64)
    in_channels = c < channels
    shift_d = first_shifts[0] + t_d * shift_steps[0]
    shift_h = first_shifts[1] + t_h * shift_steps[1]
    shift_w = first_shifts[2] + t_w * shift_steps[2]
    first = split * steps * BLOCK_PIXELS
    last = tl.minimum(first + steps * BLOCK_PIXELS, pixels)
    # The sum, each pixel of a block by itself until the end.
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for start in tl.range(first, last, BLOCK_PIXELS):
        p = start + t
        n, d, h, w = pixel_of(p, out_sizes)
        x_d, x_h, x_w = d * pixel_steps[0] + shift_d, h * pixel_steps[1] + shift_h, w * pixel_steps[2] + shift_w
        inside = (p < last) & is_inside(x_d, x_h, x_w, sizes, DIMENSIONS)
        mask = in_channels[:, None] & inside[None, :]
        dy_pixels, x_pixels = pixel_offset(n, d, h, w, dy_strides), pixel_offset(n, x_d, x_h, x_w, strides)
        a = tl.load(dy + (c[:, None] * dy_strides[1] + dy_pixels[None, :]), mask=mask, other=0.0)
        b = tl.load(x + (c[:, None] * strides[1] + x_pixels[None, :]), mask=mask, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    partial += (tl.cast(split, tl.int64) * all_taps + tap) * channels
    tl.store(partial + c, tl.sum(total, 1), mask=in_channels)


def correlate(out: Tensor, activation: Tensor, recipe: StridedRecipe, correlation: Correlation) -> None:
    """``out (batch, channels, *pixels)`` from ``activation (batch, channels, *sizes)``."""
    channels = out.shape[1]
    pixels = out.numel() // channels
    block_channels, block_pixels = blocks(activation)
    bias_sources, bias_strides = recipe.vectors()
    depthwise_kernel[(cdiv(channels, block_channels) * cdiv(pixels, block_pixels),)](
        out,
        activation,
        recipe.weights,
        recipe.coefficients,
        bias_sources,
        pixels,
        channels,
        *correlation,
        strides_of(activation),
        strides_of(out),
        recipe.weight_strides,
        recipe.strides,
        bias_strides,
        N=len(recipe.weights),
        PER_CHANNEL=recipe.per_channel,
        RANK=recipe.rank,
        HAS_BIAS=recipe.biases is not None,
        DIMENSIONS=out.dim() - 2,
        WIDE=is_far(out, activation, *recipe.weights),
        BLOCK_CHANNELS=block_channels,
        BLOCK_PIXELS=block_pixels,
    )


def wgrad(dy: Tensor, x: Tensor, recipe: StridedRecipe, buffers: GradientBuffers, correlation: Correlation) -> Epilogue:
    """Write the weights' gradients, and leave the tiles' shares of <G, W_j> in the epilogue."""
    channels, taps = dy.shape[1], math.prod(correlation.taps)
    pixels = dy.numel() // channels
    block_channels, block_pixels = blocks(x)
    programs = cdiv(channels, block_channels) * taps
    splits, steps = splits_of(pixels, block_pixels, programs, taps * channels, heuristics.device_of(x.device))
    tiles = cdiv(channels, FINISH.rows) * taps
    epilogue = Epilogue(recipe, buffers, taps, tiles)
    partial = dy.new_empty((splits, taps, channels, 1), dtype=torch.float32)
    depthwise_wgrad_kernel[(programs, splits)](
        partial,
        dy,
        x,
        pixels,
        channels,
        steps,
        *correlation,
        strides_of(x),
        strides_of(dy),
        DIMENSIONS=x.dim() - 2,
        WIDE=is_far(dy, x),
        BLOCK_CHANNELS=block_channels,
        BLOCK_PIXELS=block_pixels,
    )
    epilogue.reduce(partial, correlation.taps, 1, FINISH)
    return epilogue


def blocks(activation: Tensor) -> tuple[int, int]:
    """Channels and pixels of a program's block: long along what lies side by side."""
    longest = 64 if activation.stride(1) == 1 else 1
    block = min(longest, triton.next_power_of_2(activation.shape[1]))
    return block, 1024 // block


def splits_of(pixels: int, block_pixels: int, programs: int, partial_elements: int, device: Device) -> tuple[int, int]:
    """In how many parts to sum over pixels, and blocks of each: four programs a multiprocessor, if memory allows."""
    blocks = max(1, cdiv(pixels, block_pixels))
    enough = cdiv(4 * device.multiprocessors, programs)
    at_most = max(1, heuristics.WORKSPACE_BYTES // (4 * partial_elements))
    steps = cdiv(blocks, max(1, min(blocks, enough, at_most)))
    return cdiv(blocks, steps), steps
