"""What a replaced layer refers to without registering it, and what it has from the layer that it replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Unregistered:
    """Modules referred to by a plain object, so that ``nn.Module`` registers none of them.

    Their parameters stay their owner's: once in ``state_dict``, in ``parameters()`` and in checkpoints. Copying or
    pickling a model that holds both ends keeps the reference; copying one layer alone copies what it refers to.
    """

    __slots__ = ("modules",)

    def __init__(self, *modules: nn.Module):
        self.modules = modules

    def __iter__(self) -> Iterator[Any]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, j: int) -> Any:
        return self.modules[j]


class Belongings(NamedTuple):
    """What hung on the layer that was replaced: see ``rl_kernels.conversion.carrying``."""

    class_before: type[nn.Module]
    shown: tuple[str, ...]
    """Attributes that the replaced layer has now."""
    hidden: dict[str, Any]
    """Attributes whose names mean something else here."""
    marks: dict[str, dict[str, Any]]
    """Attributes of its parameters."""
