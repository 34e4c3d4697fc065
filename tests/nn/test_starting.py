"""Where coefficients start, and how a layer starts anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.nn import Coefficients, ReplacementBatchNorm2d, ReplacementLinear


@pytest.mark.parametrize("constraint", ["free", "convex"])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_built_on_the_meta_device_and_started_anew(constraint: Any, granularity: Any) -> None:
    options: dict[str, Any] = {"init": (0.3, 0.7), "constraint": constraint, "granularity": granularity}
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
        rl.replace(model, rl.plan(model, every=2, **options))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    shape = (2,) if granularity == "scalar" else (2, 8)
    expected = torch.tensor([0.3, 0.7]).reshape(2, *(1,) * (len(shape) - 1)).expand(shape)
    torch.testing.assert_close(model[1].coefficients.detach(), expected)


def test_a_fit_needs_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
        plan = rl.plan(model, every=2, init="fit")
        with pytest.raises(ValueError, match="init: got 'fit' with weights on the meta device"):
            rl.replace(model, plan)
    assert type(model[1]) is nn.Linear


def test_a_fit_within_another_default_device() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.no_grad():
        model[1].weight.copy_(0.25 * model[0].weight + 2 * model[2].weight)
    with torch.device("meta"):
        rl.replace(model, rl.plan(model, every=2, init="fit"))
    torch.testing.assert_close(model[1].coefficients.detach(), torch.tensor([0.25, 2.0]))


def test_what_an_earlier_fold_trained_is_forgotten() -> None:
    norms = [nn.BatchNorm2d(4) for _ in range(2)]
    layer = ReplacementBatchNorm2d(norms, init=(0.2, 0.9))
    layer(torch.randn(3, 4, 2, 2) + 5)
    with torch.no_grad():
        layer.mixing.coefficients.add_(1)
    layer.reset_parameters()
    torch.testing.assert_close(layer.coefficients.detach(), torch.tensor([0.2, 0.9]))
    assert layer.running_mean is not None and not layer.running_mean.any()
    own = ReplacementBatchNorm2d(norms, affine="own")
    with torch.no_grad():
        own.weight.mul_(3)
    own.reset_parameters()
    assert bool((own.weight == 1).all())


def test_a_default_dtype_does_not_round_the_start() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = ReplacementLinear([nn.Linear(4, 4) for _ in range(3)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.coefficients.dtype == torch.float32
    assert layer.coefficients.sum().item() == pytest.approx(1, abs=1e-6)


def test_coefficients_of_an_older_pickle_start_evenly() -> None:
    coefficients = Coefficients(torch.tensor([0.2, 0.9]))
    del coefficients.__dict__["_start"]
    coefficients.reset_parameters()
    torch.testing.assert_close(coefficients().detach(), torch.tensor([0.5, 0.5]))
