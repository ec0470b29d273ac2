// cluster_instructions.cpp - mapa, getctarank and barrier.cluster.
#include "cluster.h"
#include "decode.h"

namespace ptx {
namespace {

// The place of s0 in the shared memory of CTA s1; sub: width of both.
void mapa(Warp& w, const Inst& i, u32 m) {
    const u32 ctas = (u32)w.cta->cluster->ctas.size();
    for_lanes(m, [&](int l) {
        const u64 a = i.sub == 8 ? w.r64(i.s0)[l] : w.r32(i.s0)[l];
        const u32 rank = w.r32(i.s1)[l];
        if (i.flag && (a & kWindowMask) != kSharedWindow)
            w.fail(FaultKind::OutOfBounds, "mapa of an address outside shared memory", l, true, a);
        if (rank >= ctas)
            w.fail(FaultKind::OutOfBounds, "CTA " + std::to_string(rank) + " of a cluster of " + std::to_string(ctas) + " CTAs",
                   l, true, a);
        const u64 place = a & ((1u << kRankShift) - 1), mapped = (a & kWindowMask) | (u64)(rank + 1) << kRankShift | place;
        if (i.sub == 8) w.r64(i.d0)[l] = mapped;
        else w.r32(i.d0)[l] = (u32)mapped;
    });
}
void getctarank(Warp& w, const Inst& i, u32 m) {
    for_lanes(m, [&](int l) {
        const u32 rank = (u32)(i.sub == 8 ? w.r64(i.s0)[l] : w.r32(i.s0)[l]) >> kRankShift;
        w.r32(i.d0)[l] = rank ? rank - 1 : w.cta->rank;
    });
}
void cluster_arrive(Warp& w, const Inst& i, u32 m) { w.cta->cluster->arrive(w, m, i.relaxed); }

void decode_address(Decoder& d, bool maps) {
    Inst& i = d.inst;
    i.flag = !d.take("shared::cluster");  // a generic address
    const Type t = d.need_type();
    if (t != Type::U32 && t != Type::U64) d.unsupported("type");
    if (i.flag && t != Type::U64) d.unsupported("32-bit generic address");
    d.expect(maps ? 3 : 2);
    i.sub = (u8)size_of(t);
    i.d0 = d.dst(0, maps ? t : Type::U32);
    i.s0 = d.src(1, t);
    if (maps) i.s1 = d.src(2, Type::U32);
    i.run = maps ? mapa : getctarank;
    i.cls = Cls::Int;
}

void decode_cluster_barrier(Decoder& d) {
    Inst& i = d.inst;
    d.take("cluster");
    const int kind = d.take_one({"arrive", "wait"});
    if (kind < 0) d.unsupported("barrier.cluster form");
    i.flag2 = d.take("aligned");
    if (kind) d.take("acquire");
    else if (!d.take("release")) i.relaxed = d.take("relaxed");
    d.expect(0);
    d.b.kernel.named_barriers = d.b.kernel.clusters = true;
    i.cls = Cls::Sync;
    i.flow = kind ? Flow::ClusterWait : i.flag2 ? Flow::AlignedLive : Flow::Plain;
    if (!kind) i.run = cluster_arrive;
}

}  // namespace

bool decode_cluster(Decoder& d) {
    if (d.op() == "mapa" || d.op() == "getctarank") decode_address(d, d.op() == "mapa");
    else if (d.op() == "barrier" && d.peek("cluster")) decode_cluster_barrier(d);
    else return false;
    return true;
}

}  // namespace ptx
