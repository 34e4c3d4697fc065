"""Arguments that are DTensors: shards go to the kernels as they lie, where placements are common; others through aten.

Of convolutions torch has no rule for most placements, and computes wrong results; those are refused. The others never
come to torch's rule, which in 2.11 multiplies gradients by the number of ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from rl_kernels.ops.mix import mix
from rl_kernels.ops.values import Outer, Recipe


def as_distributed_as(source: Any, coefficients: Any) -> Tensor:
    """Coefficients as a DTensor where ``source`` is one, and as none where it is not.

    The layers of a block share them, whether parallel or, as norms, not; they are the same on every rank.
    """
    loaded: Any = sys.modules.get("torch.distributed.tensor")  # Importing it takes seconds; without it there are none.
    found: Tensor = coefficients
    if loaded is None or isinstance(source, loaded.DTensor) == isinstance(coefficients, loaded.DTensor):
        return found
    if isinstance(source, loaded.DTensor):
        everywhere = [loaded.Replicate()] * source.device_mesh.ndim
        found = loaded.DTensor.from_local(coefficients, source.device_mesh, everywhere, run_check=False)
    elif all(placement.is_replicate() for placement in coefficients.placements):
        found = coefficients.to_local()
    return found


def are_distributed(x: Tensor, recipe: Recipe) -> bool:
    """Whether the arguments are DTensors.

    Raises:
        RuntimeError: some are and some are not (torch's own message names none); or a convolution's placements are
            none that torch serves.
    """
    loaded = sys.modules.get("torch.distributed.tensor")
    if loaded is None:
        return False
    weights, coefficients, biases = recipe
    named = {"x": x}
    for name, sources in (("weights", weights), ("biases", biases or ())):
        named |= {f"{name}[{j}]": source for j, source in enumerate(sources)}
    named["coefficients"] = coefficients
    distributed = [name for name, tensor in named.items() if isinstance(tensor, loaded.DTensor)]
    if distributed and len(distributed) < len(named):
        plain = next(name for name in named if name not in distributed)
        raise RuntimeError(
            f"{distributed[0]}: got a DTensor where {plain} is none, expected all or none to be distributed: FSDP2 "
            "must gather a replaced layer and its sources as one group (rl_kernels.distributed.shard), and tensor "
            "parallelism must shard both (rl_kernels.distributed.ColwiseParallel, RowwiseParallel)"
        )
    if distributed and weights[0].dim() > 2:
        _check_conv(named)
    return bool(distributed)


def _check_conv(named: dict[str, Any]) -> None:
    """Raise unless the batch alone is sharded: of other shards torch's convolution makes wrong results in silence."""
    for name, tensor in named.items():
        mesh = tensor.device_mesh
        if all(placement.is_replicate() for placement in tensor.placements):
            continue
        by_batch = name == "x" and mesh.ndim == 1 and tensor.placements[0].is_shard(0)
        if not by_batch or _leaves_out_a_rank(tensor, mesh.size()):
            expected = "Replicate(), or Shard(dim=0) with a row for every rank" if name == "x" else "Replicate()"
            raise RuntimeError(
                f"{name}: got shape {tuple(tensor.shape)} with placements {tensor.placements} over {mesh.size()} "
                f"ranks, expected {expected}: the convolutions of DTensors shard their batch alone"
            )


def linear_on_shards(local: Callable[[Tensor, Recipe], Tensor], x: Any, recipe: Recipe) -> Tensor | None:
    """A mixed linear layer of DTensors on their local shards, or None where their placements are no common ones.

    On a mesh of one dimension, the coefficients replicated, ``local(x, recipe)`` serves: weights
    sharded by columns of the layer (outputs) or by rows (inputs), as torch's tensor parallelism shards them; and
    replicated ones, with any x that is whole in its last dimension.
    """
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    weights: Any
    coefficients: Any
    biases: Any
    weights, coefficients, biases = recipe
    mesh, last = x.device_mesh, x.dim() - 1
    if any(tensor.device_mesh != mesh for tensor in (coefficients, *weights, *(biases or ()))):
        return None
    kinds = {weight.placements for weight in weights}, {bias.placements for bias in biases or ()}
    if coefficients.placements != (Replicate(),) or any(len(kind) > 1 for kind in kinds):
        return None
    # A rank without a share has nothing for the kernels; all ranks must agree on the way.
    if any(_leaves_out_a_rank(tensor, mesh.size()) for tensor in (x, weights[0], *(biases or ())[:1])):
        return None
    (of_x,), (of_weights,) = x.placements, weights[0].placements
    of_biases = biases[0].placements[0] if biases else None

    # A rank that has a part of the outputs, of the terms of each, or of the rows, has a part of some gradients' sums.
    by_x: Placement
    by_weights: Placement = of_weights
    by_coefficients: Placement = Partial()
    by_left = by_right = by_coefficients
    of_y: Placement
    added_after = None
    if of_weights == Shard(0) and of_x == Replicate() and of_biases in (None, Shard(0)):
        by_x, of_y = Partial(), Shard(last)
        if coefficients.dim() == 2:  # Each rank needs those of its own outputs.
            by_coefficients = Shard(1)
            coefficients = coefficients.redistribute(placements=[by_coefficients])
        by_left = Shard(2)
    elif of_weights == Shard(1) and of_x == Shard(last) and of_biases in (None, Replicate()):
        by_x, of_y, by_right = of_x, Partial(), Shard(2)
        added_after, biases = biases, None  # Once, to the sum over the ranks.
    elif of_weights == Replicate() and of_biases in (None, Replicate()) and of_x == Replicate():
        by_x, of_y, by_coefficients = Replicate(), Replicate(), Replicate()
        by_left = by_right = by_coefficients
    elif of_weights == Replicate() and of_biases in (None, Replicate()) and type(of_x) is Shard and of_x.dim < last:
        by_x, of_y, by_weights = of_x, of_x, Partial()
    else:
        return None

    local_recipe = Recipe(
        [weight.to_local(grad_placements=[by_weights]) for weight in weights],
        _local_outer(coefficients, weights[0].shape[0], by_left, by_right)
        if recipe.is_outer
        else coefficients.to_local(grad_placements=[by_coefficients]),
        None if biases is None else [bias.to_local(grad_placements=[by_weights]) for bias in biases],
    )
    y = local(_Waited.apply(x.to_local(grad_placements=[by_x])), local_recipe)
    # Shards of different sizes do not tell the shape of the whole.
    whole = torch.empty((*x.shape[:-1], weights[0].shape[0]), device="meta")
    y = DTensor.from_local(
        _Waited.apply(y.contiguous()), mesh, [of_y], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return y if added_after is None else y + mix(added_after, recipe.bias_coefficients, x.dtype)


def _local_outer(coefficients: Any, out: int, *placements: Any) -> Tensor:
    """``Outer`` coefficients of a rank's part of the weights, by the placements of the gradients of left and right.

    Each rank needs those of its own outputs or inputs: where a gradient is sharded, the part is.
    """
    from torch.distributed.tensor import Replicate

    parts = []
    part: Any
    for part, by_part in zip(Outer.of(coefficients, out), placements, strict=True):
        there = part.redistribute(placements=[by_part if by_part.is_shard() else Replicate()])
        parts.append(there.to_local(grad_placements=[by_part]))
    return Outer(*parts).joined()


def conv_on_shards(local: Callable[[Tensor, Recipe], Tensor], x: Any, recipe: Recipe) -> Tensor:
    """A mixed convolution of DTensors that ``are_distributed`` has let pass, by ``local`` on their local shards.

    Everything is replicated, but for x, whose rows the ranks of one dimension may share.
    """
    from torch.distributed.tensor import DTensor, Partial

    weights: Any
    coefficients: Any
    biases: Any
    weights, coefficients, biases = recipe
    mesh, rows = x.device_mesh, x.placements
    # A rank that has a part of the rows has a part of each gradient's sum.
    parts = tuple(Partial() if placement.is_shard() else placement for placement in rows)
    local_recipe = Recipe(
        [weight.to_local(grad_placements=parts) for weight in weights],
        coefficients.to_local(grad_placements=parts),
        None if biases is None else [bias.to_local(grad_placements=parts) for bias in biases],
    )
    y = _Waited.apply(local(_Waited.apply(x.to_local(grad_placements=rows)), local_recipe))
    # Shards of different sizes do not tell the shape of the whole, whose strides are theirs: rows are outermost.
    shape = torch.Size((x.shape[0], *y.shape[1:]))
    return DTensor.from_local(y, mesh, rows, run_check=False, shape=shape, stride=y.stride())


class _Waited(Function):
    """The identity, but for what redistributing in the background yields, which the kernels do not take.

    torch's styles do it forward, of inputs, and backward, of outputs.
    """

    @staticmethod
    def forward(_ctx: Any, x: Any) -> Tensor:
        from torch.distributed._functional_collectives import AsyncCollectiveTensor

        waited: Tensor = x.wait() if isinstance(x, AsyncCollectiveTensor) else x
        return waited.view_as(waited)

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        return _Waited.apply(*gradients)


def _leaves_out_a_rank(tensor: Any, ranks: int) -> bool:
    (placement,) = tensor.placements
    if not placement.is_shard():
        return False
    size = tensor.shape[placement.dim]
    return bool((ranks - 1) * -(-size // ranks) >= size)
