"""Replaced layers whose sources are sharded over several processes: by columns, by rows, or not at all."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from rl_kernels import functional as F
from rl_kernels._supported import release
from rl_kernels.distributed import ColwiseParallel, RowwiseParallel, shard
from rl_kernels.nn import ReplacementLinear
from tests.conversion.toys import sequential
from tests.distributed import test_fsdp
from tests.distributed.common import (
    backward_of_both,
    batches,
    check_same_gradients,
    check_same_values,
    full,
    loss,
    mesh_of,
    replaced,
)
from tests.distributed.conftest import Ranks
from tests.distributed.parallel import Mlp, PostNorm, PreNorm, Seen, WithoutBias, distributed, fits, parallel


def check_training(block: type[Mlp], **options: Any) -> None:
    """Two steps of AdamW: outputs, gradients and parameters are those of one process."""
    mesh = init_device_mesh("cpu", (2,))
    model, _ = replaced(nn.Sequential(*(block() for _ in range(5))), every=3, **options)
    alone = copy.deepcopy(model)
    parallel(model, mesh)
    assert block in (PreNorm, PostNorm) or all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model[0].up.weight.to_local().shape == (4, 6) and model[0].down.weight.to_local().shape == (6, 4)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, alone)]
    for x, _ in batches(2, 3, 6):
        y = model(x)
        assert not isinstance(y, DTensor)
        torch.testing.assert_close(y, alone(x), rtol=1e-10, atol=1e-12)
        loss(model, x).backward()
        loss(alone, x).backward()
        check_same_gradients(model, alone)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        check_same_values(model, alone)


@pytest.mark.parametrize("block", [Mlp, WithoutBias, PreNorm, PostNorm])
@pytest.mark.parametrize(
    "options", [{}, {"share": "layer", "constraint": "convex"}, {"granularity": "channel"}, {"detach": (0,)}], ids=str
)
def test_an_mlp_sharded_by_columns_then_rows_trains_as_in_one_process(
    ranks: Ranks, block: type[Mlp], options: dict[str, Any]
) -> None:
    ranks.run(check_training, block, **options)


def check_kernels_get_shards() -> None:
    """The ops run on the local shards, forward and backward: no mixed weight is made, not even of a shard."""
    mesh = init_device_mesh("cpu", (2,))
    model, _ = replaced(nn.Sequential(*(Mlp() for _ in range(3))), every=2)
    parallel(model, mesh)
    (x, _), *_ = batches(1, 3, 6)
    with Seen() as seen:
        loss(model, x).backward()
    up, down = (4, 6), (6, 4)
    assert seen.calls[:2] == [("mixed_linear", up), ("mixed_linear", down)]
    assert sorted(seen.calls[2:]) == [
        ("mixed_linear_dgrad", up),
        ("mixed_linear_dgrad", down),
        ("mixed_linear_wgrad", up),
        ("mixed_linear_wgrad", down),
    ]


def test_the_kernels_run_on_local_shards(ranks: Ranks) -> None:
    ranks.run(check_kernels_get_shards)


LAYOUTS: list[tuple[Placement, Placement, Placement, bool]] = [
    # x, weights, biases, and whether the kernels take it as it lies
    (Replicate(), Shard(0), Shard(0), True),
    (Shard(2), Shard(1), Replicate(), True),
    (Replicate(), Replicate(), Replicate(), True),
    (Shard(0), Replicate(), Replicate(), True),
    (Shard(1), Replicate(), Replicate(), True),
    (Shard(2), Shard(0), Shard(0), False),
    (Shard(0), Shard(0), Replicate(), False),
    (Replicate(), Shard(1), Shard(0), False),
    (Shard(2), Replicate(), Shard(0), False),
]


def check_layouts(per_channel: bool, features: int, out: int, ranks: int = 2) -> None:
    """Any placements: values and gradients are those of one process."""
    mesh = mesh_of(ranks)
    if mesh.get_coordinate() is None:
        return
    x = torch.randn(2 * ranks, 6, features, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(out, features, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(out, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    coefficients = torch.randn(*((2, out) if per_channel else (2,)), dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2 * ranks, 6, out, dtype=torch.float64)
    for with_biases in (True, False):
        leaves = [x, *weights, coefficients, *(biases if with_biases else ())]
        expected = F.mixed_linear(x, weights, coefficients, biases if with_biases else None)
        gradients = torch.autograd.grad(expected, leaves, dy)
        for of_x, of_weights, of_biases, on_shards in LAYOUTS:
            there = distributed(mesh, x, of_x)
            sources = [distributed(mesh, weight, of_weights) for weight in weights]
            offsets = [distributed(mesh, bias, of_biases) for bias in biases] if with_biases else None
            mixing = distributed(mesh, coefficients, Replicate())
            with Seen() as seen:
                y = F.mixed_linear(there, sources, mixing, offsets)
                found = torch.autograd.grad(
                    y, [there, *sources, mixing, *(offsets or ())], distribute_tensor(dy, mesh, [Replicate()])
                )
            case = (of_x, of_weights, of_biases if with_biases else None)
            assert isinstance(y, DTensor), case
            torch.testing.assert_close(full(y), expected, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
            for gradient, truth in zip(found, gradients, strict=True):
                torch.testing.assert_close(
                    full(gradient), truth, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}"
                )
            if with_biases:
                assert bool(seen.calls) == (on_shards and fits(of_x, there) and fits(of_weights, sources[0])), case


# Features that two ranks cannot halve, or that leave the second rank none.
@pytest.mark.parametrize(("features", "out"), [(7, 9), (1, 1)])
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
def test_every_layout_has_the_gradients_of_one_process(
    ranks: Ranks, per_channel: bool, features: int, out: int
) -> None:
    ranks.run(check_layouts, per_channel, features, out)


def check_unequal_placements() -> None:
    """Sources that are not sharded alike, and coefficients that are sharded."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    weights = [torch.randn(10, 8, dtype=torch.float64) for _ in range(2)]
    biases = [torch.randn(10, dtype=torch.float64) for _ in range(2)]
    alike = (Shard(0),) * 4
    for shape, of_coefficients, of_sources in (
        ((2,), Replicate(), (Shard(0), Shard(1), Shard(0), Shard(0))),
        ((2,), Replicate(), (Shard(0), Replicate(), Shard(0), Shard(0))),
        ((2,), Replicate(), (Shard(0), Shard(0), Shard(0), Replicate())),
        ((2, 10), Shard(1), alike),
    ):
        mixing = torch.randn(*shape, dtype=torch.float64)
        leaves = [tensor.requires_grad_() for tensor in (x, mixing, *weights, *biases)]
        placements = (Replicate(), of_coefficients, *of_sources)
        there = [distributed(mesh, leaf, placement) for leaf, placement in zip(leaves, placements, strict=True)]
        expected = F.mixed_linear(x, weights, mixing, biases)
        y = F.mixed_linear(there[0], there[2:4], there[1], there[4:])
        case = (shape, *placements)
        torch.testing.assert_close(full(y), expected, msg=lambda m, c=case: f"{c}: {m}")
        dy = torch.randn_like(expected)
        found = torch.autograd.grad(y, there, distribute_tensor(dy, mesh, [Replicate()]))
        for gradient, truth in zip(found, torch.autograd.grad(expected, leaves, dy), strict=True):
            torch.testing.assert_close(full(gradient), truth, msg=lambda m, c=case: f"{c}: {m}")
    there[1] = distributed(mesh, mixing, Shard(0))
    with pytest.raises(RuntimeError, match="Attempted to unbind along the sharded dimension 0"):
        F.mixed_linear(there[0], there[2:4], there[1], there[4:])


