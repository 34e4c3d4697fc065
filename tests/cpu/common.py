"""Calls of either kind of layer, on the fast path and off it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rl_kernels import functional as F
from rl_kernels._extension import EXTENSION, mixed_conv_call, mixed_linear_call
from rl_kernels.backends.cpu import fast_path

KINDS = ("linear", "conv")
GEOMETRY = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}


@contextlib.contextmanager
def off_the_fast_path() -> Iterator[None]:
    """Inside, the fast path declines everything; the same kernels run by way of Python."""
    EXTENSION.module.set_serving(0, False)
    try:
        yield
    finally:
        fast_path.tell()


@dataclass(frozen=True)
class Call:
    """The arguments of a layer."""

    kind: str
    x: Tensor
    weights: Sequence[Tensor]
    coefficients: Any
    biases: Sequence[Tensor] | None
    geometry: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Tensor:
        """The public function."""
        function = F.mixed_linear if self.kind == "linear" else F.mixed_conv2d
        return function(self.x, self.weights, self.coefficients, self.biases, **self.geometry)

    def fast(self) -> Tensor | None:
        """The fast path alone: None where it declines."""
        arguments = (self.x, self.weights, self.coefficients, self.biases)
        if self.kind == "linear":
            return mixed_linear_call(*arguments)
        return mixed_conv_call(*arguments, 2, *self.geometry.values())

    def leaves(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        coefficients = [self.coefficients] if isinstance(self.coefficients, Tensor) else []
        return [self.x, *coefficients, *self.weights, *(self.biases or ())]

    def copy(self) -> Call:
        """The same arguments in tensors of their own, which need gradients where these do."""

        def twin(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        coefficients = twin(self.coefficients) if isinstance(self.coefficients, Tensor) else self.coefficients
        biases = None if self.biases is None else [twin(bias) for bias in self.biases]
        weights = [twin(weight) for weight in self.weights]
        return replace(self, x=twin(self.x), weights=weights, coefficients=coefficients, biases=biases)


def make(
    kind: str,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    n: int = 2,
    granularity: str = "scalar",
    biased: bool = True,
    needs: bool = True,
) -> Call:
    """A small random call."""
    mixing = torch.float64 if dtype == torch.float64 else torch.float32
    weight, x = ((6, 7), (4, 7)) if kind == "linear" else ((6, 2, 3, 3), (2, 4, 7, 5))

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(needs)

    return Call(
        kind,
        random(x, x_dtype or dtype),
        [random(weight, dtype) for _ in range(n)],
        random((n,) if granularity == "scalar" else (n, 6), mixing),
        [random((6,), dtype) for _ in range(n)] if biased else None,
        {} if kind == "linear" else dict(GEOMETRY),
    )


def gradients(call: Call, y: Tensor, dy: Tensor | None = None) -> list[Tensor | None]:
    """By every leaf that needs one; None for the others."""
    asked = [leaf for leaf in call.leaves() if leaf.requires_grad]
    found = iter(torch.autograd.grad(y, asked, torch.ones_like(y) if dy is None else dy))
    return [next(found) if leaf.requires_grad else None for leaf in call.leaves()]


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], exact: bool = True) -> None:
    """Bit for bit; or, where sums were taken in another order, nearly."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype and one.stride() == other.stride()
            assert torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-5, atol=1e-5)
