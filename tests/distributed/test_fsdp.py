"""Replaced models sharded by FSDP2 over several processes, held against the same model in one."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import weight_norm

import rl_kernels as rl
from rl_kernels.distributed import shard
from tests.conversion.toys import ResNet, ViT, encoder, sequential
from tests.distributed.common import (
    backward_of_both,
    batches,
    check_same_gradients,
    check_same_values,
    checkpoint_blocks,
    full,
    loss,
    mesh_of,
    replaced,
    whole,
)
from tests.distributed.conftest import Ranks

IMAGES = (2, 3, 8, 8)
EPS = 1e-3
"""Of Adam: by the default it would blow up rounding, which is all that some gradients are (of the keys' bias)."""


def groups(model: nn.Module) -> list[list[str]]:
    """The paths of the modules of every group of fully_shard, the model's own last."""
    by_state: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            by_state.setdefault(id(fully_shard.state(module)), []).append(path)
    return sorted(by_state.values(), key=lambda paths: paths == [""])


class SeparateAttention(nn.Module):
    """Three projections of one input, of which the key's may be the mix of the other two."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


# Gradients.


def check_training(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    by_plan: bool,
    mesh_shape: tuple[int, ...] = (2,),
    **options: Any,
) -> None:
    """Two steps of clipped AdamW: outputs, gradients, their norm and parameters are the unsharded model's."""
    sharding = {key: options.pop(key) for key in ("reshard_after_forward",) if key in options}
    model, plan = replaced(make(), **options)
    mesh = mesh_of(*mesh_shape)
    if mesh.get_coordinate() is None:
        return
    alone = copy.deepcopy(model)
    units = model.blocks if isinstance(model, ViT) else ()
    assert shard(model, plan if by_plan else None, units=units, mesh=mesh, **sharding) is model
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=EPS) for m in (model, alone)]
    for step in batches(2, *shape, ranks=mesh.size()):
        x = step[dist.get_rank()]
        torch.testing.assert_close(model(x), alone(x), rtol=1e-9, atol=1e-11)
        loss(model, x).backward()
        backward_of_both(alone, step)
        check_same_gradients(model, alone)
        norms = [full(clip_grad_norm_(m.parameters(), 0.1)) for m in (model, alone)]
        torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
        assert norms[1] is not None and norms[1] > 0.1
        check_same_gradients(model, alone)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        check_same_values(model, alone)


@pytest.mark.parametrize(
    ("by_plan", "options"),
    [
        (True, {}),
        (False, {}),
        (True, {"every": 2, "detach": (0,)}),
        (True, {"share": "layer", "constraint": "convex", "reshard_after_forward": False}),
        (False, {"granularity": "channel", "targets": "attention"}),
    ],
    ids=str,
)
def test_a_vit_trains_as_in_one_process(ranks: Ranks, by_plan: bool, options: dict[str, Any]) -> None:
    ranks.run(check_training, ViT, IMAGES, by_plan, **options)


@pytest.mark.parametrize("by_plan", [True, False], ids=["blocks", "layers"])
def test_a_resnet_trains_as_in_one_process(ranks: Ranks, by_plan: bool) -> None:
    # The mean of two batches' gradients is that of a batch norm over each: the running statistics stay each rank's own.
    ranks.run(check_training, ResNet, IMAGES, by_plan, every=3)


@pytest.mark.parametrize("by_plan", [True, False], ids=["blocks", "layers"])
def test_torchs_encoder_trains_as_in_one_process(ranks: Ranks, by_plan: bool) -> None:
    ranks.run(check_training, encoder, (2, 5, 8), by_plan, every=3)


def test_layers_of_a_sequential_train_as_in_one_process(ranks: Ranks) -> None:
    ranks.run(check_training, sequential, (4, 3), True, every=2, share="layer")


def separate_attention() -> nn.Module:
    return nn.Sequential(*(SeparateAttention(4) for _ in range(2)))


def test_a_chain_of_parallel_layers_trains_as_in_one_process(ranks: Ranks) -> None:
    ranks.run(check_training, separate_attention, (2, 5, 4), True, level="layer", every=4, offset=2)