def test_sources_that_are_not_sharded_alike(ranks: Ranks) -> None:
    ranks.run(check_unequal_placements)


def check_styles_layouts() -> None:
    """What goes in and comes out is laid out as the styles are told, as torch's styles do."""
    mesh = init_device_mesh("cpu", (2,))
    prev, last = nn.Linear(6, 8).double(), nn.Linear(6, 8).double()
    mixed = ReplacementLinear.from_neighbours(prev, last)
    alone = copy.deepcopy(nn.ModuleList([prev, mixed, last]))
    x, dy = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    styles: list[tuple[type, dict[str, Any], Placement, Placement]] = [
        (ColwiseParallel, {}, Replicate(), Shard(1)),
        (ColwiseParallel, {"input_layouts": Shard(0), "output_layouts": Replicate()}, Shard(0), Replicate()),
        (RowwiseParallel, {}, Shard(1), Replicate()),
        (RowwiseParallel, {"input_layouts": Replicate(), "output_layouts": Shard(0)}, Replicate(), Shard(0)),
    ]
    for style, options, of_x, of_y in styles:
        layers = copy.deepcopy(alone)
        for layer in layers:
            parallelize_module(layer, mesh, style(**options))
        for j in (0, 1):
            case = (style, options, j)
            layers.zero_grad()
            alone.zero_grad()
            expected = alone[j](x)
            expected.backward(dy)
            given = distribute_tensor(x.detach(), mesh, [of_x]).to_local().requires_grad_()
            with Seen() as seen:
                y = layers[j](given)
                y.backward(distribute_tensor(dy, mesh, [of_y]).to_local())
            # On shards, also where styles communicate before and after.
            assert len(seen.calls) == 3 * j, case
            truth = distribute_tensor(expected.detach(), mesh, [of_y]).to_local()
            torch.testing.assert_close(y, truth, msg=lambda m, c=case: f"{c}: {m}")
            check_same_gradients(layers, alone)


