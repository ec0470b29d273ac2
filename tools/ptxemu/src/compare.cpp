// compare.cpp - setp, set, selp, slct.
#include <utility>
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
        else if constexpr (C == LT) return a < b;
        else if constexpr (C == LE) return a <= b;
        else if constexpr (C == GT) return a > b;
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
// setp combines the comparison with a predicate c, if there is one (PTX ISA "setp").
inline u32 combine(Warp& w, const Inst& i, u32 r) {
    if (!i.sub2) return r;
    u32 c = w.pred(i.s2) ^ (i.flag ? ~0u : 0);
    return i.sub2 == 1 ? r & c : i.sub2 == 2 ? r | c : r ^ c;
}
inline void set_predicate(Warp& w, u32 register_, u32 m, u32 value) {
    u32& p = w.pred(register_);
    p = (p & ~m) | (value & m);
}
// The lanes whose halves (or whole registers) compare so; in two loops, of which the first is vectorised.
template <class T, int C, class R>
inline u32 lanes_where(const R* a, const R* b, int shift = 0) {
    u32 bit[32], r = 0;
    for (int l = 0; l < 32; l++) bit[l] = (u32)compare<C>(T::get(a[l] >> shift), T::get(b[l] >> shift)) << l;
    for (int l = 0; l < 32; l++) r |= bit[l];
    return r;
}
struct Setp {  // p, or p|q with q from the complement of the comparison
    template <class T, int C>
    static void run(Warp& w, const Inst& i, u32 m) {
        u32 r = lanes_where<T, C>(w.reg<typename T::Reg>(i.s0), w.reg<typename T::Reg>(i.s1));
        u32 p = combine(w, i, r), q = combine(w, i, ~r);
        set_predicate(w, i.d0, m, p);
        if (i.flag2) set_predicate(w, i.d1, m, q);
    }
};
struct Setp2 {  // setp.f16x2: p for the low half, q for the high half
    template <class T, int C>
    static void run(Warp& w, const Inst& i, u32 m) {
        const u32 *a = w.r32(i.s0), *b = w.r32(i.s1);
        u32 p = combine(w, i, lanes_where<T, C>(a, b)), q = combine(w, i, lanes_where<T, C>(a, b, 16));
        set_predicate(w, i.d0, m, p);
        set_predicate(w, i.d1, m, q);
    }
};
// set: a value instead of a predicate; inst.sub: 0 integer (all ones), 1 f32 1.0, 2 f16 1.0, 3 bf16 1.0, 4 16-bit
// integer (packed: each half)
struct Set {
    template <class T, int C>
    static void run(Warp& w, const Inst& i, u32 m) {
        auto* a = w.reg<typename T::Reg>(i.s0);
        auto* b = w.reg<typename T::Reg>(i.s1);
        u32* d = w.r32(i.d0);
        static const u32 one[] = {~0u, 0x3f800000u, 0x3c00u, 0x3f80u, 0xffffu};
        for_lanes(m, [&](int l) { d[l] = compare<C>(T::get(a[l]), T::get(b[l])) ? one[i.sub] : 0; });
    }
};
struct Set2 {
    template <class T, int C>
    static void run(Warp& w, const Inst& i, u32 m) {
        u32 *a = w.r32(i.s0), *b = w.r32(i.s1), *d = w.r32(i.d0);
        static const u32 one[] = {0xffffu, 0, 0x3c00u, 0x3f80u};
        for_lanes(m, [&](int l) {
            u32 x = a[l], y = b[l];
            d[l] = (compare<C>(T::get(x), T::get(y)) ? one[i.sub] : 0) |
                   (compare<C>(T::get(x >> 16), T::get(y >> 16)) ? one[i.sub] << 16 : 0);
        });
    }
};

// F for type T and comparison c: integers have eq to ge and, by other names, lo to hs; floats eq to ge and equ to nan.
template <class F, class T, int... C>
Handler from_table(int c, std::integer_sequence<int, C...>) {
    static constexpr Handler all[] = {&F::template run<T, C>...};
    return c < (int)sizeof...(C) ? all[c] : nullptr;
}
template <class F, class T>
Handler by_comparison(int c) {
    constexpr std::make_integer_sequence<int, GE + 1> ordered{};
    if constexpr (is_int<typename T::Val>) return from_table<F, T>(c >= LO && c <= HS ? c - LO + LT : c, ordered);
    else if (c <= GE) return from_table<F, T>(c, ordered);
    else if (c < EQU) return nullptr;
    else return from_table<F, T>(c - EQU, std::integer_sequence<int, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANC>{});
}
template <class F>
Handler handler_for(Type t, int c, bool ftz) {
    switch (t) {
        case Type::B16:
        case Type::U16: return by_comparison<F, Int<u16>>(c);
        case Type::S16: return by_comparison<F, Int<s16>>(c);
        case Type::B32:
        case Type::U32: return by_comparison<F, Int<u32>>(c);
        case Type::S32: return by_comparison<F, Int<s32>>(c);
        case Type::B64:
        case Type::U64: return by_comparison<F, Int<u64>>(c);
        case Type::S64: return by_comparison<F, Int<s64>>(c);
        case Type::F32: return ftz ? by_comparison<F, F32Ftz>(c) : by_comparison<F, F32>(c);
        case Type::F64: return by_comparison<F, F64>(c);
        case Type::F16: return ftz ? by_comparison<F, F16Ftz>(c) : by_comparison<F, F16>(c);
        case Type::BF16: return by_comparison<F, BF16>(c);
        default: return nullptr;
    }
}
template <class F>
Handler packed_handler_for(Type t, int c, bool ftz) {
    if (t == Type::F16x2) return ftz ? by_comparison<F, F16Ftz>(c) : by_comparison<F, F16>(c);
    return ftz ? nullptr : by_comparison<F, BF16>(c);
}

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

void decode_setp(Decoder& d) {
    Inst& i = d.inst;
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
        h = packed_handler_for<Setp2>(t, c, ftz);
    } else h = handler_for<Setp>(t, c, ftz);
    finish(d, h, class_of(t));
}
void decode_set(Decoder& d) {
    Inst& i = d.inst;
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
        h = packed_handler_for<Set2>(t, c, ftz);
    } else {
        i.sub = dt == Type::F32    ? 1
                : dt == Type::F16  ? 2
                : dt == Type::BF16 ? 3
                : size_of(dt) == 2 ? 4
                                   : 0;
        if (size_of(dt) == 8 || is_packed(dt)) d.unsupported("set type");
        h = handler_for<Set>(t, c, ftz);
    }
    finish(d, h, class_of(t));
}
void decode_selp(Decoder& d) {
    Inst& i = d.inst;
    Type t = d.need_type();
    d.expect(4);
    i.d0 = d.dst(0, t);
    i.s0 = d.src(1, t);
    i.s1 = d.src(2, t);
    i.s2 = d.src(3, Type::Pred);
    finish(d, t == Type::Pred ? nullptr : size_of(t) == 8 ? &selp<u64> : &selp<u32>, Cls::Int);
}
void decode_slct(Decoder& d) {
    Inst& i = d.inst;
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
}

}  // namespace

bool decode_compare(Decoder& d) {
    const std::string& op = d.op();
    if (op == "setp") decode_setp(d);
    else if (op == "set") decode_set(d);
    else if (op == "selp") decode_selp(d);
    else if (op == "slct") decode_slct(d);
    else return false;
    return true;
}

}  // namespace ptx
