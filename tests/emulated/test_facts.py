"""What the kernels say of themselves, and what Python and C++ plan by."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from rl_kernels.backends.cuda import BACKEND, configs
from rl_kernels.backends.cuda.extension import EXTENSION, is_older_than_its_sources
from rl_kernels.backends.gpu.heuristics import Config, Work, shared_bytes
from rl_kernels.ops.schema import OPS
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import recorded
from tests.emulated.problems import call_of, execute
from tests.emulated.structs import struct_of

pytestmark = pytest.mark.skipif(
    EXTENSION.module is None or is_older_than_its_sources(), reason="the CUDA extension is not built from these sources"
)


def test_parameters_are_as_large_as_kernels_take() -> None:
    kernels = EXTENSION.module.kernels()
    assert kernels
    for name, facts in kernels.items():
        assert facts["params_bytes"] == ctypes.sizeof(struct_of(name)), name


def test_the_library_is_small() -> None:
    """Of whatever architectures it was built for, the default ones or fewer."""
    assert Path(EXTENSION.module.__file__).stat().st_size < 20_000_000


@pytest.mark.parametrize("dtype", configs.ELEMENTS)
def test_tiles_are_those_of_the_kernels(dtype: torch.dtype) -> None:
    """Each is one, of as many threads; and estimates go by the shared memory that is taken."""
    kernels, size, element = EXTENSION.module.kernels(), dtype.itemsize, configs.ELEMENTS[dtype]

    def check(config: Config, name: str, row_bytes: int, sources: int) -> None:
        facts = kernels[f"{name}_{config.rows}x{config.columns}_{element}"]
        assert facts["threads"] == 32 * config.warps and facts["depth_bytes"] == configs.STEP_BYTES
        deep = config._replace(depth=configs.STEP_BYTES // size)
        stage = facts["stage_bytes"] + sources * facts["source_bytes"]
        assert shared_bytes(Work(1, 1, 1, row_bytes, size, 0, 1.0), deep) == deep.stages * stage

    for config in configs.PRODUCTS:
        check(config, "linear_forward_pair", 3 * size, 3)
    for config in configs.WGRADS:
        check(config, "conv_wgrad", size, 0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", configs.ELEMENTS)
def test_every_name_is_a_kernel(op: str, dtype: torch.dtype) -> None:
    """Every variant's, for recipes of each kind, and what is chosen for few tokens or channels and for many."""
    if "linear" in op:
        problems = [Problem(tokens, 40, 48) for tokens in (5, 16, 40)]
    else:
        sizes = ((16, 16), (32, 40), (64, 24), (80, 80))
        problems = [Problem(64, *size, (3, 3), (56, 56), padding=1, layout="channels_last") for size in sizes[:1]]
        problems += [Problem(1, *size, (3, 3), (6, 7), padding=1, layout="channels_last") for size in sizes]
    kernels = EXTENSION.module.kernels()
    for problem in problems:
        for sources in (2, 3):
            call = call_of(op, Problem(**{**vars(problem), "sources": sources, "wanted": "last"}), dtype)
            for _, variant in BACKEND.variants(op, dtype):
                with variant(), recorded() as launches:
                    execute(call)
                assert launches and {launch.kernel for launch in launches} <= kernels.keys()
                assert all(launch.threads == kernels[launch.kernel]["threads"] for launch in launches)
