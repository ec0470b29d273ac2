// mbarrier.cpp - mbarrier objects (PTX ISA "mbarrier") and the one-dimensional bulk copies that report to them.
// An object's state lives beside shared memory; its 8 bytes are checked like any others.
#include "cluster.h"
#include "decode.h"
#include "machine.h"
#include "mbarrier.h"

namespace ptx {
namespace {

u64 mbarrier_address(Warp& w, const Inst& i, int l) {
    u64 a = (i.flag2 ? (u64)w.r32(i.base)[l] : w.r64(i.base)[l]) + i.offset;
    if ((a & kWindowMask) == kSharedWindow) a &= ~kWindowMask;
    return a;
}
u32 own_mbarrier(Warp& w, const Inst& i, int l) {
    const u64 a = mbarrier_address(w, i, l);
    w.cta->shared.check(w, l, a, 8, 8);
    return (u32)a;
}
void settle(Cta& c, Mbarrier& m) {
    while (m.pending <= 0 && m.tx == 0) {
        m.phase++;
        m.pending += m.expected;
        m.clock = m.next_clock;
        m.next_clock.clear();
        m.landed.insert(m.landed.end(), m.copies.begin(), m.copies.end());
        m.copies.clear();
        c.events++;
        if (!m.expected) break;
    }
}
}  // namespace

Mbarrier& mbarrier_at(Warp& w, Cta& c, int l, u64 a) {
    c.shared.check(w, l, a, 8, 8);
    auto it = c.mbarriers.find((u32)a);
    if (it == c.mbarriers.end())
        w.fail(FaultKind::Uninitialized, "no mbarrier has been initialised here", l, true, a);
    c.shared.read(w, l, (u32)a, 8);  // its initialisation must be ordered before its use
    return it->second;
}
void expect_copy(Warp& w, Cta& c, Mbarrier& b, const std::vector<std::pair<u32, u32>>& ranges, u32 n) {
    b.copies.insert(b.copies.end(), ranges.begin(), ranges.end());
    w.release(b.next_clock, false);
    b.tx -= n;
    settle(c, b);
}

namespace {

void mbarrier_init(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u32 a = own_mbarrier(w, i, l), n = w.r32(i.s0)[l];
        if (!n) w.fail(FaultKind::Launch, "mbarrier count of 0", l, true, a);
        w.cta->shared.write(w, l, a, 8, nullptr);
        Mbarrier b;
        b.expected = n;
        b.pending = n;
        w.cta->mbarriers[a] = b;
    });
}
void mbarrier_inval(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u32 a = own_mbarrier(w, i, l);
        mbarrier_at(w, *w.cta, l, a);
        w.cta->shared.write(w, l, a, 8, nullptr);
        w.cta->mbarriers.erase(a);
    });
}
// sub: 1 expect_tx, 2 expect_tx without arrival; flag: count in s0; sub2: state to d0
void mbarrier_arrive(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u64 a = mbarrier_address(w, i, l);
        Cta& c = i.cluster ? w.cta->cluster->reach(w, l, a) : *w.cta;
        Mbarrier& b = mbarrier_at(w, c, l, a);
        if (i.sub2) w.r64(i.d0)[l] = b.phase;
        w.release(b.next_clock, i.relaxed);
        if (i.sub) b.tx += w.r32(i.s0)[l];
        if (i.sub != 2) {
            s64 n = i.flag ? w.r32(i.s0)[l] : 1;
            if (n > b.pending)
                w.fail(FaultKind::Divergence, "more arrivals at an mbarrier than its count", l, true, a);
            b.pending -= n;
        }
        w.cta->events++;
        settle(c, b);
    });
}
void mbarrier_wait(Warp& w, const Inst& i, u32 m) {  // flag: parity in s0 (32 bits), else state (64 bits)
    u32 done = 0;
    for_lanes(m, [&](int l) {
        Mbarrier& b = mbarrier_at(w, *w.cta, l, mbarrier_address(w, i, l));
        bool ready = i.flag ? (b.phase & 1) != (w.r32(i.s0)[l] & 1) : b.phase != w.r64(i.s0)[l];
        if (!ready) return;
        done |= 1u << l;
        w.cta->shared.clocks->acquire_from(w.place, b.clock);
        for (auto& c : b.landed) w.cta->shared.complete_bulk(c.first, c.second);
        b.landed.clear();
    });
    u32& p = w.pred(i.d0);
    p = (p & ~m) | done;
    if (!done) w.stalled = true;
}
// cp.async.bulk.shared.global: the bytes are visible to whoever has waited on the mbarrier.
// base: destination, s0: source, s1: size, s2: mbarrier (width in sub), s3: with flag, the CTAs that it goes to
void bulk_copy(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        u64 dst = ((i.flag2 ? (u64)w.r32(i.base)[l] : w.r64(i.base)[l]) + i.offset) & ~kWindowMask,
            src = w.r64(i.s0)[l] + (u64)i.target;
        u64 bar = i.sub == 8 ? w.r64(i.s2)[l] & ~kWindowMask : w.r32(i.s2)[l];
        u32 n = w.r32(i.s1)[l];
        if (n % 16 || dst % 16 || src % 16)
            w.fail(FaultKind::Misaligned, "cp.async.bulk needs 16-byte aligned addresses and size", l, true,
                   src);
        const auto to = w.cta->cluster->copied_to(w, l, dst, bar, i.flag, i.flag ? w.r32(i.s3)[l] & 0xffff : 0);
        u64 lines[32];
        for (u32 k = 0; k < n; k += 16) {
            global_read(w, l, src + k, 16, 16);
            lines[0] = src + k;
            count_global(w, 1, lines, 16);
        }
        for (Cta* c : to) {
            c->shared.check(w, l, dst, n, 16);
            Mbarrier& b = mbarrier_at(w, *c, l, bar);
            for (u32 k = 0; k < n; k += 16) {
                c->shared.write(w, l, (u32)dst + k, 16, nullptr, kPendingBulk);
                memcpy(c->shared.data() + dst + k, (void*)(src + k), 16);
            }
            expect_copy(w, *c, b, {{(u32)dst, n}}, n);
        }
    });
}
}  // namespace

