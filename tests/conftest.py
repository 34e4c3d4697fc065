import os
from collections.abc import Iterator

import pytest
import torch

from building.cuda import find_nvcc
from building.steps import CannotBuild

os.environ["RL_KERNELS_CACHE"] = os.devnull  # What was qualified on this machine decides no test.

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import rounding

    rounding.install()

try:
    find_nvcc()
except CannotBuild:
    collect_ignore = ["emulated"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from one seed."""
    torch.manual_seed(0)
    yield
