"""The CUDA backend's rules, which need neither nvcc nor a GPU; of what is launched tests/emulated has the tests."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from building import cuda as building
from rl_kernels._extension import EXTENSION, FOLDER_VARIABLE, Extension
from rl_kernels.backends.case import Case
from rl_kernels.backends.cuda import BACKEND, configs, extension
from rl_kernels.backends.cuda.backend import code_for
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


def test_a_record_is_bound_to_what_the_build_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one holds for another build of the same: of another Python, elsewhere, for more GPUs."""
    store, hopper = BACKEND.record, torch.device("cuda", 0)
    assert store is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def bound_to(name: str, made_of: str | None, architectures: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        Path(folder, "_cuda.so").write_text(name)
        record = {"python": name, "architectures": architectures} | ({} if made_of is None else {"sources": made_of})
        Path(folder, extension.RECORD).write_text(json.dumps(record))
        built = SimpleNamespace(__file__=str(folder / "_cuda.so"), build_info=lambda: record | {"nvcc": "13.0.88"})
        monkeypatch.setattr(extension, "EXTENSION", Extension(built, None))
        monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
        return store.here(hopper).sources

    first = bound_to("first", "abc", "8.0 9.0+PTX")
    assert bound_to("second", "abc", "8.0 8.6 9.0") == first
    others = [bound_to("third", "abd", "8.0 9.0+PTX"), bound_to("fourth", "abc", "8.0"), bound_to("fifth", None, "9.0")]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ((9, 0), "8.0 9.0+PTX", "sm_90"),
        ((9, 0), "8.0 9.0 9.0a", "sm_90a"),
        ((8, 9), "8.0 9.0+PTX", "sm_80"),
        ((8, 9), "8.0 8.6 8.9", "sm_89"),
        ((9, 0), "8.0+PTX", "compute_80"),
        ((12, 0), "8.0+PTX 9.0+PTX 9.0a", "compute_90"),
        ((10, 0), "9.0a+PTX 8.0", "none"),
        ((10, 3), "10.0f", "none"),
    ],
)
def test_code_for_a_gpu(capability: tuple[int, int], architectures: str, code: str) -> None:
    assert code_for(capability, architectures) == code


def test_what_a_build_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [tmp_path / name for name in ("one", "two")]
    for copy in copies:
        shutil.copytree(building.SOURCES, copy)
    hashes = []
    for copy in copies:
        monkeypatch.setattr(building, "SOURCES", copy)
        hashes.append(building.made_of("13.0.88"))
    assert hashes[0] == hashes[1] != building.made_of("13.3.33")
    (copies[1] / "README.md").write_text("Said otherwise.")
    assert building.made_of("13.0.88") == hashes[0]
    monkeypatch.setattr(building, "FLAGS", [*building.FLAGS, "-O1"])
    assert building.made_of("13.0.88") != hashes[0]
    monkeypatch.undo()
    monkeypatch.setattr(building, "SOURCES", copies[1])
    for name in ("mix.cuh", "host/heuristics.cpp"):
        before = building.made_of("13.0.88")
        with (copies[1] / name).open("a") as file:
            file.write("// Changed.")
        assert building.made_of("13.0.88") != before


@pytest.mark.parametrize("op", OPS)
def test_qualification_runs_every_configuration(op: str) -> None:
    (usual, _), *forced = BACKEND.variants(op, BF16)
    names = [name for name, _ in forced]
    table = configs.WGRADS if op.endswith("wgrad") else configs.PRODUCTS
    assert usual == "" and len({*names}) == len(names) == len(table) * len(configs.STAGES)
