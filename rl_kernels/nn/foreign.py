"""Layers of other libraries that have a replacement: known by their class's name, so that no library is imported."""

from __future__ import annotations

from torch import nn

from rl_kernels.nn.adapters import full_class_name
from rl_kernels.nn.layer import ReplacementLayer

_kinds: dict[str, type[ReplacementLayer]] = {}


def register(name: str, kind: type[ReplacementLayer]) -> None:
    """Say that ``kind`` stands in for the class called ``name``, with its module: ``"package.module.Class"``."""
    _kinds[name] = kind


def foreign_class(module: nn.Module) -> type[nn.Module] | None:
    """The class with a replacement that ``module`` is an instance of, or None."""
    return next((known for known in type(module).__mro__ if full_class_name(known) in _kinds), None)


def foreign_kind(source: type[nn.Module]) -> type[ReplacementLayer]:
    """What stands in for a class that ``foreign_class`` found."""
    return _kinds[full_class_name(source)]


def names_of(kind: type[ReplacementLayer]) -> str:
    """The classes that ``kind`` stands in for, for messages."""
    return " or ".join(name for name, registered in _kinds.items() if registered is kind)
