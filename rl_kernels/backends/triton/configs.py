"""The tiles that the kernels can run in, and the choice of one whose filter stays on chip."""

from __future__ import annotations

import functools
import math

from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import Config, Device, Work
from rl_kernels.backends.gpu.operands import IEEE, Arithmetic

PRODUCT_CONFIGS = (
    Config(128, 256, 64, 8, 3),  # reads the activation's tile once for 128 rows: shared memory binds least
    Config(128, 256, 32, 8, 4),  # the same where shared memory is small, or elements have 4 bytes
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 4),
    Config(64, 64, 32, 4, 4),
    Config(64, 32, 128, 4, 3),  # few tokens: bound by reading the sources, in long runs
    Config(64, 16, 128, 4, 4),
    Config(32, 16, 128, 4, 4),
    Config(32, 16, 64, 2, 4),
)
"""Linear forward and dgrad: rows are of the weight, columns are tokens."""

WGRAD_CONFIGS = (
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(64, 128, 32, 4, 4),
    Config(64, 64, 64, 4, 3),
    Config(64, 64, 32, 4, 4),
    Config(64, 64, 16, 4, 4),  # few tokens: bound by writing the gradients
)
"""Linear wgrad: rows and columns are of the weight, the depth is tokens."""

# The largest product spills: beside its sums there are the pixels' coordinates to keep. One more is for 64 features.
CONV_CONFIGS = (*PRODUCT_CONFIGS[1:3], Config(64, 256, 32, 8, 4), *PRODUCT_CONFIGS[3:])
"""Convolutions, forward and dgrad: columns are pixels."""

# The last two are for few channels: a first layer's, and groups'.
CONV_WGRAD_CONFIGS = (*WGRAD_CONFIGS, Config(64, 16, 64, 4, 4), Config(16, 16, 128, 2, 4))
"""Convolutions, wgrad: the depth is pixels."""

FLOAT32_CONFIGS = (
    Config(128, 64, 16, 8, 3),
    Config(64, 64, 16, 8, 3),
    Config(64, 32, 32, 4, 3),
    Config(32, 16, 32, 2, 3),
)
"""Every op, where float32 is multiplied without matrix instructions: operands and sums share the registers."""

RESIDENT_CONFIGS = (
    Config(16, 128, 16, 4, 2),
    Config(32, 128, 32, 4, 2),
    Config(64, 64, 64, 8, 2),
    Config(64, 32, 64, 8, 2),  # the same where shared memory is small
)
"""Convolutions of at most so many features (rows) and channels (depth), whose filter stays on chip."""
MAX_RESIDENT_TAPS = 9
"""The largest filter that stays on chip: each tap's is kept in registers."""
RESIDENT_SCRATCH_BYTES = 10 << 10
"""Shared memory that the resident kernel takes besides filters and pixels."""


def configs_of(op: str) -> tuple[Config, ...]:
    """The configurations of an op, but for float32 without matrix instructions and for filters that stay on chip."""
    if "linear" in op:
        return WGRAD_CONFIGS if op.endswith("wgrad") else PRODUCT_CONFIGS
    return CONV_WGRAD_CONFIGS if op.endswith("wgrad") else CONV_CONFIGS


def usable(usual: tuple[Config, ...], numbers: Arithmetic) -> tuple[Config, ...]:
    """The configurations to choose from, of an op's ``usual`` ones, by how its products are computed."""
    return FLOAT32_CONFIGS if numbers == IEEE else usual


def choose_resident(work: Work, device: Device) -> tuple[Config, int] | None:
    """A configuration of ``resident.py`` and the programs for each of the repeats; None where another kernel is better.

    A filter mixed once pays where there are enough pixels for every program to go over several tiles of them.
    """
    forced = heuristics.forced()
    if forced is None:
        return _choose_resident(work, RESIDENT_CONFIGS, device)
    found = tuple(config for config in RESIDENT_CONFIGS if config == forced[0] and _holds(config, work, device))
    return (found[0], min(2, math.ceil(work.columns / found[0].columns))) if found else None


@functools.lru_cache(maxsize=4096)
def _choose_resident(work: Work, configs: tuple[Config, ...], device: Device) -> tuple[Config, int] | None:
    for config in configs:
        if _holds(config, work, device):
            at_once = min(8, device.shared_bytes // resident_bytes(work, config, device))
            at_most = math.ceil(device.multiprocessors * at_once / work.repeats)
            programs = min(at_most, work.columns // (2 * config.columns))
            return (config, programs) if programs * work.repeats >= device.multiprocessors else None
    return None


def _holds(config: Config, work: Work, device: Device) -> bool:
    fits = work.rows <= config.rows and work.depth <= config.depth and work.taps <= MAX_RESIDENT_TAPS
    return fits and work.slowness == 1 and resident_bytes(work, config, device) <= device.shared_bytes


def resident_bytes(work: Work, config: Config, device: Device) -> int:
    """Shared memory of a program: every tap's pixels, and the filters on their way to registers, or for good."""
    buffers = 2 if device.asynchronous and config.rows >= 64 else 1
    elements = work.taps * config.depth * (buffers * config.columns + config.rows)
    return elements * work.column_bytes + RESIDENT_SCRATCH_BYTES
