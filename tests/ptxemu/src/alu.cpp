// alu.cpp - arithmetic, comparison, logic, moves. One template per operand pattern; the type is a template
// parameter.
#include <algorithm>
#include "decode.h"
#include "machine.h"

namespace ptx {
namespace {

// --- how a PTX type lives in a register lane
// ------------------------------------------------------------------------
template <class I>
struct Int {
    using Reg = std::conditional_t<sizeof(I) == 8, u64, u32>;
    using Val = I;
    static Val get(Reg r) { return (I)r; }
    static Reg put(Val v) { return (Reg)(std::make_unsigned_t<I>)v; }
};
struct F32 {
    using Reg = u32;
    using Val = float;
    static Val get(Reg r) { return as_f32(r); }
    static Reg put(Val v) { return v != v ? 0x7fffffffu : as_bits(v); }
};
struct F32Ftz {
    using Reg = u32;
    using Val = float;
    static Val get(Reg r) { return flush(as_f32(r)); }
    static Reg put(Val v) { return v != v ? 0x7fffffffu : as_bits(flush(v)); }
};
struct F32Sat {
    using Reg = u32;
    using Val = float;
    static Val get(Reg r) { return as_f32(r); }
    static Reg put(Val v) { return as_bits(v != v || v <= 0 ? 0.0f : v >= 1 ? 1.0f : v); }
};
struct F32FtzSat {
    using Reg = u32;
    using Val = float;
    static Val get(Reg r) { return flush(as_f32(r)); }
    static Reg put(Val v) { return F32Sat::put(flush(v)); }
};
struct F64 {
    using Reg = u64;
    using Val = double;
    static Val get(Reg r) { return as_f64(r); }
    static Reg put(Val v) { return as_bits(v); }
};
// f16/bf16: operands widen to double (exact); one rounding at the end, which is the correctly rounded result.
struct F16 {
    using Reg = u32;
    using Val = double;
    static Val get(Reg r) { return half_to_float(r & 0xffff); }
    static Reg put(Val v) { return double_to_half(v); }
};
inline double ftz_half(double v) { return std::fabs(v) < 6.103515625e-05 ? std::copysign(0.0, v) : v; }
struct F16Ftz {
    using Reg = u32;
    using Val = double;
    static Val get(Reg r) { return ftz_half(half_to_float(r & 0xffff)); }
    static Reg put(Val v) { return double_to_half(ftz_half(half_to_float(double_to_half(v)))); }
};
struct BF16 {
    using Reg = u32;
    using Val = double;
    static Val get(Reg r) { return bf16_to_float(r & 0xffff); }
    static Reg put(Val v) { return double_to_bf16(v); }
};
struct Pred {};

// --- patterns
// -------------------------------------------------------------------------------------------------------
template <class T, class F>
void unary(Warp& w, const Inst& i, u32 m) {
    auto* d = w.reg<typename T::Reg>(i.d0);
    auto* a = w.reg<typename T::Reg>(i.s0);
    for_lanes(m, [=](int l) { d[l] = T::put(F::f(T::get(a[l]))); });
}
template <class T, class F>
void binary(Warp& w, const Inst& i, u32 m) {
    auto* d = w.reg<typename T::Reg>(i.d0);
    auto* a = w.reg<typename T::Reg>(i.s0);
    auto* b = w.reg<typename T::Reg>(i.s1);
    for_lanes(m, [=](int l) { d[l] = T::put(F::f(T::get(a[l]), T::get(b[l]))); });
}
template <class T, class F>
void ternary(Warp& w, const Inst& i, u32 m) {
    auto* d = w.reg<typename T::Reg>(i.d0);
    auto* a = w.reg<typename T::Reg>(i.s0);
    auto* b = w.reg<typename T::Reg>(i.s1);
    auto* c = w.reg<typename T::Reg>(i.s2);
    for_lanes(m, [=](int l) { d[l] = T::put(F::f(T::get(a[l]), T::get(b[l]), T::get(c[l]))); });
}
// Packed f16x2 / bf16x2: the scalar operation on both halves.
template <class T, class F>
void unary2(Warp& w, const Inst& i, u32 m) {
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0);
    for_lanes(m, [=](int l) {
        u32 x = a[l];
        d[l] = T::put(F::f(T::get(x))) | T::put(F::f(T::get(x >> 16))) << 16;
    });
}
template <class T, class F>
void binary2(Warp& w, const Inst& i, u32 m) {
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1);
    for_lanes(m, [=](int l) {
        u32 x = a[l], y = b[l];
        d[l] = T::put(F::f(T::get(x), T::get(y))) | T::put(F::f(T::get(x >> 16), T::get(y >> 16))) << 16;
    });
}
template <class T, class F>
void ternary2(Warp& w, const Inst& i, u32 m) {
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1), *c = w.r32(i.s2);
    for_lanes(m, [=](int l) {
        u32 x = a[l], y = b[l], z = c[l];
        d[l] = T::put(F::f(T::get(x), T::get(y), T::get(z))) |
               T::put(F::f(T::get(x >> 16), T::get(y >> 16), T::get(z >> 16))) << 16;
    });
}

// --- operations
// -----------------------------------------------------------------------------------------------------
template <class I>
std::make_unsigned_t<I> U(I v) {
    return (std::make_unsigned_t<I>)v;
}
template <class V>
constexpr bool is_int = std::is_integral_v<V>;
struct Add {
    template <class V>
    static V f(V a, V b) {
        if constexpr (is_int<V>) return (V)(U(a) + U(b));
        else return a + b;
    }
};
struct Sub {
    template <class V>
    static V f(V a, V b) {
        if constexpr (is_int<V>) return (V)(U(a) - U(b));
        else return a - b;
    }
};
struct Mul {
    template <class V>
    static V f(V a, V b) {
        if constexpr (is_int<V>) return (V)((u64)U(a) * (u64)U(b));
        else return a * b;
    }
};
struct MulHi {
    template <class V>
    static V f(V a, V b) {
        return (V)(((__int128)a * (__int128)b) >> (8 * sizeof(V)));
    }
};
template <>
u64 MulHi::f<u64>(u64 a, u64 b) {
    return (u64)(((unsigned __int128)a * b) >> 64);
}
struct MadLo {
    template <class V>
    static V f(V a, V b, V c) {
        return Add::f(Mul::f(a, b), c);
    }
};
struct MadHi {
    template <class V>
    static V f(V a, V b, V c) {
        return Add::f(MulHi::f(a, b), c);
    }
};
struct Div {
    template <class V>
    static V f(V a, V b) {
        if constexpr (!is_int<V>) return a / b;
        else {
            if (b == 0) return (V)~U((V)0);
            if (std::is_signed_v<V> && b == (V)-1) return (V)(0 - U(a));
            return a / b;
        }
    }
};
struct Rem {
    template <class V>
    static V f(V a, V b) {
        if (b == 0) return a;
        if (std::is_signed_v<V> && b == (V)-1) return 0;
        return a % b;
    }
};
struct Min {
    template <class V>
    static V f(V a, V b) {
        if constexpr (is_int<V>) return b < a ? b : a;
        else return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
    }
};
struct Max {
    template <class V>
    static V f(V a, V b) {
        if constexpr (is_int<V>) return a < b ? b : a;
        else return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
    }
};
struct MinNaN {
    template <class V>
    static V f(V a, V b) {
        return a != a || b != b ? (V)NAN : Min::f(a, b);
    }
};
struct MaxNaN {
    template <class V>
    static V f(V a, V b) {
        return a != a || b != b ? (V)NAN : Max::f(a, b);
    }
};
template <class M>
struct Xorsign {
    template <class V>
    static V f(V a, V b) {
        bool n = std::signbit(a) != std::signbit(b);
        V r = M::f((V)std::fabs(a), (V)std::fabs(b));
        return n ? -r : r;
    }
};
template <class M>
struct Three {
    template <class V>
    static V f(V a, V b, V c) {
        return M::f(M::f(a, b), c);
    }
};
struct Neg {
    template <class V>
    static V f(V a) {
        if constexpr (is_int<V>) return (V)(0 - U(a));
        else return -a;
    }
};
struct Abs {
    template <class V>
    static V f(V a) {
        if constexpr (is_int<V>) return a < 0 ? (V)(0 - U(a)) : a;
        else return std::fabs(a);
    }
};
struct Fma {
    template <class V>
    static V f(V a, V b, V c) {
        return std::fma(a, b, c);
    }
};
struct FmaRelu {
    template <class V>
    static V f(V a, V b, V c) {
        V r = std::fma(a, b, c);
        return r != r ? r : r > 0 ? r : 0;
    }
};
template <Round R>
struct AddR {
    static float f(float a, float b) {
        double s = (double)a + b, t = s - a, e = (a - (s - t)) + (b - t);
        return round_f32(s, e, R);
    }
};
template <Round R>
struct SubR {
    static float f(float a, float b) { return AddR<R>::f(a, -b); }
};
template <Round R>
struct MulR {
    static float f(float a, float b) { return round_f32((double)a * b, 0, R); }
};
template <Round R>
struct FmaR {
    static float f(float a, float b, float c) {
        double p = (double)a * b, x = c, s = p + x, t = s - p, e = (p - (s - t)) + (x - t);
        return round_f32(s, e, R);
    }
};
template <Round R>
struct DivR {
    static float f(float a, float b) {
        double q = (double)a / b;
        double e = std::isfinite(q) ? std::fma(-q, (double)b, (double)a) / b : 0;
        return round_f32(q, e, R);
    }
};
struct Sad {
    template <class V>
    static V f(V a, V b, V c) {
        return (V)(U(c) + (a < b ? U(b) - U(a) : U(a) - U(b)));
    }
};
struct AddSat {
    static s32 f(s32 a, s32 b) {
        s64 v = (s64)a + b;
        return (s32)std::clamp<s64>(v, INT32_MIN, INT32_MAX);
    }
};
struct SubSat {
    static s32 f(s32 a, s32 b) {
        s64 v = (s64)a - b;
        return (s32)std::clamp<s64>(v, INT32_MIN, INT32_MAX);
    }
};
struct And {
    template <class V>
    static V f(V a, V b) {
        return a & b;
    }
};
struct Or {
    template <class V>
    static V f(V a, V b) {
        return a | b;
    }
};
struct Xor {
    template <class V>
    static V f(V a, V b) {
        return a ^ b;
    }
};
struct Not {
    template <class V>
    static V f(V a) {
        return (V)~a;
    }
};
struct Cnot {
    template <class V>
    static V f(V a) {
        return a == 0;
    }
};
struct Brev {
    template <class V>
    static V f(V a) {
        V r = 0;
        for (unsigned i = 0; i < 8 * sizeof(V); i++) r |= ((a >> i) & 1) << (8 * sizeof(V) - 1 - i);
        return r;
    }
};

