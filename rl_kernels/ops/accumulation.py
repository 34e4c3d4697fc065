"""Gradients of the sources, added to where they belong by the kernels themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_kernels._extension import without_fast_path

_enabled = False


@contextlib.contextmanager
def accumulate_into_grad() -> Iterator[None]:
    """Inside, a backward pass adds the sources' gradients straight to their buffers, and returns none to autograd.

    A source's buffer is its ``main_grad``, if it has this attribute (a float32 tensor beside half-precision weights, as
    Megatron-LM keeps), else its ``.grad`` if there is one: in the first of several micro-batches ``.grad`` is made as
    ever. A backend whose kernels can add does so in the epilogue of its product, and no gradient is a tensor on the
    way; others add what they return.

    What hangs on a gradient's way through autograd does not see these: hooks of the parameter, and so
    DistributedDataParallel and FSDP. Coefficients and biases take the usual way, as does everything under
    ``create_graph``, ``torch.compile`` and ``torch.func``. Use it around the forward and the backward; the setting is
    the process's.

    Raises:
        ValueError: in backward: a ``main_grad`` has another shape or device than its source, or neither float32 nor
            the source's dtype.
    """
    global _enabled
    previous, _enabled = _enabled, True
    try:
        with without_fast_path():  # Its backward returns its gradients.
            yield
    finally:
        _enabled = previous


def buffers(weights: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor] | None:
    """What each source's gradient is to be added to, an empty tensor where autograd gets it; None: it gets all."""
    if not _enabled:
        return None
    found = [_buffer(weight, j) if want else None for j, (weight, want) in enumerate(zip(weights, wanted, strict=True))]
    if all(buffer is None for buffer in found):
        return None
    return [weight.new_empty(0) if buffer is None else buffer for weight, buffer in zip(weights, found, strict=True)]


def _buffer(weight: Tensor, j: int) -> Tensor | None:
    buffer: Any = getattr(weight, "main_grad", None)
    if buffer is None:
        return weight.grad if weight.is_leaf else None
    expected = f"a tensor of shape {tuple(weight.shape)} on {weight.device}, float32 or {weight.dtype}"
    if not isinstance(buffer, Tensor):
        raise ValueError(f"weights[{j}].main_grad: got {type(buffer).__name__}, expected {expected}")
    if (
        buffer.shape != weight.shape
        or buffer.device != weight.device
        or buffer.dtype not in (torch.float32, weight.dtype)
    ):
        came = f"shape {tuple(buffer.shape)} on {buffer.device} in {buffer.dtype}"
        raise ValueError(f"weights[{j}].main_grad: got {came}, expected {expected}")
    return buffer
