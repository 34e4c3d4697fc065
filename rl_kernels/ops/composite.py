"""The ops in plain aten, which torch can differentiate, batch and shard: they materialise the mixed weight.

The forwards take what the ops take. The gradients are products alone, of a weight that is mixed already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels.ops import shapes
from rl_kernels.ops.mix import mix


def linear(x: Tensor, weights: Sequence[Tensor], coefficients: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
    bias = None if biases is None else mix(biases, coefficients, x.dtype)
    return aten.linear(x, mix(weights, coefficients, x.dtype), bias)


def linear_dgrad(dy: Tensor, weight: Tensor, input_size: Sequence[int]) -> Tensor:
    return dy @ weight


def linear_wgrad(dy: Tensor, x: Tensor, like: Tensor) -> Tensor:
    return shapes.as_rows(dy).t() @ shapes.as_rows(x)


def conv(
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
    convolution = (aten.conv1d, aten.conv2d, aten.conv3d)[len(stride) - 1]
    return convolution(x, mix(weights, coefficients, x.dtype), bias, stride, padding, dilation, groups)


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    x, rest = dy.new_empty(tuple(input_size)), (False, [0] * len(stride), groups, [True, False, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, None, stride, padding, dilation, *rest)[0]


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    like: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    rest = (False, [0] * len(stride), groups, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, like, None, stride, padding, dilation, *rest)[1]
