"""The memories of a launch, in one generic address space with a region each, far apart.

Every byte is inside or outside of what was registered, and valid or never written. Bytes of shared memory also remember
who wrote and read them last, so that two warps that meet there without a barrier between them are reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

REGION = 36
"""Bits of an address within its region. 16 GB of zeros below the first: a small number is no address."""
SHARED, LOCAL, PARAM, GLOBAL = 1, 2, 3, 4
"""Regions; those from GLOBAL on are a buffer each."""
WINDOW = {"shared": SHARED << REGION, "local": LOCAL << REGION, "param": PARAM << REGION}
"""What makes an address of a memory a generic one; those of global and constant memory are generic ones already."""
PENDING = 1 << 30
"""When a byte that an asynchronous operation is still writing, or reading, was touched: later than any clock."""
OBJECT = PENDING + 1
"""When a byte of an mbarrier was written: it is nobody's to touch but by its own instructions."""
AGENTS = 128
"""How many mbarriers a CTA may have, each of which has a clock of what its copies have written."""
RAW: dict[int, np.dtype[Any]] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
"""Unsigned types by their bytes."""


class Fault(Exception):
    """What a kernel does wrong, and where; what is not known is None."""

    def __init__(self, kind: str, lane: int | None = None, address: int | None = None):
        self.kind, self.lane, self.address = kind, lane, address
        self.line: int | None = None
        self.text = ""
        self.cta: tuple[int, ...] | None = None
        self.warp: int | None = None

    def at(self, source: Any, warp: Any) -> Fault:
        """Note the instruction, and the warp that executes it."""
        self.line, self.text, self.cta, self.warp = source.line, source.text, warp.cta.index, warp.number
        return self

    def __str__(self) -> str:
        address = None if self.address is None else hex(self.address)
        return (
            f"{self.kind}, at PTX line {self.line}: {self.text!r}"
            f" (CTA {self.cta}, warp {self.warp}, lane {self.lane}, address {address})"
        )


class Clocks:
    """Vector clocks of the warps of a CTA: what of the others' work each has seen, by the barriers they met at.

    Attributes:
        seen: of each warp, the clocks of warps and, after them, of mbarriers, up to which it sees what they wrote.
        fenced: the same with a proxy fence since, so that asynchronous operations see it too.
    """

    def __init__(self, warps: int):
        self.warps = warps
        self.seen = np.eye(warps, warps + AGENTS, dtype=np.int32)
        self.fenced = np.zeros_like(self.seen)
        self.events = np.zeros(AGENTS, np.int32)

    def nothing(self) -> Array:
        """What is left where nobody has been."""
        return np.zeros((2, self.seen.shape[1]), np.int32)

    def leave(self, warp: int) -> Array:
        """What the warp has seen and done, for others to see; what it does from now on is later."""
        left = np.stack([self.seen[warp], self.fenced[warp]])
        self.seen[warp, warp] += 1
        return left

    def join(self, warp: int, left: Array) -> None:
        """The warp now sees what others left."""
        np.maximum(self.seen[warp], left[0], out=self.seen[warp])
        np.maximum(self.fenced[warp], left[1], out=self.fenced[warp])

    def fence(self, warp: int) -> None:
        """A proxy fence: anywhere on the way from a write to an asynchronous operation, it orders them."""
        self.fenced[warp] = self.seen[warp]
        self.seen[warp, warp] += 1

    def event(self, agent: int) -> int:
        """Something that an mbarrier counts has happened: when, by its clock."""
        self.events[agent - self.warps] += 1
        return int(self.events[agent - self.warps])


