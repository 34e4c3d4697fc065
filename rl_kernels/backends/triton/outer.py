"""The gradients of ``Outer`` coefficients: what a tile adds to them, in a bounded workspace, and the sum of that.

Left's are sums over the columns of a weight, as those of coefficients a channel are; right's are sums over its rows. Of
each, a tile leaves what it has of every term, of which there are N * R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rl_kernels.backends.gpu import heuristics
from rl_kernels.backends.gpu.heuristics import Config, cdiv
from rl_kernels.backends.gpu.operands import GradientBuffers
from rl_kernels.backends.triton.mix import load_term
from rl_kernels.ops.values import Gradients, Outer, Recipe

BLOCK = 256
"""Elements that a program of ``sum_shares_kernel`` sums."""
ROWS = 128
"""What the rows of a panel are a multiple of, if there are as many: no tile has more."""


@triton.jit
def store_shares(
    products,
    dots,
    coefficients,
    strides,
    j,
    channels,
    in_rows,
    inputs,
    in_columns,
    part,
    parts,
    out_channels,
    row_part,
    row_parts,
    k,
    all_k,
):
    """A tile's shares of the gradients of source j's left and right, from its products G * W_j, 0 outside of the mask.

    dots: (N * R, parts, out_channels), and (N * R, row_parts, all_k), whose k are taps by inputs.
    """
    # One after the other: beside a tile there are registers for the one or the other.
    for r in tl.range(0, strides[7]):
        term = tl.cast(strides[7] * j + r, tl.int64)
        right = load_term(coefficients, strides, j, r, inputs, in_columns, False, 1)
        tl.store(dots[0] + (term * parts + part) * out_channels + channels, tl.sum(products * right, 1), mask=in_rows)
    for r in tl.range(0, strides[7]):
        term = tl.cast(strides[7] * j + r, tl.int64)
        left = load_term(coefficients, strides, j, r, channels, in_rows, True, 0)
        tl.store(dots[1] + (term * row_parts + row_part) * all_k + k, tl.sum(products * left, 0), mask=in_columns)


@triton.jit
def sum_shares_kernel(gradient, shares, size, inputs, taps, parts, term_stride, BLOCK: tl.constexpr):
    """gradient[term, input * taps + tap] = sum of shares[term, part, tap * inputs + input] in float64, in their order.

    size: inputs * taps.
    """
    term = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros((BLOCK,), tl.float64)
    for part in tl.range(0, parts):
        total += tl.load(shares + (term * parts + part) * size + element, mask=inside, other=0.0).to(tl.float64)
    to = gradient + term * term_stride + element % inputs * taps + element // inputs
    tl.store(to, total.to(gradient.dtype.element_ty), mask=inside)


def sum_shares(gradient: Tensor, shares: Tensor, parts: int, inputs: int, taps: int) -> None:
    """``gradient``, (N, R, inputs * taps) and but for its last dimension contiguous, from its shares."""
    n, rank, size = gradient.shape
    if size > 0:
        sum_shares_kernel[(cdiv(size, BLOCK), n * rank)](
            gradient, shares, size, inputs, taps, parts, gradient.stride(1), BLOCK=BLOCK
        )


class Panel(NamedTuple):
    """What of a layer wgrad takes at once: some of its output channels, as a layer of their own.

    Attributes:
        dy: (tokens, out), or (batch, out, *sizes).
        x: the same of the inputs.
        recipe: of these channels.
        buffers: the same.
        groups: of a convolution.
    """

    dy: Tensor
    x: Tensor
    recipe: Recipe
    buffers: GradientBuffers
    groups: int


def panels(layer: Panel, configs: tuple[Config, ...]) -> Iterator[Panel]:
    """The layer; or, of ``Outer`` coefficients, panels of it whose tiles' shares fit into the workspace.

    What is done with a panel is added up when the next is asked for. ``configs``: its tile may be any of these.
    """
    recipe, buffers = layer.recipe, layer.buffers
    out = recipe.weights[0].shape[0]
    rows = _rows_at_once(layer, configs) if recipe.is_outer and buffers.wanted.coefficients else out
    if rows >= out:
        yield layer
        return
    coefficients = Outer.of(recipe.coefficients, out)
    whole = Outer.of(buffers.gradients.coefficients, out)
    whole.right.zero_()
    for some, inputs, groups in _parts(out, layer.x.shape[1], layer.groups, rows):
        joined = Outer(coefficients.left[..., some], coefficients.right).joined()
        found = joined.new_empty(joined.shape)
        gradients = Gradients(
            _rows_of(buffers.gradients.weights, buffers.wanted.weights, some),
            found,
            _rows_of(buffers.gradients.biases, buffers.wanted.biases, some),
        )
        biases = None if recipe.biases is None else [bias[some] for bias in recipe.biases]
        part = Recipe([weight[some] for weight in recipe.weights], joined, biases)
        yield Panel(layer.dy[:, some], layer.x[:, inputs], part, buffers._replace(gradients=gradients), groups)
        left, right = Outer.of(found, some.stop - some.start)
        whole.left[..., some] = left
        whole.right.add_(right)


def _rows_of(gradients: list[Tensor], wanted: Sequence[bool], rows: slice) -> list[Tensor]:
    return [gradient[rows] if want else gradient for gradient, want in zip(gradients, wanted, strict=True)]


def _rows_at_once(layer: Panel, configs: tuple[Config, ...]) -> int:
    """Output channels whose shares fit, in the smallest of the tiles."""
    out, within, *kernel = layer.recipe.weights[0].shape
    n, rank, _ = layer.recipe.coefficients.shape
    taps, out_group = math.prod(kernel), out // layer.groups
    height, width = min(config.rows for config in configs), min(config.columns for config in configs)
    of_tile = within * taps  # Of right, whatever its rows: one more than full tiles have is allowed for.
    of_row = cdiv(within, width) * taps + of_tile * cdiv(out_group, height) / out_group
    rows = max(1, int((heuristics.WORKSPACE_BYTES // (4 * n * rank) - of_tile) // max(1, of_row)))
    return rows - rows % ROWS or rows


def _parts(out: int, inputs: int, groups: int, rows: int) -> Iterator[tuple[slice, slice, int]]:
    """Output channels, at most so many, the inputs that they have, and the groups: whole ones, or a part of one."""
    out_group, in_group = out // groups, inputs // groups
    at_once = max(1, rows // out_group)
    for group in range(0, groups, at_once):
        some = min(at_once, groups - group)
        of_groups = slice(group * in_group, (group + some) * in_group)
        first, end = group * out_group, (group + some) * out_group
        for start in range(first, end, max(rows, out_group) if some > 1 else rows):
            yield slice(start, min(end, start + rows)), of_groups, some
