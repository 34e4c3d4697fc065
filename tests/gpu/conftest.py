"""Tests on a GPU: ``pytest -m gpu tests/gpu``. Without one they are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rl_kernels.backends import Case, registered

NAMES = ("triton", "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def tf32(name: str) -> Iterator[None]:
    """The CUDA kernels multiply float32 in no other way."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, name == "cuda"
    yield
    matmul.allow_tf32 = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    backends = {backend.name: backend for backend in registered()}
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.gpu)
        reason = "there is no GPU" if not torch.cuda.is_available() else None
        if reason is None:
            name = item.callspec.params["name"]  # type: ignore[attr-defined]
            reason = backends[name].why_not(Case("mixed_linear", "cuda", torch.bfloat16))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