def test_layouts_of_the_styles(ranks: Ranks) -> None:
    ranks.run(check_styles_layouts)


def check_uneven_batch() -> None:
    """Where torch's own linear layer fails on a batch that two ranks cannot halve, this one fails alike."""
    mesh = init_device_mesh("cpu", (2,))
    x = distributed(mesh, torch.randn(3, 5, 7), Shard(0))
    weight = distributed(mesh, torch.randn(8, 7), Shard(0))
    coefficients = distributed(mesh, torch.ones(2), Replicate())
    words = r"^(Cannot|Attempted to) flatten unevenly sharded"  # The latter before torch 2.12.
    with pytest.raises(RuntimeError, match=words):
        torch.nn.functional.linear(x, weight)
    with pytest.raises(RuntimeError, match=words):
        F.mixed_linear(x, (weight, weight), coefficients)


def test_an_uneven_batch_and_sharded_weights(ranks: Ranks) -> None:
    ranks.run(check_uneven_batch)


def check_pending_sums() -> None:
    """An input that is a sum still to be taken is summed first."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(3, 7, dtype=torch.float64)
    weights = [torch.randn(9, 7, dtype=torch.float64) for _ in range(2)]
    pending = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    for placement in (Shard(0), Shard(1), Replicate()):
        sources = [distributed(mesh, weight, placement) for weight in weights]
        for mixing in (distributed(mesh, torch.tensor([0.5, 2.0]).double(), Replicate()), (0.5, 2.0)):
            y = F.mixed_linear(pending, sources, mixing)
            torch.testing.assert_close(
                full(y), F.mixed_linear(2 * x, weights, (0.5, 2.0)), msg=lambda m, p=placement: f"{p}: {m}"
            )


def test_an_input_that_is_still_to_be_summed(ranks: Ranks) -> None:
    ranks.run(check_pending_sums)


def check_compiled() -> None:
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2,))
    model, _ = replaced(nn.Sequential(*(PreNorm() for _ in range(3))), every=2)
    alone = copy.deepcopy(model)
    parallel(model, mesh)
    (x, _), *_ = batches(1, 3, 6)
    loss(torch.compile(model, backend="aot_eager"), x).backward()
    loss(alone, x).backward()
    check_same_gradients(model, alone)


def test_compiled(ranks: Ranks) -> None:
    ranks.run(check_compiled)


# Three ranks and four.


def check_uneven_mlp() -> None:
    """Features that three ranks cannot divide, handed on as DTensors: with local outputs torch's own layers fail."""
    mesh = mesh_of(3)
    model, _ = replaced(nn.Sequential(*(Mlp() for _ in range(3))), every=2, granularity="channel")
    plain = nn.Sequential(Mlp()).double()
    if mesh.get_coordinate() is None:
        return
    alone = copy.deepcopy(model)
    (x, _), *_ = batches(1, 3, 6)
    parallel(plain, mesh)
    with pytest.raises(RuntimeError, match=r"^a and b must have same reduction dim"):
        plain(x)
    parallel(model, mesh, use_local_output=False)
    torch.testing.assert_close(model(x), alone(x), rtol=1e-10, atol=1e-12)
    loss(model, x).backward()
    loss(alone, x).backward()
    check_same_gradients(model, alone)


