"""What the Triton backend is bound to, and when it says no; its kernels are tested in ``tests/interpreter``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from rl_kernels.backends import triton
from rl_kernels.backends.triton.backend import MAX_SOURCES
from rl_kernels.ops.values import Call

ROOM = Path(triton.__file__).parent
CHOOSING = {"assembler.py", "configs.py", "heuristics.py", "convolution.py", "operands.py"}
"""Files without a kernel that decide which one runs, and what it is compiled for."""


def test_a_record_is_bound_to_every_file_that_decides_code() -> None:
    """And to no other: an edit of what only says something voids no record."""
    kernels = {path.name for path in ROOM.glob("*.py") if "@triton.jit" in path.read_text()}
    assert len(kernels) >= 8
    bound = triton.BACKEND.record.files()
    # conv.py and linear.py choose among the kernels.
    assert {path.name for path in bound} == kernels | CHOOSING | {"conv.py", "linear.py"}
    assert all(path.is_file() for path in bound) and len(bound) == len({*bound})


def test_importing_the_backend_imports_no_kernel() -> None:
    """Nor Triton by itself: it need not be there."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import rl_kernels.backends.triton as room\n"
        "print(sorted(name.removeprefix(room.__name__) for name in sys.modules if name.startswith(room.__name__)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['', '.backend', '.configs']"


def test_more_sources_than_a_kernel_takes() -> None:
    x, weight = torch.empty(2, 3), torch.empty(4, 3)
    for count, reason in ((MAX_SOURCES, None), (MAX_SOURCES + 1, "more than 8 sources")):
        call = Call.of("mixed_linear", (x, [weight] * count, torch.empty(count), None))
        assert triton.BACKEND.why_not_call(call) == reason
