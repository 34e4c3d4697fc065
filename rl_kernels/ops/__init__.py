"""What the ops are, and how torch sees them. Nothing here knows a backend; ``rl_kernels.backends`` implements the ops.

What a call is:

* ``values.py``: a ``Call`` and what it is made of: ``Recipe``, ``Geometry``, ``Wanted``.
* ``mix.py``: the meaning of a recipe in plain torch.
* ``linear.py``, ``conv.py``: every op, each with its schema, its checks, its fake and its FLOP formula; declared by
  ``schema.py``, with ``checks.py`` and ``shapes.py``.

How a call travels (from ``rl_kernels.functional``):

* ``arguments.py``: what users pass, in the one form that the ops take.
* ``ways.py``: the four ways through torch, and which one a call takes; ``autograd.py`` goes them, and holds the
  gradients' formulas; ``registration.py`` gives these to the registered ops; ``composite.py`` is the way in plain aten,
  ``sharding.py`` that of DTensors, ``accumulation.py`` that of gradients into ``.grad``.
* ``transposed.py``, ``attention.py``: transposed convolutions and multi-head attention, made of these.

An op's file may be changed alone: what it declares is all that others see of it. A gradient's formula stands once, in
``autograd.py``, for every way.
"""

from rl_kernels.ops import linear  # isort: skip  (declared first, and listed first)
from rl_kernels.ops import conv, registration

__all__ = ["conv", "linear", "registration"]
