"""The CUDA backend's rules, which need neither nvcc nor a GPU; of what is launched tests/emulated has the tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_kernels._extension import EXTENSION
from rl_kernels.backends.case import Case
from rl_kernels.backends.cuda import BACKEND, configs, extension
from rl_kernels.backends.gpu.heuristics import A100, ADA, H100, Device, Work, shared_bytes
from rl_kernels.ops.schema import OPS
from rl_kernels.qualify.problems import Problem, make_call

CPU = torch.device("cpu")
BF16 = torch.bfloat16
in_cpp = pytest.mark.skipif(EXTENSION.module is None, reason=f"the rules are in C++: {EXTENSION.missing}")


@pytest.mark.parametrize("device", [A100, ADA, H100])
@pytest.mark.parametrize("sources", [1, 2, 4])
@pytest.mark.parametrize("dtype", configs.ELEMENTS)
def test_stages_fit_shared_memory(dtype: torch.dtype, sources: int, device: Device) -> None:
    size = dtype.itemsize
    work = Work(4096, 4096, 4096, sources * size, size, 0, 1.0)
    found = configs.usable(configs.PRODUCTS, work, size, device)
    fitting = [config for config in found if shared_bytes(work, config) <= device.shared_bytes]
    assert fitting and all(config.depth * size == configs.STEP_BYTES for config in found)
    assert fitting[-1] == found[-1] and found[-1].stages == 4, "the smallest fits everywhere"


@in_cpp
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("problem", "dtype", "change", "expected"),
    [
        (Problem(4, 16, 16), BF16, {}, None),
        (Problem(4, 16, 16, sources=5), BF16, {}, "more than 4 sources"),
        (Problem(4, 16, 16, halved=True), BF16, {}, "sources in float32 under bfloat16"),
        (Problem(4, 16, 16), BF16, {"coefficients": torch.float64}, "coefficients in float64"),
        (Problem(4, 16, 16), torch.float32, {"tf32": False}, "torch's switch for TF32 is off"),
        (Problem(4, 16, 16), torch.float32, {"tf32": True}, None),
    ],
)
def test_refusals(op: str, problem: Problem, dtype: torch.dtype, change: dict[str, Any], expected: str | None) -> None:
    if "conv" in op:
        problem = dataclasses.replace(problem, kernel=(3, 3), size=(5, 6))
    call = make_call(problem, op, dtype, CPU)
    if "coefficients" in change:
        recipe = call.recipe._replace(coefficients=call.recipe.coefficients.to(change["coefficients"]))
        call = call._replace(recipe=recipe)
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, change.get("tf32", False)
    try:
        with torch.backends.cudnn.flags(allow_tf32=change.get("tf32", False)):
            reason = BACKEND.why_not_call(call)
    finally:
        matmul.allow_tf32 = before
    assert reason is None if expected is None else expected in (reason or "")


@in_cpp
@pytest.mark.parametrize("op", [op for op in OPS if "conv" in op])
def test_auto_takes_channels_last_convolutions_of_enough_channels(op: str) -> None:
    def said(**changes: Any) -> str | None:
        problem = dataclasses.replace(Problem(2, 16, 16, (3, 3), (5, 6), layout="channels_last"), **changes)
        return BACKEND.worse(Case(op, "cuda", BF16), make_call(problem, op, BF16, CPU))

    assert said() is None
    assert said(layout="contiguous") == "needs channels_last"
    assert said(out=1, within=1, groups=16) == "fewer than 16 channels a group"


@in_cpp
@pytest.mark.parametrize("op", [op for op in OPS if "linear" in op])
def test_auto_takes_sources_that_lie_by_rows(op: str) -> None:
    call, case = make_call(Problem(4, 16, 16), op, BF16, CPU), Case(op, "cuda", BF16)
    assert BACKEND.worse(case) is None and BACKEND.worse(case, call) is None
    recipe = call.recipe._replace(weights=[weight.t().contiguous().t() for weight in call.recipe.weights])
    assert BACKEND.worse(case, call._replace(recipe=recipe)) == "sources lie by columns"


def test_cases() -> None:
    assert BACKEND.why_not(Case("mixed_linear", "cpu", BF16)) == "needs an NVIDIA GPU"
    assert BACKEND.why_not(Case("mixed_linear", "cuda", torch.float64)) == "no kernel for float64"
    assert BACKEND.why_not(Case("mixed_linear", "cuda", BF16)) == extension.EXTENSION.missing


def test_a_record_is_bound_to_the_binary() -> None:
    assert BACKEND.record is not None
    module = extension.EXTENSION.module
    assert [*BACKEND.record.files()] == ([] if module is None else [Path(module.__file__)])


@pytest.mark.parametrize("op", OPS)
def test_qualification_runs_every_configuration(op: str) -> None:
    (usual, _), *forced = BACKEND.variants(op, BF16)
    names = [name for name, _ in forced]
    table = configs.WGRADS if op.endswith("wgrad") else configs.PRODUCTS
    assert usual == "" and len({*names}) == len(names) == len(table) * len(configs.STAGES)
