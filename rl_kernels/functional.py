"""Functional forms: the layers of ``torch.nn.functional`` on a weight that is a recipe.

Where torch takes one ``weight``, these take N of one shape (``weights``) and the ``coefficients`` that mix them:
``W = sum_j c_j * W_j`` (Replacement Learning, arXiv 2410.01239, mixes the two neighbours of a layer:
``a * W[i-1] + b * W[i+1]``). The mixed weight is never stored. Common to all:

* ``weights``: a sequence of N >= 1 floating-point tensors of one shape, dtype and device.
* ``coefficients``: a tensor of shape ``(N,)``, or ``(N, out)`` for one coefficient per output channel (not of
  transposed convolutions); a sequence of N floats or one-element tensors; or ``rl_kernels.Outer(left, right)``: one
  for each element of the weight, of low rank (not of attention). Mixing happens in float32 (float64 for float64
  weights).
* ``biases``: None, or N vectors of shape ``(out,)``, mixed by the same coefficients; beside ``Outer`` they are summed.

Bad arguments raise before anything is computed: RuntimeError for shapes, dtypes and devices, as torch's layers do,
TypeError for a wrong kind of argument; the message names the argument, what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as aten
from torch import Tensor

from rl_kernels._extension import mixed_conv_call, mixed_linear_call
from rl_kernels.ops.arguments import CoefficientsLike, as_coefficients, is_sequence
from rl_kernels.ops.attention import mixed_multi_head_attention
from rl_kernels.ops.autograd import CONV, LINEAR, mixed_forward, mixed_forward_in_python
from rl_kernels.ops.checks import check_coefficients, check_sources
from rl_kernels.ops.mix import mix as _mix
from rl_kernels.ops.transposed import mixed_conv_transpose
from rl_kernels.ops.values import Geometry, Outer, Recipe

__all__ = [
    "mixed_linear",
    "mixed_conv1d",
    "mixed_conv2d",
    "mixed_conv3d",
    "mixed_conv_transpose1d",
    "mixed_conv_transpose2d",
    "mixed_conv_transpose3d",
    "mixed_multi_head_attention",
    "mix",
    "CoefficientsLike",
]


def mix(weights: Sequence[Tensor], coefficients: CoefficientsLike) -> Tensor:
    """Evaluate the recipe: ``sum_j c_j * W_j`` as a tensor, differentiably.

    For merging, for vectors such as a norm's affine parameters, and for tests: the layers' functions evaluate it a
    tile at a time instead.

    Args:
        weights: N tensors of one shape ``(out, ...)``.
        coefficients: as everywhere in this module.

    Returns:
        A tensor shaped as a source, in its dtype: summed in source order in float32 (float64 for float64), rounded
        once.
    """
    check_sources("weights", weights)
    mixing = as_coefficients(coefficients, weights)
    first = weights[0]
    if first.dim() == 0:
        raise RuntimeError("weights[0]: got a 0-dimensional tensor, expected at least one dimension")
    check_coefficients(mixing, weights)
    return _mix(weights, mixing)


def mixed_linear(
    x: Tensor, weights: Sequence[Tensor], coefficients: CoefficientsLike, biases: Sequence[Tensor] | None = None
) -> Tensor:
    """``y = x W^T + b`` with ``W = sum_j c_j * W_j`` and ``b = sum_j c_j * b_j``.

    Args:
        x: ``(*, in_features)``.
        weights: N tensors ``(out_features, in_features)``.
        coefficients: as everywhere in this module.
        biases: None, or N vectors ``(out_features,)``; beside ``Outer`` coefficients ``b = sum_j b_j``.

    Returns:
        ``(*, out_features)``.
    """
    offered = _is_read_by_cpp(coefficients)
    if offered:
        y = mixed_linear_call(x, weights, coefficients, biases)
        if y is not None:
            return y
    recipe = _recipe(x, weights, coefficients, biases)
    return mixed_forward_in_python(LINEAR, x, recipe) if offered else mixed_forward(LINEAR, x, recipe)


def _recipe(
    x: Tensor, weights: Sequence[Tensor], coefficients: CoefficientsLike, biases: Sequence[Tensor] | None
) -> Recipe:
    """The recipe in the ops' form, where C++ has not taken the call; what is no tensor is refused before it is read."""
    mixing = as_coefficients(coefficients, weights)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a tensor")
    if biases is not None and not is_sequence(biases):
        raise TypeError(f"biases: got {type(biases).__name__}, expected a sequence of tensors or None")
    return Recipe(weights, mixing, biases)


