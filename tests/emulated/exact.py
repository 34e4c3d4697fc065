"""What the CUDA kernels compute but for the order of their sums: operands rounded as theirs, products in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_kernels.backends import reference
from rl_kernels.ops.values import Call, Gradients, Recipe, Wanted

ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6}


def mixed(tensors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The recipe as kernels evaluate it: float32 terms added in their order, fused, and rounded once."""
    total = torch.zeros(())
    for j, (tensor, factor) in enumerate(zip(tensors, coefficients, strict=True)):
        factor = factor.reshape(-1, *(1,) * (tensor.dim() - 1)) if factor.dim() else factor
        total = (total.double() + factor.double() * tensor.double()).float() if j else factor * tensor.float()
    return total.to(tensors[0].dtype)


def operand(tensor: Tensor) -> Tensor:
    """As the matrix instructions see it: float32 is rounded to tf32, ties away from 0."""
    if tensor.dtype != torch.float32:
        return tensor.double()
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def results(call: Call) -> list[Tensor]:
    """What an op returns, in float64 and in the order of its schema, without what was not wanted."""
    if call.wanted is not None:
        return _wgrad(call, call.wanted)
    weights, coefficients, biases = call.recipe
    one = torch.ones(1, dtype=torch.float64)
    bias = None if biases is None else [mixed(biases, coefficients).double()]
    recipe = Recipe([operand(mixed(weights, coefficients))], one, bias)
    return [_reference(call._replace(activation=operand(call.activation), recipe=recipe))]


def _wgrad(call: Call, wanted: Wanted) -> list[Tensor]:
    weights, coefficients, biases = call.recipe
    assert call.x is not None
    recipe = Recipe([weight.double() for weight in weights], coefficients.double())
    dy, x = operand(call.activation), operand(call.x)
    gradients = _reference(
        call._replace(activation=dy, x=x, recipe=recipe, wanted=wanted._replace(biases=[]), into=None)
    )
    total = gradients.coefficients
    sums = call.activation.double().sum([0, *range(2, call.activation.dim())])
    for j, bias in enumerate(biases or ()):
        if wanted.coefficients:
            terms = sums * bias.double()
            total[j] += terms if call.recipe.per_channel else terms.sum()
    dbiases = [sums * factor.double() for factor in coefficients] if biases is not None else []
    return kept(Gradients(gradients.weights, total, dbiases), wanted)


def _reference(call: Call) -> Any:
    return reference.BACKEND.kernel(call.op)(*call.operands)


def kept(gradients: Gradients, wanted: Wanted) -> list[Tensor]:
    """The gradients that were wanted, in their order."""
    weights, coefficients, biases = gradients
    found = [gradient for gradient, want in zip(weights, wanted.weights, strict=True) if want]
    found += [coefficients] * wanted.coefficients
    return found + [gradient for gradient, want in zip(biases, wanted.biases, strict=True) if want]


def assert_exact(call: Call, found: Any) -> None:
    """Every element of what an op returned is right but for the order of sums, and the rounding of the result."""
    tensors = [found] if call.wanted is None else kept(found, call.wanted)
    for one, other in zip(tensors, results(call), strict=True):
        assert_near(one, other)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Every element of a tensor is right but for the order of sums, and its rounding."""
    assert found.shape == expected.shape
    if found.numel():
        most = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
        torch.testing.assert_close(
            found.double(), expected, rtol=ROUNDING[found.dtype], atol=3e-5 * most, equal_nan=True
        )
