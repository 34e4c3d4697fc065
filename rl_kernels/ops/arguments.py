"""Arguments that every functional form takes, in the one form that the ops take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_kernels.ops.checks import check_outer, check_sources, shape_of
from rl_kernels.ops.mix import accumulate_dtype
from rl_kernels.ops.sharding import as_distributed_as
from rl_kernels.ops.values import Outer

CoefficientsLike = Tensor | Sequence[float | Tensor] | Outer
"""Coefficients as users pass them: a tensor, a sequence of floats or one-element tensors, or ``rl_kernels.Outer``."""


def as_coefficients(
    coefficients: CoefficientsLike, sources: Sequence[Tensor], sources_name: str = "weights", name: str = "coefficients"
) -> Tensor:
    """``coefficients`` as a recipe's, in the dtype in which ``sources`` mix. The names are for messages."""
    if not is_sequence(sources):
        raise TypeError(f"{sources_name}: got {type(sources).__name__}, expected a sequence of tensors")
    # Tensors in the right form are the ops' to check; what is read here must be there.
    if not (len(sources) > 0 and isinstance(sources[0], Tensor) and isinstance(coefficients, Tensor)):
        check_sources(sources_name, sources)
    if isinstance(coefficients, Outer):
        check_outer(name, coefficients, sources)
        dtype = accumulate_dtype(sources[0].dtype)
        return Outer(*(as_distributed_as(sources[0], part.to(dtype)) for part in coefficients)).joined()
    return as_distributed_as(sources[0], _joined(coefficients, sources, sources_name, name))


def _joined(coefficients: CoefficientsLike, sources: Sequence[Tensor], sources_name: str, name: str) -> Tensor:
    dtype = accumulate_dtype(sources[0].dtype)
    if isinstance(coefficients, Tensor):
        if not coefficients.dtype.is_floating_point:
            raise RuntimeError(f"{name}: got dtype {coefficients.dtype}, expected a floating-point dtype")
        if coefficients.dim() > 2:  # The ops would take it for joined ones.
            raise RuntimeError(
                f"{name}: got shape {shape_of(coefficients)}, expected one or two dimensions, (N,) or (N, out), or "
                "rl_kernels.Outer"
            )
        return coefficients if coefficients.dtype == dtype else coefficients.to(dtype)
    if not isinstance(coefficients, Sequence) or isinstance(coefficients, str):
        raise TypeError(
            f"{name}: got {type(coefficients).__name__}, expected a tensor or a sequence of floats or "
            "one-element tensors"
        )
    if len(coefficients) != len(sources):
        raise RuntimeError(f"{name}: got {len(coefficients)}, expected {len(sources)} as there are {sources_name}")
    device = sources[0].device
    if not any(isinstance(c, Tensor) for c in coefficients):
        return torch.tensor([_number(c, j, name) for j, c in enumerate(coefficients)], dtype=dtype, device=device)
    parts = []
    for j, c in enumerate(coefficients):
        part = c if isinstance(c, Tensor) else torch.tensor(_number(c, j, name), dtype=dtype, device=device)
        if part.numel() != 1:
            raise RuntimeError(f"{name}[{j}]: got shape {tuple(part.shape)}, expected one element")
        if part.device != device:
            raise RuntimeError(f"{name}[{j}]: got device {part.device}, expected {device} as {sources_name}[0]")
        parts.append(part.reshape(1).to(dtype))
    return torch.cat(parts)


def is_sequence(value: Any) -> bool:
    """Whether ``value`` can be indexed: a list, a tuple, an ``nn.ParameterList``; but no tensor or text."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, Tensor | str | dict)


def _number(value: Any, j: int, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}[{j}]: got {value!r}, expected a float or a one-element tensor") from None
