"""Asynchronous matrix instructions of a warp group: PTX ISA 9.7.15.

A warp executes its part alone: the 16 rows of the 64 that it holds, in the order in which it began them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import numpy as np

from tests.emulated.machine.instructions import Decoder, Run, family
from tests.emulated.machine.machine import Launch, Step, Warp
from tests.emulated.machine.matrix import whole
from tests.emulated.machine.memory import SHARED, WINDOW, Array, Fault
from tests.emulated.machine.ptx import Instruction, Operand
from tests.emulated.machine.values import TYPES

SPANS = {0: 0, 1: 128, 2: 64, 3: 32}
"""Bytes that a swizzle spans, by a descriptor's bits 62 - 63."""
UNIT = 16


@functools.lru_cache(maxsize=256)
def places(descriptor: int, rows: int, depth: int, size: int, transposed: bool, first: int = 0) -> Array:
    """9.7.15.5.1: shared offsets of the 16-byte units of an operand, (row, unit of k), or (unit of rows, k).

    Args:
        descriptor: of the operand.
        rows: how many, from the ``first`` on: of A, or columns of B.
        depth: k; size: bytes of an element.
        transposed: whether units are along the rows, and not along k.
        first: row.
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    span = SPANS[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise Fault("a descriptor's base offset is not supported")
    if span and start % (8 * span) >= span and not transposed:
        raise Fault("a descriptor that starts within the rows of a swizzle's atom", None, WINDOW["shared"] + start)
    per = UNIT // size
    if transposed:
        unit, k = first // per + np.arange(rows // per)[:, None], np.arange(depth)[None, :]
        if span:
            wide = span // UNIT
            offsets = unit % wide * UNIT + unit // wide * leading + k % 8 * span + k // 8 * stride
        else:
            offsets = unit * stride + k % 8 * UNIT + k // 8 * leading
    else:
        row, unit = first + np.arange(rows)[:, None], np.arange(depth // per)[None, :]
        offsets = row % 8 * (span or UNIT) + row // 8 * stride + unit * (UNIT if span else leading)
    offsets = start + offsets
    return offsets ^ (((offsets >> 7) & (span // UNIT - 1)) << 4) if span else offsets


@dataclass
class Source:
    """An operand in shared memory."""

    offsets: Array
    kind: str
    transposed: bool

    def __post_init__(self) -> None:
        self.addresses = self.offsets.reshape(-1) + WINDOW["shared"]

    def matrix(self, warp: Warp) -> Array:
        """(row, k)."""
        type = TYPES[self.kind]
        units = warp.cta.memory.regions[SHARED].data.reshape(-1, UNIT)[self.offsets // UNIT]
        values = type.decode(units.view(type.raw)).astype(np.float32)  # Where products are exact.
        if self.transposed:  # (unit, k, row within the unit)
            return values.transpose(0, 2, 1).reshape(-1, values.shape[1])
        return values.reshape(len(values), -1)


class Sum:
    """Accumulators: 16 rows in registers of 32 bits, by their rows in the warp's bank."""

    def __init__(self, rows: Array, kind: str):
        self.rows, self.kind, self.key = rows, kind, (tuple(rows.tolist()), kind)

    def get(self, warp: Warp) -> Array:
        """9.7.15.5.1.1: register 4 j + r holds row g + 8 (r / 2), column 8 j + 2 t + r % 2."""
        if self.kind == "f16":
            halves = warp.bank[self.rows].view(np.float16).reshape(-1, 2, 8, 4, 2)  # (tile, upper, g, t, column)
            return halves.transpose(1, 2, 0, 3, 4).reshape(16, -1).astype(np.float32)
        return warp.bank[self.rows].view(np.float32).reshape(-1, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(16, -1)

    def set(self, warp: Warp, matrix: Array) -> None:
        tiles = matrix.reshape(2, 8, -1, 4, 2)  # (upper, g, tile, t, column)
        if self.kind == "f16":
            raw = np.ascontiguousarray(tiles.transpose(2, 0, 1, 3, 4).astype(np.float16)).view(np.uint32)
        else:
            raw = np.ascontiguousarray(tiles.transpose(2, 0, 4, 1, 3).astype(np.float32)).view(np.uint32)
        warp.bank[self.rows] = raw.reshape(len(self.rows), 32)


@dataclass
class Product:
    """One that was begun: d = scale_a a * scale_b b + (scale_d) d."""

    warp: Warp
    step: Step
    d: Sum
    a: Source | Array
    b: Source
    kind: str
    adds: bool
    sign: int
    registers: frozenset[int]
    group: int = -1
    done: bool = False

    @property
    def sources(self) -> list[Source]:
        return [operand for operand in (self.a, self.b) if isinstance(operand, Source)]

    def left(self) -> Array:
        if isinstance(self.a, Source):
            return self.a.matrix(self.warp)
        raw = self.warp.bank[self.a]
        if TYPES[self.kind].bits == 16:  # Register r: row g + 8 (r % 2), columns 8 (r / 2) + 2 t and the next.
            values = TYPES[self.kind].decode(raw.view(np.uint16)).reshape(2, 2, 8, 4, 2)
            return values.transpose(1, 2, 0, 3, 4).reshape(16, 16).astype(np.float32)
        return TYPES[self.kind].decode(raw).reshape(2, 2, 8, 4).transpose(1, 2, 0, 3).reshape(16, 8)

    def fault(self, kind: str) -> Fault:
        return Fault(kind, 0).at(self.step.source, self.warp)


@dataclass
class Move:
    """A register copied from one in flight, which is done in its turn."""

    warp: Warp
    step: Step
    run: Run
    registers: frozenset[int]
    done: bool = False

    def fault(self, kind: str) -> Fault:
        return Fault(kind, 0).at(self.step.source, self.warp)


def execute(operations: list[Product | Move]) -> None:
    """The products that are not done yet, in order; sums stay out of the registers from one product to the next."""
    held: tuple[Product, Array] | None = None
    for operation in operations:
        if operation.done:
            continue
        operation.done = True
        if held and not (isinstance(operation, Product) and operation.d.key == held[0].d.key):
            held[0].d.set(held[0].warp, held[1])
            held = None
        if isinstance(operation, Move):
            operation.run(operation.warp, np.ones(32, bool))
            continue
        product = operation.left() @ operation.b.matrix(operation.warp).T
        if operation.sign < 0:
            product = -product
        if operation.adds:
            product = product + (held[1] if held else operation.d.get(operation.warp))
        if operation.d.kind == "f16":
            product = product.astype(np.float16).astype(np.float32)
        held = operation, product
    if held:
        held[0].d.set(held[0].warp, held[1])


@family("wgmma.fence")
def _fence(d: Decoder) -> Run:
    """9.7.15.7.1: orders registers written before it with products after it."""
    d.allow("fence", "sync", "aligned")

    def run(warp: Warp, mask: Array) -> None:
        whole(mask)
        warp.unfenced = set()

    return run


@family("wgmma.mma_async")
def _multiply(d: Decoder) -> Run:
    """9.7.15.5.2: d, a, b, scale-d, then the signs of a and b, and for 16-bit types which are transposed."""
    shape = next(m for m in d.has if re.fullmatch(r"m64n\d+k\d+", m))
    d.allow("mma_async", "sync", "aligned", shape, "f32", "f16", "bf16", "tf32")
    columns, depth = (int(number) for number in shape.removeprefix("m64n").split("k"))
    result, kind, other = d.types
    size = TYPES[kind].bits // 8
    sums, left, right, scale = d.operands[:4]
    immediates = [int(str(operand)) for operand in d.operands[4:]]
    from_registers = isinstance(left, tuple)
    transposes = {2: (0, 0), 3: (0, immediates[-1]), 4: tuple(immediates[2:])}[len(immediates)]
    if len(immediates) != (2 if kind == "tf32" else 3 if from_registers else 4):
        raise d.error("immediates do not fit")
    if kind != other or result not in ("f32", kind) or result == "bf16" or depth != 32 // size:
        raise d.error("types do not fit")
    total = Sum(d.rows(sums), result)
    held = columns * TYPES[result].bits // 64
    if (
        columns % 8
        or not 8 <= columns <= 256
        or len(total.rows) != held
        or len(d.vector(left)) != (1, 4)[from_registers]
    ):
        raise d.error("registers do not fit the shape")
    adds, b = d.read(scale, "pred"), d.read(right, "b64")
    a_rows = d.rows(left) if isinstance(left, tuple) else None
    a = None if isinstance(left, tuple) else d.read(left, "b64")
    places_d = frozenset(d.places[str(name)] for name in d.vector(sums))
    places_a = frozenset(d.places[name] for name in left) if isinstance(left, tuple) else frozenset()
    sign = immediates[0] * immediates[1]

    def source(warp: Warp, value: Array, rows: int, transposed: int, first: int) -> Source:
        if (value != value[0]).any():
            raise Fault("descriptors differ by lane", int((value != value[0]).argmax()))
        found = Source(places(int(value[0]), rows, depth, size, bool(transposed), first), kind, bool(transposed))
        warp.cta.memory.read_asynchronously(found.addresses, np.zeros(len(found.addresses), int), UNIT, warp.number)
        return found

    def run(warp: Warp, mask: Array) -> None:
        whole(mask)
        if warp.unfenced is None or not warp.unfenced.isdisjoint(places_d | places_a):
            raise Fault("a wgmma without wgmma.fence since its registers were written", 0)
        for before in warp.products:
            if not _apart(before, places_d, places_a):
                raise Fault("a wgmma that uses registers of another, which was not waited for", 0)
        right_source = source(warp, b(warp), columns, transposes[1], 0)
        own = a_rows if a is None else source(warp, a(warp), 16, transposes[0], warp.number % 4 * 16)
        assert own is not None
        truth = bool(adds(warp)[0])
        registers = places_d | places_a
        warp.products.append(Product(warp, warp.step_now, total, own, right_source, kind, truth, sign, registers))
        warp.in_flight |= registers
        if not warp.cta.slow():
            execute(warp.products)

    return run


def _apart(before: Product | Move, places_d: frozenset[int], places_a: frozenset[int]) -> bool:
    """Whether no register that one of two products writes is used by the other; the same sums may be."""
    if isinstance(before, Move):
        return before.registers.isdisjoint(places_a)
    sums = before.step.sums
    return sums == places_d or (places_d.isdisjoint(before.registers) and sums.isdisjoint(places_a))


@family("wgmma.commit_group")
def _commit(d: Decoder) -> Run:
    """9.7.15.7.2."""
    d.allow("commit_group", "sync", "aligned")

    def run(warp: Warp, mask: Array) -> None:
        whole(mask)
        for operation in warp.products:
            if isinstance(operation, Product) and operation.group < 0:
                operation.group = warp.product_groups
        warp.product_groups += 1

    return run


@family("wgmma.wait_group")
def _wait(d: Decoder) -> Run:
    """9.7.15.7.3: until at most so many of the latest groups are under way."""
    d.allow("wait_group", "sync", "aligned")
    keep = int(str(d.operands[0]), 0)

    def run(warp: Warp, mask: Array) -> None:
        whole(mask)
        count = 0
        for operation in warp.products:
            if isinstance(operation, Product) and not 0 <= operation.group < warp.product_groups - keep:
                break
            count += 1
        ended, warp.products = warp.products[:count], warp.products[count:]
        execute(ended)
        memory = warp.cta.memory
        for operations, again in ((ended, False), (warp.products, True)):
            for operation in operations:
                for source in operation.sources if isinstance(operation, Product) else ():
                    memory.end_read(source.addresses, UNIT, warp.number, again)
        warp.in_flight = set().union(*(operation.registers for operation in warp.products))

    return run


def guarded(steps: list[Step], launch: Launch, registers: dict[str, int]) -> list[Step]:
    """Steps that mind the registers of products: copies between them, and what writes them."""
    products = [place for place, step in enumerate(steps) if step.source.opcode == "wgmma"]
    used: set[int] = set()
    for place in products:
        step = steps[place]
        steps[place] = step = replace(step, minds=True)
        if "mma_async" in step.source.modifiers:
            sums = step.source.operands[0]
            assert isinstance(sums, tuple)
            steps[place] = step = replace(step, sums=frozenset(registers[name] for name in sums))
            used |= {one for one in step.places if launch.registers[one] != "pred"}
    if not used:
        return steps
    moves = {place: pair for place, step in enumerate(steps) if (pair := _move(step.source, registers))}
    before = -1
    while len(used) != before:  # What is copied into them counts too.
        before = len(used)
        used |= {one for to, of in moves.values() if not used.isdisjoint(to) for one in of}
    for place, step in enumerate(steps):
        if place in moves:
            steps[place] = replace(step, run=_deferrable(step, *moves[place]), minds=True)
        elif step.source.opcode != "wgmma" and step.source.operands:
            first = step.source.operands[0]
            steps[place] = replace(step, marks=_registers(first, registers) & used)
    return steps


def _registers(operand: Operand, registers: dict[str, int]) -> frozenset[int]:
    names = operand if isinstance(operand, tuple) else [operand] if isinstance(operand, str) else []
    return frozenset(registers[name] for name in names if name in registers)


def _move(source: Instruction, registers: dict[str, int]) -> tuple[frozenset[int], frozenset[int]] | None:
    """The registers of a copy, to and of: of one, packed from parts, or the reverse."""
    if source.opcode != "mov":
        return None
    return _registers(source.operands[0], registers), _registers(source.operands[1], registers)


def _deferrable(step: Step, to: frozenset[int], of: frozenset[int]) -> Run:
    """A copy, of which compilers make many between products: of sums in flight, it is done when they are."""

    def run(warp: Warp, mask: Array) -> None:
        if warp.unfenced is not None:
            warp.unfenced = warp.unfenced - to if warp.unfenced.isdisjoint(of) else warp.unfenced | to
        if warp.in_flight.isdisjoint(to | of):
            step.run(warp, mask)
            return
        moved = any(not _written(operation).isdisjoint(of) for operation in warp.products)
        if (not moved and not warp.in_flight.isdisjoint(to)) or not mask.all():
            raise Fault("access to a register of a wgmma that was not waited for", int(mask.argmax()))
        if not moved:  # It is only read.
            step.run(warp, mask)
            return
        move = Move(warp, step, step.run, to | of)
        warp.products.append(move)
        warp.in_flight |= move.registers
        if all(operation.done for operation in warp.products[:-1]):
            execute([move])

    return run


def _written(operation: Product | Move) -> frozenset[int]:
    return operation.step.sums if isinstance(operation, Product) else operation.registers
