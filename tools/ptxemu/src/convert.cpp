// convert.cpp - cvt in all its forms (PTX ISA "cvt"): integer, float, saturating, packed pairs, tf32, fp8.
#include <algorithm>
#include "decode.h"
#include "machine.h"

namespace ptx {
namespace {

enum Mode : u8 { kNone, kRN, kRZ, kRM, kRP, kRNI, kRZI, kRMI, kRPI, kRNA };

double round_integral(double x, u8 mode) {
    switch (mode) {
        case kRZI:
        case kRZ: return std::trunc(x);
        case kRMI:
        case kRM: return std::floor(x);
        case kRPI:
        case kRP: return std::ceil(x);
        default: return std::nearbyint(x);
    }
}
Round direction(u8 mode) {
    return mode == kRZ ? Round::RZ : mode == kRM ? Round::RM : mode == kRP ? Round::RP : Round::RN;
}

// A double to a small float format with 'mant' explicit mantissa bits, by scaling; used for directed rounding
// and fp8.
u32 to_small(double x, int mant, int exp_bits, u8 mode, bool satfinite, u32 nan, double largest,
             bool has_inf) {
    if (x != x) return nan;
    u32 sign = std::signbit(x) ? 1u << (mant + exp_bits) : 0;
    double a = std::fabs(x);
    int bias = (1 << (exp_bits - 1)) - 1;
    if (std::isinf(a)) {
        if (satfinite) a = largest;
        else if (has_inf) return sign | ((1u << exp_bits) - 1) << mant;
        else return sign | nan;
    }
    int e = a == 0 ? 1 - bias : std::max(std::ilogb(a), 1 - bias);
    double q = std::ldexp(a, mant - e);  // integer significand, exact power-of-two scaling
    bool up = (mode == kRP && !sign) || (mode == kRM && sign);
    double r = mode == kRZ || ((mode == kRP || mode == kRM) && !up) ? std::floor(q)
               : up                                                 ? std::ceil(q)
               : mode == kRNA                                       ? std::floor(q + 0.5)
                                                                    : std::nearbyint(q);
    double v = std::ldexp(r, e - mant);
    if (v > largest) {
        bool inf = has_inf && !satfinite && (mode == kRN || mode == kRNA || up);
        return inf ? sign | ((1u << exp_bits) - 1) << mant
               : !satfinite && !has_inf
                   ? sign | nan
                   : to_small(std::copysign(largest, x), mant, exp_bits, kRN, true, nan, largest, has_inf);
    }
    u64 bits = (u64)r;
    u32 out = bits >= (1ull << mant) ? (u32)(((u64)(e + bias) << mant) + (bits - (1ull << mant))) : (u32)bits;
    return sign | out;
}
u32 to_f16(double x, u8 mode, bool sat) {
    return mode == kRN && !sat ? double_to_half(x) : to_small(x, 10, 5, mode, sat, 0x7fff, 65504, true);
}
u32 to_bf16(double x, u8 mode, bool sat) {
    return mode == kRN && !sat ? double_to_bf16(x)
                               : to_small(x, 7, 8, mode, sat, 0x7fff, 3.3895313892515355e38, true);
}
u32 to_e4m3(double x) { return to_small(x, 3, 4, kRN, true, 0x7f, 448, false); }
u32 to_e5m2(double x) { return to_small(x, 2, 5, kRN, true, 0x7f, 57344, true); }
u32 to_tf32(float f, u8 mode) {  // 10 explicit mantissa bits in an f32 container
    if (f != f) return 0x7fffffff;
    u32 b = as_bits(f);
    if (std::isinf(f)) return b;
    if (mode == kRZ) return b & ~0x1fffu;
    if (mode == kRNA) return (b + 0x1000u) & ~0x1fffu;
    return (b + 0xfffu + (b >> 13 & 1)) & ~0x1fffu;
}
double from_fp8(u32 v, Type t) {
    int mant = t == Type::E4M3 ? 3 : 2, eb = t == Type::E4M3 ? 4 : 5, bias = (1 << (eb - 1)) - 1;
    u32 e = (v >> mant) & ((1u << eb) - 1), f = v & ((1u << mant) - 1);
    double s = v & 0x80 ? -1 : 1;
    if (t == Type::E4M3 && e == 15 && f == 7) return NAN;
    if (t == Type::E5M2 && e == 31) return f ? NAN : s * INFINITY;
    return e ? s * std::ldexp(1.0 + (double)f / (1 << mant), (int)e - bias)
             : s * std::ldexp((double)f / (1 << mant), 1 - bias);
}

double load_float(u64 v, Type t, bool ftz) {
    switch (t) {
        case Type::F32: return ftz ? flush(as_f32((u32)v)) : as_f32((u32)v);
        case Type::F64: return as_f64(v);
        case Type::F16: return half_to_float(v & 0xffff);
        case Type::BF16: return bf16_to_float(v & 0xffff);
        default: return 0;
    }
}
u64 to_integer(double x, Type t, u8 mode) {  // float to integer saturates; NaN gives 0 (PTX ISA "cvt")
    if (x != x) return 0;
    double y = round_integral(x, mode);
    int n = size_of(t) * 8;
    if (is_signed(t)) {
        double hi = std::ldexp(1.0, n - 1);
        s64 v = y >= hi   ? (n == 64 ? INT64_MAX : (s64)hi - 1)
                : y < -hi ? (n == 64 ? INT64_MIN : -(s64)hi)
                          : (s64)y;
        return (u64)v;
    }
    double hi = std::ldexp(1.0, n);
    return y >= hi ? (n == 64 ? ~0ull : (1ull << n) - 1) : y <= 0 ? 0 : (u64)y;
}
u64 saturate_integer(u64 v, Type from, Type to) {
    bool neg = is_signed(from) && (s64)v < 0;
    int n = size_of(to) * 8;
    if (is_signed(to)) {
        s64 hi = n == 64 ? INT64_MAX : (1ll << (n - 1)) - 1, lo = -hi - 1;
        if (neg) return (u64)std::max((s64)v, lo);
        return v > (u64)hi ? (u64)hi : v;
    }
    if (neg) return 0;
    u64 hi = n == 64 ? ~0ull : (1ull << n) - 1;
    return std::min(v, hi);
}
float integer_to_f32(u64 v, bool neg_possible, Round mode) {
    bool neg = neg_possible && (s64)v < 0;
    u64 a = neg ? 0 - v : v;
    double hi = (double)(a >> 32) * 4294967296.0, lo = (double)(a & 0xffffffff);
    double s = hi + lo, e = lo - (s - hi);
    if (neg) {
        s = -s;
        e = -e;
    }
    if (mode == Round::RN) return neg_possible ? (float)(s64)v : (float)v;
    return round_f32(s, e, mode);
}

// The general conversion: s0 -> d0. sub: mode, sub2: width of the source (low 4 bits) and destination
// register; flag: sat, flag2: ftz.
void cvt(Warp& w, const Inst& i, u32 m) {
    const Type dt = i.type, st = i.type2;
    const u8 mode = i.sub;
    const bool sat = i.flag, ftz = i.flag2, relu = i.vec == 2, satfinite = i.offset;
    const bool src64 = (i.sub2 & 15) == 8, dst64 = (i.sub2 >> 4) == 8;
    for_lanes(m, [&](int l) {
        u64 raw = src64 ? w.r64(i.s0)[l] : w.r32(i.s0)[l], out;
        if (is_float(st)) {
            double x = load_float(raw, st, ftz);
            if (!is_float(dt)) out = to_integer(x, dt, mode);
            else {
                if (mode >= kRNI && mode <= kRPI) x = round_integral(x, mode);
                if (sat) x = x != x || x <= 0 ? 0 : x >= 1 ? 1 : x;
                if (relu && x <= 0) x = 0;
                switch (dt) {
                    case Type::F16:
                        out = to_f16(x, mode == kNone || mode >= kRNI ? (u8)kRN : mode, satfinite);
                        break;
                    case Type::BF16:
                        out = to_bf16(x, mode == kNone || mode >= kRNI ? (u8)kRN : mode, satfinite);
                        break;
                    case Type::TF32: out = to_tf32((float)x, mode); break;
                    case Type::F64: out = as_bits(x); break;
                    default: {
                        float f = round_f32(x, 0, direction(mode));
                        if (ftz) f = flush(f);
                        out = f != f ? 0x7fffffffu : as_bits(f);
                    }
                }
            }
        } else {
            u64 v = extend(raw, st);
            if (!is_float(dt)) out = sat ? saturate_integer(v, st, dt) : v;
            else switch (dt) {
                    case Type::F32: out = as_bits(integer_to_f32(v, is_signed(st), direction(mode))); break;
                    case Type::F64: out = as_bits(is_signed(st) ? (double)(s64)v : (double)v); break;
                    case Type::F16:
                        out = to_f16(is_signed(st) ? (double)(s64)v : (double)v, mode, false);
                        break;
                    default: out = to_bf16(is_signed(st) ? (double)(s64)v : (double)v, mode, false);
                }
        }
        // a destination wider than the type is sign- or zero-extended (PTX ISA "Operand Size Exceeding
        // Instruction-Type Size")
        if (dst64) w.r64(i.d0)[l] = extend(out, dt);
        else w.r32(i.d0)[l] = size_of(dt) == 4 ? (u32)out : (u32)extend(out, dt);
    });
}
template <bool BF>
void cvt_pair(Warp& w, const Inst& i, u32 m) {  // cvt.rn.{f16x2,bf16x2}.f32 d, a, b: a high, b low
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1);
    for_lanes(m, [=](int l) {
        float x = as_f32(a[l]), y = as_f32(b[l]);
        d[l] = BF ? float_to_bf16(x) << 16 | float_to_bf16(y) : float_to_half(x) << 16 | float_to_half(y);
    });
}
void cvt_pair_general(Warp& w, const Inst& i, u32 m) {  // other roundings, relu, satfinite, fp8 pairs
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0), *b = w.r32(i.s1);
    auto one = [&](float f) -> u32 {
        double x = f;
        if (i.vec == 2 && x <= 0) x = 0;
        switch (i.type) {
            case Type::F16x2: return to_f16(x, i.sub, i.offset);
            case Type::BF16x2: return to_bf16(x, i.sub, i.offset);
            case Type::E4M3x2: return to_e4m3(x);
            default: return to_e5m2(x);
        }
    };
    int shift = size_of(i.type) * 4;
    for_lanes(m, [&](int l) { d[l] = one(as_f32(a[l])) << shift | one(as_f32(b[l])); });
}
void cvt_fp8_half(Warp& w, const Inst& i, u32 m) {  // between f16x2 and e4m3x2/e5m2x2
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0);
    for_lanes(m, [&](int l) {
        auto fix = [&](double x) { return i.vec == 2 && x <= 0 ? 0.0 : x; };
        if (i.type == Type::F16x2) {
            Type t = i.type2 == Type::E4M3x2 ? Type::E4M3 : Type::E5M2;
            d[l] = double_to_half(fix(from_fp8(a[l] & 255, t))) |
                   double_to_half(fix(from_fp8(a[l] >> 8 & 255, t))) << 16;
        } else {
            double lo = fix(half_to_float(a[l] & 0xffff)), hi = fix(half_to_float(a[l] >> 16));
            d[l] = i.type == Type::E4M3x2 ? to_e4m3(lo) | to_e4m3(hi) << 8 : to_e5m2(lo) | to_e5m2(hi) << 8;
        }
    });
}
// Hot special cases.
void cvt_f32_s32(Warp& w, const Inst& i, u32 m) {
    u32 *d = w.r32(i.d0), *a = w.r32(i.s0);
    for_lanes(m, [=](int l) { d[l] = as_bits((float)(s32)a[l]); });
}
void cvt_s64_s32(Warp& w, const Inst& i, u32 m) {
    u64* d = w.r64(i.d0);
    u32* a = w.r32(i.s0);
    for_lanes(m, [=](int l) { d[l] = (u64)(s64)(s32)a[l]; });
}
void cvt_u64_u32(Warp& w, const Inst& i, u32 m) {
    u64* d = w.r64(i.d0);
    u32* a = w.r32(i.s0);
    for_lanes(m, [=](int l) { d[l] = a[l]; });
}
void cvt_u32_u64(Warp& w, const Inst& i, u32 m) {
    u32* d = w.r32(i.d0);
    u64* a = w.r64(i.s0);
    for_lanes(m, [=](int l) { d[l] = (u32)a[l]; });
}

