"""Bulk copies, and tensor maps: PTX ISA 9.7.9.27 - 28 and 5.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulated.machine.instructions import Decoder, Read, Run, family
from tests.emulated.machine.machine import Flight, Warp
from tests.emulated.machine.mbarrier import Mbarrier, find
from tests.emulated.machine.memory import LOCAL, REGION, SHARED, WINDOW, Array, Fault, Storage
from tests.emulated.machine.ptx import Address

TENSORMAP = np.dtype(
    [
        ("global_address", "u8"),
        ("global_stride", "u8", 4),
        ("global_dim", "u4", 5),
        ("box_dim", "u4", 5),
        ("element_stride", "u4", 5),
        ("rank", "u1"),
        ("elemtype", "u1"),
        ("interleave_layout", "u1"),
        ("swizzle_mode", "u1"),
        ("fill_mode", "u1"),
        ("unused", "u1", 23),
    ]
)
"""What is in the 128 bytes, which hardware keeps to itself; the fields, and their numbers, are tensormap.replace's."""
BYTES = dict(enumerate((1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2)))
"""Bytes of an element of each elemtype."""
NANS: dict[int, np.generic] = {6: np.uint16(0x7FFF), 7: np.uint32(0x7FFFFFFF), 10: np.uint16(0x7FFF)}
UNIT = 16
"""Bytes that a swizzle keeps together, and by which all is aligned."""


def tensormap(
    address: int, shape: Any, strides: Any, box: Any, elemtype: int, swizzle: int, nans: bool = False
) -> bytes:
    """One in tile mode; sizes come with the innermost last, strides are in elements, swizzle 1, 2, 3: 32, 64, 128."""
    one = np.zeros(1, TENSORMAP)
    rank = len(shape)
    one["global_address"] = address
    one["global_dim"][0, :rank], one["box_dim"][0, :rank] = shape[::-1], box[::-1]
    one["global_stride"][0, : rank - 1] = [stride * BYTES[elemtype] for stride in strides[-2::-1]]
    one["element_stride"] = 1
    one["rank"], one["elemtype"], one["swizzle_mode"], one["fill_mode"] = rank - 1, elemtype, swizzle, nans
    return one.tobytes()


