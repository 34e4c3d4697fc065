"""CuTe's matrix instructions and a pipeline over TMA, as nvcc compiles them: they must be right, and faults be seen."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from tests.emulated.compilers import compiled, cutlass
from tests.emulated.machine.launch import Output, TensorMap, run
from tests.emulated.machine.memory import Fault

SOURCE = Path(__file__).parent / "cute.cu"
SEEDS = range(3)
SPANS = "INTER", "SW32", "SW64", "SW128"


@pytest.fixture(scope="module")
def text() -> str:
    return compiled(SOURCE, "90a", "-I" + cutlass())


def assert_product(found: Tensor, a: Tensor, b: Tensor, error: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), a.double() @ b.double().T, rtol=error, atol=error)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_warp_products(text: str, dtype: torch.dtype, late: bool) -> None:
    a, b, out = torch.randn(64, 160).to(dtype), torch.randn(64, 160).to(dtype), torch.zeros(64, 64)
    name = "warp_bf16" if dtype == torch.bfloat16 else "warp_f16"
    run(text, name, (1,), (128,), [a, b, Output(out), 160], late=late)
    assert_product(out, a, b)


def group(
    text: str, name: str, rows: int, columns: int, depth: int, dtype: torch.dtype, k_a: bool, k_b: bool, seed: int,
    late: bool | None = None, out: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a product of warp groups' instructions is, and of what."""
    a, b, c = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype), torch.zeros(rows, columns)
    c = c.to(out)
    stored = [x if major else x.T.contiguous() for x, major in ((a, k_a), (b, k_b))]
    shared = (rows + columns) * depth * dtype.itemsize
    run(text, name, (1,), (128,), [*stored, Output(c)], shared, seed=seed, late=late)
    return c, a, b


KINDS = {"ss_k_k": (True, True), "ss_mn_mn": (False, False), "rs_k_mn": (True, False)}
MIXED = {"ss_mn_k_SW128": (False, True), "ss_k_mn_SW128": (True, False), "rs_k_k_SW128": (True, True)}
NAMES = {f"{kind}_{span}": majors for kind, majors in KINDS.items() for span in SPANS} | MIXED


def rows_of(name: str) -> int:
    """Two instructions' of those whose operands have different majors."""
    return 128 if name in ("ss_mn_k_SW128", "ss_k_mn_SW128") else 64


@pytest.mark.parametrize("name", NAMES)
def test_group_products(text: str, name: str) -> None:
    for late in (True, False):
        assert_product(*group(text, name, rows_of(name), 128, 64, torch.bfloat16, *NAMES[name], seed=0, late=late))


@pytest.mark.parametrize("name", [*(f"tf32_ss_{span}" for span in SPANS), "tf32_rs_SW128"])
def test_group_products_in_tf32(text: str, name: str) -> None:
    found, *operands = group(text, name, 64, 64, 32, torch.float32, True, True, seed=1)
    a, b = ((operand.view(torch.int32) & ~0x1FFF).view(torch.float32) for operand in operands)
    assert_product(found, a, b)


@pytest.mark.parametrize("columns", [8, 256])
def test_group_products_of_other_widths(text: str, columns: int) -> None:
    assert_product(*group(text, f"wide_{columns}", 64, columns, 32, torch.float16, True, False, seed=2))


def test_group_products_that_sum_in_half_precision(text: str) -> None:
    found = group(text, "half_sums", 64, 64, 64, torch.float16, True, True, seed=3, out=torch.float16)
    assert_product(*found, error=5e-2)


GROUP_FAULTS: dict[str, tuple[str, str, str, str]] = {
    "a wait removed": ("ss_k_k_SW128", r"wgmma\.wait_group\.sync\.aligned 0;", "", "register of a wgmma"),
    "a group not committed": ("ss_k_k_SW128", r"wgmma\.commit_group\.sync\.aligned;", "", "register of a wgmma"),
    "a proxy fence removed": ("ss_k_k_SW128", r"fence\.proxy\.async\.shared::cta;", "", "without fence.proxy.async"),
    "a fence removed": ("rs_k_k_SW128", r"wgmma\.fence\.sync\.aligned;", "", "without wgmma.fence"),
    "a barrier removed": ("ss_k_k_SW128", r"bar\.sync\s+0;", "", "race"),
}


@pytest.mark.parametrize("fault", GROUP_FAULTS)
def test_faults_of_a_group_product(text: str, fault: str) -> None:
    name, pattern, instead, kind = GROUP_FAULTS[fault]
    broken = edited(text, name, pattern, instead)
    for seed in SEEDS:
        with pytest.raises(Fault, match=kind):
            group(broken, name, rows_of(name), 128, 64, torch.bfloat16, *NAMES[name], seed=seed)


def edited(text: str, name: str, pattern: str, instead: str | Callable[[re.Match[str]], str], place: int = 0) -> str:
    """The text with what matches in a kernel, at one place, replaced."""
    start = text.index(f".entry {name}(")
    end = text.find(".entry ", start + 1) % (len(text) + 1)
    found = list(re.finditer(pattern, text[start:end]))
    assert len(found) > place, pattern
    match = found[place]
    new = instead(match) if callable(instead) else instead
    return text[: start + match.start()] + new + text[start + match.end() :]