bool is_pair(Type t) {
    return t == Type::F16x2 || t == Type::BF16x2 || t == Type::E4M3x2 || t == Type::E5M2x2;
}

// Two floats to a pair. In all of these the modifiers are in inst already: sub the mode, flag sat, flag2 ftz,
// offset satfinite, vec 2 with relu.
void decode_packing(Decoder& d) {
    Inst& i = d.inst;
    const Type dt = i.type, st = i.type2;
    const int mode = i.sub;
    const bool relu = i.vec == 2, satfinite = i.offset;
    d.expect(3);
    if (mode == kNone || mode > kRZ || i.flag || i.flag2) d.unsupported("rounding");
    if (size_of(dt) == 2 && (!satfinite || mode != kRN)) d.unsupported("fp8 without satfinite");
    i.d0 = d.dst(0, size_of(dt) == 2 ? Type::B16 : Type::B32);
    i.s0 = d.src(1, st);
    i.s1 = d.src(2, st);
    i.run = mode == kRN && !relu && !satfinite ? (dt == Type::BF16x2 ? &cvt_pair<true> : &cvt_pair<false>)
                                               : &cvt_pair_general;
}

// A pair to a pair: between halves and 8-bit floats.
void decode_pairs(Decoder& d) {
    Inst& i = d.inst;
    const Type dt = i.type, st = i.type2;
    bool ok = (dt == Type::F16x2 && (st == Type::E4M3x2 || st == Type::E5M2x2)) ||
              (st == Type::F16x2 && (dt == Type::E4M3x2 || dt == Type::E5M2x2) && i.offset);
    if (!ok || i.sub != kRN || i.flag || i.flag2) d.unsupported("pair conversion");
    d.expect(2);
    i.d0 = d.dst(0, size_of(dt) == 2 ? Type::B16 : Type::B32);
    i.s0 = d.src(1, size_of(st) == 2 ? Type::B16 : Type::B32);
    i.run = cvt_fp8_half;
}