// MUFU functions. The results are the correctly rounded ones (better than the documented bounds: ex2 2 ulp,
// lg2 2^-22 absolute near 1, rcp/rsqrt 1-2 ulp, tanh 2^-11 relative); Options::approx_noise moves them within
// those bounds.
inline double exp2_poly(double x) {
    double n = std::nearbyint(x), f = x - n;
    double p = 7.0549116208011233e-9;
    p = p * f + 1.0178086009239699e-7;
    p = p * f + 1.3215486790144309e-6;
    p = p * f + 1.5252733804059841e-5;
    p = p * f + 1.5403530393381609e-4;
    p = p * f + 1.3333558146428443e-3;
    p = p * f + 9.6181291076284772e-3;
    p = p * f + 5.5504108664821580e-2;
    p = p * f + 2.4022650695910071e-1;
    p = p * f + 6.9314718055994531e-1;
    p = p * f + 1.0;
    return p * as_f64((u64)(1023 + (s64)n) << 52);
}
struct Ex2 {
    static float f(float x) {
        double c = x > 200.f ? 200. : x < -200.f ? -200. : (double)x;
        float r = (float)exp2_poly(c);
        return x != x ? x : x > 128.f ? INFINITY : r;
    }
    static double f(double x) { return std::exp2(x); }
};
struct Lg2 {
    static float f(float x) { return (float)std::log2((double)x); }
};
struct Rcp {
    template <class V>
    static V f(V x) {
        return (V)1 / x;
    }
};
struct Sqrt {
    template <class V>
    static V f(V x) {
        return std::sqrt(x);
    }
};
struct Rsqrt {
    static float f(float x) { return (float)(1.0 / std::sqrt((double)x)); }
    static double f(double x) { return 1.0 / std::sqrt(x); }
};
struct Tanh {
    template <class V>
    static V f(V x) {
        return (V)std::tanh((double)x);
    }
};
struct Sin {
    static float f(float x) { return (float)std::sin((double)x); }
};
struct Cos {
    static float f(float x) { return (float)std::cos((double)x); }
};
// rcp/rsqrt.approx.ftz.f64: only the upper 32 bits are produced (PTX ISA "rcp.approx.ftz.f64").
template <class F>
struct Upper32 {
    static double f(double x) {
        if (std::fabs(x) < 2.2250738585072014e-308) x = std::copysign(0.0, x);
        return as_f64(as_bits((double)F::f(x)) & ~0xffffffffull);
    }
};

// --- type dispatch
// --------------------------------------------------------------------------------------------------
template <template <class, class> class>
struct Tag {};
#define DISPATCH_INT(PATTERN, OP)                  \
    case Type::U16:                                \
    case Type::B16: return &PATTERN<Int<u16>, OP>; \
    case Type::S16: return &PATTERN<Int<s16>, OP>; \
    case Type::U32:                                \
    case Type::B32: return &PATTERN<Int<u32>, OP>; \
    case Type::S32: return &PATTERN<Int<s32>, OP>; \
    case Type::U64:                                \
    case Type::B64: return &PATTERN<Int<u64>, OP>; \
    case Type::S64: return &PATTERN<Int<s64>, OP>;
#define INT_HANDLER(NAME, PATTERN)                                         \
    template <class OP>                                                    \
    Handler NAME(Type t) {                                                 \
        switch (t) { DISPATCH_INT(PATTERN, OP) default : return nullptr; } \
    }
INT_HANDLER(int_unary, unary)
INT_HANDLER(int_binary, binary) INT_HANDLER(int_ternary, ternary) template <class OP>
Handler bits_unary(Type t) {
    switch (t) {
        case Type::B16: return &unary<Int<u16>, OP>;
        case Type::B32: return &unary<Int<u32>, OP>;
        case Type::B64: return &unary<Int<u64>, OP>;
        default: return nullptr;
    }
}
template <class OP>
Handler bits_binary(Type t) {
    switch (t) {
        case Type::B16: return &binary<Int<u16>, OP>;
        case Type::B32: return &binary<Int<u32>, OP>;
        case Type::B64: return &binary<Int<u64>, OP>;
        default: return nullptr;
    }
}
template <class OP>
Handler f32_unary(bool ftz, bool sat = false) {
    return sat   ? ftz ? &unary<F32FtzSat, OP> : &unary<F32Sat, OP>
           : ftz ? &unary<F32Ftz, OP>
                 : &unary<F32, OP>;
}
template <class OP>
Handler f32_binary(bool ftz, bool sat = false) {
    return sat   ? ftz ? &binary<F32FtzSat, OP> : &binary<F32Sat, OP>
           : ftz ? &binary<F32Ftz, OP>
                 : &binary<F32, OP>;
}
template <class OP>
Handler f32_ternary(bool ftz, bool sat = false) {
    return sat   ? ftz ? &ternary<F32FtzSat, OP> : &ternary<F32Sat, OP>
           : ftz ? &ternary<F32Ftz, OP>
                 : &ternary<F32, OP>;
}
template <class OP>
Handler half_unary(Type t, bool ftz) {
    switch (t) {
        case Type::F16: return ftz ? &unary<F16Ftz, OP> : &unary<F16, OP>;
        case Type::F16x2: return ftz ? &unary2<F16Ftz, OP> : &unary2<F16, OP>;
        case Type::BF16: return ftz ? nullptr : &unary<BF16, OP>;
        case Type::BF16x2: return ftz ? nullptr : &unary2<BF16, OP>;
        default: return nullptr;
    }
}
template <class OP>
Handler half_binary(Type t, bool ftz) {
    switch (t) {
        case Type::F16: return ftz ? &binary<F16Ftz, OP> : &binary<F16, OP>;
        case Type::F16x2: return ftz ? &binary2<F16Ftz, OP> : &binary2<F16, OP>;
        case Type::BF16: return ftz ? nullptr : &binary<BF16, OP>;
        case Type::BF16x2: return ftz ? nullptr : &binary2<BF16, OP>;
        default: return nullptr;
    }
}
template <class OP>
Handler half_ternary(Type t, bool ftz) {
    switch (t) {
        case Type::F16: return ftz ? &ternary<F16Ftz, OP> : &ternary<F16, OP>;
        case Type::F16x2: return ftz ? &ternary2<F16Ftz, OP> : &ternary2<F16, OP>;
        case Type::BF16: return ftz ? nullptr : &ternary<BF16, OP>;
        case Type::BF16x2: return ftz ? nullptr : &ternary2<BF16, OP>;
        default: return nullptr;
    }
}
bool is_half(Type t) { return t == Type::F16 || t == Type::BF16 || t == Type::F16x2 || t == Type::BF16x2; }
bool is_packed(Type t) { return t == Type::F16x2 || t == Type::BF16x2; }
Cls class_of(Type t) {
    return t == Type::F32 ? Cls::Fp32 : t == Type::F64 ? Cls::Fp64 : is_half(t) ? Cls::Fp16 : Cls::Int;
}

