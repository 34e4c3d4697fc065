"""ReplacementLinear, and ReplacementTransposedLinear for weights that are stored the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rl_kernels import functional as F
from rl_kernels.nn.adapters import full_name
from rl_kernels.nn.foreign import foreign_class, foreign_kind, names_of, register
from rl_kernels.nn.layer import ReplacementLayer
from rl_kernels.nn.views import forward_in_parts


class ReplacementLinear(ReplacementLayer):
    """``nn.Linear`` on the mixed weights and biases of other ``nn.Linear`` layers; options of ``ReplacementLayer``.

    Shape: ``(*, in_features)`` to ``(*, out_features)``, as the sources'.
    """

    source_type = (nn.Linear,)
    takes_views = True

    def __init__(self, sources: Any, **options: Any):
        super().__init__(sources, **options)
        self.in_features: int = sources[0].in_features
        self.out_features: int = sources[0].out_features

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` with the mixed W and b."""
        weights = self._tensors("weight")
        if weights is None:
            return forward_in_parts(_linear, x, x.dim() - 1, self._in_tiles())
        return F.mixed_linear(x, weights, self.coefficients, self._tensors("bias"))

    def merged(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same."""
        bias = self.bias
        layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        return self._filled(layer, {"weight": self.weight, "bias": bias})

    def extra_repr(self) -> str:
        """Sizes, sources and options, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"


def _linear(x: Tensor, weights: Any, coefficients: Tensor, biases: Any, groups: int) -> Tensor:  # noqa: ARG001
    return F.mixed_linear(x, weights, coefficients, biases)


class ReplacementTransposedLinear(ReplacementLayer):
    """transformers' ``Conv1D``, of GPT-2 and its kin, on the mixed weights and biases of others of its class.

    It is a linear layer whose weight is ``(nx, nf)``: the inputs first. Options of ``ReplacementLayer``; granularity
    ``"channel"`` has one coefficient per source and output, the weight's second dimension. The kernels read the weights
    through transposed views; inside ``rl_kernels.accumulate_into_grad`` their gradients take the usual way.

    Shape: ``(*, nx)`` to ``(*, nf)``, as the sources'.
    """

    source_type = ()  # Told by its name: transformers is imported by whoever uses it.

    def __init__(self, sources: Any, **options: Any):
        super().__init__(sources, **options)
        self.nx, self.nf = self.main_weight(sources[0]).shape

    @classmethod
    def check_source(cls, source: nn.Module, name: str) -> None:
        """Raise unless ``source`` is such a layer."""
        found = foreign_class(source)
        if found is None or foreign_kind(found) is not cls:
            replaced = ", which is itself replaced" if isinstance(source, ReplacementLayer) else ""
            raise TypeError(f"{name}: got {full_name(source)}{replaced}, expected {names_of(cls)}")

    @classmethod
    def out_channels_of(cls, source: nn.Module) -> int:
        """How many outputs a source has."""
        return cls.main_weight(source).shape[1]

    @classmethod
    def fit_pairs(cls, own: nn.Module, sources: Sequence[nn.Module]) -> list[tuple[Tensor, list[Tensor]]]:
        """The weights, outputs first."""
        return [(cls.main_weight(own).t(), [cls.main_weight(source).t() for source in sources])]

    def _outputs_first(self) -> list[Tensor]:
        weights = self._tensors("weight")
        assert weights is not None
        return [weight.t() for weight in weights]

    @property
    def weight(self) -> Tensor:
        """The mixed weight, ``(nx, nf)``, evaluated at each access."""
        self._look_around()
        return F.mix(self._outputs_first(), self.coefficients).t()

    def forward(self, x: Tensor) -> Tensor:
        """``x W + b`` with the mixed W and b."""
        return F.mixed_linear(x, self._outputs_first(), self.coefficients, self._tensors("bias"))

    def merged(self) -> nn.Module:
        """A layer of the sources' class that computes the same."""
        plain: Any = foreign_class(self._sources[0])
        with torch.device("meta"):
            layer: nn.Module = plain(self.nf, self.nx)
        return self._filled(layer, {"weight": self.weight, "bias": self.bias})

    def extra_repr(self) -> str:
        """Sizes, sources and options, for printing."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"


register("transformers.pytorch_utils.Conv1D", ReplacementTransposedLinear)
