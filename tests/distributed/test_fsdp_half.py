"""Replaced models in half precision, sharded by FSDP2: their coefficients, of float32, are a group of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import rl_kernels as rl
from rl_kernels.distributed import shard
from rl_kernels.nn import Coefficients
from tests.conversion.common import relative_error
from tests.conversion.toys import ResNet, ViT
from tests.distributed.common import backward_of_both, batches, checkpoint_blocks, full, loss, whole
from tests.distributed.conftest import Ranks

IMAGES = (2, 3, 8, 8)
BF16 = torch.bfloat16


def halved(make: Callable[[], nn.Module], early: bool, **options: Any) -> tuple[nn.Module, rl.Plan]:
    """A replaced model in bfloat16, cast before or after ``replace``; its coefficients are float32."""
    torch.manual_seed(0)
    model = make()
    model = model.to(BF16) if early else model
    plan = rl.plan(model, **options)
    model = rl.replace(model, plan).to(BF16)
    assert {parameter.dtype for parameter in model.parameters()} == {BF16, torch.float32}
    return model, plan


def check_half(
    make: Callable[[], nn.Module], early: bool, by_plan: bool, policy: Any, checkpointed: bool, **options: Any
) -> None:
    """Steps of training: gradients are those of one process; no hook is left behind."""
    model, plan = halved(make, early, **options)
    alone = copy.deepcopy(model)
    if checkpointed:
        checkpoint_blocks(model)
    units = model.blocks if isinstance(model, ViT) else ()
    shard(model, plan if by_plan else None, units=units, **({} if policy is None else {"mp_policy": policy}))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.no_grad():
        model(batches(1, *IMAGES)[0][0].bfloat16())  # Evaluated first: what is gathered then is no harm.
    for number, step in enumerate(batches(3, *IMAGES)):
        xs = [x.bfloat16() for x in step]
        loss(model, xs[dist.get_rank()]).backward()
        if number == 0:  # Later on the rounding of weights decides.
            backward_of_both(alone, xs)
            for name, parameter in model.named_parameters():
                found, truth = full(parameter.grad), alone.get_parameter(name).grad
                assert found is not None and truth is not None and found.dtype == parameter.dtype == truth.dtype
                assert relative_error(found, truth) < 2e-2 or truth.norm() < 1e-2, (name, found, truth)
        optimizer.step()
        optimizer.zero_grad()
        for module in model.modules():
            if isinstance(module, Coefficients):
                (state,) = fully_shard.state(module)._fsdp_param_groups
                assert not any(param._unsharded_param._backward_hooks for param in state.fsdp_params)
    assert {name: value.dtype for name, value in whole(model).items()} == {
        name: value.dtype for name, value in alone.state_dict().items()
    }


@pytest.mark.parametrize(
    ("make", "early", "by_plan", "policy", "options"),
    [
        (ViT, True, True, None, {}),
        (ViT, False, False, None, {"every": 2}),
        (ViT, True, False, MixedPrecisionPolicy(BF16, torch.float32), {"share": "layer", "constraint": "convex"}),
        (ResNet, False, True, MixedPrecisionPolicy(reduce_dtype=torch.float32), {"every": 3, "granularity": "channel"}),
    ],
)
def test_a_model_in_half_precision(
    ranks: Ranks, make: Callable[[], nn.Module], early: bool, by_plan: bool, policy: Any, options: dict[str, Any]
) -> None:
    ranks.run(check_half, make, early, by_plan, policy, checkpointed=False, **options)


def test_a_checkpointed_model_in_half_precision(ranks: Ranks) -> None:
    ranks.run(check_half, ViT, True, True, None, checkpointed=True)