@pytest.mark.parametrize("place", ["swizzle", "transposition"])
@pytest.mark.parametrize("name", ["ss_k_k_SW128", "ss_mn_mn_SW64", "rs_k_mn_SW32"])
def test_wrong_descriptors(text: str, name: str, place: str) -> None:
    """One of the swizzle's bits, or of the transpositions, flipped in the first product's."""

    def flip(match: re.Match[str]) -> str:
        if place == "transposition":
            return f"{match[1]}{match[2]}, p, 1, 1, {match[3][:-1]}{1 - int(match[3][-1])};"
        where = match[2].split(", ")[-1]
        return f"xor.b64 {where}, {where}, {1 << 62};\n{match[0]}"

    pattern = r"(wgmma\.mma_async[^;{]*\{[^}]*\},\s*)((?:\{[^}]*\}|%rd\d+),\s*%rd\d+),\s*p,\s*1,\s*1,\s*([\d, ]+);"
    broken = edited(text, name, pattern, flip)
    try:
        found, a, b = group(broken, name, rows_of(name), 128, 64, torch.bfloat16, *NAMES[name], seed=0)
    except Fault:
        return
    assert not torch.allclose(found.double(), a.double() @ b.double().T, rtol=1e-2, atol=1e-2)


def piped(text: str, seed: int, late: bool | None = None, swizzle: int = 128) -> bool:
    """Whether the pipeline's product is right, and nothing beside it is written."""
    torch.manual_seed(seed)
    a, b = torch.randn(70, 336).bfloat16(), torch.randn(100, 336).bfloat16()
    out = torch.full((70, 104), 7.0).bfloat16()
    maps = [TensorMap(x, shape, x.stride(), [64, 64], swizzle) for x, shape in ((a, a.shape), (b, b.shape))]
    arguments = [*maps, TensorMap(out, [70, 100], out.stride(), [64, 64], 128), 6]
    run(text, "piped", (2, 2), (160,), arguments, 5 * 64 * 64 * 2, seed=seed, late=late)
    right = torch.allclose(out[:, :100].double(), a.double() @ b.double().T, rtol=1e-2, atol=1e-1)
    return right and bool((out[:, 100:] == 7).all())


@pytest.mark.parametrize("late", [True, False, None])
@pytest.mark.parametrize("seed", SEEDS)
def test_pipeline(text: str, seed: int, late: bool | None) -> None:
    assert piped(text, seed, late)


TRY = r"mbarrier\.try_wait\.parity\.shared::cta\.b64\s+P1,[^;]*;"
DONE = r"wgmma\.wait_group\.sync\.aligned {};"
PIPE_FAULTS: dict[str, tuple[str, str, int, str]] = {
    "the producer does not wait for the third tile": (TRY, "setp.eq.u32 P1, 0, 0;", 2, "still|race|arrivals|wrong"),
    "the producer does not wait for the last tiles": (TRY, "setp.eq.u32 P1, 0, 0;", 4, "still|race|arrivals|wrong"),
    "the consumer does not wait for even tiles": (TRY, "setp.eq.u32 P1, 0, 0;", 5, "still writes|never written|race"),
    "the consumer does not wait for odd tiles": (TRY, "setp.eq.u32 P1, 0, 0;", 6, "still writes|never written|race"),
    "a stage is released too early": (DONE.format(1), "wgmma.wait_group.sync.aligned 2;", 0, "still reads|register"),
    "a wait for products is removed": (DONE.format(1), "", 0, "still reads|register of a wgmma"),
    "the last wait for products is removed": (DONE.format(0), "", 0, "register of a wgmma"),
    "too few bytes are expected": (r"(expect_tx[^;]*), (%r\d+|16384);", r"8192", 0, "still writes|pending|race"),
    "too many bytes are expected": (r"(expect_tx[^;]*), (%r\d+|16384);", r"16640", 0, "deadlock"),
    "a release is missing": (r"mbarrier\.arrive\.shared::cta\.b64\s+_, \[[^;]*;", "", 0, "deadlock"),
    "a proxy fence is missing": (r"fence\.proxy\.async\.shared::cta;", "", 0, "without fence.proxy.async"),
    "a barrier is missing": (r"bar\.sync 1, 128;", "", 0, "race|never written|without fence"),
    "a store is not waited for": (r"cp\.async\.bulk\.wait_group\.read 0;", "", 0, "may still read"),
    "an initialisation is missing": (r"mbarrier\.init\.shared::cta\.b64[^;]*;", "", 2, "no mbarrier"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PIPE_FAULTS)
def test_faults_of_a_pipeline(text: str, fault: str) -> None:
    pattern, instead, place, kind = PIPE_FAULTS[fault]
    by = (lambda match: f"{match[1]}, {instead};") if "bytes" in fault else instead
    broken = edited(text, "piped", pattern, by, place)
    for seed in SEEDS:
        with pytest.raises(Fault, match=kind):
            assert piped(broken, seed), "wrong"


def test_wrong_tensor_map(text: str) -> None:
    with pytest.raises(Fault, match="rows in the box other than the swizzle's span"):
        piped(text, 0, swizzle=64)
    assert not piped(text, 0, swizzle=0)
