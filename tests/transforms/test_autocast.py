"""Mixed precision: autocast over float32 masters, and the gradient scaler."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_kernels import functional as F
from rl_kernels.nn import ReplacementMultiheadAttention
from tests.transforms.common import KINDS, Ops, gradients, images, net, problem

HALVES = (torch.bfloat16, torch.float16)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_near(found: Tensor, expected: Tensor, half: torch.dtype) -> None:
    """Within a few roundings to ``half`` in the norm; and of one dtype."""
    assert found.dtype == expected.dtype
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).norm() / expected.norm())
    assert error < 4 * EPSILON[half], error


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_as_torchs_layers(kind: str, half: torch.dtype) -> None:
    """Half-precision results, float32 gradients of float32 masters, near those of the naive formula."""
    mixed, naive, arguments = problem(kind, torch.float32, requires_grad=True)
    results = []
    for function in (mixed, naive):
        with torch.autocast("cpu", half):
            y = function(*arguments)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        results.append((y, *torch.autograd.grad(y, arguments, dy)))
    assert results[0][0].dtype == half
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, half)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rounding_of_the_mix(kind: str) -> None:
    """No copy of a source is cast: its digits below half precision reach the mix, where they can cancel."""
    x, c, w1, _, b1, _ = problem(kind, torch.float32).arguments
    x, c = torch.ones_like(x), torch.tensor([1.0, -1.0])
    with torch.autocast("cpu", torch.bfloat16), Ops() as ops:
        y = problem(kind).mixed(x, c, w1, w1 + 2**-10, b1, b1)
    assert y.dtype == torch.bfloat16 and float(y.abs().min()) > 0
    # x alone; and of a transposed convolution, whose op has no bias, the mixed one.
    assert ops.seen["aten::_to_copy"] == (2 if kind == "conv_transpose" else 1)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention(need_weights: bool, half: torch.dtype) -> None:
    sources = [nn.MultiheadAttention(8, 2) for _ in range(2)]
    layer = ReplacementMultiheadAttention(sources, init=(1.0, 0.0))
    x = torch.randn(5, 2, 8, requires_grad=True)
    results: list[Any] = []
    for module in (layer, sources[0]):
        with torch.autocast("cpu", half):
            y = module(x, x, x, need_weights=need_weights)[0]
        results.append((y, *torch.autograd.grad(y.float().pow(3).sum(), (x, *sources[0].parameters()))))
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, half)


def test_compiled() -> None:
    model, x = net(), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    found, wanted = gradients(model, y), gradients(model, expected)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert_near(gradient, wanted[name], torch.bfloat16)


def test_the_gradient_scaler_trains() -> None:
    """A scaled step is the unscaled one; a step that overflowed is left out, and the scale shrinks."""
    x = images()
    stepped = []
    for scale in (1.0, 2.0**10):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2 * scale
        stepped.append(model.state_dict())
    for name, value in stepped[0].items():
        assert not torch.equal(value, net().state_dict()[name]), name
        assert_near(stepped[1][name], value, torch.float16)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in (model.linears[0].weight, model.linears[1].mixing.coefficients):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model.linears[1](torch.full((3, 4), 100.0)).float().sum()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        scaler.scale(loss).backward()
        assert parameter.grad is not None and not parameter.grad.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**23
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_float64_stays() -> None:
    mixed, naive, arguments = problem("linear")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixed(*arguments), naive(*arguments))


def test_half_precision_weights_are_cast_too() -> None:
    x, w = torch.randn(4, 6, dtype=torch.bfloat16), torch.randn(4, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert F.mixed_linear(x, (w, w), (0.5, 0.5)).dtype == torch.float16


def test_nested_autocast_and_a_cached_cast() -> None:
    """An inner region in float32, and weights that change between two calls of one region."""
    mixed, naive, arguments = problem("linear", torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(mixed(*arguments), naive(*arguments))
        first = mixed(*arguments)
        with torch.no_grad():
            arguments[2].mul_(2)
        again = mixed(*arguments)
    assert not torch.equal(first, again)
    assert_near(again, naive(*arguments).to(torch.bfloat16), torch.bfloat16)
