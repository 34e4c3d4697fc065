"""The CUDA backend's host side, which needs neither nvcc nor a GPU."""

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
from rl_kernels._extension import FOLDER_VARIABLE, Extension
from rl_kernels.backends.case import Case
from rl_kernels.backends.cuda import BACKEND, configs, extension, params
from rl_kernels.backends.cuda.backend import code_for
from rl_kernels.backends.gpu.heuristics import A100, ADA, H100, Device, Work, shared_bytes
from rl_kernels.ops.schema import OPS
from rl_kernels.ops.values import Call
from rl_kernels.qualify.problems import Problem, make_call

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def test_divisors_divide() -> None:
    """Every quotient that kernels may ask for, by the arithmetic that they use."""
    numbers = [
        0,
        1,
        2,
        3,
        5,
        6,
        7,
        31,
        32,
        33,
        640,
        641,
        65535,
        65536,
        65537,
        (1 << 30) - 1,
        (1 << 31) - 2,
        (1 << 31) - 1,
    ]
    for by in numbers[1:]:
        divisor = params.Divisor.of(by)
        assert divisor.multiplier < 1 << 32
        for n in {*numbers, *(by * k + d for k in (1, 2, 3, 1000) for d in (-1, 0, 1) if by * k + d < 1 << 31)}:
            quotient = n if divisor.divisor == 1 else n * divisor.multiplier >> (32 + divisor.shift)
            assert quotient == n // by, (n, by)


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


def test_vectors_are_where_16_bytes_lie_together() -> None:
    base = torch.zeros(64, 64, dtype=BF16)
    assert params.is_vector(base) and params.is_vector(base[:, :37]) and params.is_vector(base[3:])
    assert not params.is_vector(base.t()) and not params.is_vector(base[:, 1:]), "the address"
    assert not params.is_vector(torch.zeros(64, 37, dtype=BF16)), "the rows"
    assert params.is_vector(torch.zeros(1, 37, dtype=BF16)), "there is one row"
    assert params.is_vector(base, 24) and not params.is_vector(base, 20), "chunks that would straddle two taps"
    image = torch.zeros(2, 16, 5, 6, dtype=BF16)
    assert not params.is_vector(image) and params.is_vector(image.to(memory_format=torch.channels_last))


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


@pytest.mark.parametrize("op", [op for op in OPS if "conv" in op])
def test_auto_takes_channels_last_convolutions_of_enough_channels(op: str) -> None:
    def said(**changes: Any) -> str | None:
        problem = dataclasses.replace(Problem(2, 16, 16, (3, 3), (5, 6), layout="channels_last"), **changes)
        return BACKEND.worse(Case(op, "cuda", BF16), make_call(problem, op, BF16, CPU))

    assert said() is None
    assert said(layout="contiguous") == "needs channels_last"
    assert said(out=1, within=1, groups=16) == "fewer than 16 channels a group"


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
    with (copies[1] / "mix.cuh").open("a") as file:
        file.write("// Changed.")
    assert building.made_of("13.0.88") != hashes[0]


@pytest.mark.parametrize("op", OPS)
def test_qualification_runs_every_configuration(op: str) -> None:
    (usual, _), *forced = BACKEND.variants(op, BF16)
    names = [name for name, _ in forced]
    table = configs.WGRADS if op.endswith("wgrad") else configs.PRODUCTS
    assert usual == "" and len({*names}) == len(names) == len(table) * len(configs.STAGES)


def launches(monkeypatch: pytest.MonkeyPatch, call: Call) -> list[tuple[Any, ...]]:
    """What a call would launch: kernel, grid, and bytes of shared memory."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(extension, "launch", lambda _, *launch: found.append(launch[:3]))
    BACKEND.kernel(call.op)(*call.operands)
    return found


@pytest.mark.parametrize("way", ["", "_dgrad"])
def test_the_kernel_that_is_chosen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(op: str, problem: Problem) -> str:
        return str(launches(monkeypatch, make_call(problem, op + way, BF16, CPU))[0][0])

    kind = "dgrad" if way else "forward"
    assert first("mixed_linear", Problem(8, 64, 64)) == f"skinny_{kind}_pair_8_bf16"
    assert first("mixed_linear", Problem(16, 64, 64, sources=3)) == f"skinny_{kind}_general_16_bf16"
    assert first("mixed_linear", Problem(17, 64, 64)).startswith(f"linear_{kind}_pair_")
    assert first("mixed_linear", Problem(2048, 2048, 512)) == f"linear_{kind}_pair_128x256_bf16"
    layer = Problem(64, 32, 32, (3, 3), (56, 56), padding=1, layout="channels_last", biased=False)
    assert first("mixed_conv", layer) == f"resident_{kind}_pair_32_bf16"
    assert first("mixed_conv", dataclasses.replace(layer, batch=1)).startswith(f"conv_{kind}_pair_")
    assert first("mixed_conv", dataclasses.replace(layer, kernel=(1, 1), padding=0)).startswith(f"linear_{kind}")


@pytest.mark.parametrize("op", ["mixed_linear", "mixed_linear_dgrad"])
def test_few_tokens_fill_the_device_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(Problem(4, 1024, 1024), op, BF16, CPU)
    (kernel, (x, y, splits), shared), reduction = launches(monkeypatch, call)
    assert configs.KERNELS[kernel].threads == 256
    assert y == 1 and shared == 0 and splits > 1 and x * splits <= 2 * H100.multiprocessors
    assert reduction[0] == "linear_reduce_bf16"
