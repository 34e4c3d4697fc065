"""The kernels of ``csrc/cuda``: what a launch has to know of each, and the tiles to choose among.

A name of a kernel is composed where it is launched, and has to be in ``KERNELS``. What the kernels say of themselves
(``_cuda.kernels()``) is the same: tests/emulated/test_facts.py.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from rl_kernels.backends.gpu.heuristics import Config, Device, Work, shared_bytes

ELEMENTS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32"}
"""What kernels' names call a type."""


class Facts(NamedTuple):
    """``LaunchFacts`` of ``csrc/cuda/registry.h``; 0 for what a kernel does not have.

    Attributes:
        threads: of a block.
        rows: of the result, that a block computes: features, or of a wgrad output channels.
        columns: of the result, that a block computes: pixels or tokens, or of a wgrad input channels of every tap.
        depth_bytes: of a row along the sum, that a step takes.
        stage_bytes: of shared memory, for each stage of the pipeline.
        source_bytes: of shared memory, for each stage and source.
        step_bytes: of shared memory, for each step of the sum, in a kernel that keeps them all.
        epilogue_bytes: of shared memory, for results on their way out.
        kept_bytes: of shared memory that the kernel declares itself, beside what it is launched with.
    """

    threads: int
    rows: int = 0
    columns: int = 0
    depth_bytes: int = 0
    stage_bytes: int = 0
    source_bytes: int = 0
    step_bytes: int = 0
    epilogue_bytes: int = 0
    kept_bytes: int = 0


def _expanded(table: Mapping[str, Facts]) -> dict[str, Facts]:
    return {name: facts for pattern, facts in table.items() for name in _names(pattern)}


def _names(pattern: str) -> Iterator[str]:
    """The names that a pattern with alternatives in braces stands for, as a shell expands it."""
    return map("".join, itertools.product(*(part.split(",") for part in re.split(r"[{}]", pattern))))


_ALL, _HALF = "{f16,bf16,tf32}", "{f16,bf16}"
_KIND = "{pair,general}"
_PRODUCT = f"{{forward,dgrad}}_{_KIND}"

KERNELS = _expanded(
    {
        f"linear_{_PRODUCT}_128x256_{_ALL}": Facts(256, 128, 256, 64, 16384, 8192, 0, 33792),
        f"linear_{_PRODUCT}_128x128_{_ALL}": Facts(128, 128, 128, 64, 8192, 8192, 0, 16896),
        f"linear_{_PRODUCT}_64x64_{_ALL}": Facts(128, 64, 64, 64, 4096, 4096, 0, 17408),
        f"conv_{_PRODUCT}_128x256_{_ALL}": Facts(256, 128, 256, 64, 16384, 8192, 0, 33792, 6144),
        f"conv_{_PRODUCT}_128x128_{_ALL}": Facts(128, 128, 128, 64, 8192, 8192, 0, 16896, 3072),
        f"conv_{_PRODUCT}_64x64_{_ALL}": Facts(128, 64, 64, 64, 4096, 4096, 0, 17408, 1536),
        f"{{linear,conv}}_reduce_{_ALL}": Facts(256),
        f"{{linear,conv}}_wgrad_128x128_{_ALL}": Facts(256, 128, 128, 64, 16384, 0, 0, 34816, 128),
        f"{{linear,conv}}_wgrad_64x64_{_ALL}": Facts(128, 64, 64, 64, 8192, 0, 0, 9216, 64),
        f"{{linear,conv}}_wgrad_reduce_128x128_{_ALL}": Facts(256, 128, 128, kept_bytes=128),
        f"{{linear,conv}}_wgrad_reduce_64x64_{_ALL}": Facts(128, 64, 64, kept_bytes=64),
        f"skinny_forward_{_KIND}_8_{_ALL}": Facts(256, 32, 8, 1024, kept_bytes=9216),
        f"skinny_forward_{_KIND}_16_{_ALL}": Facts(256, 32, 16, 1024, kept_bytes=18432),
        f"skinny_dgrad_{_KIND}_8_{_HALF}": Facts(256, 64, 8, 1024, kept_bytes=17408),
        f"skinny_dgrad_{_KIND}_16_{_HALF}": Facts(256, 64, 16, 1024, kept_bytes=34816),
        f"skinny_dgrad_{_KIND}_8_tf32": Facts(256, 32, 8, 1024, kept_bytes=9216),
        f"skinny_dgrad_{_KIND}_16_tf32": Facts(256, 32, 16, 1024, kept_bytes=18432),
        f"resident_{_PRODUCT}_16_{_HALF}": Facts(128, 16, 128, 64, 8192, 0, 1152, 6144),
        f"resident_{_PRODUCT}_32_{_HALF}": Facts(128, 32, 128, 64, 8192, 0, 2176, 10240),
        f"resident_{_PRODUCT}_64_{_HALF}": Facts(256, 64, 128, 64, 8192, 0, 4224, 18432),
        f"resident_{_PRODUCT}_16_tf32": Facts(128, 16, 128, 64, 8192, 0, 1152, 10240),
        f"resident_{_PRODUCT}_32_tf32": Facts(128, 32, 128, 64, 8192, 0, 2176, 18432),
        f"resident_{_PRODUCT}_64_tf32": Facts(256, 64, 128, 64, 8192, 0, 4224, 34816),
    }
)
"""Each kernel by its name."""

STAGES = (4, 3, 2)
"""How many stages the pipelines may have; the first that fit are taken."""
STEP_BYTES = KERNELS["linear_forward_pair_64x64_bf16"].depth_bytes
"""Bytes of a row along the sum, that a stage of the pipelines holds."""


def _config(kernel: str, resident: int) -> Config:
    facts = KERNELS[kernel]
    return Config(facts.rows, facts.columns, STEP_BYTES // 2, facts.threads // 32, STAGES[0], resident)


PRODUCTS = (
    _config("linear_forward_pair_128x256_bf16", 1),  # the activation's tile is read once for 128 rows
    _config("linear_forward_pair_128x128_bf16", 2),  # two blocks fit a multiprocessor and hide each other's epilogue
    _config("linear_forward_pair_64x64_bf16", 4),  # few rows or tokens
)
"""Rows are features, columns are tokens or pixels; the depth is that of 16-bit types. The last number is of blocks that
a multiprocessor's registers suffice for: tests/emulated/test_budgets.py."""

WGRADS = (
    _config("linear_wgrad_128x128_bf16", 2),
    _config("linear_wgrad_64x64_bf16", 4),
)
"""Rows are output channels, columns are input channels of every tap, the depth is tokens or pixels."""

CONV_KEPT_BYTES = max(facts.kept_bytes for name, facts in KERNELS.items() if name.startswith("conv_forward"))
"""Shared memory that the products of convolutions keep beside the stages, at most."""


@functools.lru_cache(maxsize=4096)
def usable(configs: tuple[Config, ...], work: Work, itemsize: int, device: Device) -> tuple[Config, ...]:
    """The configurations at the depth of a type, each with as many stages as fit the device's shared memory."""
    found = []
    for config in configs:
        deep = config._replace(depth=STEP_BYTES // itemsize)
        fits = (deep._replace(stages=stages) for stages in STAGES)
        found.append(next((each for each in fits if shared_bytes(work, each) <= device.shared_bytes), deep))
    return tuple(found)
