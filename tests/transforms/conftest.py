from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Every test compiles anew: torch gives up on a function that it compiled eight times."""
    torch._dynamo.reset()
    yield
