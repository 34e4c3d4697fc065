"""Operands as GPU kernels take them: strides, addresses' reach, gradients' buffers, arithmetic."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_kernels.ops.shapes import empty_gradients
from rl_kernels.ops.values import Gradients, Outer, Recipe, Wanted


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides of (batch or out, channel, depth, height, width); 0 for dimensions that the tensor lacks."""
    return _five(tensor.stride())


def _five(strides: tuple[int, ...]) -> tuple[int, ...]:
    return strides[:2] + (0,) * (5 - len(strides)) + strides[2:]


def is_far(*tensors: Tensor) -> bool:
    """Whether offsets within a tensor, with some room for what lies outside, may pass 2^31 elements."""
    return any([max(t.numel(), sum(map(operator.mul, t.shape, t.stride()))) >= 1 << 30 for t in tensors])


class StridedRecipe:
    """A recipe, and how its tensors lie.

    Attributes:
        weights: the sources.
        weight_strides: of each source, as ``strides_of``.
        coefficients: ``(N,)`` or ``(N, out)``; of ``Outer`` ones left, ``(N, R, out)``, and right, shaped as
            ``(N, R, in, *taps)``.
        biases: N vectors, or None.
        per_channel: whether each output channel has coefficients of its own.
        rank: R, of ``Outer`` coefficients; 0 of others.
        terms: N * R, the products that a coefficient of each source is summed from.
        strides: of the coefficients, from source to source and from channel to channel; of ``Outer`` ones from source
            to source, in the rank, from channel to channel, as the weights' from input to input and tap to tap; then R.
        bytes: of one element of every source.
    """

    def __init__(self, recipe: Recipe, taps: Sequence[slice] = ()):
        """``taps``: which of a filter's are meant, in each of its dimensions; without them all."""
        # This is built anew in every eager call: lists, which are faster than generators.
        weights, coefficients, self.biases = recipe
        whole = weights[0].shape
        if taps:
            weights = [weight[(slice(None), slice(None), *taps)] for weight in weights]
        self.weights = tuple(weights)
        self.weight_strides = tuple([strides_of(weight) for weight in weights])
        self.bytes = sum([weight.element_size() for weight in weights])
        self.coefficients: Tensor | tuple[Tensor, Tensor] = coefficients
        strides = coefficients.stride()
        self.per_channel, self.rank = len(strides) == 2, 0
        self.strides: tuple[int, ...] = strides if self.per_channel else (strides[0], 0)
        if recipe.is_outer:
            left, right = Outer.of(coefficients, whole[0])
            right = right.unflatten(-1, whole[1:])
            right = right[(slice(None), slice(None), slice(None), *taps)] if taps else right
            self.coefficients, self.rank = (left, right), left.shape[1]
            self.strides = (*left.stride(), *_five(right.stride()[1:])[1:], self.rank)
        self.terms = len(self.weights) * self.rank

    def strides_of_features(self, transposed: bool) -> tuple[tuple[int, ...], ...]:
        """Strides of (feature, channel, depth, height, width), for W or, transposed, for the recipe of dgrad."""
        if not transposed:
            return self.weight_strides
        return tuple((within, out, *taps) for out, within, *taps in self.weight_strides)

    def vectors(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The biases and their strides; stand-ins that are not read where there are none."""
        if self.biases is None:
            return self.weights, (0,) * len(self.weights)
        return tuple(self.biases), tuple([bias.stride(0) for bias in self.biases])


class GradientBuffers(NamedTuple):
    """Where a wgrad writes.

    Attributes:
        gradients: what the op returns; the buffer of a source may be one of ``into``. Of what is not wanted: anything.
        wanted: which of them are written.
        added: of which sources they are added to what the buffer holds.
    """

    gradients: Gradients
    wanted: Wanted
    added: Sequence[bool]

    @classmethod
    def of(
        cls,
        like: Callable[[Tensor], Tensor],
        recipe: Recipe,
        wanted: Wanted,
        into: Sequence[Tensor | None] | None,
    ) -> GradientBuffers:
        """For the arguments of a wgrad; ``like`` allocates a gradient, unless ``into`` has one to add to."""
        if into is None:
            return cls(empty_gradients(like, recipe, wanted), wanted, [False] * len(recipe.weights))
        new = [want and buffer is None for want, buffer in zip(wanted.weights, into, strict=True)]
        made = empty_gradients(like, recipe, wanted._replace(weights=new))
        weights = [empty if buffer is None else buffer for empty, buffer in zip(made.weights, into, strict=True)]
        return cls(made._replace(weights=weights), wanted, [buffer is not None for buffer in into])


def bits(mask: Sequence[bool]) -> int:
    """A mask as an integer, bit j for element j."""
    return sum([1 << j for j, wanted in enumerate(mask) if wanted])


def is_wide(farthest_stride: int) -> bool:
    """Whether offsets within a tile, of at most 256 in a direction, may pass 2^31 elements."""
    return farthest_stride * 512 >= 1 << 31


class Arithmetic(NamedTuple):
    """How products are computed.

    Attributes:
        precision: of float32 operands, as Triton names it; ``"ieee"`` for other types, which have one only.
        slowness: how much longer products take than in 16 bits.
    """

    precision: str
    slowness: float


HALF, TF32, IEEE = Arithmetic("ieee", 1.0), Arithmetic("tf32", 2.0), Arithmetic("ieee", 16.0)


def arithmetic(dtype: torch.dtype, convolution: bool) -> Arithmetic:
    """For operands of ``dtype``; float32 by torch's own switches, which differ for convolutions."""
    if dtype != torch.float32:
        return HALF
    switches: Any = torch.backends.cudnn if convolution else torch.backends.cuda.matmul
    newer = getattr(switches, "conv", switches)
    if hasattr(newer, "fp32_precision"):  # torch 2.9, which raises where a user sets this one and the older is read.
        return TF32 if newer.fp32_precision == "tf32" else IEEE
    return TF32 if switches.allow_tf32 else IEEE


_HERE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's device, which need not be the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE
