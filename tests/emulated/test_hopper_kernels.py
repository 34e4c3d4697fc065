"""Kernels of Triton's over TMA, and this package's, as they are compiled for sm_90, executed; and planted faults."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.8", reason="holds what Triton 3.8 emits")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rl_kernels.backends import reference
from rl_kernels.backends.gpu.heuristics import Config, use_config
from rl_kernels.backends.triton import assembler, conv, linear, offline
from rl_kernels.ops.values import Geometry, Wanted
from tests.emulated.machine.launch import TensorMap
from tests.emulated.machine.launch_triton import Launched, catching, run_triton
from tests.emulated.machine.memory import Fault
from tests.emulated.test_kernels import Problem, assert_close, flat

SEEDS = range(3)


@triton.jit
def host_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, SPECIALIZE: tl.constexpr):
    m, n = tl.program_id(0) * M, tl.program_id(1) * N
    total = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, K, DEPTH, warp_specialize=SPECIALIZE):
        total = tl.dot(a.load([m, k]), b.load([n, k]).T, total)
    c.store([m, n], total.to(c.dtype))


@triton.jit
def device_kernel(a, b, c, SIZE_M, SIZE_N, K, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr):
    m, n = tl.program_id(0) * M, tl.program_id(1) * N
    a = tl.make_tensor_descriptor(a, [SIZE_M, K], [K, 1], [M, DEPTH])
    b = tl.make_tensor_descriptor(b, [K, SIZE_N], [SIZE_N, 1], [DEPTH, N])
    c = tl.make_tensor_descriptor(c, [SIZE_M, SIZE_N], [SIZE_N, 1], [M, N])
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, K, DEPTH):
        total = tl.dot(a.load([m, k]), b.load([k, n]), total)
    c.store([m, n], total.to(c.dtype))


def over_host(
    a: Tensor, b: Tensor, c: Tensor, tile: tuple[int, int, int], warps: int, stages: int, specialize: bool = False
) -> Launched:
    """c = a b^T, with tensor maps of the host."""
    rows, columns, depth = tile
    maps = [
        TensorDescriptor.from_tensor(x, [i, j])
        for x, i, j in ((a, rows, depth), (b, columns, depth), (c, rows, columns))
    ]
    grid = triton.cdiv(c.shape[0], rows), triton.cdiv(c.shape[1], columns)
    with catching("sm_90") as caught:
        host_kernel[grid](*maps, a.shape[1], *tile, specialize, num_warps=warps, num_stages=stages)
    return caught[0]


def over_device(a: Tensor, b: Tensor, c: Tensor, tile: tuple[int, int, int], warps: int, stages: int) -> Launched:
    """c = a b, with tensor maps that the kernel makes."""
    grid = triton.cdiv(c.shape[0], tile[0]), triton.cdiv(c.shape[1], tile[1])
    with catching("sm_90") as caught:
        device_kernel[grid](a, b, c, *c.shape, a.shape[1], *tile, num_warps=warps, num_stages=stages)
    return caught[0]


def assert_product(found: Tensor, expected: Tensor) -> None:
    error = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=30 * error)


TILES = [(64, 64, 64, 4, 2), (64, 32, 32, 4, 3), (128, 64, 32, 4, 4), (128, 128, 64, 8, 3), (64, 64, 16, 4, 1)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("late", [True, False, None])
@pytest.mark.parametrize(("rows", "columns", "depth", "warps", "stages"), TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_matmul_with_maps_of_the_host(
    dtype: torch.dtype, rows: int, columns: int, depth: int, warps: int, stages: int, late: bool | None
) -> None:
    a, b, c = torch.randn(72, 176).to(dtype), torch.randn(104, 176).to(dtype), torch.zeros(72, 104).to(dtype)
    launched = over_host(a, b, c, (rows, columns, depth), warps, stages)
    text = launched.compiled.asm["ptx"]
    assert "cp.async.bulk.tensor.2d.shared::cta.global" in text
    assert "wgmma.mma_async" in text
    run_triton(launched, seed=stages, late=late)
    assert_product(c, a.double() @ b.double().T)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("late", [True, False, None])
@pytest.mark.parametrize(("rows", "columns", "depth", "warps", "stages"), TILES[:3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_matmul_with_maps_of_the_device(
    dtype: torch.dtype, rows: int, columns: int, depth: int, warps: int, stages: int, late: bool | None
) -> None:
    a, b, c = torch.randn(72, 176).to(dtype), torch.randn(176, 104).to(dtype), torch.zeros(72, 104).to(dtype)
    launched = over_device(a, b, c, (rows, columns, depth), warps, stages)
    assert "tensormap.cp_fenceproxy" in launched.compiled.asm["ptx"]
    run_triton(launched, seed=stages, late=late)
    assert_product(c, a.double() @ b.double())


@pytest.mark.parametrize("late", [True, False, None])
@pytest.mark.parametrize("seed", SEEDS)
def test_triton_matmul_of_specialized_warps(seed: int, late: bool | None) -> None:
    a, b, c = torch.randn(72, 336).half(), torch.randn(104, 336).half(), torch.zeros(72, 104).half()
    launched = over_host(a, b, c, (64, 64, 64), 4, 3, specialize=True)
    text = launched.compiled.asm["ptx"]
    assert "setmaxnreg" in text
    assert "mbarrier.arrive.shared" in text
    run_triton(launched, seed=seed, late=late)
    assert_product(c, a.double() @ b.double().T)


# This package's kernels.

of_sound_ptx = pytest.mark.xfail(
    not assembler.has_sound_ptx(),
    reason=f"Triton {triton.__version__} fences no copies from products that read them, and overtakes their registers",
    raises=Fault,
    strict=True,
)
"""What the machine code then is depends on ptxas, and is looked at when it is compiled."""


def gradients_of(problem: Problem, dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The weight gradients of a linear layer, executed, and what is right."""
    wanted = Wanted([True, True], True, [True] * len(problem.recipe.biases or ()))
    with catching("sm_90", functools.partial(run_triton, seed=1)):
        found = linear.mixed_linear_wgrad(dy, problem.x, problem.recipe, wanted)
    expected = reference.mixed_linear_wgrad(dy.double(), problem.x.double(), problem.wide, wanted)
    return flat(found), flat(expected)


LAYERS = [
    ((70, 88, 176), torch.bfloat16, False, Config(64, 64, 32, 4, 3), 1),
    ((70, 88, 176), torch.float16, True, Config(64, 32, 64, 4, 4), 2),
    ((130, 80, 144), torch.bfloat16, False, Config(128, 128, 64, 8, 3), 1),
    ((70, 72, 112), torch.float32, False, Config(64, 64, 32, 4, 3), 1),
]


@of_sound_ptx
@pytest.mark.parametrize(("shape", "dtype", "per_channel", "config", "splits"), LAYERS)
def test_linear(
    shape: tuple[int, int, int], dtype: torch.dtype, per_channel: bool, config: Config, splits: int
) -> None:
    tokens, out, in_ = shape
    problem = Problem((out, in_), (tokens, in_), dtype, per_channel)
    dy = torch.randn(tokens, out).to(dtype)
    launches: list[Launched] = []

    def execute(launched: Launched) -> None:
        launches.append(launched)
        run_triton(launched, seed=len(launches))

    with use_config(config, splits), offline.tf32(True):
        with catching("sm_90", execute):
            y = linear.mixed_linear(problem.x, problem.recipe)
            dx = linear.mixed_linear_dgrad(dy, problem.without_biases().recipe)
        gradients = gradients_of(problem.without_biases(), dy)
    assert "cp.async.cg" in launches[0].compiled.asm["ptx"]
    assert "wgmma.mma_async" in launches[0].compiled.asm["ptx"]
    assert_close([y], [reference.mixed_linear(problem.x.double(), problem.wide)])
    assert_close([dx], [reference.mixed_linear_dgrad(dy.double(), problem.wide)])
    assert_close(*gradients)


@of_sound_ptx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_wgrad_of_biases(dtype: torch.dtype) -> None:
    """The sums of dy have a kernel of their own: Triton 3.8 gives tiles that are summed as well a stage too few."""
    problem = Problem((64, 64), (160, 64), dtype, False)
    with use_config(Config(64, 64, 32, 4, 3), 1), offline.tf32(True):
        assert_close(*gradients_of(problem, torch.randn(160, 64).to(dtype)))


@of_sound_ptx
def test_conv() -> None:
    problem = Problem((64, 32, 3, 3), (2, 32, 6, 7), torch.bfloat16, False)
    layout = torch.channels_last
    x, dy = problem.x.to(memory_format=layout), torch.randn(2, 64, 6, 7).bfloat16().to(memory_format=layout)
    problem.lay_out(layout)
    geometry = Geometry([1, 1], [1, 1], [1, 1], 1)
    texts: list[str] = []

    def execute(launched: Launched) -> None:
        texts.append(launched.compiled.asm["ptx"])
        run_triton(launched)

    with use_config(Config(64, 64, 32, 4, 3), 1), catching("sm_90", execute):
        y = conv.mixed_conv(x, problem.recipe, geometry)
        unbiased, wanted = problem.without_biases(), Wanted([True, True], True, [])
        dx = conv.mixed_conv_dgrad(dy, unbiased.recipe, x.shape, geometry)
        gradients = conv.mixed_conv_wgrad(dy, x, unbiased.recipe, wanted, geometry)
    assert any("wgmma.mma_async" in text for text in texts)
    wide = x.double(), dy.double()
    assert_close([y], [reference.mixed_conv(wide[0], problem.wide, geometry)])
    assert_close([dx], [reference.mixed_conv_dgrad(wide[1], problem.wide, x.shape, geometry)])
    expected = reference.mixed_conv_wgrad(wide[1], wide[0], unbiased.wide, wanted, geometry)
    assert_close(flat(gradients), flat(expected))


