"""Accesses to memory, atomics and asynchronous copies: PTX ISA 9.7.9 and 9.7.13."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulated.machine.instructions import Decoder, Run, family
from tests.emulated.machine.machine import Copy, Warp
from tests.emulated.machine.memory import Array, Fault
from tests.emulated.machine.values import TYPES


def _plain(d: Decoder) -> bool:
    return not {"volatile", "relaxed", "acquire", "release"} & set(d.has)


@family("ld", "ldu")
def _load(d: Decoder) -> Run:
    """9.7.9.8: extended by the type's sign where registers are wider; cache hints change nothing."""
    kind = d.types[-1]
    kind = f"b{TYPES[kind].bits}" if TYPES[kind].floating else kind
    type, plain = TYPES[kind], _plain(d)
    address = d.address(d.operands[1], d.space)
    targets = d.vector(d.operands[0])
    writes = [d.write(operand, kind) for operand in targets]

    def run(warp: Warp, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        found = warp.cta.memory.load(address(warp)[lanes], lanes, type.bits // 8, len(writes), warp.number, plain)
        whole = np.zeros((32, len(writes)), found.dtype)
        whole[lanes] = found
        for i, write in enumerate(writes):
            write(warp, mask, whole[:, i])

    return run


@family("st")
def _store(d: Decoder) -> Run:
    d.refuse("async", "bulk")
    kind = f"b{TYPES[d.types[-1]].bits}"
    plain = _plain(d)
    address = d.address(d.operands[0], d.space)
    reads = [d.read(operand, kind) for operand in d.vector(d.operands[1])]

    def run(warp: Warp, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        values = np.stack([read(warp) for read in reads], 1)[lanes]
        warp.cta.memory.store(address(warp)[lanes], lanes, values, warp.number, plain)

    return run


ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, limit: np.where(old >= limit, 0, old + np.uint32(1)),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - np.uint32(1)),
}


@family("atom", "red")
def _atomic(d: Decoder) -> Run:
    """9.7.13.15 - 16: a lane after the other."""
    d.refuse("async")
    type = TYPES[d.types[-1]]
    returns = d.source.opcode == "atom"
    place, *operands = d.operands[1:] if returns else d.operands
    address = d.address(place, d.space)
    reads = [d.read(operand, f"b{type.bits}") for operand in operands]
    write = d.write(d.operands[0], f"b{type.bits}") if returns else None
    function = None if "cas" in d.has else next(ATOMIC[m] for m in d.has if m in ATOMIC)

    def run(warp: Warp, mask: Array) -> None:
        memory, where = warp.cta.memory, address(warp)
        values = [read(warp) for read in reads]
        results = np.zeros(32, type.raw)
        for lane in np.flatnonzero(mask):
            one = np.array([lane])
            old = memory.load(where[one], one, type.bits // 8, 1, warp.number, plain=False)[0]
            if function is None:
                new = np.where(old == values[0][one], values[1][one], old)
            else:
                new = type.encode(function(type.decode(old), type.decode(values[0][one])))
            memory.store(where[one], one, new.astype(type.raw).reshape(1, 1), warp.number, plain=False)
            results[lane] = old[0]
        if write:
            write(warp, mask, results)

    return run


@family("prefetch", "prefetchu", "membar", "fence", "createpolicy", "discard", "applypriority", "griddepcontrol")
def _nothing(d: Decoder) -> Run:
    """Hints; and fences, since accesses take effect in order."""
    if d.source.opcode == "createpolicy":
        write = d.write(d.operands[0], "b64")
        return lambda warp, mask: write(warp, mask, np.zeros(32, np.uint64))
    return lambda warp, mask: None


# 9.7.9.25: asynchronous copies, in groups by lane.


@family("cp.async")
def _copy(d: Decoder) -> Run:
    """The operand after the sizes is a predicate to ignore the source, or how many bytes to read of it."""
    d.refuse("bulk", "mbarrier")
    target, source = d.address(d.operands[0], "shared"), d.address(d.operands[1], "global")
    size = int(str(d.operands[2]), 0)
    hinted = any(m.endswith("cache_hint") for m in d.has)
    rest = d.operands[3 : len(d.operands) - hinted]
    ignored, copied = None, None
    if rest:
        name = str(rest[0])
        predicate = name.startswith("!") or d.launch.kernel.registers.get(name) == "pred"
        ignored, copied = (d.read(name, "pred"), None) if predicate else (None, d.read(name, "u32"))
    if size not in (4, 8, 16) or ("cg" in d.has and size != 16):
        raise d.error("a copy of so many bytes")

    def run(warp: Warp, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        count = np.full(32, size) if copied is None else copied(warp).astype(int)
        if ignored is not None:
            count = np.where(ignored(warp), 0, count)
        if (count[lanes] > size).any():
            raise Fault("a copy reads more bytes than it writes", int(lanes[(count[lanes] > size).argmax()]))
        memory, rng, late = warp.cta.memory, warp.cta.rng, warp.cta.launch.late
        where, of, count = target(warp)[lanes], source(warp)[lanes], count[lanes]
        for part in np.unique(count[count > 0]):
            here = count == part
            if (of[here] % size).any():
                first = int(np.flatnonzero(here & (of % size != 0))[0])
                raise Fault(f"misaligned copy of {size} bytes", int(lanes[first]), int(of[first]))
            if part in (1, 2, 4, 8, 16):
                memory.check_source(of[here], lanes[here], int(part), warp.number)
            else:
                for byte in range(part):
                    memory.check_source(of[here] + byte, lanes[here], 1, warp.number)
        memory.begin_write(where, lanes, size, warp.number)
        slow = bool(rng.integers(2)) if late is None else late
        none = np.full(len(lanes), -1)
        copy = Copy(lanes, where, of, size, count, none, np.zeros(len(lanes), bool), slow)
        if not slow:
            take_effect(warp, copy, np.arange(len(lanes)))
        warp.copies.append(copy)

    return run


def take_effect(warp: Warp, copy: Copy, which: Array) -> None:
    """Copy the bytes of some of the lanes."""
    memory = warp.cta.memory
    for i in which:
        values = np.zeros(copy.size, np.uint8)
        count = int(copy.copied[i])
        if count:
            values[:count] = memory.peek(int(copy.source[i]), count)
        memory.poke(int(copy.target[i]), values)


@family("cp.async.commit_group")
def _commit(d: Decoder) -> Run:
    def run(warp: Warp, mask: Array) -> None:
        for copy in warp.copies:
            copy.group = np.where(mask[copy.lanes] & (copy.group < 0), warp.groups[copy.lanes], copy.group)
        warp.groups[mask] += 1

    return run


@family("cp.async.wait_group", "cp.async.wait_all")
def _wait(d: Decoder) -> Run:
    keep = int(str(d.operands[0]), 0) if d.operands else -1
    return lambda warp, mask: _finish(warp, mask, keep)


def _finish(warp: Warp, mask: Array, keep: int) -> None:
    """Until at most so many of the latest groups are under way; -1: all copies, committed or not."""
    for copy in warp.copies:
        ready = mask[copy.lanes] & ~copy.done
        if keep >= 0:
            ready &= (copy.group >= 0) & (copy.group < warp.groups[copy.lanes] - keep)
        which = np.flatnonzero(ready)
        if len(which):
            if copy.late:
                take_effect(warp, copy, which)
            warp.cta.memory.end_write(copy.target[which], copy.lanes[which], copy.size, warp.number)
            copy.done[which] = True
    warp.copies = [copy for copy in warp.copies if not copy.done.all()]
