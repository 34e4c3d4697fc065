"""The recipe in Triton: the one place where ``W = sum_j c_j * W_j`` is evaluated, a tile at a time."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors; as the environment was when this was imported."""


@triton.jit
def load_factors(coefficients, strides, channels, mask, N: tl.constexpr, PER_CHANNEL: tl.constexpr, RANK: tl.constexpr):
    """The N coefficients as a tuple: scalars, or one value for each of ``channels``; a bias's, 1, beside Outer ones."""
    factors = ()
    for j in tl.static_range(N):
        if RANK > 0:
            factor = tl.cast(1.0, tl.float32)
        elif PER_CHANNEL:
            factor = tl.load(coefficients + j * strides[0] + channels * strides[1], mask=mask, other=0.0)
        else:
            factor = tl.load(coefficients + j * strides[0])
        factors = factors + (factor,)
    return factors


@triton.jit
def load_term(coefficients, strides, j, r, elements, mask, LEFT: tl.constexpr, AXIS: tl.constexpr):
    """Of Outer coefficients, (left, right): left at output channels or right at inputs, of source j and r of the rank.

    strides: of source, rank, output channel, input, a tap's three; then R. AXIS: of a tile, that they lie along; or -1.
    """
    if LEFT:
        part, step = coefficients[0], strides[2]
    else:
        part, step = coefficients[1], strides[3]
    part += tl.cast(strides[0], tl.int64) * j + tl.cast(strides[1], tl.int64) * r
    term = tl.load(part + elements * step, mask=mask, other=0.0)
    if AXIS == 0:
        term = term[:, None]
    elif AXIS == 1:
        term = term[None, :]
    return term


@triton.jit
def load_terms(
    coefficients,
    strides,
    elements,
    mask,
    N: tl.constexpr,
    RANK: tl.constexpr,
    LEFT: tl.constexpr,
    AXIS: tl.constexpr,
):
    """``load_term`` of every source and of the whole rank, as a tuple of N * RANK."""
    terms = ()
    for j in tl.static_range(N):
        for r in tl.static_range(RANK):
            terms = terms + (load_term(coefficients, strides, j, r, elements, mask, LEFT, AXIS),)
    return terms


@triton.jit
def outer_factors(rows, columns, N: tl.constexpr, RANK: tl.constexpr):
    """The N tiles of Outer coefficients, from ``load_terms`` along both axes: each a sum over the rank, in order."""
    factors = ()
    for j in tl.static_range(N):
        factor = rows[j * RANK] * columns[j * RANK]
        for r in tl.static_range(1, RANK):
            factor += rows[j * RANK + r] * columns[j * RANK + r]
        factors = factors + (factor,)
    return factors


@triton.jit
def outer_factor(
    coefficients,
    strides,
    j,
    channels,
    in_channels,
    inputs,
    in_inputs,
    LEFT_AXIS: tl.constexpr,
    RIGHT_AXIS: tl.constexpr,
):
    """One of ``outer_factors`` by a loop, for outside of main loops: its end, R, is read lest it is unrolled."""
    left = load_term(coefficients, strides, j, 0, channels, in_channels, True, LEFT_AXIS)
    factor = left * load_term(coefficients, strides, j, 0, inputs, in_inputs, False, RIGHT_AXIS)
    for r in tl.range(1, strides[7]):
        left = load_term(coefficients, strides, j, r, channels, in_channels, True, LEFT_AXIS)
        factor += left * load_term(coefficients, strides, j, r, inputs, in_inputs, False, RIGHT_AXIS)
    return factor


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
