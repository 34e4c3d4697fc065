"""Convolutions of few channels, whose mixed filter stays on chip: the host's side of ``csrc/cuda/resident.cuh``."""

from __future__ import annotations

from typing import NamedTuple

from rl_kernels.backends.cuda import configs
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import Device, cdiv, device_of

ROWS = (16, 32, 64)
"""Features that there are kernels for."""
MOST_TAPS = 9
PIXELS = 128
"""Of a tile."""
CHUNKS, CHUNK_BYTES = 4, 16
"""Of a step along the sum: channels of one tap each, of which the last are filled up."""
POSITION_BYTES = 32
"""Of shared memory, that says where a chunk lies."""
TILES_A_BLOCK = 2
"""At least, for a filter that is mixed once to pay."""


class Plan(NamedTuple):
    """How many blocks go over the pixels of a group, and the stages of their copies."""

    blocks: int
    stages: int


def plan(product: Product) -> Plan | None:
    """None where other kernels are better, or a configuration of theirs is asked for."""
    few = product.features <= ROWS[-1] and product.channels <= ROWS[-1] and product.taps <= MOST_TAPS
    if heuristics.forced() is not None or not few:
        return None
    device = device_of(product.activation.device)
    return next(filter(None, (_plan(product, stages, device) for stages in configs.STAGES)), None)


def _plan(product: Product, stages: int, device: Device) -> Plan | None:
    at_once = min(device.shared_bytes // shared_bytes(product, stages), 2048 // 256)
    blocks = min(cdiv(device.multiprocessors * at_once, product.groups), product.pixels // (TILES_A_BLOCK * PIXELS))
    return Plan(blocks, stages) if blocks * product.groups >= device.multiprocessors else None


def multiply(product: Product, how: Plan) -> None:
    """Write ``product.out``."""
    rows = _rows(product)
    params = product.params(product.out, stages=how.stages)
    product.launch(
        f"resident_{product.kind}_{rows}",
        (min(how.blocks, cdiv(product.pixels, PIXELS)), product.groups, 1),
        256 if rows == 64 else 128,
        shared_bytes(product, how.stages),
        params,
    )


def shared_bytes(product: Product, stages: int) -> int:
    """Of the filter, the stages of the activation, a tile of results, and where chunks lie."""
    rows, itemsize = _rows(product), product.activation.element_size()
    steps = max(1, cdiv(product.taps * cdiv(product.channels * itemsize, CHUNK_BYTES), CHUNKS))
    results = PIXELS * (rows * itemsize + CHUNK_BYTES)
    return (steps * rows + stages * PIXELS) * configs.STEP_BYTES + results + steps * CHUNKS * POSITION_BYTES


def _rows(product: Product) -> int:
    return next(rows for rows in ROWS if product.features <= rows)
