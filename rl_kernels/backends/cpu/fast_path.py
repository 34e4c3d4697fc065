"""Keeps the C++ fast path to the calls that the selection gives to this backend."""

from __future__ import annotations

import functools
import operator

from rl_kernels._extension import EXTENSION
from rl_kernels.backends import selection
from rl_kernels.backends.case import Case
from rl_kernels.backends.cpu.backend import BACKEND, DTYPES
from rl_kernels.ops.schema import OPS

_CASES = tuple(Case(op, "cpu", dtype) for op in OPS for dtype in DTYPES)


def follow_selection() -> None:
    """From now on the fast path serves what the backend serves; at first nothing, as no record is read at import."""
    selection.on_change(tell, now=False)


def tell() -> None:
    """Tell the fast path what it may serve as things are set now."""
    if EXTENSION.module is None:
        return
    try:
        name = selection.requested()
    except ValueError:  # The environment names no backend: each call has to say so.
        EXTENSION.module.set_serving(0, False)
        return
    # Asked for by name it also takes the calls at which another backend is better.
    cases = selection.served_by(BACKEND.name, name, _CASES)
    EXTENSION.module.set_serving(_bits(cases), name != selection.AUTO)


@functools.cache
def _bits(cases: tuple[Case, ...]) -> int:
    bits = (EXTENSION.module.serving_bit(case.op, case.dtype) for case in cases)
    return functools.reduce(operator.or_, bits, 0)
