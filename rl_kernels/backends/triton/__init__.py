"""The Triton kernels: portable over NVIDIA GPUs of compute capability 8.0 and later.

* ``backend.py``: which calls they can run; it ends in ``BACKEND``, and imports no Triton.
* ``linear.py``, ``conv.py``: the ops. Convolutions that are no linear layers run on kernels of ``dense.py``,
  ``resident.py`` (few channels) or ``depthwise.py`` (one channel a group).
* ``tile.py``: which tile a program computes, the product of two tiles, and the sum of a split product.
* ``mix.py``: the recipe, a tile at a time; ``pixels.py``: where a convolution's pixels and taps lie.
* ``epilogue.py``: what a tile of dL/dW becomes: every source's gradient, and a share of the coefficients';
  ``outer.py``: the shares of ``Outer`` coefficients, and their sum.
* ``configs.py``: the tiles to choose from, and when a filter stays on chip.
* ``assembler.py``: which ptxas they are assembled by for Hopper, and what is refused where none is free of a defect.
* ``offline.py``: compiles the kernels for a GPU that is not there, and reads their machine code.
"""

from rl_kernels.backends.triton.backend import BACKEND

__all__ = ["BACKEND"]
