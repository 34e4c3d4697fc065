"""What the backends for GPUs have in common on the host: operands, and how they are multiplied."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_kernels import _ops


def kernels_of(backend: str, ops: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """The implementation of each of ``ops`` in a backend's package, which is imported at the first call."""

    def run(op: str, *arguments: Any, **options: Any) -> Any:
        return getattr(module_of(backend, op), op)(*arguments, **options)

    return {op: functools.partial(run, op) for op in ops}


@functools.cache
def module_of(backend: str, op: str) -> Any:
    """The module of a backend's package that has ``op``."""
    return importlib.import_module(f"{backend}.{'linear' if 'linear' in op else 'conv'}")


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


class Asked(NamedTuple):
    """What a wgrad is asked for, and where it goes.

    Attributes:
        weights: the sources' gradients; anything where none is asked for.
        coefficients: their gradients.
        biases: their gradients.
        weights_mask: which sources' gradients are asked for.
        added: which of them are added to what ``weights`` holds.
        coefficients_mask: whether the coefficients' are.
        biases_mask: which biases' are.
    """

    weights: list[Tensor]
    coefficients: Tensor
    biases: list[Tensor]
    weights_mask: Sequence[bool]
    added: Sequence[bool]
    coefficients_mask: bool
    biases_mask: Sequence[bool]

    @classmethod
    def of(
        cls,
        like: Callable[[Tensor], Tensor],
        weights: Sequence[Tensor],
        coefficients: Tensor,
        biases: Sequence[Tensor] | None,
        weights_mask: Sequence[bool],
        coefficients_mask: bool,
        biases_mask: Sequence[bool],
        into: Sequence[Tensor | None] | None,
    ) -> Asked:
        """For the arguments of a wgrad; ``like`` allocates a gradient, unless ``into`` has the place to add it to."""
        into = into or [None] * len(weights)
        new = [wanted and to is None for wanted, to in zip(weights_mask, into, strict=True)]
        made = _ops.empty_gradients(like, weights, coefficients, biases, new, coefficients_mask, biases_mask)
        places = [empty if to is None else to for empty, to in zip(made[0], into, strict=True)]
        added = [to is not None for to in into]
        return cls(places, made[1], made[2], weights_mask, added, coefficients_mask, biases_mask)

    @property
    def product(self) -> bool:
        """Whether anything asked for needs G."""
        return any(self.weights_mask) or self.coefficients_mask

    def sums(self, biases: Sequence[Tensor] | None) -> bool:
        """Whether anything asked for needs dy's sums over everything but its channels."""
        return any(self.biases_mask) or (self.coefficients_mask and biases is not None)

    @property
    def outputs(self) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """What the op returns."""
        return self.weights, self.coefficients, self.biases


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
