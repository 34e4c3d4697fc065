"""What a call of an op is made of. The ops' schemas are flat, as torch needs them; everything else passes values.

A ``Call`` is built once, from a schema's arguments, before anything is checked. ``Call.of`` and ``Call.arguments`` are
the one place that knows the order of those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Outer(NamedTuple):
    """Structured coefficients, one for each element of a weight, of rank R.

    ``c[n, o, k] = sum_r left[n, r, o] * right[n, r, k]``, so that ``W[o, k] = sum_n c[n, o, k] * W_n[o, k]``. They take
    the place of ``coefficients`` in the linear layers, the convolutions and ``mix`` of ``rl_kernels.functional``. A
    bias has no column k: biases are summed as they are, each with the coefficient 1.

    The sum over r is in order, in float32 (float64 for float64 weights), as the mix is. With R of 16 or less nothing
    weight-sized is stored; a larger R is legal.

    Source: option; idea of KML/AdAM and arXiv 2602.06245, not the formula of arXiv 2203.15297, which could not be read.

    Attributes:
        left: ``(N, R, out)``, of the first dimension of the weights (a transposed convolution's input channels). In
            float32, or float64 where the weights are; other floating-point dtypes are cast to that.
        right: ``(N, R, K)`` in the same dtype, K the size of the weights' other dimensions, flattened in their order:
            ``in`` of a linear layer, ``in / groups * taps`` of a convolution.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, coefficients: Tensor, out: int) -> Outer:
        """The two parts, as views, of what ``joined`` made for weights with ``out`` rows."""
        return cls(coefficients[..., :out], coefficients[..., out:])

    def joined(self) -> Tensor:
        """Left and right beside each other, ``(N, R, out + K)``: the form in which ops take and return them."""
        return torch.cat((self.left, self.right), -1)


class Recipe(NamedTuple):
    """The weight ``W = sum_j c_j * W_j``, and the bias ``sum_j c_j * b_j``, before they are mixed.

    Attributes:
        weights: N >= 1 sources of one shape, ``(out, in)`` or ``(out, in / groups, *kernel)``.
        coefficients: ``(N,)``; ``(N, out)`` for one coefficient per output channel; or ``(N, R, out + K)``, the parts
            of ``Outer`` coefficients joined, which are not of the biases: those are summed.
        biases: N vectors ``(out,)``, or None.
    """

    weights: Sequence[Tensor]
    coefficients: Tensor
    biases: Sequence[Tensor] | None = None

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has coefficients of its own."""
        return self.coefficients.dim() == 2

    @property
    def is_outer(self) -> bool:
        """Whether the coefficients are joined parts of ``Outer`` ones."""
        return self.coefficients.dim() == 3

    @property
    def bias_coefficients(self) -> Tensor:
        """What the biases are mixed by: the coefficients, but ones ``(N,)`` beside ``Outer`` coefficients."""
        return self.coefficients.new_ones(len(self.weights)) if self.is_outer else self.coefficients

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the recipe: the coefficients, the weights, the biases."""
        return (self.coefficients, *self.weights, *(self.biases or ()))


