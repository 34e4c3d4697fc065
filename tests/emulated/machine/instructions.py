"""Instructions decoded: a family of opcodes is a function of a decoder, which knows the operands, and returns what runs
on a warp's lanes at each execution. Section numbers in the families are those of the PTX ISA 9.0, chapter 9.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulated.machine import ptx
from tests.emulated.machine.machine import Launch, Step, Warp
from tests.emulated.machine.memory import WINDOW, Array
from tests.emulated.machine.ptx import Address, Operand, PTXError
from tests.emulated.machine.values import TYPES, literal

Run = Callable[[Warp, Array], None]
Read = Callable[[Warp], Array]
Write = Callable[[Warp, Array, Array], None]
FAMILIES: dict[str, Callable[[Decoder], Run]] = {}


def family(*opcodes: str) -> Callable[[Callable[[Decoder], Run]], Callable[[Decoder], Run]]:
    """Register what decodes opcodes; the longest that an instruction begins with counts, as cp.async.wait_group."""

    def register(function: Callable[[Decoder], Run]) -> Callable[[Decoder], Run]:
        FAMILIES.update(dict.fromkeys(opcodes, function))
        return function

    return register


def decode(launch: Launch) -> list[Step]:
    """The kernel's instructions, with a return after the last."""
    from tests.emulated.machine import wgmma  # which imports this module

    places = {name: place for place, name in enumerate(launch.kernel.registers)}
    end = ptx.Instruction(0, "the end of the kernel", "", "ret", (), ())
    steps = []
    for source in [*launch.kernel.code, end]:
        decoder = Decoder(source, launch, places)
        names = (".".join([source.opcode, *source.modifiers[:n]]) for n in range(len(source.modifiers), -1, -1))
        known = next((FAMILIES[name] for name in names if name in FAMILIES), None)
        if known is None:
            raise decoder.error("unknown instruction")
        try:
            run = known(decoder)
        except (KeyError, IndexError, ValueError, TypeError) as problem:
            raise decoder.error(f"unknown form ({problem!r})") from problem
        guard = places[source.guard.lstrip("!")] if source.guard else None
        used = frozenset(places[name] for name in names_of(source) if name in places)
        steps.append(Step(source, run, guard, source.guard.startswith("!"), used))
    return wgmma.guarded(steps, launch, places)


def names_of(source: ptx.Instruction) -> list[str]:
    """The names in an instruction's guard and operands."""
    names = [source.guard]
    for operand in source.operands:
        if isinstance(operand, Address):
            names += [operand.base, *operand.coordinates]
        else:
            names += [operand] if isinstance(operand, str) else operand
    return [name.lstrip("!") for name in names]


