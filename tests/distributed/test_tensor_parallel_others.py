"""Replaced convolutions, attention and sources alone as DTensors: right, or refused."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torchs
from torch.distributed.tensor.parallel import parallelize_module

from rl_kernels import functional as F
from rl_kernels._supported import release
from rl_kernels.distributed import ColwiseParallel
from rl_kernels.nn import ReplacementLinear, ReplacementMultiheadAttention
from tests.distributed.common import (
    check_same_gradients,
    full,
)
from tests.distributed.conftest import Ranks
from tests.distributed.parallel import Seen, distributed

# Layers for which torch has the rules.


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:  # Of torch's, NotImplementedError among them.
        return str(error)


def check_convolutions(transposed: bool) -> None:
    """Right, or refused: never the wrong numbers that torch's own convolution makes of most placements."""
    mesh = init_device_mesh("cpu", (2,))
    convolution: Any = F.mixed_conv_transpose2d if transposed else F.mixed_conv2d
    filters = (4, 6, 3, 3) if transposed else (6, 4, 3, 3)
    weights = [torch.randn(filters, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mixing = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    message = r"^{}: got shape .* with placements .* over 2 ranks, expected Replicate\(\){}: the convolutions of"
    ops = {"mixed_conv", "mixed_conv_dgrad", "mixed_conv_wgrad"}
    whole = Replicate()
    for of_x, of_weights, of_biases, batch, refused in (
        (whole, whole, whole, 4, None),
        (Shard(0), whole, whole, 4, None),
        (Shard(0), whole, whole, 3, None),
        (Shard(0), whole, whole, 1, "x"),  # Nothing is left for the second rank.
        (Shard(1), whole, whole, 4, "x"),
        (Shard(2), whole, whole, 4, "x"),
        (Shard(3), whole, whole, 4, "x"),
        (Partial(), whole, whole, 4, "x"),
        (whole, Shard(0), Shard(0), 4, "weights\\[0\\]"),
        (Shard(1), Shard(1), whole, 4, "x"),
        (whole, whole, Shard(0), 4, "biases\\[0\\]"),
    ):
        case = (of_x, of_weights, of_biases, batch)
        x = torch.randn(batch, 4, 6, 6, dtype=torch.float64, requires_grad=True)
        expected = convolution(x, weights, mixing, biases, padding=1)
        leaves = [x, *weights, mixing, *biases]
        placements = [of_x, of_weights, of_weights, whole, of_biases, of_biases]
        there = [distributed(mesh, leaf, placement) for leaf, placement in zip(leaves, placements, strict=True)]
        call = functools.partial(convolution, there[0], there[1:3], there[3], there[4:], padding=1)
        if refused:
            found = outcome(call)
            or_rows = r", or Shard\(dim=0\) with a row for every rank" if refused == "x" else ""
            assert isinstance(found, str) and re.match(message.format(refused, or_rows), found), (case, found)
            continue
        dy = torch.randn_like(expected)
        with Seen() as seen:  # The kernels run on what each rank has; no rule of torch's is asked.
            y = call()
            gradients = torch.autograd.grad(y, there, distribute_tensor(dy, mesh, [whole]))
        assert {name for name, _ in seen.calls} == ops, case
        torch.testing.assert_close(full(y), expected)
        for found, truth in zip(gradients, torch.autograd.grad(expected, leaves, dy), strict=True):
            torch.testing.assert_close(full(found), truth, msg=lambda m, c=case: f"{c}: {m}")
    if transposed or release(torch.__version__) < (2, 12):  # torch 2.11 refuses this one, and is wrong elsewhere.
        return
    plain = torch.nn.functional.conv2d(distributed(mesh, x, whole), distributed(mesh, weights[0], Shard(0)))
    assert plain.shape[1] == 6 and plain.full_tensor().shape[1] == 3  # Half of its channels, for all of them.


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_convolutions_are_right_or_refused(ranks: Ranks, transposed: bool) -> None:
    ranks.run(check_convolutions, transposed)


def check_attention() -> None:
    """As torch's own attention of the same placements: right, or refused with the same message."""
    mesh = init_device_mesh("cpu", (2,))
    source, other = (nn.MultiheadAttention(8, 2, batch_first=True).double() for _ in range(2))
    alone = nn.ModuleList([source, ReplacementMultiheadAttention((source, other)), other])
    xs = [torch.randn(3, 4, 8, dtype=torch.float64) for _ in range(2)]
    there = [distribute_tensor(x, mesh, [Replicate()]) for x in xs]
    right = []
    for placement, key, need_weights in itertools.product((Replicate(), Shard(0), Shard(1)), (0, 1), (True, False)):
        model = copy.deepcopy(alone)

        def place(name: str, module: nn.Module, mesh: DeviceMesh, placement: Placement = placement) -> None:
            for key, parameter in list(module.named_parameters(recurse=False)):
                mine = (
                    Replicate()
                    if key == "coefficients" or parameter.dim() <= getattr(placement, "dim", 0)
                    else placement
                )
                module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.data, mesh, [mine])))

        distribute_module(model, mesh, place)

        def run(
            layers: nn.ModuleList, j: int, inputs: list[Tensor], key: int = key, weights: bool = need_weights
        ) -> Tensor:
            layers.zero_grad()
            y = full(layers[j](inputs[0], inputs[key], inputs[key], need_weights=weights)[0])
            y.square().sum().backward()
            return y

        plain, mixed = (outcome(functools.partial(run, model, j, there)) for j in (0, 1))
        if isinstance(mixed, str):
            assert mixed.splitlines()[0] == plain.splitlines()[0]
            continue
        right.append((placement, key, need_weights))
        torch.testing.assert_close(mixed, run(alone, 1, xs))
        check_same_gradients(model, alone)
    served = {(Replicate(), 0, True), (Shard(0), 1, True), (Shard(1), 0, True), (Shard(1), 1, True)}
    # torch 2.11 refuses some of them.
    assert right and (set(right) >= served or release(torch.__version__) < (2, 12)), right


