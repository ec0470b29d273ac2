// alu_dispatch.h - from a PTX type to the instance of a pattern, and what every family decodes alike.
#pragma once
#include <algorithm>
#include "alu_types.h"
#include "decode.h"
#include "machine.h"

namespace ptx::alu {

// --- type dispatch
// --------------------------------------------------------------------------------------------------
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
INT_HANDLER(int_binary, binary)
INT_HANDLER(int_ternary, ternary)
template <class OP>
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
inline bool is_half(Type t) { return t == Type::F16 || t == Type::BF16 || t == Type::F16x2 || t == Type::BF16x2; }
inline bool is_packed(Type t) { return t == Type::F16x2 || t == Type::BF16x2; }
inline Cls class_of(Type t) {
    return t == Type::F32 ? Cls::Fp32 : t == Type::F64 ? Cls::Fp64 : is_half(t) ? Cls::Fp16 : Cls::Int;
}

inline Round take_round(Decoder& d) {
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

inline void set_operands(Decoder& d, Type t, int n) {
    d.expect(n + 1);
    d.inst.d0 = d.dst(0, t);
    u32* s[] = {&d.inst.s0, &d.inst.s1, &d.inst.s2};
    for (int k = 0; k < n; k++) *s[k] = d.src(k + 1, t);
    d.inst.type = t;
}
inline void finish(Decoder& d, Handler h, Cls c) {
    if (!h) d.unsupported("type");
    d.inst.run = h;
    d.inst.cls = c;
}

}  // namespace ptx::alu
