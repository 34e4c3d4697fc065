"""Keeps the C++ fast path to the calls that the selection gives to this backend."""

from __future__ import annotations

import torch

from rl_kernels.backends import fast_path, selection
from rl_kernels.backends.case import Case
from rl_kernels.backends.cuda import configs, extension
from rl_kernels.backends.cuda.backend import BACKEND
from rl_kernels.ops.schema import OPS

_CASES = tuple(Case(op, "cuda", dtype) for op in OPS for dtype in configs.ELEMENTS)


def follow_selection() -> None:
    """From now on the fast path serves what the backend serves; at first nothing, as no record is read at import."""
    selection.on_change(tell, now=False)


def has_gpu() -> bool:
    """Whether there is anything to serve; tests, whose tensors pose as a GPU's, replace this."""
    return torch.cuda.is_available()


def tell() -> None:
    """Tell the fast path what it may serve as things are set now."""
    fast_path.tell(BACKEND.name, _CASES, lambda: extension.EXTENSION.module is not None and has_gpu(), cuda=True)
