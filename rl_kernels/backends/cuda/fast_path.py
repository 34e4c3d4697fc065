"""Keeps the fast path to the calls that the selection gives to this backend, as ``cpu/fast_path.py`` does."""

from __future__ import annotations

import functools
import operator

import torch

from rl_kernels._extension import EXTENSION
from rl_kernels.backends import selection
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
    if EXTENSION.module is None:
        return
    try:
        name = selection.requested()
    except ValueError:  # The environment names no backend: each call has to say so.
        name = ""
    if not name or extension.EXTENSION.module is None or not has_gpu():
        EXTENSION.module.set_serving(0, False, cuda=True)
        return
    # Asked for by name it also takes the calls at which another backend is better.
    cases = selection.served_by(BACKEND.name, name, _CASES)
    EXTENSION.module.set_serving(_bits(cases), name != selection.AUTO, cuda=True)


@functools.cache
def _bits(cases: tuple[Case, ...]) -> int:
    bits = (EXTENSION.module.serving_bit(case.op, case.dtype) for case in cases)
    return functools.reduce(operator.or_, bits, 0)
