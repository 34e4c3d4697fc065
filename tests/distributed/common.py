"""What the checks on several processes share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import rl_kernels as rl
from tests.conversion.common import relative_error, spread_out


def replaced(model: nn.Module, **options: object) -> tuple[nn.Module, rl.Plan]:
    """``model`` in float64, replaced, the same on every rank, with nothing left equal by chance."""
    model.double()
    plan = rl.plan(model, **options)  # type: ignore[arg-type]
    rl.replace(model, plan)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0) if dist.is_initialized() else None
    spread_out(model)
    return model, plan


def batches(steps: int = 1, *shape: int, ranks: int = 2) -> list[list[Tensor]]:
    """For every step a batch a rank, the same on all of them."""
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(ranks)] for _ in range(steps)]


def mesh_of(*shape: int) -> DeviceMesh:
    """The first ranks as a mesh; the others, which must make it too, are no part of it."""
    names = ("outer", "inner")[: len(shape)]
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=names)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A number that depends on every output in a way of its own."""
    y = model(x)
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum() + (y * y).mean()


def full(tensor: Tensor | None) -> Tensor | None:
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def backward_of_both(model: nn.Module, xs: Iterable[Tensor]) -> None:
    """What data parallelism is held against: the mean gradient over the ranks' batches, in one process."""
    xs = list(xs)
    for x in xs:
        (loss(model, x) / len(xs)).backward()


def check_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    """Raise unless the gradients of ``found``, sharded or not, are those of ``expected``."""
    named = dict(found.named_parameters())
    assert {name.removeprefix("module.") for name in named} == {name for name, _ in expected.named_parameters()}
    floor = 1e-4 * max(float(p.grad.norm()) for p in expected.parameters() if p.grad is not None)
    for name, parameter in named.items():
        truth = expected.get_parameter(name.removeprefix("module.")).grad
        gradient = full(parameter.grad)
        assert (gradient is None) == (truth is None), name
        if truth is not None:
            assert relative_error(gradient, truth, floor) < 1e-10, (name, gradient, truth)


def check_same_values(found: nn.Module, expected: nn.Module) -> None:
    """Raise unless the parameters of ``found``, sharded or not, are those of ``expected``."""
    for name, parameter in found.named_parameters():
        truth = expected.get_parameter(name.removeprefix("module."))
        whole = full(parameter)
        assert whole is not None
        torch.testing.assert_close(
            whole.detach(), truth.detach(), rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model that may be sharded."""
    return {name: full(value).clone() for name, value in model.state_dict().items()}  # type: ignore[union-attr]


def checkpoint_blocks(model: nn.Module) -> None:
    """Compute every block's activations anew in its backward."""
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
