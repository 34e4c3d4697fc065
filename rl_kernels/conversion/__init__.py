"""Whole models: plan which blocks are replaced, replace them, and merge them into plain layers again.

How a plan comes about, top down:

* ``planner.py``: ``plan()``. It checks its arguments (``options.py``, ``targets.py``) and fills in a ``Plan``
  (``plans.py``: its data, its file, how it prints).
* ``grouping.py``: how many coefficients a layer has at a granularity.
* ``memory.py``: the bytes that training takes.
* ``walk.py``: which blocks are due, and what stands against each; on ``blocks.py``: what a model is made of.
* ``replacing.py``: ``replace()`` carries a plan out; ``merging.py``: ``merge()`` takes it back.
* ``encoder_fast_path.py``: torch's own fast path for encoders, which reads weights past a replaced layer.
* ``checking.py``: ``check()``: whether a replaced model holds all that it runs on.
* ``checkpoints.py``: plain checkpoints for replaced models.
* ``pretrained.py``: ``save_pretrained()`` and ``load_pretrained()``, on ``inventory.py`` (what is replaced, as data),
  ``folder.py`` (the files) and ``huggingface.py`` (configurations of transformers).
* ``zoo.py``: models by name, for the command ``plan``.

Nothing here computes with weights but ``merging.py`` and the fit of coefficients.
"""

from rl_kernels.conversion.checking import check
from rl_kernels.conversion.checkpoints import Loaded, load_plain_state_dict
from rl_kernels.conversion.merging import merge
from rl_kernels.conversion.planner import plan
from rl_kernels.conversion.plans import Plan
from rl_kernels.conversion.pretrained import load_pretrained, save_pretrained
from rl_kernels.conversion.replacing import replace

__all__ = [
    "Loaded",
    "Plan",
    "check",
    "load_plain_state_dict",
    "load_pretrained",
    "merge",
    "plan",
    "replace",
    "save_pretrained",
]
