"""Keeps the C++ fast path to the calls that the selection gives to this backend."""

from __future__ import annotations

from rl_kernels.backends import fast_path, selection
from rl_kernels.backends.case import Case
from rl_kernels.backends.cpu.backend import BACKEND, DTYPES
from rl_kernels.ops.schema import OPS

_CASES = tuple(Case(op, "cpu", dtype) for op in OPS for dtype in DTYPES)


def follow_selection() -> None:
    """From now on the fast path serves what the backend serves; at first nothing, as no record is read at import."""
    selection.on_change(tell, now=False)


def tell() -> None:
    """Tell the fast path what it may serve as things are set now."""
    fast_path.tell(BACKEND.name, _CASES)
