"""Convolutions as products: their geometry, the phases of a stride, layouts, and those that are linear layers.

Missing dimensions have size 1: everything is three-dimensional. An output pixel p and a tap t meet at the input pixel
``p * pixel_step + first_shift + t * shift_step``, in each dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends.gpu import heuristics
from rl_kernels.ops.shapes import as_rows
from rl_kernels.ops.values import Geometry

Three = tuple[int, ...]


class Correlation(NamedTuple):
    """A product summed over taps, as kernels take it: forward, dgrad and wgrad alike. (depth, height, width) each.

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
    ) -> Correlation:
        """For an input (batch, channels, *sizes), an output alike and a filter (out, in, *taps)."""
        return cls(
            _three(activation.shape[2:], 1),
            _three(out.shape[2:], 1),
            _three(weight.shape[2:], 1),
            _three(first_shifts, 0),
            _three(shift_steps, 0),
            _three(pixel_steps, 1),
        )

    @classmethod
    def of_forward(cls, x: Tensor, y: Tensor, weight: Tensor, geometry: Geometry) -> Correlation:
        """For a convolution from x to y; its wgrad goes over the same pairs of pixels."""
        shifts = [-pad for pad in geometry.padding]
        return cls.of(x, y, weight, shifts, geometry.dilation, geometry.stride)

    @classmethod
    def of_linear(cls, x: Tensor, y: Tensor, weight: Tensor) -> Correlation:
        """For a linear layer: one tap, and rows as images of one pixel."""
        return cls.of(x, y, weight, (), (), ())


def _three(values: Sequence[int], missing: int) -> Three:
    return (*(missing,) * (3 - len(values)), *values)


def phases(
    kernel: Sequence[int], geometry: Geometry
) -> Iterator[tuple[list[slice], list[slice], list[int], list[int]]]:
    """For each phase of the stride: the pixels of dx, the taps that meet them, and where these find their dy."""
    stride, padding, dilation, _ = geometry
    for at in itertools.product(*(range(step) for step in stride)):
        pixels, taps, shifts, shift_steps = [], [], [], []
        for position, size, step, pad, dil in zip(at, kernel, stride, padding, dilation, strict=True):
            apart = step // math.gcd(step, dil)
            meets = (tap for tap in range(min(apart, size)) if (position + pad - tap * dil) % step == 0)
            first = next(meets, size)
            pixels.append(slice(position, None, step))
            taps.append(slice(first, None, apart))
            shifts.append((position + pad - first * dil) // step)
            shift_steps.append(-apart * dil // step)
        yield pixels, taps, shifts, shift_steps


def parts(out: Tensor, activation: Tensor, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a batch that run at a time: of the output, and of the activation as it is to be read."""
    images = images_at_a_time(activation.shape[1] // groups, activation)
    if images == 0:
        yield out, activation
    for first in range(0, activation.shape[0] if images else 0, images or 1):
        part = slice(first, first + images)
        yield out[part], channels_innermost(activation[part])


def images_at_a_time(channels: int, *activations: Tensor) -> int:
    """How many images of a batch to copy at a time into an order with channels innermost; 0: none.

    A tile whose channels lie apart is gathered element by element, anew for every tap. One copy, of what fits into the
    workspace, costs less unless there are few channels a group.
    """
    elements = sum(tensor[0].numel() for tensor in activations if tensor.stride(1) != 1 and tensor.shape[0] > 0)
    if channels < heuristics.MIN_DEPTH or elements == 0:
        return 0
    return min(heuristics.WORKSPACE_BYTES // (elements * activations[0].element_size()), activations[0].shape[0])


def channels_innermost(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def is_product(weight: Tensor, geometry: Geometry, *activations: Tensor) -> bool:
    """Whether a convolution is a product of (pixels, channels), for activations that can be seen so."""
    stride, padding, _, groups = geometry
    points = groups == 1 and math.prod(weight.shape[2:]) == 1 and set(stride) == {1} and set(padding) == {0}
    return points and all(tensor.movedim(1, -1).is_contiguous() for tensor in activations)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight of one tap as (out, in)."""
    for _ in range(weight.dim() - 2):
        weight = weight.select(-1, 0)
    return weight


def as_pixels(tensor: Tensor) -> Tensor:
    """(batch, channels, *spatial), with channels innermost, as (pixels, channels)."""
    return as_rows(tensor.movedim(1, -1))


def as_filter(matrix: Tensor, dimensions: int, memory_format: torch.memory_format) -> Tensor:
    """(out, in), contiguous, as a weight of one tap, with the strides of its memory format."""
    rows, columns = matrix.shape
    ones = (1,) * dimensions
    if memory_format == torch.contiguous_format:
        return matrix.view(rows, columns, *ones)
    return matrix.view(rows, *ones, columns).movedim(-1, 1)
