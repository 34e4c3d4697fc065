"""Every op of the package: schema, shape checks, fake kernel, FLOP formula. The one list of what exists.

An op has one meaning (``backends/reference.py``) and as many implementations as there are backends. Three ops serve a
kind of layer: the forward, the gradient of its input (``dgrad``) and those of its parameters (``wgrad``). The set is
closed under differentiation (``_autograd.py``). Names used throughout:

* ``weights``: N >= 1 source tensors of one shape, ``(out, in)`` or ``(out, in / groups, *kernel)``.
* ``coefficients``: ``(N,)``, or ``(N, out)`` for one coefficient per output channel; float32, or float64 where the
  weights are float64.
* ``biases``: N vectors of shape ``(out,)``, mixed by the same coefficients, or None.
* ``x``: in the weights' dtype; or half precision with float32 weights, as autocast leaves them: then the mixed weight
  is rounded once, to the dtype of ``x``.

``wgrad`` returns ``(dweights, dcoefficients, dbiases)``. What its masks do not ask for comes back as an empty tensor
in its place, and is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from rl_kernels._recipe import accumulate_dtype

LIBRARY = torch.library.Library("rl_kernels", "DEF")

_SOURCES = "Tensor[] weights, Tensor coefficients"
_MASKS = "bool[] weights_mask, bool coefficients_mask, bool[] biases_mask"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_GRADIENTS = "(Tensor[] dweights, Tensor dcoefficients, Tensor[] dbiases)"

SCHEMAS = {
    "mixed_linear": f"(Tensor x, {_SOURCES}, Tensor[]? biases) -> Tensor",
    "mixed_linear_dgrad": f"(Tensor dy, {_SOURCES}) -> Tensor",
    "mixed_linear_wgrad": f"(Tensor dy, Tensor x, {_SOURCES}, Tensor[]? biases, {_MASKS}) -> {_GRADIENTS}",
    "mixed_conv": f"(Tensor x, {_SOURCES}, Tensor[]? biases, {_GEOMETRY}) -> Tensor",
    "mixed_conv_dgrad": f"(Tensor dy, {_SOURCES}, SymInt[] input_size, {_GEOMETRY}) -> Tensor",
    "mixed_conv_wgrad": f"(Tensor dy, Tensor x, {_SOURCES}, Tensor[]? biases, {_MASKS}, {_GEOMETRY}) -> {_GRADIENTS}",
}

# As their namesakes, but that they add the gradient of source j to into[j] and return none, unless into[j] is empty.
# They are eager only (``_accumulation.py``).
IN_PLACE_SCHEMAS = {
    f"{_name}_": SCHEMAS[_name].replace(") ->", ", Tensor(a!)[] into) ->")
    for _name in ("mixed_linear_wgrad", "mixed_conv_wgrad")
}

for _name, _schema in (SCHEMAS | IN_PLACE_SCHEMAS).items():
    LIBRARY.define(_name + _schema)


# Checks: one sentence an error, naming the argument, what came and what was expected. They run before any kernel, in
# eager mode and in the fakes, so that eager, compile and export fail with the same words.


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout not in (torch.strided, torch.jagged):
        raise RuntimeError(f"{name}: got layout {tensor.layout}, expected {torch.strided}: a dense tensor")


def check_sources(name: str, sources: Sequence[Tensor]) -> None:
    """Raise unless ``sources`` are one or more floating-point tensors of one shape, dtype and device."""
    if len(sources) == 0:
        raise RuntimeError(f"{name}: got no tensor, expected one or more")
    first = sources[0]
    for j, source in enumerate(sources):
        if not isinstance(source, Tensor):
            raise TypeError(f"{name}[{j}]: got {type(source).__name__}, expected a tensor")
        if not source.dtype.is_floating_point:
            raise RuntimeError(f"{name}[{j}]: got dtype {source.dtype}, expected a floating-point dtype")
        _check_layout(f"{name}[{j}]", source)
        if source.shape != first.shape:
            raise RuntimeError(f"{name}[{j}]: got shape {_shape(source)}, expected {_shape(first)} as {name}[0]")
        if source.dtype != first.dtype:
            raise RuntimeError(f"{name}[{j}]: got dtype {source.dtype}, expected {first.dtype} as {name}[0]")
        if source.device != first.device:
            raise RuntimeError(f"{name}[{j}]: got device {source.device}, expected {first.device} as {name}[0]")


def check_coefficients(coefficients: Tensor, n: int, out: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless ``coefficients`` are ``(n,)`` or ``(n, out)`` in the dtype in which sources of ``dtype`` mix."""
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"coefficients: got {type(coefficients).__name__}, expected a tensor")
    _check_layout("coefficients", coefficients)
    if coefficients.shape != (n,) and coefficients.shape != (n, out):
        raise RuntimeError(
            f"coefficients: got shape {_shape(coefficients)}, expected ({n},) or ({n}, {out}) for {n} sources with "
            f"{out} output channels"
        )
    if coefficients.dtype != accumulate_dtype(dtype):
        raise RuntimeError(
            f"coefficients: got dtype {coefficients.dtype}, expected {accumulate_dtype(dtype)} for {dtype} weights"
        )
    if coefficients.device != device:
        raise RuntimeError(f"coefficients: got device {coefficients.device}, expected {device} as weights[0]")


