"""The CUDA C++ kernels (``csrc/cuda``): for NVIDIA GPUs of compute capability 8.0 and later.

* ``backend.py``: what they can run, and what others do better; it ends in ``BACKEND``.
* ``linear.py``, ``conv.py``: the ops, and which of the following serves a call.
* ``product.py``: forward and dgrad of any size; ``skinny.py``: of few tokens; ``resident.py``: of convolutions of few
  channels. ``wgrad.py``: the gradients of sources and coefficients.
* ``params.py``: the structs that kernels take; ``configs.py``: what a launch has to know of each kernel, and the tiles
  to choose among; ``extension.py``: the extension ``rl_kernels._cuda`` and the launch.
"""

from rl_kernels.backends.cuda.backend import BACKEND

__all__ = ["BACKEND"]
