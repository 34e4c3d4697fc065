"""The instructions of sm_90, in small kernels: what each does, and what is a fault."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulated.machine.launch import Output, TensorMap, run
from tests.emulated.machine.memory import Fault
from tests.emulated.machine.ptx import PTXError

SEEDS = range(3)


def small(body: str, parameters: str = ".param .u64 p") -> str:
    """Threads with %r0 their number, %a0 the parameter, %a1 its element of 4 bytes, and %p0 for the first."""
    return f"""
    .shared .align 8 .b64 bar[4];
    .shared .align 1024 .b8 tile[32768];
    .visible .entry test({parameters}) {{
        .reg .b64 %a<9>; .reg .b32 %r<32>; .reg .f32 %f<99>; .reg .pred %p<9>;
        mov.u32 %r0, %tid.x;
        ld.param.u64 %a0, [p];
        mad.wide.u32 %a1, %r0, 4, %a0;
        setp.eq.u32 %p0, %r0, 0;
        mov.u32 %r1, bar; mov.u32 %r2, tile;
        {body}
        ret;
    }}"""


def fault_of(body: str, arguments: list[Any] | None = None, block: int = 64, **options: Any) -> str:
    with pytest.raises(Fault) as caught:
        run(
            small(body, options.pop("parameters", ".param .u64 p")),
            "test",
            (1,),
            (block,),
            arguments or [None],
            **options,
        )
    return caught.value.kind


INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r1], {}; bar.sync 0;"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r1];"
AWAIT = "WAIT{0}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], {1}; @!%p1 bra WAIT{0};"
SHIFT = "shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, %r2;"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
def test_mbarrier_orders_warps(seed: int, wait: str) -> None:
    body = (
        INIT.format(64)
        + f"""
        {SHIFT} st.shared.u32 [%r3], %r0; xor.b32 %r4, %r3, 128;
        mbarrier.arrive.shared::cta.b64 %a2, [%r1];
        LOOP: mbarrier.{wait}.shared::cta.b64 %p1, [%r1], %a2; @!%p1 bra LOOP;
        ld.shared.u32 %r5, [%r4]; st.global.u32 [%a1], %r5;"""
    )
    out = np.zeros(64, np.uint32)
    run(small(body), "test", (1,), (64,), [Output(out)], seed=seed)
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)
    relaxed = body.replace("arrive.shared", "arrive.relaxed.cta.shared")
    assert fault_of(relaxed, [Output(out)], seed=seed).startswith(("race", "read of bytes of shared memory that were"))


def test_mbarrier_counts_phases() -> None:
    """Three phases of a barrier for 96 arrivals, 32 of which come three at a time."""
    third = "setp.lt.u32 %p2, %r0, 32; selp.b32 %r5, 2, 1, %p2; mbarrier.arrive.shared::cta.b64 _, [%r1], %r5;"
    body = INIT.format(96) + third + AWAIT.format(1, 0) + third + AWAIT.format(2, 1) + third + AWAIT.format(3, 0)
    run(small(body), "test", (1,), (64,), [None])
    assert fault_of(body + AWAIT.format(4, 1)).startswith("deadlock")
    passes = (
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r1], 1; selp.b32 %r5, 1, 0, %p1; st.global.u32 [%a1], %r5;"
    )
    fresh = np.zeros(64, np.uint32)
    run(small(INIT.format(96) + passes), "test", (1,), (64,), [Output(fresh)])
    assert fresh.all()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (ARRIVE, "no mbarrier was initialised there"),
        (INIT.format(1) + ARRIVE + ARRIVE + "bar.sync 0;" + AWAIT.format(1, 1), ""),
        (INIT.format(64) + "@%p0 bra SKIP; " + ARRIVE + "SKIP: " + AWAIT.format(1, 0), "deadlock"),
        (INIT.format(64).replace("bar.sync 0;", "@%p0 bra SKIP;") + AWAIT.format(1, 0) + "SKIP: ", "race|no mbarrier"),
        (INIT.format(0), "an mbarrier for 0 arrivals"),
        (INIT.format(1) + "@%p0 mbarrier.init.shared::cta.b64 [%r1], 1;", "an mbarrier is there already"),
        (INIT.format(1) + "@%p0 st.shared.u32 [%r1], 0;", "write of an mbarrier|write of bytes of an mbarrier"),
        (INIT.format(1) + "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r1], 2;", "2 arrivals at an mbarrier"),
        (
            INIT.format(1) + "@%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 16;",
            "16 bytes pending at the end",
        ),
        (INIT.format(1) + "@%p0 mbarrier.inval.shared::cta.b64 [%r1]; bar.sync 0;" + ARRIVE, "no mbarrier"),
        ("mov.u32 %r1, tile; add.u32 %r1, %r1, 4;" + INIT.format(1), "misaligned"),
    ],
)
def test_faults_of_mbarriers(body: str, kind: str) -> None:
    if kind:
        assert re.match(kind, fault_of(body)), kind
    else:
        run(small(body), "test", (1,), (64,), [None])


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("count", "form"), [(64, ".noinc"), (1, "")])
def test_arrival_after_copies(count: int, form: str, late: bool) -> None:
    """Without .noinc, the arrivals come in addition."""
    body = (
        INIT.format(count)
        + f"""
        {SHIFT} cp.async.ca.shared.global [%r3], [%a1], 4;
        cp.async.mbarrier.arrive{form}.shared::cta.b64 [%r1];
        {"" if form else "bar.sync 0; @%p0 " + ARRIVE}
        {AWAIT.format(1, 0)}
        xor.b32 %r4, %r3, 128; ld.shared.u32 %r5, [%r4]; st.global.u32 [%a1+256], %r5;"""
    )
    values = np.arange(128, dtype=np.uint32)
    run(small(body), "test", (1,), (64,), [values], late=late)
    np.testing.assert_array_equal(values[64:], np.arange(64) ^ 32)


def boxed(tensor: Tensor, box: list[int], at: list[int], swizzle: int, nans: bool = False, place: int = 0) -> Tensor:
    """What a tensor copy of a box puts in shared memory, in its order there."""
    rank, size = len(box), int(np.prod(box)) * tensor.element_size()
    coordinates = ", ".join(str(x) for x in reversed(at))
    body = (
        INIT.format(1)
        + f"""
        mov.b64 %a2, m; cvta.param.u64 %a2, %a2;
        add.u32 %r2, %r2, {place};
        @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {size};
        @%p0 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes
            [%r2], [%a2, {{{coordinates}}}], [%r1];
        {AWAIT.format(1, 0)}
        {SHIFT} mov.u32 %r6, 0;
        AGAIN: ld.shared.u32 %r5, [%r3]; st.global.u32 [%a1], %r5;
        add.u32 %r3, %r3, 128; add.u64 %a1, %a1, 128; add.u32 %r6, %r6, 128;
        setp.lt.u32 %p3, %r6, {size}; @%p3 bra AGAIN;"""
    )
    out = torch.zeros(size, dtype=torch.uint8)
    map_ = TensorMap(tensor, tensor.shape, tensor.stride(), box, swizzle, nans=nans)
    parameters = ".param .u64 p, .param .align 64 .b8 m[128]"
    run(small(body, parameters), "test", (1,), (32,), [Output(out), map_])
    return out.view(tensor.dtype)


@pytest.mark.parametrize("at", [0, -3, 5])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_boxes_of_every_rank(rank: int, at: int) -> None:
    """What is outside of the tensor is zero, on either side."""
    shape, box = [3, 4, 5, 6, 32][-rank:], [2, 1, 2, 4, 32][-rank:]
    tensor = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.int32).reshape(shape)
    starts = [at, 1, at, at, at][-rank:]
    padded = torch.nn.functional.pad(tensor, [8] * 2 * rank)
    expected = padded[tuple(slice(8 + start, 8 + start + size) for start, size in zip(starts, box, strict=True))]
    assert torch.equal(boxed(tensor, box, starts, 0), expected.reshape(-1))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_swizzled_boxes(swizzle: int, dtype: torch.dtype) -> None:
    """Units of 16 bytes, whose number within a row of the span is combined with that of the row of 128 bytes."""
    row = swizzle // dtype.itemsize
    tensor = torch.arange(24 * row).reshape(24, row).to(dtype)
    found = boxed(tensor, [16, row], [4, 0], swizzle, place=128).view(-1, 16 // dtype.itemsize)
    for unit in range(len(found)):
        place = 128 + 16 * unit
        there = (place ^ (place >> 7 & swizzle // 16 - 1) << 4) - 128 >> 4
        assert torch.equal(found[there], tensor[4:20].reshape(-1, 16 // dtype.itemsize)[unit])


def test_boxes_filled_with_nan() -> None:
    tensor = torch.ones(4, 16)
    found = boxed(tensor, [4, 16], [2, 0], 0, nans=True).view(4, 16)
    assert found[:2].eq(1).all()
    assert found[2:].isnan().all()


@pytest.mark.parametrize(
    ("box", "swizzle", "place", "kind"),
    [
        ([4, 3], 0, 0, "a tensor map with unsupported rows in the box of no multiple of 16 bytes"),
        ([4, 16], 32, 0, "a tensor map with unsupported rows in the box other than the swizzle's span"),
        ([4, 16], 64, 64, "a box in shared memory that is not aligned to 128 bytes"),
        ([257, 16], 64, 0, "a tensor map with unsupported box"),
    ],
)
def test_faults_of_boxes(box: list[int], swizzle: int, place: int, kind: str) -> None:
    with pytest.raises(Fault, match=kind):
        boxed(torch.ones(300, 16), box, [0, 0], swizzle, place=place)
    with pytest.raises(Fault, match="strides"):
        boxed(torch.ones(8, 18)[:, :16], [4, 16], [0, 0], 0)
    with pytest.raises(Fault, match="out of bounds of argument"):
        run_out_of_bounds()


def run_out_of_bounds() -> None:
    """A map of more rows than the tensor has."""
    body = (
        INIT.format(1)
        + """
        mov.b64 %a2, m; cvta.param.u64 %a2, %a2;
        @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;
        @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%a2, {0, 0}], [%r1];
    """
        + AWAIT.format(1, 0)
    )
    map_ = TensorMap(torch.ones(3, 16), [4, 16], [16, 1], [4, 16], 0)
    run(small(body, ".param .u64 p, .param .align 64 .b8 m[128]"), "test", (1,), (32,), [None, map_])


BULK = """@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 128;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%a0], 128, [%r1];"""
BACK = """@%p0 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r2], 128;
    @%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group.read 0;"""


@pytest.mark.parametrize("late", [True, False, None])
def test_bulk_copies(late: bool | None) -> None:
    """To shared memory, doubled there, and back."""
    double = SHIFT + "ld.shared.u32 %r5, [%r3]; shl.b32 %r5, %r5, 1; st.shared.u32 [%r3], %r5;"
    body = INIT.format(1) + BULK + AWAIT.format(1, 0) + double + "fence.proxy.async.shared::cta; bar.sync 0;" + BACK
    values = np.arange(40, dtype=np.uint32)
    run(small(body), "test", (1,), (32,), [values], late=late)
    np.testing.assert_array_equal(values, np.arange(40) * np.where(np.arange(40) < 32, 2, 1))
    assert "without fence.proxy.async" in fault_of(body.replace("fence.proxy.async.shared::cta;", ""), [values], 32)
    over = body.replace(BACK, BACK + "@%p0 st.shared.u32 [%r2], 1;")
    run(small(over), "test", (1,), (32,), [values], late=late)
    over = over.replace("@%p0 cp.async.bulk.wait_group.read 0;", "") + "cp.async.bulk.wait_group 0;"
    assert "still reads" in fault_of(over, [values], 32)
    assert "not aligned" in fault_of(body.replace("[%a0], 128", "[%a0], 120"), [values], 32)
    under_way = INIT.format(1) + BULK
    assert "under way at the kernel's end" in fault_of(under_way, [values], 32, late=True)


def test_proxies_of_bulk_copies() -> None:
    """Fences count between an ordinary write and the copy, either way; and each copy until it is waited for."""
    values = np.arange(40, dtype=np.uint32)
    write = SHIFT + "st.shared.u32 [%r3], %r0;"
    fence = "fence.proxy.async.shared::cta;"
    run(small(INIT.format(1) + write + fence + BULK + AWAIT.format(1, 0)), "test", (1,), (32,), [values])
    assert "asynchronous write of bytes" in fault_of(INIT.format(1) + write + BULK + AWAIT.format(1, 0), [values], 32)
    run(small(write + fence + BACK), "test", (1,), (32,), [values])
    assert "asynchronous read of bytes" in fault_of(fence + write + BACK, [values], 32)
    twice = write + fence + BACK.replace("read 0", "read 1") * 2 + "@%p0 st.shared.u32 [%r2], 1;"
    assert "still reads" in fault_of(twice, [values], 32)


def test_mbarrier_that_another_warp_initialises() -> None:
    body = INIT.format(64).replace("bar.sync 0;", "") + ARRIVE
    kinds = {fault_of(body, seed=seed) for seed in range(12)}
    assert kinds == {"no mbarrier was initialised there", "race: an mbarrier that another warp initialises"}


SUMS = "{" + ", ".join(f"%f{i}" for i in range(4)) + "}"
ZEROS = "".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(4))
DESCRIBE = f"""{SHIFT} mov.u32 %r6, 0; mov.u32 %r7, 0x3f803f80;
    FILL: st.shared.u32 [%r3], %r7; add.u32 %r3, %r3, 512; add.u32 %r6, %r6, 512;
    setp.lt.u32 %p3, %r6, 4096; @%p3 bra FILL;
    fence.proxy.async; bar.sync 0;
    shr.u32 %r8, %r2, 4; cvt.u64.u32 %a3, %r8; or.b64 %a3, %a3, {8 << 16 | 16 << 32}; mov.b64 %a4, %a3;
    setp.ne.u32 %p4, 0, 0; {ZEROS}"""
MOVES = "".join(f"mov.b32 %f1{i}, %f{i};" for i in range(4))
PRODUCT = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {SUMS}, %a3, %a4, %p4, 1, 1, 0, 0;"
START = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"
FINISH = "wgmma.wait_group.sync.aligned 0;"
ONE = "wgmma.wait_group.sync.aligned 1;"
WRITE = "st.global.f32 [%a1], %f0;"


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (START + PRODUCT + COMMIT + FINISH + WRITE, 16),
        (START + "add.f32 %f0, %f0, %f0; mov.f32 %f0, 0f00000000;" + PRODUCT + COMMIT + FINISH + WRITE, 16),
        (START + PRODUCT + PRODUCT + COMMIT + FINISH + WRITE, 16),
        (START + PRODUCT + PRODUCT.replace("%p4", "1") + COMMIT + FINISH + WRITE, 32),
        (START + PRODUCT.replace("1, 1, 0, 0", "1, -1, 0, 0") + COMMIT + FINISH + WRITE, -16),
        # Copies of sums in flight, as nvcc makes them, in the order of the products.
        (
            START + PRODUCT + COMMIT + "mov.f32 %f9, %f0;" + MOVES + START
            + PRODUCT.replace("%f", "%f1").replace("%p4", "1") + COMMIT + FINISH + "add.f32 %f0, %f9, %f10;" + WRITE,
            48,
        ),
    ],
)  # fmt: skip
def test_group_products(body: str, expected: float, late: bool) -> None:
    out = np.zeros(128, np.float32)
    run(small(DESCRIBE + body), "test", (1,), (128,), [Output(out)], late=late)
    assert (out == expected).all(), out[0]


READ = "access to a register of a wgmma that was not waited for"


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (START + PRODUCT + COMMIT + WRITE + FINISH, READ),
        (START + PRODUCT + FINISH + WRITE, READ),
        (START + PRODUCT + COMMIT + "mov.f32 %f0, 0f00000000;" + FINISH, READ),
        (START + PRODUCT + COMMIT + "mov.f32 %f9, %f0;" + "add.f32 %f9, %f9, %f9;" + FINISH, READ),
        (START + PRODUCT + COMMIT + "wgmma.wait_group.sync.aligned 1;" + WRITE, READ),
        (START + PRODUCT + COMMIT, "a wgmma that was not waited for at the warp's end"),
        (PRODUCT + COMMIT + FINISH, "a wgmma without wgmma.fence since its registers were written"),
        (START + "add.f32 %f1, %f0, %f0;" + PRODUCT, "a wgmma without wgmma.fence since its registers were written"),
        (START + "add.f32 %f9, %f0, %f0; mov.f32 %f1, %f9;" + PRODUCT, "a wgmma without wgmma.fence since"),
        (START + PRODUCT + COMMIT + "st.shared.u32 [%r2], 0;" + FINISH, "write of bytes that an asynchronous"),
        (START + (PRODUCT + COMMIT) * 2 + ONE + "st.shared.u32 [%r2], 0;", "write of bytes that an asynchronous"),
        (START + PRODUCT + COMMIT + FINISH + "@%p0 st.shared.u32 [%r2], 0;", "race: write of bytes that another warp"),
        ("st.shared.u32 [%r2], 0;" + START + PRODUCT, "asynchronous read of bytes that were written without|race"),
        ("or.b64 %a3, %a3, 16383;" + START + PRODUCT, "out of bounds of shared memory"),
        ("cvt.u64.u32 %a3, %r0;" + START + PRODUCT, "descriptors differ by lane"),
        ("setp.lt.u32 %p5, %r0, 16; @%p5 bra SKIP;" + START + "SKIP:", "a matrix instruction without all lanes"),
        (START + PRODUCT + PRODUCT.replace("%f3}", "%f4}"), "a wgmma that uses registers of another"),
    ],
)  # fmt: skip
def test_faults_of_group_products(body: str, kind: str, late: bool) -> None:
    assert re.match(kind, fault_of(DESCRIBE + body, [np.zeros(128, np.float32)], 128, late=late))


def test_clusters_of_one() -> None:
    """Their barrier orders warps, and an address of the first CTA is the own."""
    body = f"""{SHIFT} st.shared.u32 [%r3], %r0;
        barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
        mapa.shared::cluster.u32 %r4, %r3, 0; xor.b32 %r4, %r4, 128; ld.shared::cluster.u32 %r5, [%r4];
        barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
        mov.u32 %r6, %cluster_ctarank; add.u32 %r5, %r5, %r6; st.global.u32 [%a1], %r5;"""
    out = np.zeros(64, np.uint32)
    run(small(body), "test", (1,), (64,), [Output(out)])
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)
    assert fault_of(body.replace(".release", ".relaxed"), [out]).startswith(("race", "read of bytes"))
    assert fault_of(body.replace("%r3, 0;", "%r3, 1;"), [out]) == "a CTA that is not in the cluster"
    assert fault_of("@%p0 bra SKIP;" + "barrier.cluster.arrive; barrier.cluster.wait; SKIP:").startswith("lanes")


@pytest.mark.parametrize(
    "instruction",
    [
        "fence.proxy.alias;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%r2], [%a0, {%r0, %r0}], [%r1], 1;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%a0], [%r2], 16;",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f0, %f1, %f2, %f3}, %a3, %a4, %p4, 1, 1;",
        "mbarrier.pending_count.b64 %r3, %a0;",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r2], %r0, [%r1];",
        "tcgen05.wait::ld.sync.aligned;",
        "setmaxnreg.inc.sync.aligned.u32 231;",
    ],
)
def test_what_is_not_known_is_refused(instruction: str) -> None:
    with pytest.raises(PTXError, match="PTX line"):
        run(small(instruction), "test", (1,), (32,), [None])


def test_clusters_of_several_are_refused() -> None:
    text = small("").replace("(.param .u64 p)", "(.param .u64 p) .explicitcluster .reqnctapercluster 2")
    with pytest.raises(PTXError, match="clusters"):
        run(text, "test", (1,), (32,), [None])
