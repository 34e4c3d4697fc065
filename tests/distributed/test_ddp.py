"""Replaced models under DistributedDataParallel on two processes, held against the same model in one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rl_kernels as rl
from tests.conversion.toys import ResNet, ViT
from tests.distributed.common import (
    backward_of_both,
    batches,
    check_same_gradients,
    check_same_values,
    loss,
    replaced,
)
from tests.distributed.conftest import Ranks

IMAGES = (2, 3, 8, 8)


class Branching(nn.Module):
    """A model that leaves out its last block for every other batch: a replaced layer's source, used or not."""

    def __init__(self, model: ViT):
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.model.patches(x).flatten(2).transpose(1, 2)
        for block in self.model.blocks[: len(self.model.blocks) - self.calls % 2]:
            x = block(x)
        return self.model.head(x.mean(1))


def check_training(
    make: Callable[[], nn.Module],
    options: dict[str, Any],
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    **of_ddp: Any,
) -> None:
    """Three steps of SGD: gradients and parameters are those of one process that sees both batches."""
    model, _ = replaced(make(), **options)
    alone = copy.deepcopy(model)
    if wrap is not None:
        model, alone = wrap(model), wrap(alone)
    parallel = DistributedDataParallel(model, broadcast_buffers=False, **of_ddp)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (parallel, alone)]
    for step in batches(3, *IMAGES):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(parallel, step[dist.get_rank()]).backward()
        if isinstance(alone, Branching):
            alone.calls = model.calls - 1
            (loss(alone, step[0]) / 2).backward()
            alone.calls = model.calls - 1
            (loss(alone, step[1]) / 2).backward()
        else:
            backward_of_both(alone, step)
        check_same_gradients(parallel, alone)
        for optimizer in optimizers:
            optimizer.step()
        check_same_values(parallel, alone)


@pytest.mark.parametrize(
    "of_ddp",
    [
        {},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 1e-4},  # A bucket a parameter: a source's is reduced when its last gradient has come.
        {"gradient_as_bucket_view": True},
    ],
    ids=str,
)
def test_a_vit_trains_as_in_one_process(ranks: Ranks, of_ddp: dict[str, Any]) -> None:
    ranks.run(check_training, ViT, {}, **of_ddp)


@pytest.mark.parametrize("options", [{"share": "layer", "detach": (0,)}, {"granularity": "channel"}], ids=str)
def test_a_resnet_trains_as_in_one_process(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.run(check_training, ResNet, options)


def test_a_source_that_is_used_by_its_neighbour_alone(ranks: Ranks) -> None:
    # The last block is a source: where it is left out, its parameters still get a gradient through the replaced one.
    ranks.run(check_training, short_vit, {"every": 4, "targets": "mlp"}, Branching, find_unused_parameters=True)


def short_vit() -> nn.Module:
    return ViT(5)


def check_accumulation() -> None:
    model, _ = replaced(ViT())
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    *first, last = batches(3, *IMAGES)
    with parallel.no_sync():
        for step in first:
            loss(parallel, step[dist.get_rank()]).backward()
    with pytest.raises(AssertionError):  # The ranks' own, so far.
        check_same_gradients(parallel, alone_after(alone, first))
    loss(parallel, last[dist.get_rank()]).backward()
    check_same_gradients(parallel, alone_after(alone, [*first, last]))


def alone_after(model: nn.Module, steps: list[list[Tensor]]) -> nn.Module:
    model.zero_grad()
    for step in steps:
        backward_of_both(model, step)
    return model


def test_gradients_are_accumulated_without_synchronisation(ranks: Ranks) -> None:
    ranks.run(check_accumulation)


def check_compiled(make: Callable[[], nn.Module], shape: tuple[int, ...], outside: bool, backend: str) -> None:
    """``torch.compile`` around DDP, or DDP around a compiled model."""
    torch._dynamo.reset()
    model = make()
    alone = copy.deepcopy(model)
    if outside:
        parallel = DistributedDataParallel(model)
        call = torch.compile(parallel, backend=backend)
    else:
        call = parallel = DistributedDataParallel(torch.compile(model, backend=backend))
    (step,) = batches(1, *shape)
    loss(call, step[dist.get_rank()]).backward()
    backward_of_both(alone, step)
    if not outside:
        alone = torch.compile(alone, backend=backend)  # For the same names of parameters; it is not called.
    check_same_gradients(parallel, alone)


def replaced_vit() -> nn.Module:
    return replaced(ViT(3), targets="mlp", every=2)[0]


def replaced_linear() -> nn.Module:
    return replaced(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), level="layer", every=2)[0]


@pytest.mark.parametrize("outside", [True, False], ids=["compiled DDP", "DDP of a compiled model"])
def test_compiled(ranks: Ranks, outside: bool) -> None:
    ranks.run(check_compiled, replaced_vit, IMAGES, outside, "aot_eager")


def test_compiled_by_inductor(ranks: Ranks) -> None:
    ranks.run(check_compiled, replaced_linear, (3, 6), True, "inductor")


# Activation checkpointing.


class Checkpointed(nn.Module):
    """Layers of one shape, every one's activations recomputed; the middle one may be the last one again."""

    def __init__(self, middle: str, reentrant: bool):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.middle = middle
        self.reentrant = reentrant
        if middle == "replaced":
            self.mixed = rl.nn.ReplacementLinear.from_neighbours(self.first, self.last)

    def run(self, name: str, x: Tensor) -> Tensor:
        layer = self.last if name == "mixed" and self.middle == "tied" else getattr(self, name)
        return checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "mixed", "last"):
            x = self.run(name, x)
        return x


def check_checkpointed(middle: str, reentrant: bool, **of_ddp: Any) -> None:
    model = Checkpointed(middle, reentrant).double()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model, **of_ddp)
    (step,) = batches(1, 3, 6)
    step = [x.requires_grad_() for x in step]
    loss(parallel, step[dist.get_rank()]).backward()
    backward_of_both(alone, step)
    check_same_gradients(parallel, alone)


def check_reentrant_is_refused(middle: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="Expected to mark a variable ready only once"):
            check_checkpointed(middle, True)


@pytest.mark.parametrize("of_ddp", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_checkpointed_layers_have_the_same_gradients(ranks: Ranks, of_ddp: dict[str, Any]) -> None:
    ranks.run(check_checkpointed, "replaced", False, **of_ddp)


@pytest.mark.parametrize("middle", ["tied", "replaced"])
def test_reentrant_checkpoints_are_refused_by_torch_for_every_shared_weight(ranks: Ranks, middle: str) -> None:
    # A layer that is called twice fails as a replaced layer beside its source does: the weight gets its gradient in two
    # backward passes. With static_graph torch waits for both.
    ranks.run(check_reentrant_is_refused, middle)
    ranks.run(check_checkpointed, middle, True, static_graph=True)
