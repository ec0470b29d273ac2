// compare.cpp - setp, set, selp, slct.
#include "alu_dispatch.h"

namespace ptx {
using namespace alu;
namespace {

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
COMPARE2(setp2_handler, setp2)
COMPARE2(set2_handler, set2)
int take_compare(Decoder& d) {
    int c = d.take_one({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu",
                        "leu", "gtu", "geu", "num", "nan"});
    if (c < 0) d.unsupported("comparison");
    return c;
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

}  // namespace

bool decode_compare(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;

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
    return false;
}

}  // namespace ptx
