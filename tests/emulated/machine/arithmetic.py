"""Arithmetic, comparison, moves and conversion: PTX ISA 9.7.1 - 9.7.9."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulated.machine.instructions import Decoder, Run, family
from tests.emulated.machine.machine import Warp
from tests.emulated.machine.memory import LOCAL, REGION, SHARED, WINDOW, Array
from tests.emulated.machine.values import TYPES


def _high(a: Array, b: Array) -> Array:
    bits = a.dtype.itemsize * 8
    product = [int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)]
    return np.array(product, a.dtype)


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero; of a division by zero, all ones."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), (a - np.fmod(a, safe)) // safe).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))).astype(a.dtype)


def _fused(a: Array, b: Array, c: Array) -> Array:
    """One rounding, but for the rare ties of the wider type's own."""
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


BINARY: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
UNARY: dict[str, Callable[..., Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def _rounded(d: Decoder, function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    """The function of float32 under .rz, .rm or .rp: the neighbour of the nearest number if that is beyond."""
    mode = next((m for m in d.has if m in ("rz", "rm", "rp")), None)
    if mode is None:
        return function
    if kind != "f32":
        raise d.error(f".{mode} is not supported")

    def directed(*operands: Array) -> Array:
        exact = function(*(operand.astype(np.float64) for operand in operands))
        toward = {"rz": np.zeros_like(exact), "rm": np.full_like(exact, -np.inf), "rp": np.full_like(exact, np.inf)}
        near = exact.astype(np.float32)
        beyond = {"rz": np.abs(near) > np.abs(exact), "rm": near > exact, "rp": near < exact}[mode]
        return np.where(beyond, np.nextafter(near, toward[mode].astype(np.float32)), near)

    return directed


@family("add", "sub", "min", "max")
def _binary(d: Decoder) -> Run:
    d.refuse("cc", "xorsign")
    kind = d.types[-1]
    function = BINARY[d.source.opcode]
    if TYPES[kind].floating and "NaN" not in d.has:
        function = {"min": np.fmin, "max": np.fmax}.get(d.source.opcode, function)
    if len(d.types) > 1:
        raise d.error("operands of several types are not supported")
    function = _saturated(d, _rounded(d, function, kind), kind)
    return d.elementwise(function, kind, *[kind] * (len(d.operands) - 1))


def _saturated(d: Decoder, function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    if "sat" not in d.has:
        return function
    if TYPES[kind].floating:
        return lambda *o: np.clip(np.nan_to_num(function(*o), nan=0.0), 0, 1)
    return lambda *o: np.clip(function(*(x.astype(np.int64) for x in o)), -(2**31), 2**31 - 1)


@family(*UNARY)
def _unary(d: Decoder) -> Run:
    d.refuse("rz", "rm", "rp")
    return d.elementwise(UNARY[d.source.opcode], d.types[-1], d.types[-1])


@family("mul", "mad", "fma")
def _multiply(d: Decoder) -> Run:
    """9.7.1.3 - 4: .lo, .hi and .wide of integers; 9.7.3: floating point, a mad of which is fused too."""
    d.refuse("cc", "relu")
    kind = d.types[-1]
    type, adds = TYPES[kind], d.source.opcode != "mul"
    if type.floating:
        function = _saturated(d, _rounded(d, _fused if adds else np.multiply, kind), kind)
        return d.elementwise(function, kind, *[kind] * (2 + adds))
    if "wide" in d.has:
        wide = f"{kind[0]}{2 * type.bits}"
        target = TYPES[wide].decode(np.zeros(1, TYPES[wide].raw)).dtype
        kinds = [kind, kind, wide][: 2 + adds]
        return d.elementwise(
            lambda a, b, c=None: a.astype(target) * b.astype(target) + (0 if c is None else c), wide, *kinds
        )
    product = _high if "hi" in d.has else np.multiply
    return d.elementwise(lambda a, b, c=None: product(a, b) + (0 if c is None else c), kind, *[kind] * (2 + adds))


@family("div", "rem")
def _divide(d: Decoder) -> Run:
    kind = d.types[-1]
    integer = _quotient if d.source.opcode == "div" else _remainder
    return d.elementwise(_rounded(d, np.divide, kind) if TYPES[kind].floating else integer, kind, kind, kind)


@family("and", "or", "xor", "not", "cnot")
def _logic(d: Decoder) -> Run:
    kind = d.types[-1]
    table: dict[str, Callable[..., Array]] = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
        "cnot": lambda a: a == 0,
    }
    return d.elementwise(table[d.source.opcode], kind, *[kind] * (len(d.operands) - 1))


@family("shl", "shr")
def _shift(d: Decoder) -> Run:
    """9.7.8.8 - 9: amounts beyond the width shift all bits out."""
    kind, right = d.types[-1], d.source.opcode == "shr"
    bits = TYPES[kind].bits

    def function(a: Array, amount: Array) -> Array:
        by = np.minimum(amount, bits - 1).astype(a.dtype)
        shifted = a >> by if right else a << by
        return shifted if TYPES[kind].signed and right else np.where(amount >= bits, 0, shifted).astype(a.dtype)

    return d.elementwise(function, kind, kind, "u32")


@family("shf")
def _funnel(d: Decoder) -> Run:
    """9.7.8.7: of the 64 bits b:a."""

    def function(a: Array, b: Array, c: Array) -> Array:
        by = (np.minimum(c, 32) if "clamp" in d.has else c & 31).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        return both >> by if "r" in d.has else (both << by) >> np.uint64(32)

    return d.elementwise(function, "b32", "b32", "b32", "u32")


@family("lop3")
def _lop3(d: Decoder) -> Run:
    """9.7.8.6: by a table of the eight cases of three bits."""
    table = int(str(d.operands[4]), 0)

    def function(*operands: Array) -> Array:
        out = np.zeros(32, np.uint32)
        for case in range(8):
            if table >> case & 1:
                a, b, c = (x if case >> (2 - i) & 1 else ~x for i, x in enumerate(operands))
                out |= a & b & c
        return out

    d.operands = d.operands[:4]
    return d.elementwise(function, "b32", "b32", "b32", "b32")


@family("bfe", "bfi", "bfind", "popc", "clz", "brev")
def _bits(d: Decoder) -> Run:
    """9.7.1.12 - 20: bit fields and counts, a lane at a time."""
    kind, opcode = d.types[-1], d.source.opcode
    bits, signed = TYPES[kind].bits, TYPES[kind].signed

    def bfe(a: int, place: int, length: int) -> int:
        place, length = place & 255, length & 255
        field = (a if signed else a & ((1 << bits) - 1)) >> place & ((1 << length) - 1)
        top = min(place + length - 1, bits - 1)
        negative = signed and length > 0 and a >> top & 1
        return field - (1 << length) if negative else field

    def bfi(a: int, b: int, place: int, length: int) -> int:
        mask = (((1 << (length & 255)) - 1) << (place & 255)) & ((1 << bits) - 1)
        return (b & ~mask) | (a << (place & 255) & mask)

    table: dict[str, tuple[Callable[..., int], list[str], str]] = {
        "bfe": (bfe, [kind, "u32", "u32"], kind),
        "bfi": (bfi, [kind, kind, "u32", "u32"], kind),
        "bfind": (lambda a: (a if a >= 0 else ~a).bit_length() - 1, [kind], "u32"),
        "popc": (lambda a: a.bit_count(), [kind], "u32"),
        "clz": (lambda a: bits - a.bit_length(), [kind], "u32"),
        "brev": (lambda a: int(f"{a:0{bits}b}"[::-1], 2), [kind], kind),
    }
    function, kinds, result = table[opcode]

    def every(*operands: Array) -> Array:
        values = [function(*(int(x) for x in lane)) % (1 << bits) for lane in zip(*operands, strict=True)]
        return np.array(values, np.uint64)

    return d.elementwise(every, result.replace("s", "u"), *kinds)


@family("prmt")
def _permute(d: Decoder) -> Run:
    """9.7.9.7: four bytes of the eight of b:a."""
    d.refuse("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")

    def function(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros(32, np.uint64)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)).astype(np.uint64)
            byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
            out |= np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return out

    return d.elementwise(function, "b32", "b32", "b32", "b32")


# 9.7.6, 9.7.9: comparison, selection, moves and conversion.

ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _comparison(d: Decoder, kind: str) -> Callable[[Array, Array], Array]:
    """Comparisons. Of NaNs, ordered ones are false and unordered ones, as ltu, true."""
    name = next(m for m in d.has if m in ORDERED or m.removesuffix("u") in ORDERED or m in ("num", "nan"))
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    compare = ORDERED[name] if name in ORDERED else ORDERED[name.removesuffix("u")]
    if not TYPES[kind].floating:
        return compare
    if name in ORDERED:
        return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


@family("setp", "set")
def _set(d: Decoder) -> Run:
    """9.7.6: p|q = (a compared with b) and, or, xor c; q is that of the comparison's contrary."""
    kind = d.types[-1]
    compare = _comparison(d, kind)
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = next((joins[m] for m in d.has if m in joins), None)
    a, b = (d.flushing(d.read(operand, kind)) for operand in d.operands[1:3])
    c = d.read(d.operands[3], "pred") if join else None
    if d.source.opcode == "set":
        result = d.types[0]
        ones = 1.0 if TYPES[result].floating else -1
        writes = [d.write(d.operands[0], result)]
    else:
        ones = 0
        writes = [d.write(operand, "pred") for operand in d.vector(d.operands[0])]

    def run(warp: Warp, mask: Array) -> None:
        truth = compare(a(warp), b(warp))
        for i, write in enumerate(writes):
            one = ~truth if i else truth
            if join and c:
                one = join(one, c(warp))
            write(warp, mask, np.where(one, ones, 0) if ones else one)

    return run


@family("selp")
def _select(d: Decoder) -> Run:
    kind = d.types[-1].replace("f", "b")
    return d.elementwise(lambda a, b, p: np.asarray(np.where(p, a, b)), kind, kind, kind, "pred")


@family("mov")
def _move(d: Decoder) -> Run:
    """9.7.9.2 - 3: also packs {low, high} into a register, and the reverse."""
    kind = d.types[-1]
    kind = kind if kind == "pred" else f"b{TYPES[kind].bits}"
    bits = TYPES[kind].bits
    target, source = d.operands
    if isinstance(source, tuple):
        part = bits // len(source)
        reads = [d.read(operand, f"b{part}") for operand in source]
        write = d.write(target, kind)

        def pack(warp: Warp, mask: Array) -> None:
            shifts = (read(warp).astype(np.uint64) << np.uint64(i * part) for i, read in enumerate(reads))
            write(warp, mask, np.bitwise_or.reduce(list(shifts)))

        return pack
    if isinstance(target, tuple):
        part = bits // len(target)
        read = d.read(source, kind)
        writes = [d.write(operand, f"b{part}") for operand in target]

        def unpack(warp: Warp, mask: Array) -> None:
            value = read(warp).astype(np.uint64)
            for i, write in enumerate(writes):
                write(warp, mask, value >> np.uint64(i * part))

        return unpack
    return d.elementwise(lambda a: a, kind, kind)


@family("cvta")
def _generic(d: Decoder) -> Run:
    """9.7.9.20: between a memory's addresses and generic ones."""
    add = np.uint64(WINDOW.get(d.space, 0))
    if "to" in d.has:
        return d.elementwise(lambda a: a.astype(np.uint64) - add, d.types[-1], d.types[-1])
    return d.elementwise(lambda a: a.astype(np.uint64) + add, d.types[-1], d.types[-1])


@family("isspacep")
def _is_space(d: Decoder) -> Run:
    window = {"shared": SHARED, "local": LOCAL}.get(d.space, -1)

    def function(a: Array) -> Array:
        region = a.astype(np.int64) >> REGION
        return region == window if window >= 0 else region > LOCAL

    return d.elementwise(function, "pred", "u64")


INTEGRAL: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@family("cvt")
def _convert(d: Decoder) -> Run:
    """9.7.9.21: the result's type comes first; packed results take the upper half from the first operand."""
    d.refuse("rm", "rp", "rs", "relu", "satfinite", "scaled")
    result, kind = d.types[-2:]
    to, of = TYPES[result], TYPES[kind]
    if result.endswith("x2"):
        d.refuse("rz")
        return d.elementwise(lambda a, b: np.stack([b, a], 1), result, kind, kind)
    if result == "tf32":
        half = np.uint32(0x1000)
        if "rna" not in d.has:
            d.refuse("rn", "rz")
        return d.elementwise(lambda a: (a + half) & np.uint32(0xFFFFE000), "b32", "b32")
    integral = next((INTEGRAL[m] for m in d.has if m in INTEGRAL), None)
    if of.floating and to.floating:
        if "rz" in d.has:
            if (result, kind) != ("bf16", "f32"):
                raise d.error(".rz is not supported")
            return d.elementwise(lambda a: a >> np.uint32(16), "b16", "b32")
        return d.elementwise(_saturated(d, integral or (lambda a: a), result), result, kind)
    if to.floating:
        d.refuse("rz")
        if result == "bf16" and of.bits > 16:
            raise d.error("rounded twice")
        return d.elementwise(_saturated(d, lambda a: a, result), result, kind)
    low, high = (-(1 << to.bits - 1), (1 << to.bits - 1) - 1) if to.signed else (0, (1 << to.bits) - 1)
    if of.floating:

        def whole(a: Array) -> Array:
            exact = np.nan_to_num((integral or np.trunc)(a.astype(np.longdouble)), nan=0.0, posinf=high, neginf=low)
            return np.array([int(min(max(x, low), high)) % (1 << to.bits) for x in exact], np.uint64)

        return d.elementwise(whole, f"u{to.bits}", kind)
    if "sat" in d.has:
        clip = [min(max(low, -(2**63)), 2**64 - 1), high]
        return d.elementwise(lambda a: np.array([min(max(int(x), clip[0]), clip[1]) for x in a]), result, kind)
    return d.elementwise(lambda a: a.astype(np.int64 if of.signed else np.uint64), result, kind)
