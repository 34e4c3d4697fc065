"""How a product is cut into programs: a pure function of its sizes and of the device, the same on every run.

Nothing is timed at a first call. Each configuration's time is estimated from what binds it: the matrix instructions,
the bytes that come through L2 and those that go through shared memory, the mixing, and how well the programs fill the
device's last wave.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rl_kernels._extension import without_fast_path

WORKSPACE_BYTES = 32 << 20
"""Bytes, at most, that a call takes for the partial sums of a split reduction."""


class Device(NamedTuple):
    """What the choice of a configuration depends on, of a GPU.

    Attributes:
        multiprocessors: how many.
        shared_bytes: of shared memory that one program may take.
        products: multiply-adds of 16-bit matrix instructions, a cycle and multiprocessor.
        load_bytes: from L2, a cycle and multiprocessor, sustained.
        asynchronous: whether matrix instructions read shared memory while others go on.
    """

    multiprocessors: int
    shared_bytes: int
    products: int
    load_bytes: int
    asynchronous: bool


A100 = Device(108, 163 << 10, 1024, 40, False)
ADA = Device(128, 99 << 10, 512, 40, False)
H100 = Device(132, 227 << 10, 2048, 40, True)


class Config(NamedTuple):
    """A program's tile, (rows, columns) of the result by ``depth`` of the sum, and how it runs.

    Attributes:
        rows: of the result.
        columns: of the result.
        depth: of the sum, that a step takes.
        warps: of a program.
        stages: of its pipeline.
        resident: the most programs that a multiprocessor has at once, for its registers' or other reasons.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = 4


SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""The numbers of parts in which a sum may be split."""
MIN_DEPTH = 16
"""The shortest sum that matrix instructions take."""
FEW_COLUMNS = 64
"""The most columns, tokens say, that have to be one tile's: the rows, which bound such a product, are read once."""
SHARED_BYTES = 128
"""Bytes of shared memory that a multiprocessor reads or writes in a cycle."""
MIXED_BYTES = 64
"""Bytes of sources that a multiprocessor mixes in a cycle: to float32, multiplied, added and rounded."""
TERMS = 128
"""Terms of ``Outer`` coefficients that it multiplies and adds in a cycle."""
START = 2000.0
"""Cycles that a program takes to fill its pipeline and to finish its tile; a further launch takes twice that."""


class Work(NamedTuple):
    """A product (rows, columns) summed over depth.

    Attributes:
        rows: of the result.
        columns: of the result.
        depth: of the sum; a convolution's channels.
        row_bytes: that a row of the tile reads for each step of the sum, of all sources.
        column_bytes: the same for a column.
        scratch_bytes: of shared memory, a row and step, for what is made from the sources.
        slowness: of the matrix instructions, relative to 16-bit ones.
        taps: over which the sum goes as well, each as deep.
        repeats: such products side by side: a convolution's groups.
        max_splits: the most parts of the sum.
        terms: of ``Outer`` coefficients, N * R: the products that are summed for what a row and step are mixed by.
    """

    rows: int
    columns: int
    depth: int
    row_bytes: int
    column_bytes: int
    scratch_bytes: int
    slowness: float
    taps: int = 1
    repeats: int = 1
    max_splits: int = 32
    terms: int = 0


class Choice(NamedTuple):
    """A configuration, and in how many parts the sum is split, of ``steps`` of its depth and of one tap each."""

    config: Config
    splits: int
    steps: int


Table = dict[tuple[Work, Device], tuple[Config, int]]
"""The configuration and the number of splits of a work on a device, found otherwise than by estimating."""

_forced: tuple[Config, int] | None = None
_table: Table = {}
_seen: dict[tuple[Work, Device], tuple[Config, ...]] | None = None


@contextlib.contextmanager
def use_config(config: Config, splits: int = 1) -> Iterator[None]:
    """Run every product inside with one configuration and number of splits: for tests, tuning and qualification."""
    global _forced
    previous, _forced = _forced, (config, splits)
    try:
        with without_fast_path():  # which chooses by itself
            yield
    finally:
        _forced = previous


def forced() -> tuple[Config, int] | None:
    """What ``use_config`` says where this is called."""
    return _forced


def is_told() -> bool:
    """Whether ``choose`` does more than estimate: a configuration is forced, a table is in use, or works are noted."""
    return _forced is not None or bool(_table) or _seen is not None


@contextlib.contextmanager
def use_table(table: Table) -> Iterator[None]:
    """Inside, take configurations from ``table`` where it has the work and the device."""
    global _table
    previous, _table = _table, {**_table, **table}
    try:
        with without_fast_path():
            yield
    finally:
        _table = previous


@contextlib.contextmanager
def recording() -> Iterator[dict[tuple[Work, Device], tuple[Config, ...]]]:
    """Fill what this yields with the works and devices that are chosen for inside, and the configurations there are."""
    global _seen
    previous, _seen = _seen, {}
    try:
        with without_fast_path():
            yield _seen
    finally:
        _seen = previous


def shared_bytes(work: Work, config: Config) -> int:
    """Shared memory that a program takes: its pipeline's stages, and the mixed tile on its way to the products."""
    step = config.rows * work.row_bytes + config.columns * work.column_bytes
    # Of ``Outer`` coefficients, in float32, what lies along both sides of the tile comes through the pipeline as well.
    terms = 4 * config.stages * work.terms * (config.rows + config.depth)
    return config.depth * (config.stages * step + config.rows * work.scratch_bytes) + terms