class Decoder:
    """An instruction's operands as functions of a warp.

    Attributes:
        has: its modifiers.
        types: those of them that are types, in order.
    """

    def __init__(self, source: ptx.Instruction, launch: Launch, places: dict[str, int]):
        self.source, self.launch, self.places = source, launch, places
        self.has = source.modifiers
        self.operands = source.operands
        self.types = [modifier for modifier in self.has if modifier in TYPES]

    def error(self, problem: str) -> PTXError:
        return PTXError(f"{problem} at PTX line {self.source.line}: {self.source.text!r}")

    def refuse(self, *modifiers: str) -> None:
        """Modifiers that are not implemented must not pass unseen."""
        for modifier in modifiers:
            if modifier in self.has:
                raise self.error(f".{modifier} is not supported")

    def allow(self, *modifiers: str) -> None:
        """Refuse all others; those after ``::`` are named with what is before it."""
        for modifier in self.has:
            if modifier not in modifiers:
                raise self.error(f".{modifier} is not supported")

    def read(self, operand: Operand, kind: str) -> Read:
        """The operand as numbers of a type; only the register's lower bits if it is wider."""
        type = TYPES[kind]
        if not isinstance(operand, str):
            raise self.error(f"{operand!r} is no scalar")
        if operand.startswith("!"):
            inner = self.read(operand[1:], kind)
            return lambda warp: ~inner(warp)
        if operand in self.places:
            place = self.places[operand]
            width = TYPES[self.launch.registers[place]].bits
            if width < type.bits:
                raise self.error(f"{operand} is narrower than .{kind}")
            if width > type.bits:
                return lambda warp: type.decode(warp.registers[place].astype(type.raw))
            return lambda warp: type.decode(warp.registers[place])
        raw = literal(operand, type)
        if raw is not None:
            constant = type.decode(raw)
            return lambda warp: constant
        if operand in self.launch.symbols:
            space, where = self.launch.symbols[operand]
            fixed = np.full(32, where, np.uint64)
            if space == "local":
                size = np.uint64(self.launch.local_bytes)
                return lambda warp: type.decode((fixed + warp.thread * size).astype(type.raw))
            return lambda warp: type.decode(fixed.astype(type.raw))
        special = _special(operand)
        if special is None:
            raise self.error(f"unknown operand {operand!r}")
        return lambda warp: type.decode((special(warp) + np.zeros(32, np.uint64)).astype(type.raw))

    def write(self, operand: Operand, kind: str) -> Write:
        """Set the lanes of a mask to numbers of a type, extended by its sign if the register is wider."""
        type = TYPES[kind]
        if operand == "_":
            return lambda warp, mask, values: None
        if not isinstance(operand, str) or operand not in self.places:
            raise self.error(f"{operand!r} is no register")
        place = self.places[operand]
        register = TYPES[self.launch.registers[place]]
        if register.bits < type.bits:
            raise self.error(f"{operand} is narrower than .{kind}")

        def write(warp: Warp, mask: Array, values: Array) -> None:
            raw = type.encode(values)
            if register.bits > type.bits:
                raw = raw.view(raw.dtype.name[1:]).astype(register.raw) if type.signed else raw.astype(register.raw)
            np.copyto(warp.registers[place], raw, where=mask)

        return write

    def vector(self, operand: Operand) -> tuple[Operand, ...]:
        return operand if isinstance(operand, tuple) else (operand,)

    def rows(self, operand: Operand) -> Array:
        """Where registers of 32 bits are in a warp's bank of them."""
        rows = np.array([self.launch.rows[self.places[str(name)]] for name in self.vector(operand)])
        if (rows < 0).any():
            raise self.error("registers of other than 32 bits")
        return rows

    def address(self, operand: Operand, space: str) -> Read:
        """Generic addresses of an address operand in a memory; an empty one stands for generic."""
        if not isinstance(operand, Address):
            raise self.error(f"{operand!r} is no address")
        place = self.places.get(operand.base)
        wide = place is None or TYPES[self.launch.registers[place]].bits == 64
        base = self.read(operand.base, "b64" if wide else "b32")
        add = np.int64(WINDOW.get(space, 0) + operand.offset)
        return lambda warp: base(warp).astype(np.int64) + add

    @property
    def space(self) -> str:
        """The state space of a memory access; empty for generic."""
        spaces = ("shared", "global", "local", "param", "const")
        return next((m.split("::")[0] for m in self.has if m.split("::")[0] in spaces), "")

    def flushing(self, read: Read) -> Read:
        """Subnormal numbers as zeros, under .ftz."""
        return (lambda warp: flush(read(warp))) if "ftz" in self.has else read

    def elementwise(self, function: Callable[..., Array], result: str, *kinds: str) -> Run:
        """d = function(a, b, ...) with the types of d and of each operand."""
        reads = [self.flushing(self.read(o, k)) for o, k in zip(self.operands[1:], kinds, strict=True)]
        write = self.write(self.operands[0], result)
        flushes = "ftz" in self.has

        def run(warp: Warp, mask: Array) -> None:
            values = function(*(read(warp) for read in reads))
            write(warp, mask, flush(values) if flushes else values)

        return run


def flush(values: Array) -> Array:
    if values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _special(name: str) -> Callable[[Warp], Any] | None:
    """10: special registers."""
    base, _, axis = name.partition(".")
    if axis:
        i = "xyz".index(axis)
        return {
            "%tid": lambda w: w.thread // int(np.prod(w.cta.launch.block[:i])) % w.cta.launch.block[i],
            "%ntid": lambda w: w.cta.launch.block[i],
            "%ctaid": lambda w: w.cta.index[i],
            "%nctaid": lambda w: w.cta.launch.grid[i],
            "%clusterid": lambda w: w.cta.index[i],
            "%nclusterid": lambda w: w.cta.launch.grid[i],
            "%cluster_ctaid": lambda w: 0,
            "%cluster_nctaid": lambda w: 1,
        }.get(base)
    bits = np.uint64(1) << np.arange(32, dtype=np.uint64)
    return {
        "%laneid": lambda w: w.lane,
        "%warpid": lambda w: w.number,
        "%nwarpid": lambda w: len(w.cta.warps),
        "%lanemask_eq": lambda w: bits,
        "%lanemask_lt": lambda w: bits - np.uint64(1),
        "%lanemask_le": lambda w: bits * np.uint64(2) - np.uint64(1),
        "%lanemask_gt": lambda w: np.uint64(2**32) - bits * np.uint64(2),
        "%lanemask_ge": lambda w: np.uint64(2**32) - bits,
        "%dynamic_smem_size": lambda w: w.cta.launch.dynamic_bytes,
        "%total_smem_size": lambda w: w.cta.launch.shared_bytes,
        "%clock": lambda w: 0,
        "%clock64": lambda w: 0,
        "%globaltimer": lambda w: 0,
        "%smid": lambda w: 0,
        "%cluster_ctarank": lambda w: 0,
        "%cluster_nctarank": lambda w: 1,
        "WARP_SZ": lambda w: 32,
    }.get(name)
