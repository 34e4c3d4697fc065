"""What a tile of G = dL/dW becomes: every source's gradient and its share of the coefficients' gradients.

The linear layers' wgrad and the convolutions' end here. G itself is never stored; only parts of it, as float32, where
its sum is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl_kernels.backends.gpu.heuristics import Config, cdiv
from rl_kernels.backends.gpu.operands import Asked, Recipe, bits, is_wide, strides_of
from rl_kernels.backends.triton.geometry import tap_of, tap_pointers
from rl_kernels.backends.triton.mix import load_factors

BLOCK = 1024


@triton.jit
def wgrad_tile(program, rows, columns, all_taps):
    """Group, row, column and tap of a program: taps innermost, as they read the same dy and nearly the same x."""
    tile = program // all_taps
    return tile // columns // rows, tile // columns % rows, tile % columns, program % all_taps


@triton.jit
def finish_tile(
    g,
    gradients,
    weights,
    coefficients,
    dots,
    first_o,
    first_i,
    in_rows,
    in_columns,
    part,
    parts,
    out_channels,
    gradient_strides,
    weight_strides,
    source_stride,
    channel_stride,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WANTED: tl.constexpr,
    ADDED: tl.constexpr,
    DOTS: tl.constexpr,
    FAR: tl.constexpr,
):
    """From a tile of G, from (first_o, first_i) on, every gradient wanted, ``c_j * G``, and the share of <G, W_j>.

    gradients and weights point to the tile's tap. WANTED has bit j set where source j wants its gradient,
    ADDED where it is added to what is there. dots, if DOTS: (N, parts, out_channels) if PER_CHANNEL, else (N, parts).
    FAR: offsets within the tile may pass 2^31.
    """
    mask = in_rows[:, None] & in_columns[None, :]
    o, i = tl.arange(0, g.shape[0]), tl.arange(0, g.shape[1])
    channels = first_o + o
    if FAR:
        o, i = o.to(tl.int64), i.to(tl.int64)
    wide_first_o, wide_first_i = tl.cast(first_o, tl.int64), tl.cast(first_i, tl.int64)
    factors = load_factors(coefficients, source_stride, channel_stride, channels, in_rows, N, PER_CHANNEL)
    for j in tl.static_range(N):
        if PER_CHANNEL:
            factor = factors[j][:, None]
        else:
            factor = factors[j]
        if (WANTED >> j) & 1:
            strides = gradient_strides[j]
            to = gradients[j] + wide_first_o * strides[0] + wide_first_i * strides[1]
            places = o[:, None] * strides[0] + i[None, :] * strides[1]
            gradient = g * factor
            if (ADDED >> j) & 1:
                gradient += tl.load(to + places, mask=mask, other=0.0).to(tl.float32)
            tl.store(to + places, gradient.to(gradients[j].dtype.element_ty), mask=mask)
        if DOTS:
            strides = weight_strides[j]
            source = weights[j] + wide_first_o * strides[0] + wide_first_i * strides[1]
            places = o[:, None] * strides[0] + i[None, :] * strides[1]
            source = tl.load(source + places, mask=mask, other=0.0)
            sums = tl.sum(tl.where(mask, g * source.to(tl.float32), 0.0), 1)
            share = tl.cast(j * parts + part, tl.int64)
            if PER_CHANNEL:
                tl.store(dots + share * out_channels + channels, sums, mask=in_rows)
            else:
                tl.store(dots + share, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["taps"])
def reduce_wgrad_kernel(
    gradients,
    partial,
    dots,
    weights,
    coefficients,
    groups,
    out_features,
    in_features,
    splits,
    taps,
    gradient_strides,
    weight_strides,
    source_stride,
    channel_stride,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WANTED: tl.constexpr,
    ADDED: tl.constexpr,
    DOTS: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """A tile of G summed over its splits, in their order, and finished.

    partial: (split, tap, out, in). out_features and in_features are a group's.
    """
    rows, columns = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    all_taps = taps[0] * taps[1] * taps[2]
    group, row, column, tap = wgrad_tile(tl.program_id(0), rows, columns, all_taps)
    t_d, t_h, t_w = tap_of(tap, taps)
    o, i = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    first_o, first_i = row * BLOCK_OUT, column * BLOCK_IN
    in_rows, in_columns = first_o + o < out_features, first_i + i < in_features
    first_o += group * out_features
    out_channels = groups * out_features
    mask = in_rows[:, None] & in_columns[None, :]
    size = tl.cast(out_channels, tl.int64) * in_features
    partial += tap * size + tl.cast(first_o, tl.int64) * in_features + first_i
    places = o[:, None] * in_features + i[None, :]
    g = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for split in tl.range(0, splits):
        g += tl.load(partial + tl.cast(split, tl.int64) * all_taps * size + places, mask=mask, other=0.0)
    if PER_CHANNEL:
        part, parts = column * all_taps + tap, columns * all_taps
    else:
        part, parts = tl.program_id(0), tl.num_programs(0)
    finish_tile(
        g,
        tap_pointers(gradients, gradient_strides, t_d, t_h, t_w, N),
        tap_pointers(weights, weight_strides, t_d, t_h, t_w, N),
        coefficients, dots, first_o, first_i, in_rows, in_columns, part, parts, out_channels,
        gradient_strides, weight_strides, source_stride, channel_stride, N, PER_CHANNEL, WANTED, ADDED, DOTS, FAR,
    )  # fmt: skip


@triton.jit
def finish_coefficients_kernel(
    coefficient_gradients,
    bias_gradients,
    dots,
    sums,
    coefficients,
    biases,
    out_features,
    parts,
    splits,
    source_stride,
    channel_stride,
    bias_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WANTED: tl.constexpr,
    DOTS: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dc and the biases' gradients from the tiles' and the splits' shares, added in their order, in float64.

    One program takes a block of channels if PER_CHANNEL, else everything. WANTED has bit j set where bias j wants its
    gradient.
    """
    if PER_CHANNEL:
        begin = tl.program_id(0) * BLOCK
        end = begin + BLOCK
    else:
        begin = tl.program_id(0) * 0
        end = out_features
    for j in tl.static_range(N):
        total = tl.zeros((BLOCK,), tl.float64)
        if DOTS and not PER_CHANNEL:
            for first in tl.range(0, parts, BLOCK):
                at = first + tl.arange(0, BLOCK)
                total += tl.load(dots + j * parts + at, mask=at < parts, other=0.0).to(tl.float64)
        if SUMS or PER_CHANNEL:
            for first in tl.range(begin, end, BLOCK):
                o = first + tl.arange(0, BLOCK)
                inside = o < out_features
                if DOTS and PER_CHANNEL:
                    for part in tl.range(0, parts):
                        place = tl.cast(j * parts + part, tl.int64) * out_features
                        total += tl.load(dots + place + o, mask=inside, other=0.0).to(tl.float64)
                if SUMS:
                    s = tl.zeros((BLOCK,), tl.float64)
                    for split in tl.range(0, splits):
                        s += tl.load(sums + split * out_features + o, mask=inside, other=0.0).to(tl.float64)
                    factors = load_factors(coefficients, source_stride, channel_stride, o, inside, N, PER_CHANNEL)
                    if (WANTED >> j) & 1:
                        gradient = (s * factors[j].to(tl.float64)).to(tl.float32)
                        to = bias_gradients[j].dtype.element_ty
                        tl.store(bias_gradients[j] + o, gradient.to(to), mask=inside)
                    if DOTS and HAS_BIAS:
                        bias = tl.load(biases[j] + o * bias_strides[j], mask=inside, other=0.0).to(tl.float64)
                        total += tl.where(inside, s * bias, 0.0)
                if DOTS and PER_CHANNEL:
                    to = coefficient_gradients.dtype.element_ty
                    tl.store(coefficient_gradients + j * out_features + o, total.to(to), mask=inside)
        if DOTS and not PER_CHANNEL:
            grand = tl.sum(total, 0)
            tl.store(coefficient_gradients + j, grand.to(coefficient_gradients.dtype.element_ty))