def _check_recipe(weights: Sequence[Tensor], coefficients: Tensor, biases: Sequence[Tensor] | None, dim: int) -> None:
    check_sources("weights", weights)
    weight = weights[0]
    if weight.dim() != dim:
        expected = "(out_features, in_features)" if dim == 2 else f"{dim} dimensions (out, in / groups, *kernel)"
        raise RuntimeError(f"weights[0]: got shape {_shape(weight)}, expected {expected}")
    check_coefficients(coefficients, len(weights), weight.shape[0], weight.device, weight.dtype)
    if biases is None:
        return
    if len(biases) != len(weights):
        raise RuntimeError(f"biases: got {len(biases)} tensors, expected {len(weights)} as there are weights")
    check_sources("biases", biases)
    if biases[0].shape != (weight.shape[0],):
        raise RuntimeError(f"biases[0]: got shape {_shape(biases[0])}, expected ({weight.shape[0]},)")
    if biases[0].dtype != weight.dtype:
        raise RuntimeError(f"biases[0]: got dtype {biases[0].dtype}, expected {weight.dtype} as weights[0]")
    if biases[0].device != weight.device:
        raise RuntimeError(f"biases[0]: got device {biases[0].device}, expected {weight.device} as weights[0]")


def _check_input(name: str, x: Tensor, weight: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
    _check_layout(name, x)
    halved = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    if x.dtype != weight.dtype and not halved:
        raise RuntimeError(f"{name}: got dtype {x.dtype}, expected {weight.dtype} as weights[0]")
    if x.device != weight.device:
        raise RuntimeError(f"{name}: got device {x.device}, expected {weight.device} as weights[0]")


def _check_masks(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    biases_mask: Sequence[bool],
) -> None:
    if len(weights_mask) != len(weights):
        raise RuntimeError(f"weights_mask: got {len(weights_mask)} entries, expected {len(weights)}")
    n = 0 if biases is None else len(biases)
    if len(biases_mask) != n:
        raise RuntimeError(f"biases_mask: got {len(biases_mask)} entries, expected {n}")


def check_mixed_linear(
    x: Tensor, weights: Sequence[Tensor], coefficients: Tensor, biases: Sequence[Tensor] | None
) -> None:
    """Raise unless the arguments fit: x ``(*, in)``, weights ``(out, in)``, biases ``(out,)``."""
    _check_recipe(weights, coefficients, biases, dim=2)
    _check_input("x", x, weights[0])
    in_features = weights[0].shape[1]
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(f"x: got shape {_shape(x)}, expected (*, {in_features}) for weights of {_shape(weights[0])}")


def check_mixed_linear_dgrad(dy: Tensor, weights: Sequence[Tensor], coefficients: Tensor) -> None:
    """Raise unless the arguments fit: dy ``(*, out)``, weights ``(out, in)``."""
    _check_recipe(weights, coefficients, None, dim=2)
    _check_input("dy", dy, weights[0])
    out_features = weights[0].shape[0]
    if dy.dim() == 0 or dy.shape[-1] != out_features:
        raise RuntimeError(
            f"dy: got shape {_shape(dy)}, expected (*, {out_features}) for weights of {_shape(weights[0])}"
        )


def check_mixed_linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
) -> None:
    """Raise unless the arguments fit: dy ``(*, out)``, x ``(*, in)`` with the same leading dimensions."""
    check_mixed_linear(x, weights, coefficients, biases)
    _check_dy(dy, (*x.shape[:-1], weights[0].shape[0]), x)
    _check_masks(weights, biases, weights_mask, biases_mask)


