"""Kernels of the linear ops.

The product is computed transposed, ``out^T = W activation^T``, so that the mixed tile is the first operand of the
matrix instructions: the one that may come from registers. Forward and dgrad are the same kernel, on W and on W^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl_kernels.backends.gpu.heuristics import Work, cdiv, choose, device_of
from rl_kernels.backends.gpu.operands import Asked, Recipe, arithmetic, is_wide, on_device
from rl_kernels.backends.triton.configs import PRODUCT_CONFIGS, WGRAD_CONFIGS, usable
from rl_kernels.backends.triton.epilogue import Epilogue, finish_tile
from rl_kernels.backends.triton.mix import INTERPRETED, load_factors, mixed_bias, mixed_tile
from rl_kernels.ops import shapes

GROUP = 8
"""Tiles of rows that run beside one another, and share the activation's tiles in L2."""
REDUCE_BLOCK, SUM_OUT, SUM_TOKENS, SUM_SPLITS = 1024, 128, 32, 32


@triton.jit
def tile_of(program, rows, columns, GROUP: tl.constexpr):
    """The tile of a program, of rows times columns of tiles: GROUP rows at a time, for neighbours to share them."""
    group = program // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # The interpreter's product of bfloat16 is wrong.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product_kernel(
    out,
    activation,
    weights,
    coefficients,
    biases,
    tokens,
    features,
    reduction,
    steps,
    token_stride,
    reduction_stride,
    weight_strides,
    source_stride,
    channel_stride,
    bias_strides,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_REDUCTION: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[split, token, feature] = sum over a split's part of the reduction of activation * W, in out's dtype.

    W is read as (feature, reduction). TRANSPOSED: the output channel, which has its own coefficients if PER_CHANNEL, is
    the reduction. EVEN: the reduction is a multiple of its block. WIDE: offsets within a tile may pass 2^31.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    row, column = tile_of(program, tl.cdiv(features, BLOCK_FEATURES), tl.cdiv(tokens, BLOCK_TOKENS), GROUP)
    first_feature, first_token = row * BLOCK_FEATURES, column * BLOCK_TOKENS
    first = split * steps * BLOCK_REDUCTION
    last = tl.minimum(first + steps * BLOCK_REDUCTION, reduction)
    f, t, r = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_REDUCTION)
    if WIDE:
        f, t, r = f.to(tl.int64), t.to(tl.int64), r.to(tl.int64)
    in_features, in_tokens = first_feature + f < features, first_token + t < tokens

    activation += first_token.to(tl.int64) * token_stride
    activation_offsets = r[:, None] * reduction_stride + t[None, :] * token_stride
    pointers, offsets = (), ()
    for j in tl.static_range(N):
        pointers = pointers + (weights[j] + first_feature.to(tl.int64) * weight_strides[j][0],)
        offsets = offsets + (f[:, None] * weight_strides[j][0] + r[None, :] * weight_strides[j][1],)
    if PER_CHANNEL and not TRANSPOSED:
        rows = load_factors(coefficients, source_stride, channel_stride, first_feature + f, in_features, N, True)
        factors = ()
        for j in tl.static_range(N):
            factors = factors + (rows[j][:, None],)
    elif not PER_CHANNEL:
        factors = load_factors(coefficients, source_stride, channel_stride, 0, True, N, False)

    dtype: tl.constexpr = activation.dtype.element_ty
    total = tl.zeros((BLOCK_FEATURES, BLOCK_TOKENS), tl.float32)
    for start in tl.range(first, last, BLOCK_REDUCTION):
        inside = start + r < last
        here = ()
        for j in tl.static_range(N):
            here = here + (pointers[j] + tl.cast(start, tl.int64) * weight_strides[j][1],)
        if PER_CHANNEL and TRANSPOSED:
            columns = load_factors(coefficients, source_stride, channel_stride, start + r, inside, N, True)
            factors = ()
            for j in tl.static_range(N):
                factors = factors + (columns[j][None, :],)
        if EVEN:
            weight = mixed_tile(here, offsets, factors, in_features[:, None], N, dtype)
            tile = tl.load(
                activation + tl.cast(start, tl.int64) * reduction_stride + activation_offsets,
                mask=in_tokens[None, :],
                other=0.0,
            )
        else:
            weight = mixed_tile(here, offsets, factors, in_features[:, None] & inside[None, :], N, dtype)
            tile = tl.load(
                activation + tl.cast(start, tl.int64) * reduction_stride + activation_offsets,
                mask=inside[:, None] & in_tokens[None, :],
                other=0.0,
            )
        total = dot(weight, tile, total, PRECISION, WIDEN)

    if HAS_BIAS:
        channels = first_feature + f
        rows = load_factors(coefficients, source_stride, channel_stride, channels, in_features, N, PER_CHANNEL)
        total += mixed_bias(biases, bias_strides, rows, channels, in_features, N, dtype)[:, None]
    out += (split.to(tl.int64) * tokens + first_token) * features + first_feature
    places = t[None, :].to(tl.int64) * features + f[:, None]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=in_features[:, None] & in_tokens[None, :])


