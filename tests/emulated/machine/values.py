"""The types of PTX: how the raw bits of registers are read as numbers, and written. Lanes come first."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulated.machine.memory import RAW, Array


@dataclass(frozen=True)
class Type:
    """decode: raw unsigned bits to numbers; encode: numbers to raw bits, rounded to nearest even."""

    name: str
    bits: int
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]

    @property
    def raw(self) -> np.dtype[Any]:
        return RAW[max(self.bits, 8) // 8]

    @property
    def floating(self) -> bool:
        return "f" in self.name

    @property
    def signed(self) -> bool:
        return self.name.startswith("s")


def bf16_bits(values: Array) -> Array:
    """Round float32 to the upper 16 bits; a NaN stays one."""
    values = values.astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _view(bits: int, dtype: type) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    raw = RAW[bits // 8]
    return lambda array: array.view(dtype), lambda values: np.ascontiguousarray(values.astype(dtype)).view(raw)


def _pair(one: Type) -> Type:
    """Two of a type in a register, the first in the lower half."""

    def decode(raw: Array) -> Array:
        return one.decode(np.ascontiguousarray(raw).view(np.uint16).reshape(-1, 2))

    def encode(values: Array) -> Array:
        return np.ascontiguousarray(one.encode(values)).view(np.uint32)[:, 0]

    return Type(one.name + "x2", 32, decode, encode)


TYPES: dict[str, Type] = {}
for _bits in (8, 16, 32, 64):
    for _kind, _signed in (("b", "uint"), ("u", "uint"), ("s", "int")):
        TYPES[f"{_kind}{_bits}"] = Type(f"{_kind}{_bits}", _bits, *_view(_bits, getattr(np, f"{_signed}{_bits}")))
for _bits in (16, 32, 64):
    TYPES[f"f{_bits}"] = Type(f"f{_bits}", _bits, *_view(_bits, getattr(np, f"float{_bits}")))
TYPES["bf16"] = Type("bf16", 16, bf16_values, bf16_bits)
TYPES["tf32"] = Type(
    "tf32", 32, lambda raw: (raw & np.uint32(0xFFFFE000)).view(np.float32), lambda values: TYPES["f32"].encode(values)
)
TYPES["f16x2"], TYPES["bf16x2"] = _pair(TYPES["f16"]), _pair(TYPES["bf16"])
TYPES["pred"] = Type("pred", 1, lambda raw: raw.astype(bool), lambda values: values.astype(np.uint8))


def literal(text: str, type: Type) -> Array | None:
    """4.5: the raw bits of a number, for 32 lanes; None if the text is not one."""
    bits = max(type.bits, 8)
    try:
        if text[:2] in ("0f", "0F", "0d", "0D"):
            number = struct.unpack(">f" if text[1] in "fF" else ">d", bytes.fromhex(text[2:]))[0]
            if not type.floating:  # As it stands.
                return np.full(32, int(text[2:], 16), np.uint64).astype(type.raw)
        elif type.floating and "." in text:
            number = float(text)
        else:
            digits = text.removesuffix("U")
            octal = digits.lstrip("-").startswith("0") and digits.lstrip("-").isdigit()
            whole = int(digits, 8) if octal else int(digits, 0)
            return np.full(32, whole % (1 << bits), np.uint64).astype(type.raw)
    except ValueError:
        return None
    with np.errstate(all="ignore"):
        one = np.array([number, number] if type.name.endswith("x2") else number)
        return np.broadcast_to(type.encode(np.stack([one] * 32)), 32).copy()
