"""What kernels take, laid out as in ``csrc/cuda/params.h``, filled from tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from torch import Tensor

from rl_kernels.backends.cuda import extension
from rl_kernels.backends.gpu.convolution import Geometry
from rl_kernels.backends.gpu.heuristics import cdiv
from rl_kernels.backends.gpu.operands import Recipe, bits, strides_of

MOST_SOURCES = 4
COPIED_BYTES = 16
"""That are copied at once where they lie together, from an address that is a multiple of them."""

_Three, _Five = ctypes.c_int32 * 3, ctypes.c_int64 * 5
_Addresses, _Offsets, _Strides = ctypes.c_uint64 * MOST_SOURCES, ctypes.c_int64 * MOST_SOURCES, _Five * MOST_SOURCES


class Divisor(ctypes.Structure):
    """By which kernels divide numbers below 2^31: a product and a shift."""

    _fields_ = [("divisor", ctypes.c_uint32), ("multiplier", ctypes.c_uint32), ("shift", ctypes.c_uint32)]

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        """For a divisor from 1 on; 0, by which nothing is divided, counts as 1."""
        if divisor <= 1:
            return cls(1, 0, 0)
        bits = (divisor - 1).bit_length()
        return cls(divisor, cdiv(1 << (31 + bits), divisor), bits - 1)


_Divisors = Divisor * 3


class GeometryParams(ctypes.Structure):
    """``Geometry``."""

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
    def of(cls, geometry: Geometry, channels: int) -> GeometryParams:
        """With positions of the sum that have so many channels innermost. Not to be changed: it is kept."""
        return cls(
            _Three(*geometry.sizes),
            _Three(*geometry.taps),
            _Three(*geometry.first_shifts),
            _Three(*geometry.shift_steps),
            _Three(*geometry.pixel_steps),
            Divisor.of(channels),
            _Divisors(*map(Divisor.of, geometry.taps)),
            _Divisors(*map(Divisor.of, geometry.out_sizes)),
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
    def of(cls, recipe: Recipe, groups: int, transposed: bool, channels: int, taps: int) -> RecipeParams:
        """For (feature, channel, ...), or, transposed, dgrad's; so many channels of a group are summed over."""
        whole = channels if taps > 1 and not transposed else None
        vectors = bits([is_vector(weight, whole) for weight in recipe.weights])
        return cls(
            addresses(recipe.weights),
            extension.address(recipe.coefficients),
            _Strides(*(_Five(*steps) for steps in recipe.strides_of_features(transposed))),
            group_strides(recipe.weights, groups),
            *recipe.strides,
            len(recipe.weights),
            vectors,
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
        ("geometry", GeometryParams),
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
        ("geometry", GeometryParams),
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


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_uint64]:
    """Of up to MOST_SOURCES tensors; 0 where there is none."""
    return _Addresses(*(0 if tensor is None else extension.address(tensor) for tensor in tensors))


def strides5(tensor: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """As ``strides_of``."""
    return _Five(*strides_of(tensor))


def all_strides(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.Array[ctypes.c_int64]]:
    """Of up to MOST_SOURCES tensors, as ``strides_of``; 0 where there is none."""
    return _Strides(*(_Five() if tensor is None else strides5(tensor) for tensor in tensors))


def vector_strides(vectors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """Of up to MOST_SOURCES vectors."""
    return _Offsets(*(vector.stride(0) for vector in vectors))


def group_strides(weights: Sequence[Tensor | None], groups: int) -> ctypes.Array[ctypes.c_int64]:
    """From a group's part of each weight, or gradient, to the next one's."""
    return _Offsets(*(0 if w is None else w.shape[0] // groups * w.stride(0) for w in weights))


def is_vector(tensor: Tensor, whole: int | None = None) -> bool:
    """Whether COPIED_BYTES of a tensor may be copied at once, along its channels (dimension 1).

    Args:
        tensor: of (batch or out, channel, *spatial).
        whole: a number of channels that has to be a multiple of what is copied; None for any.
    """
    chunk = COPIED_BYTES // tensor.element_size()
    apart = all(
        stride % chunk == 0
        for i, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if i != 1 and size > 1
    )
    return (
        tensor.stride(1) == 1
        and apart
        and (whole is None or whole % chunk == 0)
        and extension.address(tensor) % COPIED_BYTES == 0
    )
