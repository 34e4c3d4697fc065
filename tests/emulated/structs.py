"""The structs that kernels take, laid out as in ``csrc/cuda/params.h`` and ``finish_params.h``: to read launches by."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

MAX_SOURCES = 4

_Three, _Five = ctypes.c_int32 * 3, ctypes.c_int64 * 5


class Address(ctypes.Structure):
    """Where a tensor begins on the device; a type of its own, so that addresses are found in a struct."""

    _fields_ = (("value", ctypes.c_uint64),)


_Addresses, _Offsets, _Strides = Address * MAX_SOURCES, ctypes.c_int64 * MAX_SOURCES, _Five * MAX_SOURCES


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int32) for name in names]


class Divisor(ctypes.Structure):
    """What kernels divide numbers below 2^31 by: as a product and a shift."""

    _fields_ = (("divisor", ctypes.c_uint32), ("multiplier", ctypes.c_uint32), ("shift", ctypes.c_uint32))


class Correlation(ctypes.Structure):
    _fields_ = (
        *((name, _Three) for name in ("sizes", "taps", "first_shifts", "shift_steps", "pixel_steps")),
        ("by_channels", Divisor),
        ("by_taps", Divisor * 3),
        ("by_out_sizes", Divisor * 3),
    )


class Recipe(ctypes.Structure):
    _fields_ = (
        ("weights", _Addresses),
        ("coefficients", Address),
        ("strides", _Strides),
        ("group_strides", _Offsets),
        ("source_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        *_integers("sources", "vectors"),
    )


class Product(ctypes.Structure):
    _fields_ = (
        ("recipe", Recipe),
        ("biases", _Addresses),
        ("bias_strides", _Offsets),
        ("activation", Address),
        ("out", Address),
        ("activation_strides", _Five),
        ("out_strides", _Five),
        ("correlation", Correlation),
        *_integers("pixels", "features", "channels", "steps", "splits", "stages", "groups"),
        *_integers("vector_activation", "vector_out"),
    )


class ProductReduction(ctypes.Structure):
    _fields_ = (("product", Product), ("partial", Address))


class Wgrad(ctypes.Structure):
    _fields_ = (
        ("recipe", Recipe),
        ("gradients", _Addresses),
        ("gradient_strides", _Strides),
        ("gradient_group_strides", _Offsets),
        *((name, Address) for name in ("dots", "partial", "dy", "x")),
        ("dy_strides", _Five),
        ("x_strides", _Five),
        ("correlation", Correlation),
        *_integers("pixels", "features", "channels", "steps", "splits", "stages", "groups"),
        *_integers("vector_dy", "vector_x", "vector_gradients", "added", "wide", "per_channel"),
    )


class ChannelSums(ctypes.Structure):
    _fields_ = (
        ("dy", Address),
        ("sums", Address),
        ("dy_strides", _Five),
        ("correlation", Correlation),
        *_integers("pixels", "channels", "rows", "vector_dy"),
    )


class Finish(ctypes.Structure):
    _fields_ = (
        *((name, Address) for name in ("dots", "sums", "coefficients", "coefficient_gradients")),
        ("biases", _Addresses),
        ("bias_gradients", _Addresses),
        ("bias_strides", _Offsets),
        ("source_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        *_integers("sources", "parts", "splits", "channels", "per_channel", "totals"),
    )


def struct_of(kernel: str) -> type[ctypes.Structure]:
    """The struct that a kernel takes."""
    if kernel.startswith("finish"):
        return ChannelSums if "sums" in kernel else Finish
    if "wgrad" in kernel:
        return Wgrad
    return ProductReduction if "reduce" in kernel else Product


def addresses(struct: Any, name: str = "") -> Iterator[tuple[str, Address]]:
    """Every address in a struct, with the name of its field; to read or to change."""
    if isinstance(struct, Address):
        yield name, struct
    elif isinstance(struct, ctypes.Structure):
        for field, *_ in struct._fields_:
            yield from addresses(getattr(struct, field), field)
    elif isinstance(struct, ctypes.Array) and issubclass(struct._type_, (ctypes.Structure, ctypes.Array)):
        for j, element in enumerate(struct):
            yield from addresses(element, f"{name}[{j}]")


def owner(tensors: Sequence[Tensor], address: int) -> Tensor | None:
    """The tensor in whose storage an address lies."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
            return tensor
    return None
