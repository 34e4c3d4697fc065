"""A launch, executed: its CTAs one after the other, their warps interleaved by a seed, 32 lanes at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulated.machine import ptx
from tests.emulated.machine.memory import LOCAL, SHARED, Array, Clocks, Fault, Memory, Storage
from tests.emulated.machine.values import TYPES

GONE = 1 << 30
"""The program counter of a lane that has exited, or never was."""
BURST = 24
"""Instructions that a warp runs on average before another may."""
LANDS = 1 / 8
"""How often something that is under way ends, between two bursts, where that is by chance."""
JUNK = 0x7FFF7FFF7FFF7FFF
"""What registers hold at first: a NaN in every floating-point type."""


@dataclass
class Copy:
    """A cp.async, by lane: which bytes to where, which of its lane's groups it is in (-1: not committed)."""

    lanes: Array
    target: Array
    source: Array
    size: int
    copied: Array
    group: Array
    done: Array
    late: bool


@dataclass
class Flight:
    """An asynchronous operation that ends by itself: how, and which warp's instruction and lane began it."""

    land: Callable[[], None]
    warp: Warp
    step: Step
    lane: int


class Warp:
    """32 lanes: registers, by the place of their names in the kernel, and program counters.

    Attributes:
        bank: the registers of 32 bits, a row each, in order.
        waiting: until something wakes it.
        polling: whether all that it has done since something happened is to ask whether it has.
        in_flight: registers that a wgmma which was not waited for may read or write.
        products: those wgmma, in order, and copies between their registers.
        unfenced: registers that were written since the last wgmma.fence; None before the first.
        bulk: its copies from shared memory that were not waited for.
    """

    def __init__(self, cta: CTA, number: int, registers: list[str]):
        self.cta, self.number = cta, number
        self.lane = np.arange(32, dtype=np.uint32)
        self.thread = self.lane + np.uint32(32 * number)
        raw = [TYPES[kind].raw for kind in registers]
        banks = {one: np.full((raw.count(one), 32), JUNK, np.uint64).astype(one) for one in {*raw, np.dtype("u4")}}
        rows = {one: iter(bank) for one, bank in banks.items()}
        self.registers = [next(rows[one]) for one in raw]
        self.bank = banks[np.dtype("u4")]
        self.pcs = np.where(self.thread < cta.threads, 0, GONE)
        self.waiting = self.polling = False
        self.copies: list[Copy] = []
        self.groups = np.zeros(32, np.int64)
        self.in_flight: set[int] = set()
        self.products: list[Any] = []
        self.product_groups = 0
        self.unfenced: set[int] | None = None
        self.bulk: list[Any] = []
        self.bulk_groups = np.zeros(32, np.int64)
        self.cluster_phase = 0
        self.regroup()

    def regroup(self) -> None:
        """Run the lanes that are at the smallest program counter: those that are ahead wait for them."""
        self.pc = int(self.pcs.min())
        self.mask = self.pcs == self.pc
        others = self.pcs[~self.mask]
        self.next = int(others.min()) if len(others) else GONE

    @property
    def exited(self) -> bool:
        return self.pc >= GONE

    def converged(self, mask: Array) -> None:
        """For instructions that all lanes of the warp that are left must execute together."""
        left = self.pcs < GONE
        left[self.mask] = True
        if (left & ~mask).any():
            raise Fault("lanes of the warp are elsewhere at an instruction for all", int((left & ~mask).argmax()))

    def block(self) -> None:
        """Wait, and execute the same instruction again."""
        self.waiting = True
        self.pc -= 1
        self.cta.blocked.append(self)

    def jump(self, mask: Array, target: int) -> None:
        """Branch, of the running lanes, those of the mask."""
        if mask.all() or not (self.mask & ~mask).any():
            self.pc = target
            if target >= self.next:
                self.pcs[self.mask] = target
                self.regroup()
        elif mask.any():
            self.pcs[self.mask] = self.pc
            self.pcs[mask] = target
            self.regroup()

    def step(self, code: list[Step]) -> None:
        """Execute an instruction."""
        pc = self.pc
        self.step_now = step = code[pc]
        mask = self.mask
        if step.guard is not None:
            mask = mask & (self.registers[step.guard].astype(bool) ^ step.negated)
        self.pc = pc + 1
        if step.guard is None or mask.any():
            try:
                if self.in_flight and not step.minds and not self.in_flight.isdisjoint(step.places):
                    raise Fault("access to a register of a wgmma that was not waited for", int(mask.argmax()))
                step.run(self, mask)
                if step.marks and self.unfenced is not None:
                    self.unfenced |= step.marks
            except Fault as fault:
                if fault.line is None:
                    fault.at(step.source, self)
                raise
        if self.pc == pc + 1 >= self.next:
            self.pcs[self.mask] = self.pc
            self.regroup()


