"""Products of few tokens, as fast as the sources can be read: the host's side of ``csrc/cuda/skinny.cuh``."""

from __future__ import annotations

from rl_kernels.backends.cuda.configs import KERNELS
from rl_kernels.backends.cuda.product import Product
from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import WORKSPACE_BYTES, cdiv, device_of

TOKENS = tuple(sorted({facts.columns for name, facts in KERNELS.items() if name.startswith("skinny_")}))
"""Numbers of tokens that there are kernels for."""
BLOCKS_AT_ONCE = {"pair_8": 2}
"""How many blocks of a kernel are on a multiprocessor, by their registers; 1 of the others."""


def serves(product: Product) -> bool:
    """Whether these kernels are for it; not where a configuration of the others is asked for."""
    return product.pixels <= TOKENS[-1] and heuristics.forced() is None


def multiply(product: Product, splits: int | None = None) -> None:
    """Write ``product.out``; ``splits`` of the sum instead of as many as fill the device."""
    tokens = next(tokens for tokens in TOKENS if product.pixels <= tokens)
    kernel = f"skinny_{product.kind}_{tokens}_{product.element}"
    facts = KERNELS[kernel]
    blocks = cdiv(product.features, facts.rows)
    at_once = BLOCKS_AT_ONCE.get(f"{product.kind.split('_')[1]}_{tokens}", 1)
    turns = max(1, cdiv(product.channels, facts.depth_bytes // product.activation.element_size()))
    device = device_of(product.activation.device)
    most = splits or _splits(blocks, turns, 4 * product.out.numel(), at_once * device.multiprocessors)
    steps = cdiv(turns, most)
    splits = splits or cdiv(turns, steps)
    shares = product.shares(splits)
    params = product.params(shares, steps, splits)
    product.launch(kernel, (blocks, 1, splits), 0, params)
    if splits > 1:
        product.reduce(params, shares)


def _splits(blocks: int, turns: int, share_bytes: int, wave: int) -> int:
    """As many as make one full wave of blocks, if there is so much to sum."""
    return max(1, min(wave // blocks, turns, WORKSPACE_BYTES // max(1, share_bytes)))
