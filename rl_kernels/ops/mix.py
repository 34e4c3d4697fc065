"""The recipe ``W = sum_j c_j * W_j`` in plain torch: its meaning, and the dtypes that every kernel follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_kernels.ops.values import Recipe


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sources of ``dtype`` are mixed and their sums kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def factors(coefficients: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The coefficients, ``(N,)`` or ``(N, out)``, one by one, each shaped to multiply a ``dim``-dimensional source."""
    # Never 0-dim: a 0-dim factor would not promote a half-precision source, and the product would round too early.
    ones = (1,) * (dim + 1 - coefficients.dim())
    return coefficients.reshape(*coefficients.shape, *ones).unbind(0)


def mix(sources: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Evaluate the recipe, as a whole tensor and differentiably.

    Args:
        sources: N tensors of one shape ``(out, ...)`` and dtype.
        coefficients: ``(N,)`` or ``(N, out)``.
        dtype: of the result; the sources' own by default.

    Returns:
        A tensor shaped as a source: the terms are summed in source order, in float32 (float64 for float64), and
        rounded once.
    """
    compute = accumulate_dtype(sources[0].dtype)
    first, *rest = factors(coefficients.to(compute), sources[0].dim())
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
    return None if recipe.biases is None else mix(recipe.biases, recipe.coefficients, dtype)