class Storage:
    """The bytes of one region, from offset 0.

    Attributes:
        data: values.
        inside: 255 where an access is within bounds.
        valid: 255 where the byte has been written.
    """

    def __init__(self, size: int, name: str, clocks: Clocks | None = None, fill: int = 0xFF):
        size = -(-size // 16) * 16
        self.name, self.clocks = name, clocks
        self.data = np.full(size, fill, np.uint8)
        self.inside = np.full(size, 255, np.uint8)
        self.valid = np.zeros(size, np.uint8)
        if clocks is not None:
            self.writer = np.zeros(size, np.int16)
            self.written = np.zeros(size, np.int32)
            self.generic = np.zeros(size, bool)
            self.read = np.zeros((clocks.warps, size), np.int32)

    def place(self, offsets: Array, size: int, lanes: Array, base: int) -> Array:
        """Indices of the offsets in units of size bytes; they are aligned."""
        high = len(self.data) - size
        outside = (offsets < 0) | (offsets > high)
        _report(outside, f"out of bounds of {self.name}", lanes, offsets, base)
        index = offsets // size
        _report(_partial(self.inside, size, index), f"out of bounds of {self.name}", lanes, offsets, base)
        return index

    def check_read(self, index: Array, size: int, lanes: Array, base: int, warp: int, plain: bool) -> None:
        """Check that the bytes are valid, and written by this warp or before a barrier."""
        self.check_written(index, size, lanes, base, warp, "read of bytes that another warp", plain)
        invalid = _partial(self.valid, size, index)
        _report(invalid, f"read of bytes of {self.name} that were never written", lanes, index * size, base)
        if self.clocks is not None and plain:
            self.read[warp].reshape(-1, size)[index] = self.clocks.seen[warp, warp]

    def check_write(
        self, index: Array, size: int, lanes: Array, base: int, warp: int, plain: bool, same: Array | bool = False
    ) -> None:
        """Check that no other warp has touched the bytes since a barrier, unless to write the same, as compilers do."""
        self.check_written(index, size, lanes, base, warp, "write of bytes that another warp", plain, same)
        if self.clocks is None:
            return
        if plain:
            reads = self.read.reshape(len(self.read), -1, size)[:, index]
            held = np.asarray((reads == PENDING).any((0, 2)))
            _report(held, "write of bytes that an asynchronous operation still reads", lanes, index * size, base)
            early = np.asarray((reads > self.clocks.seen[warp, : self.clocks.warps, None, None]).any((0, 2)))
            _report(early, "race: write of bytes that another warp reads", lanes, index * size, base)
        self.stamp(index, size, warp, int(self.clocks.seen[warp, warp]))

    def stamp(self, index: Array, size: int, writer: int, clock: int, generic: bool = True) -> None:
        """Note that a warp, or an mbarrier's copy, writes the bytes at this clock; generic: in the generic proxy."""
        if self.clocks is not None:
            self.writer.reshape(-1, size)[index] = writer
            self.written.reshape(-1, size)[index] = clock
            self.generic.reshape(-1, size)[index] = generic

    def check_proxy(self, index: Array, size: int, lanes: Array, base: int, warp: int, kind: str) -> None:
        """Check that there is a proxy fence between ordinary writes and an asynchronous operation."""
        if self.clocks is None:
            return
        written, writer = self.written.reshape(-1, size)[index], self.writer.reshape(-1, size)[index]
        early = (self.generic.reshape(-1, size)[index] & (written > self.clocks.fenced[warp][writer])).any(1)
        _report(early, f"{kind} of bytes that were written without fence.proxy.async since", lanes, index * size, base)

    def hold(self, index: Array, size: int, warp: int, clock: int = PENDING) -> None:
        """An asynchronous operation of the warp reads the bytes until it is waited for, at this clock."""
        if self.clocks is not None:
            self.read[warp].reshape(-1, size)[index] = clock

    def check_written(
        self,
        index: Array,
        size: int,
        lanes: Array,
        base: int,
        warp: int,
        kind: str,
        plain: bool,
        same: Array | bool = False,
    ) -> None:
        if self.clocks is None:
            return
        written = self.written.reshape(-1, size)[index]
        first = kind.split(" that")[0]
        if (written >= PENDING).any():
            pending = (written == PENDING).any(1)
            _report(pending, f"{first} that an asynchronous copy still writes", lanes, index * size, base)
            _report((written == OBJECT).any(1), f"{first} of an mbarrier", lanes, index * size, base)
        if plain:
            writer = self.writer.reshape(-1, size)[index]
            early = (written > self.clocks.seen[warp][writer]).any(1) & ~np.asarray(same)
            if early.any() and (writer[early.argmax()] >= self.clocks.warps).any():
                kind = f"{first} that an asynchronous copy, which was not waited for,"
            _report(early, f"race: {kind} writes", lanes, index * size, base)


class Memory:
    """What a warp's accesses go through; addresses are generic, and belong to the lanes named beside them."""

    def __init__(self, regions: dict[int, Storage]):
        self.regions = regions

    def load(self, addresses: Array, lanes: Array, size: int, count: int, warp: int, plain: bool = True) -> Array:
        """(lanes, count) values of ``size`` bytes, unsigned; not plain: volatile or atomic, which race with nothing."""
        out = np.empty((len(addresses), count), RAW[size])
        wide = size * count
        for storage, base, where, offsets in self._regions(addresses, lanes, wide):
            index = storage.place(offsets, wide, lanes[where], base)
            storage.check_read(index, wide, lanes[where], base, warp, plain)
            out[where] = storage.data.view(RAW[size]).reshape(-1, count)[index]
        return out

    def store(self, addresses: Array, lanes: Array, values: Array, warp: int, plain: bool = True) -> None:
        """Store (lanes, count) unsigned values."""
        size, count = values.dtype.itemsize, values.shape[1]
        wide = size * count
        for storage, base, where, offsets in self._regions(addresses, lanes, wide):
            index = storage.place(offsets, wide, lanes[where], base)
            there = storage.data.view(RAW[size]).reshape(-1, count)
            same = (there[index] == values[where]).all(1)
            storage.check_write(index, wide, lanes[where], base, warp, plain, same)
            there[index] = values[where]
            storage.valid.reshape(-1, wide)[index] = 255

    def check_source(self, addresses: Array, lanes: Array, size: int, warp: int) -> None:
        """Check that a load would be right."""
        for storage, base, where, offsets in self._regions(addresses, lanes, size):
            storage.check_read(storage.place(offsets, size, lanes[where], base), size, lanes[where], base, warp, True)

    def begin_write(self, addresses: Array, lanes: Array, size: int, warp: int, generic: bool = True) -> None:
        """An asynchronous write starts: the bytes are nobody's to touch until it is stored with ``end_write``."""
        for storage, base, where, offsets in self._regions(addresses, lanes, size):
            index = storage.place(offsets, size, lanes[where], base)
            if not generic:
                storage.check_proxy(index, size, lanes[where], base, warp, "asynchronous write")
            storage.check_write(index, size, lanes[where], base, warp, True)
            storage.stamp(index, size, warp, PENDING)
            storage.valid.reshape(-1, size)[index] = 0

    def end_write(
        self, addresses: Array, lanes: Array, size: int, writer: int, clock: int | None = None, generic: bool = True
    ) -> None:
        """The warp has waited for an asynchronous write: it counts as its own of now; or as an mbarrier's, by clock."""
        for storage, base, where, offsets in self._regions(addresses, lanes, size):
            index = storage.place(offsets, size, lanes[where], base)
            if clock is None:
                clock = 0 if storage.clocks is None else int(storage.clocks.seen[writer, writer])
            storage.stamp(index, size, writer, clock, generic)
            storage.valid.reshape(-1, size)[index] = 255

    def end_read(self, addresses: Array, size: int, warp: int, again: bool = False) -> None:
        """The warp has waited for an asynchronous read, which counts as its own of now; again: another goes on."""
        for storage, _, _, offsets in self._regions(addresses, np.zeros(len(addresses), int), size):
            clock = 0 if storage.clocks is None else int(storage.clocks.seen[warp, warp])
            storage.hold(offsets // size, size, warp, PENDING if again else clock)

    def read_asynchronously(self, addresses: Array, lanes: Array, size: int, warp: int) -> None:
        """An asynchronous read starts: the bytes must be there for it, and stay until it is waited for."""
        for storage, base, where, offsets in self._regions(addresses, lanes, size):
            index = storage.place(offsets, size, lanes[where], base)
            storage.check_read(index, size, lanes[where], base, warp, True)
            storage.check_proxy(index, size, lanes[where], base, warp, "asynchronous read")
            storage.hold(index, size, warp)

    def forget(self, addresses: Array, size: int) -> None:
        """The bytes count as never written."""
        for storage, _, _, offsets in self._regions(addresses, np.zeros(len(addresses), int), size):
            storage.valid.reshape(-1, size)[offsets // size] = 0

    def poke(self, address: int, values: Array) -> None:
        """Bytes that are written whatever is there: an asynchronous copy's, at an address that was checked."""
        storage, offset = self.regions[address >> REGION], address & ((1 << REGION) - 1)
        storage.data[offset : offset + len(values)] = values

    def peek(self, address: int, size: int) -> Array:
        """Bytes at an address that was checked."""
        storage, offset = self.regions[address >> REGION], address & ((1 << REGION) - 1)
        return storage.data[offset : offset + size]

    def _regions(self, addresses: Array, lanes: Array, size: int) -> list[tuple[Storage, int, Any, Array]]:
        """For each region that is addressed: its bytes, its base, which of the addresses, and their offsets in it."""
        if not len(addresses):
            return []
        addresses = addresses.astype(np.int64)
        _report(addresses % size != 0, f"misaligned access of {size} bytes", lanes, addresses, 0)
        keys = addresses >> REGION
        offsets = addresses & ((1 << REGION) - 1)
        if (keys == keys[0]).all():
            return [(self._region(keys, 0, lanes, addresses), int(keys[0]) << REGION, slice(None), offsets)]
        found = []
        for key in np.unique(keys):
            where = np.flatnonzero(keys == key)
            storage = self._region(keys, int(where[0]), lanes, addresses)
            found.append((storage, int(key) << REGION, where, offsets[where]))
        return found

    def _region(self, keys: Array, first: int, lanes: Array, addresses: Array) -> Storage:
        storage = self.regions.get(int(keys[first]))
        if storage is None:
            raise Fault("out of bounds: no memory there", int(lanes[first]), int(addresses[first]) % (1 << 64))
        return storage


def _partial(flags: Array, size: int, index: Array) -> Array:
    """Whether units of ``size`` bytes lack a flag somewhere."""
    if size > 8:
        return np.asarray(~flags.reshape(-1, size)[index].all(1))
    return np.asarray(flags.view(RAW[size])[index] != (1 << 8 * size) - 1)


def _report(wrong: Array, kind: str, lanes: Array, offsets: Array, base: int) -> None:
    if wrong.any():
        first = int(wrong.argmax())
        raise Fault(kind, int(lanes[first]), base + int(offsets[first]))
