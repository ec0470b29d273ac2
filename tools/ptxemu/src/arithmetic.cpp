// arithmetic.cpp - add, subtract, multiply, divide, minimum and maximum, of every type.
#include "alu_dispatch.h"
#include "alu_ops.h"

namespace ptx {
using namespace alu;
namespace {

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

void decode_add(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
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
        i.unread = Unread::Refuses;  // the carry is no register
        i.cls = Cls::Int;
        return;
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
}

void decode_multiply(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
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
        return;
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
}

void decode_divide(Decoder& d) {
    const std::string& op = d.op();
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
}

void decode_min_max(Decoder& d) {
    const std::string& op = d.op();
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
}

void decode_sign(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
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
}

void decode_copysign(Decoder& d) {
    Type t = d.need_type();
    set_operands(d, t, 2);
    finish(d, t == Type::F32 ? copysign32 : t == Type::F64 ? copysign64 : nullptr, class_of(t));
}

void decode_sad(Decoder& d) {
    Type t = d.need_type();
    set_operands(d, t, 3);
    finish(d, is_float(t) ? nullptr : int_ternary<Sad>(t), Cls::Int);
}

void decode_dp4a(Decoder& d) {
    Inst& i = d.inst;
    Type a = d.need_type(), b = d.need_type();
    i.flag = a == Type::S32;
    i.flag2 = b == Type::S32;
    set_operands(d, Type::U32, 3);
    finish(d, dp4a, Cls::Int);
}

const Family family = {
    {"add", decode_add}, {"sub", decode_add}, {"addc", decode_add}, {"subc", decode_add},
    {"mul", decode_multiply}, {"mad", decode_multiply}, {"fma", decode_multiply},
    {"mul24", decode_multiply}, {"mad24", decode_multiply}, {"div", decode_divide},
    {"rem", decode_divide}, {"min", decode_min_max}, {"max", decode_min_max}, {"neg", decode_sign},
    {"abs", decode_sign}, {"copysign", decode_copysign}, {"sad", decode_sad}, {"dp4a", decode_dp4a},
};

}  // namespace

bool decode_arithmetic(Decoder& d) { return decode_of(family, d); }

}  // namespace ptx
