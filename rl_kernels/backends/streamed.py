"""Bounded panels of the mixed weight, each handed to the vendor's product: plain torch, on any device.

A panel is mixed into scratch that stays in cache and is multiplied at once, so that the mix costs reading the sources
and little else. Beyond its outputs a call allocates at most ``workspace_bytes(device)``, whatever the weight's size; a
convolution's panel of one image and one output channel is the smallest piece, and may pass that bound for an image of
more than a million pixels; so may bfloat16 images smaller than the filter on CPUs, which are multiplied in float32.
(What the vendor's own kernels take for themselves is not counted: the plain layer pays it too.)

A linear layer's wgrad needs no scratch for G, the gradient of the mixed weight, where some source wants its gradient:
the vendor writes G into that source's own buffer, and one pass over panels finishes every gradient from it, in place
for that source. A convolution's makes G a block of channels at a time.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rl_kernels.ops import shapes
from rl_kernels.ops.mix import accumulate_dtype, factors, mix

WORKSPACE_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
"""The most memory a call takes beyond its outputs, by device type. Other devices: as the CPU."""

_LINEAR_PANEL = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Elements of a linear layer's panel: 1 MiB in float32, a CPU core's L2; 8 MiB in bfloat16, a part of a GPU's."""

_BYTES_AN_ELEMENT = 16
"""What an element of a panel costs at most: the float64 panel and a product; or float32 sums, a term and the panel."""

_SHORTEST_RUN = {torch.float64: 256, torch.float32: 512, torch.bfloat16: 32, torch.float16: 32}
"""Columns of a dgrad panel at least: shorter contiguous runs waste memory bandwidth. Fewer in half precision, where
taller panels come first: a sum over row blocks rounds at each."""


def workspace_bytes(device: torch.device | str) -> int:
    """The most memory in bytes that a call on ``device`` takes beyond its outputs."""
    return WORKSPACE_BYTES.get(torch.device(device).type, WORKSPACE_BYTES["cpu"])


def _most_elements(tensor: Tensor) -> int:
    return workspace_bytes(tensor.device) // _BYTES_AN_ELEMENT


def _linear_panel(tensor: Tensor) -> int:
    return _LINEAR_PANEL.get(tensor.device.type, _LINEAR_PANEL["cpu"])


