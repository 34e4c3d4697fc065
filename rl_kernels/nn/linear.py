"""ReplacementLinear."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rl_kernels import functional as F
from rl_kernels.nn.layer import ReplacementLayer


class ReplacementLinear(ReplacementLayer):
    """``nn.Linear`` on the mixed weights and biases of other ``nn.Linear`` layers; options of ``ReplacementLayer``.

    Shape: ``(*, in_features)`` to ``(*, out_features)``, as the sources'.
    """

    source_type = (nn.Linear,)

    def __init__(self, sources: Any, **options: Any):
        super().__init__(sources, **options)
        self.in_features: int = sources[0].in_features
        self.out_features: int = sources[0].out_features

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` with the mixed W and b."""
        weights = self._tensors("weight")
        assert weights is not None
        return F.mixed_linear(x, weights, self.coefficients, self._tensors("bias"))

    def merged(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same."""
        bias = self.bias
        layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        return self._filled(layer, {"weight": self.weight, "bias": bias})

    def extra_repr(self) -> str:
        """Sizes, sources and options, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
