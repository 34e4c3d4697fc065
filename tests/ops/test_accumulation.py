"""Gradients of the sources added straight to where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.backends import registered, selection
from rl_kernels.ops.ways import plain_torch
from tests.backends.planted import Planted

BACKENDS = [backend.name for backend in registered()]


class Layer:
    """A call of one kind of layer, on leaves."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "linear": ((5, 7), (6, 7)),
            "conv2d": ((2, 5, 6, 4), (6, 5, 3, 2)),
            "pointwise": ((2, 5, 3, 4), (6, 5, 1, 1)),
            "depthwise": ((2, 6, 5, 4), (6, 1, 2, 3)),
        }
        x, weight = shapes[kind]
        self.kind, self.groups = kind, 6 if kind == "depthwise" else 1
        self.x = torch.randn(x).to(device, dtype)
        if kind == "pointwise":
            self.x = self.x.to(memory_format=torch.channels_last)
        self.weights = [nn.Parameter(torch.randn(weight).to(device, dtype)) for _ in range(2)]
        self.biases = [nn.Parameter(torch.randn(6).to(device, dtype)) for _ in range(2)]
        self.coefficients = nn.Parameter(torch.tensor([0.7, -1.3], device=device))

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases, self.coefficients]

    def __call__(self) -> Tensor:
        if self.kind == "linear":
            return rl.functional.mixed_linear(self.x, self.weights, self.coefficients, self.biases)
        groups = {"groups": self.groups}
        return rl.functional.mixed_conv2d(self.x, self.weights, self.coefficients, self.biases, **groups)

    def backward(self) -> None:
        y = self()
        y.backward(torch.linspace(-1, 1, y.numel()).to(y).view_as(y))


KINDS = ("linear", "conv2d", "pointwise", "depthwise")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_autograd_would(backend: str, kind: str) -> None:
    """In the same tensors, over three micro-batches; a frozen source is left alone."""
    layer = Layer(kind)
    with rl.use_backend(backend):
        layer.backward()
        layer.backward()
        layer.backward()
        expected = [p.grad for p in layer.parameters]
        for p in layer.parameters:
            p.grad = None
        with rl.accumulate_into_grad():
            layer.backward()
            buffers = [p.grad for p in layer.parameters]
            layer.backward()
            layer.backward()
        for p, buffer, truth in zip(layer.parameters, buffers, expected, strict=True):
            assert p.grad is buffer
            torch.testing.assert_close(buffer, truth)
        before = layer.weights[0].grad.clone()
        layer.weights[0].requires_grad_(False)
        with rl.accumulate_into_grad():
            layer.backward()
        assert torch.equal(layer.weights[0].grad, before)
        torch.testing.assert_close(layer.weights[1].grad, expected[1] * 4 / 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad(backend: str, kind: str) -> None:
    """In float32 beside bfloat16 weights: what is added is not rounded where the kernel adds it itself."""
    layer = Layer(kind, torch.bfloat16)
    with rl.use_backend(backend):
        layer.backward()
        expected = [p.grad.float() for p in layer.weights]
        for p in layer.weights:
            p.grad, p.main_grad = None, torch.ones_like(p, dtype=torch.float32)
        with rl.accumulate_into_grad():
            layer.backward()
    for p, truth in zip(layer.weights, expected, strict=True):
        assert p.grad is None
        torch.testing.assert_close(p.main_grad, truth + 1, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_source_twice(backend: str) -> None:
    layer = Layer("linear")
    layer.weights[1] = layer.weights[0]
    with rl.use_backend(backend):
        layer.backward()
        expected = 2 * layer.weights[0].grad
        with rl.accumulate_into_grad():
            layer.backward()
    torch.testing.assert_close(layer.weights[0].grad, expected)


def test_no_gradient_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that can add is given the buffers themselves."""
    given: list[list[Tensor | None]] = []
    streamed = next(backend for backend in registered() if backend.name == "streamed")

    def adding(*arguments: object, into: list[Tensor | None]) -> object:
        given.append(into)
        weights, *others = streamed.kernel("mixed_linear_wgrad")(*arguments)
        return [g if buffer is None else buffer.add_(g) for g, buffer in zip(weights, into, strict=True)], *others

    kernels = {op: streamed.kernel(op) for op in streamed.kernels}
    backend = Planted({**kernels, "mixed_linear_wgrad": adding}, "adding", accumulates=True)
    monkeypatch.setattr(selection, "_backends", {"adding": backend, **selection._backends})
    layer = Layer("linear")
    seen = []
    layer.weights[0].register_hook(seen.append)
    with rl.use_backend("adding"), rl.accumulate_into_grad():
        layer.weights[0].grad = torch.zeros(6, 7)
        layer.backward()
    assert [buffer is None for buffer in given[0]] == [False, True]
    assert given[0][0] is not None and given[0][0].data_ptr() == layer.weights[0].grad.data_ptr()
    assert seen in ([], [None])
    assert layer.weights[0].grad.any() and layer.weights[1].grad is not None


def test_a_comparison_within_leaves_it_on() -> None:
    """And it leaves on a comparison around it: both keep the C++ fast path from calls."""
    layer = Layer("linear")
    layer()  # From the first call on the fast path serves.
    for p in layer.weights:
        p.main_grad = torch.zeros_like(p)
    with rl.accumulate_into_grad():
        with plain_torch():
            layer()
        layer.backward()
    assert all(p.grad is None and bool(p.main_grad.any()) for p in layer.weights)
    with plain_torch():
        with rl.accumulate_into_grad():
            layer()
        assert layer().grad_fn.name() == "AddmmBackward0"


def test_what_autograd_has_to_see_takes_the_usual_way() -> None:
    layer = Layer("linear")
    layer.backward()
    with rl.accumulate_into_grad():
        (dw,) = torch.autograd.grad(layer().square().sum(), layer.weights[0], create_graph=True)
        dw.square().sum().backward()
    assert dw.requires_grad


@pytest.mark.parametrize("place", [torch.zeros(7, 6), torch.zeros(6, 7, dtype=torch.float64), 3])
def test_a_bad_main_grad_is_named(place: object) -> None:
    layer = Layer("linear")
    layer.weights[1].main_grad = place
    message = r"weights\[1\].main_grad: got .*, expected a tensor of shape \(6, 7\) on cpu, float32"
    with rl.accumulate_into_grad(), pytest.raises(ValueError, match=message):
        layer.backward()
    assert all(p.grad is None for p in layer.parameters)
