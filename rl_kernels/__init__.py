"""Replacement Learning kernels: layers that run on a mix of their neighbours' weights, which is never stored."""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("rl_kernels needs PyTorch, and never installs it: install the torch build for your machine") from error

from rl_kernels import functional
from rl_kernels.backends import backends
from rl_kernels.backends.selection import use_backend

__version__ = "0.1.0"