@triton.jit
def reduce_product_kernel(
    out,
    partial,
    biases,
    coefficients,
    size,
    features,
    feature_stride,
    splits,
    source_stride,
    channel_stride,
    bias_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[place] = sum over splits, in their order, of partial[split, place], plus the mixed bias of its feature."""
    size = tl.cast(size, tl.int64)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(partial + split * size + places, mask=mask, other=0.0)
    dtype: tl.constexpr = out.dtype.element_ty
    if HAS_BIAS:
        channels = places // feature_stride % features
        factors = load_factors(coefficients, source_stride, channel_stride, channels, mask, N, PER_CHANNEL)
        total += mixed_bias(biases, bias_strides, factors, channels, mask, N, dtype)
    tl.store(out + places, total.to(dtype), mask=mask)


@triton.jit
def wgrad_kernel(
    gradients,
    partial,
    dots,
    dy,
    x,
    weights,
    coefficients,
    tokens,
    out_features,
    in_features,
    steps,
    dy_token_stride,
    dy_feature_stride,
    x_token_stride,
    x_feature_stride,
    gradient_strides,
    weight_strides,
    source_stride,
    channel_stride,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WANTED: tl.constexpr,
    ADDED: tl.constexpr,
    DOTS: tl.constexpr,
    FAR: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of G = dy^T x, finished at once; or, if SPLIT, a split's share of it into partial, (split, out, in)."""
    program, split = tl.program_id(0), tl.program_id(1)
    row, column = tile_of(program, tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN), GROUP)
    first = split * steps * BLOCK_TOKENS
    last = tl.minimum(first + steps * BLOCK_TOKENS, tokens)
    o, i, t = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_TOKENS)
    if WIDE:
        o, i, t = o.to(tl.int64), i.to(tl.int64), t.to(tl.int64)
    first_out, first_in = row * BLOCK_OUT, column * BLOCK_IN
    dy += first_out.to(tl.int64) * dy_feature_stride
    x += first_in.to(tl.int64) * x_feature_stride
    dy_offsets = o[:, None] * dy_feature_stride + t[None, :] * dy_token_stride
    x_offsets = t[:, None] * x_token_stride + i[None, :] * x_feature_stride
    in_rows, in_columns = first_out + o < out_features, first_in + i < in_features
    # dy is not summed here for the biases as well: of a tile with two uses Triton 3.8 keeps a stage too few on sm_90,
    # and overwrites what a product under way still reads.
    g = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in tl.range(first, last, BLOCK_TOKENS):
        start = tl.cast(start, tl.int64)
        if EVEN:
            dy_mask, x_mask = in_rows[:, None], in_columns[None, :]
        else:
            inside = start + t < last
            dy_mask, x_mask = in_rows[:, None] & inside[None, :], inside[:, None] & in_columns[None, :]
        a = tl.load(dy + start * dy_token_stride + dy_offsets, mask=dy_mask, other=0.0)
        b = tl.load(x + start * x_token_stride + x_offsets, mask=x_mask, other=0.0)
        g = dot(a, b, g, PRECISION, WIDEN)
    if SPLIT:
        place = (split.to(tl.int64) * out_features + first_out) * in_features + first_in
        places = o[:, None] * in_features + i[None, :]
        tl.store(partial + place + places, g, mask=in_rows[:, None] & in_columns[None, :])
    else:
        if PER_CHANNEL:
            part, parts = column, tl.cdiv(in_features, BLOCK_IN)
        else:
            part, parts = program, tl.num_programs(0)
        finish_tile(
            g, gradients, weights, coefficients, dots, first_out, first_in, in_rows, in_columns,
            part, parts, out_features, gradient_strides, weight_strides, source_stride, channel_stride,
            N, PER_CHANNEL, WANTED, ADDED, DOTS, FAR,
        )  # fmt: skip


