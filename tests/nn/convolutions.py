"""Plain and replaced convolutions of one kind, for the tests of both kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_kernels.nn import ReplacementLayer

DIMS = pytest.mark.parametrize("dim", [1, 2, 3], ids=["1d", "2d", "3d"])


def named(settings: dict[str, Any]) -> str:
    """The id of a case."""
    return ", ".join(f"{k}={v}" for k, v in settings.items()) or "plain"


@dataclass(frozen=True)
class Convolutions:
    """The plain and the replaced class, and the size of an input, by spatial dimensions."""

    plain: Mapping[int, type[Any]]
    replacement: Mapping[int, type[ReplacementLayer]]
    sizes: Mapping[int, tuple[int, ...]]

    def sources(self, dim: int, n: int = 2, dtype: torch.dtype = torch.float64, **settings: Any) -> list[Any]:
        torch.manual_seed(0)
        settings = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **settings}
        return [self.plain[dim](**settings, dtype=dtype) for _ in range(n)]

    def given(self, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(2, 4, *self.sizes[dim], dtype=dtype, requires_grad=True)

    def replaced(self, dim: int, sources: list[Any], **options: Any) -> ReplacementLayer:
        return self.replacement[dim](sources, **{"init": (0.3, -0.9), **options})