Round take_round(Decoder& d) {
    int r = d.take_one({"rn", "rz", "rm", "rp"}, 0);
    return (Round)r;
}
template <template <Round> class OP>
Handler round_binary(Round r, bool ftz, bool sat) {
    switch (r) {
        case Round::RZ: return f32_binary<OP<Round::RZ>>(ftz, sat);
        case Round::RM: return f32_binary<OP<Round::RM>>(ftz, sat);
        case Round::RP: return f32_binary<OP<Round::RP>>(ftz, sat);
        default: return nullptr;
    }
}
template <template <Round> class OP>
Handler round_ternary(Round r, bool ftz, bool sat) {
    switch (r) {
        case Round::RZ: return f32_ternary<OP<Round::RZ>>(ftz, sat);
        case Round::RM: return f32_ternary<OP<Round::RM>>(ftz, sat);
        case Round::RP: return f32_ternary<OP<Round::RP>>(ftz, sat);
        default: return nullptr;
    }
}

void set_operands(Decoder& d, Type t, int n) {
    d.expect(n + 1);
    d.inst.d0 = d.dst(0, t);
    u32* s[] = {&d.inst.s0, &d.inst.s1, &d.inst.s2};
    for (int k = 0; k < n; k++) *s[k] = d.src(k + 1, t);
    d.inst.type = t;
}
void finish(Decoder& d, Handler h, Cls c) {
    if (!h) d.unsupported("type");
    d.inst.run = h;
    d.inst.cls = c;
}

