"""Where a convolution's pixels, taps and channels lie.

Missing dimensions have size 1: everything is three-dimensional. An output pixel p and a tap t meet at the input pixel
``p * pixel_step + first_shift + t * shift_step``, in each dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

Three = tuple[int, ...]


class Geometry(NamedTuple):
    """What kernels take of a convolution's geometry: (depth, height, width) each.

    Attributes:
        sizes: of the input.
        out_sizes: of the output.
        taps: of the filter.
        first_shifts: from an output pixel, scaled, to the input pixel of its first tap.
        shift_steps: from tap to tap.
        pixel_steps: from output pixel to output pixel.
    """

    sizes: Three
    out_sizes: Three
    taps: Three
    first_shifts: Three
    shift_steps: Three
    pixel_steps: Three

    @classmethod
    def of(
        cls,
        activation: Tensor,
        out: Tensor,
        weight: Tensor,
        first_shifts: Sequence[int],
        shift_steps: Sequence[int],
        pixel_steps: Sequence[int],
    ) -> Geometry:
        """For an input (batch, channels, *sizes), an output alike and a filter (out, in, *taps)."""
        return cls(
            _three(activation.shape[2:], 1),
            _three(out.shape[2:], 1),
            _three(weight.shape[2:], 1),
            _three(first_shifts, 0),
            _three(shift_steps, 0),
            _three(pixel_steps, 1),
        )


# They differ from layer to layer, and are no strides of memory: nothing is gained by a kernel for each.
UNSPECIALISED = list(Geometry._fields)


def _three(values: Sequence[int], missing: int) -> Three:
    return (*(missing,) * (3 - len(values)), *values)


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Of (batch or out, channel, depth, height, width); 0 for dimensions that the tensor lacks."""
    first, channel, *spatial = tensor.stride()
    return (first, channel, *(0,) * (3 - len(spatial)), *spatial)


def is_far(*tensors: Tensor) -> bool:
    """Whether offsets within a tensor, with some room for what lies outside, may pass 2^31 elements."""
    return any(
        max(t.numel(), sum(size * stride for size, stride in zip(t.shape, t.stride(), strict=True))) >= 1 << 30
        for t in tensors
    )


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
def is_inside(d, h, w, sizes, DIMENSIONS: tl.constexpr):
    """Whether input pixels exist; the dimensions before the last DIMENSIONS have one pixel, and no shift."""
    inside = (w >= 0) & (w < sizes[2])
    if DIMENSIONS >= 2:
        inside = inside & (h >= 0) & (h < sizes[1])
    if DIMENSIONS >= 3:
        inside = inside & (d >= 0) & (d < sizes[0])
    return inside


@triton.jit
def place(n, d, h, w, strides):
    """The offset of pixels in a tensor of strides (batch, channel, depth, height, width), at channel 0."""
    return n * strides[0] + d * strides[2] + h * strides[3] + w * strides[4]


@triton.jit
def jump(t_d, t_h, t_w, steps, strides):
    """The scalar offset, in 64 bits, from the first tap's input pixel to that of a tap."""
    return (
        tl.cast(t_d * steps[0], tl.int64) * strides[2]
        + tl.cast(t_h * steps[1], tl.int64) * strides[3]
        + tl.cast(t_w * steps[2], tl.int64) * strides[4]
    )
