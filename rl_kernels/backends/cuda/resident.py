"""Convolutions of few channels, whose mixed filter stays on chip: the host's side of ``csrc/cuda/resident.cuh``."""

from __future__ import annotations

import functools
from typing import NamedTuple

from rl_kernels.backends.cuda import configs
from rl_kernels.backends.cuda.configs import KERNELS, Facts
from rl_kernels.backends.cuda.params import COPIED_BYTES
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import Device, cdiv, device_of

ROWS = tuple(sorted({facts.rows for name, facts in KERNELS.items() if name.startswith("resident_")}))
"""Numbers of features that there are kernels for."""
MAX_TAPS = 9
TILES_A_BLOCK = 2
"""At least, for a filter that is mixed once to pay."""
THREADS_AT_ONCE = 512
"""That a multiprocessor's registers suffice for (``BLOCKS`` of the kernels)."""


class Plan(NamedTuple):
    """How many blocks go over the pixels of a group, and the stages of their copies."""

    blocks: int
    stages: int


def plan(product: Product) -> Plan | None:
    """None where other kernels are better, or a configuration of theirs is asked for."""
    few = product.features <= ROWS[-1] and product.channels <= ROWS[-1] and product.taps <= MAX_TAPS
    if heuristics.forced() is not None or not few:
        return None
    facts, device = KERNELS[_kernel(product)], device_of(product.activation.device)
    return _plan(facts, _steps(product, facts), product.pixels, product.groups, device)


@functools.lru_cache(maxsize=1024)
def _plan(facts: Facts, steps: int, pixels: int, groups: int, device: Device) -> Plan | None:
    """With as many stages as leave the device full."""
    tiles = pixels // facts.columns
    for stages in configs.STAGES:
        at_once = min(device.shared_bytes // _shared_bytes(facts, steps, stages), THREADS_AT_ONCE // facts.threads)
        blocks = min(cdiv(device.multiprocessors * at_once, groups), tiles // TILES_A_BLOCK)
        if blocks * groups >= device.multiprocessors:
            return Plan(blocks, stages)
    return None


def multiply(product: Product, how: Plan) -> None:
    """Write ``product.out``."""
    kernel = _kernel(product)
    facts = KERNELS[kernel]
    params = product.params(product.out, stages=how.stages)
    blocks = min(how.blocks, cdiv(product.pixels, facts.columns))
    shared_bytes = _shared_bytes(facts, _steps(product, facts), how.stages)
    product.launch(kernel, (blocks, product.groups, 1), shared_bytes, params)


def _steps(product: Product, facts: Facts) -> int:
    """Steps of the sum. Chunks are of the channels of one tap each, of which the last are filled up."""
    chunks = product.taps * cdiv(product.channels * product.activation.element_size(), COPIED_BYTES)
    return max(1, cdiv(chunks, facts.depth_bytes // COPIED_BYTES))


def _shared_bytes(facts: Facts, steps: int, stages: int) -> int:
    """Shared memory for the filter and where its chunks lie, the stages of the activation, and a tile of results."""
    return steps * facts.step_bytes + stages * facts.stage_bytes + facts.epilogue_bytes


def _kernel(product: Product) -> str:
    rows = next(rows for rows in ROWS if product.features <= rows)
    return f"resident_{product.kind}_{rows}_{product.element}"
