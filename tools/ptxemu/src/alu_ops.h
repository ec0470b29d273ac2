// alu_ops.h - the arithmetic operations on values, one struct each.
#pragma once
#include <algorithm>
#include "alu_types.h"
#include "decode.h"
#include "machine.h"

namespace ptx::alu {

// --- operations
// -----------------------------------------------------------------------------------------------------
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
inline u64 MulHi::f<u64>(u64 a, u64 b) {
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

}  // namespace ptx::alu