@pytest.mark.parametrize("mesh_shape", [(2, 1), (1, 2)], ids=["replicated", "sharded"])
def test_hybrid_sharding_over_a_mesh_of_two_dimensions(ranks: Ranks, mesh_shape: tuple[int, ...]) -> None:
    ranks.run(check_training, sequential, (4, 3), True, mesh_shape, every=2)


def parametrized() -> nn.Module:
    model = ViT(5)
    for block in model.blocks:
        weight_norm(block.mlp[0])
    return model


@pytest.mark.parametrize("by_plan", [True, False], ids=["blocks", "layers"])
def test_parametrized_sources_train_as_in_one_process(ranks: Ranks, by_plan: bool) -> None:
    ranks.run(check_training, parametrized, IMAGES, by_plan, targets="mlp")


def check_accumulation() -> None:
    model, plan = replaced(ViT())
    alone = copy.deepcopy(model)
    shard(model, plan, units=model.blocks)
    steps = batches(3, *IMAGES)
    for number, step in enumerate(steps, start=1):
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(number == len(steps))
        loss(model, step[dist.get_rank()]).backward()
        backward_of_both(alone, step)
    check_same_gradients(model, alone)


def test_gradients_are_accumulated_over_batches(ranks: Ranks) -> None:
    ranks.run(check_accumulation)


def check_checkpointed() -> None:
    model, plan = replaced(ViT())
    alone = copy.deepcopy(model)
    checkpoint_blocks(model)
    shard(model, plan, units=model.blocks)
    (step,) = batches(1, *IMAGES)
    loss(model, step[dist.get_rank()]).backward()
    backward_of_both(alone, step)
    check_same_gradients(model, alone)


def test_activation_checkpointing(ranks: Ranks) -> None:
    ranks.run(check_checkpointed)


def check_mixed_precision() -> None:
    model, plan = replaced(ViT())
    model.float()
    alone = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, plan, units=model.blocks, mp_policy=policy)
    (step,) = batches(1, *IMAGES)
    x = [part.float() for part in step]
    model(x[dist.get_rank()]).float().square().mean().backward()
    for part in x:
        (alone(part).square().mean() / 2).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        found, truth = full(parameter.grad), alone.get_parameter(name).grad
        assert found is not None and truth is not None
        similar = torch.nn.functional.cosine_similarity(found.flatten(), truth.flatten(), dim=0)
        assert similar > 0.9 or truth.norm() < 1e-3, (name, similar)


def test_mixed_precision(ranks: Ranks) -> None:
    ranks.run(check_mixed_precision)


# Checkpoints.


def trained_step(model: nn.Module, optimizer: torch.optim.Optimizer, xs: list[Tensor]) -> None:
    backward_of_both(model, xs)
    optimizer.step()
    optimizer.zero_grad()


def sharded_with_optimizer(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model, plan = replaced(ViT())
    shard(model, plan, units=model.blocks)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)