class Epilogue:
    """One call's way from tiles of G to what is asked for.

    Attributes:
        recipe: the sources and coefficients.
        flags: what ``finish_tile`` is compiled for.
        targets: the sources' gradients; stand-ins, with strides of 0, where none is wanted.
        target_strides: as ``strides_of``.
        dots: float32, the tiles' shares of <G, W_j>.
        parts: how many shares there are of one sum.
    """

    def __init__(self, recipe: Recipe, asked: Asked, columns: int, tiles: int):
        self.recipe, self.asked = recipe, asked
        self.targets = tuple(asked.weights)
        self.target_strides = tuple(
            strides_of(g) if wanted else (0,) * 5 for g, wanted in zip(asked.weights, asked.weights_mask, strict=True)
        )
        farthest = max(s for strides in (*recipe.weight_strides, *self.target_strides) for s in strides[:2])
        self.flags = {
            "N": len(recipe.weights),
            "PER_CHANNEL": recipe.per_channel,
            "WANTED": bits(asked.weights_mask),
            "ADDED": bits(asked.added),
            "DOTS": asked.coefficients_mask,
            "FAR": is_wide(farthest),
        }
        self.parts = columns if recipe.per_channel else tiles
        shares = recipe.coefficients.numel() * self.parts if asked.coefficients_mask else 0
        self.dots = recipe.coefficients.new_empty(shares, dtype=torch.float32)

    def reduce(
        self, partial: Tensor, taps: Sequence[int], groups: int, out_features: int, in_features: int, config: Config
    ) -> None:
        """Sum G's parts, (split, tap, out, in), and finish its tiles."""
        tiles = groups * cdiv(out_features, config.rows) * cdiv(in_features, config.columns)
        reduce_wgrad_kernel[(tiles * math.prod(taps),)](
            self.targets,
            partial,
            self.dots,
            self.recipe.weights,
            self.recipe.coefficients,
            groups,
            out_features,
            in_features,
            partial.shape[0],
            taps,
            self.target_strides,
            self.recipe.weight_strides,
            *self.recipe.strides,
            **self.flags,
            BLOCK_OUT=config.rows,
            BLOCK_IN=config.columns,
            num_warps=config.warps,
        )

    def finish(self, sums: Tensor | None, biases: Sequence[Tensor] | None) -> None:
        """Write the coefficients' gradients and the biases', from the shares and from dy's sums, (split, out)."""
        recipe, asked, out_features = self.recipe, self.asked, self.recipe.weights[0].shape[0]
        if not (asked.coefficients_mask or any(asked.biases_mask)):
            return
        bias_sources, bias_strides = recipe.vectors(biases)
        finish_coefficients_kernel[(cdiv(out_features, BLOCK) if recipe.per_channel else 1,)](
            asked.coefficients,
            tuple(asked.biases) or self.targets,
            self.dots,
            self.dots if sums is None else sums,
            recipe.coefficients,
            bias_sources,
            out_features,
            self.parts,
            0 if sums is None else sums.shape[0],
            *recipe.strides,
            bias_strides,
            N=len(recipe.weights),
            PER_CHANNEL=recipe.per_channel,
            WANTED=bits(asked.biases_mask),
            DOTS=asked.coefficients_mask,
            SUMS=sums is not None,
            HAS_BIAS=biases is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
