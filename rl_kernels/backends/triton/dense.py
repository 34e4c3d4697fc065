"""The kernels of convolutions that mix channels, as implicit products.

Forward and dgrad are one correlation (``pixels.py``), over a slice of the mixed weight for every tap. As in
``linear.py`` the product is computed transposed, the mixed tile first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.convolution import Correlation, channels_innermost, images_at_a_time
from rl_kernels.backends.gpu.heuristics import Work, cdiv, choose
from rl_kernels.backends.gpu.operands import GradientBuffers, StridedRecipe, arithmetic, is_far, strides_of
from rl_kernels.backends.triton.assembler import assembled, sound_configs
from rl_kernels.backends.triton.configs import CONV_CONFIGS, CONV_WGRAD_CONFIGS, usable
from rl_kernels.backends.triton.epilogue import Epilogue, finish_tile
from rl_kernels.backends.triton.mix import load_factors, load_terms, mixed_bias, mixed_tile, outer_factors
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
from rl_kernels.backends.triton.tile import GROUP, dot, is_widened, reduce_product, tile_of, wgrad_tile


@assembled
@triton.jit(do_not_specialize=UNSPECIALISED)
def correlate_kernel(
    out,
    activation,
    weights,
    coefficients,
    biases,
    pixels,
    features,
    channels,
    steps,
    all_steps,
    split_stride,
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
    TRANSPOSED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[n, feature, pixel] = sum over taps and channels of activation[n, channel, input pixel] * W, for one group.

    features and channels are a group's. W is read as (feature, channel, tap). TRANSPOSED: the output channel of W is
    the channel that is summed. RANK: of Outer coefficients, (left, right); or 0. EVEN: channels are a multiple of their
    block. WIDE: offsets may pass 2^31. A split takes ``steps`` of the sum's blocks, of which there are ``all_steps``,
    to an output of its own, ``split_stride`` apart.
    """
    # Which tile, and which part of the sum.
    feature_tiles, pixel_tiles = tl.cdiv(features, BLOCK_FEATURES), tl.cdiv(pixels, BLOCK_PIXELS)
    group, split = tl.program_id(0) // (feature_tiles * pixel_tiles), tl.program_id(1)
    row, column = tile_of(tl.program_id(0) % (feature_tiles * pixel_tiles), feature_tiles, pixel_tiles, GROUP)
    first_feature = row * BLOCK_FEATURES
    f, c = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_CHANNELS)
    p = column * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    if WIDE:
        p = column.to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        f, c = f.to(tl.int64), c.to(tl.int64)
    in_features, in_pixels = first_feature + f < features, p < pixels
    n, d, h, w = pixel_of(p, out_sizes)
    from_d = d * pixel_steps[0] + first_shifts[0]
    from_h = h * pixel_steps[1] + first_shifts[1]
    from_w = w * pixel_steps[2] + first_shifts[2]

    # Where the group's operands lie.
    wide_group = group.to(tl.int64)
    activation += wide_group * channels * strides[1]
    activation_offsets = c[:, None] * strides[1] + pixel_offset(n, from_d, from_h, from_w, strides)[None, :]
    pointers, offsets = (), ()
    for j in tl.static_range(N):
        if TRANSPOSED:
            shift = wide_group * channels * weight_strides[j][1]
        else:
            shift = wide_group * features * weight_strides[j][0]
        pointers = pointers + (weights[j] + shift + first_feature.to(tl.int64) * weight_strides[j][0],)
        offsets = offsets + (f[:, None] * weight_strides[j][0] + c[None, :] * weight_strides[j][1],)
    coefficient_channels = group * features + first_feature + f
    if RANK > 0 and not TRANSPOSED:
        rows = load_terms(coefficients, coefficient_strides, coefficient_channels, in_features, N, RANK, True, 0)
    elif PER_CHANNEL and not TRANSPOSED:
        rows = load_factors(coefficients, coefficient_strides, coefficient_channels, in_features, N, True, 0)
        factors = ()
        for j in tl.static_range(N):
            factors = factors + (rows[j][:, None],)
    elif RANK == 0 and not PER_CHANNEL:
        factors = load_factors(coefficients, coefficient_strides, 0, True, N, False, 0)

    # The sum.
    dtype: tl.constexpr = activation.dtype.element_ty
    all_taps = taps[0] * taps[1] * taps[2]
    total = tl.zeros((BLOCK_FEATURES, BLOCK_PIXELS), tl.float32)
    for step in tl.range(split * steps, tl.minimum(split * steps + steps, all_steps)):
        # Taps innermost: they read the same lines of the activation, and of a weight that has its taps innermost.
        start = step // all_taps * BLOCK_CHANNELS
        t_d, t_h, t_w = tap_of(step % all_taps, taps)
        at_d, at_h, at_w = t_d * shift_steps[0], t_h * shift_steps[1], t_w * shift_steps[2]
        inside = in_pixels & is_inside(from_d + at_d, from_h + at_h, from_w + at_w, sizes, DIMENSIONS)
        shifted = tap_pointers(pointers, weight_strides, t_d, t_h, t_w, N)
        here = ()
        for j in tl.static_range(N):
            here = here + (shifted[j] + tl.cast(start, tl.int64) * weight_strides[j][1],)
        from_here = activation + tl.cast(start, tl.int64) * strides[1] + tap_offset(t_d, t_h, t_w, shift_steps, strides)
        in_channels = start + c < channels
        if RANK > 0:
            at_tap = coefficients_at_tap(coefficients, coefficient_strides, t_d, t_h, t_w, RANK)
            known = True if EVEN else in_channels
            first_channel = group * channels + start if TRANSPOSED else start
            if TRANSPOSED:
                rows = load_terms(at_tap, coefficient_strides, first_feature + f, in_features, N, RANK, False, 0)
            columns = load_terms(at_tap, coefficient_strides, first_channel + c, known, N, RANK, TRANSPOSED, 1)
            factors = outer_factors(rows, columns, N, RANK)
        elif PER_CHANNEL and TRANSPOSED:
            columns = load_factors(
                coefficients, coefficient_strides, group * channels + start + c, in_channels, N, True, 0
            )
            factors = ()
            for j in tl.static_range(N):
                factors = factors + (columns[j][None, :],)
        if EVEN:
            weight = mixed_tile(here, offsets, factors, in_features[:, None], N, dtype)
            tile = tl.load(from_here + activation_offsets, mask=inside[None, :], other=0.0)
        else:
            weight = mixed_tile(here, offsets, factors, in_features[:, None] & in_channels[None, :], N, dtype)
            tile = tl.load(from_here + activation_offsets, mask=in_channels[:, None] & inside[None, :], other=0.0)
        total = dot(weight, tile, total, PRECISION, WIDEN)

    # The bias, and where the tile goes.
    if HAS_BIAS:
        rows = load_factors(coefficients, coefficient_strides, coefficient_channels, in_features, N, PER_CHANNEL, RANK)
        total += mixed_bias(biases, bias_strides, rows, coefficient_channels, in_features, N, dtype)[:, None]
    # The pixels anew, and written otherwise, for the compiler not to keep across the loop what it would find again.
    p = tl.arange(0, BLOCK_PIXELS) - (0 - column) * BLOCK_PIXELS
    if WIDE:
        p = tl.arange(0, BLOCK_PIXELS) - (0 - column.to(tl.int64)) * BLOCK_PIXELS
    n, d, h, w = pixel_of(p, out_sizes)
    out += split.to(tl.int64) * split_stride + (wide_group * features + first_feature) * out_strides[1]
    out_offsets = f[:, None] * out_strides[1] + pixel_offset(n, d, h, w, out_strides)[None, :]
    tl.store(out + out_offsets, total.to(out.dtype.element_ty), mask=in_features[:, None] & (p < pixels)[None, :])