void decode_tf32(Decoder& d) {
    Inst& i = d.inst;
    const int mode = i.sub;
    if (i.type2 != Type::F32 || (mode != kRNA && mode != kRN && mode != kRZ) || i.flag || i.flag2)
        d.unsupported("tf32 conversion");
    d.expect(2);
    i.d0 = d.dst(0, Type::B32);
    i.s0 = d.src(1, Type::F32);
    i.sub2 = 4 | 4 << 4;
    i.run = cvt;
}

// What PTX does not define has no meaning to execute.
void check_conversion(const Decoder& d, int mode) {
    const Type dt = d.inst.type, st = d.inst.type2;
    const bool sat = d.inst.flag, relu = d.inst.vec == 2, satfinite = d.inst.offset;
    auto known = [](Type t) { return (t >= Type::U8 && t <= Type::S64) || is_scalar_float(t); };
    if (!known(dt) || !known(st)) d.unsupported("conversion");
    bool f2f = is_float(dt) && is_float(st), i2f = is_float(dt) && !is_float(st),
         f2i = !is_float(dt) && is_float(st);
    if (mode == kRNA) d.unsupported("rna");
    if (i2f && (mode < kRN || mode > kRP)) d.unsupported("integer to float needs .rn/.rz/.rm/.rp");
    if (i2f && dt == Type::F64 && size_of(st) == 8 && mode != kRN) d.unsupported("directed rounding to f64");
    if (f2i && mode < kRNI) d.unsupported("float to integer needs an integer rounding");
    if (f2f && size_of(dt) < size_of(st) && (mode < kRN || mode > kRP))
        d.unsupported("narrowing needs a rounding");
    if (f2f && size_of(dt) > size_of(st) && mode != kNone && mode != kRN)
        d.unsupported("widening with rounding");
    if (f2f && dt != st && size_of(dt) == size_of(st) && (mode < kRN || mode > kRP))
        d.unsupported("f16/bf16 needs a rounding");
    if (f2f && dt == st && mode >= kRN && mode <= kRP && !(dt == Type::F32)) d.unsupported("rounding");
    if (dt == Type::F64 && f2f && st != Type::F64 && sat) d.unsupported("sat");
    if (!f2f && !i2f && !f2i && mode != kNone) d.unsupported("rounding of integers");
    if (!f2f && (relu || satfinite)) d.unsupported("relu/satfinite");
    if (i2f && sat) d.unsupported("sat");
}

