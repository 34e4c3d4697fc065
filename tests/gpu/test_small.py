"""A small training step of each kind of layer: what the sanitizer watches (``compute-sanitizer python -m pytest``)."""

from __future__ import annotations

import pytest
import torch

import rl_kernels as rl
from tests.ops.test_accumulation import KINDS, Layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_step(name: str, kind: str, dtype: torch.dtype) -> None:
    layer = Layer(kind, dtype, "cuda")
    with rl.use_backend(name):
        layer.backward()
        with rl.accumulate_into_grad():
            layer.backward()
    found = [p.grad for p in layer.parameters]
    for p in layer.parameters:
        p.grad = None
    with rl.use_backend("reference"):
        layer.backward()
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-2 if name == "cuda" else 1e-4  # tf32
    for gradient, p in zip(found, layer.parameters, strict=True):
        torch.testing.assert_close(gradient, 2 * p.grad, rtol=tolerance, atol=10 * tolerance)
