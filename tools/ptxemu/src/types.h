// types.h - PTX fundamental types (PTX ISA "Types") and the bit-level number formats behind them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

enum class Type : u8 {
    None,
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    BF16,
    F32,
    F64,
    F16x2,
    BF16x2,
    TF32,
    E4M3,
    E5M2,
    E4M3x2,
    E5M2x2,
};

Type type_from_name(const std::string& name);  // Type::None when the name is not a type
const char* type_name(Type t);

inline int size_of(Type t) {
    switch (t) {
        case Type::B8:
        case Type::U8:
        case Type::S8:
        case Type::E4M3:
        case Type::E5M2: return 1;
        case Type::B16:
        case Type::U16:
        case Type::S16:
        case Type::F16:
        case Type::BF16:
        case Type::E4M3x2:
        case Type::E5M2x2: return 2;
        case Type::B64:
        case Type::U64:
        case Type::S64:
        case Type::F64: return 8;
        case Type::B128: return 16;
        default: return 4;
    }
}
inline bool is_signed(Type t) { return t == Type::S8 || t == Type::S16 || t == Type::S32 || t == Type::S64; }
inline bool is_float(Type t) { return t >= Type::F16; }
inline bool is_scalar_float(Type t) {
    return t == Type::F16 || t == Type::BF16 || t == Type::F32 || t == Type::F64;
}

template <class To, class From>
inline To bit_cast(From f) {
    static_assert(sizeof(To) == sizeof(From));
    To t;
    memcpy(&t, &f, sizeof t);
    return t;
}
inline float as_f32(u32 b) { return bit_cast<float>(b); }
inline u32 as_bits(float f) { return bit_cast<u32>(f); }
inline double as_f64(u64 b) { return bit_cast<double>(b); }
inline u64 as_bits(double d) { return bit_cast<u64>(d); }

// IEEE binary16 and bfloat16, round to nearest even. NaNs become the canonical NaN of the PTX ISA (0x7fff).
inline float half_to_float(u32 h) { return (float)bit_cast<_Float16>((u16)h); }
inline u32 float_to_half(float f) { return f != f ? 0x7fffu : bit_cast<u16>((_Float16)f); }
inline u32 double_to_half(double d) { return d != d ? 0x7fffu : bit_cast<u16>((_Float16)d); }
inline float bf16_to_float(u32 h) { return as_f32(h << 16); }
inline u32 float_to_bf16(float f) {
    u32 b = as_bits(f);
    return f != f ? 0x7fffu : (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
}
// Round-to-odd to f32 first, so that the second rounding (to 8 bits) is correct for any double.
inline u32 double_to_bf16(double d) {
    float f = (float)d;
    if (d == d && !std::isinf(f) && (double)f != d) {
        u32 b = as_bits(f);
        if (std::fabs((double)f) > std::fabs(d)) b -= 1;  // now truncated
        f = as_f32(b | 1);
    }
    return float_to_bf16(f);
}

inline float flush(float f) { return std::fabs(f) < 1.17549435e-38f ? std::copysign(0.0f, f) : f; }

// Directed rounding of the exact value s + e (|e| far below |s|) to f32.
enum class Round : u8 { RN, RZ, RM, RP };
inline float round_f32(double s, double e, Round mode) {
    float f = (float)s;
    if (mode == Round::RN || f != f || std::isinf(s)) return f;
    double diff = std::isinf(f) ? (f > 0 ? -1.0 : 1.0) : s - (double)f;
    if (diff == 0) diff = e;
    bool down = mode == Round::RM || (mode == Round::RZ && (s > 0 || (s == 0 && e > 0)));
    bool up = mode == Round::RP || (mode == Round::RZ && (s < 0 || (s == 0 && e < 0)));
    if (down && diff < 0) return std::nextafter(f, -INFINITY);
    if (up && diff > 0) return std::nextafter(f, INFINITY);
    return f;
}

// Zero- or sign-extension of the low size_of(t) bytes to 64 bits.
inline u64 extend(u64 v, Type t) {
    switch (t) {
        case Type::S8: return (u64)(s64)(s8)v;
        case Type::S16: return (u64)(s64)(s16)v;
        case Type::S32: return (u64)(s64)(s32)v;
        default: break;
    }
    int n = size_of(t);
    return n >= 8 ? v : v & ((1ull << (8 * n)) - 1);
}

}  // namespace ptx