def test_attention_is_right_or_refused_as_torchs_own(ranks: Ranks) -> None:
    ranks.run(check_attention)


# What is refused.


def check_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    prev, last = nn.Linear(6, 8), nn.Linear(6, 8)
    layer = ReplacementLinear.from_neighbours(prev, last)
    for style in (torchs.ColwiseParallel, torchs.RowwiseParallel):
        with pytest.raises(NotImplementedError, match=r"currently only support nn\.Linear and nn\.Embedding"):
            parallelize_module(layer, mesh, style())
    x = torch.randn(3, 6)
    parallelize_module(prev, mesh, ColwiseParallel())
    with pytest.raises(RuntimeError, match=r"^weights\[0\]: got a DTensor where x is none, expected all or none"):
        layer(x)
    parallelize_module(last, mesh, ColwiseParallel())
    replicated = distribute_tensor(x, mesh, [Replicate()])
    with pytest.raises(RuntimeError, match=r"^x: got a DTensor where biases\[0\] is none, expected all or none"):
        F.mixed_linear(replicated, [prev.weight, last.weight], layer.coefficients, [torch.ones(8)] * 2)
    elsewhere = distribute_tensor(x, DeviceMesh("cpu", [1, 0]), [Replicate()])
    words = r"^Cannot run aten\.\S+ on inputs with different meshes|^Cross device mesh comm not supported yet"
    for call in (prev, layer):
        with pytest.raises(RuntimeError, match=words):  # The latter before torch 2.12.
            call(elsewhere)
    parallelize_module(layer, mesh, ColwiseParallel())
    torch.testing.assert_close(layer(x), 0.5 * prev(x) + 0.5 * last(x))


def test_sources_that_are_sharded_alone_raise(ranks: Ranks) -> None:
    ranks.run(check_refused)
