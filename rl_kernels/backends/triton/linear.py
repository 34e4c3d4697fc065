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
from rl_kernels.backends.gpu.operands import (
    Arithmetic,
    GradientBuffers,
    StridedRecipe,
    arithmetic,
    is_wide,
    on_device,
)
from rl_kernels.backends.triton.assembler import assembled, sound_configs
from rl_kernels.backends.triton.configs import PRODUCT_CONFIGS, WGRAD_CONFIGS, usable
from rl_kernels.backends.triton.epilogue import Epilogue, finish_tile
from rl_kernels.backends.triton.mix import load_factors, load_terms, mixed_bias, mixed_tile, outer_factors
from rl_kernels.backends.triton.outer import Panel, panels
from rl_kernels.backends.triton.tile import GROUP, dot, is_widened, reduce_product, tile_of
from rl_kernels.ops.shapes import as_rows
from rl_kernels.ops.values import Gradients, Recipe, Wanted

SUM_OUT, SUM_TOKENS = 128, 32
"""Output features and tokens of a block of dy, which a program sums for the biases."""
MAX_SUM_SPLITS = 32
"""Parts of that sum, over tokens."""


@assembled
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
    coefficient_strides,
    bias_strides,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
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
    the reduction. RANK: of Outer coefficients, (left, right); or 0. EVEN: the reduction is a multiple of its block.
    WIDE: offsets within a tile may pass 2^31.
    """
    # Which tile, and which part of the sum.
    program, split = tl.program_id(0), tl.program_id(1)
    row, column = tile_of(program, tl.cdiv(features, BLOCK_FEATURES), tl.cdiv(tokens, BLOCK_TOKENS), GROUP)
    first_feature, first_token = row * BLOCK_FEATURES, column * BLOCK_TOKENS
    first = split * steps * BLOCK_REDUCTION
    last = tl.minimum(first + steps * BLOCK_REDUCTION, reduction)
    f, t, r = tl.arange(0, BLOCK_FEATURES), tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_REDUCTION)
    if WIDE:
        f, t, r = f.to(tl.int64), t.to(tl.int64), r.to(tl.int64)
    in_features, in_tokens = first_feature + f < features, first_token + t < tokens

    # Where its first operands lie.
    activation += first_token.to(tl.int64) * token_stride
    activation_offsets = r[:, None] * reduction_stride + t[None, :] * token_stride
    pointers, offsets = (), ()
    for j in tl.static_range(N):
        pointers = pointers + (weights[j] + first_feature.to(tl.int64) * weight_strides[j][0],)
        offsets = offsets + (f[:, None] * weight_strides[j][0] + r[None, :] * weight_strides[j][1],)
    if RANK > 0:
        rows = load_terms(coefficients, coefficient_strides, first_feature + f, in_features, N, RANK, not TRANSPOSED, 0)
    elif PER_CHANNEL and not TRANSPOSED:
        rows = load_factors(coefficients, coefficient_strides, first_feature + f, in_features, N, True, 0)
        factors = ()
        for j in tl.static_range(N):
            factors = factors + (rows[j][:, None],)
    elif not PER_CHANNEL:
        factors = load_factors(coefficients, coefficient_strides, 0, True, N, False, 0)

    # The sum.
    dtype: tl.constexpr = activation.dtype.element_ty
    total = tl.zeros((BLOCK_FEATURES, BLOCK_TOKENS), tl.float32)
    for start in tl.range(first, last, BLOCK_REDUCTION):
        inside = start + r < last
        here = ()
        for j in tl.static_range(N):
            here = here + (pointers[j] + tl.cast(start, tl.int64) * weight_strides[j][1],)
        if RANK > 0:
            known = True if EVEN else inside
            columns = load_terms(coefficients, coefficient_strides, start + r, known, N, RANK, TRANSPOSED, 1)
            factors = outer_factors(rows, columns, N, RANK)
        elif PER_CHANNEL and TRANSPOSED:
            columns = load_factors(coefficients, coefficient_strides, start + r, inside, N, True, 0)
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

    # The bias, and where the tile goes.
    if HAS_BIAS:
        channels = first_feature + f
        rows = load_factors(coefficients, coefficient_strides, channels, in_features, N, PER_CHANNEL, RANK)
        total += mixed_bias(biases, bias_strides, rows, channels, in_features, N, dtype)[:, None]
    out += (split.to(tl.int64) * tokens + first_token) * features + first_feature
    out_offsets = t[None, :].to(tl.int64) * features + f[:, None]
    tl.store(out + out_offsets, total.to(out.dtype.element_ty), mask=in_features[:, None] & in_tokens[None, :])


@assembled
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
    coefficient_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
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
    # Which tile, and which part of the sum.
    program, split = tl.program_id(0), tl.program_id(1)
    row, column = tile_of(program, tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN), GROUP)
    first = split * steps * BLOCK_TOKENS
    last = tl.minimum(first + steps * BLOCK_TOKENS, tokens)
    o, i, t = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_TOKENS)
    if WIDE:
        o, i, t = o.to(tl.int64), i.to(tl.int64), t.to(tl.int64)
    first_out, first_in = row * BLOCK_OUT, column * BLOCK_IN
    # Where its first operands lie.
    dy += first_out.to(tl.int64) * dy_feature_stride
    x += first_in.to(tl.int64) * x_feature_stride
    dy_offsets = o[:, None] * dy_feature_stride + t[None, :] * dy_token_stride
    x_offsets = t[:, None] * x_token_stride + i[None, :] * x_feature_stride
    in_rows, in_columns = first_out + o < out_features, first_in + i < in_features
    # The sum. dy is not summed here for the biases as well: of a tile with two uses Triton 3.8 keeps a stage too few
    # on sm_90, and overwrites what a product under way still reads.
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
    # Where the tile goes.
    if SPLIT:
        corner = (split.to(tl.int64) * out_features + first_out) * in_features + first_in
        offsets = o[:, None] * in_features + i[None, :]
        tl.store(partial + corner + offsets, g, mask=in_rows[:, None] & in_columns[None, :])
    else:
        if PER_CHANNEL or RANK > 0:
            part, parts = column, tl.cdiv(in_features, BLOCK_IN)
        else:
            part, parts = program, tl.num_programs(0)
        finish_tile(
            g, gradients, weights, coefficients, dots, first_out, first_in, in_rows, in_columns, part, parts,
            out_features, row, tl.cdiv(out_features, BLOCK_OUT), first_in, in_features,
            gradient_strides, weight_strides, coefficient_strides, N, PER_CHANNEL, RANK, WANTED, ADDED, DOTS, FAR,
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


def mixed_linear(x: Tensor, recipe: Recipe) -> Tensor:
    y = x.new_empty(*x.shape[:-1], recipe.weights[0].shape[0])
    if y.numel() > 0:
        multiply(as_rows(y), as_rows(x), StridedRecipe(recipe), transposed=False)
    return y


def mixed_linear_dgrad(dy: Tensor, recipe: Recipe) -> Tensor:
    dx = dy.new_empty(*dy.shape[:-1], recipe.weights[0].shape[1])
    if dx.numel() > 0:
        multiply(as_rows(dx), as_rows(dy), StridedRecipe(recipe), transposed=True)
    return dx


def mixed_linear_wgrad(
    dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, into: Sequence[Tensor | None] | None = None
) -> Gradients:
    return wgrad(as_rows(dy), as_rows(x), recipe, wanted, into)


def multiply(
    out: Tensor, activation: Tensor, recipe: StridedRecipe, transposed: bool, convolution: bool = False
) -> None:
    """``out = activation W^T``, or ``activation W`` if transposed, with the recipe's bias.

    Args:
        out: (tokens, features), contiguous and not empty.
        activation: (tokens, reduction).
        recipe: its weights may be filters of one tap.
        transposed: whether W is summed over its output channels.
        convolution: whether float32 is multiplied by torch's switch for convolutions.
    """
    tokens, features = out.shape
    reduction = activation.shape[1]
    numbers = arithmetic(activation.dtype, convolution)
    work = Work(
        rows=features,
        columns=tokens,
        depth=reduction,
        row_bytes=recipe.bytes,
        column_bytes=activation.element_size(),
        scratch_bytes=activation.element_size(),
        slowness=numbers.slowness,
        terms=recipe.terms,
    )
    usual = sound_configs(PRODUCT_CONFIGS, activation.device)
    config, splits, steps = choose(work, usable(usual, numbers), device_of(activation.device))
    grid = (cdiv(features, config.rows) * cdiv(tokens, config.columns), splits)
    target = out if splits == 1 else out.new_empty((splits, tokens, features), dtype=torch.float32)
    bias_sources, bias_strides = recipe.vectors()
    # Of (feature, reduction); a filter's strides go on with its one tap's.
    strides = tuple([each[1::-1] if transposed else each[:2] for each in recipe.weight_strides])
    with on_device(activation):
        product_kernel[grid](
            target,
            activation,
            recipe.weights,
            recipe.coefficients,
            bias_sources,
            tokens,
            features,
            reduction,
            steps,
            *activation.stride(),
            strides,
            recipe.strides,
            bias_strides,
            N=len(recipe.weights),
            TRANSPOSED=transposed,
            PER_CHANNEL=recipe.per_channel,
            RANK=recipe.rank,
            HAS_BIAS=recipe.biases is not None and splits == 1,
            EVEN=reduction % config.depth == 0,
            WIDE=is_wide(max(*activation.stride(), *map(max, strides))),
            PRECISION=numbers.precision,
            WIDEN=is_widened(activation.dtype),
            BLOCK_FEATURES=config.rows,
            BLOCK_TOKENS=config.columns,
            BLOCK_REDUCTION=config.depth,
            GROUP=GROUP,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if splits > 1:
            reduce_product(out, target, features, 1, recipe)


def wgrad(
    dy: Tensor,
    x: Tensor,
    recipe: Recipe,
    wanted: Wanted,
    into: Sequence[Tensor | None] | None,
    convolution: bool = False,
) -> Gradients:
    """Every gradient wanted, from dy (tokens, out) and x (tokens, in).

    ``convolution``: whether float32 is multiplied by torch's switch for convolutions.
    """
    buffers = GradientBuffers.of(_empty_gradient, recipe, wanted, into)
    if dy.shape[1] == 0:
        buffers.gradients.coefficients.zero_()
        return buffers.gradients
    numbers = arithmetic(x.dtype, convolution)
    with on_device(x):
        for part in panels(Panel(dy, x, recipe, buffers, 1), usable(WGRAD_CONFIGS, numbers)):
            strided = StridedRecipe(part.recipe)
            if wanted.product and x.shape[1] > 0:
                epilogue = _multiply_gradients(part.dy, x, strided, part.buffers, numbers)
            else:
                epilogue = Epilogue(strided, part.buffers, 0, 0)
            epilogue.finish(_sum_tokens(part.dy) if wanted.sums(recipe) else None)
    return buffers.gradients


def _empty_gradient(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _multiply_gradients(
    dy: Tensor, x: Tensor, recipe: StridedRecipe, buffers: GradientBuffers, numbers: Arithmetic
) -> Epilogue:
    """Write the weights' gradients, and leave the tiles' shares of <G, W_j> in the epilogue."""
    tokens, out_features = dy.shape
    in_features = x.shape[1]
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
    epilogue = Epilogue(recipe, buffers, columns, tiles)
    partial = epilogue.dots
    if splits > 1:
        partial = dy.new_empty((splits, out_features, in_features), dtype=torch.float32)
    wgrad_kernel[(tiles, splits)](
        epilogue.gradients,
        partial,
        epilogue.shares,
        dy,
        x,
        recipe.weights,
        recipe.coefficients,
        tokens,
        out_features,
        in_features,
        steps,
        *dy.stride(),
        *x.stride(),
        epilogue.gradient_strides,
        recipe.weight_strides,
        recipe.strides,
        **epilogue.flags,
        SPLIT=splits > 1,
        EVEN=tokens % config.depth == 0,
        WIDE=is_wide(max(*dy.stride(), *x.stride())),
        PRECISION=numbers.precision,
        WIDEN=is_widened(x.dtype),
        BLOCK_OUT=config.rows,
        BLOCK_IN=config.columns,
        BLOCK_TOKENS=config.depth,
        GROUP=GROUP,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        epilogue.reduce(partial, (1, 1, 1), 1, config)
    return epilogue


def _sum_tokens(dy: Tensor) -> Tensor:
    """dy (tokens, out) summed over its tokens, in parts: (splits, out), of which there are none without tokens."""
    tokens, out_features = dy.shape
    steps = max(1, cdiv(cdiv(tokens, SUM_TOKENS), MAX_SUM_SPLITS))
    sums = dy.new_empty((cdiv(tokens, steps * SUM_TOKENS), out_features), dtype=torch.float32)
    if tokens > 0:
        sum_tokens_kernel[(cdiv(out_features, SUM_OUT), len(sums))](
            sums,
            dy,
            tokens,
            out_features,
            steps,
            *dy.stride(),
            BLOCK_OUT=SUM_OUT,
            BLOCK_TOKENS=SUM_TOKENS,
        )
    return sums
