"""The products of forward and dgrad, of any size: the host's side of ``csrc/cuda/product.cuh``."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.cuda.configs import KERNELS
from rl_kernels.backends.cuda.params import (
    CorrelationParams,
    ProductParams,
    ProductReductionParams,
    RecipeParams,
    addresses,
    is_vector,
    strides5,
    vector_strides,
)
from rl_kernels.backends.gpu.convolution import Correlation
from rl_kernels.backends.gpu.heuristics import Device, Work, cdiv, choose, device_of
from rl_kernels.backends.gpu.operands import StridedRecipe, arithmetic

MAX_REDUCTION_BLOCKS = 1 << 16
"""Blocks of a reduction; its threads go on where there is more."""


class Product:
    """``out (batch, features, *pixels) = activation (batch, channels, *sizes) W^T``, of any kind of layer.

    Attributes:
        op: whose call this is.
        out: of any strides.
        activation: of any strides.
        recipe: of W, whose dimensions are (out, in, *taps), and of the bias.
        correlation: which pixels meet; of one tap for linear layers.
        groups: of features and channels.
        transposed: whether the channels are W's output channels, and the features its inputs.
        linear: whether this is a linear layer's.
        pixels: of all images; tokens of a linear layer.
        taps: how many the filter has.
        features: how many a group has.
        channels: how many a group has.
        kind: of the kernels, in their names: the direction, and which recipes they are for.
        element: what their names call the type.
    """

    def __init__(
        self,
        op: str,
        out: Tensor,
        activation: Tensor,
        recipe: StridedRecipe,
        correlation: Correlation,
        groups: int = 1,
        transposed: bool = False,
    ):
        self.op, self.out, self.activation, self.recipe = op, out, activation, recipe
        self.correlation, self.groups, self.transposed = correlation, groups, transposed
        features = out.shape[1]
        self.linear = out.dim() == 2
        self.pixels = out.numel() // features
        self.taps = math.prod(correlation.taps)
        self.features, self.channels = features // groups, activation.shape[1] // groups
        pair = len(recipe.weights) == 2 and not recipe.per_channel
        self.kind = f"{'dgrad' if transposed else 'forward'}_{'pair' if pair else 'general'}"
        self.element = configs.ELEMENTS[activation.dtype]

    def shares(self, splits: int) -> Tensor:
        """Where each split writes its share of the sum; out, where there is one."""
        if splits == 1:
            return self.out
        return self.out.new_empty((splits, self.pixels, self.out.shape[1]), dtype=torch.float32)

    def params(self, target: Tensor, steps: int = 0, splits: int = 1, stages: int = 0) -> ProductParams:
        """For a kernel that writes to ``target``, from ``shares``."""
        channels, biases = self.channels, self.recipe.biases or ()
        whole = channels if self.taps > 1 and not self.transposed else None
        spread = channels if self.groups > 1 or self.taps > 1 else None
        return ProductParams(
            recipe=RecipeParams.of(self.recipe, self.groups, whole, self.transposed),
            biases=addresses(biases),
            bias_strides=vector_strides(biases),
            activation=extension.address(self.activation),
            out=extension.address(target),
            activation_strides=strides5(self.activation),
            out_strides=strides5(self.out),
            correlation=CorrelationParams.of(self.correlation, channels),
            pixels=self.pixels,
            features=self.features,
            channels=channels,
            steps=steps,
            splits=splits,
            stages=stages,
            groups=self.groups,
            vector_activation=is_vector(self.activation, spread),
            vector_out=is_vector(self.out, self.features) if splits == 1 else self.features % 4 == 0,
        )

    def launch(self, kernel: str, grid: tuple[int, int, int], shared_bytes: int, params: ctypes.Structure) -> None:
        """Queue a kernel."""
        extension.launch(self.op, kernel, grid, shared_bytes, params, (self.activation, *self.recipe.weights))

    def reduce(self, params: ProductParams, shares: Tensor) -> None:
        """Write ``out`` from the splits' shares, which ``params`` were for."""
        params.out = extension.address(self.out)
        kernel = f"{'linear' if self.linear else 'conv'}_reduce_{self.element}"
        blocks = min(cdiv(self.out.numel(), KERNELS[kernel].threads), MAX_REDUCTION_BLOCKS)
        self.launch(kernel, (blocks, 1, 1), 0, ProductReductionParams(params, extension.address(shares)))


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
    layer = "linear" if product.linear else "conv"
    kernel = f"{layer}_{product.kind}_{config.rows}x{config.columns}_{product.element}"
    facts = KERNELS[kernel]
    stage_bytes = facts.stage_bytes + len(product.recipe.weights) * facts.source_bytes
    shares = product.shares(splits)
    params = product.params(shares, steps, splits, config.stages)
    tiles = cdiv(work.rows, config.rows) * cdiv(work.columns, config.columns)
    shared_bytes = max(config.stages * stage_bytes, facts.epilogue_bytes)
    product.launch(kernel, (tiles, product.groups, splits), shared_bytes, params)
    if splits > 1:
        product.reduce(params, shares)


@functools.lru_cache(maxsize=64)
def _device(device: torch.device, linear: bool) -> Device:
    """With the shared memory that is left for the stages."""
    found = device_of(device)
    return found if linear else found._replace(shared_bytes=found.shared_bytes - configs.CONV_KEPT_BYTES)
