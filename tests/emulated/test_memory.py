"""Memories, barriers and asynchronous copies, in small kernels."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

from tests.emulated.machine.launch import Output, run
from tests.emulated.machine.memory import Fault

RNG = np.random.default_rng(0)
HEAD = """
    .shared .align 16 .b8 tile[1024];
    .global .align 4 .u32 table[4] = {5, 6, 7, 8};
    .visible .entry test(.param .u64 in, .param .u64 out, .param .align 4 .b8 structure[12]) {
        .reg .b64 %a<9>; .reg .b32 %r<9>; .reg .b16 %h<9>; .reg .pred %p<9>;
        ld.param.u64 %a0, [in]; ld.param.u64 %a1, [out];
        mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; cvt.u64.u32 %a2, %r1;
        add.s64 %a3, %a0, %a2; add.s64 %a4, %a1, %a2; mov.u32 %r2, tile; add.u32 %r2, %r2, %r1;
"""


def execute(body: str, source: np.ndarray, block: int = 32, seed: int = 0, late: bool | None = None) -> np.ndarray:
    """By thread, what the body stores to [%a4]; [%a3] is its element of the source, and [%r2] its word of a tile."""
    out = np.zeros(block, np.uint32)
    structure = np.array([1, 2, 3], np.uint32).tobytes()
    run(HEAD + body + "ret; }", "test", (1,), (block,), [source, Output(out), structure], seed=seed, late=late)
    return out


def test_memories() -> None:
    source = RNG.integers(0, 1 << 32, 32, dtype=np.uint32)
    generic = """
        ld.global.u32 %r3, [%a3]; st.shared.u32 [%r2], %r3;
        cvt.u64.u32 %a5, %r2; cvta.shared.u64 %a5, %a5; ld.u32 %r4, [%a5];
        isspacep.shared %p0, %a5; selp.b32 %r4, %r4, 0, %p0; st.global.u32 [%a4], %r4;"""
    assert (execute(generic, source) == source).all()
    constants = "ld.param.u32 %r3, [structure+8]; ld.global.u32 %r4, [table+4]; add.u32 %r3, %r3, %r4;"
    assert (execute(constants + "st.global.u32 [%a4], %r3;", source) == 3 + 6).all()
    narrow = "ld.global.s8 %r3, [%a3]; ld.global.u16 %r4, [%a3+2]; add.u32 %r3, %r3, %r4; st.global.u32 [%a4], %r3;"
    assert (execute(narrow, source) == source.astype(np.int8).astype(np.uint32) + (source >> 16)).all()
    hinted = "createpolicy.fractional.L2::evict_first.b64 %a6, 1.0; ld.global.L1::no_allocate.L2::cache_hint.b32 %r3,"
    assert (execute(hinted + " [%a3], %a6; st.global.b32 [%a4], %r3;", source) == source).all()
    with pytest.raises(Fault, match="out of bounds of parameters"):
        execute("ld.param.u32 %r3, [structure+12];", source)


@pytest.mark.parametrize("seed", range(4))
def test_arriving_at_a_named_barrier(seed: int) -> None:
    """Warp 0 hands over and goes on; warp 1 waits for it, and reads what it wrote."""
    body = """
        setp.lt.u32 %p0, %r0, 32; @!%p0 bra CONSUME;
        st.shared.u32 [%r2], %r0; bar.arrive 1, 64; st.global.u32 [%a4], %r0; bra DONE;
        CONSUME: bar.sync 1, 64; ld.shared.u32 %r3, [%r2+-128]; add.u32 %r3, %r3, 100; st.global.u32 [%a4], %r3;
        DONE:"""
    source = np.zeros(64, np.uint32)
    assert (execute(body, source, 64, seed) == np.arange(64) + 68 * (np.arange(64) > 31)).all()
    late = "bar.arrive 1, 64; st.shared.u32 [%r2], %r0;"
    with pytest.raises(Fault, match=r"race|never written"):
        execute(body.replace("st.shared.u32 [%r2], %r0; bar.arrive 1, 64;", late), source, 64, seed)


@pytest.mark.parametrize("late", [True, False])
def test_sizes_of_asynchronous_copies(late: bool) -> None:
    """What is past the source's size is zero, and a source of no bytes may be anywhere."""
    source = RNG.integers(1, 1 << 32, 32, dtype=np.uint32)
    wait = "cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r3, [%r2]; st.global.u32 [%a4], %r3;"
    short = "setp.lt.u32 %p0, %r0, 9; selp.b32 %r4, 4, 0, %p0; selp.b64 %a3, %a3, 0, %p0;"
    found = execute(f"{short} cp.async.ca.shared.global [%r2], [%a3], 4, %r4; {wait}", source, late=late)
    assert (found == np.where(np.arange(32) < 9, source, 0)).all()
    ignored = "setp.ge.u32 %p0, %r0, 9; cp.async.ca.shared.global [%r2], [%a3], 4, %p0;"
    assert (execute(ignored + wait, source, late=late) == found).all()
    half = "mov.u32 %r4, 2; cp.async.ca.shared.global [%r2], [%a3], 4, %r4;"
    assert (execute(half + wait, source, late=late) == (source & 0xFFFF)).all()
    with pytest.raises(Fault, match="reads more bytes"):
        execute("mov.u32 %r4, 8; cp.async.ca.shared.global [%r2], [%a3], 4, %r4;", source)
    with pytest.raises(Fault, match="out of bounds of argument"):
        execute("cp.async.ca.shared.global [%r2], [%a3+4], 4;", source)
    with pytest.raises(Fault, match=r"misaligned copy of 8 bytes.* lane 1,"):
        execute("add.u32 %r2, %r2, %r1; cp.async.ca.shared.global [%r2], [%a3], 8;", source)


@pytest.mark.parametrize("late", [True, False])
def test_groups_of_asynchronous_copies(late: bool) -> None:
    source = RNG.integers(1, 1 << 32, 64, dtype=np.uint32)
    copies = """
        cp.async.ca.shared.global [%r2], [%a3], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r2+128], [%a3+128], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.u32 %r3, [%r2{}]; st.global.u32 [%a4], %r3;"""
    assert (execute(copies.format(""), source, late=late) == source[:32]).all()
    with pytest.raises(Fault, match="read of bytes that an asynchronous copy still writes"):
        execute(copies.format("+128"), source, late=late)
    uncommitted = copies.format("").replace("cp.async.commit_group;", "").replace("wait_group 1", "wait_group 0")
    with pytest.raises(Fault, match="read of bytes that an asynchronous copy still writes"):
        execute(uncommitted, source, late=late)
    every = uncommitted.replace("cp.async.wait_group 0", "cp.async.wait_all")
    assert (execute(every, source, late=late) == source[:32]).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_into_what_another_warp_reads(seed: int) -> None:
    body = """
        st.shared.u32 [%r2], %r0; bar.sync 0;
        setp.lt.u32 %p0, %r0, 32; @%p0 bra READ;
        cp.async.ca.shared.global [%r2+-128], [%a3], 4; cp.async.wait_all; bra DONE;
        READ: ld.shared.u32 %r3, [%r2]; st.global.u32 [%a4], %r3;
        DONE:"""
    with pytest.raises(Fault, match=r"race|asynchronous copy still writes"):
        execute(body, np.zeros(64, np.uint32), 64, seed)


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(transposed: bool) -> None:
    source = RNG.integers(0, 1 << 32, 32, dtype=np.uint32)
    body = f"""
        ld.global.u32 %r3, [%a3]; mov.u32 %r4, tile; and.b32 %r5, %r0, 7; mad.lo.u32 %r4, %r5, 16, %r4;
        stmatrix.sync.aligned.m8n8.x1{".trans" if transposed else ""}.shared.b16 [%r4], {{%r3}};
        bar.warp.sync -1; ld.shared.u32 %r3, [%r2]; st.global.u32 [%a4], %r3;"""
    matrix = source.view(np.uint16).reshape(8, 8)
    found = execute(body, source).view(np.uint16).reshape(8, 8)
    assert (found == (matrix.T if transposed else matrix)).all()