// --- special shapes
// -------------------------------------------------------------------------------------------------
template <class N, class W, bool MAD>
void wide(Warp& w, const Inst& i, u32 m) {  // mul.wide, mad.wide
    using D = typename Int<W>::Reg;
    auto* d = w.reg<D>(i.d0);
    u32 *a = w.r32(i.s0), *b = w.r32(i.s1);
    auto* c = MAD ? w.reg<D>(i.s2) : nullptr;
    for_lanes(m, [=](int l) {
        W v = (W)((W)(N)a[l] * (W)(N)b[l]);
        d[l] = Int<W>::put(MAD ? Add::f(v, (W)c[l]) : v);
    });
}
template <class T>
void shl(Warp& w, const Inst& i, u32 m) {
    auto* d = w.reg<typename T::Reg>(i.d0);
    auto* a = w.reg<typename T::Reg>(i.s0);
    u32* b = w.r32(i.s1);
    constexpr u32 n = 8 * sizeof(typename T::Val);
    for_lanes(m, [=](int l) { d[l] = b[l] >= n ? 0 : T::put((typename T::Val)(T::get(a[l]) << b[l])); });
}
template <class T>
void shr(Warp& w, const Inst& i, u32 m) {
    auto* d = w.reg<typename T::Reg>(i.d0);
    auto* a = w.reg<typename T::Reg>(i.s0);
    u32* b = w.r32(i.s1);
    constexpr u32 n = 8 * sizeof(typename T::Val);
    for_lanes(m, [=](int l) {
        u32 k = b[l];
        auto v = T::get(a[l]);
        d[l] = T::put(
            (typename T::Val)(k >= n ? (std::is_signed_v<typename T::Val> ? v >> (n - 1) : 0) : v >> k));
    });
}
template <class F>
void pred_binary(Warp& w, const Inst& i, u32 m) {
    u32 v = F::f(w.pred(i.s0), w.pred(i.s1));
    u32& d = w.pred(i.d0);
    d = (d & ~m) | (v & m);
}
void pred_not(Warp& w, const Inst& i, u32 m) {
    u32 v = ~w.pred(i.s0);
    u32& d = w.pred(i.d0);
    d = (d & ~m) | (v & m);
}
void pred_mov(Warp& w, const Inst& i, u32 m) {
    u32 v = w.pred(i.s0);
    u32& d = w.pred(i.d0);
    d = (d & ~m) | (v & m);
}
template <class R>
void mov(Warp& w, const Inst& i, u32 m) {
    R *d = w.reg<R>(i.d0), *a = w.reg<R>(i.s0);
    for_lanes(m, [=](int l) { d[l] = a[l]; });
}
// mov.b32 {a,b}, c and its inverse; widths in inst.sub (element) and inst.sub2 (whole), in bytes.
void unpack(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u64 v = i.sub2 == 8 ? w.r64(i.s0)[l] : w.r32(i.s0)[l];
        for (size_t k = 0; k < i.d.size(); k++)
            if (i.d[k] != ~0u) {
                u64 e = v >> (8 * i.sub * k);
                if (i.sub == 8) w.r64(i.d[k])[l] = e;
                else w.r32(i.d[k])[l] = (u32)(e & (i.sub == 4 ? 0xffffffffull : (1ull << (8 * i.sub)) - 1));
            }
    });
}
void pack(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u64 v = 0;
        for (size_t k = 0; k < i.s.size(); k++) {
            u64 e = w.r32(i.s[k])[l];
            if (i.sub < 4) e &= (1ull << (8 * i.sub)) - 1;
            v |= e << (8 * i.sub * k);
        }
        if (i.sub2 == 8) w.r64(i.d0)[l] = v;
        else w.r32(i.d0)[l] = (u32)v;
    });
}
void clock_read(Warp& w, const Inst& i,
                u32 m) {  // %clock and friends: the number of instructions executed, monotone
    u64 t = w.cta->counters->instructions;
    for_lanes(m, [&](int l) {
        if (i.sub == 8) w.r64(i.d0)[l] = t;
        else w.r32(i.d0)[l] = (u32)t;
    });
}
template <class R>
void selp(Warp& w, const Inst& i, u32 m) {
    R *d = w.reg<R>(i.d0), *a = w.reg<R>(i.s0), *b = w.reg<R>(i.s1);
    u32 p = w.pred(i.s2);
    for_lanes(m, [=](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
}
template <class R, bool FLOAT>
void slct(Warp& w, const Inst& i, u32 m) {
    R *d = w.reg<R>(i.d0), *a = w.reg<R>(i.s0), *b = w.reg<R>(i.s1);
    u32* c = w.r32(i.s2);
    for_lanes(m, [=](int l) { d[l] = (FLOAT ? as_f32(c[l]) >= 0 : (s32)c[l] >= 0) ? a[l] : b[l]; });
}

enum Cmp : u8 { EQ, NE, LT, LE, GT, GE, LO, LS, HI, HS, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANC };
template <int C, class V>
inline bool compare(V a, V b) {
    if constexpr (is_int<V>) {
        if constexpr (C == EQ) return a == b;
        else if constexpr (C == NE) return a != b;
        else if constexpr (C == LT || C == LO) return a < b;
        else if constexpr (C == LE || C == LS) return a <= b;
        else if constexpr (C == GT || C == HI) return a > b;
        else return a >= b;
    } else {
        bool u = a != a || b != b;
        if constexpr (C == EQ) return a == b;
        else if constexpr (C == NE) return !u && a != b;
        else if constexpr (C == LT) return a < b;
        else if constexpr (C == LE) return a <= b;
        else if constexpr (C == GT) return a > b;
        else if constexpr (C == GE) return a >= b;
        else if constexpr (C == EQU) return u || a == b;
        else if constexpr (C == NEU) return a != b;
        else if constexpr (C == LTU) return !(a >= b);
        else if constexpr (C == LEU) return !(a > b);
        else if constexpr (C == GTU) return !(a <= b);
        else if constexpr (C == GEU) return !(a < b);
        else if constexpr (C == NUM) return !u;
        else return u;
    }
}
// Combine with the optional predicate c and write the pair p|q (PTX ISA "setp"): q gets the complement of the
// comparison.
inline void set_predicates(Warp& w, const Inst& i, u32 m, u32 r) {
    u32 t = r, n = ~r;
    if (i.sub2) {
        u32 c = w.pred(i.s2) ^ (i.flag ? ~0u : 0);
        if (i.sub2 == 1) {
            t &= c;
            n &= c;
        } else if (i.sub2 == 2) {
            t |= c;
            n |= c;
        } else {
            t ^= c;
            n ^= c;
        }
    }
    u32& d = w.pred(i.d0);
    d = (d & ~m) | (t & m);
    if (i.flag2) {
        u32& q = w.pred(i.d1);
        q = (q & ~m) | (n & m);
    }
}
template <class T, int C>
void setp(Warp& w, const Inst& i, u32 m) {
    auto* a = w.reg<typename T::Reg>(i.s0);
    auto* b = w.reg<typename T::Reg>(i.s1);
    u32 bit[32], r = 0;
    for (int l = 0; l < 32; l++) bit[l] = (u32)compare<C>(T::get(a[l]), T::get(b[l])) << l;
    for (int l = 0; l < 32; l++) r |= bit[l];
    set_predicates(w, i, m, r);
}
template <class T, int C>
void setp2(Warp& w, const Inst& i, u32 m) {  // setp.f16x2: p for the low half, q for the high half
    u32 *a = w.r32(i.s0), *b = w.r32(i.s1), lo = 0, hi = 0;
    for (int l = 0; l < 32; l++) {
        lo |= (u32)compare<C>(T::get(a[l]), T::get(b[l])) << l;
        hi |= (u32)compare<C>(T::get(a[l] >> 16), T::get(b[l] >> 16)) << l;
    }
    if (i.sub2) {
        u32 c = w.pred(i.s2) ^ (i.flag ? ~0u : 0);
        if (i.sub2 == 1) {
            lo &= c;
            hi &= c;
        } else if (i.sub2 == 2) {
            lo |= c;
            hi |= c;
        } else {
            lo ^= c;
            hi ^= c;
        }
    }
    u32& d = w.pred(i.d0);
    d = (d & ~m) | (lo & m);
    u32& q = w.pred(i.d1);
    q = (q & ~m) | (hi & m);
}
// set: a value instead of a predicate; inst.sub: 0 integer (all ones), 1 f32 1.0, 2 f16 1.0, 3 bf16 1.0
// (packed: each half)
template <class T, int C>
void set(Warp& w, const Inst& i, u32 m) {
    auto* a = w.reg<typename T::Reg>(i.s0);
    auto* b = w.reg<typename T::Reg>(i.s1);
    u32* d = w.r32(i.d0);
    static const u32 one[] = {~0u, 0x3f800000u, 0x3c00u, 0x3f80u, 0xffffu};
    for_lanes(m, [&](int l) { d[l] = compare<C>(T::get(a[l]), T::get(b[l])) ? one[i.sub] : 0; });
}
template <class T, int C>
void set2(Warp& w, const Inst& i, u32 m) {
    u32 *a = w.r32(i.s0), *b = w.r32(i.s1), *d = w.r32(i.d0);
    static const u32 one[] = {0xffffu, 0, 0x3c00u, 0x3f80u};
    for_lanes(m, [&](int l) {
        u32 x = a[l], y = b[l];
        d[l] = (compare<C>(T::get(x), T::get(y)) ? one[i.sub] : 0) |
               (compare<C>(T::get(x >> 16), T::get(y >> 16)) ? one[i.sub] << 16 : 0);
    });
}
template <template <class, int> class>
struct CmpTag {};
#define COMPARE_TABLE(NAME, FN)                                                          \
    template <class T>                                                                   \
    Handler NAME##_int(int c) {                                                          \
        switch (c) {                                                                     \
            case EQ: return &FN<T, EQ>;                                                  \
            case NE: return &FN<T, NE>;                                                  \
            case LT:                                                                     \
            case LO: return &FN<T, LT>;                                                  \
            case LE:                                                                     \
            case LS: return &FN<T, LE>;                                                  \
            case GT:                                                                     \
            case HI: return &FN<T, GT>;                                                  \
            case GE:                                                                     \
            case HS: return &FN<T, GE>;                                                  \
            default: return nullptr;                                                     \
        }                                                                                \
    }                                                                                    \
    template <class T>                                                                   \
    Handler NAME##_float(int c) {                                                        \
        switch (c) {                                                                     \
            case EQ: return &FN<T, EQ>;                                                  \
            case NE: return &FN<T, NE>;                                                  \
            case LT: return &FN<T, LT>;                                                  \
            case LE: return &FN<T, LE>;                                                  \
            case GT: return &FN<T, GT>;                                                  \
            case GE: return &FN<T, GE>;                                                  \
            case EQU: return &FN<T, EQU>;                                                \
            case NEU: return &FN<T, NEU>;                                                \
            case LTU: return &FN<T, LTU>;                                                \
            case LEU: return &FN<T, LEU>;                                                \
            case GTU: return &FN<T, GTU>;                                                \
            case GEU: return &FN<T, GEU>;                                                \
            case NUM: return &FN<T, NUM>;                                                \
            case NANC: return &FN<T, NANC>;                                              \
            default: return nullptr;                                                     \
        }                                                                                \
    }                                                                                    \
    Handler NAME##_handler(Type t, int c, bool ftz) {                                    \
        switch (t) {                                                                     \
            case Type::B16:                                                              \
            case Type::U16: return NAME##_int<Int<u16>>(c);                              \
            case Type::S16: return NAME##_int<Int<s16>>(c);                              \
            case Type::B32:                                                              \
            case Type::U32: return NAME##_int<Int<u32>>(c);                              \
            case Type::S32: return NAME##_int<Int<s32>>(c);                              \
            case Type::B64:                                                              \
            case Type::U64: return NAME##_int<Int<u64>>(c);                              \
            case Type::S64: return NAME##_int<Int<s64>>(c);                              \
            case Type::F32: return ftz ? NAME##_float<F32Ftz>(c) : NAME##_float<F32>(c); \
            case Type::F64: return NAME##_float<F64>(c);                                 \
            case Type::F16: return ftz ? NAME##_float<F16Ftz>(c) : NAME##_float<F16>(c); \
            case Type::BF16: return NAME##_float<BF16>(c);                               \
            default: return nullptr;                                                     \
        }                                                                                \
    }
