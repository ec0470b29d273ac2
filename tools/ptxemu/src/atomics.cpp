// atomics.cpp - atom and red.
#include <algorithm>
#include "memory_access.h"

namespace ptx {
namespace {

enum AtomOp : u8 { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };
u64 atomic_value(const Inst& i, u64 o, u64 v, u64 c) {
    Type t = i.type;
    auto half = [&](auto get, auto put) {
        return (u64)put(get((u32)o & 0xffff) + get((u32)v & 0xffff)) & 0xffff;
    };
    switch (i.sub) {
        case kAdd:
            switch (t) {
                case Type::F32: return as_bits(as_f32((u32)o) + as_f32((u32)v));
                case Type::F64: return as_bits(as_f64(o) + as_f64(v));
                case Type::F16: return half(half_to_float, float_to_half);
                case Type::BF16: return half(bf16_to_float, float_to_bf16);
                case Type::F16x2:
                    return float_to_half(half_to_float(o & 0xffff) + half_to_float(v & 0xffff)) |
                           (u64)float_to_half(half_to_float(o >> 16 & 0xffff) +
                                              half_to_float(v >> 16 & 0xffff))
                               << 16;
                case Type::BF16x2:
                    return float_to_bf16(bf16_to_float(o & 0xffff) + bf16_to_float(v & 0xffff)) |
                           (u64)float_to_bf16(bf16_to_float(o >> 16 & 0xffff) +
                                              bf16_to_float(v >> 16 & 0xffff))
                               << 16;
                default: return o + v;
            }
        case kMin:
        case kMax: {
            bool mx = i.sub == kMax;
            if (is_signed(t)) {
                s64 a = (s64)extend(o, t), b = (s64)extend(v, t);
                return (u64)(mx ? std::max(a, b) : std::min(a, b));
            }
            u64 a = extend(o, t), b = extend(v, t);
            return mx ? std::max(a, b) : std::min(a, b);
        }
        case kAnd: return o & v;
        case kOr: return o | v;
        case kXor: return o ^ v;
        case kExch: return v;
        case kCas: return extend(o, t) == extend(v, t) ? c : o;
        case kInc: return (u32)o >= (u32)v ? 0 : (u32)o + 1;
        default: return (u32)o == 0 || (u32)o > (u32)v ? (u32)v : (u32)o - 1;
    }
}
std::mutex g_atomic[64];
void atom(Warp& w, const Inst& i, u32 m) {  // atom and red; vec > 1: elements are separate atomics
    Addresses A;
    resolve(w, i, m, A);
    const u32 n = size_of(i.type);
    const bool w64 = n == 8;
    auto value = [&](u32 off, int l) { return w64 ? w.r64(off)[l] : (u64)w.r32(off)[l]; };
    for_lanes(m, [&](int l) {
        Space s = A.uniform ? A.first : A.space[l];
        if (s != Space::Global && s != Space::Shared)
            w.fail(FaultKind::OutOfBounds, "atomic outside global and shared memory", l, true, A.a[l]);
        for (u32 k = 0; k < i.vec; k++) {
            u64 a = A.a[l] + n * k;
            u8* p;
            if (s == Space::Global) {
                if (w.cta->kernel->gpu_fences) global_release(w, a);
                global_atomic(w, l, a, n, k ? n : n * i.vec);
                p = (u8*)a;
            } else {
                w.cta->shared.check(w, l, a, n, k ? n : n * i.vec);
                w.cta->shared.atomic(w, l, (u32)a, n);
                p = w.cta->shared.data() + a;
            }
            std::lock_guard<std::mutex> g(g_atomic[a / 16 % 64]);
            u64 o = load_bytes(p, n),
                v = atomic_value(i, o, value(i.s[k], l), i.sub == kCas ? value(i.s[1], l) : 0);
            memcpy(p, &v, n);
            if (i.flag) {
                if (w64) w.r64(i.d[k])[l] = o;
                else w.r32(i.d[k])[l] = (u32)o;
            }
            if (s == Space::Global && w.cta->kernel->gpu_fences) global_acquire(w, a);
        }
    });
    if (A.uniform) count(w, A.first, m, A.a, n * i.vec);
}

// Which operation on which type; what PTX or this model does not have is refused.
void take_operation(Decoder& d) {
    Inst& i = d.inst;
    int o = d.take_one({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
    if (o < 0) d.unsupported("atomic operation");
    d.take("noftz");
    int vec = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
    Type t = d.need_type();
    if (!memory_type(t) && t != Type::F16x2 && t != Type::BF16x2) d.unsupported("atomic type");
    if (is_float(t) && o != kAdd) d.unsupported("atomic type");
    if (size_of(t) == 1 || (size_of(t) == 2 && o != kCas && !is_float(t)) ||
        ((o == kInc || o == kDec) && t != Type::U32))
        d.unsupported("atomic type");
    if (vec > 1 && (o != kAdd || !is_float(t))) d.unsupported("vector atomic");
    i.type = t;
    i.sub = (u8)o;
    i.vec = (u8)vec;
}

}  // namespace

bool decode_atomics(Decoder& d) {
    if (d.op() != "atom" && d.op() != "red") return false;
    Inst& i = d.inst;
    const bool is_atom = d.op() == "atom";
    if (d.peek("async")) d.unsupported("red.async");
    take_order(d);
    Space space = d.take_space();
    take_cache_hints(d);
    take_operation(d);
    i.flag = is_atom;
    size_t k = 0;
    auto list = [&](const Operand& x, std::vector<u32>& out, bool dst) {
        auto one = [&](const Operand& e) { out.push_back(dst ? d.dst(e, i.type) : d.src(e, i.type)); };
        if (x.kind == Operand::Vector)
            for (auto& e : x.elems) one(e);
        else one(x);
    };
    if (is_atom) {
        if (d.is_sink(d.operand(0))) {
            i.flag = false;
        } else list(d.operand(0), i.d, true);
        k = 1;
    }
    d.address(d.operand(k), space);
    list(d.operand(k + 1), i.s, false);
    if (i.sub == kCas) {
        list(d.operand(k + 2), i.s, false);
        d.expect(k + 3);
    } else if (d.count() == k + 3) d.src(d.operand(k + 2), Type::B64);
    else d.expect(k + 2);
    if (i.sub != kCas && i.s.size() != i.vec) d.unsupported("vector size");
    i.run = atom;
    mark_access(d, space, size_of(i.type));
    i.cls = Cls::Atomic;
    bool exact = !is_float(i.type) && i.sub != kExch && i.sub != kCas && !i.flag;
    if (space != Space::Shared && !exact) d.b.kernel.order_sensitive = true;
    return true;
}

}  // namespace ptx
