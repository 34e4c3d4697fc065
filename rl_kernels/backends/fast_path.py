"""What the C++ fast path, which asks no backend, may take of the backends that it has."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from rl_kernels._extension import EXTENSION
from rl_kernels.backends import selection
from rl_kernels.backends.case import Case


def tell(backend: str, cases: tuple[Case, ...], is_there: Callable[[], bool] = lambda: True, **of_which: Any) -> None:
    """Tell the fast path what it may serve of a backend as things are set now.

    Args:
        backend: its name.
        cases: all that it could serve.
        is_there: whether what it runs on is; asked after everything else.
        of_which: ``set_serving``'s, that say which backend's part is meant.
    """
    if EXTENSION.module is None:
        return
    try:
        name = selection.requested()
    except ValueError:  # The environment names no backend: each call has to say so.
        name = ""
    if not name or not is_there():
        EXTENSION.module.set_serving(0, False, **of_which)
        return
    # Asked for by name it also takes the calls at which another backend is better.
    served = selection.served_by(backend, name, cases)
    EXTENSION.module.set_serving(_bits(served), name != selection.AUTO, **of_which)


@functools.cache
def _bits(cases: tuple[Case, ...]) -> int:
    bits = (EXTENSION.module.serving_bit(case.op, case.dtype) for case in cases)
    return functools.reduce(operator.or_, bits, 0)
