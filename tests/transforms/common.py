"""The problems and the model that the tests of transforms share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rl_kernels as rl
from rl_kernels import functional as F
from tests.conversion.common import spread_out

KINDS = ("linear", "conv", "conv_transpose")

# torch.jit is deprecated, and warns of the checks of shapes, which are constants of a traced graph.
tracing = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")


class Problem(NamedTuple):
    """A call with two sources, and what a user would write instead of it."""

    mixed: Callable[..., Tensor]
    naive: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    """x, the coefficients, two weights, two biases."""


def problem(kind: str, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Problem:
    """A linear layer, or a grouped and strided convolution."""
    mixing = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = {
        "linear": ((4, 6), (4, 6)),
        "conv": ((2, 6, 5, 4), (4, 3, 3, 3)),
        "conv_transpose": ((5, 6, 3, 7), (6, 2, 3, 3)),
    }[kind]
    shapes = [(x, dtype), ((2,), mixing), (weight, dtype), (weight, dtype), ((4,), dtype), ((4,), dtype)]
    made = (torch.randn(shape, dtype=torch.float64).to(kind).requires_grad_(requires_grad) for shape, kind in shapes)

    def mixed(x: Tensor, c: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        if kind == "linear":
            return F.mixed_linear(x, (w1, w2), c, (b1, b2))
        if kind == "conv_transpose":
            return F.mixed_conv_transpose2d(x, (w1, w2), c, (b1, b2), stride=2, padding=1, output_padding=1, groups=2)
        return F.mixed_conv2d(x, (w1, w2), c, (b1, b2), stride=2, padding=1, groups=2)

    def naive(x: Tensor, c: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        weight, bias = c[0] * w1 + c[1] * w2, c[0] * b1 + c[1] * b2
        if kind == "linear":
            return nn.functional.linear(x, weight, bias)
        if kind == "conv_transpose":
            return nn.functional.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1, groups=2)
        return nn.functional.conv2d(x, weight, bias, stride=2, padding=1, groups=2)

    return Problem(mixed, naive, tuple(made))


class Net(nn.Module):
    """Convolutions, then linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
        self.linears = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linears(self.convs(x).tanh().mean((2, 3)))


REPLACED = ("convs.1", "linears.1")


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    """The model with the middle layer of each kind replaced."""
    torch.manual_seed(seed)
    model = Net().to(dtype)
    rl.replace(model, rl.plan(model, every=2))
    spread_out(model)
    return model


def images(batch: int = 3, dtype: torch.dtype = torch.float32, size: int = 6) -> Tensor:
    return torch.randn(batch, 4, size, size, dtype=dtype)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss that is not linear in what ``function`` returns."""
    return lambda *arguments: function(*arguments).pow(3).sum()


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """Of the sum of cubes of ``y``, by every parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(y.pow(3).sum(), parameters), strict=True))


class Ops(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))
