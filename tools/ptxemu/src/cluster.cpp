// cluster.cpp - a cluster: its CTAs take turns; its barrier; who may reach whose shared memory, and until when.
//
// That a CTA is still there when another one reaches it may be luck of the schedule. So a CTA that ends has to know, by a
// barrier, of every access that others have made to its shared memory, and an access after its end is a fault.
#include "cluster.h"
#include <algorithm>

namespace ptx {

void Cluster::start(Launch& l, u64 linear, Counters& c) {
    launch = &l;
    const u32* size = l.cluster;
    const u32 warps = (threads_per_cta(l) + 31) / 32, count = size[0] * size[1] * size[2];
    u32 first[3];
    for (int k = 0; k < 3; k++) {
        const u32 across = l.grid[k] / size[k];
        first[k] = (u32)(linear % across) * size[k];
        linear /= across;
    }
    clocks.reset(warps * count);
    clock_.clear();
    next_clock_.clear();
    released_.clear();
    next_released_.clear();
    while (ctas.size() < count) ctas.emplace_back(new Cta);
    ctas.resize(count);
    for (u32 rank = 0; rank < count; rank++) {
        const u32 id[3] = {first[0] + rank % size[0], first[1] + rank / size[0] % size[1],
                           first[2] + rank / size[0] / size[1]};
        ctas[rank]->start(*this, rank, id, c);
    }
    rng_.seed(l.options.seed * 7919 + ctas[0]->linear);
}

// With a seed the CTAs come in random order, and one may sit out a turn, so that they drift apart.
bool Cluster::run(u64 budget) {
    const u64 seed = launch->options.seed;
    auto count = [&](auto of) {
        u64 n = 0;
        for (auto& c : ctas) n += of(*c);
        return n;
    };
    auto live = [&] { return count([](Cta& c) { return (u64)c.live_threads; }); };
    auto events = [&] { return count([](Cta& c) { return c.events; }); };
    std::vector<Cta*> order;
    for (auto& c : ctas) order.push_back(c.get());
    u64 used = 0;
    for (int idle = 0; live();) {
        if (launch->stop.load(std::memory_order_relaxed)) return true;
        const u64 before = events();
        bool progress = false, skipped = false;
        if (seed && order.size() > 1) std::shuffle(order.begin(), order.end(), rng_);
        for (Cta* c : order) {
            if (seed && order.size() > 1 && rng_() % 4 == 0) skipped = true;
            else if (c->live_threads) progress |= c->turn(used);
        }
        if (progress || events() != before) idle = 0;
        else if (!skipped && ++idle > 3) deadlock();
        if (used >= budget) break;
    }
    launch->executed += used;
    return !live();
}

void Cluster::deadlock() {
    std::string text;
    FaultKind kind = FaultKind::Deadlock;
    Warp* culprit = nullptr;
    const Inst* at = nullptr;
    for (auto& c : ctas)
        for (auto& w : c->warps)
            for (auto& s : w->splits) {
                const Inst* i = &c->kernel->code[s.state == Split::WaitBarrier ? s.pc - 1 : s.pc];
                if (!culprit || (s.state == Split::WaitWarp && kind != FaultKind::Divergence)) {
                    culprit = w.get();
                    at = i;
                }
                if (s.state == Split::WaitWarp) kind = FaultKind::Divergence;
                if (text.size() < 1500)
                    text += (ctas.size() > 1 ? "\n    CTA " + std::to_string(c->rank) + " of the cluster, warp "
                                             : std::string("\n    warp ")) +
                            std::to_string(w->id) + " lanes " + lanes_text(s.mask) +
                            (s.state == Split::WaitWarp      ? " wait for other lanes at line "
                             : s.state == Split::WaitBarrier ? " wait at the barrier of line "
                             : w->stalled                    ? " poll an mbarrier near line "
                                                             : " are at line ") +
                            std::to_string(i->line) + ": " + i->text;
            }
    Fault f(kind, (kind == FaultKind::Divergence ? "lanes that must execute this together have diverged:"
                   : ctas.size() > 1             ? "no thread of the cluster can make progress:"
                                                 : "no thread of the CTA can make progress:") +
                      text);
    culprit->active = culprit->live;
    describe(f, *culprit, *at, -1);
    throw f;
}

Cta& Cluster::reach_rank(Warp& w, int l, u32 rank) {
    if (rank >= ctas.size())
        w.fail(FaultKind::OutOfBounds,
               "CTA " + std::to_string(rank) + " of a cluster of " + std::to_string(ctas.size()) + " CTAs", l);
    Cta& c = *ctas[rank];
    if (&c == w.cta) return c;
    if (!c.live_threads)
        w.fail(FaultKind::OutOfBounds,
               "CTA " + std::to_string(rank) + " of the cluster has exited, and its shared memory is gone", l);
    c.shared.visits[w.place] = clocks.now;
    return c;
}
Cta& Cluster::reach(Warp& w, int l, u64& address) {
    const u32 rank = (u32)address >> kRankShift;
    address &= (1u << kRankShift) - 1;
    return rank ? reach_rank(w, l, rank - 1) : *w.cta;
}

std::vector<Cta*> Cluster::copied_to(Warp& w, int l, u64& to, u64& bar, bool multicast, u32 mask) {
    Cta &one = reach(w, l, to), &reported = reach(w, l, bar);
    if (&one != &reported)
        w.fail(FaultKind::OutOfBounds, "a bulk copy reports to an mbarrier in the shared memory of another CTA", l, true, bar);
    if (!multicast) return {&one};
    if (!mask) w.fail(FaultKind::OutOfBounds, "a multicast to no CTA", l);
    std::vector<Cta*> all;
    for (u32 m = mask; m; m &= m - 1) all.push_back(&reach_rank(w, l, (u32)__builtin_ctz(m)));
    return all;
}

// A lane may arrive at the next phase only after it has waited for the last one.
void Cluster::arrive(Warp& w, u32 m, bool relaxed) {
    if (w.owes_wait & m)
        w.fail(FaultKind::Divergence, "barrier.cluster.arrive twice without a wait between", __builtin_ctz(w.owes_wait & m));
    w.owes_wait |= m;
    w.at_cluster_barrier |= m;
    w.release(next_clock_, relaxed);
    if (!relaxed) {
        CtaClock& c = w.cta->clock;
        for (auto& [k, t] : c.known) next_released_[k] = std::max(next_released_[k], t);
        next_released_[(u32)w.cta->linear] = c.time++;
    }
    w.cta->events++;
    complete();
}
bool Cluster::waits(Warp& w, u32 m) {
    if (m & ~w.owes_wait)
        w.fail(FaultKind::Divergence, "barrier.cluster.wait without an arrive before it", __builtin_ctz(m & ~w.owes_wait));
    if (m & w.at_cluster_barrier) return true;
    acquire(w, m);
    return false;
}
void Cluster::acquire(Warp& w, u32 m) {
    w.owes_wait &= ~m;
    clocks.acquire_from(w.place, clock_);
    for (auto& [k, t] : released_)
        if (k != (u32)w.cta->linear) w.cta->clock.known[k] = std::max(w.cta->clock.known[k], t);
}

// The phase completes when every thread that has not exited has arrived.
void Cluster::complete() {
    bool any = false;
    for (auto& c : ctas)
        for (auto& w : c->warps) {
            if (w->live & ~w->at_cluster_barrier) return;
            any |= w->live != 0;
        }
    if (!any) return;
    clock_ = std::move(next_clock_);
    released_ = std::move(next_released_);
    next_clock_.clear();
    next_released_.clear();
    for (auto& c : ctas) {
        c->events++;
        for (auto& w : c->warps) {
            w->at_cluster_barrier = 0;
            for (auto& s : w->splits)
                if (s.state == Split::WaitBarrier && s.barrier == kClusterBarrier) {
                    s.state = Split::Ready;
                    acquire(*w, s.mask);
                }
        }
    }
}

void Cluster::left(Warp& w) {
    Cta& c = *w.cta;
    if (!c.live_threads)
        for (u32 v = 0; v < c.shared.visits.size(); v++) {
            const u32 time = c.shared.visits[v];
            if (!time) continue;
            bool known = false;
            for (auto& own : c.warps) known |= clocks.knows(own->place, v, time);
            if (!known)
                w.fail(FaultKind::MissingWait,
                       "the CTA exits, and its shared memory with it, unordered with an access by warp " +
                           std::to_string(v % c.warps.size()) + " of the cluster's CTA " +
                           std::to_string(v / c.warps.size()) + ": barrier.cluster is missing before the end");
        }
    if (ctas.size() > 1) complete();
}

// What the warp has done so far is released by its relaxed arrivals too.
void fence_cluster(Warp& w, const Inst&, u32) {
    if (w.cta->cluster->ctas.size() > 1) w.cta->shared.clocks->release_into(w.place, w.fenced);
}
void Warp::release(std::vector<u32>& clock, bool relaxed) {
    WarpClocks& clocks = *cta->shared.clocks;
    if (!relaxed) return clocks.release_into(place, clock);
    clock.resize(clocks.warps, 0);
    for (u32 v = 0; v < fenced.size(); v++) clock[v] = std::max(clock[v], fenced[v]);
}

}  // namespace ptx
