"""Each instruction on random lanes, against numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this platform")

from tests.emulated.machine.launch import Output, run
from tests.emulated.machine.memory import RAW, Array
from tests.emulated.machine.ptx import PTXError
from tests.emulated.machine.values import TYPES, bf16_bits, bf16_values

RNG = np.random.default_rng(0)


def bits_of(kind: str) -> int:
    return max(TYPES[kind].bits, 8)


def execute(body: str, result: str, *operands: tuple[str, Array]) -> Array:
    """Run a warp: %a, %b, %c, %e hold the operands, raw; what is in %d afterwards is returned, raw."""
    names = "abce"
    lines, parameters = [], [".param .u64 pd"]
    for name, (kind, _) in zip(names, operands, strict=False):
        width = bits_of(kind)
        parameters.append(f".param .u64 p{name}")
        lines += [
            f".reg .b{max(width, 16)} %{name};",
            f"ld.param.u64 %address, [p{name}];",
            f"mad.wide.u32 %address, %lane, {width // 8}, %address;",
            f"ld.global.u{width} %{name}, [%address];",
        ]
    width = bits_of(result)
    text = f"""
    .visible .entry test({", ".join(parameters)}) {{
        .reg .b64 %address; .reg .b32 %lane; .reg .b{max(width, 16)} %d; .reg .pred %p<3>; .reg .b32 %t<9>;
        .reg .b16 %h<9>;
        mov.u32 %lane, %tid.x;
        {" ".join(lines)}
        {body}
        ld.param.u64 %address, [pd];
        mad.wide.u32 %address, %lane, {width // 8}, %address;
        st.global.b{width} [%address], %d;
        ret;
    }}"""
    out = np.zeros(32, RAW[width // 8])
    run(text, "test", (1,), (32,), [Output(out), *(array for _, array in operands)])
    return out


def random(kind: str) -> Array:
    """Raw bits of numbers of a type, some of them small, extreme or NaN."""
    type = TYPES[kind]
    if type.floating:
        values: Array = RNG.normal(size=(32, 2) if kind.endswith("x2") else 32) * 4
        values[:4] = values[:4] * 0 + np.array([0.0, -0.0, np.nan, 1.5]).reshape(4, *[1] * (values.ndim - 1))
        return type.encode(values)
    values = RNG.integers(0, 1 << min(type.bits, 63), 32, dtype=np.uint64) >> RNG.integers(0, type.bits, 32).astype(
        np.uint64
    )
    values[:3] = 1, (1 << type.bits - 1), (1 << type.bits) - 1
    return values.astype(type.raw)


def signed(values: Array) -> list[int]:
    return [int(value) for value in values]


INTEGER: dict[str, Callable[..., int]] = {
    "add.{}": lambda a, b: a + b,
    "sub.{}": lambda a, b: a - b,
    "mul.lo.{}": lambda a, b: a * b,
    "min.{}": min,
    "max.{}": max,
    "div.{}": lambda a, b: (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1),
    "rem.{}": lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
    "mad.lo.{}": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("form", INTEGER)
def test_integers(form: str, kind: str) -> None:
    function, type = INTEGER[form], TYPES[kind]
    operands = [random(kind) for _ in range(function.__code__.co_argcount if hasattr(function, "__code__") else 2)]
    if form[:3] in ("div", "rem"):
        operands[1] |= 1
    names = ", ".join(["%d", "%a", "%b", "%c"][: len(operands) + 1])
    out = execute(f"{form.format(kind)} {names};", kind, *((kind, operand) for operand in operands))
    numbers = zip(*(signed(type.decode(operand)) for operand in operands), strict=True)
    assert signed(out) == [function(*lane) % (1 << type.bits) for lane in numbers]


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_and_high_products(kind: str) -> None:
    a, b, c = random(kind), random(kind), random(f"{kind[0]}64")
    products = [x * y for x, y in zip(*(signed(TYPES[kind].decode(v)) for v in (a, b)), strict=True)]
    wide = execute(f"mul.wide.{kind} %d, %a, %b;", "b64", (kind, a), (kind, b))
    assert signed(wide) == [product % 2**64 for product in products]
    more = execute(f"mad.wide.{kind} %d, %a, %b, %c;", "b64", (kind, a), (kind, b), ("b64", c))
    assert signed(more) == [(product + int(x)) % 2**64 for product, x in zip(products, c, strict=True)]
    high = execute(f"mul.hi.{kind} %d, %a, %b;", "b32", (kind, a), (kind, b))
    assert signed(high) == [(product >> 32) % 2**32 for product in products]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "b32", "b64"])
def test_shifts_and_logic(kind: str) -> None:
    type, a, b = TYPES[kind], random(kind), random(kind)
    amounts = RNG.integers(0, type.bits + 9, 32).astype(np.uint32)
    values = [v - (1 << type.bits) if type.signed and v >> (type.bits - 1) else v for v in signed(a)]
    right = execute(f"shr.{kind} %d, %a, %b;", kind, (kind, a), ("b32", amounts))
    assert signed(right) == [(v >> int(n)) % (1 << type.bits) for v, n in zip(values, amounts, strict=True)]
    bits = f"b{type.bits}"
    left = execute(f"shl.{bits} %d, %a, %b;", kind, (kind, a), ("b32", amounts))
    assert signed(left) == [(v << int(n)) % (1 << type.bits) for v, n in zip(signed(a), amounts, strict=True)]
    assert (execute(f"and.{bits} %d, %a, %b;", kind, (kind, a), (kind, b)) == a & b).all()
    assert (execute(f"or.{bits} %d, %a, %b;", kind, (kind, a), (kind, b)) == a | b).all()
    assert (execute(f"xor.{bits} %d, %a, %b;", kind, (kind, a), (kind, b)) == a ^ b).all()
    assert (execute(f"not.{bits} %d, %a;", kind, (kind, a)) == ~a).all()


def test_bit_fields() -> None:
    a, b = random("u32"), random("u32")
    place, length = (RNG.integers(0, 32, 32).astype(np.uint32) for _ in range(2))
    lanes = list(zip(signed(a), signed(b), signed(place), signed(length), strict=True))
    assert signed(execute("bfe.u32 %d, %a, 3, 7;", "b32", ("b32", a))) == [x >> 3 & 127 for x in signed(a)]
    field = signed(execute("bfe.s32 %d, %a, 30, 1;", "b32", ("b32", a)))
    assert field == [2**32 - 1 if x >> 30 & 1 else 0 for x in signed(a)]
    operands = [("b32", array) for array in (a, b, place, length)]
    out = execute("bfi.b32 %d, %a, %b, %c, %e;", "b32", *operands)
    masks = [((1 << n) - 1 << p) % 2**32 for _, _, p, n in lanes]
    assert signed(out) == [y & ~m | x << p & m for (x, y, p, _), m in zip(lanes, masks, strict=True)]
    assert signed(execute("popc.b32 %d, %a;", "b32", ("b32", a))) == [x.bit_count() for x in signed(a)]
    assert signed(execute("clz.b32 %d, %a;", "b32", ("b32", a))) == [32 - x.bit_length() for x in signed(a)]
    assert signed(execute("brev.b32 %d, %a;", "b32", ("b32", a))) == [int(f"{x:032b}"[::-1], 2) for x in signed(a)]
    both = [x | y << 32 for x, y, _, _ in lanes]
    out = execute("shf.r.wrap.b32 %d, %a, %b, %c;", "b32", *operands[:3])
    assert signed(out) == [(x >> n) % 2**32 for x, n in zip(both, signed(place), strict=True)]
    out = execute("shf.l.wrap.b32 %d, %a, %b, %c;", "b32", *operands[:3])
    assert signed(out) == [(x << n >> 32) % 2**32 for x, n in zip(both, signed(place), strict=True)]
    out = execute("prmt.b32 %d, %a, %b, 0x5410;", "b32", *operands[:2])
    assert (out == (a & 0xFFFF | b << 16)).all()
    out = execute("prmt.b32 %d, %a, %b, 0xBA32;", "b32", *operands[:2])
    signs = [sum(255 << 16 + 8 * i for i in range(2) if x >> (23 + 8 * i) & 1) for x in signed(a)]
    assert signed(out) == [x >> 16 | s for x, s in zip(signed(a), signs, strict=True)]
    out = execute("lop3.b32 %d, %a, %b, %c, 0xCA;", "b32", *operands[:3])
    assert (out == (a & b | ~a & place)).all()


FLOATING: dict[str, Callable[..., Array]] = {
    "add{}": lambda a, b: a + b,
    "sub{}": lambda a, b: a - b,
    "mul{}": lambda a, b: a * b,
    "fma.rn{}": lambda a, b, c: a * b + c,
    "min{}": np.fmin,
    "max{}": np.fmax,
    "neg{}": lambda a: -a,
    "abs{}": np.abs,
}


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("form", FLOATING)
def test_floating_point(form: str, kind: str) -> None:
    function, type = FLOATING[form], TYPES[kind]
    count = {"f": 3, "n": 1, "ab": 1}.get(form[:2] if form[:2] == "ab" else form[0], 2)
    operands = [random(kind) for _ in range(count)]
    names = ", ".join(["%d", "%a", "%b", "%c"][: count + 1])
    out = execute(f"{form.format('.' + kind)} {names};", kind, *((kind, operand) for operand in operands))
    wide = np.longdouble if kind == "f64" else np.float64
    expected = function(*(type.decode(operand).astype(wide) for operand in operands))
    expected = type.decode(type.encode(expected if kind != "f64" else expected.astype(np.float64)))
    np.testing.assert_array_equal(type.decode(out), expected)


def test_functions() -> None:
    x = np.abs(RNG.normal(size=32)).astype(np.float32) + np.float32(0.1)
    raw = ("b32", x.view(np.uint32))
    table = {"rcp.approx.ftz": 1 / x, "sqrt.rn": np.sqrt(x), "rsqrt.approx": x**-0.5, "ex2.approx.ftz": np.exp2(x)}
    for name, expected in (table | {"lg2.approx": np.log2(x), "tanh.approx": np.tanh(x)}).items():
        out = execute(f"{name}.f32 %d, %a;", "f32", raw).view(np.float32)
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    out = execute("div.full.f32 %d, %a, 0f40400000;", "f32", raw).view(np.float32)
    np.testing.assert_array_equal(out, x / np.float32(3))
    tiny = np.full(32, 1e-40, np.float32).view(np.uint32)
    assert (execute("add.ftz.f32 %d, %a, %a;", "f32", ("b32", tiny)) == 0).all()
    assert (execute("add.f32 %d, %a, %a;", "f32", ("b32", tiny)) > 0).all()


def test_directed_rounding() -> None:
    a, b = (("f32", np.abs(RNG.normal(size=32)).astype(np.float32).view(np.uint32)) for _ in range(2))
    exact = a[1].view(np.float32).astype(np.float64) * b[1].view(np.float32)
    down = execute("mul.rm.f32 %d, %a, %b;", "f32", a, b).view(np.float32)
    up = execute("mul.rp.f32 %d, %a, %b;", "f32", a, b).view(np.float32)
    assert (down <= exact).all()
    assert (up >= exact).all()
    assert (np.nextafter(down, np.float32(np.inf))[down < exact] == up[down < exact]).all()
    assert (execute("mul.rz.f32 %d, %a, %b;", "f32", a, b).view(np.float32) == down).all()


def test_numbers() -> None:
    assert (execute("mov.f32 %d, 0f3E800000;", "b32").view(np.float32) == 0.25).all()
    assert (execute("mov.f64 %d, 0d3FD0000000000000;", "b64").view(np.float64) == 0.25).all()
    assert (execute("mov.b32 %d, 0x80008000U;", "b32") == 0x80008000).all()
    assert (execute("mov.b32 %d, -2;", "b32") == 2**32 - 2).all()


def test_comparisons() -> None:
    cases: dict[str, Callable[[Any, Any], Any]] = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    for kind in ("s32", "u32", "s64", "f32", "f64", "bf16", "f16"):
        a, b = random(kind), random(kind)
        b[8:16] = a[8:16]
        left, right = TYPES[kind].decode(a), TYPES[kind].decode(b)
        nan = np.isnan(left) | np.isnan(right) if TYPES[kind].floating else np.zeros(32, bool)
        for name, function in cases.items():
            for unordered in ("", "u") if TYPES[kind].floating else ("",):
                body = f"setp.{name}{unordered}.{kind} %p0|%p1, %a, %b; selp.b32 %d, 1, 0, %p0; @%p1 or.b32 %d, %d, 2;"
                out = execute(body, "b32", (kind, a), (kind, b))
                truth = function(left, right) & ~nan | (nan & bool(unordered))
                assert (out == np.where(truth, 1, 2)).all(), (kind, name, unordered)
    a, b = random("u32"), random("u32")
    body = "setp.gt.u32 %p0, %a, 999; setp.lt.and.u32 %p1, %a, %b, !%p0; selp.b32 %d, %a, %b, %p1;"
    out = execute(body, "b32", ("b32", a), ("b32", b))
    assert (out == np.where((a < b) & (a <= 999), a, b)).all()
    out = execute("set.lt.u32.f32 %d, %a, 0f00000000;", "b32", ("f32", f := random("f32")))
    assert (out == np.where(f.view(np.float32) < 0, 2**32 - 1, 0)).all()


CONVERSIONS: dict[str, Callable[[Array], Array]] = {
    "cvt.s64.s32": lambda a: a.view(np.int32).astype(np.int64).view(np.uint64),
    "cvt.u64.u32": lambda a: a.astype(np.uint64),
    "cvt.u32.u64": lambda a: a.astype(np.uint32),
    "cvt.s32.s16": lambda a: a.view(np.int16).astype(np.int32).view(np.uint32),
    "cvt.rn.f32.s32": lambda a: a.view(np.int32).astype(np.float32).view(np.uint32),
    "cvt.rn.f32.u64": lambda a: a.astype(np.float32).view(np.uint32),
    "cvt.rn.f64.s64": lambda a: a.view(np.int64).astype(np.float64).view(np.uint64),
    "cvt.f64.f32": lambda a: a.view(np.float32).astype(np.float64).view(np.uint64),
    "cvt.rn.f32.f64": lambda a: a.view(np.float64).astype(np.float32).view(np.uint32),
    "cvt.f32.f16": lambda a: a.view(np.float16).astype(np.float32).view(np.uint32),
    "cvt.rn.f16.f32": lambda a: a.view(np.float32).astype(np.float16).view(np.uint16),
    "cvt.f32.bf16": lambda a: a.astype(np.uint32) << np.uint32(16),
    "cvt.rn.bf16.f32": lambda a: torch.from_numpy(a.view(np.float32)).bfloat16().view(torch.uint16).numpy(),
    "cvt.rzi.s32.f32": lambda a: np.nan_to_num(a.view(np.float32)).astype(np.int32).view(np.uint32),
    "cvt.rni.s32.f32": lambda a: np.rint(np.nan_to_num(a.view(np.float32))).astype(np.int32).view(np.uint32),
    "cvt.rmi.f32.f32": lambda a: np.floor(a.view(np.float32)).view(np.uint32),
    "cvt.rna.tf32.f32": lambda a: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000),
}


@pytest.mark.parametrize("form", CONVERSIONS)
def test_conversions(form: str) -> None:
    result, kind = form.split(".")[-2:]
    a = random(kind)
    if form == "cvt.rn.bf16.f32":
        a[2] = 0x3F808000  # A tie rather than the NaN, whose bits are not told.
        a[5:] &= ~np.uint32(0xFFFF)
        a[5:16] |= np.uint32(0x8000)
    out = execute(f"{form} %d, %a;", result.replace("tf32", "b32"), (kind, a))
    expected = CONVERSIONS[form](a)
    number = TYPES[result].decode
    np.testing.assert_array_equal(number(out), number(expected))


def test_packed_conversions_take_the_upper_half_first() -> None:
    a, b = random("f32"), random("f32")
    out = execute("cvt.rn.bf16x2.f32 %d, %a, %b;", "b32", ("f32", a), ("f32", b))
    np.testing.assert_array_equal(bf16_values(out >> 16), bf16_values(bf16_bits(a.view(np.float32))))
    np.testing.assert_array_equal(bf16_values(out & 0xFFFF), bf16_values(bf16_bits(b.view(np.float32))))
    out = execute("cvt.rn.f16x2.f32 %d, %a, %b;", "b32", ("f32", a), ("f32", b)).view(np.float16).reshape(32, 2)
    np.testing.assert_array_equal(out, np.stack([b, a], 1).view(np.float32).astype(np.float16))


def test_moves() -> None:
    a, b = random("b32"), random("b32")
    out = execute("mov.b64 %d, {%a, %b};", "b64", ("b32", a), ("b32", b))
    assert (out == a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)).all()
    out = execute("mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0};", "b32", ("b32", a))
    assert (out == (a >> 16 | a << 16)).all()
    assert (execute("mov.b32 {_, %h1}, %a; cvt.u32.u16 %d, %h1;", "b32", ("b32", a)) == a >> 16).all()
    body = "setp.lt.u32 %p0, %a, %b; mov.u32 %d, 7; @!%p0 mov.u32 %d, -3;"
    assert (execute(body, "b32", ("b32", a), ("b32", b)) == np.where(a < b, 7, 2**32 - 3)).all()
    scoped = "mov.u32 %d, 1; { .reg .b32 %a; mov.u32 %a, 5; add.u32 %d, %d, %a; } add.u32 %d, %d, %a;"
    assert (execute(scoped, "b32", ("b32", a)) == a + 6).all()


def test_lanes() -> None:
    lane, a = np.arange(32), random("b32")
    sources = {
        "bfly.b32 %d|%p0, %a, 5, 31": lane ^ 5,
        "down.b32 %d|%p0, %a, 3, 31": np.where(lane + 3 < 32, lane + 3, lane),
        "up.b32 %d|%p0, %a, 3, 0": np.where(lane >= 3, lane - 3, lane),
        "idx.b32 %d, %a, 6, 31": np.full(32, 6),
        "idx.b32 %d, %a, 1, 0x1c03": lane // 4 * 4 + 1,
    }
    for form, source in sources.items():
        assert (execute(f"shfl.sync.{form}, -1;", "b32", ("b32", a)) == a[source]).all(), form
    ballot = "setp.gt.u32 %p0, %a, 99; vote.sync.ballot.b32 %d, %p0, -1;"
    assert (execute(ballot, "b32", ("b32", a)) == sum(1 << i for i in range(32) if a[i] > 99)).all()
    assert (execute("activemask.b32 %d;", "b32") == 2**32 - 1).all()
    assert (execute("mov.u32 %d, %lanemask_lt;", "b32") == (1 << lane) - 1).all()
    assert (execute("mov.u32 %d, %ntid.x; mad.lo.u32 %d, %d, %laneid, %warpid;", "b32") == 32 * lane).all()


def test_divergence() -> None:
    collatz = """
        mov.u32 %d, 0;
        LOOP: setp.eq.u32 %p0, %a, 1; @%p0 bra DONE;
        and.b32 %t0, %a, 1; setp.eq.u32 %p1, %t0, 0; @%p1 bra EVEN;
        mad.lo.u32 %a, %a, 3, 1; bra NEXT;
        EVEN: shr.u32 %a, %a, 1;
        NEXT: add.u32 %d, %d, 1; bra.uni LOOP;
        DONE: shfl.sync.idx.b32 %t1, %d, 0, 31, -1;"""

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    starts = np.arange(1, 33).astype(np.uint32)
    assert signed(execute(collatz, "b32", ("b32", starts))) == [steps(int(n)) for n in starts]


@pytest.mark.parametrize(("form", "expected"), [("add", 64), ("max", 2), ("inc", 64), ("or", 2), ("exch", 2)])
def test_atomics(form: str, expected: int) -> None:
    total = np.zeros(1, np.uint32)
    value = 2 if form != "inc" else 1000
    kind = {"or": "b32", "exch": "b32"}.get(form, "u32")
    text = f"""
    .visible .entry test(.param .u64 p) {{ .reg .b64 %a; .reg .b32 %r;
        ld.param.u64 %a, [p]; cvta.to.global.u64 %a, %a;
        atom.global.{form}.{kind} %r, [%a], {value}; ret; }}"""
    run(text, "test", (1,), (64 if form == "inc" else 32,), [total])
    assert total[0] == expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    source = RNG.integers(0, 2**16, (8 * count, 8)).astype(np.uint16)
    out = np.zeros((count, 32, 2), np.uint16)
    registers = ", ".join(f"%r{i}" for i in range(count))
    text = f"""
    .extern .shared .align 16 .b8 tile[];
    .visible .entry test(.param .u64 source, .param .u64 out) {{
        .reg .b64 %a<9>; .reg .b32 %r<9>; .reg .b32 %l<9>; .reg .pred %p;
        ld.param.u64 %a0, [source]; ld.param.u64 %a1, [out];
        mov.u32 %l0, %tid.x; setp.ge.u32 %p, %l0, {8 * count};
        mul.wide.u32 %a2, %l0, 16; add.s64 %a0, %a0, %a2; cvt.u32.u64 %l1, %a2;
        mov.u32 %l2, tile; add.u32 %l1, %l1, %l2;
        @%p bra SKIP;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%a0]; st.shared.v4.b32 [%l1], {{%r4, %r5, %r6, %r7}};
        SKIP: bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%l1];
        mad.wide.u32 %a1, %l0, 4, %a1;
        {" ".join(f"st.global.b32 [%a1+{128 * i}], %r{i};" for i in range(count))}
        ret; }}"""
    run(text, "test", (1,), (32,), [source, Output(out)], shared_bytes=512)
    matrices = source.reshape(count, 8, 8)
    expected = matrices.swapaxes(1, 2) if transposed else matrices
    np.testing.assert_array_equal(out.reshape(count, 8, 8), expected)


def test_what_is_unknown_is_an_error() -> None:
    with pytest.raises(PTXError, match=r"unknown instruction at PTX line \d+: 'frobnicate.u32 %d, %a'"):
        execute("frobnicate.u32 %d, %a;", "b32", ("b32", random("b32")))
    with pytest.raises(PTXError, match=r"\.cc is not supported"):
        execute("add.cc.u32 %d, %a, %a;", "b32", ("b32", random("b32")))
    with pytest.raises(PTXError, match="narrower"):
        execute("mov.b64 %d, %a;", "b32", ("b32", random("b32")))
