// memory_ops.cpp - ld, st, atom, red, cvta, cp.async, fences: address resolution, then memory.cpp checks,
// then the bytes.
#include <algorithm>
#include "decode.h"
#include "machine.h"

namespace ptx {
namespace {

// Addresses of the active lanes. Generic addresses are resolved per lane; a warp may mix spaces (rare).
struct Addresses {
    u64 a[32];
    Space space[32];
    bool uniform;
    Space first;
};

inline void gather(Warp& w, const Inst& i, u32 m, u64* out) {
    s64 off = i.offset;
    if (i.flag2) {
        u32* b = w.r32(i.base);
        for_lanes(m, [=](int l) { out[l] = (u64)b[l] + off; });
        if (i.space == Space::Shared || i.space == Space::Local)
            for_lanes(m, [=](int l) { out[l] &= 0xffffffff; });
    } else {
        u64* b = w.r64(i.base);
        for_lanes(m, [=](int l) { out[l] = b[l] + off; });
    }
    if (i.space == Space::Shared)
        for_lanes(m, [=](int l) {
            if ((out[l] & kWindowMask) == kSharedWindow) out[l] &= ~kWindowMask;
        });
}
inline Space classify(u64& a) {
    switch (a & kWindowMask) {
        case kSharedWindow: a &= ~kWindowMask; return Space::Shared;
        case kLocalWindow: a &= ~kWindowMask; return Space::Local;
        case kParamWindow: a &= ~kWindowMask; return Space::Param;
        default: return Space::Global;
    }
}
inline void resolve(Warp& w, const Inst& i, u32 m, Addresses& A) {
    gather(w, i, m, A.a);
    if (i.space != Space::Generic) {
        A.uniform = true;
        A.first = i.space;
        return;
    }
    A.uniform = true;
    A.first = Space::Generic;
    for_lanes(m, [&](int l) {
        A.space[l] = classify(A.a[l]);
        if (A.first == Space::Generic) A.first = A.space[l];
        else if (A.first != A.space[l]) A.uniform = false;
    });
}

u8* local_pointer(Warp& w, const Inst& i, int lane, u64 a, u32 n) {
    (void)i;
    u32 size = w.cta->kernel->local_bytes;
    if (a + n > size)
        w.fail(FaultKind::OutOfBounds,
               "local access beyond the " + std::to_string(size) + " bytes of the thread", lane, true, a);
    if (a & (n - 1))
        w.fail(FaultKind::Misaligned, "local access is not aligned to " + std::to_string(n), lane, true, a);
    return w.cta->local.data() + (size_t)size * (w.thread0 + lane) + a;
}

// Count a request; lanes of one space only.
void count(Warp& w, Space s, u32 m, const u64* a, u32 n) {
    if (s == Space::Global) count_global(w, m, a, n);
    else if (s == Space::Shared) {
        u32 x[32];
        for_lanes(m, [&](int l) { x[l] = (u32)a[l]; });
        count_shared(w, m, x, n);
    }
}

inline u64 load_bytes(const u8* p, u32 n) {
    u64 v = 0;
    switch (n) {
        case 1: return *p;
        case 2: {
            u16 x;
            memcpy(&x, p, 2);
            return x;
        }
        case 4: {
            u32 x;
            memcpy(&x, p, 4);
            return x;
        }
        default: memcpy(&v, p, 8); return v;
    }
}
inline void store_reg(Warp& w, u32 off, bool wide, int l, u64 v, Type t) {
    if (wide) w.r64(off)[l] = extend(v, t);
    else w.r32(off)[l] = size_of(t) == 4 ? (u32)v : (u32)extend(v, t);
}

void load_lane(Warp& w, const Inst& i, int l, Space s, u64 a) {
    const u32 n = size_of(i.type), total = n * i.vec;
    const u8* p = nullptr;
    switch (s) {
        case Space::Global:
        case Space::Const:
            global_block(w, i, l, a, total, total);
            global_read(w, i, l, a, total, i.sub2);
            p = (const u8*)a;
            break;
        case Space::Shared:
            w.cta->shared.check(w, i, l, a, total, total);
            w.cta->shared.read(w, i, l, (u32)a, total);
            p = w.cta->shared.data() + a;
            break;
        case Space::Local: p = local_pointer(w, i, l, a, total); break;
        case Space::Param:
            if (a + total > w.cta->launch->params.size())
                w.fail(FaultKind::OutOfBounds, "parameter access", l, true, a);
            p = w.cta->launch->params.data() + a;
            break;
        default: break;
    }
    for (u32 k = 0; k < i.vec; k++)
        if (i.d[k] != ~0u) store_reg(w, i.d[k], i.sub == 8, l, load_bytes(p + n * k, n), i.type);
}
void ld(Warp& w, const Inst& i, u32 m) {
    Addresses A;
    resolve(w, i, m, A);
    for_lanes(m, [&](int l) { load_lane(w, i, l, A.uniform ? A.first : A.space[l], A.a[l]); });
    if (A.uniform) count(w, A.first, m, A.a, size_of(i.type) * i.vec);
    if (i.flag)
        for_lanes(m, [&](int l) {
            if ((A.uniform ? A.first : A.space[l]) == Space::Global) global_acquire(w, A.a[l]);
        });
}
void ld_param(Warp& w, const Inst& i, u32 m) {
    const u32 n = size_of(i.type);
    const u8* p = w.cta->launch->params.data() + i.offset;
    for (u32 k = 0; k < i.vec; k++) {
        u64 v = load_bytes(p + n * k, n);
        for_lanes(m, [&](int l) { store_reg(w, i.d[k], i.sub == 8, l, v, i.type); });
    }
}
void st(Warp& w, const Inst& i, u32 m) {
    Addresses A;
    resolve(w, i, m, A);
    const u32 n = size_of(i.type), total = n * i.vec;
    if (i.flag)
        for_lanes(m, [&](int l) {
            if ((A.uniform ? A.first : A.space[l]) == Space::Global) global_release(w, A.a[l]);
        });
    u8 buf[32][16];
    for (u32 k = 0; k < i.vec; k++) {
        if (i.sub == 8) {
            u64* r = w.r64(i.s[k]);
            for_lanes(m, [&](int l) { memcpy(buf[l] + n * k, &r[l], n); });
        } else {
            u32* r = w.r32(i.s[k]);
            for_lanes(m, [&](int l) { memcpy(buf[l] + n * k, &r[l], n); });
        }
    }
    for_lanes(m, [&](int l) {
        u64 a = A.a[l];
        switch (A.uniform ? A.first : A.space[l]) {
            case Space::Global:
                global_block(w, i, l, a, total, total);
                global_write(w, i, l, a, total, buf[l], i.sub2);
                memcpy((void*)a, buf[l], total);
                break;
            case Space::Shared:
                w.cta->shared.check(w, i, l, a, total, total);
                w.cta->shared.write(w, i, l, (u32)a, total, buf[l]);
                memcpy(w.cta->shared.data() + a, buf[l], total);
                break;
            case Space::Local: memcpy(local_pointer(w, i, l, a, total), buf[l], total); break;
            default: w.fail(FaultKind::OutOfBounds, "store to a read-only space", l, true, a);
        }
    });
    // Two lanes of one instruction writing different values to one address: which one stays is undefined (PTX
    // ISA "st").
    if (m & (m - 1)) {
        bool increasing = true;
        u64 prev = 0;
        bool first = true;
        for_lanes(m, [&](int l) {
            if (!first && A.a[l] < prev + total) increasing = false;
            prev = A.a[l];
            first = false;
        });
        if (!increasing)
            for_lanes(m, [&](int l) {
                Space s = A.uniform ? A.first : A.space[l];
                const u8* p = s == Space::Global   ? (const u8*)A.a[l]
                              : s == Space::Shared ? w.cta->shared.data() + A.a[l]
                                                   : nullptr;
                if (p && memcmp(p, buf[l], total))
                    w.fail(s == Space::Global ? FaultKind::GlobalRace : FaultKind::SharedRace,
                           "two threads of the warp store different values to the same address in one "
                           "instruction",
                           l, true, A.a[l]);
            });
    }
    if (A.uniform) count(w, A.first, m, A.a, total);
}

// --- atomics
// --------------------------------------------------------------------------------------------------------
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
                global_block(w, i, l, a, n, k ? n : n * i.vec);
                if (w.cta->kernel->gpu_fences) { global_release(w, a); }
                global_atomic(w, i, l, a, n);
                p = (u8*)a;
            } else {
                w.cta->shared.check(w, i, l, a, n, k ? n : n * i.vec);
                w.cta->shared.atomic(w, i, l, (u32)a, n);
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

// --- address conversion
// ---------------------------------------------------------------------------------------------
void cvta(Warp& w, const Inst& i, u32 m) {  // sub: window tag in the top byte; flag: .to; sub2: widths
    u64 window = (u64)i.sub << 56;
    for_lanes(m, [&](int l) {
        u64 a = (i.sub2 & 15) == 8 ? w.r64(i.s0)[l] : w.r32(i.s0)[l];
        a = i.flag ? (window ? a & ~kWindowMask : a) : a | window;
        if (i.sub2 >> 4 == 8) w.r64(i.d0)[l] = a;
        else w.r32(i.d0)[l] = (u32)a;
    });
}
void isspacep(Warp& w, const Inst& i, u32 m) {
    u32 r = 0;
    for_lanes(m, [&](int l) {
        u64 a = w.r64(i.s0)[l];
        r |= (u32)(classify(a) == i.space) << l;
    });
    u32& d = w.pred(i.d0);
    d = (d & ~m) | r;
}
void nothing(Warp&, const Inst&, u32) {}

// --- cp.async (PTX ISA "Data Movement: Asynchronous copy")
// ------------------------------------------------------------
void cp_async(Warp& w, const Inst& i,
              u32 m) {  // vec: bytes; s1: src-size register if flag; s2: ignore-src predicate if sub
    u64 dst[32];
    if (i.flag2) {
        u32* b = w.r32(i.base);
        for_lanes(m, [&](int l) { dst[l] = (u32)(b[l] + i.offset); });
    } else {
        u64* b = w.r64(i.base);
        for_lanes(m, [&](int l) { dst[l] = (b[l] + i.offset) & ~kWindowMask; });
    }
    CpAsync op;
    op.mask = m;
    op.size = i.vec;
    u64 src[32];
    u32 from_global = 0;
    for_lanes(m, [&](int l) {
        u64 a = (i.sub2 == 8 ? w.r64(i.s0)[l] : (u64)w.r32(i.s0)[l]) + (u64)i.target;
        u32 n = i.flag ? std::min<u32>(w.r32(i.s1)[l], i.vec) : i.vec;
        if (i.flag && w.r32(i.s1)[l] > i.vec)
            w.fail(FaultKind::OutOfBounds, "cp.async src-size above cp-size", l, true, a);
        if (i.sub && (w.pred(i.s2) >> l & 1)) n = 0;
        if (a & (i.vec - 1))
            w.fail(FaultKind::Misaligned, "cp.async source is not aligned to " + std::to_string(i.vec), l,
                   true, a);
        u8 buf[16] = {};
        if (n) {
            global_block(w, i, l, a, n, 1);
            global_read(w, i, l, a, n);
            memcpy(buf, (void*)a, n);
            from_global |= 1u << l;
        }
        src[l] = a;
        w.cta->shared.check(w, i, l, dst[l], i.vec, i.vec);
        w.cta->shared.write(w, i, l, (u32)dst[l], i.vec, nullptr, kPendingCpAsync);
        memcpy(w.cta->shared.data() + dst[l], buf, i.vec);
        op.addr[l] = (u32)dst[l];
        op.group[l] = w.cp_group[l];
    });
    w.cp_async.push_back(op);
    if (from_global) count_global(w, from_global, src, i.vec);
}
void cp_async_commit(Warp& w, const Inst&, u32 m) {
    for_lanes(m, [&](int l) { w.cp_group[l]++; });
}
void cp_async_wait(Warp& w, const Inst& i,
                   u32 m) {  // offset: number of youngest groups that may stay in flight; -1: wait_all
    for (auto& op : w.cp_async) {
        u32 ready = 0;
        for_lanes(op.mask & m, [&](int l) {
            if (i.offset < 0 || op.group[l] + (u64)i.offset < w.cp_group[l]) ready |= 1u << l;
        });
        for_lanes(ready, [&](int l) { w.cta->shared.complete(w, op.addr[l], op.size); });
        op.mask &= ~ready;
    }
    w.cp_async.erase(
        std::remove_if(w.cp_async.begin(), w.cp_async.end(), [](const CpAsync& o) { return !o.mask; }),
        w.cp_async.end());
}

void take_cache_hints(Decoder& d) {  // performance hints only
    for (auto& r : d.rest()) {
        static const char* hints[] = {"ca",
                                      "cg",
                                      "cs",
                                      "lu",
                                      "cv",
                                      "wb",
                                      "wt",
                                      "nc",
                                      "L1::evict_last",
                                      "L1::evict_first",
                                      "L1::evict_normal",
                                      "L1::evict_unchanged",
                                      "L1::no_allocate",
                                      "L2::evict_last",
                                      "L2::evict_first",
                                      "L2::evict_normal",
                                      "L2::64B",
                                      "L2::128B",
                                      "L2::256B",
                                      "L2::cache_hint"};
        for (auto h : hints)
            if (r == h) d.take(r);
    }
}
// Memory-ordering modifiers: returns bit 0 acquire, bit 1 release, bit 2 strong (PTX ISA "Memory Consistency
// Model").
int take_order(Decoder& d) {
    bool sem = d.take("relaxed"), acq = d.take("acquire"), rel = d.take("release"), both = d.take("acq_rel"),
         vol = d.take("volatile");
    d.take("weak");
    d.take("mmio");
    bool gpu = d.take("gpu"), sys = d.take("sys"), cta = d.take("cta"), cluster = d.take("cluster");
    (void)cluster;
    (void)gpu;
    (void)sys;
    if ((acq || rel || both) && !cta) d.b.kernel.gpu_fences = true;
    return (acq || both ? 1 : 0) | (rel || both ? 2 : 0) | (sem || acq || rel || both || vol ? 4 : 0);
}
bool memory_type(Type t) { return t != Type::None && t != Type::Pred && t != Type::B128 && t <= Type::F64; }

}  // namespace

bool decode_memory(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
    auto mark = [&](Space s, u32 bytes) {
        i.cls = s == Space::Shared                       ? Cls::Shared
                : s == Space::Local                      ? Cls::Local
                : s == Space::Param || s == Space::Const ? Cls::Other
                                                         : Cls::Global;
        if ((s == Space::Global || s == Space::Generic) && bytes < d.b.kernel.granule)
            d.b.kernel.granule = bytes;
    };
    if (op == "ld" || op == "ldu" || op == "st") {
        bool load = op != "st";
        int order = take_order(d);
        Space space = d.take_space();
        take_cache_hints(d);
        int vec = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
        Type t = d.need_type();
        if (!memory_type(t) || vec * size_of(t) > 16) d.unsupported("memory type");
        const Operand &addr = d.operand(load ? 1 : 0), &val = d.operand(load ? 0 : 1);
        if (d.count() > 2) {
            if (d.count() != 3) d.unsupported("operands");
            d.src(d.operand(2), Type::B64);
        }  // cache policy
        i.type = t;
        i.vec = (u8)vec;
        int width = 0;
        auto element = [&](const Operand& o) {
            if (load && d.is_sink(o)) {
                i.d.push_back(~0u);
                return;
            }
            Register r = load ? d.dst_wide(o, t) : d.src_wide(o, t);
            int wd = r.width == 8 ? 8 : 4;
            if (width && width != wd) d.unsupported("mixed register widths");
            width = wd;
            (load ? i.d : i.s).push_back(r.offset);
        };
        if (vec > 1) {
            if (val.kind != Operand::Vector || (int)val.elems.size() != vec) d.unsupported("vector operand");
            for (auto& e : val.elems) element(e);
        } else if (val.kind == Operand::Vector && val.elems.size() == 1) element(val.elems[0]);
        else element(val);
        i.sub = (u8)(width ? width : 4);
        // kernel parameters and call parameters by name
        if (addr.kind == Operand::Address && !addr.imm_base && !d.b.find_register(addr.name)) {
            for (auto& p : d.b.kernel.params)
                if (p.name == addr.name) {
                    if (!load) d.unsupported("store to a kernel parameter");
                    i.offset = p.offset + addr.offset;
                    if (i.offset + vec * size_of(t) > (s64)(p.offset + p.size))
                        d.unsupported("parameter access out of bounds");
                    i.run = ld_param;
                    i.cls = Cls::Other;
                    return true;
                }
            for (auto& s : d.b.scopes)
                if (s.call_params.count(addr.name)) {
                    i.run = nothing;
                    i.cls = Cls::Other;
                    return true;
                }
        }
        if (space == Space::Param) {
            i.space = space;
            d.address(addr, Space::Param);
            i.run = ld;
            i.cls = Cls::Other;
            return true;
        }
        d.address(addr, space);
        if (space == Space::Const) i.space = Space::Global;
        i.flag = load ? order & 1 : (order & 2) != 0;
        i.sub2 = (order & 4) != 0;
        i.run = load ? ld : st;
        mark(space, size_of(t));
        return true;
    }
    if (op == "atom" || op == "red") {
        bool is_atom = op == "atom";
        if (d.peek("async")) d.unsupported("red.async");
        int order = take_order(d);
        (void)order;
        Space space = d.take_space();
        take_cache_hints(d);
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
        i.flag = is_atom;
        size_t k = 0;
        auto list = [&](const Operand& x, std::vector<u32>& out, bool dst) {
            auto one = [&](const Operand& e) { out.push_back(dst ? d.dst(e, t) : d.src(e, t)); };
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
        if (o == kCas) {
            list(d.operand(k + 2), i.s, false);
            d.expect(k + 3);
        } else if (d.count() == k + 3) d.src(d.operand(k + 2), Type::B64);
        else d.expect(k + 2);
        if (o != kCas && (int)i.s.size() != vec) d.unsupported("vector size");
        i.run = atom;
        mark(space, size_of(t));
        i.cls = Cls::Atomic;
        bool exact = !is_float(t) && o != kExch && o != kCas && !i.flag;
        if (space != Space::Shared && !exact) d.b.kernel.order_sensitive = true;
        return true;
    }
    if (op == "cvta") {
        i.flag = d.take("to");
        Space s = d.take_space();
        Type t = d.need_type();
        d.expect(2);
        Register dr = d.dst_wide(d.operand(0), t), sr = d.src_wide(d.operand(1), t);
        i.d0 = dr.offset;
        i.s0 = sr.offset;
        i.sub2 = (u8)(sr.width | dr.width << 4);
        i.sub = s == Space::Shared ? 1 : s == Space::Local ? 2 : s == Space::Param ? 3 : 0;
        if (s == Space::Generic) d.unsupported("cvta space");
        if (size_of(t) != 8) d.unsupported("32-bit cvta");
        i.run = cvta;
        i.cls = Cls::Int;
        return true;
    }
    if (op == "isspacep") {
        i.space = d.take_space();
        if (i.space == Space::Const) d.unsupported("isspacep.const");
        d.expect(2);
        i.d0 = d.dst(0, Type::Pred);
        i.s0 = d.src(1, Type::B64);
        i.run = isspacep;
        i.cls = Cls::Int;
        return true;
    }
    if (op == "prefetch" || op == "prefetchu" || op == "applypriority" || op == "discard") {
        if (op == "discard" || d.peek("tensormap")) d.unsupported("modifier");
        d.take_space();
        take_cache_hints(d);
        d.take("L1");
        d.take("L2");
        d.take("L2::evict_normal");
        i.run = nothing;
        i.cls = Cls::Other;
        return true;
    }
    if (op == "createpolicy") {
        for (auto& r : d.rest()) d.take(r);
        d.dst(0, Type::B64);
        i.run = [](Warp& w, const Inst& i, u32 m) { for_lanes(m, [&](int l) { w.r64(i.d0)[l] = 0; }); };
        i.d0 = d.dst(0, Type::B64);
        i.cls = Cls::Other;
        return true;
    }
    if (op == "membar" || op == "fence") {
        if (d.peek("proxy") || d.peek("mbarrier_init")) return false;  // hopper.cpp
        bool local = d.take("cta");
        d.take("sc");
        d.take("acq_rel");
        d.take("acquire");
        d.take("release");
        if (d.take("gl") || d.take("gpu") || d.take("sys") || d.take("cluster") || !local)
            d.b.kernel.gpu_fences = true;
        i.run = nothing;
        i.cls = Cls::Sync;
        return true;
    }
    if (op == "cp" && d.peek("async") && !d.peek("bulk") && !d.peek("mbarrier")) {
        d.take("async");
        if (d.take("commit_group")) {
            d.expect(0);
            i.run = cp_async_commit;
            i.cls = Cls::Sync;
            return true;
        }
        if (d.take("wait_all")) {
            d.expect(0);
            i.offset = -1;
            i.run = cp_async_wait;
            i.cls = Cls::Sync;
            return true;
        }
        if (d.take("wait_group")) {
            d.expect(1);
            i.offset = (s64)d.immediate(d.operand(0));
            i.run = cp_async_wait;
            i.cls = Cls::Sync;
            return true;
        }
        bool cg = d.take("cg"), ca = d.take("ca");
        if (!(cg || ca) || !(d.take("shared") || d.take("shared::cta")) || !d.take("global"))
            d.unsupported("cp.async form");
        take_cache_hints(d);
        Operand src = d.operand(1);
        d.address(src, Space::Global);
        i.s0 = i.base;
        i.target = (s32)i.offset;
        i.sub2 = i.flag2 ? 4 : 8;
        d.address(d.operand(0), Space::Shared);
        u64 n = d.immediate(d.operand(2));
        if (!(n == 16 || (ca && (n == 4 || n == 8)))) d.unsupported("cp-size");
        i.vec = (u8)n;
        size_t k = 3;
        if (k < d.count()) {
            const Operand& o = d.operand(k);
            const Register* r = o.kind == Operand::Name ? d.b.find_register(o.name) : nullptr;
            if (r && r->width == 1) {
                i.s2 = d.src(o, Type::Pred);
                i.sub = 1;
                k++;
            } else if (!(r && r->width == 8)) {
                i.s1 = d.src(o, Type::B32);
                i.flag = true;
                k++;
            }
        }
        if (k < d.count()) {
            d.src(d.operand(k), Type::B64);
            k++;
        }
        d.expect(k);
        i.run = cp_async;
        i.cls = Cls::Global;
        return true;
    }
    return false;
}

}  // namespace ptx
