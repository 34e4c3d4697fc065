"""Which systems there are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rl_kernels.conversion.options import one_of
from rl_kernels.systems.contract import System

SYSTEMS = {
    "replacement": "rl_kernels.systems.replacement",
    "local": "rl_kernels.systems.local.system",
    "detection": "rl_kernels.systems.detection.system",
    "modulation": "rl_kernels.systems.modulation.system",
}
"""Name to module; each module has a ``SYSTEM``."""


def system(name: str) -> System[Any]:
    """Return a system by its name.

    Raises:
        ValueError: there is none of this name.
    """
    one_of("system", name, SYSTEMS)
    return import_module(SYSTEMS[name]).SYSTEM
