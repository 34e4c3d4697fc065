"""Tests on a GPU: ``pytest -m gpu tests/gpu``. Without one they are skipped, with the reason."""

from __future__ import annotations

import pytest
import torch

from rl_kernels.backends import Case, registered


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/gpu" in item.path.as_posix()]
    triton = next(backend for backend in registered() if backend.name == "triton")
    reason = "there is no GPU" if not torch.cuda.is_available() else None
    reason = reason or triton.why_not(Case("mixed_linear", "cuda", torch.bfloat16))
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
