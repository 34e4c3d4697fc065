"""The interpreter on the output of compilers that are right on hardware: what it computes must be right here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.8", reason="holds what Triton 3.8 emits")

import triton
import triton.language as tl

from tests.emulated.compilers import compiled
from tests.emulated.machine.launch import Output, run
from tests.emulated.machine.launch_triton import catching, run_triton

SOURCE = Path(__file__).parent / "kernels.cu"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def text() -> str:
    return compiled(SOURCE, "80")


def test_addition_with_a_ragged_edge(text: str) -> None:
    a, b = RNG.normal(size=(2, 1000)).astype(np.float32)
    c = Output(np.zeros(1000, np.float32))
    run(text, "add", (9,), (128,), [a, b, c, 1000])
    np.testing.assert_array_equal(c.array, a + b)
    assert c.written.all()


@pytest.mark.parametrize("seed", range(3))
def test_transpose_through_shared_memory(text: str, seed: int) -> None:
    matrix = RNG.normal(size=(37, 70)).astype(np.float32)
    out = Output(np.zeros((70, 37), np.float32))
    run(text, "transpose", (3, 2), (32, 8), [matrix, out, 37, 70], seed=seed)
    np.testing.assert_array_equal(out.array, matrix.T)
    assert out.written.all()


def test_reduction_by_shuffles(text: str) -> None:
    values, sum_ = RNG.normal(size=1000).astype(np.float32), np.zeros(1, np.float32)
    run(text, "total", (2,), (96,), [values, sum_, 1000])
    np.testing.assert_allclose(sum_, values.sum(), rtol=1e-4)


def test_local_and_constant_memory(text: str) -> None:
    values, out = RNG.integers(0, 8, 500).astype(np.int32), np.zeros(8, np.int32)
    run(text, "histogram", (1,), (64,), [values, out, 500])
    np.testing.assert_array_equal(out, np.bincount(values, minlength=8) * [2, 3, 5, 7, 11, 13, 17, 19])


def test_parameter_of_a_structure(text: str) -> None:
    numbers = np.zeros(1, np.dtype([("scale", "i4", 3), ("shift", "i2"), ("factor", "f8")], align=True))
    numbers["scale"], numbers["shift"], numbers["factor"] = [[-2, 3, 5]], -7, 0.25
    out = np.zeros(64, np.float32)
    run(text, "structure", (1,), (64,), [numbers.tobytes(), Output(out)])
    scaled = np.array([-2, 3, 5])[np.arange(64) % 3] * np.arange(64)
    np.testing.assert_array_equal(out, np.fmod(np.trunc(scaled / 7), 5) - 7 + 0.25 * np.arange(64))


def test_half_precision(text: str) -> None:
    a, b, out = torch.randn(32, 2).half(), torch.randn(32, 2).bfloat16(), torch.zeros(32, 2)
    run(text, "half_math", (1,), (32,), [a, b, Output(out)])
    left, right = (a.double() ** 2 + 0.5).half().float(), (b * b).float()
    torch.testing.assert_close(out[:, 0], left[:, 0] + right[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(out[:, 1], left[:, 1].exp() / (1 + right[:, 1].abs().sqrt()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wmma(text: str, dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.zeros(16, 16)
    run(text, f"wmma_{'bf16' if dtype == torch.bfloat16 else 'f16'}", (1,), (32,), [a, b, Output(c)])
    torch.testing.assert_close(c.double(), a.double() @ b.double().T + 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("late", [True, False, None])
def test_asynchronous_copies(text: str, late: bool | None) -> None:
    values, out = RNG.normal(size=(7, 128)).astype(np.float32), np.zeros((7, 128), np.float32)
    run(text, "pipeline", (1,), (128,), [values, Output(out), 7], late=late)
    np.testing.assert_array_equal(out, values + np.roll(values, -1, 1))


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, a_stride, b_stride, c_stride, TF32: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), SUM)
    for start in tl.range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(a + m[:, None] * a_stride + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0.0)
        right = tl.load(b + k[:, None] * b_stride + n[None, :], (k < K)[:, None] & (n < N)[None, :], 0.0)
        total = tl.dot(left, right, total, input_precision="tf32" if TF32 else "ieee", out_dtype=SUM)
    tl.store(c + m[:, None] * c_stride + n[None, :], total, (m < M)[:, None] & (n < N)[None, :])


def multiply(
    a: Tensor,
    b: Tensor,
    stages: int,
    late: bool | None,
    dtype: torch.dtype = torch.float32,
    arch: str = "sm_80",
    seed: int = 0,
    depth: int = 32,
    warps: int = 4,
) -> tuple[Tensor, str]:
    """The product of a Triton kernel, and the PTX that was executed."""
    out = torch.full((a.shape[0], b.shape[1]), torch.nan, dtype=dtype)
    total = tl.float16 if dtype == torch.float16 else tl.float32
    with catching(arch) as caught:
        matmul_kernel[(triton.cdiv(a.shape[0], 64), triton.cdiv(b.shape[1], 64))](
            a, b, out, a.shape[0], b.shape[1], a.shape[1], a.stride(0), b.stride(0), out.stride(0),
            a.dtype == torch.float32, total, 64, depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    caught[0].arguments[2] = output = Output(out)
    run_triton(caught[0], seed=seed, late=late)
    assert output.written.all()
    return out, caught[0].compiled.asm["ptx"]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_matmul(dtype: torch.dtype, stages: int, late: bool) -> None:
    a, b = torch.randn(70, 112).to(dtype), torch.randn(112, 80).to(dtype)
    product, text = multiply(a, b, stages, late)
    assert "cp.async.cg" in text
    assert f"mma.sync.aligned.m16n8k{8 if dtype == torch.float32 else 16}" in text
    assert "ldmatrix" in text
    error = 1e-3 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=error, atol=30 * error)


def test_triton_matmul_without_alignment() -> None:
    a, b = torch.randn(33, 45).bfloat16(), torch.randn(45, 67).bfloat16()
    product, text = multiply(a, b, 2, None)
    assert "cp.async.cg" not in text
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-6, atol=3e-5)


def test_triton_matmul_that_sums_in_half_precision() -> None:
    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    product, text = multiply(a, b, 2, None, torch.float16)
    assert "m16n8k16.row.col.f16.f16.f16.f16" in text
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-2, atol=5e-2)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("late", [True, False, None])
@pytest.mark.parametrize(("depth", "stages", "warps"), [(32, 1, 4), (64, 2, 4), (32, 3, 4), (32, 4, 4), (32, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_matmul_of_warp_groups(
    dtype: torch.dtype, depth: int, stages: int, warps: int, late: bool | None
) -> None:
    """64 rows are of one group: where there are two, each has 32 of the columns."""
    a, b = torch.randn(70, 176).to(dtype), torch.randn(176, 80).to(dtype)
    product, text = multiply(a, b, stages, late, arch="sm_90", seed=stages, depth=depth, warps=warps)
    assert ("cp.async.cg" in text) == (stages > 1)
    assert f"wgmma.mma_async.sync.aligned.m64n{256 // warps}k{8 if dtype == torch.float32 else 16}" in text
    error = 1e-3 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=error, atol=30 * error)


def test_triton_matmul_of_warp_groups_that_sums_in_half_precision() -> None:
    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    product, text = multiply(a, b, 2, None, torch.float16, "sm_90")
    assert "m64n64k16.f16.f16.f16" in text
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-2, atol=5e-2)