@triton.jit
def sum_tokens_kernel(
    sums,
    dy,
    tokens,
    out_features,
    steps,
    dy_token_stride,
    dy_feature_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """sums[split, out] = dy summed over a split's tokens, for the biases."""
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split = tl.program_id(1)
    first = split * steps * BLOCK_TOKENS
    last = tl.minimum(first + steps * BLOCK_TOKENS, tokens)
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in tl.range(first, last, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        tile = tl.load(
            dy + t.to(tl.int64)[:, None] * dy_token_stride + o.to(tl.int64)[None, :] * dy_feature_stride,
            mask=(t < last)[:, None] & (o < out_features)[None, :],
            other=0.0,
        )
        total += tl.sum(tile.to(tl.float32), 0)
    tl.store(sums + split.to(tl.int64) * out_features + o, total, mask=o < out_features)


# The ops.


def mixed_linear(x: Tensor, weights: Sequence[Tensor], coefficients: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weights[0].shape[0])
    if y.numel() > 0:
        strides = [weight.stride() for weight in weights]
        multiply(shapes.as_rows(y), shapes.as_rows(x), weights, strides, coefficients, biases, transposed=False)
    return y


def mixed_linear_dgrad(dy: Tensor, weights: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    dx = dy.new_empty(*dy.shape[:-1], weights[0].shape[1])
    if dx.numel() > 0:
        strides = [weight.stride()[::-1] for weight in weights]
        multiply(shapes.as_rows(dx), shapes.as_rows(dy), weights, strides, coefficients, None, transposed=True)
    return dx


def multiply(
    out: Tensor,
    activation: Tensor,
    weights: Sequence[Tensor],
    strides: Sequence[tuple[int, ...]],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    transposed: bool,
    convolution: bool = False,
) -> None:
    """``out (tokens, features) = activation (tokens, reduction) W^T``, by W's strides of (feature, reduction)."""
    tokens, features = out.shape
    reduction = activation.shape[1]
    numbers = arithmetic(activation.dtype, convolution)
    recipe = Recipe(weights, coefficients)
    work = Work(
        rows=features,
        columns=tokens,
        depth=reduction,
        row_bytes=recipe.bytes,
        column_bytes=activation.element_size(),
        scratch_bytes=activation.element_size(),
        slowness=numbers.slowness,
    )
    config, splits, steps = choose(work, usable(PRODUCT_CONFIGS, numbers), device_of(activation.device))
    grid = (cdiv(features, config.rows) * cdiv(tokens, config.columns), splits)
    target = out if splits == 1 else out.new_empty((splits, tokens, features), dtype=torch.float32)
    bias_sources, bias_strides = recipe.vectors(biases)
    farthest = max(*activation.stride(), *(stride for pair in strides for stride in pair))
    with on_device(activation):
        product_kernel[grid](
            target,
            activation,
            tuple(weights),
            coefficients,
            bias_sources,
            tokens,
            features,
            reduction,
            steps,
            *activation.stride(),
            tuple(strides),
            *recipe.strides,
            bias_strides,
            N=len(weights),
            TRANSPOSED=transposed,
            PER_CHANNEL=recipe.per_channel,
            HAS_BIAS=biases is not None and splits == 1,
            EVEN=reduction % config.depth == 0,
            WIDE=is_wide(farthest),
            PRECISION=numbers.precision,
            WIDEN=INTERPRETED and activation.dtype == torch.bfloat16,
            BLOCK_FEATURES=config.rows,
            BLOCK_TOKENS=config.columns,
            BLOCK_REDUCTION=config.depth,
            GROUP=GROUP,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if splits > 1:
            reduce_product(out, target, features, 1, recipe, biases)


def reduce_product(
    out: Tensor,
    partial: Tensor,
    features: int,
    feature_stride: int,
    recipe: Recipe,
    biases: Sequence[Tensor] | None,
) -> None:
    """``out = partial.sum(0)`` plus the mixed bias; both dense, in the order of out's memory."""
    bias_sources, bias_strides = recipe.vectors(biases)
    reduce_product_kernel[(cdiv(out.numel(), REDUCE_BLOCK),)](
        out,
        partial,
        bias_sources,
        recipe.coefficients,
        out.numel(),
        features,
        feature_stride,
        partial.shape[0],
        *recipe.strides,
        bias_strides,
        N=len(recipe.weights),
        PER_CHANNEL=recipe.per_channel,
        HAS_BIAS=biases is not None,
        BLOCK=REDUCE_BLOCK,
    )


def mixed_linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
    into: Sequence[Tensor | None] | None = None,
    convolution: bool = False,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    dy, x = shapes.as_rows(dy), shapes.as_rows(x)
    asked = Asked.of(
        lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
        weights,
        coefficients,
        biases,
        weights_mask,
        coefficients_mask,
        biases_mask,
        into,
    )
    tokens, out_features = dy.shape
    in_features = x.shape[1]
    if out_features == 0:
        asked.coefficients.zero_()
        return asked.outputs
    recipe = Recipe(weights, coefficients)
    numbers = arithmetic(x.dtype, convolution)
    needs_sums, needs_product = asked.sums(biases), asked.product and in_features > 0
    work = Work(
        rows=out_features,
        columns=in_features,
        depth=tokens,
        row_bytes=dy.element_size(),
        column_bytes=x.element_size(),
        scratch_bytes=0,
        slowness=numbers.slowness,
    )
    config, splits, steps = choose(work, usable(WGRAD_CONFIGS, numbers), device_of(x.device))
    columns = cdiv(in_features, config.columns)
    tiles = cdiv(out_features, config.rows) * columns
    epilogue = Epilogue(recipe, asked, columns, tiles)
    partial = epilogue.dots
    if splits > 1 and needs_product:
        partial = dy.new_empty((splits, out_features, in_features), dtype=torch.float32)
    sums = None
    if needs_sums:
        sum_steps = cdiv(cdiv(tokens, SUM_TOKENS), SUM_SPLITS)
        sums = dy.new_empty((cdiv(tokens, max(1, sum_steps) * SUM_TOKENS), out_features), dtype=torch.float32)
    with on_device(x):
        if needs_product:
            wgrad_kernel[(tiles, splits)](
                epilogue.targets,
                partial,
                epilogue.dots,
                dy,
                x,
                recipe.weights,
                coefficients,
                tokens,
                out_features,
                in_features,
                steps,
                *dy.stride(),
                *x.stride(),
                epilogue.target_strides,
                recipe.weight_strides,
                *recipe.strides,
                **epilogue.flags,
                SPLIT=splits > 1,
                EVEN=tokens % config.depth == 0,
                WIDE=is_wide(max(*dy.stride(), *x.stride())),
                PRECISION=numbers.precision,
                WIDEN=INTERPRETED and x.dtype == torch.bfloat16,
                BLOCK_OUT=config.rows,
                BLOCK_IN=config.columns,
                BLOCK_TOKENS=config.depth,
                GROUP=GROUP,
                num_warps=config.warps,
                num_stages=config.stages,
            )
            if splits > 1:
                epilogue.reduce(partial, (1, 1, 1), 1, out_features, in_features, config)
        if sums is not None and tokens > 0:
            sum_tokens_kernel[(cdiv(out_features, SUM_OUT), len(sums))](
                sums,
                dy,
                tokens,
                out_features,
                sum_steps,
                *dy.stride(),
                BLOCK_OUT=SUM_OUT,
                BLOCK_TOKENS=SUM_TOKENS,
            )
        epilogue.finish(sums, biases)
    return asked.outputs
