"""The recipe ``W = sum_j c_j * W_j`` in plain torch: its meaning, and the dtypes that every kernel follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rl_kernels.ops.values import Outer, Recipe


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sources of ``dtype`` are mixed and their sums kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def factors(coefficients: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """A recipe's coefficients one by one, each shaped to multiply a source of ``shape``; of ``Outer``, all of it."""
    if coefficients.dim() == 3:
        return tuple(
            _outer_factor(rows, columns) for rows, columns in zip(*outer_terms(coefficients, shape), strict=True)
        )
    # Never 0-dim: a 0-dim factor would not promote a half-precision source, and the product would round too early.
    ones = (1,) * (len(shape) + 1 - coefficients.dim())
    return coefficients.reshape(*coefficients.shape, *ones).unbind(0)


def outer_terms(coefficients: Tensor, shape: Sequence[int]) -> Outer:
    """``Outer`` coefficients of sources of ``shape``, left as ``(N, R, out, 1, ...)`` and right as ``(N, R, 1, ...)``.

    Their product, summed over R, is what multiplies the sources.
    """
    n, rank, _ = coefficients.shape
    out, *rest = shape
    left, right = Outer.of(coefficients, out)
    return Outer(left.reshape(n, rank, out, *(1,) * len(rest)), right.reshape(n, rank, 1, *rest))


def _outer_factor(left: Tensor, right: Tensor) -> Tensor:
    total = left[0] * right[0]
    for rows, columns in zip(left[1:], right[1:], strict=True):
        total = total + rows * columns
    return total


def outer_gradient(g: Tensor, weights: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The gradient of ``Outer`` coefficients, joined as they are, in their dtype, which is that of ``g``.

    ``dleft[n, r, o] = sum_k G W_n right``, ``dright[n, r, k] = sum_o G W_n left``. ``g`` is G, the mixed weight's.
    """
    out, columns = g.shape[0], math.prod(g.shape[1:])
    found = []
    for left, right, weight in zip(*Outer.of(coefficients, out), weights, strict=True):
        product = (g * weight).reshape(out, columns)
        found.append(Outer(right @ product.t(), left @ product).joined())
    return torch.stack(found)


def mix(sources: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Evaluate the recipe, as a whole tensor and differentiably.

    Args:
        sources: N tensors of one shape ``(out, ...)`` and dtype.
        coefficients: as a recipe's.
        dtype: of the result; the sources' own by default.

    Returns:
        A tensor shaped as a source: the terms are summed in source order, in float32 (float64 for float64), and
        rounded once.
    """
    compute = accumulate_dtype(sources[0].dtype)
    first, *rest = factors(coefficients.to(compute), sources[0].shape)
    try:
        total = sources[0].to(compute) * first
        for source, factor in zip(sources[1:], rest, strict=True):
            total = total + source.to(compute) * factor
    except NotImplementedError as error:  # What torchao's quantised tensors, and other subclasses, say.
        got = ", ".join(dict.fromkeys(f"{type(t).__module__}.{type(t).__qualname__}" for t in sources))
        raise NotImplementedError(
            f"weights: got {got}, of which one cannot be mixed ({error}); expected plain weights: "
            "call rl_kernels.merge before a model is quantised"
        ) from error
    return total.to(dtype or sources[0].dtype)


def mixed_bias(recipe: Recipe, dtype: torch.dtype) -> Tensor | None:
    """The bias of a recipe in ``dtype``, evaluated; None where it has none."""
    return None if recipe.biases is None else mix(recipe.biases, recipe.bias_coefficients, dtype)
