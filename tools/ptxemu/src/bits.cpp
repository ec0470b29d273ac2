// bits.cpp - logic, shifts, bit fields, permutations.
#include "alu_dispatch.h"

namespace ptx {
using namespace alu;
namespace {

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

void decode_logic(Decoder& d) {
    const std::string& op = d.op();
    Type t = d.need_type();
    set_operands(d, t, 2);
    Handler h = t == Type::Pred ? (op == "and"  ? &pred_binary<And>
                                   : op == "or" ? &pred_binary<Or>
                                                : &pred_binary<Xor>)
                                : (op == "and"  ? bits_binary<And>(t)
                                   : op == "or" ? bits_binary<Or>(t)
                                                : bits_binary<Xor>(t));
    finish(d, h, Cls::Int);
}

void decode_invert(Decoder& d) {
    const std::string& op = d.op();
    Type t = d.need_type();
    set_operands(d, t, 1);
    Handler h = op == "not"      ? (t == Type::Pred ? &pred_not : bits_unary<Not>(t))
                : op == "cnot"   ? bits_unary<Cnot>(t)
                : t == Type::B16 ? nullptr
                                 : bits_unary<Brev>(t);
    finish(d, h, Cls::Int);
}

void decode_shift(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
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
}

void decode_shf(Decoder& d) {
    Inst& i = d.inst;
    i.flag = d.take_one({"r", "l"}) == 1;
    i.flag2 = d.take_one({"clamp", "wrap"}) == 1;
    if (d.need_type() != Type::B32) d.unsupported("type");
    d.expect(4);
    i.d0 = d.dst(0, Type::B32);
    i.s0 = d.src(1, Type::B32);
    i.s1 = d.src(2, Type::B32);
    i.s2 = d.src(3, Type::B32);
    finish(d, shf, Cls::Int);
}

void decode_lop3(Decoder& d) {
    Inst& i = d.inst;
    if (d.need_type() != Type::B32) d.unsupported("type");
    d.expect(5);
    i.d0 = d.dst(0, Type::B32);
    i.s0 = d.src(1, Type::B32);
    i.s1 = d.src(2, Type::B32);
    i.s2 = d.src(3, Type::B32);
    i.offset = (s64)d.immediate(d.operand(4));
    finish(d, lop3, Cls::Int);
}

void decode_prmt(Decoder& d) {
    Inst& i = d.inst;
    if (d.need_type() != Type::B32) d.unsupported("type");
    i.sub = (u8)d.take_one({"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, 0);
    set_operands(d, Type::B32, 3);
    finish(d, prmt, Cls::Int);
}

void decode_count_bits(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
    Type t = d.need_type();
    if (t != Type::B32 && t != Type::B64) d.unsupported("type");
    d.expect(2);
    i.sub = (u8)size_of(t);
    i.d0 = d.dst(0, Type::U32);
    i.s0 = d.src(1, t);
    finish(d, op == "popc" ? popc : clz, Cls::Int);
}

void decode_bfind(Decoder& d) {
    Inst& i = d.inst;
    i.flag = d.take("shiftamt");
    Type t = d.need_type();
    if (is_float(t) || size_of(t) < 4) d.unsupported("type");
    d.expect(2);
    i.type = t;
    i.d0 = d.dst(0, Type::U32);
    i.s0 = d.src(1, t);
    finish(d, bfind, Cls::Int);
}

void decode_bit_field(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
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
}

const Family family = {
    {"and", decode_logic}, {"or", decode_logic}, {"xor", decode_logic}, {"not", decode_invert},
    {"cnot", decode_invert}, {"brev", decode_invert}, {"shl", decode_shift}, {"shr", decode_shift},
    {"shf", decode_shf}, {"lop3", decode_lop3}, {"prmt", decode_prmt}, {"popc", decode_count_bits},
    {"clz", decode_count_bits}, {"bfind", decode_bfind}, {"bfe", decode_bit_field},
    {"bfi", decode_bit_field},
};

}  // namespace

bool decode_bits(Decoder& d) { return decode_of(family, d); }

}  // namespace ptx
