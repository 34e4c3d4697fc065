"""A kernel for convolutions of few channels, as in networks for small images: the mixed filter stays on chip.

Each program mixes the whole filter of its group once, and then goes over pixels until none are left.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rl_kernels.backends.gpu.convolution import Correlation
from rl_kernels.backends.gpu.heuristics import Config
from rl_kernels.backends.gpu.operands import StridedRecipe, is_far, strides_of
from rl_kernels.backends.triton.assembler import assembled
from rl_kernels.backends.triton.mix import load_factors, mixed_bias, mixed_tile, outer_factor
from rl_kernels.backends.triton.pixels import (
    UNSPECIALISED,
    coefficients_at_tap,
    is_inside,
    pixel_of,
    pixel_offset,
    tap_offset,
    tap_pointers,
)
from rl_kernels.backends.triton.tile import dot, is_widened


@assembled
@triton.jit(do_not_specialize=["programs", *(name for name in UNSPECIALISED if name != "taps")])
def resident_kernel(
    out,
    activation,
    weights,
    coefficients,
    biases,
    programs,
    pixels,
    features,
    channels,
    sizes,
    out_sizes,
    first_shifts,
    shift_steps,
    pixel_steps,
    strides,
    out_strides,
    weight_strides,
    coefficient_strides,
    bias_strides,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    TAPS_D: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What ``correlate_kernel`` computes, for features and channels of one block each, by ``programs`` a group."""
    # Where the group's operands lie.
    group, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    f, c = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_CHANNELS)
    if WIDE:
        f, c = f.to(tl.int64), c.to(tl.int64)
    in_features, in_channels = f < features, c < channels
    wide_group = group.to(tl.int64)
    first_feature, first_channel = wide_group * features, wide_group * channels
    rows = load_factors(
        coefficients, coefficient_strides, first_feature + f, in_features, N, PER_CHANNEL and not TRANSPOSED, RANK
    )
    columns = load_factors(
        coefficients, coefficient_strides, first_channel + c, in_channels, N, PER_CHANNEL and TRANSPOSED, RANK
    )
    pointers, offsets, factors = (), (), ()
    for j in tl.static_range(N):
        if TRANSPOSED:
            pointers = pointers + (weights[j] + first_channel * weight_strides[j][1],)
        else:
            pointers = pointers + (weights[j] + first_feature * weight_strides[j][0],)
        offsets = offsets + (f[:, None] * weight_strides[j][0] + c[None, :] * weight_strides[j][1],)
        if not PER_CHANNEL:
            factors = factors + (rows[j],)
        elif TRANSPOSED:
            factors = factors + (columns[j][None, :],)
        else:
            factors = factors + (rows[j][:, None],)

    # Its filter, tap by tap, and its bias: mixed once.
    dtype: tl.constexpr = activation.dtype.element_ty
    mask = in_features[:, None] & in_channels[None, :]
    filters = ()
    for tap in tl.static_range(TAPS_D * TAPS_H * TAPS_W):
        t_d, t_h, t_w = tap // TAPS_W // TAPS_H, tap // TAPS_W % TAPS_H, tap % TAPS_W
        here = tap_pointers(pointers, weight_strides, t_d, t_h, t_w, N)
        if RANK > 0:
            at_tap = coefficients_at_tap(coefficients, coefficient_strides, t_d, t_h, t_w, RANK)
            factors = ()
            for j in tl.static_range(N):
                if TRANSPOSED:
                    factor = outer_factor(
                        at_tap, coefficient_strides, j, first_channel + c, in_channels, f, in_features, 1, 0
                    )
                else:
                    factor = outer_factor(
                        at_tap, coefficient_strides, j, first_feature + f, in_features, c, in_channels, 0, 1
                    )
                factors = factors + (factor,)
        filters = filters + (mixed_tile(here, offsets, factors, mask, N, dtype),)
    if HAS_BIAS:
        rows = load_factors(coefficients, coefficient_strides, first_feature + f, in_features, N, PER_CHANNEL, RANK)
        bias = mixed_bias(biases, bias_strides, rows, first_feature + f, in_features, N, dtype)[:, None]

    # The pixels, a tile at a time.
    activation += first_channel * strides[1]
    out += first_feature * out_strides[1]
    for column in tl.range(program, tl.cdiv(pixels, BLOCK_PIXELS), programs, num_stages=STAGES):
        p = column * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        if WIDE:
            p = tl.cast(column, tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        in_pixels = p < pixels
        n, d, h, w = pixel_of(p, out_sizes)
        from_d = d * pixel_steps[0] + first_shifts[0]
        from_h = h * pixel_steps[1] + first_shifts[1]
        from_w = w * pixel_steps[2] + first_shifts[2]
        activation_offsets = c[:, None] * strides[1] + pixel_offset(n, from_d, from_h, from_w, strides)[None, :]
        total = tl.zeros((BLOCK_FEATURES, BLOCK_PIXELS), tl.float32)
        for tap in tl.static_range(TAPS_D * TAPS_H * TAPS_W):
            t_d, t_h, t_w = tap // TAPS_W // TAPS_H, tap // TAPS_W % TAPS_H, tap % TAPS_W
            at_d, at_h, at_w = t_d * shift_steps[0], t_h * shift_steps[1], t_w * shift_steps[2]
            inside = in_pixels & is_inside(from_d + at_d, from_h + at_h, from_w + at_w, sizes, DIMENSIONS)
            from_here = activation + tap_offset(t_d, t_h, t_w, shift_steps, strides)
            if EVEN:
                tile = tl.load(from_here + activation_offsets, mask=inside[None, :], other=0.0)
            else:
                tile = tl.load(from_here + activation_offsets, mask=in_channels[:, None] & inside[None, :], other=0.0)
            total = dot(filters[tap], tile, total, PRECISION, WIDEN)
        if HAS_BIAS:
            total += bias
        out_offsets = f[:, None] * out_strides[1] + pixel_offset(n, d, h, w, out_strides)[None, :]
        tl.store(out + out_offsets, total.to(out.dtype.element_ty), mask=in_features[:, None] & in_pixels[None, :])


def correlate(
    out: Tensor,
    activation: Tensor,
    recipe: StridedRecipe,
    correlation: Correlation,
    groups: int,
    transposed: bool,
    config: Config,
    programs: int,
) -> None:
    """``conv.correlate`` by a filter that stays on chip: so many programs for each group."""
    features, channels = out.shape[1] // groups, activation.shape[1] // groups
    bias_sources, bias_strides = recipe.vectors()
    sizes, out_sizes, taps, *steps = correlation
    # Groups in the first dimension of the grid: the others end at 65535.
    resident_kernel[(programs * groups,)](
        out,
        activation,
        recipe.weights,
        recipe.coefficients,
        bias_sources,
        programs,
        out.numel() // out.shape[1],
        features,
        channels,
        sizes,
        out_sizes,
        *steps,
        strides_of(activation),
        strides_of(out),
        recipe.strides_of_features(transposed),
        recipe.strides,
        bias_strides,
        N=len(recipe.weights),
        TRANSPOSED=transposed,
        PER_CHANNEL=recipe.per_channel,
        RANK=recipe.rank,
        HAS_BIAS=recipe.biases is not None,
        DIMENSIONS=out.dim() - 2,
        TAPS_D=taps[0],
        TAPS_H=taps[1],
        TAPS_W=taps[2],
        EVEN=channels == config.depth,
        WIDE=is_far(out, activation, *recipe.weights),
        PRECISION="ieee",
        WIDEN=is_widened(activation.dtype),
        BLOCK_FEATURES=config.rows,
        BLOCK_PIXELS=config.columns,
        BLOCK_CHANNELS=config.depth,
        STAGES=config.stages,
        num_warps=config.warps,
    )