void decode_scalar(Decoder& d) {
    Inst& i = d.inst;
    const Type dt = i.type, st = i.type2;
    const int mode = i.sub;
    check_conversion(d, mode);
    d.expect(2);
    Register dr = d.dst_wide(d.operand(0), dt), sr = d.src_wide(d.operand(1), st);
    i.d0 = dr.offset;
    i.s0 = sr.offset;
    i.sub2 = (u8)(sr.width | dr.width << 4);
    i.run = cvt;
    if (!i.flag && !i.flag2) {
        if (dt == Type::F32 && st == Type::S32 && mode == kRN && sr.width == 4) i.run = cvt_f32_s32;
        if ((dt == Type::S64 || dt == Type::U64) && st == Type::S32 && sr.width == 4) i.run = cvt_s64_s32;
        if ((dt == Type::S64 || dt == Type::U64) && st == Type::U32 && sr.width == 4) i.run = cvt_u64_u32;
        if ((dt == Type::S32 || dt == Type::U32) && size_of(st) == 8 && !is_float(st) && dr.width == 4)
            i.run = cvt_u32_u64;
    }
}

}  // namespace

bool decode_convert(Decoder& d) {
    if (d.op() != "cvt") return false;
    Inst& i = d.inst;
    if (d.peek("pack")) d.unsupported("cvt.pack");
    int mode = d.take_one({"", "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna"}, 0);
    bool ftz = d.take("ftz"), sat = d.take("sat"), satfinite = d.take("satfinite"), relu = d.take("relu");
    Type dt = d.need_type(), st = d.need_type();
    i.type = dt;
    i.type2 = st;
    i.sub = (u8)mode;
    i.flag = sat;
    i.flag2 = ftz;
    i.offset = satfinite;
    i.vec = relu ? 2 : 1;
    i.cls = Cls::Convert;
    if (is_pair(dt) && st == Type::F32) decode_packing(d);
    else if (is_pair(dt) || is_pair(st)) decode_pairs(d);
    else if (dt == Type::TF32) decode_tf32(d);
    else decode_scalar(d);
    return true;
}

}  // namespace ptx
