"""The C++ kernels for CPUs (``csrc/cpu``): the mix fused into the packing of each thread's own panels.

* ``backend.py``: what they can run, and where the vendor does better; it ends in ``BACKEND``.
* ``kernels.py``: the kernels as the contract wants them.
* ``fast_path.py``: keeps the C++ fast path, which asks no backend, to what the selection says.
* ``extension.py``: what the extension was built for.
"""

from rl_kernels.backends.cpu.backend import BACKEND
from rl_kernels.backends.cpu.extension import build_info, capability
from rl_kernels.backends.cpu.fast_path import follow_selection

__all__ = ["BACKEND", "build_info", "capability", "follow_selection"]
