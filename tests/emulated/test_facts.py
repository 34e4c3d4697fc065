"""What Python says of the kernels is what they say of themselves."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rl_kernels.backends.cuda import BACKEND, configs, params
from rl_kernels.backends.cuda.configs import KERNELS
from rl_kernels.backends.cuda.extension import EXTENSION, is_older_than_its_sources
from rl_kernels.backends.gpu.heuristics import Work, shared_bytes
from rl_kernels.ops.schema import OPS
from rl_kernels.qualify.problems import Problem
from tests.emulated.backend import recorded
from tests.emulated.problems import call_of, execute

built = pytest.mark.skipif(
    EXTENSION.module is None or is_older_than_its_sources(), reason="the CUDA extension is not built from these sources"
)


@built
def test_facts() -> None:
    registered = EXTENSION.module.kernels()
    expected = {name: {**facts._asdict(), "params_bytes": params_of(name)} for name, facts in KERNELS.items()}
    assert registered == expected


def params_of(kernel: str) -> int:
    """The size of the struct that a kernel takes."""
    if "wgrad" in kernel:
        return ctypes.sizeof(params.WgradParams)
    return ctypes.sizeof(params.ProductReductionParams if "reduce" in kernel else params.ProductParams)


@pytest.mark.parametrize("dtype", configs.ELEMENTS)
def test_estimates_go_by_the_shared_memory_that_is_taken(dtype: torch.dtype) -> None:
    size, element = dtype.itemsize, configs.ELEMENTS[dtype]
    for config in configs.PRODUCTS:
        facts = KERNELS[f"linear_forward_pair_{config.rows}x{config.columns}_{element}"]
        work = Work(1, 1, 1, 3 * size, size, 0, 1.0)
        deep = config._replace(depth=configs.STEP_BYTES // size)
        assert shared_bytes(work, deep) == deep.stages * (facts.stage_bytes + 3 * facts.source_bytes)
    for config in configs.WGRADS:
        facts = KERNELS[f"conv_wgrad_{config.rows}x{config.columns}_{element}"]
        deep = config._replace(depth=configs.STEP_BYTES // size)
        assert shared_bytes(Work(1, 1, 1, size, size, 0, 1.0), deep) == deep.stages * facts.stage_bytes


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
    for problem in problems:
        for sources in (2, 3):
            call = call_of(op, Problem(**{**vars(problem), "sources": sources, "wanted": "last"}), dtype)
            for _, variant in BACKEND.variants(op, dtype):
                with variant(), recorded() as launches:
                    execute(call)
                assert launches and {launch.kernel for launch in launches} <= KERNELS.keys()
