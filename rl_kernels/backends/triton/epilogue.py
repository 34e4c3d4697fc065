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
from rl_kernels.backends.gpu.operands import GradientBuffers, StridedRecipe, bits, is_wide, strides_of
from rl_kernels.backends.triton.mix import load_factors, outer_factor
from rl_kernels.backends.triton.outer import store_shares, sum_shares
from rl_kernels.backends.triton.pixels import coefficients_at_tap, tap_of, tap_pointers
from rl_kernels.backends.triton.tile import wgrad_tile
from rl_kernels.ops.values import Outer

BLOCK = 1024
"""Elements that a program of ``finish_coefficients_kernel`` sums at a time."""


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
    row_part,
    row_parts,
    first_k,
    all_k,
    gradient_strides,
    weight_strides,
    coefficient_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
    WANTED: tl.constexpr,
    ADDED: tl.constexpr,
    DOTS: tl.constexpr,
    FAR: tl.constexpr,
):
    """From a tile of G, from (first_o, first_i) on, every gradient wanted, ``c_j * G``, and the share of <G, W_j>.

    gradients, weights and Outer coefficients point to the tile's tap. WANTED has bit j set where source j wants its
    gradient, ADDED where it is added to what is there. dots, if DOTS: (N, parts, out_channels) if PER_CHANNEL, else
    (N, parts); of Outer coefficients two, as ``store_shares`` says. FAR: offsets within the tile may pass 2^31.
    """
    mask = in_rows[:, None] & in_columns[None, :]
    o, i = tl.arange(0, g.shape[0]), tl.arange(0, g.shape[1])
    channels = first_o + o
    if FAR:
        o, i = o.to(tl.int64), i.to(tl.int64)
    wide_first_o, wide_first_i = tl.cast(first_o, tl.int64), tl.cast(first_i, tl.int64)
    inputs, k = first_i + i, first_k + i
    factors = load_factors(coefficients, coefficient_strides, channels, in_rows, N, PER_CHANNEL, RANK)
    for j in tl.static_range(N):
        if PER_CHANNEL:
            factor = factors[j][:, None]
        else:
            factor = factors[j]
        if (WANTED >> j) & 1:
            if RANK > 0:
                factor = outer_factor(coefficients, coefficient_strides, j, channels, in_rows, inputs, in_columns, 0, 1)
            strides = gradient_strides[j]
            to = gradients[j] + wide_first_o * strides[0] + wide_first_i * strides[1]
            offsets = o[:, None] * strides[0] + i[None, :] * strides[1]
            gradient = g * factor
            if (ADDED >> j) & 1:
                gradient += tl.load(to + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(to + offsets, gradient.to(gradients[j].dtype.element_ty), mask=mask)
        if DOTS:
            strides = weight_strides[j]
            source = weights[j] + wide_first_o * strides[0] + wide_first_i * strides[1]
            offsets = o[:, None] * strides[0] + i[None, :] * strides[1]
            source = tl.load(source + offsets, mask=mask, other=0.0)
            products = tl.where(mask, g * source.to(tl.float32), 0.0)
            share = tl.cast(j * parts + part, tl.int64)
            if RANK > 0:
                store_shares(
                    products, dots, coefficients, coefficient_strides, j, channels, in_rows, inputs, in_columns,
                    part, parts, out_channels, row_part, row_parts, k, all_k,
                )  # fmt: skip
            elif PER_CHANNEL:
                tl.store(dots + share * out_channels + channels, tl.sum(products, 1), mask=in_rows)
            else:
                # At once: a sum of sums of rows Triton before 3.8 cannot compile for sm_100.
                tl.store(dots + share, tl.sum(products))


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
    coefficient_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
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
    offsets = o[:, None] * in_features + i[None, :]
    g = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for split in tl.range(0, splits):
        g += tl.load(partial + tl.cast(split, tl.int64) * all_taps * size + offsets, mask=mask, other=0.0)
    if PER_CHANNEL or RANK > 0:
        part, parts = column * all_taps + tap, columns * all_taps
    else:
        part, parts = tl.program_id(0), tl.num_programs(0)
    finish_tile(
        g,
        tap_pointers(gradients, gradient_strides, t_d, t_h, t_w, N),
        tap_pointers(weights, weight_strides, t_d, t_h, t_w, N),
        coefficients_at_tap(coefficients, coefficient_strides, t_d, t_h, t_w, RANK),
        dots, first_o, first_i, in_rows, in_columns, part, parts, out_channels,
        group * rows + row, groups * rows, tap * in_features + first_i, all_taps * in_features,
        gradient_strides, weight_strides, coefficient_strides, N, PER_CHANNEL, RANK, WANTED, ADDED, DOTS, FAR,
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
    coefficient_strides,
    bias_strides,
    N: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RANK: tl.constexpr,
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
                        share = tl.cast(j * parts + part, tl.int64) * out_features
                        total += tl.load(dots + share + o, mask=inside, other=0.0).to(tl.float64)
                if SUMS:
                    s = tl.zeros((BLOCK,), tl.float64)
                    for split in tl.range(0, splits):
                        s += tl.load(sums + split * out_features + o, mask=inside, other=0.0).to(tl.float64)
                    factors = load_factors(coefficients, coefficient_strides, o, inside, N, PER_CHANNEL, RANK)
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
    """One call's way from tiles of G to the gradients that are wanted.

    Attributes:
        recipe: the sources and coefficients.
        buffers: where the gradients are written.
        flags: what ``finish_tile`` is compiled for.
        gradients: the sources' buffers; stand-ins, with strides of 0, where none is wanted.
        gradient_strides: as ``strides_of``.
        dots: float32, the tiles' shares of <G, W_j>.
        shares: the same as kernels take them: of ``Outer`` coefficients those of left, and of right.
        parts: how many shares there are of one sum.
        row_parts: the same of the sums over rows, for the right of ``Outer`` coefficients.
    """

    def __init__(self, recipe: StridedRecipe, buffers: GradientBuffers, columns: int, tiles: int):
        """For a G of so many tiles, and so many of them beside one another (groups, taps and inputs)."""
        self.recipe, self.buffers = recipe, buffers
        wanted = buffers.wanted
        self.gradients = tuple(buffers.gradients.weights)
        self.gradient_strides = tuple(
            [
                strides_of(gradient) if want else (0,) * 5
                for gradient, want in zip(self.gradients, wanted.weights, strict=True)
            ]
        )
        farthest = max([max(strides[:2]) for strides in (*recipe.weight_strides, *self.gradient_strides)])
        self.flags = {
            "N": len(recipe.weights),
            "PER_CHANNEL": recipe.per_channel,
            "RANK": recipe.rank,
            "WANTED": bits(wanted.weights),
            "ADDED": bits(buffers.added),
            "DOTS": wanted.coefficients,
            "FAR": is_wide(farthest),
        }
        self.parts = columns if recipe.per_channel or recipe.rank else tiles
        self.row_parts = tiles // max(1, columns)
        weight = recipe.weights[0]
        sizes = self._sizes(weight.shape[0], weight.shape[1:].numel()) if wanted.coefficients else (0, 0)
        self.dots = torch.empty(sum(sizes), dtype=torch.float32, device=weight.device)
        self.shares = self.dots.split(sizes) if recipe.rank else self.dots

    def _sizes(self, out: int, columns: int) -> tuple[int, int]:
        """Of the shares: of left and of right of ``Outer`` coefficients; of others, all of them."""
        recipe = self.recipe
        if recipe.rank:
            return recipe.terms * self.parts * out, recipe.terms * self.row_parts * columns
        return len(recipe.weights) * self.parts * (out if recipe.per_channel else 1), 0

    def reduce(self, partial: Tensor, taps: Sequence[int], groups: int, config: Config) -> None:
        """Sum G's parts, (split, tap, out, in), and finish its tiles."""
        *_, out_features, in_features = partial.shape
        out_features //= groups
        tiles = groups * cdiv(out_features, config.rows) * cdiv(in_features, config.columns)
        reduce_wgrad_kernel[(tiles * math.prod(taps),)](
            self.gradients,
            partial,
            self.shares,
            self.recipe.weights,
            self.recipe.coefficients,
            groups,
            out_features,
            in_features,
            partial.shape[0],
            taps,
            self.gradient_strides,
            self.recipe.weight_strides,
            self.recipe.strides,
            **self.flags,
            BLOCK_OUT=config.rows,
            BLOCK_IN=config.columns,
            num_warps=config.warps,
        )

    def finish(self, sums: Tensor | None) -> None:
        """Write the coefficients' gradients and the biases', from the shares and from dy's sums, (split, out)."""
        recipe, wanted, gradients = self.recipe, self.buffers.wanted, self.buffers.gradients
        if recipe.rank and wanted.coefficients:
            self._finish_outer()
        dots = wanted.coefficients and not recipe.rank
        if not (dots or any(wanted.biases)):
            return
        out_features = recipe.weights[0].shape[0]
        bias_sources, bias_strides = recipe.vectors()
        finish_coefficients_kernel[(cdiv(out_features, BLOCK) if recipe.per_channel else 1,)](
            gradients.coefficients,
            tuple(gradients.biases) or self.gradients,
            self.dots,
            self.dots if sums is None else sums,
            recipe.coefficients,
            bias_sources,
            out_features,
            self.parts,
            0 if sums is None else sums.shape[0],
            recipe.strides,
            bias_strides,
            N=len(recipe.weights),
            PER_CHANNEL=recipe.per_channel,
            RANK=recipe.rank,
            WANTED=bits(wanted.biases),
            DOTS=dots,
            SUMS=sums is not None,
            HAS_BIAS=recipe.biases is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )

    def _finish_outer(self) -> None:
        """Write the gradients of ``Outer`` coefficients, left beside right."""
        weight = self.recipe.weights[0]
        out, within, *taps = weight.shape
        found = Outer.of(self.buffers.gradients.coefficients, out)
        left, right = self.shares
        sum_shares(found.left, left, self.parts, out, 1)
        sum_shares(found.right, right, self.row_parts, within, math.prod(taps))
