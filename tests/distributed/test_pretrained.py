"""Distributed models saved to a folder, and loaded in one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import rl_kernels as rl
from rl_kernels.distributed import ColwiseParallel, shard
from tests.conversion.toys import ResNet, ViT, sequential
from tests.distributed.common import mesh_of, replaced
from tests.distributed.conftest import Ranks


class Tied(nn.Module):
    """Two layers of one weight beside those that are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(6, 6), sequential()[2:-1], nn.Linear(6, 6)
        self.last.weight = self.first.weight


def check_saved(make: Callable[[], nn.Module], way: str, folder: Path) -> None:
    """The folder holds the whole model as it was before it was distributed, written by one rank."""
    model, plan = replaced(make(), every=3)
    alone = copy.deepcopy(model)
    name = type(model).__name__
    if way == "shard":
        shard(model, plan, mesh=mesh_of(2))
    elif way == "parallel":
        styles = {f"{number}": ColwiseParallel(use_local_output=False) for number in (2, 5, 8)}
        parallelize_module(model, mesh_of(2), styles)
    else:
        model = DistributedDataParallel(model)
    rl.save_pretrained(model, folder)
    dist.barrier()
    loaded = rl.load_pretrained(folder, make)
    found, expected = loaded.state_dict(), alone.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    record = json.loads((folder / "rl_kernels.json").read_text())
    assert record["model"].endswith(f":{name}")
    if isinstance(alone, Tied):
        assert record["tied"] == {"last.weight": "first.weight"} and loaded.last.weight is loaded.first.weight


@pytest.mark.parametrize(
    ("make", "way"),
    [(ViT, "shard"), (ResNet, "shard"), (Tied, "shard"), (sequential, "parallel"), (ResNet, "ddp")],
)
def test_a_distributed_model_is_saved_whole(make: Callable[[], nn.Module], way: str, ranks: Ranks, tmp_path: Path):
    ranks.run(check_saved, make, way, tmp_path / "saved")
