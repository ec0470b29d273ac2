"""Every arithmetic opcode and type against an independent reference: exact rational arithmetic or numpy."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tools import ptxemu

from .launching import apply, launch

N = 256
BITS = {
    "u16": (16, 0),
    "s16": (16, 1),
    "b16": (16, 0),
    "u32": (32, 0),
    "s32": (32, 1),
    "b32": (32, 0),
    "u64": (64, 0),
    "s64": (64, 1),
    "b64": (64, 0),
}


def ints(rng, t, n=N):
    bits, signed = BITS[t]
    dt = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    info = np.iinfo(dt)
    edge = np.array([info.min, info.max, 0, 1, info.max - 1, 5, 31, 32, 33, 63, info.max // 2], dt)
    x = rng.integers(info.min, info.max, n, dtype=dt, endpoint=True)
    small = rng.integers(0, 100, n).astype(dt)
    x = np.where(rng.random(n) < 0.3, small, x)
    where = rng.random(n) < 0.3
    x[where] = rng.choice(edge, where.sum())
    return x


def wrap(v, t):
    bits, signed = BITS[t]
    v &= (1 << bits) - 1
    return v - (1 << bits) if signed and v >> (bits - 1) else v


def check_int(instruction, t, f, *ins, out=None):
    out = out or t
    dt = np.dtype(f"{'i' if BITS[out][1] else 'u'}{BITS[out][0] // 8}")
    got = apply(instruction, dt, *ins)
    want = np.array([wrap(f(*(int(x[i]) for x in ins)), out) for i in range(len(ins[0]))], dtype=object)
    bad = [i for i in range(len(got)) if int(got[i]) != want[i]]
    assert not bad, (instruction, [int(x[bad[0]]) for x in ins], int(got[bad[0]]), want[bad[0]])


def tdiv(a, b):
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


ARITH = ["u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("t", ARITH)
def test_integer_arithmetic(rng, t):
    a, b, c = ints(rng, t), ints(rng, t), ints(rng, t)
    bits, signed = BITS[t]
    check_int(f"add.{t} {{d}}, {{a}}, {{b}};", t, lambda x, y: x + y, a, b)
    check_int(f"sub.{t} {{d}}, {{a}}, {{b}};", t, lambda x, y: x - y, a, b)
    check_int(f"mul.lo.{t} {{d}}, {{a}}, {{b}};", t, lambda x, y: x * y, a, b)
    check_int(f"mul.hi.{t} {{d}}, {{a}}, {{b}};", t, lambda x, y: (x * y) >> bits, a, b)
    check_int(f"mad.lo.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, lambda x, y, z: x * y + z, a, b, c)
    check_int(f"mad.hi.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, lambda x, y, z: ((x * y) >> bits) + z, a, b, c)
    check_int(f"min.{t} {{d}}, {{a}}, {{b}};", t, min, a, b)
    check_int(f"max.{t} {{d}}, {{a}}, {{b}};", t, max, a, b)
    check_int(f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, lambda x, y, z: z + abs(x - y), a, b, c)
    nz = np.where(b == 0, 1, b).astype(b.dtype)
    check_int(f"div.{t} {{d}}, {{a}}, {{b}};", t, tdiv, a, nz)
    check_int(f"rem.{t} {{d}}, {{a}}, {{b}};", t, lambda x, y: x - y * tdiv(x, y), a, nz)
    if signed:
        check_int(f"neg.{t} {{d}}, {{a}};", t, lambda x: -x, a)
        check_int(f"abs.{t} {{d}}, {{a}};", t, abs, a)
    if bits < 64:
        w = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[t]
        z = ints(rng, w)
        check_int(f"mul.wide.{t} {{d}}, {{a}}, {{b}};", t, lambda x, y: x * y, a, b, out=w)
        check_int(f"mad.wide.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, lambda x, y, v: x * y + v, a, b, z, out=w)
    for cmp, f in {
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
    }.items():
        got = apply(f"setp.{cmp}.{t} {{d}}, {{a}}, {{b}};", bool, a, b)
        assert (got == np.array([f(int(x), int(y)) for x, y in zip(a, b)])).all(), (cmp, t)
    if not signed and bits > 16:
        for cmp, f in {
            "lo": lambda x, y: x < y,
            "ls": lambda x, y: x <= y,
            "hi": lambda x, y: x > y,
            "hs": lambda x, y: x >= y,
        }.items():
            got = apply(f"setp.{cmp}.{t} {{d}}, {{a}}, {{b}};", bool, a, b)
            assert (got == np.array([f(int(x), int(y)) for x, y in zip(a, b)])).all(), (cmp, t)


@pytest.mark.parametrize("t", ["b16", "b32", "b64"])
def test_logic_and_shifts(rng, t):
    a, b = ints(rng, t), ints(rng, t)
    bits = BITS[t][0]
    for op, f in {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}.items():
        check_int(f"{op}.{t} {{d}}, {{a}}, {{b}};", t, f, a, b)
    check_int(f"not.{t} {{d}}, {{a}};", t, lambda x: ~x, a)
    check_int(f"cnot.{t} {{d}}, {{a}};", t, lambda x: int(x == 0), a)
    s = rng.choice(np.array([0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 200], np.uint32), N)
    check_int(f"shl.{t} {{d}}, {{a}}, {{b}};", t, lambda x, y: x << y if y < bits else 0, a, s)
    for u in (t.replace("b", "u"), t.replace("b", "s")):
        v = ints(rng, u)
        check_int(f"shr.{u} {{d}}, {{a}}, {{b}};", u, lambda x, y: x >> min(y, 64), v, s)
    if bits > 16:
        check_int(f"popc.{t} {{d}}, {{a}};", t, lambda x: bin(x).count("1"), a, out="u32")
        check_int(f"clz.{t} {{d}}, {{a}};", t, lambda x: bits - x.bit_length(), a, out="u32")
        check_int(f"brev.{t} {{d}}, {{a}};", t, lambda x: int(format(x, f"0{bits}b")[::-1], 2), a)
    p = ints(rng, "u32") & 1
    check_int(
        f"setp.ne.u32 %p2, {{c}}, 0; selp.{t} {{d}}, {{a}}, {{b}}, %p2;",
        t,
        lambda x, y, q: x if q else y,
        a,
        b,
        p.astype(np.uint32),
    )
    c = ints(rng, "s32")
    check_int(f"slct.{t}.s32 {{d}}, {{a}}, {{b}}, {{c}};", t, lambda x, y, q: x if q >= 0 else y, a, b, c)
    check_int(f"mov.{t} {{d}}, {{a}};", t, lambda x: x, a)


def test_bit_fields(rng):
    for t in ("u32", "s32", "u64", "s64"):
        bits, signed = BITS[t]
        a = ints(rng, t)
        pos, ln = rng.integers(0, 80, N).astype(np.uint32), rng.integers(0, 80, N).astype(np.uint32)

        def bfe(x, p, n):
            x &= (1 << bits) - 1
            if n == 0:
                return 0
            sign = (x >> min(p + n - 1, bits - 1)) & 1 if signed else 0
            return sum((((x >> (p + k)) & 1) if k < n and p + k < bits else sign) << k for k in range(bits))

        check_int(f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, bfe, a, pos, ln)
        check_int(
            f"bfind.{t} {{d}}, {{a}};",
            t,
            lambda x: ((~x if x < 0 else x).bit_length() - 1) % (1 << 32),
            a,
            out="u32",
        )
        check_int(
            f"bfind.shiftamt.{t} {{d}}, {{a}};",
            t,
            lambda x: (bits - (~x if x < 0 else x).bit_length()) if (~x if x < 0 else x) else 0xFFFFFFFF,
            a,
            out="u32",
        )
    for t in ("b32", "b64"):
        bits = BITS[t][0]
        a, b = ints(rng, t), ints(rng, t)
        pos, ln = rng.integers(0, 80, N).astype(np.uint32), rng.integers(0, 80, N).astype(np.uint32)

        def bfi(x, y, p, n):
            for k in range(n):
                if p + k < bits:
                    y = y & ~(1 << (p + k)) | ((x >> k) & 1) << (p + k)
            return y

        check_int(f"bfi.{t} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", t, bfi, a, b, pos, ln)


def test_prmt_lop3_shf_dp4a(rng):
    a, b, c = (ints(rng, "u32") for _ in range(3))

    def prmt(x, y, s, mode):
        v = [(x | y << 32) >> 8 * k & 255 for k in range(8)]
        if mode == "":
            sel = [s >> 4 * k & 15 for k in range(4)]
            return sum((v[q & 7] if not q & 8 else (255 if v[q & 7] & 128 else 0)) << 8 * k for k, q in enumerate(sel))
        s &= 3
        table = {
            ".f4e": [s, s + 1, s + 2, s + 3],
            ".b4e": [s, s - 1, s - 2, s - 3],
            ".rc8": [s] * 4,
            ".ecl": [max(k, s) for k in range(4)],
            ".ecr": [min(k, s) for k in range(4)],
            ".rc16": [2 * (s & 1) + (k & 1) for k in range(4)],
        }[mode]
        return sum(v[q & 7] << 8 * k for k, q in enumerate(table))

    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        check_int(f"prmt.b32{mode} {{d}}, {{a}}, {{b}}, {{c}};", "u32", lambda x, y, s: prmt(x, y, s, mode), a, b, c)
    for lut in (0x96, 0xE8, 0x40, 0xFE, 0x1D):
        check_int(
            f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {lut};",
            "u32",
            lambda x, y, z: sum(
                (lut >> ((x >> k & 1) * 4 + (y >> k & 1) * 2 + (z >> k & 1)) & 1) << k for k in range(32)
            ),
            a,
            b,
            c,
        )
    sh = rng.integers(0, 70, N).astype(np.uint32)
    for d in "lr":
        for m in ("wrap", "clamp"):
            n = (lambda k: k & 31) if m == "wrap" else (lambda k: min(k, 32))
            check_int(
                f"shf.{d}.{m}.b32 {{d}}, {{a}}, {{b}}, {{c}};",
                "u32",
                lambda x, y, k: ((y << 32 | x) << n(k)) >> 32 if d == "l" else (y << 32 | x) >> n(k),
                a,
                b,
                sh,
            )
    byte = lambda v, s: [((v >> 8 * k & 255) ^ 128) - 128 if s else v >> 8 * k & 255 for k in range(4)]
    for ta in "us":
        for tb in "us":
            check_int(
                f"dp4a.{ta}32.{tb}32 {{d}}, {{a}}, {{b}}, {{c}};",
                "u32",
                lambda x, y, z: z + sum(p * q for p, q in zip(byte(x, ta == "s"), byte(y, tb == "s"))),
                a,
                b,
                c,
            )


def test_carry_and_saturation(rng):
    for bits in (32, 64):
        t = f"u{bits}"
        a, b = ints(rng, t), ints(rng, t)
        check_int(f"add.cc.{t} {{d}}, {{a}}, {{b}}; addc.{t} {{d}}, 0, 0;", t, lambda x, y: (x + y) >> bits, a, b)
        check_int(f"sub.cc.{t} {{d}}, {{a}}, {{b}}; subc.{t} {{d}}, 0, 0;", t, lambda x, y: -int(x < y), a, b)
    a, b = ints(rng, "s32"), ints(rng, "s32")
    clamp = lambda v: max(-(2**31), min(2**31 - 1, v))
    check_int("add.sat.s32 {d}, {a}, {b};", "s32", lambda x, y: clamp(x + y), a, b)
    check_int("sub.sat.s32 {d}, {a}, {b};", "s32", lambda x, y: clamp(x - y), a, b)


# --- floating point: exact rational reference ---------------------------------------------------------------------------
FORMATS = {"f32": (23, -126, 127), "f64": (52, -1022, 1023), "f16": (10, -14, 15), "bf16": (7, -126, 127)}


def quantise(x, fmt, mode="rn"):
    """Round a Fraction (or float special) to a binary format; returns a float."""
    if isinstance(x, float):
        return x
    mant, emin, emax = FORMATS[fmt]
    if x == 0:
        return 0.0
    sign, a = (-1 if x < 0 else 1), abs(x)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    if Fraction(2) ** e > a:
        e -= 1
    e = max(e, emin)
    q = a / Fraction(2) ** (e - mant)
    lo, rest = q.numerator // q.denominator, q - q.numerator // q.denominator
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and lo & 1),
        "rz": False,
        "rm": sign < 0 and rest > 0,
        "rp": sign > 0 and rest > 0,
        "rna": rest >= Fraction(1, 2),
    }[mode]
    v = (lo + up) * Fraction(2) ** (e - mant)
    if v >= Fraction(2) ** (emax + 1):
        toward = mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return sign * (float((2 - Fraction(1, 2**mant)) * Fraction(2) ** emax) if toward else math.inf)
    return sign * float(v)


def floats(rng, fmt, n=N):
    """Values of the format as floats: ordinary, tiny, huge, and a few special ones."""
    x = rng.standard_normal(n) * 2.0 ** rng.integers(-6, 6, n)
    mant, emin, emax = FORMATS[fmt]
    where = rng.random(n) < 0.2
    x[where] *= 2.0 ** rng.integers(max(emin, -300) // 2, min(emax, 300) // 2, where.sum())
    return np.array([quantise(Fraction(float(v)), fmt) for v in x])


def encode(x, fmt):
    if fmt == "f32":
        return x.astype(np.float32).view(np.uint32)
    if fmt == "f64":
        return x.view(np.uint64)
    if fmt == "f16":
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def decode(u, fmt):
    if fmt == "f32":
        return u.view(np.float32).astype(np.float64)
    if fmt == "f64":
        return u.view(np.float64)
    if fmt == "f16":
        return u.view(np.float16).astype(np.float64)
    return (u.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


DT = {"f32": np.uint32, "f64": np.uint64, "f16": np.uint16, "bf16": np.uint16}


def check_float(instruction, fmt, f, *ins, out=None, tol=None):
    out = out or fmt
    got = decode(apply(instruction, DT[out], *(encode(x, fmt) for x in ins)), out)
    want = np.array([f(*(Fraction(float(x[i])) for x in ins)) for i in range(len(ins[0]))], dtype=np.float64)
    ok = (
        (got == want) | (np.isnan(got) & np.isnan(want))
        if tol is None
        else np.abs(got - want) <= tol * np.abs(want) + 1e-300
    )
    bad = np.flatnonzero(~ok)
    assert not bad.size, (instruction, [x[bad[0]] for x in ins], got[bad[0]], want[bad[0]])


@pytest.mark.parametrize("fmt", ["f32", "f64", "f16", "bf16"])
def test_float_arithmetic(rng, fmt):
    a, b, c = floats(rng, fmt), floats(rng, fmt), floats(rng, fmt)
    q = lambda v, mode="rn": quantise(v, fmt, mode)
    modes = ["rn", "rz", "rm", "rp"] if fmt == "f32" else ["rn"]
    for m in modes:
        r = f".{m}" if fmt in ("f32", "f64") or m == "rn" else ""
        check_float(f"add{r}.{fmt} {{d}}, {{a}}, {{b}};", fmt, lambda x, y: q(x + y, m), a, b)
        check_float(f"sub{r}.{fmt} {{d}}, {{a}}, {{b}};", fmt, lambda x, y: q(x - y, m), a, b)
        check_float(f"mul{r}.{fmt} {{d}}, {{a}}, {{b}};", fmt, lambda x, y: q(x * y, m), a, b)
        check_float(f"fma{r}.{fmt} {{d}}, {{a}}, {{b}}, {{c}};", fmt, lambda x, y, z: q(x * y + z, m), a, b, c)
        if fmt == "f32":
            check_float(f"div{r}.{fmt} {{d}}, {{a}}, {{b}};", fmt, lambda x, y: q(x / y, m), a, b)
    if fmt == "f64":
        check_float("div.rn.f64 {d}, {a}, {b};", fmt, lambda x, y: q(x / y), a, b)
        check_float("rcp.rn.f64 {d}, {a};", fmt, lambda x: q(1 / x), a)
    if fmt == "f32":
        check_float("rcp.rn.f32 {d}, {a};", fmt, lambda x: q(1 / x), a)
        check_float("fma.rn.sat.f32 {d}, {a}, {b}, {c};", fmt, lambda x, y, z: min(max(q(x * y + z), 0), 1), a, b, c)
    if fmt in ("f16", "bf16"):
        check_float(
            f"fma.rn.relu.{fmt} {{d}}, {{a}}, {{b}}, {{c}};",
            fmt,
            lambda x, y, z: max(q(x * y + z), 0),
            a,
            b,
            c,
        )
    check_float(f"min.{fmt} {{d}}, {{a}}, {{b}};", fmt, lambda x, y: float(min(x, y)), a, b)
    check_float(f"max.{fmt} {{d}}, {{a}}, {{b}};", fmt, lambda x, y: float(max(x, y)), a, b)
    check_float(f"neg.{fmt} {{d}}, {{a}};", fmt, lambda x: float(-x), a)
    check_float(f"abs.{fmt} {{d}}, {{a}};", fmt, lambda x: float(abs(x)), a)
    if fmt in ("f32", "f64"):
        check_float(f"copysign.{fmt} {{d}}, {{a}}, {{b}};", fmt, lambda x, y: math.copysign(float(y), float(x)), a, b)
        check_float(
            f"sqrt.rn.{fmt} {{d}}, {{a}};",
            fmt,
            lambda x: float((np.float32 if fmt == "f32" else np.float64)(math.sqrt(float(x)))),
            np.abs(a),
        )


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_packed_halves(rng, fmt):
    def pack(x, y):
        return encode(x, fmt).astype(np.uint32) | encode(y, fmt).astype(np.uint32) << 16

    xs = [(floats(rng, fmt), floats(rng, fmt)) for _ in range(3)]
    ins = [pack(*x) for x in xs]
    q = lambda v: quantise(v, fmt)
    for op, n, f in (
        ("add", 2, lambda x, y: q(x + y)),
        ("sub", 2, lambda x, y: q(x - y)),
        ("mul", 2, lambda x, y: q(x * y)),
        ("fma.rn", 3, lambda x, y, z: q(x * y + z)),
        ("min", 2, lambda x, y: float(min(x, y))),
        ("max", 2, lambda x, y: float(max(x, y))),
        ("neg", 1, lambda x: float(-x)),
        ("abs", 1, lambda x: float(abs(x))),
    ):
        got = apply(f"{op}.{fmt}x2 {{d}}, " + ", ".join("{%s}" % c for c in "abc"[:n]) + ";", np.uint32, *ins[:n])
        for half in (0, 1):
            g = decode(((got >> 16 * half) & 0xFFFF).astype(np.uint16), fmt)
            w = [f(*(Fraction(float(x[half][i])) for x in xs[:n])) for i in range(N)]
            assert (g == np.array(w)).all(), (op, fmt, half)
    lo, hi = (
        apply(f"setp.lt.{fmt}x2 {{d}}|%p3, {{a}}, {{b}};", bool, *ins[:2]),
        apply(f"setp.lt.{fmt}x2 %p3|{{d}}, {{a}}, {{b}};", bool, *ins[:2]),
    )
    assert (lo == (xs[0][0] < xs[1][0])).all() and (hi == (xs[0][1] < xs[1][1])).all()
    got = apply(f"set.ge.{fmt}x2.{fmt}x2 {{d}}, {{a}}, {{b}};", np.uint32, *ins[:2])
    one = int(encode(np.array([1.0]), fmt)[0])
    assert (got == np.where(xs[0][0] >= xs[1][0], one, 0) + (np.where(xs[0][1] >= xs[1][1], one, 0) << 16)).all()


def special32():
    s = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1e-45, 3.4e38, 1.17549435e-38]
    a, b = np.meshgrid(np.array(s, np.float32), np.array(s, np.float32))
    n = -(-a.size // 128) * 128
    return np.resize(a.ravel(), n), np.resize(b.ravel(), n)


def test_float_comparisons_with_nan_and_ftz():
    a, b = special32()
    fl = lambda v, ftz: np.where(np.abs(v) < 1.17549435e-38, np.copysign(np.float32(0), v), v) if ftz else v
    for ftz in ("", ".ftz"):
        x, y = fl(a, ftz), fl(b, ftz)
        un = np.isnan(x) | np.isnan(y)
        ref = {
            "eq": x == y,
            "ne": ~un & (x != y),
            "lt": x < y,
            "le": x <= y,
            "gt": x > y,
            "ge": x >= y,
            "equ": un | (x == y),
            "neu": un | (x != y),
            "ltu": un | (x < y),
            "leu": un | (x <= y),
            "gtu": un | (x > y),
            "geu": un | (x >= y),
            "num": ~un,
            "nan": un,
        }
        for cmp, want in ref.items():
            assert (apply(f"setp.{cmp}{ftz}.f32 {{d}}, {{a}}, {{b}};", bool, a, b) == want).all(), cmp
            assert (
                apply(f"set.{cmp}{ftz}.u32.f32 {{d}}, {{a}}, {{b}};", np.uint32, a, b) == np.where(want, 0xFFFFFFFF, 0)
            ).all(), cmp
        for op, f in (("add", np.add), ("mul", np.multiply), ("sub", np.subtract)):
            with np.errstate(all="ignore"):
                want = fl(f(x, y), ftz)
            got = apply(f"{op}{ftz}.f32 {{d}}, {{a}}, {{b}};", np.float32, a, b)
            assert (
                np.array_equal(got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
                and (np.isnan(got) == np.isnan(want)).all()
            )
    got = apply("min.f32 {d}, {a}, {b};", np.float32, a, b)
    assert np.array_equal(got, np.fmin(a, b), equal_nan=True)
    got = apply("max.NaN.f32 {d}, {a}, {b};", np.float32, a, b)
    assert np.array_equal(got, np.maximum(a, b), equal_nan=True)
    z = apply("max.f32 {d}, {a}, {b};", np.float32, np.full(128, -0.0, np.float32), np.zeros(128, np.float32))
    assert (z.view(np.uint32) == 0).all()
    for kind, f in (
        ("finite", np.isfinite(a)),
        ("infinite", np.isinf(a)),
        ("number", ~np.isnan(a)),
        ("notanumber", np.isnan(a)),
        ("normal", np.isfinite(a) & (np.abs(a) >= 1.17549435e-38)),
        ("subnormal", (np.abs(a) > 0) & (np.abs(a) < 1.17549435e-38)),
    ):
        assert (apply(f"testp.{kind}.f32 {{d}}, {{a}};", bool, a) == f).all(), kind


def test_setp_combines_and_complements(rng):
    a, b, c = (rng.integers(0, 4, N).astype(np.int32) for _ in range(3))
    for op, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for neg in ("", "!"):
            p = (c != 0) ^ bool(neg)
            assert (
                apply(
                    f"setp.ne.s32 %p2, {{c}}, 0; setp.lt.{op}.s32 {{d}}, {{a}}, {{b}}, {neg}%p2;",
                    bool,
                    a,
                    b,
                    c,
                )
                == f(a < b, p)
            ).all()
            assert (
                apply(
                    f"setp.ne.s32 %p2, {{c}}, 0; setp.lt.{op}.s32 %p3|{{d}}, {{a}}, {{b}}, {neg}%p2;",
                    bool,
                    a,
                    b,
                    c,
                )
                == f(~(a < b), p)
            ).all()
    for op, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        assert (
            apply(
                f"setp.lt.s32 %p2, {{a}}, {{b}}; setp.lt.s32 %p3, {{b}}, {{c}}; {op}.pred {{d}}, %p2, %p3;",
                bool,
                a,
                b,
                c,
            )
            == f(a < b, b < c)
        ).all()
    assert (apply("setp.lt.s32 %p2, {a}, {b}; not.pred %p3, %p2; mov.pred {d}, %p3;", bool, a, b) == ~(a < b)).all()


def ulp_error(got, want):
    with np.errstate(all="ignore"):
        spacing = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
        return np.nanmax(np.where(np.isfinite(want), np.abs(got.astype(np.float64) - want) / spacing, 0))


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_special_functions(rng, ftz):
    pos = np.exp(rng.uniform(-60, 60, 512)).astype(np.float32)
    with np.errstate(all="ignore"):
        for op, x, f, bound in (
            ("ex2", rng.uniform(-125, 127, 512), np.exp2, 2),
            ("lg2", pos, np.log2, 4),
            ("rcp", pos, lambda v: 1 / v, 1),
            ("rsqrt", pos, lambda v: 1 / np.sqrt(v), 2),
            ("sqrt", pos, np.sqrt, 2),
        ):
            x = x.astype(np.float32)
            got = apply(f"{op}.approx{ftz}.f32 {{d}}, {{a}};", np.float32, x)
            assert ulp_error(got, f(x.astype(np.float64))) <= bound, op
        for op, f in (("sin", np.sin), ("cos", np.cos)):
            x = rng.uniform(-3, 3, 256).astype(np.float32)
            assert (
                np.abs(apply(f"{op}.approx{ftz}.f32 {{d}}, {{a}};", np.float32, x) - f(x.astype(np.float64))).max()
                < 2**-20
            )
        x, y = rng.uniform(-100, 100, 256).astype(np.float32), rng.uniform(1, 100, 256).astype(np.float32)
        for form in ("approx", "full"):
            assert (
                ulp_error(
                    apply(f"div.{form}{ftz}.f32 {{d}}, {{a}}, {{b}};", np.float32, x, y),
                    x.astype(np.float64) / y,
                )
                <= 2
            )
    edge = np.resize(np.array([np.inf, -np.inf, np.nan, 0, -0.0, 129, -151, -126.5, -140], np.float32), 128)
    got = apply(f"ex2.approx{ftz}.f32 {{d}}, {{a}};", np.float32, edge)
    with np.errstate(all="ignore"):
        want = np.exp2(edge.astype(np.float64)).astype(np.float32)
    want = np.where(np.abs(want) < 1.17549435e-38, np.float32(0), want) if ftz else want
    assert np.array_equal(got, want, equal_nan=True)


def test_special_functions_of_halves_and_doubles(rng):
    x = rng.uniform(-4, 4, 128)
    for fmt, ftz in (("f16", ""), ("bf16", ".ftz")):
        v = np.array([quantise(Fraction(float(t)), fmt) for t in x])
        for op, f in (("ex2", math.exp2 if hasattr(math, "exp2") else lambda t: 2.0**t), ("tanh", math.tanh)):
            z = "" if op == "tanh" else ftz
            check_float(f"{op}.approx{z}.{fmt} {{d}}, {{a}};", fmt, lambda t: quantise(Fraction(f(float(t))), fmt), v)
    t = rng.uniform(-4, 4, 128).astype(np.float32)
    assert np.abs(apply("tanh.approx.f32 {d}, {a};", np.float32, t) / np.tanh(t.astype(np.float64)) - 1).max() < 2**-11
    d = np.exp(rng.uniform(-20, 20, 128))
    assert np.abs(apply("rcp.approx.ftz.f64 {d}, {a};", np.float64, d) * d - 1).max() < 2**-20
    assert np.abs(apply("rsqrt.approx.f64 {d}, {a};", np.float64, d) * np.sqrt(d) - 1).max() < 2**-20


# --- conversions --------------------------------------------------------------------------------------------------------
NP = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
}


def test_integer_conversions(rng):
    for src in ("u16", "s16", "u32", "s32", "u64", "s64"):
        a = ints(rng, src)
        for dst in ("u16", "s16", "u32", "s32", "u64", "s64"):
            check_int(f"cvt.{dst}.{src} {{d}}, {{a}};", src, lambda x: x, a, out=dst)
            bits, signed = BITS[dst]
            lo, hi = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
            check_int(f"cvt.sat.{dst}.{src} {{d}}, {{a}};", src, lambda x: max(lo, min(hi, x)), a, out=dst)
    a = ints(rng, "u32")
    check_int("cvt.u32.u8 {d}, {a};", "u32", lambda x: x & 255, a)
    check_int("cvt.s32.s8 {d}, {a};", "s32", lambda x: ((x & 255) ^ 128) - 128, a.view(np.int32))


def test_float_to_integer(rng):
    x = np.concatenate(
        [
            rng.uniform(-300, 300, 128),
            rng.uniform(-1e10, 1e10, 64),
            np.resize([0.5, 1.5, -0.5, -2.5, np.nan, np.inf, -np.inf, 1e30], 64),
        ]
    )
    rnd = {
        "rni": lambda f: round(f),
        "rzi": lambda f: int(f),
        "rmi": lambda f: math.floor(f),
        "rpi": lambda f: math.ceil(f),
    }
    for st, ft in (("f32", np.float32), ("f64", np.float64)):
        for dst in ("s16", "u16", "s32", "u32", "s64", "u64"):
            bits, signed = BITS[dst]
            lo, hi = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
            for m, f in rnd.items():
                got = apply(f"cvt.{m}.{dst}.{st} {{d}}, {{a}};", NP[dst], x.astype(ft))
                want = [
                    0 if math.isnan(v) else hi if v == math.inf else lo if v == -math.inf else max(lo, min(hi, f(v)))
                    for v in map(float, x.astype(ft))
                ]
                assert [int(g) for g in got] == want, (m, dst, st)
    v = rng.uniform(-50, 50, 128).astype(np.float32)
    for m, f in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        assert (apply(f"cvt.{m}.f32.f32 {{d}}, {{a}};", np.float32, v) == f(v)).all()
    assert (apply("cvt.sat.f32.f32 {d}, {a};", np.float32, v / 25) == np.clip(v / 25, 0, 1)).all()


def test_integer_to_float(rng):
    for src in ("u16", "s16", "u32", "s32", "u64", "s64"):
        a = ints(rng, src)
        for m in ("rn", "rz", "rm", "rp"):
            got = apply(f"cvt.{m}.f32.{src} {{d}}, {{a}};", np.float32, a)
            assert [float(g) for g in got] == [quantise(Fraction(int(v)), "f32", m) for v in a], (m, src)
        got = apply(f"cvt.rn.f64.{src} {{d}}, {{a}};", np.float64, a)
        assert [float(g) for g in got] == [float(int(v)) for v in a]
        got = decode(apply(f"cvt.rn.f16.{src} {{d}}, {{a}};", np.uint16, a), "f16")
        assert [float(g) for g in got] == [quantise(Fraction(int(v)), "f16") for v in a]


def test_float_to_float(rng):
    fmts = ["f64", "f32", "f16", "bf16"]
    for s in fmts:
        x = floats(rng, s)
        for d in fmts:
            if s == d or {s, d} == {"f16", "bf16"}:
                continue
            narrow = fmts.index(d) > fmts.index(s)
            if "bf16" in (s, d) and not ({s, d} <= {"f32", "bf16"}):
                continue
            for m in ["rn", "rz"] + (["rm", "rp"] if d in ("f32", "f16") else []) if narrow else [None]:
                r = f".{m}" if m else ""
                check_float(f"cvt{r}.{d}.{s} {{d}}, {{a}};", s, lambda v: quantise(v, d, m or "rn"), x, out=d)
    a, b = floats(rng, "f32"), floats(rng, "f32")
    for d in ("f16", "bf16"):
        for m in ("rn", "rz"):
            got = apply(f"cvt.{m}.{d}x2.f32 {{d}}, {{a}}, {{b}};", np.uint32, encode(a, "f32"), encode(b, "f32"))
            want = [[quantise(Fraction(float(v)), d, m) for v in x] for x in (b, a)]
            assert (decode((got & 0xFFFF).astype(np.uint16), d) == want[0]).all() and (
                decode((got >> 16).astype(np.uint16), d) == want[1]
            ).all(), (d, m)
    a[::2] = (a[::2].astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000) | np.uint32(0x1000)).view(
        np.float32
    )  # ties
    for m in ("rna", "rn", "rz"):
        got = apply(f"cvt.{m}.tf32.f32 {{d}}, {{a}};", np.uint32, encode(a, "f32")).view(np.float32)
        FORMATS["tf32"] = (10, -126, 127)
        assert (got == np.array([quantise(Fraction(float(v)), "tf32", m) for v in a])).all(), m


def test_fp8(rng):
    """All 256 codes, both formats, there and back."""
    for fmt, (eb, mb, bias) in {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}.items():
        codes = np.arange(256)
        e, m, s = codes >> mb & (1 << eb) - 1, codes & (1 << mb) - 1, np.where(codes & 128, -1.0, 1.0)
        val = s * np.where(e == 0, m * 2.0 ** (1 - bias - mb), (1 + m / 2**mb) * 2.0 ** (e - bias))
        bad = (codes & 0x7F) == 0x7F if fmt == "e4m3" else e == 31
        pair = (codes | codes << 8).astype(np.uint16)
        got = apply(f"cvt.rn.f16x2.{fmt}x2 {{d}}, {{a}};", np.uint32, pair, arch="sm_89")
        assert (decode((got & 0xFFFF).astype(np.uint16), "f16")[~bad] == val[~bad]).all()
        back = apply(
            f"cvt.rn.satfinite.{fmt}x2.f32 {{d}}, {{a}}, {{b}};",
            np.uint16,
            val.astype(np.float32),
            val.astype(np.float32),
            arch="sm_89",
        )
        assert (back[~bad] == pair[~bad]).all()


# --- data movement ------------------------------------------------------------------------------------------------------
def test_pack_unpack_and_carry_free_moves(rng):
    a, b = ints(rng, "u32"), ints(rng, "u32")
    assert (
        apply("mov.b64 {d}, {{{a}, {b}}};", np.uint64, a, b) == (a.astype(np.uint64) | b.astype(np.uint64) << 32)
    ).all()
    assert (apply("mov.b64 %rd40, {{{a}, {b}}}; mov.b64 {{_, {d}}}, %rd40;", np.uint32, a, b) == b).all()
    assert (apply("mov.b32 {{%h1, %h2}}, {a}; mov.b32 {d}, {{%h2, %h1}};", np.uint32, a) == (a >> 16 | a << 16)).all()


def test_vectors_params_and_special_registers():
    x, out = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    launch(
        "mul.wide.s32 %rd10, %r1, 16; add.s64 %rd11, %rd10, %rd1; add.s64 %rd12, %rd10, %rd2; ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd11]; st.global.v2.f32 [%rd12], {%f4, %f3}; st.global.v2.f32 [%rd12+8], {%f2, %f1};",
        [x, out],
        grid=2,
    )
    assert (out.reshape(-1, 4) == x.reshape(-1, 4)[:, ::-1]).all()
    regs = [
        "%tid.x",
        "%tid.y",
        "%tid.z",
        "%ntid.x",
        "%ntid.y",
        "%ntid.z",
        "%ctaid.x",
        "%ctaid.y",
        "%ctaid.z",
        "%nctaid.x",
        "%nctaid.y",
        "%nctaid.z",
        "%laneid",
        "%warpid",
        "%lanemask_lt",
        "%lanemask_ge",
        "%nwarpid",
    ]
    out = np.zeros((2 * 3 * 2, 4 * 5 * 2, len(regs)), np.uint32)
    body = (
        """mov.u32 %r4, %tid.y; mov.u32 %r5, %tid.z; mov.u32 %r6, %tid.x; mad.lo.s32 %r4, %r5, 5, %r4; mad.lo.s32 %r6, %r4, 4, %r6;
    mov.u32 %r7, %ctaid.z; mov.u32 %r8, %ctaid.y; mad.lo.s32 %r8, %r7, 3, %r8; mad.lo.s32 %r8, %r8, 2, %r2; mad.lo.s32 %r6, %r8, 40, %r6;"""
        + f"mul.wide.s32 %rd10, %r6, {4 * len(regs)}; add.s64 %rd10, %rd10, %rd1;"
    )
    body += "".join(f"mov.u32 %r20, {r}; st.global.u32 [%rd10+{4 * i}], %r20;" for i, r in enumerate(regs))
    launch(body, [out], grid=(2, 3, 2), block=(4, 5, 2))
    for c in range(12):
        for t in range(40):
            lane = t % 32
            want = [
                t % 4,
                t // 4 % 5,
                t // 20,
                4,
                5,
                2,
                c % 2,
                c // 2 % 3,
                c // 6,
                2,
                3,
                2,
                lane,
                t // 32,
                (1 << lane) - 1,
                0xFFFFFFFF ^ ((1 << lane) - 1),
                2,
            ]
            assert out[c, t].tolist() == want


def test_generic_addresses_local_and_const():
    out = np.zeros(64, np.uint32)
    launch(
        """ mov.u32 %r10, buf; cvt.u64.u32 %rd10, %r10; cvta.shared.u64 %rd11, %rd10; mul.wide.u32 %rd12, %r1, 4; add.s64 %rd13, %rd11, %rd12; st.u32 [%rd13], %r1; bar.sync 0;
    xor.b32 %r11, %r1, 63; mul.wide.u32 %rd14, %r11, 4; add.s64 %rd15, %rd11, %rd14; ld.u32 %r12, [%rd15]; isspacep.shared %p1, %rd15; isspacep.global %p2, %rd1; selp.b32 %r13, 1000, 0, %p1; selp.b32 %r14, 10000, 0, %p2;
    add.s32 %r12, %r12, %r13; add.s32 %r12, %r12, %r14;
    mov.u64 %rd20, loc; cvta.local.u64 %rd20, %rd20; st.u32 [%rd20+4], %r12; ld.local.u32 %r15, [loc+4]; add.s64 %rd16, %rd1, %rd12; st.global.u32 [%rd16], %r15;""",
        [out],
        block=64,
        shared=".shared .align 4 .b8 buf[256]; .local .align 4 .b8 loc[16];",
    )
    assert (out == np.arange(64)[::-1] + 11000).all()
    text = """.version 8.7