# Faults planted in Triton's text.


@functools.cache
def planted(kind: str) -> tuple[Launched, Tensor]:
    """A launch to plant faults in, and what is right."""
    torch.manual_seed(0)
    a, b, c = torch.randn(64, 304).bfloat16(), torch.randn(64, 304).bfloat16(), torch.zeros(64, 64).bfloat16()
    if kind == "copies":
        problem = Problem((64, 176), (64, 176), torch.bfloat16, False)
        with use_config(Config(64, 64, 32, 4, 3), 1), catching("sm_90") as caught:
            linear.mixed_linear_dgrad(a[:, :64].contiguous(), problem.without_biases().recipe)
        return caught[0], reference.mixed_linear_dgrad(a[:, :64].double(), problem.wide)
    if kind == "device":
        return over_device(a, b.T.contiguous(), c, (64, 64, 64), 4, 3), a.double() @ b.double().T
    return over_host(a, b, c, (64, 64, 64), 4, 3, kind == "specialized"), a.double() @ b.double().T


def outcome(kind: str, text: str, seed: int) -> str:
    """The fault that is seen, or "wrong"; empty if there is none."""
    launched, expected = planted(kind)
    out: Any = (
        launched.arguments[0]
        if kind == "copies"
        else next(
            one.tensor if isinstance(one, TensorMap) else one
            for one in reversed(launched.arguments)
            if isinstance(one, (TensorMap, Tensor))
        )
    )
    out.zero_()
    try:
        run_triton(launched, seed=seed, text=text)
    except Fault as fault:
        assert fault.line is not None
        assert fault.warp is not None
        return fault.kind
    return "" if torch.allclose(out.double(), expected, rtol=1.5e-2, atol=0.3) else "wrong"


WAITS = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete,[^;]*;"
PASSED = "setp.eq.u32 complete, 0, 0;"
DONE = r"wgmma\.wait_group\.sync\.aligned 1;"
FENCE = r"fence\.proxy\.async\.shared::cta;"
EXPECTS = r"(expect_tx\.shared::cta\.b64 _, \[%r\d+\]), 16384;"
SWIZZLE = r"\b46116862933\d{8}\b"


def flipped(match: re.Match[str]) -> str:
    """A descriptor's constant bits with a swizzle of 64 bytes for one of 128."""
    return str(int(match[0]) ^ 3 << 62)


PLANTED: dict[str, tuple[str, str, str | Callable[[re.Match[str]], str], str]] = {
    "a wait for a tile removed": ("host", WAITS, PASSED, "still writes|never written|was not waited for"),
    "a wait for products weakened": ("host", DONE, "wgmma.wait_group.sync.aligned 2;", "still reads"),
    "a wait for products removed": ("host", r"wgmma\.wait_group\.sync\.aligned 0;", "", "register of a wgmma"),
    "a proxy fence of the store removed": ("host", FENCE, "", "without fence.proxy.async"),
    "too few bytes expected": ("host", EXPECTS, r"\1, 8192;", "still writes|never written|not waited for|pending"),
    "too many bytes expected": ("host", EXPECTS, r"\1, 16640;", "deadlock.* bytes pending"),
    "a swizzle of another span": ("host", SWIZZLE, flipped, "wrong|never written|within the rows"),
    "a store not waited for": ("host", r"cp\.async\.bulk\.wait_group\s+0;", "", "may still read"),
    "a fence of the registers removed": ("host", r"wgmma\.fence\.sync\.aligned;", "", "without wgmma.fence"),
    "a map not acquired": ("device", r"@%p\d+ fence\.proxy\.tensormap::generic[^;]*;", "", "fence.proxy.tensormap"),
    "a wait of specialized warps removed": ("specialized", WAITS, PASSED, "still|race|arrivals"),
    "an arrival removed": ("specialized", r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64[^;]*;", "", "deadlock"),
    "a proxy fence of copies removed": ("copies", FENCE, "", "without fence.proxy.async"),
    "a wait for copies removed": ("copies", r"cp\.async\.wait_group\s+\d;", "", "still writes"),
    "a wait for products of copies weakened": (
        "copies",
        DONE,
        "wgmma.wait_group.sync.aligned 2;",
        "still reads|register",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults(fault: str) -> None:
    kind, pattern, instead, message = PLANTED[fault]
    text = planted(kind)[0].compiled.asm["ptx"]
    broken, places = re.subn(pattern, instead, text, count=1)
    assert places
    for seed in SEEDS:
        assert outcome(kind, text, seed) == ""
        assert re.search(message, outcome(kind, broken, seed)), outcome(kind, broken, seed)
