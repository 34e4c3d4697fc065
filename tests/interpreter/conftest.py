"""The Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreter``, a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN: an element that no kernel writes, or that one reads too early, shows."""

    def poisoning(allocate: Any) -> Any:
        def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor: torch.Tensor = allocate(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return poisoned

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
    yield
