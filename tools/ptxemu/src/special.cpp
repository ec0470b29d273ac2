// special.cpp - the functions of the special function unit, and testp.
#include "alu_dispatch.h"

namespace ptx {
using namespace alu;
namespace {

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

}  // namespace

bool decode_special(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;

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
    return false;
}

}  // namespace ptx
