// alu_types.h - how a PTX type lives in a register lane, and one template for each operand pattern over it.
#pragma once
#include <algorithm>
#include "decode.h"
#include "machine.h"

namespace ptx::alu {

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

template <class I>
std::make_unsigned_t<I> U(I v) {
    return (std::make_unsigned_t<I>)v;
}
template <class V>
constexpr bool is_int = std::is_integral_v<V>;

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

}  // namespace ptx::alu
