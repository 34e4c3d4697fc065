"""torch.compile: one graph, few compilations, eager's results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from tests.transforms.common import gradients, images, net


def assert_same(model: nn.Module, compiled: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The compiled model's output and gradients are the eager one's."""
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(model, y), gradients(model, expected))


class Pair(nn.Module):
    """The two replaced layers, without the work between them for which Inductor would compile C++."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net.linears[1](self.net.convs[1](x).movedim(1, -1))


def test_inductor() -> None:
    model = Pair()
    with torch._inductor.config.patch({"cpp.simdlen": 1, "compile_threads": 1}):
        assert_same(model, torch.compile(model, fullgraph=True), images())


def test_nothing_is_compiled_again() -> None:
    """Not over optimizer steps, nor for other values, other parameters or another instance; and none of it is stale."""
    counter = CompileCounter()
    model, other, x = net(), net(seed=1), images()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(compiled(x), model(x))
    for zero in (False, True):
        with torch.no_grad():
            other.linears[1].mixing.coefficients[0] *= not zero
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x), other(x))
    model.linears[0].weight = nn.Parameter(torch.zeros(4, 4))
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
    second = net(seed=2)
    torch.testing.assert_close(torch.compile(second, backend=counter, fullgraph=True)(x), second(x))
    assert counter.frame_count == 1


def test_a_compiled_model_trains_as_an_eager_one() -> None:
    states = []
    x = images()
    for compiled in (False, True):
        model = net()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(states[1], states[0])


def test_dynamic_shapes() -> None:
    """One graph for every batch and image size, asked for; two where torch finds out by itself."""
    model = net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch, size in ((3, 6), (5, 6), (2, 9)):
        assert_same(model, compiled, images(batch, size=size))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    counter.clear()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (3, 5, 7):
        assert_same(model, compiled, images(batch))
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model, x = net(), images()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mode():
        torch.testing.assert_close(compiled(x), model(x))
    assert_same(model, compiled, x)


def test_frozen_parameters() -> None:
    """What wants no gradient gets none, compiled as in eager mode."""
    model, x = net(), images()
    model.linears[0].requires_grad_(False)
    model.convs[1].coefficient_module.requires_grad_(False)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).pow(3).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).pow(3).sum().backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()})
    assert found["linears.0.weight"] is None and found["linears.2.weight"] is not None
