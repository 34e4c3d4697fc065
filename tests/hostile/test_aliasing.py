"""Sources that share memory: with one another, with x, with the coefficients, or all in one flat buffer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.hostile import BACKENDS, MIXED, PLAIN, SPATIAL, converted, plain_mix, train, using

MIXES = {"scalar": (3,), "channel": (3, 6)}


def shapes(spatial: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of x and of a weight."""
    return (2, 5, *(4,) * spatial), (6, 5, *(2,) * spatial)


def check(
    spatial: int,
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    biases: Sequence[Tensor] | None,
    leaves: Sequence[Tensor],
) -> None:
    """Values, and the gradients of ``leaves``, of which the arguments are views, against plain torch's."""
    bias = None if biases is None else plain_mix(biases, coefficients)
    plain = PLAIN[spatial](x, plain_mix(weights, coefficients), bias)
    dy = torch.randn(plain.shape, dtype=plain.dtype)
    with using(backend):
        y = MIXED[spatial](x, weights, coefficients, biases)
        found = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        y.backward(dy)
    torch.testing.assert_close(y, plain)
    for leaf, one, other in zip(leaves, found, torch.autograd.grad(plain, leaves, dy), strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(leaf.grad, other)


@pytest.mark.parametrize("granularity", MIXES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_one_source_in_several_places(kind: str, backend: str, granularity: str) -> None:
    """The first and the last are one parameter, as in a chain that closes; so are their biases."""
    spatial = SPATIAL[kind]
    x_shape, shape = shapes(spatial)
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    w, other = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    b, other_b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    c = torch.randn(MIXES[granularity], dtype=torch.float64, requires_grad=True)
    check(spatial, backend, x, (w, other, w), c, (b, other_b, b), (x, w, other, c, b, other_b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SPATIAL)
def test_views_that_overlap(kind: str, backend: str) -> None:
    """Where they overlap, their gradients sum."""
    spatial = SPATIAL[kind]
    x_shape, shape = shapes(spatial)
    numel = torch.Size(shape).numel()
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    flat = torch.randn(numel + 11, dtype=torch.float64, requires_grad=True)
    weights = [flat[first : first + numel].view(shape) for first in (0, 3, 11)]
    biases = [flat[first : first + 6] for first in (0, 2, 5)]
    check(spatial, backend, x, weights, flat[7:10], biases, (x, flat))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", MIXES)
@pytest.mark.parametrize("kind", SPATIAL)
def test_everything_in_one_buffer(kind: str, granularity: str, backend: str) -> None:
    """As FSDP unshards it: one flat parameter, of which every argument is a view, at odd places."""
    spatial = SPATIAL[kind]
    x_shape, shape = shapes(spatial)
    places = [x_shape, MIXES[granularity], *[shape] * 3, *[(6,)] * 3]
    sizes = [torch.Size(place).numel() for place in places]
    flat = nn.Parameter(torch.randn(1 + sum(sizes), dtype=torch.float64))
    x, c, w0, w1, w2, *biases = (part.view(place) for part, place in zip(flat[1:].split(sizes), places, strict=True))
    check(spatial, backend, x, (w0, w1, w2), c, biases, (flat,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_and_its_transpose(backend: str) -> None:
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, dtype=torch.float64, requires_grad=True)
    check(0, backend, torch.randn(3, 5, dtype=torch.float64), (w, w.t()), c, None, (w, c))


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_that_is_a_source(backend: str) -> None:
    w, other = (torch.randn(5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    c = torch.randn(2, dtype=torch.float64, requires_grad=True)
    check(0, backend, w, (w, other), c, (w[0], w[:, 1]), (w, other, c))


@pytest.mark.parametrize("kind", ["resnet", "encoder"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flattening_optimizer(backend: str, kind: str) -> None:
    """Parameters and gradients become views of two flat buffers: gradients must arrive there, and the bits be those of
    an optimizer that flattens nothing."""
    model, x = converted(kind)
    twin = copy.deepcopy(model)
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    for parameter, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    optimizer = torch.optim.SGD([flat], lr=0.05, momentum=0.9)
    with using(backend):
        for _ in range(3):
            flat.grad.zero_()
            model(x).square().mean().backward()
            optimizer.step()
        expected = train(twin, x)[3:]
    for parameter, grad, other in zip(parameters, flat.grad.split(sizes), expected, strict=True):
        assert parameter.grad is not None and parameter.grad.data_ptr() == grad.data_ptr()
        torch.testing.assert_close(parameter.detach(), other)
