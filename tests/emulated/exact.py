"""What the CUDA kernels compute but for the order of their sums: operands rounded as theirs, products in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_kernels.backends import reference

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


def results(op: str, arguments: Sequence[Any]) -> list[Tensor]:
    """Of an op, in float64 and in the order of its schema."""
    if op.endswith("wgrad"):
        return _wgrad(op, *arguments)
    activation, weights, coefficients, *rest = arguments
    weight = [operand(mixed(weights, coefficients))]
    one = torch.ones(1, dtype=torch.float64)
    if not op.endswith("dgrad"):
        rest[0] = rest[0] and [mixed(rest[0], coefficients).double()]
    return [getattr(reference, op)(operand(activation), weight, one, *rest)]


def _wgrad(op: str, dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    weights, coefficients, biases, weights_mask, coefficients_mask, biases_mask, *geometry = arguments
    wide, factors = [weight.double() for weight in weights], coefficients.double()
    masks = weights_mask, coefficients_mask, []
    dweights, total, _ = getattr(reference, op)(operand(dy), operand(x), wide, factors, None, *masks, *geometry)
    sums = dy.double().sum([0, *range(2, dy.dim())])
    for j, bias in enumerate(biases or ()):
        if coefficients_mask:
            terms = sums * bias.double()
            total[j] += terms if coefficients.dim() == 2 else terms.sum()
    dbiases = [sums * factor for factor, wanted in zip(factors, biases_mask, strict=False) if wanted]
    gradients = [g for g, wanted in zip(dweights, weights_mask, strict=True) if wanted]
    return [*gradients, *[total] * coefficients_mask, *dbiases]


def assert_exact(op: str, arguments: Sequence[Any], found: Any) -> None:
    """Every element of what an op returned is right but for the order of sums, and the rounding of the result."""
    if op.endswith("wgrad"):
        weights_mask, coefficients_mask, biases_mask = arguments[5:8]
        dweights, dcoefficients, dbiases = found
        found = [g for g, wanted in zip(dweights, weights_mask, strict=True) if wanted]
        found += [dcoefficients] * coefficients_mask
        found += [g for g, wanted in zip(dbiases, biases_mask, strict=True) if wanted]
    else:
        found = [found]
    for one, other in zip(found, results(op, arguments), strict=True):
        assert_near(one, other)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """The same, for one tensor."""
    assert found.shape == expected.shape
    if found.numel():
        most = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
        torch.testing.assert_close(
            found.double(), expected, rtol=ROUNDING[found.dtype], atol=3e-5 * most, equal_nan=True
        )
