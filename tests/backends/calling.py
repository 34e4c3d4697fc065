"""Calls of one backend's kernels, past the choice of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rl_kernels.backends import Backend
from rl_kernels.ops.values import Call


def run(backend: Backend, op: str, *arguments: Any, into: Sequence[Tensor | None] | None = None) -> Any:
    """What ``backend``'s kernel makes of the arguments of ``op``'s schema; ``into`` as in ``Call``."""
    kernel, operands = backend.kernel(op), Call.of(op, arguments).operands
    return kernel(*operands) if into is None else kernel(*operands, into=into)
