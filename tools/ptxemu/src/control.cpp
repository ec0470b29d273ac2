// control.cpp - branches, barriers, warp-synchronous communication. The scheduler guarantees convergence
// before a handler runs.
#include <algorithm>
#include "decode.h"
#include "machine.h"

namespace ptx {
namespace {

void shfl(Warp& w, const Inst& i, u32 m) {  // PTX ISA "shfl.sync": sub: 0 bfly 1 down 2 up 3 idx
    u32 *d = w.r32(i.d0), *b = w.r32(i.s1), *c = w.r32(i.s2), a[32], r[32], p = 0, passed = 0;
    memcpy(a, w.r32(i.s0), sizeof a);
    for_lanes(m, [&](int l) {
        u32 bval = b[l] & 31, cval = c[l] & 31, seg = c[l] >> 8 & 31;
        int top = (int)((l & seg) | (cval & ~seg)), low = (int)(l & seg), j;
        bool ok;
        switch (i.sub) {
            case 0:
                j = l ^ (int)bval;
                ok = j <= top;
                break;
            case 1:
                j = l + (int)bval;
                ok = j <= top;
                break;
            case 2:
                j = l - (int)bval;
                ok = j >= top;
                break;
            default: j = low | (int)(bval & ~seg); ok = j <= top;
        }
        if (!ok) j = l;
        if (!(m >> j & 1))
            w.fail(FaultKind::Divergence,
                   "shfl.sync reads lane " + std::to_string(j) + ", which does not take part", l);
        r[l] = a[j];
        p |= (u32)ok << l;
        passed |= (w.passed >> j & 1) << l;
    });
    w.passed = passed;
    for_lanes(m, [&](int l) { d[l] = r[l]; });
    if (i.flag) {
        u32& q = w.pred(i.d1);
        q = (q & ~m) | p;
    }
}
// Threads that name the same membermask form one operation.
template <class F>
void by_group(Warp& w, const Inst& i, u32 m, F f) {
    u32* mem = w.r32((u32)i.member);
    for (u32 rest = m; rest;) {
        u32 group = mem[__builtin_ctz(rest)] & m;
        f(group);
        rest &= ~group;
    }
}
void vote(Warp& w, const Inst& i, u32 m) {  // sub: 0 all 1 any 2 uni 3 ballot
    by_group(w, i, m, [&](u32 g) {
        u32 p = (w.pred(i.s0) ^ (i.flag ? ~0u : 0)) & g;
        if (i.sub == 3) {
            u32* d = w.r32(i.d0);
            for_lanes(g, [&](int l) { d[l] = p; });
            return;
        }
        bool r = i.sub == 0 ? p == g : i.sub == 1 ? p != 0 : p == 0 || p == g;
        u32& d = w.pred(i.d0);
        d = r ? d | g : d & ~g;
    });
}
void match(Warp& w, const Inst& i, u32 m) {  // sub: 0 any 1 all; sub2: 8 for b64
    by_group(w, i, m, [&](u32 g) {
        auto val = [&](int l) { return i.sub2 == 8 ? w.r64(i.s0)[l] : (u64)w.r32(i.s0)[l]; };
        u32 out[32], whole = 0;
        for_lanes(g, [&](int l) {
            u32 r = 0;
            for_lanes(g, [&](int k) {
                if (val(k) == val(l)) r |= 1u << k;
            });
            out[l] = r;
        });
        whole = out[__builtin_ctz(g)] == g;
        for_lanes(g, [&](int l) { w.r32(i.d0)[l] = i.sub ? (whole ? g : 0) : out[l]; });
        if (i.flag) {
            u32& p = w.pred(i.d1);
            p = whole ? p | g : p & ~g;
        }
    });
}
void redux(Warp& w, const Inst& i, u32 m) {  // sub: add min max and or xor
    by_group(w, i, m, [&](u32 g) {
        u32* a = w.r32(i.s0);
        u32 r = a[__builtin_ctz(g)];
        for_lanes(g & (g - 1), [&](int l) {
            u32 v = a[l];
            switch (i.sub) {
                case 0: r += v; break;
                case 3: r &= v; break;
                case 4: r |= v; break;
                case 5: r ^= v; break;
                default: {
                    bool less = i.type == Type::S32 ? (s32)v < (s32)r : v < r;
                    if (less == (i.sub == 1)) r = v;
                }
            }
        });
        for_lanes(g, [&](int l) { w.r32(i.d0)[l] = r; });
    });
}
void elect(Warp& w, const Inst& i, u32 m) {
    by_group(w, i, m, [&](u32 g) {
        u32 leader = __builtin_ctz(g);
        if (i.flag2) for_lanes(g, [&](int l) { w.r32(i.d0)[l] = leader; });
        u32& p = w.pred(i.d1);
        p = (p & ~g) | 1u << leader;
    });
}
void activemask(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) { w.r32(i.d0)[l] = m; });
}
void nothing(Warp&, const Inst&, u32) {}
void trap(Warp& w, const Inst& i, u32 m) {
    w.fail(FaultKind::Trap, i.flag ? "device-side assertion failed (__assertfail)" : "trap",
           __builtin_ctz(m));
}

