"""Planted faults: each must be reported, with where it is."""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this platform")

from tests.emulated.compilers import compiled
from tests.emulated.machine.launch import Output, run
from tests.emulated.machine.launch_triton import Launched, run_triton
from tests.emulated.machine.memory import Fault

SOURCE = Path(__file__).parent / "kernels.cu"
SEEDS = range(3)


def small(body: str, parameters: str = ".param .u64 p", shared: int = 0) -> str:
    return f"""
    .shared .align 16 .b8 tile[{shared or 16}];
    .visible .entry test({parameters}) {{
        .reg .b64 %a<9>; .reg .b32 %r<9>; .reg .pred %p<9>;
        mov.u32 %r0, %tid.x;
        ld.param.u64 %a0, [p];
        mad.wide.u32 %a1, %r0, 4, %a0;
        {body}
        ret;
    }}"""


def fault_of(text: str, arguments: list[Any], block: int = 64, **options: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        run(text, "test", (1,), (block,), arguments, **options)
    return caught.value


def test_out_of_bounds() -> None:
    fault = fault_of(small("st.global.u32 [%a1], %r0;"), [np.zeros(40, np.uint32)])
    assert fault.kind.startswith("out of bounds of argument")
    assert (fault.cta, fault.warp, fault.lane) == ((0, 0, 0), 1, 8)
    assert fault.text == "st.global.u32 [%a1], %r0"
    assert fault.line == 8
    assert "address 0x" in str(fault)
    fault = fault_of(small("st.shared.u32 [%r0+16], %r0;"), [None], block=1)
    assert fault.kind == "out of bounds of shared memory"


def test_between_the_rows_of_a_view() -> None:
    view = torch.zeros(4, 8, dtype=torch.int32)[:, :5]
    assert fault_of(small("ld.global.u32 %r1, [%a1];"), [view], block=32).lane == 5


def test_null_pointer() -> None:
    fault = fault_of(small("ld.global.u32 %r1, [%a1];"), [None])
    assert fault.kind == "out of bounds: no memory there"


def test_misaligned() -> None:
    fault = fault_of(small("ld.global.v2.u32 {%r1, %r2}, [%a1];"), [np.zeros(99, np.uint32)])
    assert (fault.kind, fault.lane) == ("misaligned access of 8 bytes", 1)


def test_never_written() -> None:
    fault = fault_of(small("shl.b32 %r1, %r0, 2; ld.shared.u32 %r2, [%r1];", shared=256), [None])
    assert fault.kind == "read of bytes of shared memory that were never written"
    fault = fault_of(small("ld.global.u32 %r1, [%a1];"), [Output(np.zeros(64, np.uint32))])
    assert fault.kind == "read of bytes of argument 1 that were never written"


def test_not_all_is_written() -> None:
    out = Output(np.zeros(64, np.uint32))
    run(small("st.global.u32 [%a1], %r0;"), "test", (1,), (32,), [out])
    assert out.written.tolist() == [True] * 32 + [False] * 32


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p0, %r0, 32; @%p0 bra SKIP; bar.sync 1; SKIP: bar.sync 0, 64;",
        "setp.lt.u32 %p0, %r0, 32; @%p0 bra SKIP; bar.sync 0, 64; SKIP:",
    ],
)
def test_deadlock(body: str) -> None:
    fault = fault_of(small(body), [None])
    assert fault.kind == "deadlock: all warps wait"
    assert fault.text.startswith("bar.sync")
    assert fault.warp is not None


def test_barrier_within_a_branch() -> None:
    fault = fault_of(small("setp.lt.u32 %p0, %r0, 7; @%p0 bra SKIP; bar.sync 0; SKIP:"), [None])
    assert fault.kind.startswith("lanes of the warp are elsewhere") or fault.kind.startswith("deadlock")


def test_shuffle_without_a_named_lane() -> None:
    body = "setp.lt.u32 %p0, %r0, 7; @%p0 bra SKIP; shfl.sync.idx.b32 %r1, %r0, 9, 31, -1; SKIP:"
    fault = fault_of(small(body + "add.u32 %r1, %r1, 1;"), [None])
    assert fault.kind == "lanes that are named are elsewhere"


def test_endless_loop() -> None:
    assert fault_of(small("AGAIN: bra AGAIN;"), [None], limit=1000).kind.startswith("no end")


