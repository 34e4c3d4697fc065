"""What users do to a layer that nobody planned for, on every backend that serves CPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels import functional as F
from rl_kernels._extension import without_fast_path
from rl_kernels.backends import Case, registered
from tests.conversion.toys import ResNet, encoder

SPATIAL = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
MIXED: list[Any] = [F.mixed_linear, F.mixed_conv1d, F.mixed_conv2d, F.mixed_conv3d]
PLAIN: list[Any] = [getattr(nn.functional, name) for name in SPATIAL]
LEFT_OUT = "cpu by way of Python"
"""The C++ kernels, called by the formulas of ``ops/autograd.py`` and not by the fast path."""


def _backends() -> list[Any]:
    found = []
    for backend in registered():
        if backend.name in ("cpu", "streamed", "reference"):
            reason = backend.why_not(Case("mixed_conv", "cpu", torch.float32))
            marks = [pytest.mark.skip(reason=f"{backend.name}: {reason}")] if reason else []
            names = (backend.name, LEFT_OUT) if backend.name == "cpu" else (backend.name,)
            found += [pytest.param(name, marks=marks) for name in names]
    return found


BACKENDS = _backends()


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Inside, one of ``BACKENDS`` serves every call."""
    with contextlib.ExitStack() as stack:
        if backend == LEFT_OUT:
            stack.enter_context(without_fast_path())
        stack.enter_context(rl.use_backend("cpu" if backend == LEFT_OUT else backend))
        yield


def plain_mix(sources: Any, coefficients: Tensor) -> Tensor:
    """The recipe as a user would write it."""
    ones = (1,) * (sources[0].dim() - 1)
    factors = coefficients.reshape(*coefficients.shape, *ones) if coefficients.dim() == 2 else coefficients
    return sum(factor * source for factor, source in zip(factors, sources, strict=True))  # type: ignore[return-value]


def converted(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A small replaced model, and a batch for it."""
    torch.manual_seed(seed)
    if kind == "resnet":
        model, x = ResNet((4, 2), width=4), torch.randn(2, 3, 8, 8)
    else:
        model, x = encoder(4), torch.randn(2, 5, 8)  # type: ignore[assignment]
    plan = rl.plan(model, every=3)
    assert plan.replaced
    return rl.replace(model, plan), x


def train(model: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    """The losses of a few steps, then the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach().clone() for parameter in model.parameters())]