.target sm_80
.address_size 64
.const .align 4 .u32 table[4] = {10, 20, 30, 40};
.global .align 4 .f32 g = 0f40490FDB;
.visible .entry k(.param .u64 p) { .reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .f32 %f<3>;
 ld.param.u64 %rd1, [p]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; mov.u64 %rd3, table; add.s64 %rd4, %rd3, %rd2; ld.const.u32 %r2, [%rd4]; add.s64 %rd5, %rd1, %rd2; st.global.u32 [%rd5], %r2;
 ld.global.f32 %f1, [g]; st.global.f32 [%rd1+16], %f1; ret; }"""
    o = np.zeros(5, np.uint32)
    ptxemu.Module(text).launch("k", 1, 4, 0, [o])
    assert o[:4].tolist() == [10, 20, 30, 40] and o[4:].view(np.float32)[0] == np.float32(np.pi)


def test_branches_loops_and_tables(rng):
    a = rng.integers(1, 200, 128).astype(np.uint32)
    out = apply(
        """mov.u32 %r30, 0; mov.u32 %r31, {a};
L: setp.le.u32 %p1, %r31, 1; @%p1 bra DONE; and.b32 %r32, %r31, 1; setp.eq.u32 %p2, %r32, 0; @%p2 bra EVEN; mad.lo.u32 %r31, %r31, 3, 1; bra NEXT;
EVEN: shr.u32 %r31, %r31, 1;
NEXT: add.u32 %r30, %r30, 1; bra.uni L;
DONE: mov.u32 {d}, %r30;""",
        np.uint32,
        a,
    )

    def collatz(n):
        c = 0
        while n > 1:
            n, c = (3 * n + 1 if n & 1 else n >> 1), c + 1
        return c

    assert out.tolist() == [collatz(int(v)) for v in a]
    b = rng.integers(0, 3, 128).astype(np.uint32)
    out = apply(
        """T: .branchtargets A, B, C; brx.idx {a}, T;
