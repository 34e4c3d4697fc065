"""What the launches of every kernel have in common."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends.triton.geometry import strides_of
from rl_kernels.backends.triton.heuristics import FLOAT32_CONFIGS, Config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors; as the environment was when this was imported."""


class Recipe:
    """The sources and the coefficients as kernels take them.

    Attributes:
        weights: the sources.
        weight_strides: of each source, as ``strides_of``.
        coefficients: ``(N,)`` or ``(N, out)``.
        per_channel: whether each output channel has coefficients of its own.
        strides: of the coefficients, from source to source and from channel to channel.
        bytes: of one element of every source.
    """

    def __init__(self, weights: Sequence[Tensor], coefficients: Tensor):
        self.weights = tuple(weights)
        self.weight_strides = tuple(strides_of(weight) for weight in weights)
        self.coefficients = coefficients
        self.per_channel = coefficients.dim() == 2
        self.strides = (coefficients.stride(0), coefficients.stride(1) if self.per_channel else 0)
        self.bytes = sum(weight.element_size() for weight in weights)

    def strides_of_features(self, transposed: bool) -> tuple[tuple[int, ...], ...]:
        """Of (feature, channel, depth, height, width), for W or, transposed, for the recipe of dgrad."""
        if not transposed:
            return self.weight_strides
        return tuple((within, out, *taps) for out, within, *taps in self.weight_strides)

    def vectors(self, biases: Sequence[Tensor] | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The biases and their strides; stand-ins that are not read where there are none."""
        if biases is None:
            return self.weights, (0,) * len(self.weights)
        return tuple(biases), tuple(bias.stride(0) for bias in biases)


def bits(mask: Sequence[bool]) -> int:
    """A mask as an integer, bit j for element j."""
    return sum(1 << j for j, wanted in enumerate(mask) if wanted)


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

    def configs(self, usual: tuple[Config, ...]) -> tuple[Config, ...]:
        """The configurations to choose from."""
        return FLOAT32_CONFIGS if self == IEEE else usual


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


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensor's device, which need not be the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
