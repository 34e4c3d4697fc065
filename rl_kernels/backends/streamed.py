"""Bounded panels of the mixed weight, each handed to the vendor's product: plain torch, on any device.

A panel is mixed into scratch that stays in cache and is multiplied at once, so that the mix costs reading the sources
and little else. Beyond its outputs a call allocates at most ``workspace_bytes(device)``, whatever the weight's size; a
convolution's panel of one image and one output channel is the smallest piece, and may pass that bound for an image of
more than a million pixels; so may bfloat16 images smaller than the filter on CPUs, which are multiplied in float32.
(What the vendor's own kernels take for themselves is not counted: the plain layer pays it too.)

A linear layer's wgrad needs no scratch for G, the gradient of the mixed weight, where some source wants its gradient:
the vendor writes G into that source's own buffer, and one pass over panels finishes every gradient from it, in place
for that source. A convolution's makes G a block of channels at a time.

``Outer`` coefficients are evaluated a panel at a time, where the panel is mixed, and their gradients added up so.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend, kernels_in
from rl_kernels.ops.mix import accumulate_dtype, factors, mixed_bias, outer_terms
from rl_kernels.ops.shapes import as_rows, conv_memory_format, empty_conv_input, empty_conv_output, empty_gradients
from rl_kernels.ops.values import Geometry, Gradients, Outer, Recipe, Wanted

WORKSPACE_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
"""The most memory a call takes beyond its outputs, by device type. Other devices: as the CPU."""

_LINEAR_PANEL = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Elements of a linear layer's panel: 1 MiB in float32, a CPU core's L2; 8 MiB in bfloat16, a part of a GPU's."""

_BYTES_AN_ELEMENT = 16
"""What an element of a panel costs at most: the float64 panel and a product; or float32 sums, a term and the panel."""

_BYTES_OF_A_FACTOR = 8
"""What it costs beside where ``Outer`` coefficients are evaluated apart from the panel, of several sources."""

_MIN_RUN = {torch.float64: 256, torch.float32: 512, torch.bfloat16: 32, torch.float16: 32}
"""Columns of a dgrad panel at least: shorter contiguous runs waste memory bandwidth. Fewer in half precision, where
taller panels come first: a sum over row blocks rounds at each."""


def workspace_bytes(device: torch.device | str) -> int:
    """The most memory in bytes that a call on ``device`` takes beyond its outputs."""
    return WORKSPACE_BYTES.get(torch.device(device).type, WORKSPACE_BYTES["cpu"])


def _max_elements(tensor: Tensor, recipe: Recipe) -> int:
    apart = recipe.is_outer and len(recipe.weights) > 1
    return workspace_bytes(tensor.device) // (_BYTES_AN_ELEMENT + _BYTES_OF_A_FACTOR * apart)


def _linear_panel(tensor: Tensor) -> int:
    return _LINEAR_PANEL.get(tensor.device.type, _LINEAR_PANEL["cpu"])


