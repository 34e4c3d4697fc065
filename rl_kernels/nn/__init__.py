"""Replacement layers: drop-in layers whose weights are mixed from their neighbours'."""

from rl_kernels.nn.attention import ReplacementMultiheadAttention
from rl_kernels.nn.coefficients import Coefficients
from rl_kernels.nn.conv import ReplacementConv1d, ReplacementConv2d, ReplacementConv3d
from rl_kernels.nn.layer import ReplacementLayer
from rl_kernels.nn.linear import ReplacementLinear
from rl_kernels.nn.norm import (
    ReplacementBatchNorm1d,
    ReplacementBatchNorm2d,
    ReplacementBatchNorm3d,
    ReplacementGroupNorm,
    ReplacementLayerNorm,
)

__all__ = [
    "Coefficients",
    "ReplacementLayer",
    "ReplacementLinear",
    "ReplacementConv1d",
    "ReplacementConv2d",
    "ReplacementConv3d",
    "ReplacementMultiheadAttention",
    "ReplacementBatchNorm1d",
    "ReplacementBatchNorm2d",
    "ReplacementBatchNorm3d",
    "ReplacementLayerNorm",
    "ReplacementGroupNorm",
]
