"""Hazards in machine code, planted in listings: seen where they are, and nowhere else."""

from __future__ import annotations

import pytest

from rl_kernels.backends.gpu import disassembler
from rl_kernels.backends.gpu.hazards import check, parse, written

FIRST = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR8], R24"
SECOND = "HGMMA.64x128x16.F32.BF16 R24, R156, gdesc[UR8], R24"
GROUP = f"{SECOND}, gsb0"
SHARED = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspA, R24, gsb0"
MIX = "F2FP.BF16.F32.PACK_AB R156, R1, R2"


def listing(*lines: str) -> str:
    """A listing as nvdisasm writes it, of instructions and labels."""
    text, address = ['\t.section\t.text.kernel,"ax",@progbits', "kernel:", ".text.kernel:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(text)


def waiting(groups: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {groups:#x}"


CLEAN = {
    "a wait for all": (GROUP, waiting(0), MIX),
    "a wait for the older group": (GROUP, FIRST + ", gsb0", waiting(1), MIX),
    "before the product": (MIX, GROUP, waiting(0)),
    "another register": (GROUP, "F2FP.BF16.F32.PACK_AB R160, R156, R157"),
    "a read": (GROUP, "STS.128 [R156], R156"),
    "sums, by the next product": (GROUP, "HGMMA.64x128x16.F32.BF16 R24, R160, gdesc[UR8], R24, gsb0"),
    "sums, after a wait": (GROUP, waiting(0), "FADD R24, R24, R1"),
    "an operand in shared memory": (SHARED, MIX),
    "a loop that waits": (".L_x_0:", MIX, GROUP, waiting(0), "@P0 BRA `(.L_x_0)", "EXIT"),
    "a loop over two buffers": (
        *(".L_x_0:", "F2FP.BF16.F32.PACK_AB R152, R1, R2", FIRST + ", gsb0", waiting(1)),
        *(MIX, GROUP, waiting(1), "@P0 BRA `(.L_x_0)", "EXIT"),
    ),
    "on a way that the product is not on": ("@P0 BRA `(.L_x_1)", GROUP, "EXIT", ".L_x_1:", MIX, "EXIT"),
    "after the end": (GROUP, "EXIT", MIX),
    "what never happens": (GROUP, "@!PT LDS R156, [RZ]"),
    "both ways wait": (
        *(GROUP, "@P0 BRA `(.L_x_1)", waiting(0), "BRA `(.L_x_2)"),
        *(".L_x_1:", waiting(0), ".L_x_2:", MIX),
    ),
    "a store and predicates": (GROUP, "ISETP.GE.AND P0, PT, R156, R1, PT", "STG.E [R156.64], R157"),
    "a uniform instruction": (GROUP, "R2UR UR4, R156", "UIADD3 UR5, UR4, 0x1, URZ"),
}
RACING = {
    "no wait": (GROUP, MIX),
    "a wait that is too weak": (GROUP, waiting(1), MIX),
    "a wait for one of two": (GROUP, FIRST + ", gsb0", waiting(1), "IMAD R152, R1, R2, R3"),
    "a wait for the older, seen from the younger": (FIRST + ", gsb0", GROUP, waiting(1), MIX),
    "a group that did not end": (SECOND, waiting(0), MIX),
    "the first of a group": (FIRST, GROUP, waiting(1), "MOV R153, R1"),
    "a fence is no wait": (GROUP, "WARPGROUP.ARRIVE", MIX),
    "a wait of copies": (GROUP, "DEPBAR.LE SB0, 0x0", "LDGDEPBAR", MIX),
    "carried round a loop": (".L_x_0:", MIX, GROUP, waiting(1), "@P0 BRA `(.L_x_0)", "EXIT"),
    "carried round two loops": (
        *(".L_x_0:", ".L_x_1:", "NOP", "@P1 BRA `(.L_x_1)", MIX, GROUP, waiting(1), "@P0 BRA `(.L_x_0)", "EXIT"),
    ),
    "across a branch": (GROUP, "@P0 BRA `(.L_x_1)", "EXIT", ".L_x_1:", MIX),
    "across a branch of the uniform pipe": (GROUP, "BRA.U UP0, `(.L_x_1)", "EXIT", ".L_x_1:", MIX),
    "behind a branch that is not taken": (GROUP, "@P0 BRA `(.L_x_1)", MIX, ".L_x_1:", "EXIT"),
    "one way waits": (GROUP, "@P0 BRA `(.L_x_1)", waiting(0), ".L_x_1:", MIX),
    "a younger product on one way": (
        "@P0 BRA `(.L_x_1)",
        GROUP,
        ".L_x_1:",
        FIRST + ", gsb0",
        waiting(1),
        "MOV R152, R1",
    ),
    "a wait that may be passed over": (GROUP, f"@P0 {waiting(0)}", MIX),
    "a group whose end may be passed over": (GROUP, f"@P0 {FIRST}, gsb0", waiting(1), MIX),
    "a write that may be passed over": (GROUP, "@!P3 MOV R159, R1"),
    "in a function that is called": (GROUP, "CALL.REL.NOINC `($helper)", "EXIT", "$helper:", MIX, "RET.REL.NODEC R2"),
    "after a return": (*("CALL.REL.NOINC `($helper)", MIX, "EXIT"), *("$helper:", GROUP, "RET.REL.NODEC R2")),
    "an indirect branch": (GROUP, "BRX R2 -0x100", "EXIT", ".L_x_1:", MIX),
    "where paths join again": (
        *("BSSY B0, `(.L_x_1)", GROUP, "@P0 BRA `(.L_x_2)", "BSYNC B0", "EXIT"),
        *(".L_x_2:", "EXIT", ".L_x_1:", MIX),
    ),
    "a predicate first": (GROUP, "SHFL.BFLY PT, R156, R1, 0x1, 0x1f"),
    "behind two predicates": (GROUP, "NOVEL P0, P1, R156, R1"),
    "an instruction that is not known": (GROUP, "NOVEL.FORM R156, R1"),
    "sums, not by a product": (GROUP, "FADD R24, R1, R2"),
    "by a product, of what is no sum": (GROUP, "HGMMA.64x16x16.F32.BF16 R152, R8, gdesc[UR8], R152, gsb0"),
}
WIDE = {
    "LDS.128 R153, [R1]": True,
    "LDS.128 R152, [R1]": False,
    "LDS.64 R155, [R1]": True,
    "LDG.E.128.CONSTANT R153, desc[UR4][R2.64]": True,
    "LDG.E.64 R154, desc[UR4][R2.64]": False,
    "LDSM.16.M88.4 R153, [R1]": True,
    "LDSM.16.M88.2 R155, [R1]": True,
    "LDSM.16.MT88 R155, [R1]": False,
    "LDC.64 R155, c[0x0][0x210]": True,
    "CS2R R155, SRZ": True,
    "CS2R.32 R155, SR_CLOCKLO": False,
    "IMAD.WIDE.U32 R155, R1, R2, R4": True,
    "IMAD.HI R155, R1, R2, R4": False,
    "DADD R155, R2, R4": True,
    "F2F.F64.F32 R155, R1": True,
    "F2I.U64.TRUNC R155, R2": True,
    "SHF.R.S64 R155, R1, R2, R3": False,
    "HMMA.16816.F32.BF16 R153, R4, R8, R12": True,
    "LDGSTS.E.BYPASS.128 [R156], desc[UR4][R2.64]": False,
}
"""Writes next to R156: whether they reach it."""


@pytest.mark.parametrize("case", CLEAN)
def test_what_does_not_race(case: str) -> None:
    (found,) = check(listing(*CLEAN[case]))
    assert found.hazards == ()
    assert found.products >= 1


@pytest.mark.parametrize("case", RACING)
def test_what_races(case: str) -> None:
    (found,) = check(listing(*RACING[case]))
    assert len(found.hazards) == 1
    assert "still read by HGMMA" in str(found.hazards[0])
    assert "hazard" in found.verdict


@pytest.mark.parametrize("write", WIDE)
def test_several_registers(write: str) -> None:
    (found,) = check(listing(GROUP, write))
    assert len(found.hazards) == WIDE[write]
    assert check(listing(GROUP, waiting(0), write))[0].hazards == ()


@pytest.mark.parametrize(("sums", "count"), [("F32.BF16", 32), ("F16", 16)])
def test_sums_of_a_product(sums: str, count: int) -> None:
    _, function = parse(listing(f"HGMMA.64x64x16.{sums} R24, gdesc[UR8], R24"))
    assert len(written(function.instructions[0])) == count


def test_serialised() -> None:
    """ptxas' way out, which is right and slow: each product is waited for before the next one."""
    loop = (".L_x_0:", FIRST + ", gsb0", waiting(0), GROUP, waiting(0), "@P0 BRA `(.L_x_0)", "EXIT")
    (found,) = check(listing(*loop))
    assert found.serialised
    assert found.verdict == "serialised"
    for weaker in (FIRST, GROUP, waiting(0), GROUP), (GROUP, waiting(1), FIRST + ", gsb0", waiting(0)), (FIRST, GROUP):
        (found,) = check(listing(*weaker))
        assert not found.serialised
        assert found.verdict == "none"
    (found,) = check(listing(MIX))
    assert (found.serialised, found.verdict) == (False, "")


def test_operands_in_registers_are_counted() -> None:
    (found,) = check(listing(SHARED, waiting(0), GROUP, waiting(0), FIRST + ", gsb0"))
    assert (found.products, found.register_a) == (3, 2)


def test_listing_of_cuobjdump() -> None:
    """It has addresses for labels, and encodings behind the instructions."""
    code = "/* 0x000000009c187823 */\n                    /* 0x000fe20000010000 */"
    text = f"""
	code for sm_90a
		Function : first
        /*0000*/                   {MIX} ;   {code}
        /*0010*/                   {GROUP} ;   {code}
        /*0020*/              @P4 BRA 0x0 ;   {code}
        /*0030*/                   EXIT ;   {code}
		Function : second
        /*0000*/                   {GROUP} ;   {code}
        /*0010*/                   {waiting(0)} ;   {code}
        /*0020*/                   {MIX} ;   {code}
"""
    first, second = check(text)
    assert (first.kernel, len(first.hazards)) == ("first", 1)
    assert (second.kernel, len(second.hazards)) == ("second", 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "without instructions"),
        ((GROUP, "BRA `(.L_x_9)"), "branch to nowhere"),
        (("HGMMA.SP.64x128x32 R24, R156, gdesc[UR8], R24",), "not understood"),
        (("HGMMA.64x128x16.F32.BF16 R24, tmem[UR8], R24",), "not understood"),
        ((GROUP, "WARPGROUP.DEPBAR.LE gsb0, UR4"), "not understood"),
        ((GROUP, "{ MOV R1, R2"), "not understood"),
    ],
)
def test_what_cannot_be_judged_is_an_error(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(listing(*lines))


def test_no_disassembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disassembler, "_folders", lambda: iter(()))
    with pytest.raises(FileNotFoundError, match=r"nvdisasm or cuobjdump.*Triton.*CUDA toolkit"):
        disassembler.disassemble(b"never seen")