def _check_dy(dy: Tensor, shape: Sequence[int], x: Tensor | None = None) -> None:
    """Raise unless ``dy`` is the gradient of an output of ``shape``; in the dtype and place of ``x``, where given."""
    if tuple(dy.shape) != tuple(shape):
        raise RuntimeError(f"dy: got shape {_shape(dy)}, expected {tuple(shape)}, the shape of the output")
    if x is not None and (dy.dtype != x.dtype or dy.device != x.device):
        raise RuntimeError(f"dy: got {dy.dtype} on {dy.device}, expected {x.dtype} on {x.device}")


def conv_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The spatial size of a convolution's output, one entry a spatial dimension."""
    return [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(input_size, kernel_size, stride, padding, dilation, strict=True)
    ]


def _check_geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    spatial = len(stride)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != spatial or any(value < least for value in values):
            raise RuntimeError(f"{name}: got {list(values)}, expected {spatial} integers of {least} or more")
    if any(size < 1 for size in weight.shape[2:]):
        raise RuntimeError(f"weights[0]: got shape {_shape(weight)}, expected a kernel of 1 or more in each dimension")
    if groups < 1:
        raise RuntimeError(f"groups: got {groups}, expected 1 or more")
    if weight.shape[0] % groups != 0:
        raise RuntimeError(f"groups: got {groups}, expected a divisor of the {weight.shape[0]} output channels")


def _check_conv_input(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    spatial = len(stride)
    if x.dim() != spatial + 2:
        raise RuntimeError(f"x: got shape {_shape(x)}, expected {spatial + 2} dimensions (batch, in, *spatial)")
    channels = weight.shape[1] * groups
    if x.shape[1] != channels:
        raise RuntimeError(
            f"x: got {x.shape[1]} channels (shape {_shape(x)}), expected {channels} for weights of {_shape(weight)} "
            f"with groups={groups}"
        )
    for size, kernel, pad, dil in zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True):
        if size + 2 * pad < dil * (kernel - 1) + 1:
            raise RuntimeError(
                f"x: got spatial size {_shape(x)[2:]}, expected at least the kernel's extent: kernel size "
                f"{_shape(weight)[2:]} with dilation {list(dilation)} and padding {list(padding)}"
            )


def check_mixed_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise unless the arguments fit: x ``(batch, in, *spatial)``, weights ``(out, in / groups, *kernel)``."""
    _check_recipe(weights, coefficients, biases, dim=len(stride) + 2)
    _check_input("x", x, weights[0])
    _check_geometry(weights[0], stride, padding, dilation, groups)
    _check_conv_input(x, weights[0], stride, padding, dilation, groups)


def check_mixed_conv_dgrad(
    dy: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Raise unless the arguments fit: dy is the gradient of the convolution of an input of shape ``input_size``."""
    _check_recipe(weights, coefficients, None, dim=len(stride) + 2)
    _check_input("dy", dy, weights[0])
    weight = weights[0]
    _check_geometry(weight, stride, padding, dilation, groups)
    if len(input_size) != weight.dim() or input_size[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"input_size: got {list(input_size)}, expected (batch, {weight.shape[1] * groups}, "
            f"{len(stride)} spatial sizes)"
        )
    spatial = conv_output_size(input_size[2:], weight.shape[2:], stride, padding, dilation)
    _check_dy(dy, (input_size[0], weight.shape[0], *spatial))


