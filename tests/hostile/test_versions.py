"""What a backward will read may not change before it: torch's version counters say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.hostile import BACKENDS, MIXED, PLAIN, SPATIAL, using

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.mul_(2),
    "through a view": lambda t: t.view(-1)[:1].zero_(),
    "by out=": lambda t: torch.add(t, 1, out=t),
    "by assignment": lambda t: t.__setitem__(0, 1.0),
}
NAMES = ("x", "w0", "w1", "c", "b0", "b1")


def arguments(spatial: int) -> dict[str, Tensor]:
    """Of a call, by name."""
    shapes = {
        "x": (2, 5, *(4,) * spatial),
        "w0": (6, 5, *(2,) * spatial),
        "w1": (6, 5, *(2,) * spatial),
        "c": (2,),
        "b0": (6,),
        "b1": (6,),
    }
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


def call(spatial: int, named: dict[str, Tensor]) -> Tensor:
    x, w0, w1, c, b0, b1 = named.values()
    return MIXED[spatial](x, (w0, w1), c, (b0, b1))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_a_change_before_backward_is_caught(kind: str, backend: str, name: str, change: str) -> None:
    named = arguments(SPATIAL[kind])
    with using(backend):
        call(SPATIAL[kind], named).sum().backward()  # Unchanged, it passes.
        y = call(SPATIAL[kind], named)
        with torch.no_grad():
            CHANGES[change](named[name])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_change_before_the_second_backward_is_caught(kind: str, backend: str, name: str) -> None:
    """Of gradients that have a graph of their own."""
    named = arguments(SPATIAL[kind])
    with using(backend):
        gradients = torch.autograd.grad(call(SPATIAL[kind], named).square().sum(), named.values(), create_graph=True)
        with torch.no_grad():
            named[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(gradient.sum() for gradient in gradients).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_a_step_of_an_optimizer_is_caught(kind: str, backend: str) -> None:
    """And so is a change of the buffer of which the sources are views."""
    spatial = SPATIAL[kind]
    named = arguments(spatial)
    optimizer = torch.optim.SGD([named["w1"]], lr=0.1)
    with using(backend):
        y = call(spatial, named)
        y.sum().backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        half = named["w0"].numel()
        flat = torch.randn(2 * half, requires_grad=True)
        weights = [flat[first : first + half].view_as(named["w0"]) for first in (0, half)]
        y = MIXED[spatial](named["x"], weights, named["c"])
        with torch.no_grad():
            flat[-1] = 0.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_what_no_gradient_reads_may_change(kind: str, backend: str) -> None:
    """The output; and x, where nothing but x wants a gradient."""
    spatial = SPATIAL[kind]
    named = arguments(spatial)
    x, w0, w1 = named["x"], named["w0"].detach(), named["w1"].detach()
    (expected,) = torch.autograd.grad(PLAIN[spatial](x, w0 + w1).sum(), x)
    with using(backend):
        y = MIXED[spatial](x, (w0, w1), (1.0, 1.0))
        plain = PLAIN[spatial](x, w0 + w1)
        with torch.no_grad():
            x.mul_(2)
        (dx,) = torch.autograd.grad(y.mul_(3).sum(), x)
    torch.testing.assert_close(dx, 3 * expected)
    if spatial > 0:  # torch's own convolutions keep x all the same, and refuse.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            plain.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_the_output_may_change(kind: str, backend: str) -> None:
    """As by ``nn.ReLU(inplace=True)``; no output is a view of something that a backend allocated."""
    spatial = SPATIAL[kind]
    found = []
    for relu in (torch.relu, torch.relu_):
        torch.manual_seed(0)
        named = arguments(spatial)
        with using(backend):
            y = call(spatial, named)
            assert not y._is_view()
            found.append(torch.autograd.grad(relu(y).square().sum(), named.values()))
            with torch.no_grad():
                y = call(spatial, named)
            y.mul_(torch.ones(1, requires_grad=True))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_in_a_list_are_those_of_the_call(backend: str) -> None:
    """They were copied into one tensor: a change before backward is neither seen nor harmful."""
    x, w0, w1 = torch.randn(2, 5), torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    a = torch.tensor([0.5], requires_grad=True)
    with using(backend):
        y = MIXED[0](x, (w0, w1), (a, 2.0))
        with torch.no_grad():
            a.fill_(9.0)
        y.sum().backward()
    torch.testing.assert_close(w0.grad, 0.5 * x.sum(0).expand(6, 5))
    torch.testing.assert_close(a.grad, (x @ w0.detach().t()).sum().reshape(1))