def transposed(text: str, seed: int) -> bool:
    """Whether the kernel is right."""
    matrix = np.arange(33 * 40, dtype=np.float32).reshape(33, 40)
    out = np.zeros((40, 33), np.float32)
    run(text, "transpose", (2, 2), (32, 8), [matrix, Output(out), 33, 40], seed=seed)
    return np.array_equal(out, matrix.T)


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier_of_the_transpose(seed: int) -> None:
    text = compiled(SOURCE, "80")
    assert transposed(text, seed)
    with pytest.raises(Fault, match=r"race|never written") as caught:
        transposed(re.sub(r"bar\.sync\s+0;", "", text), seed)
    assert "shared" in caught.value.text
    assert None not in (caught.value.line, caught.value.cta, caught.value.warp, caught.value.lane)


def piped(text: str, seed: int) -> bool:
    values, out = np.arange(5 * 128, dtype=np.float32).reshape(5, 128), np.zeros((5, 128), np.float32)
    run(text, "pipeline", (1,), (128,), [values, Output(out), 5], seed=seed)
    return np.array_equal(out, values + np.roll(values, -1, 1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("pattern", "place", "instead", "kind"),
    [
        (r"cp\.async\.wait_group\s+2;", 0, "", "asynchronous copy still writes"),
        (r"cp\.async\.wait_group\s+2;", 0, "cp.async.wait_group 3;", "asynchronous copy still writes"),
        (r"bar\.sync\s+0;", 0, "", "race|asynchronous|never written"),
        (r"bar\.sync\s+0;", 1, "", "race|asynchronous|never written"),
    ],
)
def test_faults_of_a_pipeline(pattern: str, place: int, instead: str, kind: str, seed: int) -> None:
    text = compiled(SOURCE, "80")
    assert piped(text, seed)
    start = text.index(".entry pipeline")
    found = list(re.finditer(pattern, text[start:]))[place]
    broken = text[: start + found.start()] + instead + text[start + found.end() :]
    with pytest.raises(Fault, match=kind):
        piped(broken, seed)


@functools.cache
def product() -> tuple[Launched, torch.Tensor]:
    """A launch of the linear product in three stages, and what is right in float64."""
    from rl_kernels.backends.gpu.heuristics import Config, use_config
    from rl_kernels.backends.triton import linear
    from rl_kernels.ops.values import Recipe
    from tests.emulated.machine.launch_triton import catching

    torch.manual_seed(0)
    x, weights = torch.randn(20, 112).bfloat16(), [torch.randn(24, 112).bfloat16() for _ in range(2)]
    coefficients = torch.tensor([0.7, 0.3])
    with use_config(Config(32, 32, 32, 4, 3), 1), catching("sm_80") as caught:
        linear.mixed_linear(x, Recipe(weights, coefficients))
    mixed = weights[0].double() * 0.7 + weights[1].double() * 0.3
    return caught[0], x.double() @ mixed.T


def is_right(text: str, seed: int) -> bool:
    launched, expected = product()
    out = launched.arguments[0].zero_()
    run_triton(launched, seed=seed, text=text)
    return torch.allclose(out.double(), expected, rtol=1.5e-2, atol=0.3)


def test_the_product_is_right() -> None:
    text = product()[0].compiled.asm["ptx"]
    assert "cp.async.cg" in text
    assert all(is_right(text, seed) for seed in SEEDS)


def without(pattern: str) -> list[str]:
    """The kernel's PTX without one of the lines that match, for each of them."""
    lines = product()[0].compiled.asm["ptx"].splitlines()
    places = [place for place, line in enumerate(lines) if re.search(pattern, line)]
    assert places, pattern
    return ["\n".join(line if i != place else "" for i, line in enumerate(lines)) for place in places]


def seen(text: str, seed: int) -> bool:
    try:
        return not is_right(text, seed)
    except Fault:
        return True


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_waits_of_the_product(seed: int) -> None:
    assert all(seen(text, seed) for text in without(r"cp\.async\.wait_group"))


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barriers_of_the_product(seed: int) -> None:
    """Two of Triton's barriers are not needed: across them no warp reads or writes what another did."""
    found = [seen(text, seed) for text in without(r"bar\.sync")]
    assert sum(found) >= len(found) - 2, found


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_masks_of_the_product(seed: int) -> None:
    text = product()[0].compiled.asm["ptx"]
    stores, copies = re.compile(r"@%p\d+ (st\.global)"), re.compile(r"(cp\.async\.cg\S* [^;]*0x10), %r\d+;")
    assert stores.search(text)
    assert copies.search(text)
    assert seen(stores.sub(r"\1", text), seed)
    assert seen(copies.sub(r"\1;", text), seed)
