"""Names of 0.1.0 that have moved, for one version: each warns, and pickles of 0.1.0 load.

Delete this file, its three uses and its test when 0.3.0 comes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

MODULES = {
    "rl_kernels.nn.sources": ("rl_kernels.nn.layer", "rl_kernels.nn.adapters"),
    "rl_kernels.conversion.records": ("rl_kernels.conversion.plans", "rl_kernels.conversion.options"),
    "rl_kernels.conversion.models": ("rl_kernels.conversion.zoo",),
    "rl_kernels.conversion.state": ("rl_kernels.conversion.checkpoints",),
    "rl_kernels.recipes": ("rl_kernels.systems",),
    "rl_kernels.recipes.digits": ("rl_kernels.systems.digits",),
    "rl_kernels.recipes.models": ("rl_kernels.systems.models",),
    "rl_kernels.demo": ("rl_kernels.commands.demo",),
    "rl_kernels.doctor": ("rl_kernels.commands.doctor",),
    "rl_kernels.inspect": ("rl_kernels.commands.inspect",),
    "rl_kernels.backends.gate": ("rl_kernels.backends.record_store",),
    "rl_kernels.backends.heuristics": ("rl_kernels.backends.gpu.heuristics",),
    "rl_kernels.backends.convolution": ("rl_kernels.backends.gpu.convolution",),
    "rl_kernels.backends.triton.tuner": ("rl_kernels.backends.gpu.tuner",),
}
"""Modules of 0.1.0 without an underscore, and where their names are now."""


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Say that a name has moved."""
    warnings.warn(f"{old} is {new} now; the old name goes in 0.3.0", DeprecationWarning, stacklevel=stacklevel)


def renamed(module: str, name: str, names: Mapping[str, tuple[str, Any]]) -> Any:
    """A module's ``__getattr__`` for attributes that have new names: ``{old: (new, value)}``."""
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new, value = names[name]
    warn(f"{module}.{name}", f"{module}.{new}")
    return value


class _MovedModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for new in MODULES[self.__name__]:
            module = importlib.import_module(new)
            if hasattr(module, name):
                warn(f"{self.__name__}.{name}", f"{new}.{name}")
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder:
    """Finds modules of 0.1.0; the first of all finders, as their folders may still be there, without sources."""

    @staticmethod
    def find_spec(name: str, _path: Sequence[str] | None = None, _target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder, is_package=True) if name in MODULES else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> types.ModuleType:
        return _MovedModule(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        """Nothing: a name is looked up when it is asked for."""


def find_moved_modules() -> None:
    """From now on the modules of 0.1.0 can be imported."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def still_callable(module: types.ModuleType, function: Callable[..., Any]) -> None:
    """Let ``module``, whose name was a function's, be called as that function, with a warning."""

    class CallableModule(types.ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            warn(f"{module.__name__}()", f"{function.__module__.split('.')[0]}.{function.__name__}()")
            return function(*arguments, **options)

    module.__class__ = CallableModule