def check_mixed_conv_wgrad(
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
) -> None:
    """Raise unless the arguments fit: dy is the gradient of the convolution of x."""
    check_mixed_conv(x, weights, coefficients, biases, stride, padding, dilation, groups)
    weight = weights[0]
    spatial = conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    _check_dy(dy, (x.shape[0], weight.shape[0], *spatial), x)
    _check_masks(weights, biases, weights_mask, biases_mask)


CHECKS: dict[str, Callable[..., None]] = {
    "mixed_linear": check_mixed_linear,
    "mixed_linear_dgrad": check_mixed_linear_dgrad,
    "mixed_linear_wgrad": check_mixed_linear_wgrad,
    "mixed_conv": check_mixed_conv,
    "mixed_conv_dgrad": check_mixed_conv_dgrad,
    "mixed_conv_wgrad": check_mixed_conv_wgrad,
}


# Memory formats: torch's rule. A result is channels_last if the activation is, or if the first source is.


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch would call ``tensor`` channels_last (or channels_last_3d) by its strides."""
    if tensor.dim() not in (4, 5):
        return False
    stride = tensor.stride()
    if stride[1] != 1:
        return False
    # torch decides sizes of 1 by walking the strides from channels outwards (c10 is_channels_last_strides_*).
    least: Any = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if tensor.shape[dim] == 0 or stride[dim] < least or (dim == 0 and least == stride[1]):
            return False
        least = stride[dim] * max(tensor.shape[dim], 1)
    return True


def conv_memory_format(activation: Tensor, weights: Sequence[Tensor]) -> torch.memory_format:
    """The memory format of a convolution's results, given ``x`` (or ``dy``) and the sources."""
    if is_channels_last(activation) or is_channels_last(weights[0]):
        return torch.channels_last if activation.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


# Shapes that implementations share.


def as_rows(tensor: Tensor) -> Tensor:
    """``(*, features)`` as ``(rows, features)``; also where there are no elements, and -1 would be ambiguous."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def empty_gradients(
    like: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    weights_mask: Sequence[bool],
    coefficients_mask: bool,
    biases_mask: Sequence[bool],
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The outputs of a ``wgrad``, uninitialised: ``like(weight)`` for a weight, ``(0,)`` for what is not asked for."""
    return (
        [like(weight) if wanted else weight.new_empty(0) for weight, wanted in zip(weights, weights_mask, strict=True)],
        torch.empty_like(coefficients, memory_format=torch.contiguous_format)
        if coefficients_mask
        else coefficients.new_empty(0),
        [bias.new_empty(bias.shape if wanted else 0) for bias, wanted in zip(biases or (), biases_mask, strict=True)],
    )


# Fakes.


def _fake_linear(x: Tensor, weights: list[Tensor], coefficients: Tensor, biases: list[Tensor] | None) -> Tensor:
    check_mixed_linear(x, weights, coefficients, biases)
    return x.new_empty(*x.shape[:-1], weights[0].shape[0])


def _fake_linear_dgrad(dy: Tensor, weights: list[Tensor], coefficients: Tensor) -> Tensor:
    check_mixed_linear_dgrad(dy, weights, coefficients)
    return dy.new_empty(*dy.shape[:-1], weights[0].shape[1])


