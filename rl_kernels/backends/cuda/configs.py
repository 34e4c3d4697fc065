"""The configurations that the kernels of ``csrc/cuda`` are compiled for, and what they take."""

from __future__ import annotations

import functools

import torch

from rl_kernels.backends.gpu.heuristics import Config, Device, Work, shared_bytes

STEP_BYTES = 64
"""Of a row along the sum, that a stage of the pipelines holds."""
STAGES = (4, 3, 2)
WARP_ROWS = 32
"""Of a tile, in every configuration; what is left of the warps divides its columns."""
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32"}
"""Of types, in the names of kernels."""

PRODUCTS = (
    Config(128, 256, 32, 8, 4),  # the activation's tile is read once for 128 rows: shared memory binds least
    Config(128, 128, 32, 4, 4),  # two blocks fit a multiprocessor and hide each other's epilogue
    Config(64, 64, 32, 4, 4),  # few rows or tokens
)
"""Rows are features, columns are tokens or pixels; the depth is that of 16-bit types."""

WGRADS = (
    Config(128, 128, 32, 8, 4),
    Config(64, 64, 32, 4, 4),
)
"""Rows are output channels, columns are input channels of every tap, the depth is tokens or pixels."""


@functools.lru_cache(maxsize=4096)
def usable(configs: tuple[Config, ...], work: Work, itemsize: int, device: Device) -> tuple[Config, ...]:
    """The configurations at the depth of a type, each with as many stages as fit the device's shared memory."""
    found = []
    for config in configs:
        deep = config._replace(depth=STEP_BYTES // itemsize)
        fits = (deep._replace(stages=stages) for stages in STAGES)
        found.append(next((each for each in fits if shared_bytes(work, each) <= device.shared_bytes), deep))
    return tuple(found)
