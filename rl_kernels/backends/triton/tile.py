"""Tiles of products: which one a program computes, the product of two, and the sum of a product that was split."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl_kernels.backends.gpu.heuristics import cdiv
from rl_kernels.backends.gpu.operands import StridedRecipe
from rl_kernels.backends.triton.mix import INTERPRETED, load_factors, mixed_bias

GROUP = 8
"""Tiles of rows that run beside one another, and share the activation's tiles in L2."""
REDUCE_BLOCK = 1024
"""Elements of a split product that a program sums."""


@triton.jit
def tile_of(program, rows, columns, GROUP: tl.constexpr):
    """The row and column of a program's tile, of rows times columns of them: GROUP rows at a time share columns."""
    group = program // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def wgrad_tile(program, rows, columns, all_taps):
    """Group, row, column and tap of a program: taps innermost, as they read the same dy and nearly the same x."""
    tile = program // all_taps
    return tile // columns // rows, tile // columns % rows, tile % columns, program % all_taps


def is_widened(dtype: torch.dtype) -> bool:
    """Whether ``dot`` has to make its operands float32: the interpreter's product of bfloat16 is wrong."""
    return INTERPRETED and dtype == torch.bfloat16


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """``total`` plus the product of two tiles; WIDEN is ``is_widened``."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


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
    coefficient_strides,
    bias_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[element] = sum over splits, in their order, of partial[split, element], plus its feature's mixed bias."""
    size = tl.cast(size, tl.int64)
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(partial + split * size + elements, mask=mask, other=0.0)
    dtype: tl.constexpr = out.dtype.element_ty
    if HAS_BIAS:
        channels = elements // feature_stride % features
        factors = load_factors(coefficients, coefficient_strides, channels, mask, N, PER_CHANNEL, RANK)
        total += mixed_bias(biases, bias_strides, factors, channels, mask, N, dtype)
    tl.store(out + elements, total.to(dtype), mask=mask)


def reduce_product(out: Tensor, partial: Tensor, features: int, feature_stride: int, recipe: StridedRecipe) -> None:
    """``out = partial.sum(0)`` plus the mixed bias; both dense, in the order of out's memory."""
    bias_sources, bias_strides = recipe.vectors()
    reduce_product_kernel[(cdiv(out.numel(), REDUCE_BLOCK),)](
        out,
        partial,
        bias_sources,
        recipe.coefficients,
        out.numel(),
        features,
        feature_stride,
        partial.shape[0],
        recipe.strides,
        bias_strides,
        N=len(recipe.weights),
        PER_CHANNEL=recipe.per_channel,
        RANK=recipe.rank,
        HAS_BIAS=recipe.biases is not None,
        BLOCK=REDUCE_BLOCK,
    )
