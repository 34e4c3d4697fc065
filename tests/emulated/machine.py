"""A launch, executed: its CTAs one after the other, their warps interleaved by a seed, 32 lanes at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.emulated import ptx
from tests.emulated.memory import LOCAL, SHARED, Array, Clocks, Fault, Memory, Storage
from tests.emulated.values import TYPES

GONE = 1 << 30
"""The program counter of a lane that has exited, or never was."""
BURST = 24
"""Instructions that a warp runs on average before another may."""
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


class Warp:
    """32 lanes: registers, by the place of their names in the kernel, and program counters."""

    def __init__(self, cta: CTA, number: int, registers: list[str]):
        self.cta, self.number = cta, number
        self.lane = np.arange(32, dtype=np.uint32)
        self.thread = self.lane + np.uint32(32 * number)
        self.registers = [np.full(32, JUNK, np.uint64).astype(TYPES[kind].raw) for kind in registers]
        self.pcs = np.where(self.thread < cta.threads, 0, GONE)
        self.waiting = False
        self.copies: list[Copy] = []
        self.groups = np.zeros(32, np.int64)
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
        step = code[pc]
        mask = self.mask
        if step.guard is not None:
            mask = mask & (self.registers[step.guard].astype(bool) ^ step.negated)
        self.pc = pc + 1
        if step.guard is None or mask.any():
            try:
                step.run(self, mask)
            except Fault as fault:
                fault.line, fault.text = step.source.line, step.source.text
                fault.cta, fault.warp = self.cta.index, self.number
                raise
        if self.pc == pc + 1 >= self.next:
            self.pcs[self.mask] = self.pc
            self.regroup()


@dataclass(frozen=True)
class Step:
    """A decoded instruction: what runs it on a warp's lanes, where its guard is true."""

    source: ptx.Instruction
    run: Callable[[Warp, Array], None]
    guard: int | None
    negated: bool


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

    def leave(self, warp: Warp) -> None:
        """A warp has exited."""
        for number in list(self.barriers):
            self.release(number)


def interleave(warps: list[Warp], code: list[Step], rng: np.random.Generator, limit: int) -> None:
    """Run warps to their ends, each time some instructions of one by chance."""
    left = [warp for warp in warps if not warp.exited]
    steps = 0
    while left:
        ready = [warp for warp in left if not warp.waiting]
        if not ready:
            raise _stuck(left[0], code, "deadlock: all warps wait")
        warp = ready[int(rng.integers(len(ready)))]
        for _ in range(int(rng.geometric(1 / BURST))):
            warp.step(code)
            steps += 1
            if warp.waiting or warp.exited:
                break
        if warp.exited:
            left.remove(warp)
            warp.cta.leave(warp)
        if steps > limit:
            raise _stuck(warp, code, f"no end after {limit} instructions")


def _stuck(warp: Warp, code: list[Step], kind: str) -> Fault:
    source = code[max(warp.pc - 1, 0)].source
    fault = Fault(kind, int(warp.mask.argmax()))
    fault.line, fault.text, fault.cta, fault.warp = source.line, source.text, warp.cta.index, warp.number
    return fault


@dataclass
class Launch:
    """A kernel with the memory that it may use.

    Attributes:
        regions: parameters and global memory.
        registers: their types.
        symbols: of variables, (memory, address in it).
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

    def run(self, seed: int) -> None:
        """Execute, in an order that the seed determines."""
        from tests.emulated.instructions import decode

        self.registers = list(self.kernel.registers.values())
        code = decode(self)
        rng = np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            for place in rng.permutation(int(np.prod(self.grid))):
                x, rest = int(place) % self.grid[0], int(place) // self.grid[0]
                cta = CTA(self, (x, rest % self.grid[1], rest // self.grid[1]), rng)
                interleave(cta.warps, code, rng, self.limit)
