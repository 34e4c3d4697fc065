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
"""When a byte that an asynchronous copy is still writing was written: later than any clock."""
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

    def __str__(self) -> str:
        address = None if self.address is None else hex(self.address)
        return (
            f"{self.kind}, at PTX line {self.line}: {self.text!r}"
            f" (CTA {self.cta}, warp {self.warp}, lane {self.lane}, address {address})"
        )


class Clocks:
    """Vector clocks of the warps of a CTA: what of the others' work each has seen, by the barriers they met at."""

    def __init__(self, warps: int):
        self.seen = np.eye(warps, dtype=np.int32)

    def leave(self, warp: int) -> Array:
        """What the warp has seen and done, for others to see; what it does from now on is later."""
        seen = self.seen[warp].copy()
        self.seen[warp, warp] += 1
        return seen

    def join(self, warp: int, seen: Array) -> None:
        """The warp now sees what others left."""
        np.maximum(self.seen[warp], seen, out=self.seen[warp])


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
            self.read = np.zeros((len(clocks.seen), size), np.int32)

    def place(self, offsets: Array, size: int, lanes: Array, base: int) -> Array:
        """Indices of the offsets in units of size bytes; they are aligned."""
        high = len(self.data) - size
        outside = (offsets < 0) | (offsets > high)
        _report(outside, f"out of bounds of {self.name}", lanes, offsets, base)
        index = offsets // size
        _report(_partial(self.inside, size, index), f"out of bounds of {self.name}", lanes, offsets, base)
        return index

    def check_read(self, index: Array, size: int, lanes: Array, base: int, warp: int, plain: bool) -> None:
        """That the bytes are valid, and written by this warp or before a barrier."""
        self.check_written(index, size, lanes, base, warp, "read of bytes that another warp", plain)
        invalid = _partial(self.valid, size, index)
        _report(invalid, f"read of bytes of {self.name} that were never written", lanes, index * size, base)
        if self.clocks is not None and plain:
            self.read[warp].reshape(-1, size)[index] = self.clocks.seen[warp, warp]

    def check_write(
        self, index: Array, size: int, lanes: Array, base: int, warp: int, plain: bool, same: Array | bool = False
    ) -> None:
        """That no other warp has touched the bytes since a barrier, unless to write the same: compilers do that."""
        self.check_written(index, size, lanes, base, warp, "write of bytes that another warp", plain, same)
        if self.clocks is None or not plain:
            return
        reads = self.read.reshape(len(self.read), -1, size)[:, index]
        early = (reads > self.clocks.seen[warp][:, None, None]).any((0, 2))
        _report(early, "race: write of bytes that another warp reads", lanes, index * size, base)
        self.stamp(index, size, warp, int(self.clocks.seen[warp, warp]))

    def stamp(self, index: Array, size: int, warp: int, clock: int) -> None:
        """Note that the warp writes the bytes at this clock."""
        if self.clocks is not None:
            self.writer.reshape(-1, size)[index] = warp
            self.written.reshape(-1, size)[index] = clock

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
        pending = (written == PENDING).any(1)
        _report(pending, f"{kind.split(' that')[0]} that an asynchronous copy still writes", lanes, index * size, base)
        if plain:
            early = (written > self.clocks.seen[warp][self.writer.reshape(-1, size)[index]]).any(1)
            _report(early & ~np.asarray(same), f"race: {kind} writes", lanes, index * size, base)


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
        """That a load would be right."""
        for storage, base, where, offsets in self._regions(addresses, lanes, size):
            storage.check_read(storage.place(offsets, size, lanes[where], base), size, lanes[where], base, warp, True)

    def begin_write(self, addresses: Array, lanes: Array, size: int, warp: int) -> None:
        """An asynchronous write starts: the bytes are nobody's to touch until it is stored with ``end_write``."""
        for storage, base, where, offsets in self._regions(addresses, lanes, size):
            index = storage.place(offsets, size, lanes[where], base)
            storage.check_write(index, size, lanes[where], base, warp, True)
            storage.stamp(index, size, warp, PENDING)
            storage.valid.reshape(-1, size)[index] = 0

    def end_write(self, addresses: Array, lanes: Array, size: int, warp: int) -> None:
        """The warp has waited for an asynchronous write: it counts as its own of now."""
        for storage, base, where, offsets in self._regions(addresses, lanes, size):
            index = storage.place(offsets, size, lanes[where], base)
            clock = 0 if storage.clocks is None else int(storage.clocks.seen[warp, warp])
            storage.stamp(index, size, warp, clock)
            storage.valid.reshape(-1, size)[index] = 255

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
    """Which of the units of ``size`` bytes are not flagged altogether."""
    if size > 8:
        return np.asarray(~flags.reshape(-1, size)[index].all(1))
    return np.asarray(flags.view(RAW[size])[index] != (1 << 8 * size) - 1)


def _report(wrong: Array, kind: str, lanes: Array, offsets: Array, base: int) -> None:
    if wrong.any():
        first = int(wrong.argmax())
        raise Fault(kind, int(lanes[first]), base + int(offsets[first]))
