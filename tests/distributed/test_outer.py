"""``Outer`` coefficients of layers that several processes share."""

from __future__ import annotations

import itertools

import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rl_kernels as rl
from rl_kernels import functional as F
from tests.distributed.common import full, mesh_of
from tests.distributed.conftest import Ranks
from tests.distributed.parallel import Seen, distributed, fits
from tests.distributed.test_tensor_parallel import LAYOUTS


def check_linear(features: int, out: int, plain_coefficients: bool) -> None:
    """Any placements: values and gradients are those of one process."""
    mesh, dtype = mesh_of(2), torch.float64
    x = torch.randn(4, 6, features, dtype=dtype, requires_grad=True)
    weights = [torch.randn(out, features, dtype=dtype, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(out, dtype=dtype, requires_grad=True) for _ in range(2)]
    parts = [torch.randn(2, 3, length, dtype=dtype, requires_grad=True) for length in (out, features)]
    dy = torch.randn(4, 6, out, dtype=dtype)
    for with_biases, (of_x, of_weights, of_biases, on_shards) in itertools.product((True, False), LAYOUTS):
        given = biases if with_biases else []
        expected = F.mixed_linear(x, weights, rl.Outer(*parts), given or None)
        truths = torch.autograd.grad(expected, [x, *weights, *parts, *given], dy)
        there = distributed(mesh, x, of_x)
        sources = [distributed(mesh, weight, of_weights) for weight in weights]
        offsets = [distributed(mesh, bias, of_biases) for bias in given]
        mixing = parts if plain_coefficients else [distributed(mesh, part, Replicate()) for part in parts]
        with Seen() as seen:
            y = F.mixed_linear(there, sources, rl.Outer(*mixing), offsets or None)
            dy_there = distribute_tensor(dy, mesh, [Replicate()])
            found = torch.autograd.grad(y, [there, *sources, *mixing, *offsets], dy_there)
        case = (of_x, of_weights, of_biases if with_biases else None)
        torch.testing.assert_close(full(y), expected, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
        for gradient, truth in zip(found, truths, strict=True):
            torch.testing.assert_close(full(gradient), truth, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
        if with_biases:
            assert bool(seen.calls) == (on_shards and fits(of_x, there) and fits(of_weights, sources[0])), case


def test_linear(ranks: Ranks) -> None:
    ranks.run(check_linear, 8, 10, False)
    ranks.run(check_linear, 8, 10, True)  # As the layers of a block share theirs.
    ranks.run(check_linear, 7, 9, False)  # Which two ranks cannot halve.


def check_conv() -> None:
    mesh, dtype = mesh_of(2), torch.float64
    x = torch.randn(4, 4, 6, 5, dtype=dtype, requires_grad=True)
    weights = [torch.randn(6, 2, 3, 3, dtype=dtype, requires_grad=True) for _ in range(2)]
    parts = [torch.randn(2, 3, length, dtype=dtype, requires_grad=True) for length in (6, 18)]
    expected = F.mixed_conv2d(x, weights, rl.Outer(*parts), groups=2)
    dy = torch.randn_like(expected)
    truths = torch.autograd.grad(expected, [x, *weights, *parts], dy)
    there = [distributed(mesh, x, Shard(0)), *(distributed(mesh, each, Replicate()) for each in (*weights, *parts))]
    y = F.mixed_conv2d(there[0], there[1:3], rl.Outer(*there[3:]), groups=2)
    torch.testing.assert_close(full(y), expected)
    found = torch.autograd.grad(y, there, distribute_tensor(dy, mesh, [Shard(0)]))
    for gradient, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(full(gradient), truth)


def test_conv_whose_batch_is_shared(ranks: Ranks) -> None:
    ranks.run(check_conv)
