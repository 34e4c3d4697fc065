"""The CUDA backend's host side, which needs neither nvcc nor a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl_kernels.backends import Case, cuda
from rl_kernels.backends.cuda import configs, extension, params
from rl_kernels.backends.gpu.heuristics import A100, ADA, H100, Device, Work, shared_bytes
from rl_kernels.ops import schema
from rl_kernels.qualify.problems import Problem, arguments

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
@pytest.mark.parametrize("dtype", configs.NAMES)
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


@pytest.mark.parametrize("op", schema.SCHEMAS)
@pytest.mark.parametrize(
    ("problem", "dtype", "change", "expected"),
    [
        (Problem(4, 16, 16), BF16, {}, None),
        (Problem(4, 16, 16, sources=5), BF16, {}, "at most 4 sources"),
        (Problem(4, 16, 16, halved=True), BF16, {}, "sources of another type"),
        (Problem(4, 16, 16), BF16, {"coefficients": torch.float64}, "coefficients in float32"),
        (Problem(4, 16, 16), torch.float32, {"tf32": False}, "TF32 only"),
        (Problem(4, 16, 16), torch.float32, {"tf32": True}, None),
    ],
)
def test_refusals(op: str, problem: Problem, dtype: torch.dtype, change: dict[str, Any], expected: str | None) -> None:
    if "conv" in op:
        problem = Problem(**{**vars(problem), "kernel": (3, 3), "size": (5, 6)})
    call = list(arguments(problem, op, dtype, CPU))
    if "coefficients" in change:
        at = 3 if op.endswith("wgrad") else 2
        call[at] = call[at].to(change["coefficients"])
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, change.get("tf32", False)
    try:
        with torch.backends.cudnn.flags(allow_tf32=change.get("tf32", False)):
            reason = cuda.refuses_call(op, call)
    finally:
        matmul.allow_tf32 = before
    assert reason is None if expected is None else expected in (reason or "")


@pytest.mark.parametrize("op", [op for op in schema.SCHEMAS if "conv" in op])
def test_auto_takes_channels_last_convolutions_of_enough_channels(op: str) -> None:
    def said(**changes: Any) -> str | None:
        problem = Problem(**{**vars(Problem(2, 16, 16, (3, 3), (5, 6), layout="channels_last")), **changes})
        return cuda.automatic_call(op, arguments(problem, op, BF16, CPU))

    assert said() is None
    assert "channels_last" in (said(layout="contiguous") or "")
    assert "channels a group" in (said(out=1, within=1, groups=16) or "")


def test_cases() -> None:
    assert cuda.refuses(Case("mixed_linear", "cpu", BF16)) == "runs on NVIDIA GPUs"
    assert cuda.refuses(Case("mixed_linear", "cuda", torch.float64)) == "has no kernel for float64"
    assert cuda.refuses(Case("mixed_linear", "cuda", BF16)) == extension.EXTENSION.missing


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_qualification_runs_every_configuration(op: str) -> None:
    (usual, _), *forced = cuda.variants(op, BF16)
    names = [name for name, _ in forced]
    table = configs.WGRADS if op.endswith("wgrad") else configs.PRODUCTS
    assert usual == "" and len({*names}) == len(names) == len(table) * len(configs.STAGES)


def launches(monkeypatch: pytest.MonkeyPatch, op: str, call: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What an op would launch: kernel, grid, threads and bytes of shared memory."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(extension, "launch", lambda op, *launch: found.append(launch[:4]))
    cuda.kernels([op])[op](*call)
    return found


@pytest.mark.parametrize("way", ["", "_dgrad"])
def test_the_kernel_that_is_chosen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(op: str, problem: Problem) -> str:
        return str(launches(monkeypatch, op + way, arguments(problem, op + way, BF16, CPU))[0][0])

    kind = "dgrad" if way else "forward"
    assert first("mixed_linear", Problem(8, 64, 64)) == f"small_{kind}_pair_8_bf16"
    assert first("mixed_linear", Problem(16, 64, 64, sources=3)) == f"small_{kind}_general_16_bf16"
    assert first("mixed_linear", Problem(17, 64, 64)).startswith(f"linear_{kind}_pair_")
    assert first("mixed_linear", Problem(2048, 2048, 512)) == f"linear_{kind}_pair_128x256_bf16"
    layer = Problem(64, 32, 32, (3, 3), (56, 56), padding=1, layout="channels_last", biased=False)
    assert first("mixed_conv", layer) == f"resident_{kind}_pair_32_bf16"
    assert first("mixed_conv", Problem(**{**vars(layer), "batch": 1})).startswith(f"conv_{kind}_pair_")
    assert first("mixed_conv", Problem(**{**vars(layer), "kernel": (1, 1), "padding": 0})).startswith(f"linear_{kind}")


@pytest.mark.parametrize("op", ["mixed_linear", "mixed_linear_dgrad"])
def test_few_tokens_fill_the_device_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, (x, y, splits), threads, shared), reduction = launches(
        monkeypatch, op, arguments(Problem(4, 1024, 1024), op, BF16, CPU)
    )
    assert y == 1 and threads == 256 and shared == 0 and splits > 1 and x * splits <= 2 * H100.multiprocessors
    assert reduction[0] == "linear_reduce_bf16"