COMPARE_TABLE(setp, setp)
COMPARE_TABLE(set, set)
#define COMPARE2(NAME, FN)                  \
    template <class T>                      \
    Handler NAME(int c) {                   \
        switch (c) {                        \
            case EQ: return &FN<T, EQ>;     \
            case NE: return &FN<T, NE>;     \
            case LT: return &FN<T, LT>;     \
            case LE: return &FN<T, LE>;     \
            case GT: return &FN<T, GT>;     \
            case GE: return &FN<T, GE>;     \
            case EQU: return &FN<T, EQU>;   \
            case NEU: return &FN<T, NEU>;   \
            case LTU: return &FN<T, LTU>;   \
            case LEU: return &FN<T, LEU>;   \
            case GTU: return &FN<T, GTU>;   \
            case GEU: return &FN<T, GEU>;   \
            case NUM: return &FN<T, NUM>;   \
            case NANC: return &FN<T, NANC>; \
            default: return nullptr;        \
        }                                   \
    }
    COMPARE2(setp2_handler, setp2) COMPARE2(set2_handler, set2) int take_compare(Decoder& d) {
    int c = d.take_one({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu",
                        "leu", "gtu", "geu", "num", "nan"});
    if (c < 0) d.unsupported("comparison");
    return c;
}

void popc(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        w.r32(i.d0)[l] = __builtin_popcountll(i.sub == 8 ? w.r64(i.s0)[l] : w.r32(i.s0)[l]);
    });
}
void clz(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u64 x = i.sub == 8 ? w.r64(i.s0)[l] : (u64)w.r32(i.s0)[l] << 32 | 0x80000000u;
        w.r32(i.d0)[l] = x ? (u32)__builtin_clzll(x) : 64;
    });
}
void bfind(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        int n = size_of(i.type) * 8;
        u64 x = n == 64 ? w.r64(i.s0)[l] : w.r32(i.s0)[l];
        if (is_signed(i.type)) {
            s64 v = (s64)extend(x, i.type);
            x = v < 0 ? extend(~x, n == 64 ? Type::U64 : Type::U32) : x;
        }
        u32 r = x ? 63 - __builtin_clzll(x) : ~0u;
        w.r32(i.d0)[l] = i.flag && r != ~0u ? (u32)(n - 1) - r : r;
    });
}
void bfe(Warp& w, const Inst& i,
         u32 m) {  // PTX ISA "bfe": bit position saturates, sign bit of the field is extended
    for_lanes(m, [&](int l) {
        int n = size_of(i.type) * 8, pos = w.r32(i.s1)[l] & 255, len = w.r32(i.s2)[l] & 255;
        u64 a = n == 64 ? w.r64(i.s0)[l] : w.r32(i.s0)[l], r = 0;
        bool sign = is_signed(i.type) && len ? (a >> std::min(pos + len - 1, n - 1)) & 1 : false;
        for (int k = 0; k < n; k++) r |= (u64)(k < len && pos + k < n ? (a >> (pos + k)) & 1 : sign) << k;
        if (n == 64) w.r64(i.d0)[l] = r;
        else w.r32(i.d0)[l] = (u32)r;
    });
}
void bfi(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        int n = size_of(i.type) * 8, pos = w.r32(i.s2)[l] & 255, len = w.r32(i.s3)[l] & 255;
        u64 a = n == 64 ? w.r64(i.s0)[l] : w.r32(i.s0)[l], r = n == 64 ? w.r64(i.s1)[l] : w.r32(i.s1)[l];
        for (int k = 0; k < len && pos + k < n; k++)
            r = (r & ~(1ull << (pos + k))) | ((a >> k) & 1) << (pos + k);
        if (n == 64) w.r64(i.d0)[l] = r;
        else w.r32(i.d0)[l] = (u32)r;
    });
}
void prmt(Warp& w, const Inst& i, u32 m) {
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1), *c = w.r32(i.s2);
    for_lanes(m, [&](int l) {
        u64 x = (u64)b[l] << 32 | a[l];
        auto byte = [&](u32 k) { return (u32)(x >> (8 * k)) & 255; };
        u32 s = c[l], k = s & 3, r = 0;
        for (u32 j = 0; j < 4; j++) {
            u32 v;
            switch (i.sub) {
                case 1: v = byte((k + j) & 7); break;            // f4e
                case 2: v = byte((k - j) & 7); break;            // b4e
                case 3: v = byte(k); break;                      // rc8
                case 4: v = byte(std::max(j, k)); break;         // ecl
                case 5: v = byte(std::min(j, k)); break;         // ecr
                case 6: v = byte((k & 1) * 2 + (j & 1)); break;  // rc16
                default: {
                    u32 q = (s >> (4 * j)) & 15;
                    v = byte(q & 7);
                    if (q & 8) v = v & 128 ? 255 : 0;
                }
            }
            r |= v << (8 * j);
        }
        d[l] = r;
    });
}
void lop3(Warp& w, const Inst& i, u32 m) {
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1), *c = w.r32(i.s2), lut = (u32)i.offset;
    for_lanes(m, [=](int l) {
        u32 r = 0;
        for (int k = 0; k < 8; k++)
            if (lut >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
        d[l] = r;
    });
}
void shf(Warp& w, const Inst& i, u32 m) {  // flag: left, flag2: wrap
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1), *c = w.r32(i.s2);
    for_lanes(m, [&](int l) {
        u32 n = i.flag2 ? c[l] & 31 : std::min<u32>(c[l], 32);
        u64 x = (u64)b[l] << 32 | a[l];
        d[l] = i.flag ? (u32)((x << n) >> 32) : (u32)(x >> n);
    });
}
void dp4a(Warp& w, const Inst& i, u32 m) {  // flag/flag2: a/b signed
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1), *c = w.r32(i.s2);
    for_lanes(m, [&](int l) {
        u32 r = c[l];
        for (int k = 0; k < 4; k++) {
            s32 x = i.flag ? (s32)(s8)(a[l] >> 8 * k) : (s32)(u8)(a[l] >> 8 * k),
                y = i.flag2 ? (s32)(s8)(b[l] >> 8 * k) : (s32)(u8)(b[l] >> 8 * k);
            r += (u32)(x * y);
        }
        d[l] = r;
    });
}
void carry_add(Warp& w, const Inst& i,
               u32 m) {  // add.cc, addc, sub.cc, subc. sub: 0 add 1 sub; flag: use carry, flag2: set carry
    for_lanes(m, [&](int l) {
        bool w64 = size_of(i.type) == 8;
        u64 a = w64 ? w.r64(i.s0)[l] : w.r32(i.s0)[l], b = w64 ? w.r64(i.s1)[l] : w.r32(i.s1)[l],
            c = i.flag ? w.carry >> l & 1 : 0;
        unsigned __int128 r = i.sub ? (unsigned __int128)a - b - c : (unsigned __int128)a + b + c;
        bool out = (r >> (w64 ? 64 : 32)) & 1;
        if (w64) w.r64(i.d0)[l] = (u64)r;
        else w.r32(i.d0)[l] = (u32)r;
        if (i.flag2) w.carry = (w.carry & ~(1u << l)) | (u32)out << l;
    });
}
void testp(Warp& w, const Inst& i, u32 m) {
    u32 r = 0;
    for_lanes(m, [&](int l) {
        int c = i.type == Type::F64 ? std::fpclassify(as_f64(w.r64(i.s0)[l]))
                                    : std::fpclassify(as_f32(w.r32(i.s0)[l]));
        bool v = false;
        switch (i.sub) {
            case 0: v = c != FP_NAN && c != FP_INFINITE; break;
            case 1: v = c == FP_INFINITE; break;
            case 2: v = c != FP_NAN; break;
            case 3: v = c == FP_NAN; break;
            case 4: v = c == FP_NORMAL || c == FP_ZERO ? c == FP_NORMAL : false; break;
            case 5: v = c == FP_SUBNORMAL; break;
        }
        r |= (u32)v << l;
    });
    u32& d = w.pred(i.d0);
    d = (d & ~m) | r;
}
void copysign32(Warp& w, const Inst& i, u32 m) {
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1);
    for_lanes(m, [=](int l) { d[l] = (b[l] & 0x7fffffffu) | (a[l] & 0x80000000u); });
}
void copysign64(Warp& w, const Inst& i, u32 m) {
    u64 *d = w.r64(i.d0), *a = w.r64(i.s0), *b = w.r64(i.s1);
    for_lanes(m, [=](int l) { d[l] = (b[l] & ~(1ull << 63)) | (a[l] & (1ull << 63)); });
}
void sign_half(
    Warp& w, const Inst& i,
    u32 m) {  // neg/abs of f16, bf16 and pairs act on the sign bit; sub: mask to clear / flip, flag: flip
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), bits = (u32)i.offset;
    for_lanes(m, [&](int l) { d[l] = i.flag ? a[l] ^ bits : a[l] & ~bits; });
}
// Deterministic perturbation of an approximate f32 result by up to inst.sub2 ulp.
void noisy(Warp& w, u32 off, u32 m, int ulp) {
    u32* d = w.r32(off);
    for_lanes(m, [&](int l) {
        u32 b = d[l], e = b >> 23 & 255;
        if (e == 0 || e >= 254 || (b & 0x7fffff) < 16) return;
        u32 h = b * 2654435761u;
        d[l] = b + (u32)((s32)(h >> 16) % (2 * ulp + 1)) - (u32)ulp;
    });
}
template <Handler H>
void approx(Warp& w, const Inst& i, u32 m) {
    H(w, i, m);
    if (w.cta->launch->options.approx_noise) noisy(w, i.d0, m, i.sub2);
}
template <class OP>
Handler approx_unary(bool ftz) {
    return ftz ? &approx<&unary<F32Ftz, OP>> : &approx<&unary<F32, OP>>;
}

}  // namespace

