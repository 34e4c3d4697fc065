"""Products of few tokens, as fast as the sources can be read: the host's side of ``csrc/cuda/skinny.cuh``."""

from __future__ import annotations

from rl_kernels.backends.cuda.configs import KERNELS
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import WORKSPACE_BYTES, Device, cdiv, device_of

TOKENS = tuple(sorted({facts.columns for name, facts in KERNELS.items() if name.startswith("skinny_")}))
"""Numbers of tokens that there are kernels for."""
BLOCKS_AT_ONCE = 2
"""How many blocks are on a multiprocessor."""


def serves(product: Product) -> bool:
    """Whether these kernels are for it; not where a configuration of the others is asked for."""
    return product.pixels <= TOKENS[-1] and heuristics.forced() is None


def multiply(product: Product, splits: int | None = None) -> None:
    """Write ``product.out``; ``splits`` of the sum instead of as many as fill the device."""
    tokens = next(tokens for tokens in TOKENS if product.pixels <= tokens)
    kernel = f"skinny_{product.kind}_{tokens}_{product.element}"
    facts = KERNELS[kernel]
    blocks = cdiv(product.features, facts.rows)
    turns = max(1, cdiv(product.channels, facts.depth_bytes // product.activation.element_size()))
    most = splits or _splits(blocks, turns, 4 * product.out.numel(), device_of(product.activation.device))
    steps = cdiv(turns, most)
    splits = splits or cdiv(turns, steps)
    shares = product.shares(splits)
    params = product.params(shares, steps, splits)
    product.launch(kernel, (blocks, 1, splits), 0, params)
    if splits > 1:
        product.reduce(params, shares)


def _splits(blocks: int, turns: int, share_bytes: int, device: Device) -> int:
    """As many as make one full wave of blocks, if there is so much to sum."""
    wave = BLOCKS_AT_ONCE * device.multiprocessors
    return max(1, min(wave // blocks, turns, WORKSPACE_BYTES // max(1, share_bytes)))
