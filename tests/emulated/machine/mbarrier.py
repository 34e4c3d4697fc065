"""Objects in shared memory that count arrivals and the bytes of asynchronous copies: PTX ISA 9.7.13.15."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulated.machine.instructions import Decoder, Run, family
from tests.emulated.machine.machine import Flight, Warp
from tests.emulated.machine.memory import AGENTS, OBJECT, REGION, SHARED, Array, Fault
from tests.emulated.machine.transfers import take_effect

SCOPES = "relaxed", "acquire", "release", "cta", "cluster", "shared", "shared::cta", "shared::cluster", "b64"
TRANSACTIONS = (1 << 20) - 1
"""How many bytes may be pending."""
FAILS = 1 / 8
"""How often try_wait returns in vain, which it may."""


class Mbarrier:
    """One that is initialised.

    Attributes:
        expected: arrivals a phase.
        pending: arrivals that are missing in this phase.
        bytes: that copies of this phase have still to write.
        phase: how many are complete.
        agent: what stands in the clocks for what its copies write.
        gathered: what those that arrived have seen; released: with the latest phase.
        initialised: by which warp, at which of its clocks.
    """

    def __init__(self, warp: Warp, address: int, expected: int, agent: int):
        self.cta, self.address, self.expected, self.agent = warp.cta, address, expected, agent
        self.pending, self.bytes, self.phase = expected, 0, 0
        self.gathered, self.released = warp.cta.clocks.nothing(), warp.cta.clocks.nothing()
        self.initialised = warp.number, int(warp.cta.clocks.seen[warp.number, warp.number])
        self.warp, self.step = warp, warp.step_now

    def gather(self, left: Array) -> None:
        np.maximum(self.gathered, left, out=self.gathered)

    def happened(self) -> int:
        """The clock of what copies have written until now, for those that wait for this phase to see."""
        event = self.cta.clocks.event(self.agent)
        self.gathered[:, self.agent] = event
        return event

    def count(self, arrivals: int, transactions: int) -> None:
        """Change what is pending; the phase is complete when nothing is."""
        if arrivals > self.pending:
            raise Fault(f"{arrivals} arrivals at an mbarrier, of which {self.pending} are pending", None, self.address)
        self.pending -= arrivals
        self.bytes += transactions
        if abs(self.bytes) > TRANSACTIONS:
            raise Fault(f"{self.bytes} bytes pending at an mbarrier, beyond its range", None, self.address)
        if not self.pending and not self.bytes:
            self.phase += 1
            self.pending = self.expected
            self.released = self.gathered.copy()
            self.cta.wake()

    def pends(self) -> str:
        """What is missing of a phase that has begun."""
        if not self.bytes and self.pending == self.expected:
            return ""
        return f"mbarrier {self.address:#x}: {self.pending} arrivals and {self.bytes} bytes pending, phase {self.phase}"

    def end(self) -> None:
        """Check that no bytes are pending when it is not used any more."""
        if self.bytes:
            fault = Fault(f"{self.bytes} bytes pending at the end of an mbarrier", None, self.address)
            raise fault.at(self.step.source, self.warp)


def find(warp: Warp, lane: int, address: int) -> Mbarrier:
    """The one at an address, of whose initialisation the warp must know."""
    mbarrier = warp.cta.mbarriers.get(address)
    if mbarrier is None:
        raise Fault("no mbarrier was initialised there", lane, address)
    by, clock = mbarrier.initialised
    if warp.cta.clocks.seen[warp.number, by] < clock:
        raise Fault("race: an mbarrier that another warp initialises", lane, address)
    return mbarrier


def each(d: Decoder, place: int, act: Callable[[Warp, int, Mbarrier], None]) -> Run:
    """Act for each lane on the mbarrier that it addresses."""
    address = d.address(d.operands[place], "shared" if d.space else "")

    def run(warp: Warp, mask: Array) -> None:
        where = address(warp)
        for lane in np.flatnonzero(mask):
            try:
                act(warp, int(lane), find(warp, int(lane), int(where[lane])))
            except Fault as fault:
                fault.lane = int(lane)
                raise

    return run


@family("mbarrier.init")
def _init(d: Decoder) -> Run:
    """9.7.13.15.9: the address is of 8 bytes of shared memory."""
    d.allow("init", *SCOPES)
    address = d.address(d.operands[0], "shared" if d.space else "")
    count = d.read(d.operands[1], "u32")

    def run(warp: Warp, mask: Array) -> None:
        cta = warp.cta
        where, counts = address(warp), count(warp)
        for lane in np.flatnonzero(mask):
            place, one = int(where[lane]), np.array([lane])
            if place >> REGION != SHARED:
                raise Fault("an mbarrier outside of shared memory", int(lane), place)
            if place in cta.mbarriers:
                raise Fault("an mbarrier is there already", int(lane), place)
            if not 0 < counts[lane] <= TRANSACTIONS:
                raise Fault(f"an mbarrier for {counts[lane]} arrivals", int(lane), place)
            agent = cta.agents.setdefault(place, cta.clocks.warps + len(cta.agents))
            if len(cta.agents) > AGENTS:
                raise Fault("too many mbarriers", int(lane), place)
            cta.memory.begin_write(where[one], one, 8, warp.number)
            cta.mbarriers[place] = Mbarrier(warp, place, int(counts[lane]), agent)
            cta.memory.end_write(where[one], one, 8, warp.number, OBJECT)

    return run


@family("mbarrier.inval")
def _invalidate(d: Decoder) -> Run:
    """9.7.13.15.10."""
    d.allow("inval", *SCOPES)

    def act(warp: Warp, lane: int, mbarrier: Mbarrier) -> None:
        mbarrier.end()
        del warp.cta.mbarriers[mbarrier.address]
        where, one = np.array([mbarrier.address]), np.array([lane])
        warp.cta.memory.end_write(where, one, 8, warp.number)
        warp.cta.memory.forget(where, 8)

    return each(d, 0, act)


@family("mbarrier.arrive", "mbarrier.expect_tx", "mbarrier.complete_tx")
def _arrive(d: Decoder) -> Run:
    """9.7.13.15.11 - 13: expected bytes are added before the arrival; the state that is returned is the phase."""
    opcode = d.has[0]
    expects, completes = "expect_tx" in d.has, "complete_tx" in d.has
    d.allow("arrive", "expect_tx", "complete_tx", *SCOPES)
    arrives = opcode == "arrive"
    returns = arrives and not hasattr(d.operands[0], "base")
    state = d.write(d.operands[0], "b64") if returns else None
    rest = d.operands[1 + returns :]
    number = d.read(rest[0], "u32") if rest else None
    ordered = "relaxed" not in d.has
    states = np.zeros(32, np.uint64)

    def act(warp: Warp, lane: int, mbarrier: Mbarrier) -> None:
        amount = int(number(warp)[lane]) if number else 1
        states[lane] = mbarrier.phase
        if arrives and ordered:
            mbarrier.gather(warp.cta.clocks.leave(warp.number))
        transactions = amount if expects else -amount if completes else 0
        mbarrier.count(0 if not arrives else 1 if expects else amount, transactions)

    inner = each(d, int(returns), act)

    def run(warp: Warp, mask: Array) -> None:
        inner(warp, mask)
        if state:
            state(warp, mask, states)

    return run


@family("mbarrier.test_wait", "mbarrier.try_wait")
def _wait(d: Decoder) -> Run:
    """9.7.13.15.16: whether the phase of a state, or the latest phase of a parity, is complete.

    try_wait suspends the thread for some time, but may return in vain; test_wait does not suspend it.
    """
    d.allow("test_wait", "try_wait", "parity", *SCOPES)
    tries, parity, ordered = d.has[0] == "try_wait", "parity" in d.has, "relaxed" not in d.has
    result = d.write(d.operands[0], "pred")
    asked = d.read(d.operands[2], "u32" if parity else "b64")
    done = np.zeros(32, bool)

    def act(warp: Warp, lane: int, mbarrier: Mbarrier) -> None:
        wanted = int(asked(warp)[lane])
        wanted = wanted & 1 if parity else wanted  # Triton passes -1, too.
        done[lane] = (mbarrier.phase & 1) != wanted if parity else mbarrier.phase > wanted
        if done[lane] and ordered:
            warp.cta.clocks.join(warp.number, mbarrier.released)

    inner = each(d, 1, act)

    def run(warp: Warp, mask: Array) -> None:
        inner(warp, mask)
        if tries and not done[mask].all() and warp.cta.rng.random() >= FAILS:
            warp.block()
            return
        warp.polling = not tries and not done[mask].all()
        result(warp, mask, done)

    return run


@family("cp.async.mbarrier.arrive")
def _arrive_after_copies(d: Decoder) -> Run:
    """9.7.13.15.14: an arrival when the lane's copies until now are complete; without .noinc one more is pending."""
    d.allow("async", "mbarrier", "arrive", "noinc", *SCOPES)
    counted = "noinc" in d.has

    def act(warp: Warp, lane: int, mbarrier: Mbarrier) -> None:
        if not counted:
            mbarrier.pending += 1
        copies = list(warp.copies)

        def land() -> None:
            event = mbarrier.happened()
            for copy in copies:
                which = np.flatnonzero((copy.lanes == lane) & ~copy.done)
                if len(which):
                    if copy.late:
                        take_effect(warp, copy, which)
                    target = copy.target[which]
                    warp.cta.memory.end_write(target, copy.lanes[which], copy.size, mbarrier.agent, event)
                    copy.done[which] = True
            warp.copies = [copy for copy in warp.copies if not copy.done.all()]
            mbarrier.count(1, 0)

        warp.cta.begin(Flight(land, warp, warp.step_now, lane))

    return each(d, 0, act)
