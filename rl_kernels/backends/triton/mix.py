"""The recipe in Triton: the one place where ``W = sum_j c_j * W_j`` is evaluated, a tile at a time."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors; as the environment was when this was imported."""


@triton.jit
def load_factors(
    coefficients, source_stride, channel_stride, channels, mask, N: tl.constexpr, PER_CHANNEL: tl.constexpr
):
    """The N coefficients as a tuple: scalars, or one value for each of ``channels``."""
    factors = ()
    for j in tl.static_range(N):
        if PER_CHANNEL:
            factor = tl.load(coefficients + j * source_stride + channels * channel_stride, mask=mask, other=0.0)
        else:
            factor = tl.load(coefficients + j * source_stride)
        factors = factors + (factor,)
    return factors


@triton.jit
def mix(sources, factors, N: tl.constexpr):
    """``sum_j factors[j] * sources[j]`` in float32, in source order; two tuples of N."""
    total = sources[0].to(tl.float32) * factors[0]
    for j in tl.static_range(1, N):
        total += sources[j].to(tl.float32) * factors[j]
    return total


@triton.jit
def mixed_tile(pointers, offsets, factors, mask, N: tl.constexpr, dtype: tl.constexpr):
    """A tile of the mixed weight, rounded once to ``dtype``; 0 outside of the mask, whatever the coefficients are."""
    sources = ()
    for j in tl.static_range(N):
        sources = sources + (tl.load(pointers[j] + offsets[j], mask=mask, other=0.0),)
    return tl.where(mask, mix(sources, factors, N), 0.0).to(dtype)


@triton.jit
def mixed_bias(biases, strides, factors, channels, mask, N: tl.constexpr, dtype: tl.constexpr):
    """The mixed bias of ``channels``, rounded to ``dtype`` as the weight is, in float32."""
    sources = ()
    for j in tl.static_range(N):
        sources = sources + (tl.load(biases[j] + channels * strides[j], mask=mask, other=0.0),)
    return mix(sources, factors, N).to(dtype).to(tl.float32)