void decode_bra(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Control;
    d.take("uni");
    d.expect(1);
    i.flow = Flow::Branch;
    i.label = d.operand(0).name;
}

void decode_brx(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Control;
    if (!d.take("idx")) d.unsupported("brx");
    d.take("uni");
    d.expect(2);
    i.flow = Flow::BranchIndexed;
    i.s0 = d.src(0, Type::U32);
    i.label = d.operand(1).name;
}

void decode_leave(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Control;
    d.take("uni");
    d.expect(0);
    i.flow = Flow::Exit;
}

void decode_stop(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Control;
    i.run = trap;
}

void decode_call(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Control;
    d.take("uni");
    for (auto& o : d.st.ops)
        if (o.name == "__assertfail") {
            i.run = trap;
            i.flag = true;
            return;
        }
    d.unsupported("function call");
}

void decode_wait(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Control;
    d.take_type();
    i.run = nothing;
}

void decode_activemask(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Control;
    if (d.need_type() != Type::B32) d.unsupported("type");
    d.expect(1);
    i.d0 = d.dst(0, Type::B32);
    i.run = activemask;
}

void decode_barrier(Decoder& d) {
    const std::string& op = d.op();
    Inst& i = d.inst;
    i.cls = Cls::Sync;
    if (d.take("warp")) {
        d.take("sync");
        d.expect(1);
        i.flow = Flow::WarpSync;
        i.member = (s32)d.src(0, Type::B32);
        i.run = nothing;
        return;
    }
    d.take("cta");
    bool aligned = op == "bar" || d.take("aligned");
    if (op == "bar") d.take("aligned");
    int kind = d.take_one({"sync", "arrive", "red"});
    if (kind < 0) d.unsupported("barrier form");
    i.flow = Flow::Barrier;
    i.sub = (u8)kind;
    i.flag2 = aligned;
    size_t k = 0;
    if (kind == 2) {
        i.sub2 = (u8)d.take_one({"popc", "and", "or"});
        Type t = d.need_type();
        if (i.sub2 > 2 || t != (i.sub2 == 0 ? Type::U32 : Type::Pred)) d.unsupported("barrier reduction");
        i.d0 = d.dst(0, t);
        k = 1;
    }
    i.s0 = d.src(k++, Type::U32);
    const Operand& id = d.operand(k - 1);
    if (id.kind != Operand::Imm || id.imm != 0) d.b.kernel.named_barriers = true;
    size_t left = d.count() - k - (kind == 2 ? 1 : 0);
    if (left == 1) {
        i.flag = true;
        i.s1 = d.src(k++, Type::U32);
        d.b.kernel.named_barriers = true;
    } else if (left) d.unsupported("barrier operands");
    if (kind == 1) {
        d.b.kernel.named_barriers = true;
        if (!i.flag) d.unsupported("bar.arrive without a count");
    }
    if (kind == 2) {
        Operand p = d.operand(k);
        i.vec = p.negated;
        p.negated = false;
        i.s2 = d.src(p, Type::Pred);
    }
}