bool decode_alu(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;

    if (op == "add" || op == "sub" || op == "addc" || op == "subc") {
        bool cc = d.take("cc"), ext = op.size() == 4, sub = op[0] == 's';
        Round r = take_round(d);
        bool ftz = d.take("ftz"), sat = d.take("sat");
        Type t = d.need_type();
        set_operands(d, t, 2);
        if (cc || ext) {
            if (is_float(t) || size_of(t) < 4) d.unsupported("carry type");
            i.sub = sub;
            i.flag = ext;
            i.flag2 = cc;
            i.run = carry_add;
            i.cls = Cls::Int;
            return true;
        }
        Handler h = nullptr;
        if (t == Type::F32)
            h = r == Round::RN ? (sub ? f32_binary<Sub>(ftz, sat) : f32_binary<Add>(ftz, sat))
                               : (sub ? round_binary<SubR>(r, ftz, sat) : round_binary<AddR>(r, ftz, sat));
        else if (t == Type::F64) {
            if (r != Round::RN || ftz || sat) d.unsupported("f64 rounding");
            h = sub ? &binary<F64, Sub> : &binary<F64, Add>;
        } else if (is_half(t)) {
            if (sat || r != Round::RN) d.unsupported("half modifiers");
            h = sub ? half_binary<Sub>(t, ftz) : half_binary<Add>(t, ftz);
        } else if (sat) {
            if (t != Type::S32) d.unsupported("sat type");
            h = sub ? &binary<Int<s32>, SubSat> : &binary<Int<s32>, AddSat>;
        } else {
            if (ftz || r != Round::RN) d.unsupported("integer modifiers");
            h = sub ? int_binary<Sub>(t) : int_binary<Add>(t);
        }
        finish(d, h, class_of(t));
        return true;
    }
    if (op == "mul" || op == "mad" || op == "fma" || op == "mul24" || op == "mad24") {
        if (op.size() > 3) d.unsupported("24-bit multiply");
        bool three = op != "mul", is_fma = op == "fma";
        int part = d.take_one({"lo", "hi", "wide"});
        bool any_round = d.peek("rn") || d.peek("rz") || d.peek("rm") || d.peek("rp");
        Round r = take_round(d);
        bool ftz = d.take("ftz"), sat = d.take("sat"), relu = d.take("relu");
        if (d.peek("cc")) d.unsupported("carry");
        Type t = d.need_type();
        if (part == 2) {
            Type wt = t == Type::S16   ? Type::S32
                      : t == Type::U16 ? Type::U32
                      : t == Type::S32 ? Type::S64
                      : t == Type::U32 ? Type::U64
                                       : Type::None;
            if (wt == Type::None || ftz || sat || any_round) d.unsupported("wide type");
            d.expect(three ? 4 : 3);
            i.d0 = d.dst(0, wt);
            i.s0 = d.src(1, t);
            i.s1 = d.src(2, t);
            if (three) i.s2 = d.src(3, wt);
            Handler h = t == Type::S16   ? (three ? &wide<s16, s32, true> : &wide<s16, s32, false>)
                        : t == Type::U16 ? (three ? &wide<u16, u32, true> : &wide<u16, u32, false>)
                        : t == Type::S32 ? (three ? &wide<s32, s64, true> : &wide<s32, s64, false>)
                                         : (three ? &wide<u32, u64, true> : &wide<u32, u64, false>);
            finish(d, h, Cls::Int);
            return true;
        }
        set_operands(d, t, three ? 3 : 2);
        Handler h = nullptr;
        if (part >= 0) {
            if (is_fma || is_float(t) || ftz || sat || any_round) d.unsupported("integer multiply modifiers");
            if (t == Type::U32 || t == Type::S32 || t == Type::U64 || t == Type::S64 || t == Type::U16 ||
                t == Type::S16)
                h = part == 0 ? (three ? int_ternary<MadLo>(t) : int_binary<Mul>(t))
                              : (three ? int_ternary<MadHi>(t) : int_binary<MulHi>(t));
        } else if (t == Type::F32) {
            if (relu) d.unsupported("relu");
            h = three ? (r == Round::RN ? f32_ternary<Fma>(ftz, sat) : round_ternary<FmaR>(r, ftz, sat))
                      : (r == Round::RN ? f32_binary<Mul>(ftz, sat) : round_binary<MulR>(r, ftz, sat));
        } else if (t == Type::F64) {
            if (r != Round::RN || ftz || sat || relu) d.unsupported("f64 modifiers");
            h = three ? &ternary<F64, Fma> : &binary<F64, Mul>;
        } else if (is_half(t)) {
            if (sat || r != Round::RN || (relu && !three)) d.unsupported("half modifiers");
            h = three ? (relu ? half_ternary<FmaRelu>(t, ftz) : half_ternary<Fma>(t, ftz))
                      : half_binary<Mul>(t, ftz);
        }
        finish(d, h, class_of(t));
        return true;
    }
    if (op == "div" || op == "rem") {
        bool approx = d.take("approx"), full = d.take("full");
        bool rounded = d.peek("rn") || d.peek("rz") || d.peek("rm") || d.peek("rp");
        Round r = take_round(d);
        bool ftz = d.take("ftz");
        Type t = d.need_type();
        set_operands(d, t, 2);
        Handler h = nullptr;
        if (op == "rem") {
            if (!is_float(t) && !ftz && !rounded) h = int_binary<Rem>(t);
        } else if (t == Type::F32) {
            if (!(approx || full || rounded)) d.unsupported("div.f32 without rounding");
            h = r == Round::RN ? f32_binary<Div>(ftz) : round_binary<DivR>(r, ftz, false);
        } else if (t == Type::F64) {
            if (rounded && r == Round::RN && !ftz) h = &binary<F64, Div>;
        } else if (!is_float(t) && !approx && !full && !rounded && !ftz) h = int_binary<Div>(t);
        finish(d, h, approx || full ? Cls::Mufu : class_of(t));
        return true;
    }
    if (op == "min" || op == "max") {
        bool mx = op == "max", ftz = d.take("ftz"), nan = d.take("NaN"), xs = d.take("xorsign");
        if (xs && !d.take("abs")) d.unsupported("xorsign");
        Type t = d.need_type();
        int n = d.count() == 4 ? 3 : 2;
        set_operands(d, t, n);
        Handler h = nullptr;
        if (t == Type::F32) {
            if (n == 3) {
                if (!xs)
                    h = mx ? (nan ? f32_ternary<Three<MaxNaN>>(ftz) : f32_ternary<Three<Max>>(ftz))
                           : (nan ? f32_ternary<Three<MinNaN>>(ftz) : f32_ternary<Three<Min>>(ftz));
            } else if (xs)
                h = mx ? (nan ? f32_binary<Xorsign<MaxNaN>>(ftz) : f32_binary<Xorsign<Max>>(ftz))
                       : (nan ? f32_binary<Xorsign<MinNaN>>(ftz) : f32_binary<Xorsign<Min>>(ftz));
            else
                h = mx ? (nan ? f32_binary<MaxNaN>(ftz) : f32_binary<Max>(ftz))
                       : (nan ? f32_binary<MinNaN>(ftz) : f32_binary<Min>(ftz));
        } else if (n == 3 || xs) d.unsupported("min/max form");
        else if (t == Type::F64) {
            if (!nan && !ftz) h = mx ? &binary<F64, Max> : &binary<F64, Min>;
        } else if (is_half(t))
            h = mx ? (nan ? half_binary<MaxNaN>(t, ftz) : half_binary<Max>(t, ftz))
                   : (nan ? half_binary<MinNaN>(t, ftz) : half_binary<Min>(t, ftz));
        else if (!ftz && !nan) h = mx ? int_binary<Max>(t) : int_binary<Min>(t);
        finish(d, h, class_of(t));
        return true;
    }
    if (op == "neg" || op == "abs") {
        bool neg = op == "neg", ftz = d.take("ftz");
        Type t = d.need_type();
        set_operands(d, t, 1);
        Handler h = nullptr;
        if (t == Type::F32) h = neg ? f32_unary<Neg>(ftz) : f32_unary<Abs>(ftz);
        else if (t == Type::F64) h = neg ? &unary<F64, Neg> : &unary<F64, Abs>;
        else if (is_half(t)) {
            if (ftz && t != Type::F16 && t != Type::F16x2) d.unsupported("ftz");
            if (ftz) h = neg ? half_unary<Neg>(t, true) : half_unary<Abs>(t, true);
            else {
                i.flag = neg;
                i.offset = is_packed(t) ? 0x80008000u : 0x8000u;
                h = sign_half;
            }
        } else if (is_signed(t) && !ftz) h = neg ? int_unary<Neg>(t) : int_unary<Abs>(t);
        finish(d, h, class_of(t));
        return true;
    }
    if (op == "copysign") {
        Type t = d.need_type();
        set_operands(d, t, 2);
        finish(d, t == Type::F32 ? copysign32 : t == Type::F64 ? copysign64 : nullptr, class_of(t));
        return true;
    }
    if (op == "sad") {
        Type t = d.need_type();
        set_operands(d, t, 3);
        finish(d, is_float(t) ? nullptr : int_ternary<Sad>(t), Cls::Int);
        return true;
    }

    if (op == "rcp" || op == "sqrt" || op == "rsqrt" || op == "ex2" || op == "lg2" || op == "sin" ||
        op == "cos" || op == "tanh") {
        bool approx = d.take("approx");
        bool rounded = d.peek("rn") || d.peek("rz") || d.peek("rm") || d.peek("rp");
        Round r = take_round(d);
        bool ftz = d.take("ftz");
        Type t = d.need_type();
        set_operands(d, t, 1);
        Handler h = nullptr;
        if (r != Round::RN) d.unsupported("rounding mode");
        if (approx == rounded) d.unsupported("needs .approx or .rn");
        i.sub2 = op == "tanh" ? 255 : op == "rcp" ? 1 : 2;  // documented error in ulp, for approx_noise
        if (t == Type::F32 && approx)
            h = op == "rcp"     ? approx_unary<Rcp>(ftz)
                : op == "sqrt"  ? approx_unary<Sqrt>(ftz)
                : op == "rsqrt" ? approx_unary<Rsqrt>(ftz)
                : op == "ex2"   ? approx_unary<Ex2>(ftz)
                : op == "lg2"   ? approx_unary<Lg2>(ftz)
                : op == "sin"   ? f32_unary<Sin>(ftz)
                : op == "cos"   ? f32_unary<Cos>(ftz)
                : ftz           ? nullptr
                                : approx_unary<Tanh>(false);
        else if (t == Type::F32)
            h = op == "rcp" ? f32_unary<Rcp>(ftz) : op == "sqrt" ? f32_unary<Sqrt>(ftz) : nullptr;
        else if (t == Type::F64 && rounded && !ftz)
            h = op == "rcp" ? &unary<F64, Rcp> : op == "sqrt" ? &unary<F64, Sqrt> : nullptr;
        else if (t == Type::F64 && approx && (ftz || op == "rsqrt"))
            h = op == "rcp"     ? &unary<F64, Upper32<Rcp>>
                : op == "rsqrt" ? (ftz ? &unary<F64, Upper32<Rsqrt>> : &unary<F64, Rsqrt>)
                                : nullptr;
        else if (is_half(t) && approx && (op == "ex2" || op == "tanh")) {
            bool bf = t == Type::BF16 || t == Type::BF16x2;
            if (ftz && !bf) d.unsupported("ftz");
            h = op == "ex2" ? half_unary<Ex2>(t, false) : half_unary<Tanh>(t, false);
        }
        finish(d, h, t == Type::F64 && !approx ? Cls::Fp64 : Cls::Mufu);
        return true;
    }

    if (op == "and" || op == "or" || op == "xor") {
        Type t = d.need_type();
        set_operands(d, t, 2);
        Handler h = t == Type::Pred ? (op == "and"  ? &pred_binary<And>
                                       : op == "or" ? &pred_binary<Or>
                                                    : &pred_binary<Xor>)
                                    : (op == "and"  ? bits_binary<And>(t)
                                       : op == "or" ? bits_binary<Or>(t)
                                                    : bits_binary<Xor>(t));
        finish(d, h, Cls::Int);
        return true;
    }
    if (op == "not" || op == "cnot" || op == "brev") {
        Type t = d.need_type();
        set_operands(d, t, 1);
        Handler h = op == "not"      ? (t == Type::Pred ? &pred_not : bits_unary<Not>(t))
                    : op == "cnot"   ? bits_unary<Cnot>(t)
                    : t == Type::B16 ? nullptr
                                     : bits_unary<Brev>(t);
        finish(d, h, Cls::Int);
        return true;
    }
    if (op == "shl" || op == "shr") {
        Type t = d.need_type();
        d.expect(3);
        i.d0 = d.dst(0, t);
        i.s0 = d.src(1, t);
        i.s1 = d.src(2, Type::U32);
        Handler h = nullptr;
        if (op == "shl") switch (t) {
                case Type::B16: h = &shl<Int<u16>>; break;
                case Type::B32: h = &shl<Int<u32>>; break;
                case Type::B64: h = &shl<Int<u64>>; break;
                default: break;
            }
        else switch (t) {
                case Type::B16:
                case Type::U16: h = &shr<Int<u16>>; break;
                case Type::B32:
                case Type::U32: h = &shr<Int<u32>>; break;
                case Type::B64:
                case Type::U64: h = &shr<Int<u64>>; break;
                case Type::S16: h = &shr<Int<s16>>; break;
                case Type::S32: h = &shr<Int<s32>>; break;
                case Type::S64: h = &shr<Int<s64>>; break;
                default: break;
            }
        finish(d, h, Cls::Int);
        return true;
    }
    if (op == "shf") {
        i.flag = d.take_one({"r", "l"}) == 1;
        i.flag2 = d.take_one({"clamp", "wrap"}) == 1;
        if (d.need_type() != Type::B32) d.unsupported("type");
        d.expect(4);
        i.d0 = d.dst(0, Type::B32);
        i.s0 = d.src(1, Type::B32);
        i.s1 = d.src(2, Type::B32);
        i.s2 = d.src(3, Type::B32);
        finish(d, shf, Cls::Int);
        return true;
    }
    if (op == "lop3") {
        if (d.need_type() != Type::B32) d.unsupported("type");
        d.expect(5);
        i.d0 = d.dst(0, Type::B32);
        i.s0 = d.src(1, Type::B32);
        i.s1 = d.src(2, Type::B32);
        i.s2 = d.src(3, Type::B32);
        i.offset = (s64)d.immediate(d.operand(4));
        finish(d, lop3, Cls::Int);
        return true;
    }
    if (op == "prmt") {
        if (d.need_type() != Type::B32) d.unsupported("type");
        i.sub = (u8)d.take_one({"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, 0);
        set_operands(d, Type::B32, 3);
        finish(d, prmt, Cls::Int);
        return true;
    }
    if (op == "popc" || op == "clz") {
        Type t = d.need_type();
        if (t != Type::B32 && t != Type::B64) d.unsupported("type");
        d.expect(2);
        i.sub = (u8)size_of(t);
        i.d0 = d.dst(0, Type::U32);
        i.s0 = d.src(1, t);
        finish(d, op == "popc" ? popc : clz, Cls::Int);
        return true;
    }
    if (op == "bfind") {
        i.flag = d.take("shiftamt");
        Type t = d.need_type();
        if (is_float(t) || size_of(t) < 4) d.unsupported("type");
        d.expect(2);
        i.type = t;
        i.d0 = d.dst(0, Type::U32);
        i.s0 = d.src(1, t);
        finish(d, bfind, Cls::Int);
        return true;
    }
    if (op == "bfe" || op == "bfi") {
        Type t = d.need_type();
        if (is_float(t) || size_of(t) < 4) d.unsupported("type");
        bool ins = op == "bfi";
        d.expect(ins ? 5 : 4);
        i.type = t;
        i.d0 = d.dst(0, t);
        i.s0 = d.src(1, t);
        if (ins) {
            i.s1 = d.src(2, t);
            i.s2 = d.src(3, Type::U32);
            i.s3 = d.src(4, Type::U32);
        } else {
            i.s1 = d.src(2, Type::U32);
            i.s2 = d.src(3, Type::U32);
        }
        finish(d, ins ? bfi : bfe, Cls::Int);
        return true;
    }
    if (op == "dp4a") {
        Type a = d.need_type(), b = d.need_type();
        i.flag = a == Type::S32;
        i.flag2 = b == Type::S32;
        set_operands(d, Type::U32, 3);
        finish(d, dp4a, Cls::Int);
        return true;
    }
    if (op == "testp") {
        i.sub = (u8)d.take_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
        Type t = d.need_type();
        if (i.sub > 5 || (t != Type::F32 && t != Type::F64)) d.unsupported("testp form");
        d.expect(2);
        i.type = t;
        i.d0 = d.dst(0, Type::Pred);
        i.s0 = d.src(1, t);
        finish(d, testp, Cls::Other);
        return true;
    }
    if (op == "setp") {
        int c = take_compare(d);
        i.sub2 = (u8)(d.take_one({"and", "or", "xor"}) + 1);
        bool ftz = d.take("ftz");
        Type t = d.need_type();
        d.expect(i.sub2 ? 4 : 3);
        const Operand& p = d.operand(0);
        i.d0 = d.dst(p, Type::Pred);
        if (!p.pair.empty()) {
            i.d1 = d.dst(p.pair[0], Type::Pred);
            i.flag2 = true;
        }
        i.s0 = d.src(1, t);
        i.s1 = d.src(2, t);
        if (i.sub2) {
            Operand q = d.operand(3);
            i.flag = q.negated;
            q.negated = false;
            i.s2 = d.src(q, Type::Pred);
        }
        Handler h;
        if (is_packed(t)) {
            if (!i.flag2) d.unsupported("setp.x2 needs p|q");
            h = t == Type::F16x2 ? ftz ? setp2_handler<F16Ftz>(c) : setp2_handler<F16>(c)
                : ftz            ? nullptr
                                 : setp2_handler<BF16>(c);
        } else h = setp_handler(t, c, ftz);
        finish(d, h, class_of(t));
        return true;
    }
    if (op == "set") {
        int c = take_compare(d);
        bool ftz = d.take("ftz");
        if (d.peek("and") || d.peek("or") || d.peek("xor")) d.unsupported("set with a boolean operator");
        Type dt = d.need_type(), t = d.need_type();
        d.expect(3);
        Handler h = nullptr;
        i.d0 = d.dst(0, dt);
        i.s0 = d.src(1, t);
        i.s1 = d.src(2, t);
        if (is_packed(t)) {
            i.sub = dt == Type::F16x2 ? 2 : dt == Type::BF16x2 ? 3 : 0;
            if (dt != Type::F16x2 && dt != Type::BF16x2 && dt != Type::U32 && dt != Type::S32 &&
                dt != Type::B32)
                d.unsupported("set type");
            h = t == Type::F16x2 ? ftz ? set2_handler<F16Ftz>(c) : set2_handler<F16>(c)
                : ftz            ? nullptr
                                 : set2_handler<BF16>(c);
        } else {
            i.sub = dt == Type::F32    ? 1
                    : dt == Type::F16  ? 2
                    : dt == Type::BF16 ? 3
                    : size_of(dt) == 2 ? 4
                                       : 0;
            if (size_of(dt) == 8 || is_packed(dt)) d.unsupported("set type");
            h = set_handler(t, c, ftz);
        }
        finish(d, h, class_of(t));
        return true;
    }
    if (op == "selp") {
        Type t = d.need_type();
        d.expect(4);
        i.d0 = d.dst(0, t);
        i.s0 = d.src(1, t);
        i.s1 = d.src(2, t);
        i.s2 = d.src(3, Type::Pred);
        finish(d, t == Type::Pred ? nullptr : size_of(t) == 8 ? &selp<u64> : &selp<u32>, Cls::Int);
        return true;
    }
    if (op == "slct") {
        bool ftz = d.take("ftz");
        Type t = d.need_type(), c = d.need_type();
        if ((c != Type::S32 && c != Type::F32) || ftz) d.unsupported("slct type");
        d.expect(4);
        i.d0 = d.dst(0, t);
        i.s0 = d.src(1, t);
        i.s1 = d.src(2, t);
        i.s2 = d.src(3, c);
        bool f = c == Type::F32, w = size_of(t) == 8;
        finish(d,
               w   ? f ? &slct<u64, true> : &slct<u64, false>
               : f ? &slct<u32, true>
                   : &slct<u32, false>,
               Cls::Int);
        return true;
    }
    if (op == "mov") {
        Type t = d.need_type();
        d.expect(2);
        const Operand &to = d.operand(0), &from = d.operand(1);
        i.type = t;
        i.sub2 = (u8)size_of(t);
        if (t == Type::Pred) {
            i.d0 = d.dst(to, t);
            i.s0 = d.src(from, t);
            finish(d, pred_mov, Cls::Int);
            return true;
        }
        if (t == Type::B128) d.unsupported("mov.b128");
        auto element = [&](size_t n) {
            int e = size_of(t) / (int)n;
            if (e < 1 || e * (int)n != size_of(t)) d.unsupported("vector size");
            i.sub = (u8)e;
            return e == 1 ? Type::B8 : e == 2 ? Type::B16 : e == 4 ? Type::B32 : Type::B64;
        };
        if (to.kind == Operand::Vector) {
            Type e = element(to.elems.size());
            for (auto& o : to.elems) i.d.push_back(d.is_sink(o) ? ~0u : d.dst(o, e));
            i.s0 = d.src(from, t);
            finish(d, unpack, Cls::Int);
        } else if (from.kind == Operand::Vector) {
            Type e = element(from.elems.size());
            for (auto& o : from.elems) i.s.push_back(d.src(o, e));
            i.d0 = d.dst(to, t);
            finish(d, pack, Cls::Int);
        } else if (from.name == "%clock" || from.name == "%clock_hi" || from.name == "%clock64" ||
                   from.name == "%globaltimer" || from.name == "%globaltimer_lo") {
            i.d0 = d.dst(to, t);
            i.sub = (u8)size_of(t);
            finish(d, clock_read, Cls::Other);
        } else {
            i.d0 = d.dst(to, t);
            i.s0 = d.src(from, t);
            finish(d, size_of(t) == 8 ? &mov<u64> : &mov<u32>, Cls::Int);
        }
        return true;
    }
    return false;
}

}  // namespace ptx
