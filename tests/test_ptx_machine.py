"""The machine that executes PTX (tests/ptx_machine): every instruction does what the instruction set says, and every
detector detects. It needs no CUDA toolkit; the kernels as nvcc compiles them are `make check-ptx`."""

import itertools
import math
import platform
import re
import shutil
import struct
import sys

import numpy as np
import pytest
from device import INPUT, OUTPUT, PRODUCED, Machine, Trouble
from report import read, report
from toolchain import COMPILER, build_machine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which(COMPILER),
    reason="the machine needs g++ on x86-64 Linux",
)

LANES = 32
REGISTERS = ".reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %d<64>;"
u16, s16, u32, s32, u64, s64 = np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64
f32, f64 = np.float32, np.float64
names = (f"probe{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def library():
    return Machine(build_machine())


@pytest.fixture
def machine(library):
    library.free()
    library.configure()
    return library


def add_kernel(machine, body, *, params=0, target="sm_90", shared=False, registers=REGISTERS):
    """The name of a new kernel. Its parameters are 64-bit words; PARAM in the body is their name."""
    name = next(names)
    memory = ".extern .shared .align 128 .b8 memory[];" if shared else ""
    machine.load(
        f".version 8.7 .target {target} .address_size 64 {memory}\n"
        f".visible .entry {name}(.param .align 8 .b8 {name}_param_0[{max(params, 1) * 8}])\n"
        "{\n" + registers + "\n" + body.replace("PARAM", f"{name}_param_0") + "\nret;\n}\n"
    )
    return name


def words(*values):
    """Parameters: arrays as their addresses."""
    values = [v.ctypes.data if isinstance(v, np.ndarray) else v for v in values] or [0]
    return struct.pack(f"<{len(values)}q", *values)


# ---------------------------------------------------------------------------------------------- one instruction


def register(dtype, number):
    return ("%p" if dtype is bool else {2: "%h", 4: "%r", 8: "%d"}[np.dtype(dtype).itemsize]) + str(number)


def evaluate(machine, instruction, inputs, out_dtypes):
    """What an instruction makes of 32 lanes of its inputs. Its operands are targets, then sources, where it has $n."""
    place = "mov.u32 %r50, %tid.x; mul.wide.u32 %d50, %r50, 8;\n"
    body, operands, number = [place], [], 0
    for dtype in out_dtypes:
        operands.append(register(dtype, number))
        number += 1
    for i, values in enumerate(inputs):
        dtype = bool if values.dtype == bool else values.dtype.type
        operands.append(register(dtype, number))
        body.append(f"ld.param.u64 %d51, [PARAM+{8 * i}]; add.s64 %d51, %d51, %d50;")
        if dtype is bool:
            body.append(f"ld.global.u32 %r51, [%d51]; setp.ne.u32 {operands[-1]}, %r51, 0;")
        else:
            body.append(f"ld.global.b{8 * np.dtype(dtype).itemsize} {operands[-1]}, [%d51];")
        number += 1
    body.append(re.sub(r"\$(\d+)", lambda found: operands[int(found[1])], instruction))
    outs = []
    for i, dtype in enumerate(out_dtypes):
        body.append(f"ld.param.u64 %d51, [PARAM+{8 * (len(inputs) + i)}]; add.s64 %d51, %d51, %d50;")
        if dtype is bool:
            body.append(f"selp.u32 %r51, 1, 0, {operands[i]}; st.global.u32 [%d51], %r51;")
        else:
            body.append(f"st.global.b{8 * np.dtype(dtype).itemsize} [%d51], {operands[i]};")
        outs.append(machine.out(LANES, u64))
    name = add_kernel(machine, "\n".join(body), params=len(inputs) + len(outs))

    def spread(values):
        """Each lane's value at the start of 8 bytes."""
        raw = np.zeros(LANES, u64)
        raw.view(np.uint8).reshape(LANES, 8)[:, : values.itemsize] = values.view(np.uint8).reshape(LANES, -1)
        return raw

    given = [machine.put(spread(np.ascontiguousarray(values))) for values in inputs]
    machine.launch(name, words(*given, *outs))
    return [
        out.view(np.uint8).reshape(LANES, 8)[:, : np.dtype(dtype).itemsize].copy().view(dtype).reshape(-1)
        for out, dtype in zip(outs, out_dtypes, strict=True)
    ]


def samples(dtype, seed):
    """32 values: corners, and drawn ones of every magnitude."""
    rng = np.random.default_rng(seed)
    if dtype is bool:
        return rng.integers(0, 2, LANES).astype(bool)
    bits = 8 * np.dtype(dtype).itemsize
    if dtype in (f32, f64):
        drawn = rng.standard_normal(LANES) * 10.0 ** rng.integers(-6, 7, LANES)
        drawn[rng.permutation(LANES)[:6]] = [0.0, -0.0, 1.0, -1.5, np.inf, np.nan]
        return drawn.astype(dtype)
    drawn = rng.integers(0, 2**63, LANES, u64) >> rng.integers(0, 64, LANES).astype(u64)
    drawn[rng.permutation(LANES)[:6]] = [0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 31]
    return drawn.astype(f"u{bits // 8}").view(dtype)


def wrapped(values, dtype):
    """Python numbers as a dtype; integers modulo its width."""
    if dtype is bool or dtype in (f32, f64):
        return np.array(values, dtype)
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([int(v) % 2**bits for v in values], f"u{bits // 8}").view(dtype)


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def leading_zeros(a, bits):
    return bits - (a % 2**bits).bit_length()


def extract(bits, signed):
    def reference(a, b, c):
        first, length = b & 255, c & 255
        text = [a >> i & 1 for i in range(bits)]
        sign = text[min(first + length - 1, bits - 1)] if signed and length else 0
        return sum((text[first + i] if i < length and first + i < bits else sign) << i for i in range(bits))

    return reference


def insert(bits):
    def reference(a, b, c, d):
        first, length = c & 255, d & 255
        mask = sum(1 << i for i in range(first, min(first + length, bits)))
        return (b & ~mask) | (a << first & mask)

    return reference


def permute(a, b, c):
    eight = (a | b << 32).to_bytes(8, "little")
    out = []
    for i in range(4):
        byte, sign = eight[c >> 4 * i & 7], c >> 4 * i & 8
        out.append((255 if byte >> 7 else 0) if sign else byte)
    return int.from_bytes(bytes(out), "little")


def find(bits):
    def reference(a):
        magnitude = ~a if a < 0 else a
        return magnitude.bit_length() - 1 if magnitude else 2**32 - 1

    return reference


def select(a, b, p):
    return a if p else b


def to_integer(low, high):
    def reference(a):
        return 0 if math.isnan(a) else int(min(max(a, low), high)) if abs(a) < 2**80 else low if a < 0 else high

    return reference


def half_bits(value, dtype):
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return int(np.float16(value).view(u16)) if not math.isnan(value) else 0x7FFF
    if math.isnan(value):
        return 0x7FFF
    bits = int(f32(value).view(u32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


INTEGERS = {"u16": u16, "s16": s16, "u32": u32, "s32": s32, "u64": u64, "s64": s64}
BITS = {"b16": u16, "b32": u32, "b64": u64}
FLOATS = {"f32": f32, "f64": f64}
COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def instructions():
    """(instruction, dtypes of targets, dtypes of sources, what it does to the values of a lane)."""
    for t, T in INTEGERS.items():
        bits, signed = 8 * np.dtype(T).itemsize, t[0] == "s"
        two, three = "$0, $1, $2", "$0, $1, $2, $3"
        yield f"add.{t} {two}", [T], [T, T], lambda a, b: a + b
        yield f"sub.{t} {two}", [T], [T, T], lambda a, b: a - b
        yield f"mul.lo.{t} {two}", [T], [T, T], lambda a, b: a * b
        yield f"mul.hi.{t} {two}", [T], [T, T], lambda a, b, n=bits: a * b >> n
        yield f"mad.lo.{t} {three}", [T], [T, T, T], lambda a, b, c: a * b + c
        yield f"mad.hi.{t} {three}", [T], [T, T, T], lambda a, b, c, n=bits: (a * b >> n) + c
        yield f"sad.{t} {three}", [T], [T, T, T], lambda a, b, c: abs(a - b) + c
        yield f"min.{t} {two}", [T], [T, T], min
        yield f"max.{t} {two}", [T], [T, T], max
        yield f"div.{t} {two}", [T], [T, T], lambda a, b: quotient(a, b) if b else -1
        yield f"rem.{t} {two}", [T], [T, T], lambda a, b: a - b * quotient(a, b) if b else a
        yield f"shr.{t} {two}", [T], [T, u32], lambda a, b: a >> min(b, 64)
        if bits < 64:
            wide = {**INTEGERS}[f"{t[0]}{2 * bits}"]
            yield f"mul.wide.{t} {two}", [wide], [T, T], lambda a, b: a * b
            yield f"mad.wide.{t} {three}", [wide], [T, T, wide], lambda a, b, c: a * b + c
        if signed:
            yield f"neg.{t} $0, $1", [T], [T], lambda a: -a
            yield f"abs.{t} $0, $1", [T], [T], abs
        if bits >= 32:
            yield f"bfe.{t} {three}", [T], [T, u32, u32], extract(bits, signed)
            yield f"bfind.{t} $0, $1", [u32], [T], find(bits)
            yield f"bfind.shiftamt.{t} $0, $1", [u32], [T], lambda a, n=bits: n - 1 - find(n)(a) if find(n)(a) < n else -1  # fmt: skip
        for how, function in COMPARISONS.items():
            yield f"setp.{how}.{t} {two}", [bool], [T, T], function
        for how, same in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            if not signed:
                yield f"setp.{how}.{t} {two}", [bool], [T, T], COMPARISONS[same]
        for other, O in INTEGERS.items():
            if other != t:
                yield f"cvt.{other}.{t} $0, $1", [O], [T], lambda a: a
        yield f"cvt.{t}.u8 $0, $1", [T], [u16], lambda a: a & 255
        yield f"cvt.{t}.s8 $0, $1", [T], [u32], lambda a: (a & 255) - 2 * (a & 128)
        yield f"cvt.u8.{t} $0, $1", [u32], [T], lambda a: a & 255
        yield f"cvt.s8.{t} $0, $1", [s16], [T], lambda a: (a & 255) - 2 * (a & 128)
        for f, F in FLOATS.items():
            # Through the exact integer, so that it is rounded once.
            yield f"cvt.rn.{f}.{t} $0, $1", [F], [T], lambda a, F=F, T=T: F(T(a))
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            if bits >= 32:
                yield f"cvt.rzi.{t}.{f} $0, $1", [T], [F], to_integer(low, high)
    for t, T in BITS.items():
        bits = 8 * np.dtype(T).itemsize
        yield f"and.{t} $0, $1, $2", [T], [T, T], lambda a, b: a & b
        yield f"or.{t} $0, $1, $2", [T], [T, T], lambda a, b: a | b
        yield f"xor.{t} $0, $1, $2", [T], [T, T], lambda a, b: a ^ b
        yield f"not.{t} $0, $1", [T], [T], lambda a: ~a
        yield f"cnot.{t} $0, $1", [T], [T], lambda a: a == 0
        yield f"shl.{t} $0, $1, $2", [T], [T, u32], lambda a, b: a << min(b, 64)
        yield f"shr.{t} $0, $1, $2", [T], [T, u32], lambda a, b: a >> min(b, 64)
        yield f"mov.{t} $0, $1", [T], [T], lambda a: a
        yield f"selp.{t} $0, $1, $2, $3", [T], [T, T, bool], select
        yield f"slct.{t}.s32 $0, $1, $2, $3", [T], [T, T, s32], lambda a, b, c: a if c >= 0 else b
        yield f"slct.{t}.f32 $0, $1, $2, $3", [T], [T, T, f32], lambda a, b, c: a if c >= 0 else b
        yield f"setp.eq.{t} $0, $1, $2", [bool], [T, T], lambda a, b: a == b
        if bits >= 32:
            yield f"popc.{t} $0, $1", [u32], [T], lambda a: bin(a).count("1")
            yield f"clz.{t} $0, $1", [u32], [T], lambda a, n=bits: leading_zeros(a, n)
            yield f"brev.{t} $0, $1", [T], [T], lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2)
            yield f"bfi.{t} $0, $1, $2, $3, $4", [T], [T, T, u32, u32], insert(bits)
    for f, F in FLOATS.items():
        for how, function in COMPARISONS.items():
            yield f"setp.{how}.{f} $0, $1, $2", [bool], [F, F], lambda a, b, g=function: g(a, b) and a == a and b == b
            yield f"setp.{how}u.{f} $0, $1, $2", [bool], [F, F], lambda a, b, g=function: g(a, b) or a != a or b != b
        yield f"setp.num.{f} $0, $1, $2", [bool], [F, F], lambda a, b: a == a and b == b
        yield f"setp.nan.{f} $0, $1, $2", [bool], [F, F], lambda a, b: a != a or b != b
        for rounding in ("", ".rn"):
            yield f"add{rounding}.{f} $0, $1, $2", [F], [F, F], lambda a, b: a + b
            yield f"sub{rounding}.{f} $0, $1, $2", [F], [F, F], lambda a, b: a - b
            yield f"mul{rounding}.{f} $0, $1, $2", [F], [F, F], lambda a, b: a * b
        yield f"div.rn.{f} $0, $1, $2", [F], [F, F], np.divide
        yield f"rcp.rn.{f} $0, $1", [F], [F], lambda a: np.divide(type(a)(1), a)
        yield f"sqrt.rn.{f} $0, $1", [F], [F], np.sqrt
        yield f"min.{f} $0, $1, $2", [F], [F, F], np.fmin
        yield f"max.{f} $0, $1, $2", [F], [F, F], np.fmax
        yield f"neg.{f} $0, $1", [F], [F], lambda a: -a
        yield f"abs.{f} $0, $1", [F], [F], abs
        yield f"selp.{f} $0, $1, $2, $3", [F], [F, F, bool], select
    # In double the product of floats is exact, and the sum close enough to be rounded right for these samples.
    yield "fma.rn.f32 $0, $1, $2, $3", [f32], [f32, f32, f32], lambda a, b, c: f32(f64(a) * f64(b) + f64(c))
    yield "cvt.f64.f32 $0, $1", [f64], [f32], f64
    yield "cvt.rn.f32.f64 $0, $1", [f32], [f64], f32
    yield "cvt.f32.f16 $0, $1", [f32], [u16], lambda a: f32(u16(a).view(np.float16))
    yield "cvt.f32.bf16 $0, $1", [f32], [u16], lambda a: u32(a << 16).view(f32)
    yield "cvt.rn.f16.f32 $0, $1", [u16], [f32], lambda a: half_bits(a, "f16")
    yield "cvt.rn.bf16.f32 $0, $1", [u16], [f32], lambda a: half_bits(a, "bf16")
    for half in ("f16", "bf16"):
        yield f"cvt.rn.{half}x2.f32 $0, $1, $2", [u32], [f32, f32], lambda a, b, h=half: half_bits(a, h) << 16 | half_bits(b, h)  # fmt: skip
    yield "cvt.rna.tf32.f32 $0, $1", [u32], [f32], lambda a: 0x7FFFE000 if a != a else int(a.view(u32)) + 0x1000 & ~0x1FFF  # fmt: skip
    yield "prmt.b32 $0, $1, $2, $3", [u32], [u32, u32, u32], permute
    yield "lop3.b32 $0, $1, $2, $3, 0xE2", [u32], [u32, u32, u32], lambda a, b, c: (b & a) | (~b & c)
    yield "lop3.b32 $0, $1, $2, $3, 0x96", [u32], [u32, u32, u32], lambda a, b, c: a ^ b ^ c
    for how, amount in (("wrap", lambda c: c & 31), ("clamp", lambda c: min(c, 32))):
        yield f"shf.l.{how}.b32 $0, $1, $2, $3", [u32], [u32, u32, u32], lambda a, b, c, n=amount: (b << 32 | a) << n(c) >> 32  # fmt: skip
        yield f"shf.r.{how}.b32 $0, $1, $2, $3", [u32], [u32, u32, u32], lambda a, b, c, n=amount: (b << 32 | a) >> n(c)
    for name, function in (("and", lambda a, b: a and b), ("or", lambda a, b: a or b), ("xor", lambda a, b: a != b)):
        yield f"{name}.pred $0, $1, $2", [bool], [bool, bool], function
    for name, function in (("and", lambda a, b: a and b), ("or", lambda a, b: a or b), ("xor", lambda a, b: a != b)):
        for t, T in (("s32", s32), ("f64", f64)):
            yield f"setp.lt.{name}.{t} $0, $1, $2, $3", [bool], [T, T, bool], lambda a, b, c, f=function: f(a < b, c)
            yield (
                f"setp.lt.{name}.{t} $0|$1, $2, $3, !$4",
                [bool, bool],
                [T, T, bool],
                lambda a, b, c, f=function: (f(a < b, not c), f(not a < b, not c)),
            )
    yield "setp.lt.u16 $0|$1, $2, $3", [bool, bool], [u16, u16], lambda a, b: (a < b, a >= b)
    yield "not.pred $0, $1", [bool], [bool], lambda a: not a
    yield "mov.pred $0, $1", [bool], [bool], lambda a: a
    yield "mov.b32 $0, {$1, $2}", [u32], [u16, u16], lambda a, b: a | b << 16
    yield "mov.b64 $0, {$1, $2}", [u64], [u32, u32], lambda a, b: a | b << 32
    yield "mov.b64 $0, {$1, $2, $3, $4}", [u64], [u16] * 4, lambda a, b, c, d: a | b << 16 | c << 32 | d << 48
    yield "mov.b32 {$0, $1}, $2", [u16, u16], [u32], lambda a: (a, a >> 16)
    yield "mov.b64 {$0, $1}, $2", [u32, u32], [u64], lambda a: (a, a >> 32)
    yield "mov.b64 {_, $0}, $1", [u32], [u64], lambda a: a >> 32
    yield "add.cc.u32 $0, $2, $3; addc.u32 $1, $4, 0", [u32, u32], [u32, u32, u32], lambda a, b, c: (a + b, c + (a + b >> 32))  # fmt: skip
    yield "sub.cc.s64 $0, $2, $3; subc.s64 $1, $4, 0", [u64, u64], [u64, u64, u64], lambda a, b, c: (a - b, c - (a < b))


@pytest.mark.parametrize(("instruction", "targets", "sources", "reference"), list(instructions()), ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_instruction(machine, instruction, targets, sources, reference):
    for seed in range(3):
        inputs = [samples(dtype, [seed, i]) for i, dtype in enumerate(sources)]
        results = evaluate(machine, f"{instruction};", inputs, targets)
        floats = [values.dtype.type in (f32, f64) for values in inputs]
        with np.errstate(all="ignore"):
            lanes = [
                reference(*(v if is_float else v.item() for v, is_float in zip(lane, floats, strict=True)))
                for lane in zip(*inputs, strict=True)
            ]
        for k, (got, dtype) in enumerate(zip(results, targets, strict=True)):
            expected = wrapped([lane[k] if len(targets) > 1 else lane for lane in lanes], dtype)
            if dtype is bool:
                got = got.astype(bool)
            np.testing.assert_array_equal(got, expected, err_msg=f"{instruction} of {inputs}")
        machine.free()


def test_fma_rounds_once(machine):
    a = np.full(LANES, 1 + 2.0**-30)
    (got,) = evaluate(machine, "fma.rn.f64 $0, $1, $2, $3;", [a, a, -a * a], [f64])
    np.testing.assert_array_equal(got, 2.0**-60)


# ---------------------------------------------------------------------------------------------- lanes together


def test_shuffles(machine):
    values, lane = samples(u32, 1), np.arange(LANES)
    for how, b, c, source in (
        ("bfly", 5, 31, lane ^ 5),
        ("idx", 7, 31, np.full(LANES, 7)),
        ("idx", 3, 8 << 8 | 31 | 24 << 8, lane // 8 * 8 + 3),  # segments of eight
        ("up", 3, 0, np.where(lane >= 3, lane - 3, -1)),
        ("down", 4, 31, np.where(lane + 4 < LANES, lane + 4, -1)),
        ("down", 2, 24 << 8 | 31, np.where(lane % 8 < 6, lane + 2, -1)),
    ):
        instruction = f"shfl.sync.{how}.b32 $0|$1, $2, {b}, {c}, -1;"
        got, inside = evaluate(machine, instruction, [values], [u32, bool])
        np.testing.assert_array_equal(got, values[np.where(source < 0, lane, source)], err_msg=instruction)
        np.testing.assert_array_equal(inside.astype(bool), source >= 0, err_msg=instruction)
    (got,) = evaluate(machine, "shfl.sync.bfly.b32 $0, $1, 1, 31, 0xffffffff;", [values], [u32])
    np.testing.assert_array_equal(got, values[lane ^ 1])


def test_votes_and_matches(machine):
    some = samples(bool, 2)
    bits = sum(1 << i for i in range(LANES) if some[i])
    (got,) = evaluate(machine, "vote.sync.ballot.b32 $0, $1, -1;", [some], [u32])
    np.testing.assert_array_equal(got, bits)
    for how, given, expected in (
        *(("all", some, False), ("all", some | True, True), ("any", some, True), ("any", some & False, False)),
        *(("uni", some, False), ("uni", some & False, True), ("uni", some | True, True)),
    ):
        (got,) = evaluate(machine, f"vote.sync.{how}.pred $0, $1, -1;", [given], [bool])
        np.testing.assert_array_equal(got, expected, err_msg=how)
    values = samples(u32, 3) % 4
    (got,) = evaluate(machine, "match.any.sync.b32 $0, $1, -1;", [values], [u32])
    same = [sum(1 << k for k in range(LANES) if values[k] == v) for v in values]
    np.testing.assert_array_equal(got, same)
    got, all_same = evaluate(machine, "match.all.sync.b32 $0|$1, $2, -1;", [values], [u32, bool])
    assert not got.any()
    assert not all_same.any()
    got, all_same = evaluate(machine, "match.all.sync.b32 $0|$1, $2, -1;", [values * 0], [u32, bool])
    assert (got == 2**32 - 1).all()
    assert all_same.all()


def test_special_registers(machine):
    lane = np.arange(LANES, dtype=np.int64)
    for name, expected in (
        ("%tid.x", lane),
        ("%laneid", lane),
        ("%ntid.x", lane * 0 + 32),
        ("%nctaid.z", lane * 0 + 1),
        ("%ctaid.y", lane * 0),
        ("%lanemask_eq", 1 << lane),
        ("%lanemask_lt", (1 << lane) - 1),
        ("%lanemask_ge", 2**32 - (1 << lane)),
    ):
        (got,) = evaluate(machine, f"mov.u32 $0, {name};", [], [u32])
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_where_a_thread_is(machine):
    body = """
mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y; mov.u32 %r6, %nctaid.x; mad.lo.u32 %r7, %r5, %r6, %r4;
mad.lo.u32 %r8, %r7, 64, %r3; ld.param.u64 %d0, [PARAM]; mul.wide.u32 %d1, %r8, 4; add.s64 %d0, %d0, %d1;
st.global.u32 [%d0], %r8;"""
    name = add_kernel(machine, body, params=1)
    for blocks in range(3):
        machine.free()
        machine.configure(blocks=blocks, warps=blocks, race=1)
        out = machine.out(6 * 64, u32)
        machine.launch(name, words(out), grid=(3, 2, 1), block=(16, 4, 1))
        np.testing.assert_array_equal(out, np.arange(6 * 64))


def fragments(a, b, c):
    """Registers of the matrices of mma.m16n8k16: 16 bits, two to a register, as the figures of the instruction set."""
    lane = np.arange(LANES)
    g, t = lane // 4, lane % 4

    def two(m, rows, cols):
        low, high = m[rows, cols].astype(u32), m[rows + (m is b), cols + (m is not b)].astype(u32)
        return low | high << np.uint32(16)

    registers_a = [two(a, g + 8 * (r % 2), 2 * t + 8 * (r // 2)) for r in range(4)]
    registers_b = [two(b, 2 * t + 8 * r, g) for r in range(2)]
    registers_c = [c[g + 8 * (r // 2), 2 * t + r % 2] for r in range(4)]
    return registers_a + registers_b + registers_c


@pytest.mark.parametrize("half", ["bf16", "f16"])
def test_mma_of_16_bits(machine, half):
    rng = np.random.default_rng(4)
    values = [rng.integers(-9, 10, shape).astype(f32) for shape in ((16, 16), (16, 8), (16, 8))]
    a, b, c = values
    bits = (lambda m: (m.view(u32) >> np.uint32(16)).astype(u16)) if half == "bf16" else (lambda m: m.astype(np.float16).view(u16))  # fmt: skip
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32"
    instruction = f"{name} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
    got = evaluate(machine, instruction, fragments(bits(a), bits(b), c), [f32] * 4)
    lane = np.arange(LANES)
    for r, values in enumerate(got):
        np.testing.assert_array_equal(values, (a @ b + c)[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2])


def test_mma_of_tf32(machine):
    rng = np.random.default_rng(5)
    a, b, c = (rng.integers(-9, 10, shape).astype(f32) for shape in ((16, 8), (8, 8), (16, 8)))
    lane = np.arange(LANES)
    g, t = lane // 4, lane % 4
    inputs = [a[g + 8 * (r % 2), t + 4 * (r // 2)] for r in range(4)] + [b[t + 4 * r, g] for r in range(2)]
    inputs += [c[g + 8 * (r // 2), 2 * t + r % 2] for r in range(4)]
    name = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    instruction = f"{name} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
    got = evaluate(machine, instruction, inputs, [f32] * 4)
    for r, values in enumerate(got):
        np.testing.assert_array_equal(values, (a @ b + c)[g + 8 * (r // 2), 2 * t + r % 2])
    inputs[0] = inputs[0] + f32(2.0**-20)
    with pytest.raises(Trouble, match="that was not rounded"):
        evaluate(machine, instruction, inputs, [f32] * 4)


# ---------------------------------------------------------------------------------------------- memory

# Lane i of warp w: %r0 is i + 32 w, %d0 and %r2 where its 16 bytes are in the buffer of parameter 0 and in shared memory.
PLACE = """
mov.u32 %r0, %tid.x; mul.wide.u32 %d1, %r0, 16; ld.param.u64 %d0, [PARAM]; add.s64 %d0, %d0, %d1;
mov.u32 %r1, memory; shl.b32 %r2, %r0, 4; add.s32 %r2, %r1, %r2;
ld.param.u64 %d2, [PARAM+8]; add.s64 %d2, %d2, %d1;
"""


def run_in_shared(machine, body, *, threads=64, shared=1024, data=None, access=INPUT, **mode):
    """Runs PLACE and a body on 16 bytes a thread; returns the output, of parameter 1."""
    machine.free()
    machine.configure(race=1, **mode)
    name = add_kernel(machine, PLACE + body, params=2, shared=True)
    given = machine.put(np.arange(4 * threads, dtype=u32) if data is None else data, access)
    out = machine.out(4 * threads, u32)
    machine.launch(name, words(given, out), block=(threads, 1, 1), shared=shared)
    return out.copy()


@pytest.mark.parametrize("space", ["shared", "generic"])
def test_vectors(machine, space):
    where = "%r2" if space == "shared" else "%d3"
    word = ".shared" if space == "shared" else ""
    address = "cvt.u64.u32 %d3, %r2; cvta.shared.u64 %d3, %d3;"
    expected = np.arange(256)
    for load, store in itertools.product(("v4.b32 {%r4, %r5, %r6, %r7}", "v2.b64 {%d4, %d5}"), repeat=2):
        kind, registers = load.split(" ", 1)
        other, targets = store.split(" ", 1)
        join = "mov.b64 %d4, {%r4, %r5}; mov.b64 %d5, {%r6, %r7};" if "r4" in load else "mov.b64 {%r4, %r5}, %d4; mov.b64 {%r6, %r7}, %d5;"  # fmt: skip
        body = f"""{address} ld.global.nc.{kind} {registers}, [%d0]; {join if load != store else ""}
st{word}.{other} [{where}], {targets}; ld{word}.{other} {targets}, [{where}]; st.global.cs.{other} [%d2], {targets};"""
        np.testing.assert_array_equal(run_in_shared(machine, body), expected)


def test_narrow_values_are_extended(machine):
    body = """ld.global.s8 %r4, [%d0]; ld.global.u8 %h1, [%d0+1]; cvt.u32.u16 %r5, %h1; ld.global.s16 %d4, [%d0+-14];
cvt.u32.u64 %r6, %d4; ld.global.v2.u16 {%h2, %h3}, [%d0+4]; mov.b32 %r7, {%h3, %h2}; st.global.v4.u32 [%d2], {%r4, %r5, %r6, %r7};"""
    data = np.full(256, 0x818283F4, u32)
    with pytest.raises(Trouble, match="read outside of every buffer"):
        run_in_shared(machine, body, data=data)
    out = run_in_shared(machine, body.replace("-14", "2"), data=data).reshape(-1, 4)
    np.testing.assert_array_equal(out, [[0xFFFFFFF4, 0x83, 0xFFFF8182, 0x83F48182]] * 64)


ASYNC_COPY = "cp.async.cg.shared.global [%r2], [%d0], 16;"
READ_BACK = "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2]; st.global.v4.u32 [%d2], {%r4, %r5, %r6, %r7};"


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("wait", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_async_copies(machine, late, wait):
    expected = np.arange(256)
    np.testing.assert_array_equal(run_in_shared(machine, ASYNC_COPY + wait + READ_BACK, late=late), expected)
    eight = "cp.async.ca.shared.global [%r2], [%d0+8], 8, 8; cp.async.ca.shared.global [%r2+8], [%d0], 8, 4;"
    out = run_in_shared(machine, eight + wait + READ_BACK, late=late).reshape(-1, 4)
    given = expected.reshape(-1, 4)
    np.testing.assert_array_equal(out, np.stack([given[:, 2], given[:, 3], given[:, 0], 0 * given[:, 0]], 1))
    nothing = "mov.u32 %r9, 0; cp.async.cg.shared.global [%r2], [%d0], 16, %r9;"
    assert not run_in_shared(machine, nothing + wait + READ_BACK, late=late).any()


def test_ldmatrix(machine):
    # Row i of the 32 rows of 16 bytes is copied by lane i, which also brings its address.
    store = (
        "ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d0]; st.shared.v4.u32 [%r2], {%r4, %r5, %r6, %r7}; bar.warp.sync -1;"
    )
    words_of = np.arange(256, dtype=u16).reshape(4, 8, 8)
    lane = np.arange(LANES)
    for trans in ("", ".trans"):
        body = f"""{store} ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r5, %r6, %r7}}, [%r2];
st.global.v4.u32 [%d2], {{%r2, %r5, %r6, %r7}};"""
        out = run_in_shared(machine, body, threads=32, data=words_of.reshape(-1).view(u32))
        matrices = words_of.transpose(0, 2, 1) if trans else words_of
        pairs = matrices[:, lane // 4, 2 * (lane % 4)] | matrices[:, lane // 4, 2 * (lane % 4) + 1].astype(u32) << 16
        np.testing.assert_array_equal(out.reshape(LANES, 4), pairs.T)


def test_parameters_one_by_one(machine):
    name = next(names)
    machine.load(
        f".version 8.7 .target sm_90 .address_size 64 .visible .entry {name}(.param .u32 a, .param .u64 out, "
        ".param .u8 b, .param .align 16 .b8 c[32], .param .f64 d) .maxntid 32, 1, 1 .minnctapersm 2 {"
        + REGISTERS
        + """
mov.u32 %r0, %tid.x; mul.wide.u32 %d1, %r0, 16; ld.param.u64 %d0, [out]; add.s64 %d0, %d0, %d1;
ld.param.u32 %r4, [a]; ld.param.u8 %r5, [b]; ld.param.u32 %r6, [c+28]; ld.param.f64 %d4, [d]; cvt.rzi.u32.f64 %r7, %d4;
st.global.v4.u32 [%d0], {%r4, %r5, %r6, %r7}; ret; }"""
    )
    out = machine.out((LANES, 4), u32)
    machine.launch(name, struct.pack("<I4xQB15x28xId", 3, out.ctypes.data, 200, 5, 7.0))
    np.testing.assert_array_equal(out, [[3, 200, 5, 7]] * LANES)


def test_parameters(machine):
    body = """mov.b64 %d5, PARAM; cvta.param.u64 %d6, %d5; ld.param.v2.u32 {%r4, %r5}, [PARAM+8]; ld.param.u64 %d7, [%d5+16];
ld.u64 %d8, [%d6+16]; mov.u32 %r6, %tid.x; mul.wide.u32 %d9, %r6, 32; ld.param.u64 %d0, [PARAM]; add.s64 %d0, %d0, %d9;
st.global.v2.u32 [%d0], {%r4, %r5}; st.global.v2.b64 [%d0+16], {%d7, %d8}; st.global.b64 [%d0+8], %d7;"""
    name = add_kernel(machine, body, params=3)
    out = machine.out((LANES, 4), u64)
    machine.launch(name, words(out, 5 + (7 << 32), 9))
    np.testing.assert_array_equal(out, [[5 + (7 << 32), 9, 9, 9]] * LANES)


# ---------------------------------------------------------------------------------------------- divergence

EXCHANGE = "shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;"
STORE = "mov.b32 %r5, %r4; mov.b32 %r6, %r4; mov.b32 %r7, %r4; st.global.v4.u32 [%d2], {%r4, %r5, %r6, %r7};"


@pytest.mark.parametrize("lanes", range(4))
@pytest.mark.parametrize("warps", range(3))
def test_lanes_that_part_meet_again(machine, lanes, warps):
    body = f"""mov.u32 %r4, 0; and.b32 %r8, %r0, 7;
LOOP: add.u32 %r4, %r4, %r8; setp.eq.u32 %p1, %r8, 0; @%p1 bra DONE; sub.u32 %r8, %r8, 1; bra LOOP;
DONE: bar.sync 0; {EXCHANGE.replace("%r0", "%r4")} {STORE}"""
    out = run_in_shared(machine, body, lanes=lanes, warps=warps, seed=3).reshape(-1, 4)[:, 0]
    steps = (np.arange(64) ^ 1) % 8
    np.testing.assert_array_equal(out, steps * (steps + 1) // 2)


def test_guards(machine):
    body = f"setp.lt.u32 %p1, %r0, 10; mov.u32 %r4, 1; @%p1 mov.u32 %r4, 2; @!%p1 add.u32 %r4, %r4, 4; {STORE}"
    out = run_in_shared(machine, body).reshape(-1, 4)[:, 0]
    np.testing.assert_array_equal(out, np.where(np.arange(64) < 10, 2, 5))


# ---------------------------------------------------------------------------------------------- detectors

BRANCH = "setp.lt.u32 %p1, %r0, 5; @%p1 bra A; bra B; A: {first} bra C; B: {second} C:"
WAIT = "cp.async.commit_group; cp.async.wait_group 0;"
NEIGHBOUR = "xor.b32 %r8, %r0, {}; shl.b32 %r8, %r8, 4; add.s32 %r8, %r1, %r8; ld.shared.u32 %r4, [%r8];"
MATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r2];"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r10, %r11, %r12, %r13}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, {%r0, %r0, %r0, %r0};"
BUGS = {
    "a copy read before it lands": (ASYNC_COPY + READ_BACK, "read of a cp.async in flight"),
    "a copy waited for by others": (ASYNC_COPY + WAIT + NEIGHBOUR.format(1), "race: read after write"),
    "a group too few": (ASYNC_COPY + "cp.async.commit_group; cp.async.wait_group 1;" + READ_BACK, "in flight"),
    "a copy overwritten": (ASYNC_COPY + "st.shared.u32 [%r2], %r0;", "write over a cp.async in flight"),
    "no barrier": ("st.shared.u32 [%r2], %r0; bar.warp.sync -1;" + NEIGHBOUR.format(32), "race: .* after"),
    "no bar.warp.sync": ("st.shared.u32 [%r2], %r0;" + NEIGHBOUR.format(1), "race: read after write of thread"),
    "no barrier before a write": (
        "st.shared.u32 [%r2], %r0; bar.sync 0;" + NEIGHBOUR.format(32) + "st.shared.u32 [%r2], %r4;",
        "race: .* after",
    ),
    "no bar.warp.sync before a write": (
        "st.shared.u32 [%r2], %r0; bar.sync 0;" + NEIGHBOUR.format(1) + "st.shared.u32 [%r2], %r4;",
        "write after read of another lane",
    ),
    "all write one word": ("st.shared.u32 [%r1], %r0;", "write after write"),
    "ldmatrix of unsynchronised rows": ("st.shared.v4.u32 [%r2], {%r0, %r0, %r0, %r0};" + MATRIX, "read after write"),
    "all write one output": ("ld.param.u64 %d3, [PARAM+8]; st.global.u32 [%d3], %r0;", "race: write of global memory"),
    "a write to an input": ("st.global.u32 [%d0], %r0;", "write to an input"),
    "a read past the end": ("ld.global.u32 %r4, [%d0+16];", "read outside of every buffer: 4 bytes"),
    "a read before the start": ("ld.global.u32 %r4, [%d0+-4];", "read outside of every buffer"),
    "a write past the end": ("st.global.u32 [%d2+16], %r0;", "write outside of every buffer: 4 bytes"),
    "a copy past the end": ("cp.async.cg.shared.global [%r2], [%d0+16], 16;", "read outside of every buffer: 16"),
    "shared memory past the end": ("st.shared.u32 [%r2+16], %r0;", "outside of shared memory: byte 1024 of 1024"),
    "shared memory before the start": ("st.shared.u32 [%r2+-4], %r0;", "outside of shared memory: byte -4"),
    "a lost base of shared memory": ("shl.b32 %r3, %r0, 2; st.shared.u32 [%r3], %r0;", "outside of shared memory"),
    "parameters past the end": ("ld.param.u64 %d4, [PARAM+16];", "outside of the parameters: byte 16 of 16"),
    "a misaligned vector": ("ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d0+8];", "misaligned: 16 bytes"),
    "a misaligned copy": ("cp.async.cg.shared.global [%r2+8], [%d0], 16;", "misaligned: 16 bytes"),
    "a misaligned row of a matrix": (MATRIX.replace("[%r2]", "[%r2+8]"), "misaligned: 16 bytes"),
    "a copy of too many bytes": ("mov.u32 %r9, 17; cp.async.cg.shared.global [%r2], [%d0], 16, %r9;", "reads more"),
    "ld.global.nc of an output": ("ld.global.nc.u32 %r4, [%d2];", "ld.global.nc of a buffer that the launch may write"),
    "a trap": ("setp.eq.u32 %p1, %r0, 7; @%p1 trap;", "^trap"),
    "a shuffle in a branch": (BRANCH.format(first=EXCHANGE, second=""), "lanes of a warp wait for each other|lanes have left"),
    "mma in two branches": (BRANCH.format(first=MMA, second=MMA), "lanes of a warp wait for each other"),
    "ldmatrix in two branches": (BRANCH.format(first=MATRIX, second=MATRIX), "lanes of a warp wait for each other"),
    "barriers in two branches": (BRANCH.format(first="bar.sync 0;", second="bar.sync 0;"), "lanes of a warp wait"),
    "mma after lanes have left": ("setp.eq.u32 %p1, %r0, 3; @%p1 exit;" + MMA, "after lanes have left"),
    "a mask of half the warp": (EXCHANGE.replace("-1;", "0xffff;"), "a mask of less than the warp"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(machine, bug):
    body, message = BUGS[bug]
    # Whether the copies land late or not, and whoever comes first.
    for late, lanes, warps in ((1, 0, 0), (0, 1, 1), (1, 2, 2)):
        with pytest.raises(Trouble, match=message):
            run_in_shared(machine, body, late=late, lanes=lanes, warps=warps)


def test_late_copies_are_not_there_before_the_wait(machine):
    """Without the detector of races: what is read too early is NaN."""
    name = add_kernel(machine, PLACE + ASYNC_COPY + READ_BACK + WAIT, params=2, shared=True)
    given, out = machine.put(np.arange(256, dtype=u32)), machine.out(256, u32)
    machine.launch(name, words(given, out), block=(64, 1, 1), shared=1024)
    assert (out == 2**32 - 1).all()
    machine.configure(late=0)
    machine.launch(name, words(given, out), block=(64, 1, 1), shared=1024)
    np.testing.assert_array_equal(out, np.arange(256))


def test_copies_that_nobody_waits_for_are_counted(machine):
    before = machine.statistics()["never_waited"]
    run_in_shared(machine, ASYNC_COPY)
    assert machine.statistics()["never_waited"] == before + 64


def test_registers_and_shared_memory_start_as_garbage(machine):
    out = run_in_shared(machine, "st.global.v4.u32 [%d2], {%r40, %r41, %r42, %r43};")
    assert (out.view(u32) == 0xFFFEBABE).all()
    out = run_in_shared(machine, READ_BACK)
    assert (out == 2**32 - 1).all()


@pytest.mark.parametrize(
    "body",
    [
        "tanh.approx.f32 %r1, %r2;",
        "add.ftz.f32 %r1, %r2, %r3;",
        "atom.global.add.u32 %r1, [%d1], %r2;",
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, %d1;",
        "add.s32 %r1, %r2, nobody;",
        "ld.global.v4.b64 {%d1, %d2, %d3, %d4}, [%d0];",
        "ld.volatile.global.u32 %r1, [%d1];",
        "st.param.u32 [%d1], %r1;",
        "cp.async.cg.shared.global [%r1], [%d1], 8;",
        "bar.sync 1;",
        "mov.u32 %r1, %clock;",
        "bra nowhere;",
        "@%p1 bar.sync 0;",
        "@%p1 bar.warp.sync -1;",
        ".local .b8 memory[16];",
        "mov.u32 %r1, %r2, %r3;",
        "setp.lt.b32 %p1, %r1, %r2;",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1, %r1, %r1, %r1}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r1, %r1, %r1, %r1};",
    ],
)
def test_what_is_not_known_is_an_error(machine, body):
    with pytest.raises(Trouble, match="not understood|no label"):
        add_kernel(machine, body)


def test_griddepcontrol_needs_sm_90(machine):
    with pytest.raises(Trouble, match="below sm_90"):
        add_kernel(machine, "griddepcontrol.wait;", target="sm_80")


# ---------------------------------------------------------------------------------------------- dependent launches

TRIGGER, WAIT_FOR_IT = "griddepcontrol.launch_dependents;", "griddepcontrol.wait;"
# out[i] = in[i] + 1 for the 64 threads of a block.
LOAD = "mov.u32 %r0, %tid.x; mul.wide.u32 %d5, %r0, 4; ld.param.u64 %d0, [PARAM]; add.s64 %d0, %d0, %d5; ld.global.u32 %r1, [%d0];"
ADD = "add.u32 %r1, %r1, 1; ld.param.u64 %d1, [PARAM+8]; add.s64 %d1, %d1, %d5; st.global.u32 [%d1], %r1;"


def chain(machine, *bodies, programmatic=True, access=OUTPUT, **mode):
    """Each kernel adds 1 to what the one before has written; the last result, or NaN's bits where one came too early."""
    machine.free()
    machine.configure(early=1, race=1, **mode)
    buffers = [machine.put(np.arange(64, dtype=u32)), *(machine.out(64, u32) for _ in bodies)]
    if access != OUTPUT:
        machine.buffers = [(f, s, n, a if a == INPUT else access) for f, s, n, a in machine.buffers]
    for i, body in enumerate(bodies):
        name = add_kernel(machine, body, params=2)
        machine.launch(name, words(*buffers[i : i + 2]), block=(64, 1, 1), programmatic=programmatic and i > 0)
    machine.flush()
    return buffers[-1].copy()


@pytest.mark.parametrize("warps", range(3))
def test_dependent_launches(machine, warps):
    for first, second in itertools.product((LOAD + ADD, TRIGGER + LOAD + ADD, LOAD + TRIGGER + ADD), (TRIGGER, "")):
        bodies = [first, WAIT_FOR_IT + second + LOAD + ADD, WAIT_FOR_IT + LOAD + second + ADD]
        np.testing.assert_array_equal(chain(machine, *bodies, warps=warps), np.arange(64) + 3)


def test_launches_that_are_not_programmatic_follow_each_other(machine):
    bodies = [TRIGGER + LOAD + ADD, TRIGGER + LOAD + ADD]
    np.testing.assert_array_equal(chain(machine, *bodies, programmatic=False), np.arange(64) + 2)


def test_what_waits_for_the_flush_can_be_forgotten(machine):
    machine.configure(early=1)
    given, out = machine.put(np.arange(64, dtype=u32)), machine.out(64, u32)
    machine.launch(add_kernel(machine, LOAD + ADD, params=2), words(given, out), block=(64, 1, 1))
    assert (out == 2**32 - 1).all()
    machine.free()
    machine.flush()
    assert (out == 2**32 - 1).all()


@pytest.mark.parametrize("late", [LOAD + WAIT_FOR_IT + ADD, LOAD + ADD + WAIT_FOR_IT, LOAD + ADD])
def test_a_wait_that_comes_too_late_is_found(machine, late):
    for first in (LOAD + ADD, TRIGGER + LOAD + ADD):
        with pytest.raises(Trouble, match="read of what the launch before may be using, before griddepcontrol.wait"):
            chain(machine, first, late)


def test_a_write_before_the_wait_is_found(machine):
    early = "mov.u32 %r1, 7; mov.u64 %d5, 0;" + ADD + WAIT_FOR_IT
    with pytest.raises(Trouble, match="write of what the launch before may be using, before griddepcontrol.wait"):
        chain(machine, TRIGGER + LOAD + ADD, early)


def test_who_lets_the_next_launch_start_before_its_wait_is_found(machine):
    """Where no launch follows, too. A launch that nobody starts early has nothing to wait for."""
    with pytest.raises(Trouble, match="launch_dependents before griddepcontrol.wait"):
        chain(machine, LOAD + ADD, TRIGGER + WAIT_FOR_IT + LOAD + ADD)
    np.testing.assert_array_equal(chain(machine, TRIGGER + WAIT_FOR_IT + LOAD + ADD), np.arange(64) + 1)


def test_launches_that_overlap_are_counted(machine):
    """Those that begin before the one before them is complete, and no others."""

    def overlapped(*bodies, **options):
        before = machine.statistics()["overlapped"]
        chain(machine, *bodies, **options)
        return machine.statistics()["overlapped"] - before

    early, late = WAIT_FOR_IT + TRIGGER + LOAD + ADD, WAIT_FOR_IT + LOAD + ADD
    assert overlapped(TRIGGER + LOAD + ADD, early, late) == 2
    assert overlapped(LOAD + ADD, early, late) == 1
    assert overlapped(TRIGGER + LOAD + ADD, early, late, programmatic=False) == 0


def test_who_waits_at_a_barrier_has_waited(machine):
    """One warp waits for the launch before, and the block for it."""
    waits = f"mov.u32 %r9, %tid.x; setp.gt.u32 %p1, %r9, 31; @%p1 bra GO; {WAIT_FOR_IT} GO: "
    np.testing.assert_array_equal(chain(machine, LOAD + ADD, waits + "bar.sync 0;" + LOAD + ADD), np.arange(64) + 2)
    with pytest.raises(Trouble, match="before griddepcontrol.wait"):
        chain(machine, LOAD + ADD, waits + LOAD + ADD)


def test_what_the_launch_before_writes_needs_a_wait_in_any_schedule(machine):
    """Without early launches too: a check of one kernel finds it."""
    name = add_kernel(machine, LOAD + WAIT_FOR_IT + ADD, params=2)
    given, out = machine.put(np.arange(64, dtype=u32), PRODUCED), machine.out(64, u32)
    machine.launch(name, words(given, out), block=(64, 1, 1))
    with pytest.raises(Trouble, match="before griddepcontrol.wait"):
        machine.launch(name, words(given, out), block=(64, 1, 1), programmatic=True)


def test_waits_are_not_transitive(machine):
    """The launch in the middle does not wait, so that the last one's wait says nothing of the first: it comes early."""
    machine.configure(early=1)
    given, middle, out = machine.put(np.arange(64, dtype=u32)), machine.out(64, u32), machine.out(64, u32)
    for trigger, expected in ((TRIGGER, np.zeros(64)), ("", np.arange(64) + 2)):
        middle[...] = out[...] = 2**32 - 1
        first = add_kernel(machine, trigger + LOAD + ADD, params=2)
        idle = add_kernel(machine, "")
        last = add_kernel(machine, WAIT_FOR_IT + LOAD + ADD, params=2)
        machine.launch(first, words(given, middle), block=(64, 1, 1))
        machine.launch(idle, words(), block=(64, 1, 1), programmatic=True)
        machine.launch(last, words(middle, out), block=(64, 1, 1), programmatic=True)
        machine.flush()
        np.testing.assert_array_equal(out, expected)


# ---------------------------------------------------------------------------------------------- what was executed


def test_report(machine, tmp_path):
    skipped = "add.u32 %r5, %r5, 1;" * 9
    name = add_kernel(machine, f"mov.u32 %r5, %tid.x; setp.lt.u32 %p1, %r5, 40; @%p1 bra END; {skipped} END:")
    for k in range(2):
        machine.launch(name, words())
        machine.coverage(tmp_path / f"{k}.tsv")
    rows = read([tmp_path / "0.tsv", tmp_path / "1.tsv"])[name]
    assert [one.hits for one in rows] == [3, 3, 3, *[0] * 9, 3]  # once, and twice in the second file
    mine = tmp_path / "mine.tsv"
    mine.write_text(
        "".join(f"{row}\n" for row in (tmp_path / "1.tsv").read_text().splitlines() if row.startswith(f"{name}\t"))
    )
    lines, totals = report([mine], show_missed=True)
    assert lines[0].split() == ["4", "of", "13", "30.8%", name]
    assert lines[1].strip().startswith("9 from line 5: add.u32 %r5,%r5,1;")
    assert totals == (4, 13, 1)


# ---------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize(
    ("body", "cycles", "sectors"),
    [
        ("st.shared.u32 [%r2], %r0;", (4, 1), (0, 0)),  # words 16 bytes apart
        ("st.shared.v4.u32 [%r2], {%r0, %r0, %r0, %r0};", (4, 4), (0, 0)),
        ("shl.b32 %r3, %r0, 7; add.s32 %r3, %r1, %r3; st.shared.u32 [%r3], %r0;", (32, 1), (0, 0)),
        ("ld.global.u32 %r4, [%d0];", (0, 0), (16, 4)),
        ("ld.u32 %r4, [%d0];", (0, 0), (16, 4)),
        ("cvt.u64.u32 %d3, %r2; cvta.shared.u64 %d3, %d3; st.u32 [%d3], %r0;", (4, 1), (0, 0)),
        ("ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d0];", (0, 0), (16, 16)),
        (ASYNC_COPY + WAIT, (4, 4), (16, 16)),
    ],
)
def test_traffic(machine, tmp_path, body, cycles, sectors):
    machine.traffic = 1
    try:
        run_in_shared(machine, body, threads=32, shared=4096)
    finally:
        machine.traffic = 0
    machine.coverage(tmp_path / "counts.tsv")
    mine = [row.split("\t") for row in (tmp_path / "counts.tsv").read_text().splitlines()]
    last = max(int(row[0].removeprefix("probe")) for row in mine)
    counts = np.sum([[int(v) for v in row[4:8]] for row in mine if row[0] == f"probe{last}"], 0)
    assert tuple(counts) == (*cycles, *sectors)
