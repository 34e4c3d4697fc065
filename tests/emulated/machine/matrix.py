"""Matrix instructions of a warp: PTX ISA 9.7.14. g = lane / 4, t = lane % 4.

A fragment is an index: the (row, column) that each lane holds in each element of each of its registers.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from tests.emulated.machine.instructions import Decoder, Read, Run, Write, family
from tests.emulated.machine.machine import Warp
from tests.emulated.machine.memory import Array, Fault
from tests.emulated.machine.values import TYPES

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


@functools.cache
def fragment(which: str, registers: int, packed: int) -> tuple[Array, Array]:
    """Rows and columns, each (lane, register * packed), of A (16 x k), B (k x 8) or C (16 x 8) tiles side by side."""
    r = np.repeat(np.arange(registers), packed)[None, :]
    e = np.tile(np.arange(packed), registers)[None, :]
    g, t = G[:, None], T[:, None]
    if which == "a":  # 9.7.14.5.8: two registers over rows, then columns; k is four lanes of what a register holds.
        return g + 8 * (r & 1) + 0 * e, 4 * packed * (r >> 1) + packed * t + e
    if which == "b":
        return 4 * packed * r + packed * t + e, g + 0 * (r + e)
    if packed == 1:  # C in float32: four registers a tile of 8 columns.
        return g + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * t + (r & 1)
    return g + 8 * (r & 1) + 0 * e, 8 * (r >> 1) + 2 * t + e


class Fragment:
    """Registers that hold a matrix together.

    Args:
        d: decodes them.
        operand: the registers.
        which: "a", "b" or "c".
        kind: of the elements.
    """

    def __init__(self, d: Decoder, operand: object, which: str, kind: str):
        assert isinstance(operand, tuple)
        self.packed = 2 if TYPES[kind].bits == 16 else 1
        self.kind = f"{kind}x2" if self.packed == 2 else kind
        self.d, self.names = d, operand
        self.rows, self.columns = fragment(which, len(operand), self.packed)
        self.shape = int(self.rows.max()) + 1, int(self.columns.max()) + 1

    def reader(self) -> Read:
        reads = [self.d.read(name, self.kind) for name in self.names]

        def read(warp: Warp) -> Array:
            values = np.concatenate([read(warp).reshape(32, -1) for read in reads], 1)
            out = np.empty(self.shape, np.float64 if self.kind == "f64" else np.float32)
            out[self.rows, self.columns] = values
            return out

        return read

    def writer(self) -> Write:
        writes = [self.d.write(name, self.kind) for name in self.names]

        def write(warp: Warp, mask: Array, matrix: Array) -> None:
            values = matrix[self.rows, self.columns].reshape(32, len(writes), self.packed)
            for i, write in enumerate(writes):
                write(warp, mask, values[:, i] if self.packed == 2 else np.ascontiguousarray(values[:, i, 0]))

        return write


def whole(mask: Array) -> None:
    """Check that all lanes take part."""
    if not mask.all():
        raise Fault("a matrix instruction without all lanes of the warp", int((~mask).argmax()))


@family("mma")
def _mma(d: Decoder) -> Run:
    """9.7.14.5: d = a b + c, in float32 or rounded to float16."""
    shape = next(m for m in d.has if re.fullmatch(r"m\d+n\d+k\d+", m))
    result, kind_a, kind_b, kind_c = d.types[-4:]
    depth = int(shape.split("k")[1])
    if not shape.startswith("m16n8") or kind_a not in ("f16", "bf16", "tf32") or "sp" in d.has:
        raise d.error("not supported")
    a, b, c = (
        Fragment(d, operand, which, kind)
        for operand, which, kind in zip(d.operands[1:], "abc", (kind_a, kind_b, kind_c), strict=True)
    )
    if a.shape != (16, depth) or b.shape != (depth, 8) or c.shape != (16, 8):
        raise d.error("registers do not fit the shape")
    reads, write = [a.reader(), b.reader(), c.reader()], Fragment(d, d.operands[0], "c", result).writer()

    def run(warp: Warp, mask: Array) -> None:
        whole(mask)
        left, right, total = (read(warp) for read in reads)
        write(warp, mask, left @ right + total)

    return run


@family("ldmatrix", "stmatrix")
def _matrices(d: Decoder) -> Run:
    """9.7.14.5.15 - 16: lanes 8 i to 8 i + 7 address the rows of 16 bytes of matrix i, which is in register i."""
    d.refuse("b8", "m8n16", "m16n16")
    loads, transposed = d.source.opcode == "ldmatrix", "trans" in d.has
    registers, place = (d.operands[0], d.operands[1]) if loads else (d.operands[1], d.operands[0])
    names = d.vector(registers)
    count = len(names)
    address = d.address(place, "shared" if d.space else "")
    writes = [d.write(name, "b32") for name in names] if loads else []
    reads = [d.read(name, "b32") for name in names] if not loads else []
    lanes = np.arange(8 * count)

    def load(warp: Warp, mask: Array) -> None:
        whole(mask)
        rows = warp.cta.memory.load(address(warp)[lanes], lanes, 4, 4, warp.number)
        for i, write in enumerate(writes):
            matrix = np.ascontiguousarray(rows[8 * i : 8 * i + 8])
            if transposed:
                matrix = np.ascontiguousarray(matrix.view(np.uint16).T).view(np.uint32)
            write(warp, mask, matrix.reshape(32))

    def store(warp: Warp, mask: Array) -> None:
        whole(mask)
        rows = []
        for read in reads:
            matrix = np.ascontiguousarray(read(warp)).reshape(8, 4)
            rows.append(np.ascontiguousarray(matrix.view(np.uint16).T).view(np.uint32) if transposed else matrix)
        warp.cta.memory.store(address(warp)[lanes], lanes, np.concatenate(rows), warp.number)

    return load if loads else store


@family("wmma")
def _wmma(d: Decoder) -> Run:
    """9.7.14.4, m16n16k16: fragments are opaque; here they are those of mma, of which B and C are two side by side."""
    if "m16n16k16" not in d.has:
        raise d.error("not supported")
    if d.has[0] in ("load", "store"):
        return _transfer(d)
    result, kind = d.types[0], d.types[1] if len(d.types) == 4 else "f16"
    reads = [
        _Opaque(d, o, w, k).reader() for o, w, k in zip(d.operands[1:], "abc", (kind, kind, d.types[-1]), strict=True)
    ]
    write = _Opaque(d, d.operands[0], "c", result).writer()

    def run(warp: Warp, mask: Array) -> None:
        whole(mask)
        a, b, c = (read(warp) for read in reads)
        write(warp, mask, a @ b + c)

    return run


def _transfer(d: Decoder) -> Run:
    """Load or store a 16 x 16 matrix whose rows, or columns, are so many elements apart."""
    loads = d.has[0] == "load"
    registers, place = (d.operands[0], d.operands[1]) if loads else (d.operands[1], d.operands[0])
    type = TYPES[d.types[-1]]
    held = _Opaque(d, registers, d.has[1].replace("d", "c"), type.name)
    address = d.address(place, d.space)
    stride = d.read(d.operands[2] if len(d.operands) > 2 else "16", "u32")
    size = type.bits // 8
    row, column = np.divmod(np.arange(256), 16)
    if "col" in d.has:
        row, column = column, row

    def places(warp: Warp) -> Array:
        """Addresses, 32 elements at a time."""
        return (int(address(warp)[0]) + (row * int(stride(warp)[0]) + column) * size).reshape(8, 32)

    if loads:
        write = held.writer()

        def load(warp: Warp, mask: Array) -> None:
            whole(mask)
            raw = [warp.cta.memory.load(part, LANE, size, 1, warp.number) for part in places(warp)]
            write(warp, mask, type.decode(np.concatenate(raw)).reshape(16, 16))

        return load
    read = held.reader()

    def store(warp: Warp, mask: Array) -> None:
        whole(mask)
        raw = type.encode(read(warp)).reshape(8, 32, 1)
        for part, values in zip(places(warp), raw, strict=True):
            warp.cta.memory.store(part, LANE, values, warp.number)

    return store


class _Opaque(Fragment):
    """A 16 x 16 fragment of wmma: what mma would hold; float16 ones have registers to spare, which are left alone."""

    def __init__(self, d: Decoder, operand: object, which: str, kind: str):
        assert isinstance(operand, tuple)
        used = operand[:4] if which != "c" else operand
        super().__init__(d, used, which, kind)
        if which == "b":  # Two tiles of 8 columns.
            rows, columns = fragment("b", 2, self.packed)
            self.rows, self.columns = np.hstack([rows, rows]), np.hstack([columns, columns + 8])
        self.shape = 16, 16
