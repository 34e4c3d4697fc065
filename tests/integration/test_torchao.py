"""torchao on models with replaced layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rl_kernels as rl

pytestmark = pytest.mark.integration


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao", "ignore::FutureWarning:torchao")
def test_merge_comes_before_quantisation() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5))).eval()
    rl.replace(model, rl.plan(model, every=2))
    x = torch.randn(3, 32)
    expected = model(x)
    late = copy.deepcopy(model)
    quantization.quantize_(late, quantization.Int8WeightOnlyConfig())
    for call in (lambda: late(x), lambda: rl.merge(late)):
        with pytest.raises(NotImplementedError, match=r"got torchao\..*Int8Tensor, .* call rl_kernels\.merge before"):
            call()
    quantization.quantize_(rl.merge(model), quantization.Int8WeightOnlyConfig())
    assert float((model(x).detach() - expected.detach()).norm() / expected.detach().norm()) < 0.02