def sharded_on_meta() -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.device("meta"):
        model = ViT().double()
    plan = rl.plan(model)
    shard(rl.replace(model, plan), plan, units=model.blocks)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    values, state = get_state_dict(model, optimizer)
    assert set(values) == set(model.state_dict()) and not any("sources" in key for key in values)
    dcp.save({"model": values, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    values, state = get_state_dict(model, optimizer)
    dcp.load({"model": values, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=values, optim_state_dict=state)


def check_save_and_resume(folder: Path) -> None:
    """Train, save, train on; then resume in fresh models, which must end where the first did."""
    model, optimizer = sharded_with_optimizer()
    first, second = batches(2, *IMAGES)
    trained_step(model, optimizer, [first[dist.get_rank()]])
    save(model, optimizer, folder / "of_two")
    trained_step(model, optimizer, [second[dist.get_rank()]])
    expected = whole(model)
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")
    dist.barrier()
    check_resumed(folder, "of_two")


def check_resumed(folder: Path, checkpoint: str) -> None:
    expected = torch.load(folder / "expected.pt")
    _, second = batches(2, *IMAGES)
    for fresh, optimizer in (sharded_with_optimizer(seed=1), sharded_on_meta()):
        load(fresh, optimizer, folder / checkpoint)
        trained_step(fresh, optimizer, [second[dist.get_rank()]])
        for name, value in whole(fresh).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_checkpoint_resumes_on_two_processes_on_one_and_on_two_again(
    ranks: Ranks, tmp_path: Path, group_of_one: None
) -> None:
    ranks.run(check_save_and_resume, tmp_path)
    expected = torch.load(tmp_path / "expected.pt")
    _, second = batches(2, *IMAGES)
    model, optimizer = sharded_with_optimizer(seed=2)
    load(model, optimizer, tmp_path / "of_two")
    save(model, optimizer, tmp_path / "of_one")
    trained_step(model, optimizer, second)
    torch.manual_seed(3)
    plain, _ = replaced(ViT())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=EPS)
    load(plain, optimizer, tmp_path / "of_two")
    trained_step(plain, optimizer, second)
    for name, value in expected.items():
        for found in (whole(model), plain.state_dict()):
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    ranks.run(check_resumed, tmp_path, "of_one")


# Groups, on one process: which modules make one does not depend on how many there are.


def made(model: nn.Module, **options: Any) -> tuple[Any, rl.Plan]:
    plan = rl.plan(model, **options)
    return rl.replace(model, plan), plan


def test_chains_are_the_plans_blocks(group_of_one: None) -> None:
    model, plan = made(ViT(12))
    shard(model, plan, units=model.blocks)
    chains = [[0], [1], [2, 3, 4], [5], [6, 7, 8], [9], [10], [11], []]
    assert groups(model) == [[f"blocks.{i}" for i in chain] or [""] for chain in chains]


def test_chains_that_share_a_source_are_one(group_of_one: None) -> None:
    model, plan = made(ViT(9), every=2, targets="mlp")
    shard(model, plan)
    assert groups(model) == [[f"blocks.{i}" for i in range(9)], [""]]


def test_without_a_plan_chains_are_layers_linked_by_sources_and_coefficients(group_of_one: None) -> None:
    model, _ = made(ViT(5), share="layer", targets="mlp")
    shard(model)
    assert groups(model) == [[f"blocks.{i}.mlp.{j}" for i in (2, 3, 4)] for j in (0, 2)] + [[""]]
    model, _ = made(ViT(5), targets="mlp")
    shard(model)
    assert groups(model) == [[f"blocks.{i}.mlp.{j}" for i in (2, 3, 4) for j in (0, 2)], [""]]


def test_coefficients_that_no_layer_holds_are_members(group_of_one: None) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "ac"})
    model["mixing"] = rl.nn.Coefficients(torch.ones(2))
    model["b"] = rl.nn.ReplacementLinear.from_neighbours(model["a"], model["c"], coefficients=model["mixing"])
    holder = nn.Sequential(nn.Linear(4, 4))
    holder.layers = model
    shard(holder)
    assert groups(holder) == [["layers.a", "layers.c", "layers.mixing", "layers.b"], [""]]


def test_what_was_wired_by_hand_joins_the_plans_blocks(group_of_one: None) -> None:
    model, plan = made(ViT(5))
    model.extra = rl.nn.ReplacementLinear((model.blocks[0].mlp[0], model.blocks[4].mlp[0]))
    shard(model, plan)
    assert groups(model) == [["blocks.0.mlp.0", "blocks.2", "blocks.3", "blocks.4", "extra"], [""]]


def test_units_within_a_member_are_groups_of_their_own(group_of_one: None) -> None:
    model, plan = made(ViT(5), targets="attention")
    shard(model, plan, units=[model.blocks[2].mlp, model.blocks[2].mlp[0], *model.blocks, model])
    chain = [f"blocks.{i}" for i in (2, 3, 4)]
    assert sorted(groups(model)) == sorted(
        [["blocks.0"], ["blocks.1"], chain, ["blocks.2.mlp"], ["blocks.2.mlp.0"], [""]]
    )


