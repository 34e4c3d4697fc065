"""The meaning of every op, in plain torch.

It evaluates the recipe as a whole tensor: for tests, and where nothing else serves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels.backends.case import Case
from rl_kernels.backends.contract import Backend, kernels_in
from rl_kernels.ops.mix import accumulate_dtype, factors, mix, mixed_bias, outer_gradient
from rl_kernels.ops.shapes import as_rows, conv_memory_format, conv_output_size
from rl_kernels.ops.values import Geometry, Gradients, Recipe, Wanted


def mixed_linear(x: Tensor, recipe: Recipe) -> Tensor:
    bias, weight = mixed_bias(recipe, x.dtype), mix(recipe.weights, recipe.coefficients, x.dtype)
    if bias is not None and (x.dim() == 2 or (x.dim() == 3 and x.is_contiguous())):
        return aten.linear(x, weight, bias)
    # As aten.linear goes on, which chooses the product for a strided x by whether the weight requires a gradient, and
    # rounds accordingly.
    y = x @ weight.detach().t().requires_grad_(recipe.weights[0].requires_grad)
    return (y if bias is None else y + bias).contiguous()


def mixed_linear_dgrad(dy: Tensor, recipe: Recipe) -> Tensor:
    dx = as_rows(dy) @ mix(recipe.weights, recipe.coefficients, dy.dtype)
    return dx.reshape(*dy.shape[:-1], recipe.weights[0].shape[1])


def mixed_linear_wgrad(dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted) -> Gradients:
    dy, x = as_rows(dy), as_rows(x)
    compute = accumulate_dtype(recipe.weights[0].dtype)
    g = dy.t().to(compute) @ x.to(compute)
    return _finish(g, dy.sum(0, dtype=compute), recipe, wanted)


def mixed_conv(x: Tensor, recipe: Recipe, geometry: Geometry) -> Tensor:
    bias, weight = mixed_bias(recipe, x.dtype), mix(recipe.weights, recipe.coefficients, x.dtype)
    stride, padding, dilation, groups = geometry
    if x.numel() == 0 or weight.numel() == 0:  # torch's own convolution gives wrong shapes, or refuses.
        spatial = conv_output_size(x.shape[2:], weight.shape[2:], geometry)
        y = x.new_zeros(x.shape[0], weight.shape[0], *spatial)
        y = y if bias is None else y + bias.view(-1, *(1,) * len(spatial))
    else:
        y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    return y.contiguous(memory_format=conv_memory_format(x, recipe.weights))


def mixed_conv_dgrad(dy: Tensor, recipe: Recipe, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    weight = mix(recipe.weights, recipe.coefficients, dy.dtype)
    stride, padding, dilation, groups = geometry
    x = dy.new_empty(tuple(input_size))
    if dy.numel() == 0 or x.numel() == 0 or weight.numel() == 0:
        return x.zero_().contiguous(memory_format=conv_memory_format(dy, recipe.weights))
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [True, False, False]
    )
    return dx.contiguous(memory_format=conv_memory_format(dy, recipe.weights))


def mixed_conv_wgrad(dy: Tensor, x: Tensor, recipe: Recipe, wanted: Wanted, geometry: Geometry) -> Gradients:
    weight = recipe.weights[0]
    stride, padding, dilation, groups = geometry
    compute = accumulate_dtype(weight.dtype)
    if dy.numel() == 0 or x.numel() == 0 or weight.numel() == 0:
        g = torch.zeros_like(weight, dtype=compute)
    else:
        rest = (None, stride, padding, dilation, False, [0] * len(stride), groups, [False, True, False])
        operands = (tensor.to(compute) for tensor in (dy, x, weight))
        _, g, _ = torch.ops.aten.convolution_backward(*operands, *rest)
    total = dy.sum([0, *range(2, dy.dim())], dtype=compute)
    return _finish(g.contiguous(memory_format=conv_memory_format(x, recipe.weights)), total, recipe, wanted)


def _finish(g: Tensor, total: Tensor, recipe: Recipe, wanted: Wanted) -> Gradients:
    """All gradients, from that of the mixed weight and that of the mixed bias (``total``)."""
    weights, coefficients, biases = recipe
    dweights = [
        (factor * g).to(weight.dtype) if want else weight.new_empty(0)
        for factor, weight, want in zip(factors(coefficients, g.shape), weights, wanted.weights, strict=True)
    ]
    dbiases = [
        (recipe.bias_coefficients[j] * total).to(bias.dtype) if want else bias.new_empty(0)
        for j, (bias, want) in enumerate(zip(biases or (), wanted.biases, strict=True))
    ]
    if not wanted.coefficients:
        return Gradients(dweights, coefficients.new_empty(0), dbiases)
    if recipe.is_outer:
        exact = outer_gradient(g.double(), weights, coefficients.double())
        return Gradients(dweights, exact.to(coefficients.dtype), dbiases)
    # A dimension more, so that there is one to sum where the sources are vectors.
    within = tuple(range(1, g.dim() + 1))
    rows = torch.stack([(g * weight).unsqueeze(-1).sum(within, dtype=torch.float64) for weight in weights])
    if biases is not None:
        rows = rows + torch.stack([total.double() * bias.double() for bias in biases])
    dcoefficients = rows if recipe.per_channel else rows.sum(1)
    return Gradients(dweights, dcoefficients.to(coefficients.dtype), dbiases)


class Reference(Backend):
    """Plain torch."""

    name = "reference"
    summary = "plain torch on a materialised weight: the meaning"
    kernels = kernels_in(linear=__name__, conv=__name__)

    def why_not(self, case: Case) -> str | None:
        """None: it runs anything."""
        return None


BACKEND = Reference()