bool decode_mbarrier(Decoder& d) {
    if (d.op() != "mbarrier") return false;
    Inst& i = d.inst;
    d.b.kernel.named_barriers = true;
    bool no_complete = d.peek("noComplete");
    int kind = d.take_one({"init", "inval", "arrive", "expect_tx", "test_wait", "try_wait"});
    bool tx = kind == 2 && d.take("expect_tx"), parity = d.take("parity");
    if (kind < 0 || no_complete) d.unsupported("mbarrier form");
    d.take("release");
    d.take("acquire");
    i.relaxed = d.take("relaxed");
    if (!d.take("cta")) d.take("cluster");
    i.cluster = d.take("shared::cluster");
    if (i.cluster && (kind < 2 || kind > 3)) d.unsupported("mbarrier of another CTA");
    if (!i.cluster && !d.take("shared") && !d.take("shared::cta")) d.unsupported("mbarrier outside shared memory");
    if (d.need_type() != Type::B64) d.unsupported("type");
    i.cls = Cls::Sync;
    size_t k = 0;
    if (kind >= 4) {
        i.d0 = d.dst(k++, Type::Pred);
        d.address(d.operand(k++), Space::Shared);
        i.flag = parity;
        i.s0 = parity ? d.src(k, Type::B32) : d.src(k, Type::B64);
        k++;
        if (k < d.count()) d.src(k++, Type::U32);  // time limit of try_wait
        i.flow = Flow::Poll;
        i.run = mbarrier_wait;
    } else {
        if (kind == 2 && d.operand(0).kind != Operand::Address) {
            if (!d.is_sink(d.operand(0))) {
                if (i.cluster) d.unsupported("state of another CTA's mbarrier");
                i.sub2 = 1;
                i.d0 = d.dst(0, Type::B64);
            }
            k++;
        }
        d.address(d.operand(k++), Space::Shared);
        i.sub = kind == 3 ? 2 : tx ? 1 : 0;
        if (kind == 0 || i.sub) i.s0 = d.src(k++, Type::U32);
        else if (kind == 2 && k < d.count()) {
            i.flag = true;
            i.s0 = d.src(k++, Type::U32);
        }
        i.run = kind == 0 ? mbarrier_init : kind == 1 ? mbarrier_inval : mbarrier_arrive;
    }
    d.expect(k);
    return true;
}

bool decode_bulk_copy(Decoder& d) {
    if (d.op() != "cp" || !d.peek("bulk")) return false;
    Inst& i = d.inst;
    for (auto x : {"async", "bulk", "shared::cluster", "global", "mbarrier::complete_tx::bytes"})
        if (!d.take(x) && std::string(x) != "shared::cluster") d.unsupported("bulk copy form");
    d.take("shared::cta");
    i.flag = d.take("multicast::cluster");
    d.take("L2::cache_hint");
    d.b.kernel.named_barriers = true;
    d.address(d.operand(1), Space::Global);
    if (i.flag2) d.unsupported("32-bit source address");
    i.s0 = i.base;
    i.target = (s32)i.offset;
    d.address(d.operand(3), Space::Shared);
    if (i.offset) d.unsupported("mbarrier displacement");
    i.s2 = i.base;
    i.sub = i.flag2 ? 4 : 8;
    i.s1 = d.src(2, Type::U32);
    d.address(d.operand(0), Space::Shared);
    size_t k = 4;
    if (i.flag) i.s3 = d.src(k++, Type::B16);
    if (d.count() == k + 1) d.src(k, Type::B64);
    else d.expect(k);
    i.run = bulk_copy;
    i.cls = Cls::Global;
    return true;
}

}  // namespace ptx