@assembled
@triton.jit(do_not_specialize=UNSPECIALISED)
def wgrad_kernel(
    gradients,
    partial,
    dots,
    dy,
    x,
    weights,
    coefficients,
    pixels,
    groups,
    out_features,
    in_features,
    steps,
    sizes,
    out_sizes,
    taps,
    first_shifts,
    shift_steps,
    pixel_steps,
    strides,
    dy_strides,
    gradient_strides,
    weight_strides,
    coefficient_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
    WANTED: tl.constexpr,
    ADDED: tl.constexpr,
    DOTS: tl.constexpr,
    FAR: tl.constexpr,
    SPLIT: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """One tile of G[out, in, tap] = sum over pixels of dy[n, out, pixel] * x[n, in, input pixel], finished at once.

    Or, if SPLIT, a split's share of it into partial (split, tap, out, in). out_features and in_features are a group's.
    """
    # Which tile, and which part of the sum.
    rows, columns = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    all_taps = taps[0] * taps[1] * taps[2]
    group, row, column, tap = wgrad_tile(tl.program_id(0), rows, columns, all_taps)
    split = tl.program_id(1)
    t_d, t_h, t_w = tap_of(tap, taps)
    first = split * steps * BLOCK_PIXELS
    last = tl.minimum(first + steps * BLOCK_PIXELS, pixels)
    o, i, t = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_PIXELS)
    if WIDE:
        o, i, t = o.to(tl.int64), i.to(tl.int64), t.to(tl.int64)
    first_out, first_in = row * BLOCK_OUT, column * BLOCK_IN
    in_rows, in_columns = first_out + o < out_features, first_in + i < in_features
    # Where the group's operands lie.
    dy += (group.to(tl.int64) * out_features + first_out) * dy_strides[1]
    x += (group.to(tl.int64) * in_features + first_in) * strides[1]
    shift_d = first_shifts[0] + t_d * shift_steps[0]
    shift_h = first_shifts[1] + t_h * shift_steps[1]
    shift_w = first_shifts[2] + t_w * shift_steps[2]
    dy_offsets, x_offsets = o[:, None] * dy_strides[1], i[None, :] * strides[1]

    # The sum.
    g = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in tl.range(first, last, BLOCK_PIXELS):
        p = start + t
        n, d, h, w = pixel_of(p, out_sizes)
        x_d, x_h, x_w = d * pixel_steps[0] + shift_d, h * pixel_steps[1] + shift_h, w * pixel_steps[2] + shift_w
        inside = (p < last) & is_inside(x_d, x_h, x_w, sizes, DIMENSIONS)
        dy_pixels, x_pixels = pixel_offset(n, d, h, w, dy_strides), pixel_offset(n, x_d, x_h, x_w, strides)
        a = tl.load(dy + (dy_offsets + dy_pixels[None, :]), mask=in_rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(x + (x_pixels[:, None] + x_offsets), mask=inside[:, None] & in_columns[None, :], other=0.0)
        g = dot(a, b, g, PRECISION, WIDEN)

    # Where the tile goes.
    out_channels = groups * out_features
    first_out += group * out_features
    if SPLIT:
        partial += (tl.cast(split, tl.int64) * all_taps + tap) * out_channels * in_features
        partial += tl.cast(first_out, tl.int64) * in_features + first_in
        offsets = o[:, None] * in_features + i[None, :]
        tl.store(partial + offsets, g, mask=in_rows[:, None] & in_columns[None, :])
    else:
        if PER_CHANNEL or RANK > 0:
            part, parts = column * all_taps + tap, columns * all_taps
        else:
            part, parts = tl.program_id(0), tl.num_programs(0)
        finish_tile(
            g,
            tap_pointers(gradients, gradient_strides, t_d, t_h, t_w, N),
            tap_pointers(weights, weight_strides, t_d, t_h, t_w, N),
            coefficients_at_tap(coefficients, coefficient_strides, t_d, t_h, t_w, RANK),
            dots, first_out, first_in, in_rows, in_columns, part, parts, out_channels,
            group * rows + row, groups * rows, tap * in_features + first_in, all_taps * in_features,
            gradient_strides, weight_strides, coefficient_strides, N, PER_CHANNEL, RANK, WANTED, ADDED, DOTS, FAR,
        )  # fmt: skip


def correlate(
    out: Tensor,
    activation: Tensor,
    recipe: StridedRecipe,
    correlation: Correlation,
    groups: int,
    transposed: bool,
    work: Work,
) -> None:
    """``conv.correlate`` for any number of channels; ``work`` says what it is."""
    numbers = arithmetic(activation.dtype, convolution=True)
    usual = sound_configs(CONV_CONFIGS, activation.device)
    config, splits, steps = choose(work, usable(usual, numbers), heuristics.device_of(activation.device))
    target = out if splits == 1 else out.new_empty((splits, out.numel()), dtype=torch.float32)
    tiles = cdiv(work.rows, config.rows) * cdiv(work.columns, config.columns)
    bias_sources, bias_strides = recipe.vectors()
    # Groups in the first dimension of the grid: the others end at 65535.
    correlate_kernel[(tiles * groups, splits)](
        target,
        activation,
        recipe.weights,
        recipe.coefficients,
        bias_sources,
        work.columns,
        work.rows,
        work.depth,
        steps,
        work.taps * cdiv(work.depth, config.depth),
        out.numel(),
        *correlation,
        strides_of(activation),
        strides_of(out),
        recipe.strides_of_features(transposed),
        recipe.strides,
        bias_strides,
        N=len(recipe.weights),
        TRANSPOSED=transposed,
        PER_CHANNEL=recipe.per_channel,
        RANK=recipe.rank,
        HAS_BIAS=recipe.biases is not None and splits == 1,
        DIMENSIONS=out.dim() - 2,
        EVEN=work.depth % config.depth == 0,
        WIDE=is_far(out, activation, *recipe.weights),
        PRECISION=numbers.precision,
        WIDEN=is_widened(activation.dtype),
        BLOCK_FEATURES=config.rows,
        BLOCK_PIXELS=config.columns,
        BLOCK_CHANNELS=config.depth,
        GROUP=GROUP,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        reduce_product(out, target, out.shape[1], out.stride(1), recipe)


def wgrad(
    dy: Tensor,
    x: Tensor,
    recipe: StridedRecipe,
    buffers: GradientBuffers,
    correlation: Correlation,
    groups: int,
) -> Epilogue:
    """Write the weights' gradients, and leave the tiles' shares of <G, W_j> in the epilogue."""
    weight, batch, all_taps = recipe.weights[0], x.shape[0], math.prod(correlation.taps)
    out_features, in_features = weight.shape[0] // groups, weight.shape[1]
    numbers = arithmetic(x.dtype, convolution=True)
    images = images_at_a_time(min(in_features, out_features), x, dy)
    turns = cdiv(batch, images) if images else 1
    # Every turn leaves a part of G.
    max_parts = max(1, heuristics.WORKSPACE_BYTES // (4 * weight.numel()))
    if turns > max_parts:
        images, turns = 0, 1
    work = Work(
        rows=out_features,
        columns=in_features,
        depth=cdiv(dy.numel() // dy.shape[1], turns),
        row_bytes=dy.element_size(),
        column_bytes=x.element_size(),
        scratch_bytes=0,
        slowness=numbers.slowness,
        repeats=groups * all_taps,
        max_splits=max_parts // turns,
    )
    config, splits, steps = choose(work, usable(CONV_WGRAD_CONFIGS, numbers), heuristics.device_of(x.device))
    columns = cdiv(in_features, config.columns) * all_taps
    tiles = groups * cdiv(out_features, config.rows) * columns
    epilogue = Epilogue(recipe, buffers, columns, tiles)
    split = splits * turns > 1
    partial = epilogue.dots
    if split:
        partial = dy.new_empty((turns * splits, all_taps, weight.shape[0], in_features), dtype=torch.float32)
    for turn in range(turns):
        part = slice(turn * images, (turn + 1) * images)
        near_dy, near_x = (channels_innermost(tensor[part]) if images else tensor for tensor in (dy, x))
        wgrad_kernel[(tiles, splits)](
            epilogue.gradients,
            partial[turn * splits :] if split else partial,
            epilogue.shares,
            near_dy,
            near_x,
            recipe.weights,
            recipe.coefficients,
            near_dy.numel() // dy.shape[1],
            groups,
            out_features,
            in_features,
            steps,
            *correlation,
            strides_of(near_x),
            strides_of(near_dy),
            epilogue.gradient_strides,
            recipe.weight_strides,
            recipe.strides,
            **epilogue.flags,
            SPLIT=split,
            DIMENSIONS=x.dim() - 2,
            WIDE=is_far(dy, x),
            PRECISION=numbers.precision,
            WIDEN=is_widened(x.dtype),
            BLOCK_OUT=config.rows,
            BLOCK_IN=config.columns,
            BLOCK_PIXELS=config.depth,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    if split:
        epilogue.reduce(partial, correlation.taps, groups, config)
    return epilogue
