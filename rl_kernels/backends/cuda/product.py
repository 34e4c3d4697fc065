"""The products of forward and dgrad, of any size: the host's side of ``csrc/cuda/product.cuh``."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.cuda.params import (
    GeometryParams,
    ProductParams,
    ProductReductionParams,
    RecipeParams,
    addresses,
    is_vector,
    strides5,
    vector_strides,
)
from rl_kernels.backends.gpu.convolution import Geometry
from rl_kernels.backends.gpu.heuristics import Config, Device, Work, cdiv, choose, device_of
from rl_kernels.backends.gpu.operands import Recipe, arithmetic

KEPT_BYTES = 24 * 256
"""Of shared memory, beside the stages: where a convolution's pixels lie, of the largest tile."""
REDUCE_THREADS = 256
MOST_BLOCKS = 1 << 16
"""Of a reduction; its threads go on where there is more."""


class Product(NamedTuple):
    """``out (batch, features, *pixels) = activation (batch, channels, *sizes) W^T``, of any kind of layer.

    Attributes:
        op: whose call this is.
        out: of any strides.
        activation: of any strides.
        recipe: of W, whose dimensions are (out, in, *taps).
        biases: as many as sources.
        geometry: of the convolution; of one tap for linear layers.
        groups: of features and channels.
        transposed: whether the channels are W's output channels, and the features its inputs.
    """

    op: str
    out: Tensor
    activation: Tensor
    recipe: Recipe
    biases: Sequence[Tensor] | None
    geometry: Geometry
    groups: int
    transposed: bool

    @property
    def linear(self) -> bool:
        """Whether this is a linear layer's."""
        return self.out.dim() == 2

    @property
    def pixels(self) -> int:
        """Of all images; tokens of a linear layer."""
        return self.out.numel() // self.out.shape[1]

    @property
    def taps(self) -> int:
        """Of the filter."""
        return math.prod(self.geometry.taps)

    @property
    def features(self) -> int:
        """Of a group."""
        return self.out.shape[1] // self.groups

    @property
    def channels(self) -> int:
        """Of a group; the sum is over all taps of these."""
        return self.activation.shape[1] // self.groups

    @property
    def kind(self) -> str:
        """As in the kernels' names."""
        pair = len(self.recipe.weights) == 2 and not self.recipe.per_channel
        return f"{'dgrad' if self.transposed else 'forward'}_{'pair' if pair else 'general'}"

    @property
    def element(self) -> str:
        """The same of the type."""
        return configs.NAMES[self.activation.dtype]

    def shares(self, splits: int) -> Tensor:
        """Where each split writes its share of the sum; out, where there is one."""
        if splits == 1:
            return self.out
        return self.out.new_empty((splits, self.pixels, self.out.shape[1]), dtype=torch.float32)

    def params(self, target: Tensor, steps: int = 0, splits: int = 1, stages: int = 0) -> ProductParams:
        """For a kernel that writes to ``target``, from ``shares``."""
        channels, taps = self.channels, self.taps
        spread = self.groups > 1 or taps > 1
        return ProductParams(
            recipe=RecipeParams.of(self.recipe, self.groups, self.transposed, channels, taps),
            biases=addresses(self.biases or ()),
            bias_strides=vector_strides(self.biases or ()),
            activation=extension.address(self.activation),
            out=extension.address(target),
            activation_strides=strides5(self.activation),
            out_strides=strides5(self.out),
            geometry=GeometryParams.of(self.geometry, channels),
            pixels=self.pixels,
            features=self.features,
            channels=channels,
            steps=steps,
            splits=splits,
            stages=stages,
            groups=self.groups,
            vector_activation=is_vector(self.activation, channels if spread else None),
            vector_out=is_vector(self.out, self.features) if splits == 1 else self.features % 4 == 0,
        )

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
    ) -> None:
        """Queue the kernel of this product's type."""
        operands = (self.activation, *self.recipe.weights)
        extension.launch(self.op, f"{kernel}_{self.element}", grid, threads, shared_bytes, params, operands)

    def reduce(self, params: ProductParams, shares: Tensor) -> None:
        """``out`` from the splits' shares, which ``params`` were for."""
        params.out = extension.address(self.out)
        blocks = min(cdiv(self.out.numel(), REDUCE_THREADS), MOST_BLOCKS)
        reduction = ProductReductionParams(params, extension.address(shares))
        self.launch("linear_reduce" if self.linear else "conv_reduce", (blocks, 1, 1), REDUCE_THREADS, 0, reduction)


def multiply(product: Product) -> None:
    """Write ``product.out``, a tile a block."""
    itemsize = product.activation.element_size()
    device = _device(product.activation.device, product.linear)
    work = Work(
        rows=product.features,
        columns=product.pixels,
        depth=product.taps * product.channels,
        row_bytes=product.recipe.bytes,
        column_bytes=itemsize,
        scratch_bytes=0,
        slowness=arithmetic(product.activation.dtype, not product.linear).slowness,
        repeats=product.groups,
    )
    config, splits, steps = choose(work, configs.usable(configs.PRODUCTS, work, itemsize, device), device)
    shares = product.shares(splits)
    params = product.params(shares, steps, splits, config.stages)
    tiles = cdiv(work.rows, config.rows) * cdiv(work.columns, config.columns)
    product.launch(
        f"{'linear' if product.linear else 'conv'}_{product.kind}_{config.rows}x{config.columns}",
        (tiles, product.groups, splits),
        32 * config.warps,
        max(config.stages * _stage_bytes(config, len(product.recipe.weights)), _staged_bytes(config)),
        params,
    )
    if splits > 1:
        product.reduce(params, shares)


@functools.lru_cache(maxsize=64)
def _device(device: torch.device, linear: bool) -> Device:
    """With the shared memory that is left for the stages."""
    found = device_of(device)
    return found if linear else found._replace(shared_bytes=found.shared_bytes - KEPT_BYTES)


def _stage_bytes(config: Config, sources: int) -> int:
    """Of a stage: every source's tile, and the activation's."""
    return (sources * config.rows + config.columns) * configs.STEP_BYTES


def _staged_bytes(config: Config) -> int:
    """Of the epilogue: 32 columns of each warp beside another, in float32."""
    beside = config.warps // (config.rows // configs.WARP_ROWS)
    return 4 * 32 * beside * (config.rows + 4)
