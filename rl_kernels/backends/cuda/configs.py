"""The tiles of the kernels of ``csrc/cuda``, for a choice among them from Python: tests, qualification, tuning.

C++ has its own list (``csrc/cuda/host/heuristics.h``) and chooses by it in every other call; tests/emulated/test_plans
holds the two equal.
"""

from __future__ import annotations

import functools

import torch

from rl_kernels.backends.gpu.heuristics import Config, Device, Work, shared_bytes

ELEMENTS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32"}
"""What kernels' names call a type."""

STAGES = (4, 3, 2)
"""How many stages the pipelines may have; the first that fit are taken."""
STEP_BYTES = 64
"""Bytes of a row along the sum, that a stage of the pipelines holds."""


def _config(rows: int, columns: int, warps: int, resident: int) -> Config:
    return Config(rows, columns, STEP_BYTES // 2, warps, STAGES[0], resident)


PRODUCTS = (
    _config(128, 256, 8, 1),  # the activation's tile is read once for 128 rows
    _config(128, 128, 4, 2),  # two blocks fit a multiprocessor and hide each other's epilogue
    _config(64, 64, 4, 4),  # few rows or tokens
)
"""Rows are features, columns are tokens or pixels; the depth is that of 16-bit types. The last number is of blocks that
a multiprocessor's registers suffice for: tests/emulated/test_budgets.py."""

WGRADS = (_config(128, 128, 8, 2), _config(64, 64, 4, 4))
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
