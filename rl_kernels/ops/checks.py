"""Checks of arguments: one sentence an error, naming the argument, what came and what was expected.

They run before any kernel, in eager mode and in the fakes, so that eager, compile and export fail with the same words.
What only one op has to check stands beside its schema, in ``linear.py`` and ``conv.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rl_kernels.ops.mix import accumulate_dtype
from rl_kernels.ops.values import Outer, Recipe, Wanted


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as messages print it."""
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
            raise RuntimeError(f"{name}[{j}]: got shape {shape_of(source)}, expected {shape_of(first)} as {name}[0]")
        if source.dtype != first.dtype:
            raise RuntimeError(f"{name}[{j}]: got dtype {source.dtype}, expected {first.dtype} as {name}[0]")
        if source.device != first.device:
            raise RuntimeError(f"{name}[{j}]: got device {source.device}, expected {first.device} as {name}[0]")


def check_coefficients(coefficients: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise unless ``coefficients`` are those of a recipe of ``weights``, in the dtype in which these mix."""
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"coefficients: got {type(coefficients).__name__}, expected a tensor")
    _check_layout("coefficients", coefficients)
    n, out, dtype, device = len(weights), weights[0].shape[0], weights[0].dtype, weights[0].device
    if coefficients.shape != (n,) and coefficients.shape != (n, out) and not _are_joined(coefficients, weights):
        raise RuntimeError(
            f"coefficients: got shape {shape_of(coefficients)}, expected ({n},) or ({n}, {out}) for {n} sources with "
            f"{out} output channels"
        )
    if coefficients.dtype != accumulate_dtype(dtype):
        raise RuntimeError(
            f"coefficients: got dtype {coefficients.dtype}, expected {accumulate_dtype(dtype)} for {dtype} weights"
        )
    if coefficients.device != device:
        raise RuntimeError(f"coefficients: got device {coefficients.device}, expected {device} as weights[0]")


def _are_joined(coefficients: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether ``coefficients`` have the shape of joined ``Outer`` ones of ``weights``."""
    if coefficients.dim() != 3:
        return False
    n, rank, length = coefficients.shape
    out, *rest = weights[0].shape
    return bool(n == len(weights) and rank >= 1 and length == out + math.prod(rest))


def check_outer(name: str, outer: Outer, weights: Sequence[Tensor]) -> None:
    """Raise unless ``outer`` fits ``weights``, its dtype aside; ``name`` is for messages."""
    out, *rest = weights[0].shape
    n, device = len(weights), weights[0].device
    for part, value, length in (("left", outer.left, out), ("right", outer.right, math.prod(rest))):
        named = f"{name}.{part}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{named}: got {type(value).__name__}, expected a tensor")
        if not value.dtype.is_floating_point:
            raise RuntimeError(f"{named}: got dtype {value.dtype}, expected a floating-point dtype")
        _check_layout(named, value)
        if value.dim() != 3 or value.shape[0] != n or value.shape[1] < 1 or value.shape[2] != length:
            raise RuntimeError(
                f"{named}: got shape {shape_of(value)}, expected ({n}, R, {length}) with R of 1 or more for {n} "
                f"sources of shape {shape_of(weights[0])}"
            )
        if value.device != device:
            raise RuntimeError(f"{named}: got device {value.device}, expected {device} as weights[0]")
    rank = outer.left.shape[1]
    if outer.right.shape[1] != rank:
        raise RuntimeError(
            f"{name}.right: got shape {shape_of(outer.right)} of rank {outer.right.shape[1]}, expected rank {rank} as "
            f"{name}.left"
        )


def check_recipe(recipe: Recipe, dim: int, expected: str) -> None:
    """Raise unless the recipe's tensors fit one another, and its weights have ``dim`` dimensions, as ``expected``."""
    weights, coefficients, biases = recipe
    check_sources("weights", weights)
    weight = weights[0]
    if weight.dim() != dim:
        raise RuntimeError(f"weights[0]: got shape {shape_of(weight)}, expected {expected}")
    check_coefficients(coefficients, weights)
    if biases is not None:
        check_biases(biases, weights, weight.shape[0])


def check_biases(biases: Sequence[Tensor], weights: Sequence[Tensor], out: int) -> None:
    """Raise unless ``biases`` are vectors ``(out,)``, one for each of ``weights`` and like it."""
    if len(biases) != len(weights):
        raise RuntimeError(f"biases: got {len(biases)} tensors, expected {len(weights)} as there are weights")
    check_sources("biases", biases)
    bias, weight = biases[0], weights[0]
    if bias.shape != (out,):
        raise RuntimeError(f"biases[0]: got shape {shape_of(bias)}, expected ({out},)")
    if bias.dtype != weight.dtype:
        raise RuntimeError(f"biases[0]: got dtype {bias.dtype}, expected {weight.dtype} as weights[0]")
    if bias.device != weight.device:
        raise RuntimeError(f"biases[0]: got device {bias.device}, expected {weight.device} as weights[0]")


def check_activation(name: str, activation: Tensor, weight: Tensor) -> None:
    """Raise unless ``activation`` is a tensor where ``weight`` is, in its dtype, or in half of it under autocast."""
    if not isinstance(activation, Tensor):
        raise TypeError(f"{name}: got {type(activation).__name__}, expected a tensor")
    _check_layout(name, activation)
    halved = weight.dtype == torch.float32 and activation.dtype in (torch.bfloat16, torch.float16)
    if activation.dtype != weight.dtype and not halved:
        raise RuntimeError(f"{name}: got dtype {activation.dtype}, expected {weight.dtype} as weights[0]")
    if activation.device != weight.device:
        raise RuntimeError(f"{name}: got device {activation.device}, expected {weight.device} as weights[0]")


def check_wanted(recipe: Recipe, wanted: Wanted) -> None:
    """Raise unless there is an answer for every source and bias."""
    n = len(recipe.weights)
    if len(wanted.weights) != n:
        raise RuntimeError(f"weights_mask: got {len(wanted.weights)} entries, expected {n}")
    n = 0 if recipe.biases is None else len(recipe.biases)
    if len(wanted.biases) != n:
        raise RuntimeError(f"biases_mask: got {len(wanted.biases)} entries, expected {n}")


def check_dy(dy: Tensor, shape: Sequence[int], x: Tensor | None = None) -> None:
    """Raise unless ``dy`` is the gradient of an output of ``shape``; in the dtype and place of ``x``, where given."""
    if tuple(dy.shape) != tuple(shape):
        raise RuntimeError(f"dy: got shape {shape_of(dy)}, expected {tuple(shape)}, the shape of the output")
    if x is not None and (dy.dtype != x.dtype or dy.device != x.device):
        raise RuntimeError(f"dy: got {dy.dtype} on {dy.device}, expected {x.dtype} on {x.device}")
