"""Convolutions of few channels, whose mixed filter stays on chip: the host's side of ``csrc/cuda/resident.cuh``."""

from __future__ import annotations

from typing import NamedTuple

from rl_kernels.backends.cuda import configs
from rl_kernels.backends.cuda.configs import KERNELS
from rl_kernels.backends.cuda.params import COPIED_BYTES
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import Device, cdiv, device_of

ROWS = tuple(sorted({facts.rows for name, facts in KERNELS.items() if name.startswith("resident_")}))
"""Numbers of features that there are kernels for."""
MAX_TAPS = 9
TILES_A_BLOCK = 2
"""At least, for a filter that is mixed once to pay."""
BLOCKS_AT_ONCE = 8
"""How many blocks are on a multiprocessor, at most."""


class Plan(NamedTuple):
    """How many blocks go over the pixels of a group, and the stages of their copies."""

    blocks: int
    stages: int


def plan(product: Product) -> Plan | None:
    """None where other kernels are better, or a configuration of theirs is asked for."""
    few = product.features <= ROWS[-1] and product.channels <= ROWS[-1] and product.taps <= MAX_TAPS
    if heuristics.forced() is not None or not few:
        return None
    device = device_of(product.activation.device)
    return next(filter(None, (_plan(product, stages, device) for stages in configs.STAGES)), None)


def _plan(product: Product, stages: int, device: Device) -> Plan | None:
    at_once = min(device.shared_bytes // shared_bytes(product, stages), BLOCKS_AT_ONCE)
    tiles = product.pixels // KERNELS[_kernel(product)].columns
    blocks = min(cdiv(device.multiprocessors * at_once, product.groups), tiles // TILES_A_BLOCK)
    return Plan(blocks, stages) if blocks * product.groups >= device.multiprocessors else None


def multiply(product: Product, how: Plan) -> None:
    """Write ``product.out``."""
    kernel = _kernel(product)
    params = product.params(product.out, stages=how.stages)
    blocks = min(how.blocks, cdiv(product.pixels, KERNELS[kernel].columns))
    product.launch(kernel, (blocks, product.groups, 1), shared_bytes(product, how.stages), params)


def shared_bytes(product: Product, stages: int) -> int:
    """Shared memory for the filter, the stages of the activation, a tile of results, and where chunks lie."""
    facts = KERNELS[_kernel(product)]
    # Chunks are of the channels of one tap each, of which the last are filled up.
    chunks = product.taps * cdiv(product.channels * product.activation.element_size(), COPIED_BYTES)
    steps = max(1, cdiv(chunks, facts.depth_bytes // COPIED_BYTES))
    return steps * facts.step_bytes + stages * facts.stage_bytes + facts.epilogue_bytes


def _kernel(product: Product) -> str:
    rows = next(rows for rows in ROWS if product.features <= rows)
    return f"resident_{product.kind}_{rows}_{product.element}"
