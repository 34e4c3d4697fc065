"""What kernels take, laid out as in ``csrc/cuda/params.h``, filled from tensors.

Arrays of strides are made once for each layout and kept: they are copied where a struct takes them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from torch import Tensor

from rl_kernels.backends.cuda import extension
from rl_kernels.backends.gpu.convolution import Correlation
from rl_kernels.backends.gpu.heuristics import cdiv
from rl_kernels.backends.gpu.operands import StridedRecipe, strides_of

MAX_SOURCES = 4
"""How many sources the kernels' structs have room for."""
COPIED_BYTES = 16
"""Bytes in one vectorised copy; the address must be aligned to it."""

_Three, _Five = ctypes.c_int32 * 3, ctypes.c_int64 * 5
_Addresses, _Offsets, _Strides = ctypes.c_uint64 * MAX_SOURCES, ctypes.c_int64 * MAX_SOURCES, _Five * MAX_SOURCES


class Divisor(ctypes.Structure):
    """What kernels divide numbers below 2^31 by: as a product and a shift."""

    _fields_ = [("divisor", ctypes.c_uint32), ("multiplier", ctypes.c_uint32), ("shift", ctypes.c_uint32)]

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        """For a divisor from 1 on; 0, by which nothing is divided, counts as 1."""
        if divisor <= 1:
            return cls(1, 0, 0)
        bits = (divisor - 1).bit_length()
        return cls(divisor, cdiv(1 << (31 + bits), divisor), bits - 1)


_Divisors = Divisor * 3


class CorrelationParams(ctypes.Structure):
    """``Correlation``."""

    _fields_ = [
        ("sizes", _Three),
        ("taps", _Three),
        ("first_shifts", _Three),
        ("shift_steps", _Three),
        ("pixel_steps", _Three),
        ("by_channels", Divisor),
        ("by_taps", _Divisors),
        ("by_out_sizes", _Divisors),
    ]

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(cls, correlation: Correlation, channels: int) -> CorrelationParams:
        """With positions of the sum that have so many channels innermost. Not to be changed: it is kept."""
        return cls(
            _Three(*correlation.sizes),
            _Three(*correlation.taps),
            _Three(*correlation.first_shifts),
            _Three(*correlation.shift_steps),
            _Three(*correlation.pixel_steps),
            Divisor.of(channels),
            _Divisors(*map(Divisor.of, correlation.taps)),
            _Divisors(*map(Divisor.of, correlation.out_sizes)),
        )


class RecipeParams(ctypes.Structure):
    """``Recipe``."""

    _fields_ = [
        ("weights", _Addresses),
        ("coefficients", ctypes.c_uint64),
        ("strides", _Strides),
        ("group_strides", _Offsets),
        ("source_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        ("sources", ctypes.c_int32),
        ("vectors", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, recipe: StridedRecipe, groups: int, whole: int | None, transposed: bool = False) -> RecipeParams:
        """For (feature, channel, ...), or, transposed, dgrad's; ``whole`` as in ``is_vector``."""
        weights = recipe.weights
        return cls(
            addresses(weights),
            extension.address(recipe.coefficients),
            _strides(recipe.strides_of_features(transposed)),
            group_strides(weights, groups),
            *recipe.strides,
            len(weights),
            vectors(weights, whole),
        )


class ProductParams(ctypes.Structure):
    """``Product``."""

    _fields_ = [
        ("recipe", RecipeParams),
        ("biases", _Addresses),
        ("bias_strides", _Offsets),
        ("activation", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("activation_strides", _Five),
        ("out_strides", _Five),
        ("correlation", CorrelationParams),
        ("pixels", ctypes.c_int32),
        ("features", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("vector_activation", ctypes.c_int32),
        ("vector_out", ctypes.c_int32),
    ]


class ProductReductionParams(ctypes.Structure):
    """``ProductReduction``."""

    _fields_ = [("product", ProductParams), ("partial", ctypes.c_uint64)]


class WgradParams(ctypes.Structure):
    """``Wgrad``."""

    _fields_ = [
        ("recipe", RecipeParams),
        ("gradients", _Addresses),
        ("gradient_strides", _Strides),
        ("gradient_group_strides", _Offsets),
        ("dots", ctypes.c_uint64),
        ("partial", ctypes.c_uint64),
        ("dy", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("dy_strides", _Five),
        ("x_strides", _Five),
        ("correlation", CorrelationParams),
        ("pixels", ctypes.c_int32),
        ("features", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("vector_dy", ctypes.c_int32),
        ("vector_x", ctypes.c_int32),
        ("vector_gradients", ctypes.c_int32),
        ("added", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("per_channel", ctypes.c_int32),
    ]


# Of up to MAX_SOURCES tensors: 0 where there is none.


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_uint64]:
    """The tensors' addresses."""
    address = extension.address
    return _Addresses(*[0 if tensor is None else address(tensor) for tensor in tensors])


def all_strides(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.Array[ctypes.c_int64]]:
    """The tensors' strides, as ``strides_of``."""
    return _strides(tuple([() if tensor is None else strides_of(tensor) for tensor in tensors]))


def vector_strides(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """From element to element of vectors."""
    return _offsets(tuple([tensor.stride(0) for tensor in tensors]))


def group_strides(weights: Sequence[Tensor | None], groups: int) -> ctypes.Array[ctypes.c_int64]:
    """From a group's part of each weight, or gradient, to the next one's."""
    if groups == 1:
        return _offsets(())
    return _offsets(tuple([0 if w is None else w.shape[0] // groups * w.stride(0) for w in weights]))


def vectors(tensors: Sequence[Tensor | None], whole: int | None = None) -> int:
    """Bit j: ``is_vector`` of tensor j."""
    return sum([1 << j for j, tensor in enumerate(tensors) if tensor is not None and is_vector(tensor, whole)])


def strides5(tensor: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The strides of one tensor, as ``strides_of``."""
    return _five(strides_of(tensor))


def is_vector(tensor: Tensor, whole: int | None = None) -> bool:
    """Whether COPIED_BYTES of a tensor may be copied at once, along its channels (dimension 1).

    Args:
        tensor: of (batch or out, channel, *spatial).
        whole: a number of channels that has to be a multiple of what is copied; None for any.
    """
    aligned = extension.address(tensor) % COPIED_BYTES == 0
    return aligned and _is_vector(tensor.shape, tensor.stride(), COPIED_BYTES // tensor.element_size(), whole)


@functools.lru_cache(maxsize=4096)
def _is_vector(shape: Sequence[int], strides: Sequence[int], chunk: int, whole: int | None) -> bool:
    if strides[1] != 1 or (whole is not None and whole % chunk != 0):
        return False
    apart = (stride for i, (size, stride) in enumerate(zip(shape, strides, strict=True)) if i != 1 and size > 1)
    return all(stride % chunk == 0 for stride in apart)


@functools.lru_cache(maxsize=4096)
def _five(strides: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return _Five(*strides)


@functools.lru_cache(maxsize=4096)
def _offsets(strides: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return _Offsets(*strides)


@functools.lru_cache(maxsize=4096)
def _strides(strides: tuple[tuple[int, ...], ...]) -> ctypes.Array[ctypes.Array[ctypes.c_int64]]:
    return _Strides(*map(_five, strides))
