// load_store.cpp - ld and st: address resolution, then the checks of the memory, then the bytes.
#include "memory_access.h"

namespace ptx {
namespace {

u8* local_pointer(Warp& w, int lane, u64 a, u32 n) {
    u32 size = w.cta->kernel->local_bytes;
    if (a + n > size)
        w.fail(FaultKind::OutOfBounds,
               "local access beyond the " + std::to_string(size) + " bytes of the thread", lane, true, a);
    if (a & (n - 1))
        w.fail(FaultKind::Misaligned, "local access is not aligned to " + std::to_string(n), lane, true, a);
    return w.cta->local.data() + (size_t)size * (w.thread0 + lane) + a;
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
            global_read(w, l, a, total, total, i.sub2);
            p = (const u8*)a;
            break;
        case Space::Shared:
            w.cta->shared.check(w, l, a, total, total);
            w.cta->shared.read(w, l, (u32)a, total);
            p = w.cta->shared.data() + a;
            break;
        case Space::Local: p = local_pointer(w, l, a, total); break;
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
// Two lanes of one instruction writing different values to one address: which one stays is undefined (PTX ISA "st").
void check_lanes_agree(Warp& w, u32 m, const Addresses& A, const u8 (*buf)[16], u32 total) {
    bool increasing = true, first = true;
    u64 prev = 0;
    for_lanes(m, [&](int l) {
        if (!first && A.a[l] < prev + total) increasing = false;
        prev = A.a[l];
        first = false;
    });
    if (increasing) return;
    for_lanes(m, [&](int l) {
        Space s = A.uniform ? A.first : A.space[l];
        const u8* p = s == Space::Global   ? (const u8*)A.a[l]
                      : s == Space::Shared ? w.cta->shared.data() + A.a[l]
                                           : nullptr;
        if (p && memcmp(p, buf[l], total))
            w.fail(s == Space::Global ? FaultKind::GlobalRace : FaultKind::SharedRace,
                   "two threads of the warp store different values to the same address in one instruction", l, true,
                   A.a[l]);
    });
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
                global_write(w, l, a, total, total, buf[l], i.sub2);
                memcpy((void*)a, buf[l], total);
                break;
            case Space::Shared:
                w.cta->shared.check(w, l, a, total, total);
                w.cta->shared.write(w, l, (u32)a, total, buf[l]);
                memcpy(w.cta->shared.data() + a, buf[l], total);
                break;
            case Space::Local: memcpy(local_pointer(w, l, a, total), buf[l], total); break;
            default: w.fail(FaultKind::OutOfBounds, "store to a read-only space", l, true, a);
        }
    });
    if (m & (m - 1)) check_lanes_agree(w, m, A, buf, total);
    if (A.uniform) count(w, A.first, m, A.a, total);
}

// The registers of the value, a vector or one.
void take_elements(Decoder& d, const Operand& value, bool load, int vec) {
    Inst& i = d.inst;
    int width = 0;
    auto element = [&](const Operand& o) {
        if (load && d.is_sink(o)) {
            i.d.push_back(~0u);
            return;
        }
        Register r = load ? d.dst_wide(o, i.type) : d.src_wide(o, i.type);
        int wd = r.width == 8 ? 8 : 4;
        if (width && width != wd) d.unsupported("mixed register widths");
        width = wd;
        (load ? i.d : i.s).push_back(r.offset);
    };
    if (vec > 1) {
        if (value.kind != Operand::Vector || (int)value.elems.size() != vec) d.unsupported("vector operand");
        for (auto& e : value.elems) element(e);
    } else if (value.kind == Operand::Vector && value.elems.size() == 1) element(value.elems[0]);
    else element(value);
    i.sub = (u8)(width ? width : 4);
}

// Kernel parameters and call parameters by name.
bool decode_parameter(Decoder& d, const Operand& addr, bool load, int vec) {
    Inst& i = d.inst;
    if (addr.kind != Operand::Address || addr.imm_base || d.b.find_register(addr.name)) return false;
    i.cls = Cls::Other;
    for (auto& p : d.b.kernel.params)
        if (p.name == addr.name) {
            if (!load) d.unsupported("store to a kernel parameter");
            i.offset = p.offset + addr.offset;
            if (i.offset + vec * size_of(i.type) > (s64)(p.offset + p.size))
                d.unsupported("parameter access out of bounds");
            i.run = ld_param;
            return true;
        }
    for (auto& s : d.b.scopes)
        if (s.call_params.count(addr.name)) {
            i.run = nothing;
            return true;
        }
    return false;
}

}  // namespace

bool decode_load_store(Decoder& d) {
    const std::string& op = d.op();
    if (op != "ld" && op != "ldu" && op != "st") return false;
    Inst& i = d.inst;
    bool load = op != "st";
    int order = take_order(d);
    Space space = d.take_space();
    take_cache_hints(d);
    int vec = d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1;
    Type t = d.need_type();
    if (!memory_type(t) || vec * size_of(t) > 16) d.unsupported("memory type");
    const Operand &addr = d.operand(load ? 1 : 0), &value = d.operand(load ? 0 : 1);
    if (d.count() > 2) {
        if (d.count() != 3) d.unsupported("operands");
        d.src(d.operand(2), Type::B64);
    }  // cache policy
    i.type = t;
    i.vec = (u8)vec;
    take_elements(d, value, load, vec);
    if (decode_parameter(d, addr, load, vec)) return true;
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
    if (load) i.unread = Unread::Makes;
    mark_access(d, space, size_of(t));
    return true;
}

}  // namespace ptx
