"""Control, barriers, and what the lanes of a warp do together: PTX ISA 9.7.9.6, 9.7.12 and 9.7.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulated.machine.instructions import Decoder, Run, family
from tests.emulated.machine.machine import GONE, Warp
from tests.emulated.machine.memory import Array, Fault
from tests.emulated.machine.transfers import ATOMIC


@family("bra")
def _branch(d: Decoder) -> Run:
    target = d.source.target
    return lambda warp, mask: warp.jump(mask, target)


@family("ret", "exit")
def _exit(d: Decoder) -> Run:
    return lambda warp, mask: warp.jump(mask, GONE)


@family("trap", "brkpt")
def _trap(d: Decoder) -> Run:
    def run(warp: Warp, mask: Array) -> None:
        raise Fault("trap", int(mask.argmax()))

    return run


@family("nanosleep")
def _sleep(d: Decoder) -> Run:
    return lambda warp, mask: None


@family("bar.warp")
def _converge(d: Decoder) -> Run:
    """9.7.13.2: only asks that its lanes be there."""
    members = d.read(d.operands[0], "b32")
    return lambda warp, mask: _together(warp, mask, members(warp))


@family("bar", "barrier")
def _barrier(d: Decoder) -> Run:
    """9.7.13.1: of all threads of the CTA, or of so many, by warps."""
    d.refuse("red", "cluster")
    number = d.read(d.operands[0], "u32")
    count = d.read(d.operands[1], "u32") if len(d.operands) > 1 else None
    waits = "arrive" not in d.has

    def run(warp: Warp, mask: Array) -> None:
        warp.converged(mask)
        first = int(mask.argmax())
        threads = 0 if count is None else int(count(warp)[first])
        if threads % 32:
            raise Fault(f"barrier for {threads} threads, which are no whole warps", first)
        warp.cta.arrive(warp, int(number(warp)[first]), threads, waits)

    return run


def _together(warp: Warp, mask: Array, members: Array) -> None:
    """Check that all lanes that are named, and have not exited, are executing this."""
    named = (int(members[mask.argmax()]) >> np.arange(32) & 1).astype(bool)
    missing = named & ~mask & ((warp.pcs < GONE) | warp.mask)
    if missing.any():
        raise Fault("lanes that are named are elsewhere", int(missing.argmax()))
    if (mask & ~named).any():
        raise Fault("a lane that is not named", int((mask & ~named).argmax()))


@family("shfl")
def _shuffle(d: Decoder) -> Run:
    """9.7.9.6: c holds the last lane (bits 0 - 4) and the bits that segments share (bits 8 - 12)."""
    mode = next(m for m in d.has if m in ("up", "down", "bfly", "idx"))
    targets = d.vector(d.operands[0])
    writes = [d.write(targets[0], "b32")] + [d.write(operand, "pred") for operand in targets[1:]]
    a, b, c, members = (d.read(operand, "b32") for operand in d.operands[1:5])

    def run(warp: Warp, mask: Array) -> None:
        _together(warp, mask, members(warp))
        lane, by, clamp = warp.lane.astype(int), b(warp).astype(int) & 31, c(warp).astype(int)
        segment, clamp = clamp >> 8 & 31, clamp & 31
        last = (lane & segment) | (clamp & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": (lane & segment) | (by & ~segment),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        if not mask[source[mask]].all():
            raise Fault("shuffle from a lane that does not take part", int(np.flatnonzero(mask)[0]))
        writes[0](warp, mask, a(warp)[source])
        for write in writes[1:]:
            write(warp, mask, inside)

    return run


@family("vote", "activemask", "match", "elect", "redux")
def _vote(d: Decoder) -> Run:
    """9.7.13.8 - 13."""
    opcode = d.source.opcode
    bits = np.uint64(1) << np.arange(32, dtype=np.uint64)

    def spread(values: Any) -> Array:
        return np.broadcast_to(np.asarray(values), 32)

    if opcode == "activemask":
        write = d.write(d.operands[0], "b32")
        return lambda warp, mask: write(warp, mask, spread(bits[warp.mask].sum()))
    members = d.read(d.operands[-1], "b32")
    if opcode == "vote":
        truth = d.read(d.operands[1], "pred")
        write = d.write(d.operands[0], "b32" if "ballot" in d.has else "pred")
        votes: dict[str, Callable[[Array, Array], Any]] = {
            "ballot": lambda p, mask: bits[p & mask].sum(),
            "all": lambda p, mask: p[mask].all(),
            "any": lambda p, mask: p[mask].any(),
            "uni": lambda p, mask: p[mask].all() or not p[mask].any(),
        }
        vote = next(votes[m] for m in d.has if m in votes)

        def run(warp: Warp, mask: Array) -> None:
            _together(warp, mask, members(warp))
            write(warp, mask, spread(vote(truth(warp), mask)))

        return run
    if opcode == "redux":
        kind = d.types[-1]
        value, write = d.read(d.operands[1], kind), d.write(d.operands[0], kind)
        function: Any = next(ATOMIC[m] for m in d.has if m in ATOMIC)

        def reduce(warp: Warp, mask: Array) -> None:
            _together(warp, mask, members(warp))
            values = value(warp)
            write(warp, mask, np.full(32, function.reduce(values[mask], dtype=values.dtype), values.dtype))

        return reduce
    if opcode == "elect":
        targets = d.vector(d.operands[0])
        leader, chosen = d.write(targets[0], "b32"), d.write(targets[1], "pred")

        def elect(warp: Warp, mask: Array) -> None:
            _together(warp, mask, members(warp))
            leader(warp, mask, spread(mask.argmax()))
            chosen(warp, mask, np.arange(32) == mask.argmax())

        return elect
    raise d.error("not supported")