def _blocks(length: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class _Factors:
    """What panels of the sources are multiplied by."""

    def __init__(self, recipe: Recipe):
        shape = recipe.weights[0].shape
        self.is_outer = recipe.is_outer
        if self.is_outer:
            self.left, self.right = outer_terms(recipe.coefficients, shape)
        else:
            self.factors = factors(recipe.coefficients, shape)

    def of_rows(self, j: int, rows: slice) -> Tensor:
        """Of source j, shaped to multiply a panel of ``rows``; not of ``Outer`` coefficients."""
        factor = self.factors[j]
        return factor if factor.shape[0] == 1 else factor[rows]

    def evaluate(self, j: int, index: Sequence[slice], out: Tensor) -> Tensor:
        """``Outer`` coefficients of the panel ``index`` of source j, into ``out``, which is shaped as the panel."""
        left = self.left[j][:, index[0]]
        right = self.right[j][(slice(None), slice(None), *index[1:])]
        torch.mul(left[0], right[0], out=out)
        for rows, columns in zip(left[1:], right[1:], strict=True):
            out.addcmul_(rows, columns)
        return out


class _Mixer:
    """Mixes panels of the sources into one scratch, in the dtype of the activation."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype, elements: int):
        first = recipe.weights[0]
        compute = accumulate_dtype(first.dtype)
        self.weights = recipe.weights
        self.factors = _Factors(recipe)
        elements = min(elements, first.numel())
        self.sums = torch.empty(elements, dtype=compute, device=first.device)
        self.rounded = self.sums if dtype == compute else torch.empty_like(self.sums, dtype=dtype)
        # The first source's coefficients are evaluated where the sum will be.
        self.apart = torch.empty_like(self.sums) if recipe.is_outer and len(recipe.weights) > 1 else None

    def __call__(self, *index: slice, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """The panel ``W[index]``, valid until the next call."""
        first = self.weights[0][index]
        total = _view(self.sums, first.shape, memory_format)
        if self.factors.is_outer:
            self.factors.evaluate(0, index, total).mul_(first)
        else:
            torch.mul(first, self.factors.of_rows(0, index[0]), out=total)
        for j in range(1, len(self.weights)):
            if self.apart is None:
                factor = self.factors.of_rows(j, index[0])
            else:
                factor = self.factors.evaluate(j, index, _view(self.apart, first.shape, memory_format))
            total.addcmul_(self.weights[j][index].to(total.dtype), factor)
        if self.rounded is self.sums:
            return total
        return _view(self.rounded, first.shape, memory_format).copy_(total)


def _view(scratch: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """The front of a 1-D ``scratch`` as a dense tensor of ``shape`` in ``memory_format``."""
    flat = scratch[: math.prod(shape)]
    if memory_format == torch.contiguous_format:
        return flat.view(tuple(shape))
    batch, channels, *spatial = shape
    return flat.view(batch, *spatial, channels).movedim(-1, 1)


# Linear.


def mixed_linear(x: Tensor, recipe: Recipe) -> Tensor:
    out_features, in_features = recipe.weights[0].shape
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    rows_x, rows_y = as_rows(x), as_rows(y)
    bias = mixed_bias(recipe, x.dtype)
    elements = _linear_panel(x)
    columns = min(in_features, elements)
    panel = _Mixer(recipe, x.dtype, elements)
    for rows in _blocks(out_features, elements // max(columns, 1)):
        target = rows_y[:, rows]
        for j, inner in enumerate(_blocks(in_features, columns)):
            part = rows_x[:, inner]
            weight = panel(rows, inner).t()
            if j > 0:
                target.addmm_(part, weight)
            elif bias is None:
                torch.mm(part, weight, out=target)
            else:
                torch.addmm(bias[rows], part, weight, out=target)
    if in_features == 0:
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    return y


def mixed_linear_dgrad(dy: Tensor, recipe: Recipe) -> Tensor:
    out_features, in_features = recipe.weights[0].shape
    dx = dy.new_empty(*dy.shape[:-1], in_features)
    if dx.numel() == 0:
        return dx
    rows_dy, rows_dx = as_rows(dy), as_rows(dx)
    elements = _linear_panel(dy)
    columns = min(in_features, max(elements // max(out_features, 1), _MIN_RUN[dy.dtype]))
    panel = _Mixer(recipe, dy.dtype, elements)
    for inner in _blocks(in_features, columns):
        target = rows_dx[:, inner]
        for j, rows in enumerate(_blocks(out_features, elements // columns)):
            part = rows_dy[:, rows]
            if j == 0:
                torch.mm(part, panel(rows, inner), out=target)
            else:
                target.addmm_(part, panel(rows, inner))
    if out_features == 0:
        dx.zero_()
    return dx


def mixed_linear_wgrad(dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted) -> Gradients:
    out_features, in_features = recipe.weights[0].shape
    transposed_dy, x = as_rows(dy).t(), as_rows(x)
    whole = any(wanted.weights) and x.dtype == recipe.weights[0].dtype
    g = torch.mm(transposed_dy, x) if whole else None
    gradients = _GradientPanels(recipe, wanted, torch.contiguous_format, g)
    gradients.add_biases(transposed_dy.t(), [0])
    if g is not None:
        for rows in _blocks(out_features, _linear_panel(x) // max(in_features, 1)):
            gradients.finish(g[rows], rows)
    elif wanted.product:
        elements = _max_elements(x, recipe)
        columns = min(in_features, elements)
        scratch = x.new_empty(min(elements, out_features * in_features))
        for rows in _blocks(out_features, elements // max(columns, 1)):
            for inner in _blocks(in_features, columns):
                panel = _view(scratch, (rows.stop - rows.start, inner.stop - inner.start), torch.contiguous_format)
                gradients.finish(torch.mm(transposed_dy[rows], x[:, inner], out=panel), rows, inner)
    return gradients.result()


# Convolution.


class _ChannelBlock(NamedTuple):
    """Some whole groups, or a part of one group's channels."""

    groups: slice
    within: slice
    """Channels of each of these groups: all of them where there are several."""

    @property
    def group_count(self) -> int:
        """How many groups."""
        return self.groups.stop - self.groups.start

    def all_of(self, per_group: int) -> slice:
        """Every channel of these groups, on the side that has ``per_group`` of them."""
        return slice(self.groups.start * per_group, self.groups.stop * per_group)

    def part_of(self, per_group: int) -> slice:
        """The channels of this block, on its own side."""
        first = self.groups.start * per_group
        return slice(first + self.within.start, first + (self.group_count - 1) * per_group + self.within.stop)


def _channel_blocks(groups: int, per_group: int, channel_elements: int, elements: int) -> list[_ChannelBlock]:
    """Blocks of at most ``elements`` weight elements (one channel at least), ``channel_elements`` a channel."""
    channels = max(1, elements // max(channel_elements, 1))
    if channels >= per_group:
        return [_ChannelBlock(some, slice(0, per_group)) for some in _blocks(groups, channels // max(per_group, 1))]
    return [
        _ChannelBlock(slice(group, group + 1), within)
        for group in range(groups)
        for within in _blocks(per_group, channels)
    ]


def _images(batch: int, image_elements: int, tensor: Tensor) -> Iterator[slice]:
    """Runs of images whose slices of ``image_elements`` take a quarter of the workspace at most; one run at least."""
    largest = workspace_bytes(tensor.device) // 4 // tensor.element_size()
    return _blocks(max(batch, 1), largest // max(image_elements, 1))


def _product_dtype(activation: Tensor, image: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> torch.dtype:
    """What the vendor is given: float32 for bfloat16 images on CPUs that a filter's first step would leave.

    For these oneDNN reads memory that nothing wrote, on processors with bfloat16 instructions (torch 2.13).
    """
    steps = zip(kernel, geometry.stride, geometry.dilation, strict=True)
    reach = [dil * (size - 1) + step for size, step, dil in steps]
    if activation.device.type == "cpu" and activation.dtype == torch.bfloat16 and any(map(operator.lt, image, reach)):
        return torch.float32
    return activation.dtype


def mixed_conv(x: Tensor, recipe: Recipe, geometry: Geometry) -> Tensor:
    out_channels, in_group, *kernel = recipe.weights[0].shape
    stride, padding, dilation, groups = geometry
    dtype = _product_dtype(x, x.shape[2:], kernel, geometry)
    bias = mixed_bias(recipe, dtype)
    memory_format = conv_memory_format(x, recipe.weights)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        rest = (False, [0] * len(stride), groups)
        return torch.ops.aten.convolution(x.to(dtype), weight, bias, stride, padding, dilation, *rest)

    if recipe.weights[0].numel() == 0 or x.numel() == 0:
        y = empty_conv_output(x, recipe, geometry)
        return y.zero_() if bias is None else y.copy_(bias.view(-1, *(1,) * len(stride)))
    filter_elements = recipe.weights[0][0].numel()
    blocks = _channel_blocks(groups, out_channels // groups, filter_elements, _max_elements(x, recipe))
    panel = _Mixer(recipe, dtype, max(filter_elements, _max_elements(x, recipe)))
    if len(blocks) == 1:
        whole = panel(slice(0, out_channels), memory_format=memory_format)
        return convolve(x, whole, bias, groups).to(x.dtype).contiguous(memory_format=memory_format)
    y = empty_conv_output(x, recipe, geometry)
    for block in blocks:
        rows, inputs = block.part_of(out_channels // groups), block.all_of(in_group)
        weight = panel(rows, memory_format=memory_format)
        for some in _images(x.shape[0], (rows.stop - rows.start) * math.prod(y.shape[2:]), y):
            part = convolve(x[some, inputs], weight, None if bias is None else bias[rows], block.group_count)
            y[some, rows] = part
    return y


def mixed_conv_dgrad(dy: Tensor, recipe: Recipe, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    out_channels, in_group, *kernel = recipe.weights[0].shape
    batch, _, *spatial = input_size
    groups = geometry.groups
    memory_format = conv_memory_format(dy, recipe.weights)
    dtype = _product_dtype(dy, spatial, kernel, geometry)

    def convolve(dy: Tensor, weight: Tensor, groups: int) -> Tensor:
        size = (dy.shape[0], weight.shape[1] * groups, *spatial)
        return _vendor_dgrad(dy.to(dtype), weight, size, geometry._replace(groups=groups))

    if recipe.weights[0].numel() == 0 or dy.numel() == 0 or math.prod(input_size) == 0:
        return empty_conv_input(dy, recipe, input_size).zero_()
    out_group = out_channels // groups
    filter_elements = recipe.weights[0][:out_group, 0].numel()
    blocks = _channel_blocks(groups, in_group, filter_elements, _max_elements(dy, recipe))
    panel = _Mixer(recipe, dtype, max(filter_elements, _max_elements(dy, recipe)))
    if len(blocks) == 1:
        whole = panel(slice(0, out_channels), memory_format=memory_format)
        return convolve(dy, whole, groups).to(dy.dtype).contiguous(memory_format=memory_format)
    dx = empty_conv_input(dy, recipe, input_size)
    for block in blocks:
        inputs, rows = block.part_of(in_group), block.all_of(out_group)
        weight = panel(rows, block.within, memory_format=memory_format)
        for some in _images(batch, (inputs.stop - inputs.start) * math.prod(spatial), dx):
            dx[some, inputs] = convolve(dy[some, rows], weight, block.group_count)
    return dx


def _vendor_dgrad(dy: Tensor, weight: Tensor, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    if dy.device.type == "cpu" and dy.dtype != torch.float64:
        # The same product as a transposed convolution: it needs no stand-in for x, which oneDNN would copy.
        output_padding = [
            size - ((out - 1) * step - 2 * pad + dil * (kernel - 1) + 1)
            for size, out, kernel, step, pad, dil in zip(
                input_size[2:], dy.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
        return torch.ops.aten.convolution(dy, weight, None, stride, padding, dilation, True, output_padding, groups)
    x = dy.new_empty(()).expand(tuple(input_size))
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [True, False, False]
    )
    return dx


def mixed_conv_wgrad(dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, geometry: Geometry) -> Gradients:
    weights = recipe.weights
    out_channels, in_group, *kernel = weights[0].shape
    stride, padding, dilation, groups = geometry
    out_group = out_channels // groups
    memory_format = conv_memory_format(x, weights)
    gradients = _GradientPanels(recipe, wanted, memory_format)
    gradients.add_biases(dy, [0, *range(2, dy.dim())])
    if not wanted.product:
        return gradients.result()

    dtype = _product_dtype(x, x.shape[2:], kernel, geometry)

    def product(dy: Tensor, x: Tensor, rows: slice, groups: int) -> Tensor:
        dy, x = dy.to(dtype), x.to(dtype)
        # Only its shape and layout are read.
        weight = weights[0][rows]
        if weight.dtype != x.dtype:
            weight = x.new_empty(()).expand(weight.shape)
        if dy.numel() == 0 or x.numel() == 0:
            return torch.empty_like(weight, dtype=x.dtype, memory_format=memory_format).zero_()
        _, g, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [False, True, False]
        )
        return g

    # G in blocks, and never written into a gradient's buffer as a linear layer's is: the vendor would reorder the
    # whole of it on the way.
    filter_elements = weights[0][:1].numel()
    blocks = _channel_blocks(groups, out_group, filter_elements, workspace_bytes(x.device) // 4 // x.element_size())
    for block in blocks:
        rows, inputs = block.part_of(out_group), block.all_of(in_group)
        if len(blocks) == 1:
            g = product(dy, x, rows, groups)
        else:
            images = _images(x.shape[0], (rows.stop - rows.start) * math.prod(dy.shape[2:]), dy)
            parts = (product(dy[some, rows], x[some, inputs], rows, block.group_count) for some in images)
            g = functools.reduce(lambda total, part: total.to(gradients.compute).add_(part), parts)
        for some in _blocks(rows.stop - rows.start, _linear_panel(x) // max(filter_elements, 1)):
            gradients.finish(g[some], slice(rows.start + some.start, rows.start + some.stop))
    return gradients.result()


class _GradientPanels:
    """Turns G, the gradient of the mixed weight, into every gradient wanted, a panel at a time."""

    def __init__(self, recipe: Recipe, wanted: Wanted, memory_format: torch.memory_format, g: Tensor | None = None):
        """``g``, where given, is the whole of G: it becomes the gradient of the first source that wants one."""
        self.recipe, self.wanted = recipe, wanted
        self.compute = accumulate_dtype(recipe.weights[0].dtype)
        self.factors = _Factors(recipe)
        host = list(wanted.weights).index(True) if g is not None else None
        spare = [want and j != host for j, want in enumerate(wanted.weights)]
        self.gradients = empty_gradients(
            lambda weight: torch.empty_like(weight, memory_format=memory_format),
            recipe,
            wanted._replace(weights=spare),
        )
        # G's own buffer comes last: writing it ends the panel.
        self.order = [j for j, want in enumerate(spare) if want]
        if g is not None and host is not None:
            self.gradients.weights[host] = g
            self.order.append(host)
        # <G, W_j> by output channel; the channels are summed at the end, in float64. Outer coefficients' gradients are
        # summed in their own buffer.
        first, device = recipe.weights[0], recipe.coefficients.device
        self.dots: Tensor | None = None
        if wanted.coefficients and recipe.is_outer:
            self.gradients.coefficients.zero_()
        elif wanted.coefficients:
            self.dots = torch.zeros(len(recipe.weights), first.shape[0], dtype=self.compute, device=device)

    def add_biases(self, dy: Tensor, dims: list[int]) -> None:
        """Finish what the biases need: ``dy`` summed over ``dims``, all but its channels; the first is the batch."""
        coefficients, biases = self.recipe.bias_coefficients, self.recipe.biases
        if biases is None or not self.wanted.sums(self.recipe):
            return
        # In runs: in half precision a CPU's sum copies what it sums to float32.
        runs = [dy[some].sum(dims, dtype=self.compute) for some in _images(dy.shape[0], dy[:1].numel(), coefficients)]
        total = runs[0] if len(runs) == 1 else torch.stack(runs).sum(0)
        for j, factor in enumerate(factors(coefficients, total.shape)):
            if self.wanted.biases[j]:
                torch.mul(total, factor, out=self.gradients.biases[j])
            if self.dots is not None:
                self.dots[j].addcmul_(total, biases[j])

    def finish(self, g: Tensor, *index: slice) -> None:
        """Finish the panel ``index`` of every gradient. ``g`` is overwritten where it is a view of the whole G."""
        g = g.to(self.compute)
        inner = tuple(range(1, g.dim()))
        if self.dots is not None:
            for dot, weight in zip(self.dots, self.recipe.weights, strict=True):
                dot[index[0]] += (g * weight[index]).sum(inner)
        elif self.wanted.coefficients:
            self._add_outer(g, index)
        for j in self.order:
            if self.factors.is_outer:
                factor = self.factors.evaluate(j, index, torch.empty_like(g))
            else:
                factor = self.factors.of_rows(j, index[0])
            torch.mul(g, factor, out=self.gradients.weights[j][index])

    def _add_outer(self, g: Tensor, index: Sequence[slice]) -> None:
        """Add a panel's share of the gradient of ``Outer`` coefficients."""
        weights, out = self.recipe.weights, self.recipe.weights[0].shape[0]
        # A convolution's panel has every column of its rows.
        rows, columns = index if len(index) == 2 else (index[0], slice(None))
        found = Outer.of(self.gradients.coefficients, out)
        for j, (left, right) in enumerate(zip(*Outer.of(self.recipe.coefficients, out), strict=True)):
            product = (g * weights[j][tuple(index)]).reshape(g.shape[0], math.prod(g.shape[1:]))
            found.left[j][:, rows].addmm_(right[:, columns], product.t())
            found.right[j][:, columns].addmm_(left[:, rows], product)

    def result(self) -> Gradients:
        """The outputs of the op."""
        if self.dots is not None:
            dots = self.dots if self.recipe.per_channel else self.dots.sum(1, dtype=torch.float64)
            self.gradients.coefficients.copy_(dots)
        return self.gradients


class Streamed(Backend):
    """Panels through the vendor's kernels."""

    name = "streamed"
    summary = "bounded panels of the mixed weight through the vendor's products"
    kernels = kernels_in(linear=__name__, conv=__name__)

    def why_not(self, case: Case) -> str | None:
        """None: it runs anything."""
        return None


BACKEND = Streamed()
