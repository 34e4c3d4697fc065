"""Replacement Learning kernels: layers that run on a mix of their neighbours' weights, which is never stored."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":  # One that is there and lacks something says so itself.
        raise
    raise ImportError(
        "rl_kernels needs PyTorch, and never installs it: install the torch build for your machine"
    ) from error

from importlib import import_module as _import_module
from typing import Any as _Any

from rl_kernels import _extension, _moved, _supported, backends, functional, nn
from rl_kernels._version import __version__
from rl_kernels.backends import services
from rl_kernels.backends.selection import use_backend
from rl_kernels.conversion import (
    Plan,
    check,
    load_plain_state_dict,
    load_pretrained,
    merge,
    plan,
    replace,
    save_pretrained,
)
from rl_kernels.ops.accumulation import accumulate_into_grad
from rl_kernels.ops.values import Outer

__all__ = [
    "__version__",
    "functional",
    "nn",
    "plan",
    "replace",
    "merge",
    "check",
    "load_plain_state_dict",
    "save_pretrained",
    "load_pretrained",
    "Plan",
    "services",
    "use_backend",
    "accumulate_into_grad",
    "Outer",
]

_supported.warn(_supported.OF_TORCH, _extension.complaint())
_moved.find_moved_modules()
_moved.still_callable(backends, services)


def __getattr__(name: str) -> _Any:
    if name == "distributed":  # Importing torch's own takes seconds.
        return _import_module("rl_kernels.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