def swizzled(offsets: Array, span: int) -> Array:
    """Where the units at shared addresses are, when a swizzle spans so many bytes."""
    return offsets ^ (((offsets >> 7) & (span // UNIT - 1)) << 4) if span else offsets


class Box:
    """Part of a tensor: the bytes of its elements in memory, and where they are in shared memory.

    Attributes:
        size: in bytes.
        addresses: of the elements, the innermost dimension last, and whether each is within the tensor.
        units: shared offsets of the units, in the order of the elements.
    """

    def __init__(self, raw: Array, coordinates: list[int], place: int):
        one = raw.view(TENSORMAP)[0]
        rank = int(one["rank"]) + 1
        box, shape = one["box_dim"][:rank].astype(int), one["global_dim"][:rank].astype(np.int64)
        element, swizzle = BYTES.get(int(one["elemtype"]), 0), int(one["swizzle_mode"])
        strides = np.array([element, *one["global_stride"][: rank - 1].astype(np.int64)])
        base, row = int(one["global_address"]), int(box[0]) * element
        span = 16 << swizzle if swizzle else 0
        problems = {
            "dimensions": rank != len(coordinates),
            "type": not element,
            "address that is not aligned to 16 bytes": base % UNIT,
            "strides that are no multiples of 16 bytes": (strides[1:] % UNIT).any(),
            "box": ((box < 1) | (box > 256)).any(),
            "shape": (shape < 1).any(),
            "rows in the box of no multiple of 16 bytes": row % UNIT,
            "swizzle": swizzle > 3,
            "rows in the box other than the swizzle's span": span and row != span,
            "strides of elements": (one["element_stride"][:rank] != 1).any(),
            "interleaving": one["interleave_layout"],
        }
        for problem, present in problems.items():
            if present:
                raise Fault(f"a tensor map with unsupported {problem}")
        if place % 128:
            raise Fault("a box in shared memory that is not aligned to 128 bytes", None, WINDOW["shared"] + place)
        self.element, self.fills = element, int(one["elemtype"]) if one["fill_mode"] else -1
        self.size = row * int(np.prod(box[1:]))
        self.units = swizzled(np.arange(place, place + self.size, UNIT), span)
        addresses, inside = np.array(base), np.array(True)
        for size, extent, stride, first in zip(box[::-1], shape[::-1], strides[::-1], coordinates[::-1], strict=True):
            index = first + np.arange(size)
            addresses = addresses[..., None] + index * stride
            inside = inside[..., None] & (index >= 0) & (index < extent)
        self.addresses, self.inside = addresses.reshape(-1), inside.reshape(-1)

    def find(self, warp: Warp) -> tuple[Storage, Array] | None:
        """The memory of the elements within the tensor, and their indices there; None if there are none."""
        within = self.addresses[self.inside]
        if not len(within):
            return None
        keys = within >> REGION
        storage = warp.cta.memory.regions.get(int(keys[0]))
        if storage is None or (keys != keys[0]).any() or keys[0] <= LOCAL:
            raise Fault("a tensor map of no memory", None, int(within[0]))
        offsets = within & ((1 << REGION) - 1)
        none = np.zeros(len(offsets), int)
        return storage, storage.place(offsets, self.element, none, int(keys[0]) << REGION)

    def load(self, warp: Warp) -> Array:
        """(unit, 16) bytes; those beyond the tensor are zeros, or NaNs."""
        raw = np.zeros((len(self.addresses), self.element), np.uint8)
        if self.fills >= 0:
            raw[:] = np.frombuffer(NANS[self.fills].tobytes(), np.uint8)
        found = self.find(warp)
        if found:
            storage, index = found
            storage.check_read(index, self.element, index, 0, warp.number, True)
            raw[self.inside] = storage.data.reshape(-1, self.element)[index]
        return raw.reshape(-1, UNIT)

    def store(self, warp: Warp, units: Array) -> None:
        """Write the elements that are within the tensor."""
        found = self.find(warp)
        if found:
            storage, index = found
            storage.data.reshape(-1, self.element)[index] = units.reshape(-1, self.element)[self.inside]
            storage.valid.reshape(-1, self.element)[index] = 255


class Linear:
    """Bytes one after the other, in global and in shared memory."""

    def __init__(self, address: int, size: int, place: int):
        if address % UNIT or size % UNIT or place % UNIT:
            raise Fault("a bulk copy that is not aligned to 16 bytes", None, address)
        self.size, self.addresses = size, np.arange(address, address + size, UNIT)
        self.units = np.arange(place, place + size, UNIT)

    def load(self, warp: Warp) -> Array:
        none = np.zeros(len(self.addresses), int)
        return warp.cta.memory.load(self.addresses, none, 8, 2, warp.number).view(np.uint8)

    def store(self, warp: Warp, units: Array) -> None:
        none = np.zeros(len(self.addresses), int)
        warp.cta.memory.store(self.addresses, none, np.ascontiguousarray(units).view(np.uint64), warp.number)


class BulkStore:
    """A copy from shared memory: it reads at some time until its group is waited for, and writes later.

    Attributes:
        group: of its lane's; -1 if it is not committed.
        read: whether what it reads was waited for.
    """

    def __init__(self, warp: Warp, lane: int, box: Box | Linear):
        self.warp, self.lane, self.box, self.step = warp, lane, box, warp.step_now
        self.group, self.read, self.written = -1, False, False
        self.units: Array | None = None
        self.addresses = box.units + WINDOW["shared"]
        lanes = np.full(len(self.addresses), lane)
        warp.cta.memory.read_asynchronously(self.addresses, lanes, UNIT, warp.number)
        warp.bulk.append(self)
        if not warp.cta.slow():
            self.fetch()
            if not warp.cta.slow():
                self.write()

    def fetch(self) -> None:
        """Read, if it has not yet."""
        if self.units is None:
            shared = self.warp.cta.memory.regions[SHARED]
            self.units = shared.data.reshape(-1, UNIT)[self.box.units // UNIT].copy()

    def write(self) -> None:
        """Write, if it has not yet."""
        if not self.written:
            self.fetch()
            assert self.units is not None
            self.box.store(self.warp, self.units)
            self.written = True

    def wait(self, only_read: bool) -> None:
        """It is waited for."""
        self.fetch()
        if not self.read:
            self.warp.cta.memory.end_read(self.addresses, UNIT, self.warp.number)
            self.read = True
            for copy in self.warp.bulk:
                if not copy.read:
                    self.warp.cta.memory.end_read(copy.addresses, UNIT, self.warp.number, again=True)
        if not only_read:
            self.write()

    def fault(self, kind: str) -> Fault:
        return Fault(kind, self.lane).at(self.step.source, self.warp)


MODES = "async", "bulk", "tensor", "tile", "1d", "2d", "3d", "4d", "5d", "L2::cache_hint", "global"
TO_SHARED = "mbarrier::complete_tx::bytes", "shared::cta", "shared::cluster"


@family("cp.async.bulk", "cp.async.bulk.tensor")
def _bulk_copy(d: Decoder) -> Run:
    """9.7.9.25.4.1, 9.7.9.25.5.2: the destination's memory is named first; [map, {coordinates}] or [address], size."""
    spaces = [m.split("::")[0] for m in d.has if m.split("::")[0] in ("shared", "global")]
    loads = spaces[0] == "shared"
    if spaces not in (["shared", "global"], ["global", "shared"]):
        raise d.error("not supported")
    d.allow(*MODES, *(TO_SHARED if loads else ("bulk_group", "shared::cta")))
    where, of = d.operands[0], d.operands[1]
    remote, local = (of, where) if loads else (where, of)
    place = d.address(local, "shared")
    barrier = d.address(d.operands[2 + ("tensor" not in d.has)], "shared") if loads else None
    what = _box(d, remote) if "tensor" in d.has else _linear(d, remote, d.operands[2])

    def run(warp: Warp, mask: Array) -> None:
        at = place(warp)
        for lane in np.flatnonzero(mask):
            try:
                box = what(warp, int(lane), int(at[lane]) - WINDOW["shared"])
                if barrier:
                    _begin_load(warp, int(lane), box, find(warp, int(lane), int(barrier(warp)[lane])))
                else:
                    BulkStore(warp, int(lane), box)
            except Fault as fault:
                fault.lane = int(lane)
                raise

    return run


def _begin_load(warp: Warp, lane: int, box: Box | Linear, mbarrier: Mbarrier) -> None:
    cta = warp.cta
    addresses = box.units + WINDOW["shared"]
    lanes = np.full(len(addresses), lane)
    cta.memory.begin_write(addresses, lanes, UNIT, warp.number, generic=False)

    def land() -> None:
        if cta.mbarriers.get(mbarrier.address) is not mbarrier:
            raise Fault("the mbarrier of an asynchronous copy is there no more", lane, mbarrier.address)
        cta.memory.regions[SHARED].data.reshape(-1, UNIT)[box.units // UNIT] = box.load(warp)
        cta.memory.end_write(addresses, lanes, UNIT, mbarrier.agent, mbarrier.happened(), generic=False)
        mbarrier.count(0, -box.size)

    cta.begin(Flight(land, warp, warp.step_now, lane))


What = Callable[[Warp, int, int], "Box | Linear"]


def _box(d: Decoder, operand: object) -> What:
    assert isinstance(operand, Address)
    address = d.address(operand, "")
    coordinates = [d.read(name, "s32") for name in operand.coordinates]

    def box(warp: Warp, lane: int, place: int) -> Box:
        where = int(address(warp)[lane])
        if where % 64:
            raise Fault("a tensor map that is not aligned to 64 bytes", lane, where)
        if where in warp.cta.launch.tensormaps and where not in warp.cta.acquired:
            raise Fault("a tensor map that was changed without fence.proxy.tensormap since", lane, where)
        return Box(_read_map(warp, where, lane), [int(read(warp)[lane]) for read in coordinates], place)

    return box


def _linear(d: Decoder, operand: object, size: object) -> What:
    address, count = d.address(operand, "global"), d.read(size, "u32")  # type: ignore[arg-type]
    return lambda warp, lane, place: Linear(int(address(warp)[lane]), int(count(warp)[lane]), place)


def _read_map(warp: Warp, where: int, lane: int) -> Array:
    units, lanes = np.arange(where, where + TENSORMAP.itemsize, UNIT), np.full(TENSORMAP.itemsize // UNIT, lane)
    warp.cta.memory.load(units, lanes, 8, 2, warp.number)
    return warp.cta.memory.peek(where, TENSORMAP.itemsize).copy()


@family("cp.async.bulk.commit_group")
def _commit(d: Decoder) -> Run:
    """9.7.9.25.6: groups are by lane."""

    def run(warp: Warp, mask: Array) -> None:
        for copy in warp.bulk:
            if copy.group < 0 and mask[copy.lane]:
                copy.group = int(warp.bulk_groups[copy.lane])
        warp.bulk_groups[mask] += 1

    return run


@family("cp.async.bulk.wait_group")
def _wait(d: Decoder) -> Run:
    """Until at most so many of the lane's latest groups are under way; .read: until they have read."""
    d.allow("async", "bulk", "wait_group", "read")
    keep, only_read = int(str(d.operands[0]), 0), "read" in d.has

    def run(warp: Warp, mask: Array) -> None:
        for copy in warp.bulk:
            if mask[copy.lane] and 0 <= copy.group < warp.bulk_groups[copy.lane] - keep:
                copy.wait(only_read)
        warp.bulk = [copy for copy in warp.bulk if not (copy.read and copy.written)]

    return run


# 9.7.9.28: tensor maps that a kernel makes.


@family("tensormap.replace")
def _replace(d: Decoder) -> Run:
    """9.7.9.28.1: a field, or one of its numbers, of the map at an address."""
    name = d.has[2]
    d.allow("replace", "tile", name, "shared::cta", "global", "b1024", "b32", "b64")
    offset, (form, number) = TENSORMAP.fields[name][1], _numbers(name)  # type: ignore[index]
    address = d.address(d.operands[0], d.space)
    indexed = number > 1
    index = int(str(d.operands[1]), 0) if indexed else 0
    value: Read = d.read(d.operands[1 + indexed], d.types[-1])
    if index >= number:
        raise d.error("no such dimension")

    def run(warp: Warp, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        values = value(warp)[lanes].astype(form)[:, None]
        warp.cta.memory.store(address(warp)[lanes] + offset + index * form.itemsize, lanes, values, warp.number)

    return run


def _numbers(name: str) -> tuple[np.dtype[Any], int]:
    form = TENSORMAP[name]
    return (form.subdtype[0], form.shape[0]) if form.subdtype else (form, 1)


@family("tensormap.cp_fenceproxy")
def _publish(d: Decoder) -> Run:
    """9.7.13.16: copy a map from shared to global memory, for the tensor map proxy to see after an acquire."""
    d.allow("cp_fenceproxy", "global", "shared::cta", "tensormap::generic", "release", "gpu", "sync", "aligned")
    target, source = d.address(d.operands[0], "global"), d.address(d.operands[1], "shared")

    def run(warp: Warp, mask: Array) -> None:
        warp.converged(mask)
        one = np.array([0])
        to, of = int(target(warp)[0]), int(source(warp)[0])
        for offset in range(0, TENSORMAP.itemsize, UNIT):
            values = warp.cta.memory.load(one + of + offset, one, 8, 2, warp.number)
            warp.cta.memory.store(one + to + offset, one, values, warp.number)
        warp.cta.launch.tensormaps.add(to)
        warp.cta.acquired.discard(to)

    return run


@family("fence.proxy.tensormap::generic")
def _acquire(d: Decoder) -> Run:
    """9.7.13.4: after an acquire of its 128 bytes, a changed map may be used."""
    d.allow("proxy", "tensormap::generic", "acquire", "release", "cta", "cluster", "gpu", "sys")
    address = d.address(d.operands[0], "") if "acquire" in d.has else None

    def run(warp: Warp, mask: Array) -> None:
        if address:
            warp.cta.acquired.update(int(where) for where in address(warp)[mask])

    return run
