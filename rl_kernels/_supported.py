"""Which torch the package supports, and what is said once, at import, where an installation is less than it could be.

There are two bounds. Below ``OLDEST_TORCH`` a warning: eager mode is right down to ``REFUSED_BELOW``, and many must
stay with the torch of their cluster; what fails there fails in torch's own words. Below ``REFUSED_BELOW`` an error:
nothing older was ever run, and a failure in the middle of an import would name no cause.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import warnings

import torch

OLDEST_TORCH = (2, 11)
"""The first with which all that the documents promise holds: the test suite passes, but for what torch refuses."""
REFUSED_BELOW = (2, 5)
"""The first that runs the package in eager mode at all; without the C++ kernels, which need 2.8."""

QUIET_VARIABLE = "RL_KERNELS_QUIET"
"""Set to 1, importing the package warns of nothing."""


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with, as "2.11.0a0+git1234" starts with 2, 11 and 0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found.group().split(".")) if found else ()


def dotted(version: tuple[int, ...]) -> str:
    """A version as it is written."""
    return ".".join(map(str, version))


def why_not_torch() -> str | None:
    """What is to be said of the torch that runs; None where it is supported.

    Raises:
        ImportError: it is too old for the package to work at all.
    """
    # Of a version that no number starts nothing is known.
    found = release(torch.__version__)
    if not found or found >= OLDEST_TORCH:
        return None
    if found < REFUSED_BELOW:
        raise ImportError(
            f"rl_kernels needs torch {dotted(REFUSED_BELOW)} or later, and is tested with {dotted(OLDEST_TORCH)} and "
            f"later; this is torch {torch.__version__}"
        )
    return (
        f"tested with torch {dotted(OLDEST_TORCH)} and later, this is {torch.__version__}: layers are right in eager "
        "mode; torch.compile, torch.export and rl_kernels.distributed may fail"
    )


OF_TORCH = why_not_torch()
"""Asked when this is imported: before any module that a torch which is too old makes fail."""


def warn(*complaints: str | None) -> None:
    """Say at import, as one warning at the line that imports, what there is to complain of.

    The processes that a process starts, and all ranks of a machine but its first, leave it to that one.
    """
    found = [complaint for complaint in complaints if complaint is not None]
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or "0"
    repeated = rank != "0" or multiprocessing.parent_process() is not None
    if not found or repeated or os.environ.get(QUIET_VARIABLE) == "1":
        return
    warnings.warn(f"rl_kernels: {'; '.join(found)} ({QUIET_VARIABLE}=1 silences this)", RuntimeWarning, stacklevel=3)
