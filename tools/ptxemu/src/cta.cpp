// cta.cpp - a CTA: its warps take turns, its barriers let them go.
//
// With a seed, the order of the warps and the length of their turns are random; without one they run in order.
#include <algorithm>
#include "cluster.h"

namespace ptx {

// A warp's lanes m arrive at the barrier that they stand at.
void Cta::arrive(Warp& w, const Inst& i, Split& s, u32 m) {
    u32 lane = __builtin_ctz(m), id = w.r32(i.s0)[lane];
    if (id >= 16) w.fail(FaultKind::Divergence, "barrier " + std::to_string(id) + " does not exist", lane);
    Barrier& b = barriers[id];
    u32 expected = i.flag ? w.r32(i.s1)[lane] : 0;
    if (i.flag && (expected % 32 || !expected))
        w.fail(FaultKind::Divergence,
               "barrier thread count " + std::to_string(expected) + " is not a multiple of the warp size",
               lane);
    if (b.arrived && b.expected != expected)
        w.fail(FaultKind::Divergence, "barrier " + std::to_string(id) + " used with different thread counts",
               lane);
    if (b.participants >> w.id & 1 && i.flag2)
        w.fail(FaultKind::Divergence, "the warp arrives twice at barrier " + std::to_string(id), lane);
    b.expected = expected;
    b.arrived += i.flag2 && i.flag ? 32 : (u32)__builtin_popcount(m);
    b.participants |= 1u << w.id;
    if (shared.vc) shared.clocks->release_into(w.place, b.clock);
    if (i.sub == 2) {
        u32 p = (w.pred(i.s2) ^ (i.vec ? ~0u : 0)) & m;
        b.popc += __builtin_popcount(p);
        b.all &= p == m;
        b.any |= p != 0;
    }
    s.pc++;
    if (i.sub != 1) {
        s.state = Split::WaitBarrier;
        s.barrier = (s32)id;
        s.reduction_dst = i.sub == 2 ? i.index + 1 : 0;
    }
    events++;
    release_barriers();
}

void Cta::release_barriers() {
    for (int id = 0; id < 16; id++) {
        Barrier& b = barriers[id];
        if (!b.arrived) continue;
        if (b.arrived < (b.expected ? b.expected : live_threads)) continue;
        if (!shared.vc) shared.clocks->now++;
        for (auto& w : warps)
            for (auto& s : w->splits)
                if (s.state == Split::WaitBarrier && s.barrier == id) {
                    s.state = Split::Ready;
                    if (shared.vc) shared.clocks->acquire_from(w->place, b.clock);
                    if (s.reduction_dst) {
                        const Inst& i = kernel->code[s.reduction_dst - 1];
                        if (i.sub2 == 0) for_lanes(s.mask, [&](int l) { w->r32(i.d0)[l] = b.popc; });
                        else {
                            bool v = i.sub2 == 1 ? b.all : b.any;
                            u32& p = w->pred(i.d0);
                            p = v ? p | s.mask : p & ~s.mask;
                        }
                        for (u32 d : i.writes) w->defined[d] |= s.mask;
                        s.reduction_dst = 0;
                    }
                }
        b = Barrier{};
        events++;
    }
}

// The value of a special register for thread t of the CTA.
static u64 special_value(const Cta& c, Special which, u32 t) {
    const Launch& l = *c.launch;
    const u32 lane = t % 32;
    switch (which) {
        case Special::TidX: return t % l.block[0];
        case Special::TidY: return t / l.block[0] % l.block[1];
        case Special::TidZ: return t / l.block[0] / l.block[1];
        case Special::NtidX: return l.block[0];
        case Special::NtidY: return l.block[1];
        case Special::NtidZ: return l.block[2];
        case Special::CtaidX: return c.id[0];
        case Special::CtaidY: return c.id[1];
        case Special::CtaidZ: return c.id[2];
        case Special::NctaidX: return l.grid[0];
        case Special::NctaidY: return l.grid[1];
        case Special::NctaidZ: return l.grid[2];
        case Special::LaneId: return lane;
        case Special::WarpId: return t / 32;
        case Special::NWarpId: return (threads_per_cta(l) + 31) / 32;
        case Special::SmId: return c.linear % 108;
        case Special::NSmId: return 108;
        case Special::LaneMaskEq: return 1u << lane;
        case Special::LaneMaskLt: return (1u << lane) - 1;
        case Special::LaneMaskLe: return (2u << lane) - 1;
        case Special::LaneMaskGt: return ~((2u << lane) - 1);
        case Special::LaneMaskGe: return ~((1u << lane) - 1);
        case Special::DynSmem: return l.dynamic_shared;
        case Special::TotalSmem: return l.dynamic_base + l.dynamic_shared;
        case Special::DynBase: return l.dynamic_base;
        case Special::ClusterCtaidX: return c.id[0] % l.cluster[0];
        case Special::ClusterCtaidY: return c.id[1] % l.cluster[1];
        case Special::ClusterCtaidZ: return c.id[2] % l.cluster[2];
        case Special::ClusterNctaidX: return l.cluster[0];
        case Special::ClusterNctaidY: return l.cluster[1];
        case Special::ClusterNctaidZ: return l.cluster[2];
        case Special::ClusterCtaRank: return c.rank;
        case Special::ClusterNctaRank: return c.cluster->ctas.size();
        case Special::ClusterIdX: return c.id[0] / l.cluster[0];
        case Special::ClusterIdY: return c.id[1] / l.cluster[1];
        case Special::ClusterIdZ: return c.id[2] / l.cluster[2];
        case Special::NclusterIdX: return l.grid[0] / l.cluster[0];
        case Special::NclusterIdY: return l.grid[1] / l.cluster[1];
        case Special::NclusterIdZ: return l.grid[2] / l.cluster[2];
        case Special::IsExplicitCluster: return l.explicit_cluster;
        case Special::Zero:
        case Special::GridId: return 0;
    }
    return 0;
}

void Warp::start(Cta& c, u32 w, u32 threads) {
    const Kernel& k = *c.kernel;
    size_t bytes = (k.register_bytes + 127) / 64 * 64;
    if (!regs) {
        regs_storage.reset(new u8[bytes + 64]);
        regs = (u8*)(((u64)regs_storage.get() + 63) / 64 * 64);
    }
    u32* r = (u32*)regs;
    std::fill(r, r + bytes / 4, 0x7fffdeadu);  // NaN as f32 and as f64
    defined.assign(bytes / 4, 0);
    unread.assign(bytes / 4, 0);
    id = w;
    place = c.rank * (u32)c.warps.size() + w;
    cta = &c;
    thread0 = w * 32;
    carry = 0;
    live = threads - w * 32 >= 32 ? ~0u : (1u << (threads - w * 32)) - 1;
    splits.assign(1, Split{0, live});
    cp_async.clear();
    memset(cp_group, 0, sizeof cp_group);
    bulk.clear();
    memset(bulk_group, 0, sizeof bulk_group);
    wgmma.clear();
    busy.clear();
    wgmma_group = 0;
    stalled = false;
    at_cluster_barrier = owes_wait = 0;
    fenced.clear();
    current = k.code.data();
    for (auto& x : k.constants) {
        if (x.width == 1) pred(x.offset) = (u32)x.value;
        else if (x.width == 8) std::fill_n(r64(x.offset), 32, x.value);
        else std::fill_n(r32(x.offset), 32, (u32)x.value);
    }
    for (auto& x : k.specials)
        for (u32 lane = 0; lane < 32; lane++) {
            u64 v = special_value(c, x.which, w * 32 + lane);
            if (x.width == 8) r64(x.offset)[lane] = v;
            else r32(x.offset)[lane] = (u32)v;
        }
}

void Cta::start(Cluster& of, u32 rank_there, const u32* id_in_grid, Counters& c) {
    Launch& l = *of.launch;
    launch = &l;
    kernel = l.kernel;
    cluster = &of;
    rank = rank_there;
    counters = &c;
    std::copy_n(id_in_grid, 3, id);
    linear = id[0] + (u64)l.grid[0] * (id[1] + (u64)l.grid[1] * id[2]);
    const Kernel& k = *kernel;
    u32 nt = threads_per_cta(l), nw = (nt + 31) / 32;
    shared.reset(l.dynamic_base + l.dynamic_shared, of.clocks, k.named_barriers || of.ctas.size() > 1, true);
    local.assign((size_t)k.local_bytes * nw * 32, 0xff);
    mbarriers.clear();
    global_words.clear();
    clock = CtaClock{};
    for (auto& b : barriers) b = Barrier{};
    rng.seed(l.options.seed * 1000003 + linear);
    live_threads = nt;
    events = 0;
    while (warps.size() < nw) warps.emplace_back(new Warp);
    warps.resize(nw);
    order.resize(nw);
    for (u32 w = 0; w < nw; w++) order[w] = w;
    for (u32 w = 0; w < nw; w++) warps[w]->start(*this, w, nt);
}

// Each warp once, for a slice.
bool Cta::turn(u64& used) {
    const u64 seed = launch->options.seed;
    bool progress = false;
    if (seed) std::shuffle(order.begin(), order.end(), rng);
    for (u32 k : order) {
        Warp& w = *warps[k];
        if (!w.live) continue;
        u64 slice = seed ? 1 + rng() % 700 : 20000, b = slice;
        w.run(b);
        used += slice - b;
        if (slice != b && !w.stalled) progress = true;
    }
    return progress;
}

}  // namespace ptx
