"""Where a convolution's pixels, taps and channels lie, by its ``Correlation``."""

from __future__ import annotations

import triton
import triton.language as tl

from rl_kernels.backends.gpu.convolution import Correlation

UNSPECIALISED = list(Correlation._fields)
"""Arguments that differ from layer to layer and are no strides of memory: nothing is gained by a kernel for each."""


@triton.jit
def pixel_of(p, sizes):
    """The image, and the three coordinates, of flattened pixels ``p``."""
    w, lines = p % sizes[2], p // sizes[2]
    h, planes = lines % sizes[1], lines // sizes[1]
    return planes // sizes[0], planes % sizes[0], h, w


@triton.jit
def tap_of(tap, taps):
    """The three coordinates of a flattened tap."""
    return tap // taps[2] // taps[1], tap // taps[2] % taps[1], tap % taps[2]


@triton.jit
def tap_pointers(pointers, strides, t_d, t_h, t_w, N: tl.constexpr):
    """N tensors (out, in, depth, height, width) at one tap; their strides are N tuples of 5."""
    here = ()
    for j in tl.static_range(N):
        here = here + (
            pointers[j]
            + tl.cast(t_d, tl.int64) * strides[j][2]
            + tl.cast(t_h, tl.int64) * strides[j][3]
            + tl.cast(t_w, tl.int64) * strides[j][4],
        )
    return here


@triton.jit
def coefficients_at_tap(coefficients, strides, t_d, t_h, t_w, RANK: tl.constexpr):
    """The coefficients at one tap: of Outer ones, (left, right), right is moved there; others are alike at all taps."""
    here = coefficients
    if RANK > 0:
        right = (
            coefficients[1]
            + tl.cast(t_d, tl.int64) * strides[4]
            + tl.cast(t_h, tl.int64) * strides[5]
            + tl.cast(t_w, tl.int64) * strides[6]
        )
        here = (coefficients[0], right)
    return here


@triton.jit
def is_inside(d, h, w, sizes, DIMENSIONS: tl.constexpr):
    """Whether input pixels exist; the dimensions before the last DIMENSIONS have one pixel, and no shift."""
    inside = (w >= 0) & (w < sizes[2])
    if DIMENSIONS >= 2:
        inside = inside & (h >= 0) & (h < sizes[1])
    if DIMENSIONS >= 3:
        inside = inside & (d >= 0) & (d < sizes[0])
    return inside


@triton.jit
def pixel_offset(n, d, h, w, strides):
    """The offset of pixels in a tensor of strides (batch, channel, depth, height, width), at channel 0."""
    return n * strides[0] + d * strides[2] + h * strides[3] + w * strides[4]


@triton.jit
def tap_offset(t_d, t_h, t_w, steps, strides):
    """The scalar offset, in 64 bits, from the first tap's input pixel to that of a tap."""
    return (
        tl.cast(t_d * steps[0], tl.int64) * strides[2]
        + tl.cast(t_h * steps[1], tl.int64) * strides[3]
        + tl.cast(t_w * steps[2], tl.int64) * strides[4]
    )