void decode_shfl(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Sync;
    if (!d.take("sync")) d.unsupported("shfl without .sync");
    i.sub = (u8)d.take_one({"bfly", "down", "up", "idx"});
    if (i.sub > 3 || d.need_type() != Type::B32) d.unsupported("shfl form");
    d.expect(5);
    const Operand& o = d.operand(0);
    i.d0 = d.dst(o, Type::B32);
    if (!o.pair.empty()) {
        i.flag = true;
        i.d1 = d.dst(o.pair[0], Type::Pred);
    }
    i.s0 = d.src(1, Type::B32);
    i.s1 = d.src(2, Type::B32);
    i.s2 = d.src(3, Type::B32);
    i.member = (s32)d.src(4, Type::B32);
    i.flow = Flow::WarpSync;
    i.unread = i.s0 == i.s1 || i.s0 == i.s2 || i.s0 == (u32)i.member ? Unread::Refuses : Unread::Shuffles;
    i.run = shfl;
}

void decode_vote(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Sync;
    if (!d.take("sync")) d.unsupported("vote without .sync");
    i.sub = (u8)d.take_one({"all", "any", "uni", "ballot"});
    Type t = d.need_type();
    if (i.sub > 3 || t != (i.sub == 3 ? Type::B32 : Type::Pred)) d.unsupported("vote form");
    d.expect(3);
    i.d0 = d.dst(0, t);
    Operand p = d.operand(1);
    i.flag = p.negated;
    p.negated = false;
    i.s0 = d.src(p, Type::Pred);
    i.member = (s32)d.src(2, Type::B32);
    i.flow = Flow::WarpSync;
    i.run = vote;
}

void decode_match(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Sync;
    i.sub = (u8)d.take_one({"any", "all"});
    if (!d.take("sync") || i.sub > 1) d.unsupported("match form");
    Type t = d.need_type();
    if (t != Type::B32 && t != Type::B64) d.unsupported("type");
    d.expect(3);
    const Operand& o = d.operand(0);
    i.d0 = d.dst(o, Type::B32);
    if (!o.pair.empty()) {
        i.flag = true;
        i.d1 = d.dst(o.pair[0], Type::Pred);
    }
    i.sub2 = (u8)size_of(t);
    i.s0 = d.src(1, t);
    i.member = (s32)d.src(2, Type::B32);
    i.flow = Flow::WarpSync;
    i.run = match;
}

void decode_redux(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Sync;
    if (!d.take("sync")) d.unsupported("redux");
    i.sub = (u8)d.take_one({"add", "min", "max", "and", "or", "xor"});
    i.type = d.need_type();
    if (i.sub > 5 || is_float(i.type) || size_of(i.type) != 4) d.unsupported("redux form");
    d.expect(3);
    i.d0 = d.dst(0, i.type);
    i.s0 = d.src(1, i.type);
    i.member = (s32)d.src(2, Type::B32);
    i.flow = Flow::WarpSync;
    i.run = redux;
}

void decode_elect(Decoder& d) {
    Inst& i = d.inst;
    i.cls = Cls::Sync;
    if (!d.take("sync")) d.unsupported("elect");
    d.expect(2);
    const Operand& o = d.operand(0);
    if (o.pair.empty()) d.unsupported("elect form");
    if (!d.is_sink(o)) {
        i.flag2 = true;
        i.d0 = d.dst(o, Type::B32);
    }
    i.d1 = d.dst(o.pair[0], Type::Pred);
    i.member = (s32)d.src(1, Type::B32);
    i.flow = Flow::WarpSync;
    i.run = elect;
}

const Family family = {
    {"bra", decode_bra}, {"brx", decode_brx}, {"ret", decode_leave}, {"exit", decode_leave},
    {"trap", decode_stop}, {"brkpt", decode_stop}, {"call", decode_call},
    {"nanosleep", decode_wait}, {"pmevent", decode_wait}, {"activemask", decode_activemask},
    {"bar", decode_barrier}, {"barrier", decode_barrier}, {"shfl", decode_shfl},
    {"vote", decode_vote}, {"match", decode_match}, {"redux", decode_redux},
    {"elect", decode_elect},
};

}  // namespace

// barrier.cluster is cluster_instructions.cpp's.
bool decode_control(Decoder& d) { return !d.peek("cluster") && decode_of(family, d); }

}  // namespace ptx
