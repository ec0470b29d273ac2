// cluster.h - CTAs that run together and reach each other's shared memory (PTX ISA "Cluster of Cooperative Thread Arrays").
//
// A shared::cluster address has the rank of its CTA, plus one, from bit 24 up; 0 is the executing thread's own CTA.
#pragma once
#include "machine.h"

namespace ptx {

constexpr u32 kRankShift = 24;
constexpr s32 kClusterBarrier = 16;  // Split::barrier of who waits at barrier.cluster

// A launch without a cluster dimension has clusters of one CTA.
struct Cluster {
    Launch* launch = nullptr;
    std::vector<std::unique_ptr<Cta>> ctas;  // by rank
    WarpClocks clocks;

    void start(Launch& l, u64 linear, Counters& c);
    bool run(u64 budget);  // true when every thread has exited

    // The CTA that lane l of w reaches at this address, which becomes the place in its shared memory.
    Cta& reach(Warp& w, int l, u64& address);
    Cta& reach_rank(Warp& w, int l, u32 rank);
    // The CTAs that a bulk copy fills, each at `to`, and where it reports to the barrier at `bar`; without multicast the one
    // that both addresses name.
    std::vector<Cta*> copied_to(Warp& w, int l, u64& to, u64& bar, bool multicast, u32 mask);

    // barrier.cluster. `waits` is false where the lanes' phase has completed.
    void arrive(Warp& w, u32 m, bool relaxed);
    bool waits(Warp& w, u32 m);
    void left(Warp& w);  // lanes of w have exited

  private:
    u64 executed_ = 0;
    std::mt19937_64 rng_;
    std::vector<u32> clock_, next_clock_;                  // of warps: released by the completed phase, and by this one
    std::unordered_map<u32, u32> released_, next_released_;  // of CTAs, for global memory
    void complete();
    void acquire(Warp& w, u32 m);
    [[noreturn]] void deadlock();
};

void fence_cluster(Warp& w, const Inst& i, u32 m);

}  // namespace ptx
