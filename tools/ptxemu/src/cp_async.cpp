// cp_async.cpp - cp.async and its groups (PTX ISA "Data Movement: Asynchronous copy").
#include <algorithm>
#include "memory_access.h"

namespace ptx {
namespace {

// vec: bytes; s1: src-size register if flag; s2: ignore-src predicate if sub
void cp_async(Warp& w, const Inst& i, u32 m) {
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
            global_read(w, l, a, n, 1);
            memcpy(buf, (void*)a, n);
            from_global |= 1u << l;
        }
        src[l] = a;
        w.cta->shared.check(w, l, dst[l], i.vec, i.vec);
        w.cta->shared.write(w, l, (u32)dst[l], i.vec, nullptr, kPendingCpAsync);
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
// offset: number of youngest groups that may stay in flight; -1: wait_all
void cp_async_wait(Warp& w, const Inst& i, u32 m) {
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

bool decode_groups(Decoder& d) {
    Inst& i = d.inst;
    if (d.take("commit_group")) {
        d.expect(0);
        i.run = cp_async_commit;
    } else if (d.take("wait_all")) {
        d.expect(0);
        i.offset = -1;
        i.run = cp_async_wait;
    } else if (d.take("wait_group")) {
        d.expect(1);
        i.offset = (s64)d.immediate(d.operand(0));
        i.run = cp_async_wait;
    } else return false;
    i.cls = Cls::Sync;
    return true;
}

}  // namespace

bool decode_cp_async(Decoder& d) {
    if (d.op() != "cp" || !d.peek("async") || d.peek("bulk") || d.peek("mbarrier")) return false;
    Inst& i = d.inst;
    d.take("async");
    if (decode_groups(d)) return true;
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

}  // namespace ptx