def _blocks(length: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class _Mixer:
    """Mixes panels of the sources into one scratch, in the dtype of the activation."""

    def __init__(self, weights: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype, elements: int):
        compute = accumulate_dtype(weights[0].dtype)
        self.weights = weights
        self.factors = factors(coefficients, weights[0].dim())
        elements = min(elements, weights[0].numel())
        self.sums = torch.empty(elements, dtype=compute, device=weights[0].device)
        self.rounded = self.sums if dtype == compute else torch.empty_like(self.sums, dtype=dtype)

    def __call__(self, *index: slice, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """The panel ``W[index]``, valid until the next call."""
        first = self.weights[0][index]
        total = _view(self.sums, first.shape, memory_format)
        torch.mul(first, self._factor(0, index[0]), out=total)
        for j in range(1, len(self.weights)):
            total.addcmul_(self.weights[j][index].to(total.dtype), self._factor(j, index[0]))
        if self.rounded is self.sums:
            return total
        return _view(self.rounded, first.shape, memory_format).copy_(total)

    def _factor(self, j: int, rows: slice) -> Tensor:
        factor = self.factors[j]
        return factor if factor.shape[0] == 1 else factor[rows]


def _view(scratch: Tensor, shape: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """The front of a 1-D ``scratch`` as a dense tensor of ``shape`` in ``memory_format``."""
    flat = scratch[: math.prod(shape)]
    if memory_format == torch.contiguous_format:
        return flat.view(tuple(shape))
    batch, channels, *spatial = shape
    return flat.view(batch, *spatial, channels).movedim(-1, 1)


# Linear.


def mixed_linear(x: Tensor, weights: Sequence[Tensor], coefficients: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
    out_features, in_features = weights[0].shape
    y = x.new_empty(*x.shape[:-1], out_features)
    if y.numel() == 0:
        return y
    rows_x, rows_y = shapes.as_rows(x), shapes.as_rows(y)
    bias = None if biases is None else mix(biases, coefficients, x.dtype)
    elements = _linear_panel(x)
    columns = min(in_features, elements)
    panel = _Mixer(weights, coefficients, x.dtype, elements)
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


def mixed_linear_dgrad(dy: Tensor, weights: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    out_features, in_features = weights[0].shape
    dx = dy.new_empty(*dy.shape[:-1], in_features)
    if dx.numel() == 0:
        return dx
    rows_dy, rows_dx = shapes.as_rows(dy), shapes.as_rows(dx)
    elements = _linear_panel(dy)
    columns = min(in_features, max(elements // max(out_features, 1), _SHORTEST_RUN[dy.dtype]))
    panel = _Mixer(weights, coefficients, dy.dtype, elements)
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


def mixed_linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    out_features, in_features = weights[0].shape
    transposed_dy, x = shapes.as_rows(dy).t(), shapes.as_rows(x)
    masks = (weights_mask, coefficients_mask, biases_mask)
    g = torch.mm(transposed_dy, x) if any(weights_mask) and x.dtype == weights[0].dtype else None
    gradients = _Gradients(g, torch.contiguous_format, weights, coefficients, biases, *masks)
    gradients.add_biases(transposed_dy.t(), [0])
    if g is not None:
        for rows in _blocks(out_features, _linear_panel(x) // max(in_features, 1)):
            gradients.finish(g[rows], rows)
    elif gradients.needs_product:
        columns = min(in_features, _most_elements(x))
        scratch = x.new_empty(min(_most_elements(x), out_features * in_features))
        for rows in _blocks(out_features, _most_elements(x) // max(columns, 1)):
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
    most = workspace_bytes(tensor.device) // 4 // tensor.element_size()
    return _blocks(max(batch, 1), most // max(image_elements, 1))


def _product_dtype(
    activation: Tensor, image: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> torch.dtype:
    """What the vendor is given: float32 for bfloat16 images on CPUs that a filter's first step would leave.

    For these oneDNN reads memory that nothing wrote, on processors with bfloat16 instructions (torch 2.13).
    """
    reach = [dil * (size - 1) + step for size, step, dil in zip(kernel, stride, dilation, strict=True)]
    if activation.device.type == "cpu" and activation.dtype == torch.bfloat16 and any(map(operator.lt, image, reach)):
        return torch.float32
    return activation.dtype


def mixed_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    out_channels, in_group, *kernel = weights[0].shape
    memory_format = shapes.conv_memory_format(x, weights)
    spatial = shapes.conv_output_size(x.shape[2:], kernel, stride, padding, dilation)
    shape = (x.shape[0], out_channels, *spatial)
    dtype = _product_dtype(x, x.shape[2:], kernel, stride, dilation)
    bias = None if biases is None else mix(biases, coefficients, dtype)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        rest = (False, [0] * len(stride), groups)
        return torch.ops.aten.convolution(x.to(dtype), weight, bias, stride, padding, dilation, *rest)

    def empty() -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)

    if weights[0].numel() == 0 or x.numel() == 0:
        return empty().zero_() if bias is None else empty().copy_(bias.view(-1, *(1,) * len(spatial)))
    filter_elements = weights[0][0].numel()
    blocks = _channel_blocks(groups, out_channels // groups, filter_elements, _most_elements(x))
    panel = _Mixer(weights, coefficients, dtype, max(filter_elements, _most_elements(x)))
    if len(blocks) == 1:
        whole = panel(slice(0, out_channels), memory_format=memory_format)
        return convolve(x, whole, bias, groups).to(x.dtype).contiguous(memory_format=memory_format)
    y = empty()
    for block in blocks:
        rows, inputs = block.part_of(out_channels // groups), block.all_of(in_group)
        weight = panel(rows, memory_format=memory_format)
        for some in _images(x.shape[0], (rows.stop - rows.start) * math.prod(spatial), y):
            part = convolve(x[some, inputs], weight, None if bias is None else bias[rows], block.group_count)
            y[some, rows] = part
    return y


def mixed_conv_dgrad(
    dy: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    out_channels, in_group, *_ = weights[0].shape
    batch, _, *spatial = input_size
    memory_format = shapes.conv_memory_format(dy, weights)
    dtype = _product_dtype(dy, spatial, weights[0].shape[2:], stride, dilation)

    def convolve(dy: Tensor, weight: Tensor, groups: int) -> Tensor:
        size = (dy.shape[0], weight.shape[1] * groups, *spatial)
        return _vendor_dgrad(dy.to(dtype), weight, size, stride, padding, dilation, groups)

    def empty() -> Tensor:
        return torch.empty(tuple(input_size), dtype=dy.dtype, device=dy.device, memory_format=memory_format)

    if weights[0].numel() == 0 or dy.numel() == 0 or math.prod(input_size) == 0:
        return empty().zero_()
    out_group = out_channels // groups
    filter_elements = weights[0][:out_group, 0].numel()
    blocks = _channel_blocks(groups, in_group, filter_elements, _most_elements(dy))
    panel = _Mixer(weights, coefficients, dtype, max(filter_elements, _most_elements(dy)))
    if len(blocks) == 1:
        whole = panel(slice(0, out_channels), memory_format=memory_format)
        return convolve(dy, whole, groups).to(dy.dtype).contiguous(memory_format=memory_format)
    dx = empty()
    for block in blocks:
        inputs, rows = block.part_of(in_group), block.all_of(out_group)
        weight = panel(rows, block.within, memory_format=memory_format)
        for some in _images(batch, (inputs.stop - inputs.start) * math.prod(spatial), dx):
            dx[some, inputs] = convolve(dy[some, rows], weight, block.group_count)
    return dx


def _vendor_dgrad(
    dy: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
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


def mixed_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    out_channels, in_group, *_ = weights[0].shape
    out_group = out_channels // groups
    memory_format = shapes.conv_memory_format(x, weights)
    masks = (weights_mask, coefficients_mask, biases_mask)
    gradients = _Gradients(None, memory_format, weights, coefficients, biases, *masks)
    gradients.add_biases(dy, [0, *range(2, dy.dim())])
    if not gradients.needs_product:
        return gradients.result()

    dtype = _product_dtype(x, x.shape[2:], weights[0].shape[2:], stride, dilation)

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


class _Gradients:
    """Turns G, the gradient of the mixed weight, into every gradient asked for, a panel at a time."""

    def __init__(
        self,
        g: Tensor | None,
        memory_format: torch.memory_format,
        weights: Sequence[Tensor],
        coefficients: Tensor,
        biases: Sequence[Tensor] | None,
        weights_mask: Sequence[bool],
        coefficients_mask: bool,
        biases_mask: Sequence[bool],
    ):
        """``g``, where given, is the whole of G: it becomes the gradient of the first source that wants one."""
        self.compute = accumulate_dtype(weights[0].dtype)
        self.weights, self.coefficients, self.sources_biases = weights, coefficients, biases
        self.factors = factors(coefficients, weights[0].dim())
        self.needs_product = coefficients_mask or any(weights_mask)
        self.biases_mask = biases_mask
        host = list(weights_mask).index(True) if g is not None else None
        spare = [wanted and j != host for j, wanted in enumerate(weights_mask)]
        self.dweights, self.dcoefficients, self.dbiases = shapes.empty_gradients(
            lambda weight: torch.empty_like(weight, memory_format=memory_format),
            weights,
            coefficients,
            biases,
            spare,
            coefficients_mask,
            biases_mask,
        )
        # G's own buffer comes last: writing it ends the panel.
        self.wanted = [j for j, wanted in enumerate(spare) if wanted]
        if g is not None and host is not None:
            self.dweights[host] = g
            self.wanted.append(host)
        # <G, W_j> by output channel; the channels are summed at the end, in float64.
        self.dots = (
            torch.zeros(len(weights), weights[0].shape[0], dtype=self.compute, device=coefficients.device)
            if coefficients_mask
            else None
        )

    def add_biases(self, dy: Tensor, dims: list[int]) -> None:
        """Finish what the biases need: ``dy`` summed over ``dims``, all but its channels; the first is the batch."""
        if self.sources_biases is None or not (self.dots is not None or any(self.biases_mask)):
            return
        # In runs: in half precision a CPU's sum copies what it sums to float32.
        runs = [
            dy[some].sum(dims, dtype=self.compute) for some in _images(dy.shape[0], dy[:1].numel(), self.coefficients)
        ]
        total = runs[0] if len(runs) == 1 else torch.stack(runs).sum(0)
        for j, factor in enumerate(factors(self.coefficients, 1)):
            if self.biases_mask[j]:
                torch.mul(total, factor, out=self.dbiases[j])
            if self.dots is not None:
                self.dots[j].addcmul_(total, self.sources_biases[j])

    def finish(self, g: Tensor, *index: slice) -> None:
        """Finish the panel ``index`` of every gradient. ``g`` is overwritten where it is a view of the whole G."""
        g = g.to(self.compute)
        inner = tuple(range(1, g.dim()))
        if self.dots is not None:
            for dot, weight in zip(self.dots, self.weights, strict=True):
                dot[index[0]] += (g * weight[index]).sum(inner)
        for j in self.wanted:
            factor = self.factors[j]
            torch.mul(g, factor if factor.shape[0] == 1 else factor[index[0]], out=self.dweights[j][index])

    def result(self) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The outputs of the op."""
        if self.dots is not None:
            dots = self.dots if self.coefficients.dim() == 2 else self.dots.sum(1, dtype=torch.float64)
            self.dcoefficients.copy_(dots)
        return self.dweights, self.dcoefficients, self.dbiases