A: mov.u32 {d}, 10; bra.uni E; B: mov.u32 {d}, 20; bra.uni E; C: mov.u32 {d}, 30; E: """,
        np.uint32,
        b,
    )
    assert (out == 10 + 10 * b).all()


# --- warp communication -------------------------------------------------------------------------------------------------
def test_shuffles(rng):
    x = rng.integers(0, 2**32, 128, dtype=np.uint32)
    w = x.reshape(-1, 32)
    lane = np.arange(32)
    for seg in (32, 16, 8):
        c = (32 - seg) << 8
        for k in (1, 3, 8):
            for mode, src, ok in (
                ("bfly", lane ^ k, (lane ^ k) <= (lane | seg - 1)),
                ("down", lane + k, lane + k <= (lane | seg - 1)),
                ("up", lane - k, lane - k >= (lane & ~(seg - 1))),
                ("idx", (lane & ~(seg - 1)) | (k & seg - 1), np.ones(32, bool)),
            ):
                cc = c if mode == "up" else c | 31
                s = np.where(ok, src, lane)
                assert (
                    apply(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {k}, {cc}, 0xffffffff;", np.uint32, x).reshape(-1, 32)
                    == w[:, s]
                ).all(), (mode, seg, k)
                assert (
                    apply(f"shfl.sync.{mode}.b32 %r40|{{d}}, {{a}}, {k}, {cc}, -1;", bool, x).reshape(-1, 32) == ok
                ).all(), (mode, seg, k)


def test_shuffle_up_clamp(rng):
    x = rng.integers(0, 2**32, 128, dtype=np.uint32)
    src = np.where(np.arange(32) - 3 >= 5, np.arange(32) - 3, np.arange(32))  # the clamp is the lowest source lane
    assert (
        apply("shfl.sync.up.b32 {d}, {a}, 3, 5, -1;", np.uint32, x).reshape(-1, 32) == x.reshape(-1, 32)[:, src]
    ).all()


def test_votes_match_redux_elect(rng):
    x = rng.integers(0, 3, 128).astype(np.uint32)
    w = x.reshape(-1, 32)
    ball = (w > 0).astype(np.uint64) @ (1 << np.arange(32, dtype=np.uint64))
    assert (
        apply("setp.gt.u32 %p2, {a}, 0; vote.sync.ballot.b32 {d}, %p2, -1;", np.uint32, x).reshape(-1, 32)
        == ball[:, None]
    ).all()
    y = np.where(np.arange(128) < 64, 1, x).astype(np.uint32)
    for mode, f in (
        ("all", lambda v: v.all(1)),
        ("any", lambda v: v.any(1)),
        ("uni", lambda v: v.all(1) | ~v.any(1)),
    ):
        assert (
            apply(f"setp.eq.u32 %p2, {{a}}, 1; vote.sync.{mode}.pred {{d}}, %p2, -1;", bool, y).reshape(-1, 32)
            == f(y.reshape(-1, 32) == 1)[:, None]
        ).all()
    want = np.array([[sum(1 << k for k in range(32) if r[k] == v) for v in r] for r in w])
    assert (apply("match.any.sync.b32 {d}, {a}, -1;", np.uint32, x).reshape(-1, 32) == want).all()
    assert (
        apply("match.all.sync.b32 %r40|{d}, {a}, -1;", bool, y).reshape(-1, 32)
        == (y.reshape(-1, 32) == y.reshape(-1, 32)[:, :1]).all(1)[:, None]
    ).all()
    s = rng.integers(-(2**31), 2**31, 128).astype(np.int32)
    for op, f in (
        ("add", lambda v: v.sum(1, dtype=np.int32)),
        ("min", lambda v: v.min(1)),
        ("max", lambda v: v.max(1)),
    ):
        assert (
            apply(f"redux.sync.{op}.s32 {{d}}, {{a}}, -1;", np.int32, s).reshape(-1, 32)
            == f(s.reshape(-1, 32))[:, None]
        ).all(), op
    u = s.view(np.uint32)
    for op, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert (
            apply(f"redux.sync.{op}.b32 {{d}}, {{a}}, -1;", np.uint32, u).reshape(-1, 32)
            == f.reduce(u.reshape(-1, 32), axis=1)[:, None]
        ).all(), op
    assert (apply("elect.sync %r40|{d}, -1;", bool, x, arch="sm_90").reshape(-1, 32) == (np.arange(32) == 0)).all()
    # two groups of one warp with their own membermasks
    m = np.where(np.arange(128) % 32 < 16, 0xFFFF, 0xFFFF0000).astype(np.uint32)
    assert (
        apply("redux.sync.add.s32 {d}, {a}, {b};", np.uint32, x, m).reshape(-1, 2, 16)
        == x.reshape(-1, 2, 16).sum(2, keepdims=True)
    ).all()


def test_block_reductions():
    out = np.zeros((96, 3), np.uint32)
    launch(
        """and.b32 %r10, %r1, 1; setp.eq.u32 %p1, %r10, 0; bar.red.popc.u32 %r11, 0, %p1; bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, !%p1; selp.u32 %r12, 1, 0, %p2; selp.u32 %r13, 1, 0, %p3;
    mul.wide.u32 %rd10, %r1, 12; add.s64 %rd10, %rd10, %rd1; st.global.u32 [%rd10], %r11; st.global.u32 [%rd10+4], %r12; st.global.u32 [%rd10+8], %r13;""",
        [out],
        block=96,
    )
    assert (out == [48, 0, 1]).all()


# --- atomics ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(rng, space):
    cases = []
    for t, dt in (("u32", np.uint32), ("s32", np.int32), ("u64", np.uint64), ("s64", np.int64)):
        ops = (
            [("add", lambda v: v.sum(dtype=dt)), ("min", np.min), ("max", np.max)]
            if t != "s64"
            else [("min", np.min), ("max", np.max)]
        )
        cases += [(op, t, dt, f) for op, f in ops]
    for t, dt in (("b32", np.uint32), ("b64", np.uint64)):
        cases += [
            ("and", t, dt, np.bitwise_and.reduce),
            ("or", t, dt, np.bitwise_or.reduce),
            ("xor", t, dt, np.bitwise_xor.reduce),
        ]
    cases += [("add", "f32", np.float32, np.sum), ("add", "f64", np.float64, np.sum)]
    for op, t, dt, f in cases:
        size = np.dtype(dt).itemsize
        x = rng.integers(0, 100, 64).astype(dt)
        init = np.array([0 if op in ("add", "or", "xor", "max") else 10**6 if op == "min" else -1], np.int64).astype(dt)
        reg = "%rd20" if size == 8 else "%r20"
        for instr in ("atom", "red"):
            acc, old = init.copy(), np.zeros(64, dt)
            body = f"mul.wide.u32 %rd10, %r1, {size}; add.s64 %rd11, %rd10, %rd1; ld.global.b{8 * size} {reg}, [%rd11];"
            target = "%rd2"
            if space == "shared":
                body += f"mov.u64 %rd12, buf; ld.global.b{8 * size} {reg.replace('20', '21')}, [%rd2]; setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.b{8 * size} [%rd12], {reg.replace('20', '21')}; bar.sync 0;"
                target = "%rd12"
            out = reg.replace("20", "22")
            body += f"{instr}.{space}.{op}.{t} " + (f"{out}, " if instr == "atom" else "") + f"[{target}], {reg};"
            if instr == "atom":
                body += f"add.s64 %rd13, %rd10, %rd3; st.global.b{8 * size} [%rd13], {out};"
            if space == "shared":
                body += f"bar.sync 0; @%p1 ld.shared.b{8 * size} {reg.replace('20', '23')}, [buf]; @%p1 st.global.b{8 * size} [%rd2], {reg.replace('20', '23')};"
            launch(body, [x, acc, old], block=64, shared=".shared .align 8 .b8 buf[8];")
            assert acc[0] == f(np.append(x, init)), (instr, op, t, space)


def test_atomic_exchange_cas_inc_halves_and_vectors(rng):
    acc, old = np.array([7], np.uint32), np.zeros(64, np.uint32)
    idx = "mul.wide.u32 %rd10, %r1, 4; add.s64 %rd11, %rd10, %rd2;"
    launch(idx + "atom.global.exch.b32 %r20, [%rd1], %r1; st.global.u32 [%rd11], %r20;", [acc, old], block=64)
    assert sorted([*old.tolist(), int(acc[0])]) == sorted([7, *range(64)])
    acc[0] = 0
    launch(
        idx
        + "add.u32 %r21, %r1, 1; L: atom.global.cas.b32 %r20, [%rd1], %r1, %r21; setp.ne.u32 %p1, %r20, %r1; @%p1 bra L; st.global.u32 [%rd11], %r20;",
        [acc, old],
        block=64,
    )
    assert acc[0] == 64 and (old == np.arange(64)).all()  # a chain: thread k waits for thread k-1
    acc[0] = 0
    launch("atom.global.inc.u32 %r20, [%rd1], 9;", [acc], block=64)
    assert acc[0] == 64 % 10
    acc[0] = 3
    launch("atom.global.dec.u32 %r20, [%rd1], 9;", [acc], block=64)
    assert acc[0] == (3 - 64) % 10
    for t, one in (("f16x2", 0x3C003C00), ("bf16x2", 0x3F803F80)):
        acc[0] = 0
        launch(f"mov.b32 %r20, {one}; red.global.add.noftz.{t} [%rd1], %r20;", [acc], block=64)
        v = decode(np.array([acc[0] & 0xFFFF], np.uint16), t[:-2])
        assert v[0] == 64
    a4 = np.zeros(4, np.float32)
    launch(
        "mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000; red.global.add.v4.f32 [%rd1], {%f1, %f2, %f1, %f2};",
        [a4],
        block=64,
        arch="sm_90",
    )
    assert a4.tolist() == [64, 128, 64, 128]


def test_unsupported_is_an_error():
    for bad in (
        "tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [t, {%r1}];",
        "add.f32.weird %f1, %f2, %f3;",
        "add.e4m3 %f1, %f2, %f3;",
        "mul.f16.sat %h1, %h1, %h1;",
        "cvt.f32.s32 %f1, %r1;",
        "add.s32 %r1, %rd1, %r2;",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%f1,%f2,%f3,%f4};",
        "bogus %r1;",
    ):
        with pytest.raises(ptxemu.Unsupported):
            launch(bad, [np.zeros(1, np.uint32)])
