"""Coefficients as Python floats in compiled functions: one more graph when they first change, as of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels import functional as F

X, IMAGES, QUERY = torch.randn(2, 8), torch.randn(1, 8, 6, 6), torch.randn(3, 2, 8)
MATRICES = [torch.randn(8, 8) for _ in range(2)]
FILTERS = [torch.randn(8, 8, 3, 3) for _ in range(2)]
PACKED = [torch.randn(24, 8) for _ in range(2)]


def attention(c: Any) -> Tensor:
    inward, outward = (PACKED, None, None, None, False, 0.0), (MATRICES, None)
    return F.mixed_multi_head_attention(QUERY, QUERY, QUERY, 8, 2, *inward, *outward, coefficients=c)[0]


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda c: F.mixed_linear(X, MATRICES, c),
    "linear in float64": lambda c: F.mixed_linear(X.double(), [w.double() for w in MATRICES], c),
    "conv": lambda c: F.mixed_conv2d(IMAGES, FILTERS, c),
    "transposed conv": lambda c: F.mixed_conv_transpose2d(IMAGES, FILTERS, c),
    "mix": lambda c: F.mix(MATRICES, c),
    "attention": attention,
    "plain torch": lambda c: X @ (c[0] * MATRICES[0] + c[1] * MATRICES[1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_two_graphs_for_any_number_of_values(name: str) -> None:
    graphs = 0

    def backend(module: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(CALLS[name], backend=backend, fullgraph=True)
    for i in range(12):
        coefficients = [0.01 + 0.1 * i, 1 - 0.1 * i]
        torch.testing.assert_close(compiled(coefficients), CALLS[name](coefficients))
    assert graphs == 2
