"""Averages of a replaced model's parameters over training: EMA and SWA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

import rl_kernels as rl
from rl_kernels.nn import ReplacementLayer
from tests.conversion.common import spread_out
from tests.conversion.toys import ResNet, ViT, image

CLOSE = {"rtol": 1e-6, "atol": 1e-8}  # torch has the averages' weights in float32.
FAR = {"rtol": 1e-4, "atol": 1e-6}


def made(model: nn.Module) -> nn.Module:
    rl.replace(model.double(), rl.plan(model))
    spread_out(model)
    return model


def trained(model: nn.Module, averaged: AveragedModel, steps: int = 4) -> list[dict[str, Tensor]]:
    """Train, average after every step; the parameters after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history


def plain_twin(model: nn.Module, plain: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """``plain`` replaced afresh, with ``values``."""
    twin = rl.replace(plain, rl.plan(plain))
    twin.load_state_dict({**twin.state_dict(), **model.state_dict(), **values})
    return twin


@pytest.mark.parametrize(
    ("multi_avg_fn", "weights"),
    [
        (get_swa_multi_avg_fn(), [0.25] * 4),
        (get_ema_multi_avg_fn(0.9), [0.9**3, 0.1 * 0.9**2, 0.1 * 0.9, 0.1]),
        (None, [0.25] * 4),
    ],
    ids=["SWA", "EMA", "default"],
)
def test_the_average_is_that_of_the_parameters_and_mixes_its_own(multi_avg_fn, weights) -> None:
    model = made(ViT())
    before = copy.deepcopy(model.state_dict())
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    own = {id(parameter) for parameter in averaged.parameters()}
    for layer in averaged.modules():
        if isinstance(layer, ReplacementLayer):
            assert all(id(p) in own for source in layer.sources for p in source.parameters())
            assert all(id(p) in own for p in layer.coefficient_module.parameters())
    history = trained(model, averaged)
    expected = {name: sum(w * values[name] for w, values in zip(weights, history, strict=True)) for name in history[0]}
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], **CLOSE)
    coefficients = "blocks.3.norm1.mixing.coefficients"
    assert not torch.equal(expected[coefficients], before[coefficients])
    x = image()
    twin = plain_twin(model, ViT().double(), expected)
    torch.testing.assert_close(averaged(x), twin(x), **CLOSE)
    assert not torch.allclose(averaged(x), model(x), **FAR)


def test_swa_from_its_schedule_to_the_batch_norms() -> None:
    """As torch's documentation has it: SWALR, averages of every step, and batch statistics at the end."""
    model = made(ResNet())
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    batches = [image() for _ in range(3)]
    history = []
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    update_bn(batches, averaged)
    # The same by hand: the mean parameters in a fresh model, whose batch norms see the batches.
    mean = {name: sum(values[name] for values in history) / len(history) for name in history[0]}
    twin = plain_twin(model, ResNet().double(), mean)
    update_bn(batches, twin)
    assert any(isinstance(module, rl.nn.ReplacementBatchNorm2d) for module in averaged.modules())
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(averaged.module.get_buffer(name), buffer, **CLOSE)
    x = image()
    torch.testing.assert_close(averaged.eval()(x), twin.eval()(x), **CLOSE)
    model.eval()
    assert not torch.allclose(averaged(x), model(x), **FAR)


def test_buffers_are_averaged_where_asked() -> None:
    model = made(ResNet())
    averaged = AveragedModel(model, use_buffers=True)
    path = next(path for path, module in model.named_modules() if isinstance(module, rl.nn.ReplacementBatchNorm2d))
    history = []
    for _ in range(2):
        model(image())
        averaged.update_parameters(model)
        history.append(model.get_submodule(path).running_mean.clone())
    assert not torch.allclose(*history)
    torch.testing.assert_close(averaged.module.get_submodule(path).running_mean, sum(history) / 2)


def test_an_average_is_saved_and_loaded() -> None:
    model = made(ViT())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    trained(model, averaged)
    again = AveragedModel(made(ViT()), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    again.load_state_dict(averaged.state_dict())
    x = image()
    assert torch.equal(again(x), averaged(x))
    assert int(again.n_averaged) == 4
    merged = rl.merge(again.module)
    torch.testing.assert_close(merged(x), averaged(x), rtol=1e-10, atol=1e-12)