def estimate(work: Work, config: Config, splits: int, device: Device) -> float:
    """Cycles that a product takes, launches of its reduction included."""
    tiles = work.repeats * math.ceil(work.rows / config.rows) * math.ceil(work.columns / config.columns)
    steps = _steps(work, config, splits)
    step = max(limits(work, config, device).values())
    resident = max(1, min(config.resident, device.shared_bytes // max(1, shared_bytes(work, config))))
    waves = math.ceil(tiles * splits / (device.multiprocessors * resident))
    # Programs that share a multiprocessor take turns on what binds them, and hide each other's start.
    time = waves * (resident * steps * step + START)
    if splits > 1:
        traffic = 8.0 * splits * work.repeats * work.rows * work.columns
        time += 2 * START + traffic / (device.multiprocessors * device.load_bytes)
    return time


def limits(work: Work, config: Config, device: Device) -> dict[str, float]:
    """Cycles that a step of one program takes of each thing that may bind it: a roofline with several roofs."""
    # What lies outside is not loaded, but written to shared memory as zeros.
    rows = (config.rows + min(config.rows, work.rows)) / 2
    columns = (config.columns + min(config.columns, work.columns)) / 2
    loaded = rows * work.row_bytes + columns * work.column_bytes
    # Every 64 rows read the columns anew; what is mixed is read, and may make a trip on its way to registers.
    read = math.ceil(config.rows / 64) * config.columns * work.column_bytes
    if work.scratch_bytes > 0:
        read += config.rows * (work.row_bytes + 2 * work.scratch_bytes)
    mixed = config.rows * work.row_bytes if work.scratch_bytes > 0 else 0
    return {
        "matrix instructions": config.rows * config.columns * config.depth * work.slowness / device.products,
        "L2": config.depth * loaded / device.load_bytes,
        "shared memory": config.depth * (loaded + read) / SHARED_BYTES,
        "mixing": config.depth * mixed / MIXED_BYTES + config.depth * config.rows * work.terms / TERMS,
    }


def _steps(work: Work, config: Config, splits: int) -> int:
    return max(1, math.ceil(work.taps * math.ceil(work.depth / config.depth) / splits))


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient rounded up; Triton's own takes ten times as long."""
    return -(-dividend // divisor)


def choose(work: Work, configs: tuple[Config, ...], device: Device) -> Choice:
    """The configuration and the number of splits with the smallest estimate; the first of equals.

    A configuration that is deeper than the work is made shorter.
    """
    if _forced is not None:
        config, splits = _forced
        return _choice(work, shortened(config, work), min(splits, work.max_splits))
    if _seen is not None:
        _seen[work, device] = configs
    found = _table.get((work, device)) if _table else None
    return _choose(work, configs, device) if found is None else _choice(work, *found)


def shortened(config: Config, work: Work) -> Config:
    """The configuration with no more depth than there is to sum."""
    power = 1 << max(0, work.depth - 1).bit_length()
    return config._replace(depth=min(config.depth, max(MIN_DEPTH, power)))


def _choice(work: Work, config: Config, splits: int) -> Choice:
    steps = _steps(work, config, splits)
    return Choice(config, max(1, math.ceil(work.taps * math.ceil(work.depth / config.depth) / steps)), steps)


@functools.lru_cache(maxsize=4096)
def _choose(work: Work, configs: tuple[Config, ...], device: Device) -> Choice:
    return _choice(work, *candidates(work, configs, device)[0])


def candidates(
    work: Work, configs: tuple[Config, ...], device: Device, rereads: bool = False
) -> list[tuple[Config, int]]:
    """Every configuration and number of splits that may be chosen, the smallest estimate first.

    ``rereads``: whether few columns may be those of several tiles.
    """
    found: list[tuple[float, Config, int]] = []
    for config in dict.fromkeys(shortened(config, work) for config in configs):
        reads_twice = config.columns < work.columns <= FEW_COLUMNS and not rereads
        if reads_twice or shared_bytes(work, config) > device.shared_bytes:
            continue
        for splits in SPLITS:
            too_short = work.taps * work.depth < splits * config.depth
            too_large = 4 * splits * work.repeats * work.rows * work.columns > WORKSPACE_BYTES
            if splits > 1 and (splits > work.max_splits or too_short or too_large):
                break
            found.append((estimate(work, config, splits, device), config, splits))
    if not found:  # Very many sources, or terms of Outer coefficients.
        smaller = tuple(
            config._replace(depth=max(MIN_DEPTH, config.depth // 2), stages=max(2, config.stages - 1))
            for config in configs
        )
        assert smaller != configs or not rereads, f"configs: none fits {device.shared_bytes} bytes of shared memory"
        return candidates(work, smaller, device, rereads=True)
    return [(config, splits) for _, config, splits in sorted(found, key=lambda entry: entry[0])]


def current_device() -> torch.device:
    """The GPU that is current, by its number, as there may be others of another kind; the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@functools.lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """What is known of a device; an H100's figures where nothing runs on a GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    known = A100 if capability == 80 else H100 if capability >= 90 and capability < 120 else ADA
    shared = getattr(properties, "shared_memory_per_block_optin", known.shared_bytes)
    return known._replace(multiprocessors=properties.multi_processor_count, shared_bytes=shared)