def _fake_linear_wgrad(
    dy: Tensor, x: Tensor, weights: list[Tensor], coefficients: Tensor, biases: list[Tensor] | None, *masks: Any
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    check_mixed_linear_wgrad(dy, x, weights, coefficients, biases, *masks)
    return empty_gradients(lambda weight: weight.new_empty(weight.shape), weights, coefficients, biases, *masks)


def _fake_conv(
    x: Tensor, weights: list[Tensor], coefficients: Tensor, biases: list[Tensor] | None, *geometry: Any
) -> Tensor:
    check_mixed_conv(x, weights, coefficients, biases, *geometry)
    weight = weights[0]
    spatial = conv_output_size(x.shape[2:], weight.shape[2:], *geometry[:3])
    return torch.empty(
        (x.shape[0], weight.shape[0], *spatial),
        dtype=x.dtype,
        device=x.device,
        memory_format=conv_memory_format(x, weights),
    )


def _fake_conv_dgrad(
    dy: Tensor, weights: list[Tensor], coefficients: Tensor, input_size: list[int], *geometry: Any
) -> Tensor:
    check_mixed_conv_dgrad(dy, weights, coefficients, input_size, *geometry)
    return torch.empty(
        list(input_size), dtype=dy.dtype, device=dy.device, memory_format=conv_memory_format(dy, weights)
    )


def _fake_conv_wgrad(
    dy: Tensor, x: Tensor, weights: list[Tensor], coefficients: Tensor, biases: list[Tensor] | None, *rest: Any
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    check_mixed_conv_wgrad(dy, x, weights, coefficients, biases, *rest)
    memory_format = conv_memory_format(x, weights)
    return empty_gradients(
        lambda weight: torch.empty_like(weight, memory_format=memory_format), weights, coefficients, biases, *rest[:3]
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "mixed_linear": _fake_linear,
    "mixed_linear_dgrad": _fake_linear_dgrad,
    "mixed_linear_wgrad": _fake_linear_wgrad,
    "mixed_conv": _fake_conv,
    "mixed_conv_dgrad": _fake_conv_dgrad,
    "mixed_conv_wgrad": _fake_conv_wgrad,
}

for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"rl_kernels::{_name}", _fake, lib=LIBRARY)

mixed_linear = torch.ops.rl_kernels.mixed_linear.default
mixed_linear_dgrad = torch.ops.rl_kernels.mixed_linear_dgrad.default
mixed_linear_wgrad = torch.ops.rl_kernels.mixed_linear_wgrad.default
mixed_linear_wgrad_ = torch.ops.rl_kernels.mixed_linear_wgrad_.default
mixed_conv = torch.ops.rl_kernels.mixed_conv.default
mixed_conv_dgrad = torch.ops.rl_kernels.mixed_conv_dgrad.default
mixed_conv_wgrad = torch.ops.rl_kernels.mixed_conv_wgrad.default
mixed_conv_wgrad_ = torch.ops.rl_kernels.mixed_conv_wgrad_.default


# FLOPs: those of the plain layer (the mix is not counted, as torch counts no pointwise work). Formulas get shapes.


def _linear_flops(activation: Sequence[int], weight: Sequence[int]) -> int:
    return 2 * math.prod(activation[:-1]) * weight[0] * weight[1]


def _needs_product(weights_mask: Sequence[bool], coefficients_mask: bool) -> bool:
    return coefficients_mask or any(weights_mask)


@register_flop_formula(torch.ops.rl_kernels.mixed_linear)
def _flops_linear(x: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return _linear_flops(x, weights[0])


@register_flop_formula(torch.ops.rl_kernels.mixed_linear_dgrad)
def _flops_linear_dgrad(dy: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return _linear_flops(dy, weights[0])


@register_flop_formula(torch.ops.rl_kernels.mixed_linear_wgrad)
def _flops_linear_wgrad(
    dy: Any, x: Any, weights: Any, c: Any, b: Any, weights_mask: Any, coefficients_mask: bool, *args: Any, **kwargs: Any
) -> int:
    return _linear_flops(dy, weights[0]) if _needs_product(weights_mask, coefficients_mask) else 0


@register_flop_formula(torch.ops.rl_kernels.mixed_conv)
def _flops_conv(x: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return conv_flop_count(x, weights[0], out_shape, transposed=False)


@register_flop_formula(torch.ops.rl_kernels.mixed_conv_dgrad)
def _flops_conv_dgrad(dy: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    # A multiplication for each pair that the forward multiplies, once more.
    return conv_flop_count(dy, weights[0], dy, transposed=False)


@register_flop_formula(torch.ops.rl_kernels.mixed_conv_wgrad)
def _flops_conv_wgrad(
    dy: Any, x: Any, weights: Any, c: Any, b: Any, weights_mask: Any, coefficients_mask: bool, *args: Any, **kwargs: Any
) -> int:
    if not _needs_product(weights_mask, coefficients_mask):
        return 0
    return conv_flop_count(x, weights[0], dy, transposed=False)
