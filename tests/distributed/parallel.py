"""Small blocks of replaced layers, and how they are sharded over several processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from rl_kernels.distributed import ColwiseParallel, RowwiseParallel


class Seen(TorchDispatchMode):
    """The ops of the package that are called, with the shape of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rl_kernels":
            weights = next(arg for arg in args if isinstance(arg, list))
            self.calls.append((func._opname, tuple(weights[0].shape)))
        return func(*args, **(kwargs or {}))


class Mlp(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8, bias=bias), nn.Linear(8, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class WithoutBias(Mlp):
    def __init__(self) -> None:
        super().__init__(bias=False)


class PreNorm(Mlp):
    """Of which the norm is not parallel; a block's coefficients are its first layer's, the norm's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class PostNorm(Mlp):
    """Of which the norm, which is not parallel, comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def parallel(model: nn.Module, mesh: DeviceMesh, **of_columns: Any) -> None:
    for mlp in model.children():
        parallelize_module(mlp, mesh, {"up": ColwiseParallel(**of_columns), "down": RowwiseParallel()})


def distributed(mesh: DeviceMesh, tensor: Tensor, placement: Placement) -> Tensor:
    return distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_()


def fits(placement: Placement, tensor: Tensor) -> bool:
    """Whether there is something for every rank."""
    return not isinstance(placement, Shard) or tensor.shape[placement.dim] > 1
