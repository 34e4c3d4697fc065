"""The meaning of every op, in plain torch.

It evaluates the recipe as a whole tensor: for tests, and where nothing else serves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels import _ops
from rl_kernels._recipe import accumulate_dtype, factors, mix


def mixed_linear(x: Tensor, weights: Sequence[Tensor], coefficients: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
    bias = None if biases is None else mix(biases, coefficients, x.dtype)
    weight = mix(weights, coefficients, x.dtype)
    if bias is not None and (x.dim() == 2 or (x.dim() == 3 and x.is_contiguous())):
        return aten.linear(x, weight, bias)
    # As aten.linear goes on, which chooses the product for a strided x by whether the weight requires a gradient, and
    # rounds accordingly.
    y = x @ weight.detach().t().requires_grad_(weights[0].requires_grad)
    return (y if bias is None else y + bias).contiguous()


def mixed_linear_dgrad(dy: Tensor, weights: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    dx = _ops.as_rows(dy) @ mix(weights, coefficients, dy.dtype)
    return dx.reshape(*dy.shape[:-1], weights[0].shape[1])


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
    dy, x = _ops.as_rows(dy), _ops.as_rows(x)
    compute = accumulate_dtype(weights[0].dtype)
    g = dy.t().to(compute) @ x.to(compute)
    masks = (weights_mask, coefficients_mask, biases_mask)
    return _gradients(g, dy.sum(0, dtype=compute), weights, coefficients, biases, *masks)


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
    bias = None if biases is None else mix(biases, coefficients, x.dtype)
    weight = mix(weights, coefficients, x.dtype)
    if x.numel() == 0 or weight.numel() == 0:  # torch's own convolution gives wrong shapes, or refuses.
        spatial = _ops.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        y = x.new_zeros(x.shape[0], weight.shape[0], *spatial)
        y = y if bias is None else y + bias.view(-1, *(1,) * len(spatial))
    else:
        y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    return y.contiguous(memory_format=_ops.conv_memory_format(x, weights))


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
    weight = mix(weights, coefficients, dy.dtype)
    x = dy.new_empty(tuple(input_size))
    if dy.numel() == 0 or x.numel() == 0 or weight.numel() == 0:
        return x.zero_().contiguous(memory_format=_ops.conv_memory_format(dy, weights))
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [True, False, False]
    )
    return dx.contiguous(memory_format=_ops.conv_memory_format(dy, weights))


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
    compute = accumulate_dtype(weights[0].dtype)
    if dy.numel() == 0 or x.numel() == 0 or weights[0].numel() == 0:
        g = torch.zeros_like(weights[0], dtype=compute)
    else:
        _, g, _ = torch.ops.aten.convolution_backward(
            dy.to(compute),
            x.to(compute),
            weights[0].to(compute),
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [False, True, False],
        )
    total = dy.sum([0, *range(2, dy.dim())], dtype=compute)
    masks = (weights_mask, coefficients_mask, biases_mask)
    g = g.contiguous(memory_format=_ops.conv_memory_format(x, weights))
    return _gradients(g, total, weights, coefficients, biases, *masks)


def _gradients(
    g: Tensor,
    total: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """All gradients, from that of the mixed weight and that of the mixed bias (``total``)."""
    dweights = [
        (factor * g).to(weight.dtype) if wanted else weight.new_empty(0)
        for factor, weight, wanted in zip(factors(coefficients, g.dim()), weights, weights_mask, strict=True)
    ]
    dbiases = [
        (coefficients[j] * total).to(bias.dtype) if wanted else bias.new_empty(0)
        for j, (bias, wanted) in enumerate(zip(biases or (), biases_mask, strict=True))
    ]
    if not coefficients_mask:
        return dweights, coefficients.new_empty(0), dbiases
    rows = torch.stack([(g * weight).sum(tuple(range(1, g.dim())), dtype=torch.float64) for weight in weights])
    if biases is not None:
        rows = rows + torch.stack([total.double() * bias.double() for bias in biases])
    dcoefficients = rows if coefficients.dim() == 2 else rows.sum(1)
    return dweights, dcoefficients.to(coefficients.dtype), dbiases
