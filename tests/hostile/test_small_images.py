"""Images that a filter's first step would leave: plain layers read memory that nothing wrote for these, in bfloat16 on
CPUs that have instructions for it (torch 2.13)."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rl_kernels.ops.ways import plain_torch
from tests.conversion.common import relative_error
from tests.hostile import BACKENDS, using
from tests.ops.body import Case, make, run

CHANNELS_LAST = ("channels_last",) * 3
CASES = (
    Case(1, (2,), (1,), (16, 32), 1, (5,), (2,), (2,), (1,)),
    Case(1, (4,), (2,), (16, 32), 1, (3,), (3,), (1,), (1,)),
    Case(2, (2,), (1, 1), (16, 32), 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    Case(2, (1,), (2, 2), (64, 64), 1, (7, 7), (1, 1), (3, 3), (1, 1)),
    Case(2, (1,), (9, 2), (16, 32), 8, (2, 3), (1, 3), (0, 1), (1, 1)),
    Case(2, (4,), (5, 1), (64, 64), 1, (3, 3), (3, 3), (0, 1), (1, 1), layouts=CHANNELS_LAST),
    Case(2, (4,), (8, 4), (1, 2), 2, (7, 5), (1, 3), (2, 1), (1, 1), layouts=CHANNELS_LAST),
    Case(2, (4,), (4, 3), (1, 2), 8, (3, 3), (1, 2), (1, 0), (1, 1), layouts=CHANNELS_LAST),
    Case(3, (1,), (1, 9, 8), (1, 32), 2, (3, 1, 3), (2, 1, 1), (1, 0, 1), (1, 1, 1), layouts=CHANNELS_LAST),
    Case(3, (2,), (12, 9, 1), (32, 32), 2, (2, 3, 3), (2, 1, 3), (0, 0, 1), (1, 2, 1)),
)


def check(backend: str) -> None:
    for case, dtype in itertools.product(CASES, (torch.float32, torch.bfloat16)):
        tensors = make(replace(case, dtype=dtype))
        with plain_torch():
            expected = run(case, tensors, lambda value: value.double())
        with using(backend):
            found = run(case, tensors)
        for name, value in expected.items():
            error = relative_error(found[name], value)
            assert error < 4 * torch.finfo(dtype).eps, f"{case}, {dtype}: {name} is off by {error}"


# The reference is plain torch, with what plain torch gets wrong.
@pytest.mark.parametrize("backend", [param for param in BACKENDS if param.values[0] != "reference"])
def test_images_smaller_than_the_filter(backend: str) -> None:
    """As exact as others where glibc fills what it hands out with large numbers."""
    program = f"from tests.hostile.test_small_images import check; check({backend!r})"
    environment = {**os.environ, "MALLOC_PERTURB_": "128"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
