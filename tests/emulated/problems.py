"""Calls of the CUDA backend's ops, executed and held against the exact result."""

from __future__ import annotations

from typing import Any

import torch

from rl_kernels.backends import cuda
from rl_kernels.backends.cuda import configs
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.ops.values import Call
from rl_kernels.qualify.problems import Problem, make_call
from tests.emulated.backend import emulated
from tests.emulated.exact import assert_exact

SMALL = Config(64, 64, 32, 4, 3)
BF16, F16, TF32 = torch.bfloat16, torch.float16, torch.float32


def call_of(op: str, problem: Problem, dtype: torch.dtype) -> Call:
    """A call of an op on tensors of the host."""
    return make_call(problem, op, dtype, torch.device("cpu"))


def execute(call: Call) -> Any:
    """What the CUDA backend's kernel of a call returns."""
    kernel = cuda.BACKEND.kernel(call.op)
    return kernel(*call.operands) if call.into is None else kernel(*call.operands, into=call.into)


def run(
    op: str, problem: Problem, dtype: torch.dtype, config: Config = SMALL, splits: int = 1, **options: Any
) -> list[str]:
    """Execute an op in a configuration, and hold it against the exact result; the kernels that ran."""
    call = call_of(op, problem, dtype)
    config = config._replace(depth=configs.STEP_BYTES // dtype.itemsize)
    with use_config(config, splits), emulated(**options) as launched:
        found = execute(call)
    assert_exact(call, found)
    return launched
