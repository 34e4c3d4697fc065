"""Where a chain is cut: even numbers of blocks, or even costs of its units."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from rl_kernels.systems.local.chain import Chain

Cut = Literal["blocks", "flops", "memory"]
CUTS = ("blocks", "flops", "memory")


@dataclass(frozen=True)
class Cost:
    """What a unit of a chain costs for one batch.

    Attributes:
        flops: of its forward, as torch counts them: products and convolutions.
        saved_bytes: what it keeps for its backward, besides its input and its parameters.
        shape: of what its block returns.
        returns: shape of what it returns itself: of the last unit, logits.
    """

    flops: int
    saved_bytes: int
    shape: tuple[int, ...]
    returns: tuple[int, ...]


def costs(chain: Chain, shape: Sequence[int]) -> list[Cost]:
    """Return what each unit costs in training, computed on the meta device.

    Args:
        chain: of a model on any device.
        shape: of the model's input, a batch of at least two.

    Raises:
        ValueError: the model cannot take it.
    """
    model = copy.deepcopy(chain.model).to("meta").train()
    x = torch.zeros(tuple(shape), device="meta")
    found = []
    for index in range(len(chain)):
        part = chain.part(index, index + 1, root=model)
        # Held, so that no storage is given another's address.
        saved: dict[int, torch.UntypedStorage] = {}
        counter, entry = FlopCounterMode(display=False), x.detach().requires_grad_(index > 0)
        own = {tensor.untyped_storage()._cdata for tensor in (entry, *part.parameters())}

        def keep(tensor: Tensor, saved: dict[int, torch.UntypedStorage] = saved, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        try:
            with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                x = part(entry)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"shape: got {tuple(shape)}, which {type(chain.model).__name__} cannot take: {error}"
            ) from error
        if not isinstance(x, Tensor):
            raise ValueError(
                f"model: got {type(chain.model).__name__}, whose {chain.units[index].path} returns "
                f"{type(x).__name__}, expected a tensor"
            )
        of_block = chain.part(index, index + 1, root=model, tail=False)(entry) if chain.units[index].tail else x
        kept = sum(each.nbytes() for each in saved.values())
        found.append(Cost(counter.get_total_flops(), kept, tuple(of_block.shape), tuple(x.shape)))
    return found


def cuts(chain: Chain, modules: int, by: Cut, each: Sequence[Cost]) -> list[int]:
    """Return the first unit of every module, and the number of units.

    Args:
        chain: to be cut.
        modules: how many, K.
        by: ``"blocks"``: block number ``blocks * i // K`` is the first of module i, which gives InfoPro's tables for
            ResNet-32 (K = 2, 4, 8); with one module more than blocks, what runs before the first block is a module.
            ``"flops"``, ``"memory"``: the largest module is as small as can be, of equal ones the earliest cuts.
        each: what the units cost.

    Raises:
        ValueError: more modules than units.
    """
    units, stem = len(chain), int(chain.has_stem)
    if not 1 <= modules <= units:
        names = ", ".join(unit.path or "what runs before the first block" for unit in chain.units[:20])
        raise ValueError(
            f"modules: got {modules}, expected at least 1 and at most {units}, of which each can be one: {names}"
        )
    if by == "blocks":
        if modules == units:
            return list(range(units + 1))
        blocks = units - stem
        return [0, *(stem + blocks * index // modules for index in range(1, modules)), units]
    weights = [cost.flops if by == "flops" else cost.saved_bytes for cost in each]
    return _balanced(weights, modules)


def _balanced(weights: Sequence[int], count: int) -> list[int]:
    """Where to cut a row of weights into ``count`` parts, none of them empty, so that the heaviest is lightest."""
    size = len(weights)
    ends = [0, *(sum(weights[: index + 1]) for index in range(size))]
    # best[k][n]: the heaviest of k parts of the first n; begins[k][n]: where the last of them begins.
    best = [{0: 0}]
    begins: list[dict[int, int]] = [{}]
    for parts in range(1, count + 1):
        best.append({})
        begins.append({})
        for end in range(parts, size - (count - parts) + 1):
            options = (
                (max(heaviest, ends[end] - ends[begin]), begin)
                for begin, heaviest in best[parts - 1].items()
                if begin < end
            )
            best[parts][end], begins[parts][end] = min(options)
    found = [size]
    for parts in range(count, 0, -1):
        found.append(begins[parts][found[-1]])
    return found[::-1]


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether anything in it normalises by its batch in training."""
    return any(has_running_statistics(each) or isinstance(each, _NormBase) for each in module.modules())


def has_running_statistics(module: nn.Module) -> bool:
    """Whether it is a norm that keeps a running mean, replaced or not."""
    return "running_mean" in module._buffers
