"""Fresh memory that shows when it is read before it is written."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def poisoned(deterministic: bool = True) -> Iterator[None]:
    """Inside, torch fills every fresh allocation with NaN: what is not written shows.

    Args:
        deterministic: torch fills only where deterministic algorithms are asked for; False: where it has none, it
            goes on without a warning.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            if not deterministic:
                warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
