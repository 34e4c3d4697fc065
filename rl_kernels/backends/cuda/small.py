"""Products of few tokens, as fast as the sources can be read: the host's side of ``csrc/cuda/small.cuh``."""

from __future__ import annotations

from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import WORKSPACE_BYTES, Device, cdiv, device_of

TOKENS = (8, 16)
"""That there are kernels for."""
THREADS = 256
TURN_BYTES = 1024
"""Of a row along the sum, that a block takes at a time: a step of its splits."""
BLOCKS_AT_ONCE = 2
"""On a multiprocessor."""


def serves(product: Product) -> bool:
    """Whether these kernels are for it; not where a configuration of the others is asked for."""
    return product.pixels <= TOKENS[-1] and heuristics.forced() is None


def multiply(product: Product, splits: int | None = None) -> None:
    """Write ``product.out``; ``splits`` of the sum instead of as many as fill the device."""
    itemsize = product.activation.element_size()
    blocks = cdiv(product.features, 128 // itemsize if product.transposed else 32)
    turns = max(1, cdiv(product.channels, TURN_BYTES // itemsize))
    most = splits or _splits(blocks, turns, 4 * product.out.numel(), device_of(product.activation.device))
    steps = cdiv(turns, most)
    splits = splits or cdiv(turns, steps)
    shares = product.shares(splits)
    params = product.params(shares, steps, splits)
    tokens = next(tokens for tokens in TOKENS if product.pixels <= tokens)
    product.launch(f"small_{product.kind}_{tokens}", (blocks, 1, splits), THREADS, 0, params)
    if splits > 1:
        product.reduce(params, shares)


def _splits(blocks: int, turns: int, share_bytes: int, device: Device) -> int:
    """As many as make one full wave of blocks, if there is so much to sum."""
    wave = BLOCKS_AT_ONCE * device.multiprocessors
    return max(1, min(wave // blocks, turns, WORKSPACE_BYTES // max(1, share_bytes)))