@dataclass(frozen=True)
class Step:
    """A decoded instruction: what runs it on a warp's lanes, where its guard is true.

    Attributes:
        places: of its registers.
        minds: whether it sees to registers in flight itself.
        marks: the registers that it writes for a wgmma, which needs a fence then.
        sums: a wgmma's accumulators.
    """

    source: ptx.Instruction
    run: Callable[[Warp, Array], None]
    guard: int | None
    negated: bool
    places: frozenset[int] = frozenset()
    minds: bool = False
    marks: frozenset[int] = frozenset()
    sums: frozenset[int] = frozenset()


@dataclass
class Barrier:
    """How many warps have come to a barrier, those that wait, what all have seen, and for how many threads it is."""

    count: int
    seen: Array
    come: int = 0
    waiting: list[Warp] = field(default_factory=list)


class CTA:
    """A group of warps that share memory."""

    def __init__(self, launch: Launch, index: tuple[int, int, int], rng: np.random.Generator):
        self.launch, self.index, self.rng = launch, index, rng
        x, y, z = launch.block
        self.threads = x * y * z
        count = -(-self.threads // 32)
        self.clocks = Clocks(count)
        shared = Storage(launch.shared_bytes, "shared memory", self.clocks)
        shared.inside[launch.shared_bytes :] = 0
        local = Storage(launch.local_bytes * self.threads, "local memory")
        self.memory = Memory({**launch.regions, SHARED: shared, LOCAL: local})
        self.barriers: dict[int, Barrier] = {}
        self.mbarriers: dict[int, Any] = {}
        self.agents: dict[int, int] = {}
        self.acquired: set[int] = set()
        self.flights: list[Flight] = []
        self.blocked: list[Warp] = []
        self.cluster = Barrier(0, self.clocks.nothing())
        self.warps = [Warp(self, number, launch.registers) for number in range(count)]

    def arrive(self, warp: Warp, number: int, count: int, waits: bool) -> None:
        """9.7.13.1, barrier: a warp comes, and counts as 32 threads."""
        seen = self.clocks.leave(warp.number)
        barrier = self.barriers.setdefault(number, Barrier(count, seen))
        if barrier.count != count:
            raise Fault(f"barrier {number} is for {barrier.count} threads and for {count}")
        barrier.seen = np.maximum(barrier.seen, seen)
        barrier.come += 1
        if waits:
            warp.waiting = True
            barrier.waiting.append(warp)
        self.release(number)

    def release(self, number: int) -> None:
        """Let a barrier's warps go if it is complete; for all (0), warps that have exited are not waited for."""
        barrier = self.barriers[number]
        if 32 * barrier.come >= (barrier.count or 32 * sum(not warp.exited for warp in self.warps)):
            for warp in barrier.waiting:
                self.clocks.join(warp.number, barrier.seen)
                warp.waiting = False
            del self.barriers[number]

    def release_cluster(self) -> None:
        """Count a phase of the cluster's barrier if all warps have come that are left."""
        if 0 < sum(not warp.exited for warp in self.warps) <= self.cluster.come:
            self.cluster.count, self.cluster.come = self.cluster.count + 1, 0
            self.wake()

    def leave(self, warp: Warp) -> None:
        """A warp has exited."""
        for number in list(self.barriers):
            self.release(number)
        self.release_cluster()
        self.wake()
        for operation in warp.products:
            raise operation.fault("a wgmma that was not waited for at the warp's end")
        for copy in warp.bulk:
            if not copy.read:
                raise copy.fault("a bulk copy that may still read shared memory at the warp's end")

    def slow(self) -> bool:
        """Whether an asynchronous operation takes effect late."""
        return bool(self.rng.integers(2)) if self.launch.late is None else self.launch.late

    def begin(self, flight: Flight) -> None:
        """Start what ends by itself: at once, or at some time."""
        if self.slow():
            self.flights.append(flight)
        else:
            flight.land()

    def land(self) -> None:
        """Let something that is under way end."""
        flight = self.flights.pop(int(self.rng.integers(len(self.flights))))
        try:
            flight.land()
        except Fault as fault:
            fault.lane = flight.lane
            raise fault.at(flight.step.source, flight.warp) from None

    def wake(self) -> None:
        """Something has happened that warps may wait for."""
        for warp in self.blocked:
            warp.waiting = False
        self.blocked.clear()
        for warp in self.warps:
            warp.polling = False

    def end(self) -> None:
        """All warps have exited."""
        for flight in self.flights:
            fault = Fault("an asynchronous copy to shared memory is under way at the kernel's end", flight.lane)
            raise fault.at(flight.step.source, flight.warp)
        for mbarrier in self.mbarriers.values():
            mbarrier.end()
        for warp in self.warps:
            for copy in warp.bulk:
                copy.write()


def interleave(cta: CTA, code: list[Step], limit: int) -> None:
    """Run warps to their ends, each time some instructions of one by chance."""
    rng = cta.rng
    left = [warp for warp in cta.warps if not warp.exited]
    steps = 0
    while left:
        ready = [warp for warp in left if not warp.waiting]
        if cta.flights and (all(warp.polling for warp in ready) or (cta.launch.late is None and rng.random() < LANDS)):
            cta.land()
            continue
        if not ready:
            pending = [mbarrier.pends() for mbarrier in cta.mbarriers.values() if mbarrier.pends()]
            raise _stuck(left[0], "; ".join(["deadlock: all warps wait", *pending]))
        warp = ready[int(rng.integers(len(ready)))]
        for _ in range(int(rng.geometric(1 / BURST))):
            warp.step(code)
            steps += 1
            if warp.waiting or warp.polling or warp.exited:
                break
        if warp.exited:
            left.remove(warp)
            warp.cta.leave(warp)
        if steps > limit:
            raise _stuck(warp, f"no end after {limit} instructions")
    cta.end()


def _stuck(warp: Warp, kind: str) -> Fault:
    return Fault(kind, int(warp.mask.argmax())).at(warp.step_now.source, warp)


@dataclass
class Launch:
    """A kernel with the memory that it may use.

    Attributes:
        regions: parameters and global memory.
        registers: their types; rows: of those of 32 bits, places in the warps' banks.
        symbols: of variables, (memory, address in it).
        tensormaps: addresses of those that the kernel has changed.
        late: whether asynchronous copies take effect as late as possible; None: by chance.
        limit: instructions of a CTA's warps together, after which it counts as endless.
    """

    kernel: ptx.Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    regions: dict[int, Storage]
    symbols: dict[str, tuple[str, int]]
    shared_bytes: int
    dynamic_bytes: int
    local_bytes: int
    late: bool | None
    limit: int
    registers: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    tensormaps: set[int] = field(default_factory=set)

    def run(self, seed: int) -> None:
        """Execute, in an order that the seed determines."""
        from tests.emulated.machine.instructions import decode

        self.registers = list(self.kernel.registers.values())
        wide = [TYPES[kind].raw == np.dtype("u4") for kind in self.registers]
        self.rows = np.where(wide, np.cumsum(wide) - 1, -1).tolist()
        code = decode(self)
        rng = np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            for place in rng.permutation(int(np.prod(self.grid))):
                x, rest = int(place) % self.grid[0], int(place) // self.grid[0]
                cta = CTA(self, (x, rest % self.grid[1], rest // self.grid[1]), rng)
                interleave(cta, code, self.limit)
