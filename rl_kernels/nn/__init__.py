"""Replacement layers: drop-in layers whose weights are mixed from their neighbours'."""

from rl_kernels.nn.coefficients import Coefficients
from rl_kernels.nn.conv import ReplacementConv1d, ReplacementConv2d, ReplacementConv3d
from rl_kernels.nn.linear import ReplacementLinear
from rl_kernels.nn.sources import ReplacementLayer

__all__ = [
    "Coefficients",
    "ReplacementConv1d",
    "ReplacementConv2d",
    "ReplacementConv3d",
    "ReplacementLayer",
    "ReplacementLinear",
]
