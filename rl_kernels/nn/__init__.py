"""Replacement layers: drop-in layers whose weights are mixed from their neighbours'.

* ``layer.py``: ``ReplacementLayer``, the base: how a layer refers to its sources, its options, and what a kind of layer
  has to define; ``entered.py``: what every call does first.
* ``coefficients.py``: the learnable coefficients, where they start, and the fit to a given weight.
* ``linear.py``, ``conv.py``, ``attention.py``, ``norm.py``: one kind of layer each.
* ``foreign.py``: classes of other libraries that have a replacement, by name.
* ``wrapped.py``: layers of any class, by their class's own forward.
* ``standing.py``, ``recorded.py``: whether what a layer runs on is still in its model: at calls, in a ``state_dict``.
* ``belongings.py``: what a layer refers to, and what it has from the one that it replaced.
* ``views.py``: parts of layers, and layers repeated, as sources.
* ``adapters.py``: what stands between a source and its parameters: parametrizations, hooks, other libraries' adapters.

A layer holds no formula: it hands its sources' tensors to ``rl_kernels.functional``.
"""

from rl_kernels.nn.attention import ReplacementMultiheadAttention
from rl_kernels.nn.coefficients import Coefficients
from rl_kernels.nn.conv import (
    ReplacementConv1d,
    ReplacementConv2d,
    ReplacementConv3d,
    ReplacementConvTranspose1d,
    ReplacementConvTranspose2d,
    ReplacementConvTranspose3d,
)
from rl_kernels.nn.layer import ReplacementLayer
from rl_kernels.nn.linear import ReplacementLinear, ReplacementTransposedLinear
from rl_kernels.nn.norm import (
    ReplacementBatchNorm1d,
    ReplacementBatchNorm2d,
    ReplacementBatchNorm3d,
    ReplacementGroupNorm,
    ReplacementLayerNorm,
    ReplacementRMSNorm,
)
from rl_kernels.nn.views import SourceView
from rl_kernels.nn.wrapped import ReplacementByForward

__all__ = [
    "Coefficients",
    "SourceView",
    "ReplacementLayer",
    "ReplacementLinear",
    "ReplacementTransposedLinear",
    "ReplacementConv1d",
    "ReplacementConv2d",
    "ReplacementConv3d",
    "ReplacementConvTranspose1d",
    "ReplacementConvTranspose2d",
    "ReplacementConvTranspose3d",
    "ReplacementMultiheadAttention",
    "ReplacementBatchNorm1d",
    "ReplacementBatchNorm2d",
    "ReplacementBatchNorm3d",
    "ReplacementLayerNorm",
    "ReplacementRMSNorm",
    "ReplacementGroupNorm",
    "ReplacementByForward",
]
