"""What the Triton backend is bound to, and when it says no; its kernels are tested in ``tests/interpreter``."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rl_kernels.backends import Case, triton
from rl_kernels.backends.gpu.heuristics import use_config
from rl_kernels.backends.triton.backend import MAX_SOURCES
from rl_kernels.backends.triton.configs import CONV_CONFIGS, RESIDENT_CONFIGS
from rl_kernels.ops.values import Call, Geometry, Recipe, Wanted

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


def test_more_terms_of_outer_coefficients_than_a_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, dy, weight = torch.empty(2, 3), torch.empty(2, 4), torch.empty(4, 3)
    case = Case("mixed_linear", "cuda", torch.float32)
    reason = "Outer coefficients of more than {} terms (sources times rank)"
    for rank, cannot, slow in (
        (1, None, None),
        (4, None, None),
        (5, None, reason.format(16)),
        (16, None, reason.format(16)),
        (17, reason.format(64), reason.format(16)),
    ):
        recipe = Recipe([weight] * 4, torch.empty(4, rank, 7))
        call, wanted = Call("mixed_linear", x, recipe), Wanted([False] * 4, True, [])
        assert triton.BACKEND.why_not_call(call) == cannot and triton.BACKEND.worse(case, call) == slow
        wgrad = Call("mixed_linear_wgrad", dy, recipe, x=x, wanted=wanted)
        assert triton.BACKEND.why_not_call(wgrad) == cannot and triton.BACKEND.worse(case, wgrad) is None
    assert triton.BACKEND.worse(case) is None


@pytest.mark.parametrize("kernel", ["correlate_kernel", "resident_kernel"])
def test_any_number_of_groups_is_launched(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a grid only the first dimension goes beyond 65535."""
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    room = importlib.import_module("rl_kernels.backends.triton." + ("dense" if "corr" in kernel else "resident"))
    grids = []

    class Caught:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(room, kernel, Caught())
    groups = 70_000
    x, weight = torch.empty(1, 2 * groups, 16, 16, device="meta"), torch.empty(2 * groups, 2, 1, 3, device="meta")
    x, weight = x.bfloat16(), weight.bfloat16()
    recipe = Recipe([weight], torch.empty(1, device="meta"))
    config = RESIDENT_CONFIGS[0] if kernel == "resident_kernel" else CONV_CONFIGS[-1]
    with use_config(config):
        triton.BACKEND.kernel("mixed_conv")(x, recipe, Geometry([1, 1], [0, 1], [1, 1], groups))
    ((first, *others),) = grids
    assert first >= groups and first % groups == 0 and max(others, default=1) <= 65535