class Geometry(NamedTuple):
    """How a convolution's filter goes over its input, one number a spatial dimension; as torch's arguments."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Wanted(NamedTuple):
    """Which gradients of a recipe are wanted.

    Attributes:
        weights: of each source.
        coefficients: of the coefficients.
        biases: of each bias; empty where there are none.
    """

    weights: Sequence[bool]
    coefficients: bool
    biases: Sequence[bool]

    @property
    def product(self) -> bool:
        """Whether any of them needs G, the gradient of the mixed weight."""
        return self.coefficients or any(self.weights)

    def sums(self, recipe: Recipe) -> bool:
        """Whether any of them needs dy summed over everything but its channels, the gradient of the mixed bias."""
        return any(self.biases) or (self.coefficients and recipe.biases is not None and not recipe.is_outer)

    def __bool__(self) -> bool:
        """Whether any is."""
        return self.product or any(self.biases)


class Gradients(NamedTuple):
    """What a wgrad returns; an empty tensor stands where a gradient was not wanted, or went into ``Call.into``."""

    weights: list[Tensor]
    coefficients: Tensor
    biases: list[Tensor]


class Call(NamedTuple):
    """One call of an op.

    Attributes:
        op: its name, as ``"mixed_conv_wgrad"``.
        activation: x of a forward, dy of the gradients.
        recipe: its biases are None for dgrad, which needs none.
        geometry: of a convolution.
        x: of a wgrad.
        input_size: of a convolution's dgrad: the shape of dx.
        wanted: of a wgrad.
        into: of a wgrad: tensors to add the sources' gradients to, None for a source whose gradient is returned.
    """

    op: str
    activation: Tensor
    recipe: Recipe
    geometry: Geometry | None = None
    x: Tensor | None = None
    input_size: Sequence[int] | None = None
    wanted: Wanted | None = None
    into: Sequence[Tensor | None] | None = None

    @classmethod
    def of(cls, op: str, arguments: Sequence[Any]) -> Call:
        """From the arguments of ``op``'s schema, in its order."""
        return _READERS[op](op, *arguments)

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of ``op``'s schema, in its order."""
        geometry = self.geometry or ()
        if self.wanted is not None:
            return (self.activation, self.x, *self.recipe, *self.wanted, *geometry)
        if self.op.endswith("dgrad"):
            size = () if self.input_size is None else (self.input_size,)
            return (self.activation, *self.recipe[:2], *size, *geometry)
        return (self.activation, *self.recipe, *geometry)

    @property
    def operands(self) -> tuple[Any, ...]:
        """What a backend's kernel of ``op`` takes, ``into`` aside, which is a keyword of those that can add.

        ``(x, recipe)``, ``(dy, recipe)`` or ``(dy, x, recipe, wanted)``; of a convolution the geometry comes after
        these, and for dgrad the shape of dx before it.
        """
        operands: tuple[Any, ...]
        if self.wanted is not None:
            operands = (self.activation, self.x, self.recipe, self.wanted)
        elif self.input_size is not None:
            operands = (self.activation, self.recipe, self.input_size)
        else:
            operands = (self.activation, self.recipe)
        return operands if self.geometry is None else (*operands, self.geometry)


def _read_linear(op: str, x: Any, weights: Any, coefficients: Any, biases: Any) -> Call:
    return Call(op, x, Recipe(weights, coefficients, biases))


def _read_linear_dgrad(op: str, dy: Any, weights: Any, coefficients: Any) -> Call:
    return Call(op, dy, Recipe(weights, coefficients))


def _read_conv(op: str, x: Any, weights: Any, coefficients: Any, biases: Any, *geometry: Any) -> Call:
    return Call(op, x, Recipe(weights, coefficients, biases), Geometry(*geometry))


def _read_conv_dgrad(op: str, dy: Any, weights: Any, coefficients: Any, input_size: Any, *geometry: Any) -> Call:
    return Call(op, dy, Recipe(weights, coefficients), Geometry(*geometry), input_size=input_size)


def _read_wgrad(op: str, dy: Any, x: Any, weights: Any, coefficients: Any, biases: Any, *rest: Any) -> Call:
    wanted, geometry = Wanted(*rest[:3]), Geometry(*rest[3:]) if len(rest) > 3 else None
    return Call(op, dy, Recipe(weights, coefficients, biases), geometry, x=x, wanted=wanted)


_READERS: dict[str, Callable[..., Call]] = {
    "mixed_linear": _read_linear,
    "mixed_linear_dgrad": _read_linear_dgrad,
    "mixed_linear_wgrad": _read_wgrad,
    "mixed_conv": _read_conv,
    "mixed_conv_dgrad": _read_conv_dgrad,
    "mixed_conv_wgrad": _read_wgrad,
}