def _is_read_by_cpp(coefficients: CoefficientsLike) -> bool:
    """Whether the fast path is offered a call as it stands, and not once its arguments are in the ops' form."""
    if torch.compiler.is_compiling():
        return False
    if isinstance(coefficients, Tensor):  # The usual case, which costs nothing more.
        return True
    if isinstance(coefficients, Outer):  # C++ reads the two joined.
        return False
    return not (isinstance(coefficients, (list, tuple)) and any(isinstance(c, Tensor) for c in coefficients))


def mixed_conv1d(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv1d`` on the mixed weight.

    Args:
        x: ``(batch, in_channels, length)`` or ``(in_channels, length)``.
        weights: N tensors ``(out_channels, in_channels / groups, kernel)``.
        coefficients: as everywhere in this module.
        biases: None, or N vectors ``(out_channels,)``.
        stride: as torch's.
        padding: as torch's: an integer, one a dimension, ``"valid"``, or ``"same"`` (with stride 1).
        dilation: as torch's.
        groups: as torch's.

    Returns:
        ``(batch, out_channels, length)``, unbatched where x is.
    """
    return _mixed_conv(1, x, weights, coefficients, biases, (stride, padding, dilation, groups))


def mixed_conv2d(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` on the mixed weight: arguments as ``mixed_conv1d``, in two dimensions.

    The result is channels_last where ``x`` or ``weights[0]`` is, as torch's.
    """
    return _mixed_conv(2, x, weights, coefficients, biases, (stride, padding, dilation, groups))


def mixed_conv3d(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv3d`` on the mixed weight: arguments as ``mixed_conv1d``, in three dimensions.

    The result is channels_last_3d where ``x`` or ``weights[0]`` is, as torch's.
    """
    return _mixed_conv(3, x, weights, coefficients, biases, (stride, padding, dilation, groups))


def _one_a_dimension(name: str, value: int | Sequence[int], spatial: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * spatial
    if len(values) == 1:
        values *= spatial
    if len(values) != spatial or not all(isinstance(v, int) for v in values):
        raise RuntimeError(f"{name}: got {value!r}, expected an integer or {spatial} of them")
    return values


def _mixed_conv(
    spatial: int,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None,
    geometry: tuple[int | Sequence[int], int | Sequence[int] | str, int | Sequence[int], int],
) -> Tensor:
    stride, padding, dilation, groups = geometry
    batched = isinstance(x, Tensor) and x.dim() == spatial + 2
    offered = batched and not isinstance(padding, str) and _is_read_by_cpp(coefficients)
    if offered:
        y = mixed_conv_call(x, weights, coefficients, biases, spatial, stride, padding, dilation, groups)
        if y is not None:
            return y
    recipe = _recipe(x, weights, coefficients, biases)
    _check_dimensions(spatial, x, weights, "(out_channels, in_channels / groups, *kernel)")
    strides = _one_a_dimension("stride", stride, spatial)
    dilations = _one_a_dimension("dilation", dilation, spatial)
    # A dilated kernel of 1 is one of 1; oneDNN crashes on some of them in bfloat16 (size 1, stride 2, padding 1).
    dilations = [dil if size > 1 or dil < 1 else 1 for dil, size in zip(dilations, weights[0].shape[2:], strict=True)]
    images = x if batched else x.unsqueeze(0)
    if isinstance(padding, str):
        images, pads = _pad_by_name(padding, images, weights[0].shape[2:], strides, dilations)
    else:
        pads = _one_a_dimension("padding", padding, spatial)
    forward = mixed_forward_in_python if offered else mixed_forward
    y = forward(CONV, images, recipe, Geometry(strides, pads, dilations, groups))
    return y if batched else y.squeeze(0)


def _pad_by_name(
    padding: str, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """x and the symmetric padding that ``"valid"`` or ``"same"`` mean; x padded first where they are lopsided."""
    if padding == "valid":
        return x, [0] * len(kernel_size)
    if padding != "same":
        raise RuntimeError(f"padding: got {padding!r}, expected 'valid', 'same' or integers")
    if any(step != 1 for step in stride):
        raise RuntimeError(f"padding: got 'same' with stride {list(stride)}, expected stride 1")
    total = [dil * (kernel - 1) for dil, kernel in zip(dilation, kernel_size, strict=True)]
    if any(pad % 2 for pad in total):
        # torch puts the odd one at the end.
        x = aten.pad(x, [side for pad in reversed(total) for side in (0, pad % 2)])
    return x, [pad // 2 for pad in total]


def mixed_conv_transpose1d(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``torch.nn.functional.conv_transpose1d`` on the mixed weight.

    It is the input gradient of a convolution, and runs on its kernels.

    Args:
        x: ``(batch, in_channels, length)`` or ``(in_channels, length)``.
        weights: N tensors ``(in_channels, out_channels / groups, kernel)``.
        coefficients: as everywhere in this module, but one a source only, or ``Outer``, whose left follows the
            input channels: output channels are not the first dimension of these weights.
        biases: None, or N vectors ``(out_channels,)``.
        stride: as torch's.
        padding: as torch's.
        output_padding: as torch's: less than the stride or the dilation.
        groups: as torch's.
        dilation: as torch's.

    Returns:
        ``(batch, out_channels, length)``, unbatched where x is.
    """
    return _mixed_conv_transpose(
        1, x, weights, coefficients, biases, (stride, padding, output_padding, groups, dilation)
    )


def mixed_conv_transpose2d(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``torch.nn.functional.conv_transpose2d`` on the mixed weight: as ``mixed_conv_transpose1d``, in two dimensions.

    The result is channels_last where ``x`` or ``weights[0]`` is, as torch's.
    """
    return _mixed_conv_transpose(
        2, x, weights, coefficients, biases, (stride, padding, output_padding, groups, dilation)
    )


def mixed_conv_transpose3d(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``torch.nn.functional.conv_transpose3d`` on the mixed weight: as ``mixed_conv_transpose1d``, in three dimensions.

    The result is channels_last_3d where ``x`` or ``weights[0]`` is.
    """
    return _mixed_conv_transpose(
        3, x, weights, coefficients, biases, (stride, padding, output_padding, groups, dilation)
    )


def _mixed_conv_transpose(
    spatial: int,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: CoefficientsLike,
    biases: Sequence[Tensor] | None,
    geometry: tuple[int | Sequence[int], int | Sequence[int], int | Sequence[int], int, int | Sequence[int]],
) -> Tensor:
    stride, padding, output_padding, groups, dilation = geometry
    recipe = _recipe(x, weights, coefficients, biases)
    _check_dimensions(spatial, x, weights, "(in_channels, out_channels / groups, *kernel)")
    named = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    strides, pads, more, dilations = (_one_a_dimension(name, value, spatial) for name, value in named.items())
    batched = x.dim() == spatial + 2
    images = x if batched else x.unsqueeze(0)
    y = mixed_conv_transpose(images, recipe, more, Geometry(strides, pads, dilations, groups))
    return y if batched else y.squeeze(0)


def _check_dimensions(spatial: int, x: Tensor, weights: Sequence[Tensor], filters: str) -> None:
    if weights[0].dim() != spatial + 2:
        raise RuntimeError(
            f"weights[0]: got shape {tuple(weights[0].shape)}, expected {spatial + 2} dimensions {filters}"
        )
    if x.dim() not in (spatial + 1, spatial + 2):
        raise RuntimeError(
            f"x: got shape {tuple(x.shape)}, expected {spatial + 1} (unbatched) or {spatial + 2} dimensions"
        )


def __getattr__(name: str) -> object:
    from rl_kernels._moved import renamed

    return renamed(__name__, name, {"Coefficients": ("CoefficientsLike", CoefficientsLike)})
