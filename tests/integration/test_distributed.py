"""Other libraries' models, converted, on two processes: what tests/distributed holds, end to end."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from rl_kernels.distributed import shard
from tests.distributed.common import backward_of_both, check_same_gradients, check_same_values, loss
from tests.distributed.conftest import Ranks
from tests.integration.models import MODELS, converted

pytestmark = pytest.mark.integration


def check_training(name: str, sharded: bool) -> None:
    """Two clipped steps: gradients and parameters are those of one process that sees both batches."""
    model, plan = converted(name, torch.float64)  # Batch norms as in evaluation: each rank has statistics of its own.
    alone = copy.deepcopy(model)
    if sharded:
        model = shard(model, plan)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    else:
        model = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, alone)]
    for _ in range(2):
        xs = [MODELS[name].inputs(2, torch.float64) for _ in range(2)]
        loss(model, xs[dist.get_rank()]).backward()
        backward_of_both(alone, xs)
        check_same_gradients(model, alone)
        for one, optimizer in zip((model, alone), optimizers, strict=True):
            clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    check_same_values(model, alone)


@pytest.mark.parametrize("sharded", [False, True], ids=["DistributedDataParallel", "FSDP"])
@pytest.mark.parametrize("name", MODELS)
def test_training(ranks: Ranks, name: str, sharded: bool) -> None:
    ranks.run(check_training, name, sharded)
