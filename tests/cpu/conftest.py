from collections.abc import Iterator
from pathlib import Path

import pytest

import rl_kernels as rl
from rl_kernels._extension import EXTENSION


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the extension there is nothing here to test."""
    if EXTENSION.missing is None:
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=f"the C++ kernels: {EXTENSION.missing}"))


@pytest.fixture(autouse=True)
def _asked_for() -> Iterator[None]:
    """By name: the small calls of tests are not those on which ``auto`` would choose it."""
    with rl.use_backend("cpu"):
        yield