def check_fsdp_over_tensor_parallel(block: type[Mlp], **options: Any) -> None:
    """Two pairs of ranks, each with a batch: two steps are those of one process that sees both."""
    mesh = mesh_of(2, 2)
    model, plan = replaced(nn.Sequential(*(block() for _ in range(5))), every=3, **options)
    alone = copy.deepcopy(model)
    parallel(model, mesh["inner"])
    shard(model, plan, units=model, mesh=mesh["outer"])
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, alone)]
    for step in batches(2, 3, 6):
        with Seen() as seen:
            loss(model, step[mesh.get_local_rank("outer")]).backward()
        assert set(seen.calls[:2]) == {("mixed_linear", (4, 6)), ("mixed_linear", (6, 4))}
        backward_of_both(alone, step)
        check_same_gradients(model, alone)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        check_same_values(model, alone)


def check_mesh_of_two_dimensions() -> None:
    """DTensors sharded over both dimensions of one mesh."""
    mesh = mesh_of(2, 2)
    x, dy = torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 6, 10, dtype=torch.float64)
    weights = [torch.randn(10, 8, dtype=torch.float64) for _ in range(2)]
    mixing = torch.tensor([0.5, 2.0], dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights, mixing)]
    expected = F.mixed_linear(x, weights, mixing)
    gradients = torch.autograd.grad(expected, leaves, dy)
    whole = [Replicate(), Replicate()]
    for of_x, of_weights in (([Shard(0), Replicate()], [Replicate(), Shard(0)]), ([Shard(0), Shard(1)], whole)):
        placements = [of_x, of_weights, of_weights, whole]
        there, first, second, coefficients = (
            distribute_tensor(leaf.detach(), mesh, p).requires_grad_()
            for leaf, p in zip(leaves, placements, strict=True)
        )
        # The last are those of a layer that is not distributed.
        for factors in (coefficients, mixing):
            y = F.mixed_linear(there, [first, second], factors)
            torch.testing.assert_close(full(y), expected)
            found = torch.autograd.grad(y, [there, first, second, factors], distribute_tensor(dy, mesh, whole))
            for gradient, truth in zip(found, gradients, strict=True):
                torch.testing.assert_close(full(gradient), truth)


def test_three_ranks_and_two_pairs_of_ranks(four_ranks: Ranks) -> None:
    # One test, since its processes take longer to start than it takes.
    four_ranks.run(check_fsdp_over_tensor_parallel, Mlp)
    four_ranks.run(check_fsdp_over_tensor_parallel, PreNorm, constraint="convex")
    if release(torch.__version__) >= (2, 12):  # torch 2.11 refuses to view what is sharded on two dimensions.
        four_ranks.run(check_mesh_of_two_dimensions)
    four_ranks.run(check_uneven_mlp)
    for per_channel in (False, True):
        four_ranks.run(check_layouts, per_channel, 7, 8, ranks=3)
    four_ranks.run(test_fsdp.check_training, functools.partial(sequential, width=5), (4, 3), True, (3,), every=2)