def gathered_with(model: nn.Module, path: str) -> set[str]:
    """The modules whose parameters are gathered with those of the group at ``path``."""
    module = model.get_submodule(path)
    assert isinstance(module, FSDPModule)
    module.unshard()
    found = {name.rpartition(".")[0] for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    module.reshard()
    return found


def test_units_around_chains_take_what_the_inner_ones_leave(group_of_one: None) -> None:
    model, plan = made(nn.Sequential(sequential(4), sequential(4)), every=2, targets="linear")
    first, second = model
    shard(model, plan, units=[model, first, first[0], second[-1], second])
    chains = [[f"{half}.{i}" for i in (2, 5, 8)] for half in "01"]
    assert sorted(groups(model)) == sorted([["0"], ["0.0"], chains[0], ["1"], chains[1], ["1.14"], [""]])
    assert gathered_with(model, "0.0") == {"0.0"}
    assert gathered_with(model, "0.5") == {"0.2", "0.5.mixing", "0.8"}
    assert gathered_with(model, "0") == {f"0.{i}" for i in (3, 6, 9, 11, 12, 14)}
    assert gathered_with(model, "1") == {f"1.{i}" for i in (0, 3, 6, 9, 11, 12)}


# What is refused.


def check_split_chain() -> None:
    """Where every block gathers its own weights only, a replaced layer does not get its sources'."""
    for reshard_after_forward in (True, False):
        model, _ = replaced(ViT(), targets="mlp")
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=reshard_after_forward)
        fully_shard(model)
        with pytest.raises(RuntimeError, match=r"^weights\[\d\]: got a DTensor where x is none.*distributed.shard"):
            model(batches(1, *IMAGES)[0][0])


def test_a_chain_split_over_groups_raises(ranks: Ranks) -> None:
    ranks.run(check_split_chain)


def test_a_unit_that_would_split_a_chain(group_of_one: None) -> None:
    model, plan = made(ViT(5), targets="attention")
    message = (
        "units: got blocks.2.attn, which would split a chain: blocks.2.attn is replaced or mixed from, and belongs to "
        "the group of blocks.2"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shard(model, plan, units=[model.blocks[2].mlp, model.blocks[2].attn])
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


def test_a_member_within_another(group_of_one: None) -> None:
    model, plan = made(ViT(5), targets="mlp")
    attention = model.blocks[0].attn
    model.first = rl.nn.ReplacementLinear((attention.out_proj, attention.out_proj))
    model.second = rl.nn.ReplacementMultiheadAttention((attention, attention))
    message = "^model: got blocks.0.attn.out_proj and blocks.0.attn, one within the other, as members of chains"
    with pytest.raises(ValueError, match=message):
        shard(model, plan)


def test_a_source_that_is_no_part_of_the_model(group_of_one: None) -> None:
    model, plan = made(ViT(5))
    model.blocks[2].mlp[0] = nn.Linear(8, 16)
    message = r"^model: got a source \(Linear\) of blocks.3.mlp.0 that is no part of it, .* call rebind$"
    with pytest.raises(ValueError, match=message):
        shard(model, plan)


def test_coefficients_that_are_no_part_of_the_model(group_of_one: None) -> None:
    model, plan = made(ViT(5))
    mixing = model.blocks[3].norm1.mixing
    model.blocks[3].norm1 = nn.LayerNorm(8)
    assert mixing is model.blocks[3].attn.coefficient_module
    with pytest.raises(ValueError, match=r"^model: got coefficients of blocks.3.attn that is no part of it"):
        shard(model, plan)


def test_other_arguments_that_do_not_fit(group_of_one: None) -> None:
    model, plan = made(ViT(5))
    with pytest.raises(TypeError, match=r"^model: got str, expected an nn.Module"):
        shard("model", plan)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"^plan: got list, expected a Plan or None"):
        shard(model, [plan])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^units: got str, expected modules"):
        shard(model, plan, units=["blocks.0"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^units: got Linear, expected modules in an iterable"):
        shard(model, plan, units=model.head)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^units: got list, expected modules"):
        shard(model, plan, units=[[model.head]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^units: got a Linear that is no part of ViT"):
        shard(model, plan, units=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"^model: got ViT without replaced layers, expected one after replace"):
        shard(ViT(5))
    with pytest.raises(ValueError, match=r"^plan: got one with a block blocks.3, expected one for Sequential"):
        shard(sequential(), plan)
    fully_shard(model.blocks[0])
    with pytest.raises(ValueError, match=r"^model: got one sharded already at blocks.0, expected fully_shard to be"):
        shard(model, plan)


def test_importing_the_package_leaves_torchs_distributed_tensors_alone() -> None:
    program = (
        "import sys, rl_kernels as rl; assert not any(m.startswith('torch.distributed.tensor') for m in sys.modules); "
        "assert 'torch._dynamo' not in sys.modules; "
        "assert rl.distributed.shard; assert 'torch.distributed.fsdp' in sys.modules; "
        "assert not hasattr(rl, 'distribute')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
