"""The CUDA C++ kernels (``csrc/cuda``): for NVIDIA GPUs of compute capability 8.0 and later.

* ``backend.py``: what they can run, and what others do better; it ends in ``BACKEND``.
* ``kernels.py``: the ops, which C++ runs (``csrc/bindings/cuda``) and plans (``csrc/cuda/host``).
* ``fast_path.py``: keeps the fast path, which asks no backend, to what the selection says.
* ``configs.py``: the tiles to choose among, where Python chooses.
* ``extension.py``: the library ``rl_kernels/_cuda.so``, found and opened; ``library.py``: its C interface.
"""

from rl_kernels.backends.cuda.backend import BACKEND
from rl_kernels.backends.cuda.fast_path import follow_selection

__all__ = ["BACKEND", "follow_selection"]
