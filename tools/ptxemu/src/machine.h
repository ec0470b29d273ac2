// machine.h - the running state: warps, CTAs, launches, and what they count.
#pragma once
#include <deque>
#include <random>
#include <unordered_map>
#include "isa.h"
#include "memory.h"

namespace ptx {

struct Options {
    u64 seed = 0;
    u32 threads = 0;  // 0: one per core unless the kernel is order sensitive
    bool shared_races = true, global_races = true, strict_same_value = false;
    bool init_shared = true, init_global = true, registers = true;
    bool rounding_nearest = false;  // mma accumulation: RN instead of the RZ of the hardware
    bool approx_noise = false;      // perturb .approx results within their documented error
    u64 max_instructions = 1000000000ull;
    u32 smem_limit = 0;
    bool warp_races = false;  // global memory, within a CTA: see warp_races.cpp
};

struct SiteStats {  // per memory instruction
    u64 accesses = 0, bytes = 0, units = 0,
        ideal = 0;  // units: 32-byte sectors (global) or wavefronts (shared)
};

struct Counters {
    std::vector<u64> executed, lanes;  // per instruction: by warps, by threads
    std::vector<SiteStats> sites;
    u64 instructions = 0;
    void resize(size_t n) {
        executed.assign(n, 0);
        lanes.assign(n, 0);
        sites.assign(n, {});
    }
    void add(const Counters& o);
};

// An mbarrier object (PTX ISA "mbarrier"): kept beside shared memory, keyed by its address.
struct Mbarrier {
    u32 expected = 0;  // arrivals per phase
    s64 pending = 0;   // arrivals still missing in this phase
    s64 tx = 0;        // bytes still missing in this phase
    u64 phase = 0;
    std::vector<u32> clock, next_clock;  // released by the completed / the current phase
    std::vector<std::pair<u32, u32>> copies,
        landed;  // bulk copies of the current phase / of completed phases
};

struct Launch;
struct Cluster;

// Knowledge of one CTA about others: set by acquire/release through global atomics (see global_races.cpp).
struct CtaClock {
    u32 time = 1;
    std::unordered_map<u32, u32> known;
};

struct Barrier {
    u32 expected = 0, arrived = 0, participants = 0;  // threads, threads, warps
    bool reduction = false;
    u32 popc = 0;
    bool all = true, any = false;
    std::vector<u32> clock;  // what the arriving warps release to the waiting ones
};

struct WarpRecord {  // accesses of 4 bytes of global memory by the warps of one CTA
    u32 writers = 0, written = 0, write_pc = 0, readers = 0, read_pc = 0;
    bool atomic = false;
    std::vector<u32> read;  // by warp: the time of its last read
};

struct Split {  // lanes of a warp that share a program counter (PTX ISA "Independent thread scheduling")
    u32 pc = 0, mask = 0;
    enum State : u8 { Ready, WaitWarp, WaitBarrier } state = Ready;
    s32 barrier = -1;
    u32 reduction_dst = 0;
    bool polled = false;  // its last poll failed: others go first
};

struct Cta {
    Launch* launch = nullptr;
    Kernel* kernel = nullptr;
    Cluster* cluster = nullptr;
    u32 id[3] = {0, 0, 0}, rank = 0;  // rank: in the cluster
    u64 linear = 0;
    SharedMemory shared;
    std::vector<u8> local;
    std::vector<std::unique_ptr<Warp>> warps;
    Barrier barriers[16];
    std::unordered_map<u32, Mbarrier> mbarriers;
    CtaClock clock;
    std::unordered_map<u64, WarpRecord> global_words;
    Counters* counters = nullptr;
    std::mt19937_64 rng;
    u64 events = 0;  // progress marker for deadlock detection
    std::vector<u32> order;  // of the warps' turns
    u32 live_threads = 0;

    void start(Cluster& of, u32 rank_there, const u32* id_in_grid, Counters& c);
    bool turn(u64& used);  // of every warp; true when one has made progress
    void arrive(Warp& w, const Inst& i, Split& s, u32 m);
    void release_barriers();
};

struct CpAsync {
    u32 mask;
    u32 size;
    u32 group[32];
    u32 addr[32];
    u32 bytes[32];
};

struct Warp {
    u8* regs = nullptr;
    std::unique_ptr<u8[]> regs_storage;
    u8* registers_end = nullptr;
    std::vector<u32> defined;  // per 4-byte slot of the register file: lanes that have been written
    std::vector<u32> unread;   // of the others: lanes whose value comes from a load that their guard left out
    u32 passed = 0;            // lanes in which the instruction at hand reads such a value
    u32 id = 0, place = 0;  // in its CTA, and in the cluster
    u32 live = 0, thread0 = 0, carry = 0;
    Cta* cta = nullptr;
    std::vector<Split> splits;
    std::vector<CpAsync> cp_async;
    u32 cp_group[32] = {};
    // wgmma (hopper.cpp): what is in flight, by commit group.
    struct InFlight {
        u32 group;
        bool shared;
        u32 where, bytes;
    };  // a shared-memory range, or a register slot
    std::vector<InFlight> wgmma;
    struct BulkStore {
        u32 group;
        int lane;
        std::vector<std::pair<u32, u32>> ranges;
    };  // what the copy engine reads for a store or a reduction that has not been waited for
    std::vector<BulkStore> bulk;
    u32 bulk_group[32] = {};
    std::vector<u8> busy;  // per register slot: 1 accumulator, 2 operand of an operation in flight
    u32 wgmma_group = 0;
    bool stalled = false;  // ended its slice with a failed poll
    // barrier.cluster: lanes that have arrived at the phase under way, and those that have not waited since they arrived.
    u32 at_cluster_barrier = 0, owes_wait = 0;
    std::vector<u32> fenced;  // what the last fence of cluster scope has released

    u32* r32(u32 offset) { return (u32*)(regs + offset); }
    u64* r64(u32 offset) { return (u64*)(regs + offset); }
    u32& pred(u32 offset) { return *(u32*)(regs + offset); }
    template <class R>
    R* reg(u32 offset) {
        return (R*)(regs + offset);
    }

    const Inst* current = nullptr;
    u32 active = 0;
    void start(Cta& c, u32 w, u32 threads);
    void run(u64& budget);
    u32 pc() const { return current->index; }
    [[noreturn]] void fail(FaultKind kind, const std::string& message, int lane = -1,
                           bool has_address = false, u64 address = 0) const;
    SiteStats& site() const { return cta->counters->sites[pc()]; }
    void check_wgmma(const Inst& i) const;
    void release(std::vector<u32>& clock, bool relaxed);  // into what others will acquire

  private:
    struct Turn {  // of one split: its state, its place in splits, whether it is the only one
        Split s;
        int pick;
        bool alone;
    };
    // What an instruction made of the split: it goes on, has ended or was replaced, arrived at a barrier (and is
    // counted), or has to wait before the instruction can execute.
    enum class Step : u8 { Stays, Leaves, Arrived, Waits };
    u32 enabled(const Inst& i, const Split& s) {
        return i.guard < 0 ? s.mask : s.mask & (pred((u32)i.guard) ^ i.guard_xor);
    }
    int choose();
    void run_split(Turn& t, u64& budget);
    Step step(const Inst& i, Turn& t, u32 m);
    void branch(const Inst& i, Turn& t, u32 m);
    void branch_indexed(const Inst& i, Turn& t, u32 m);
    bool leave(Turn& t, u32 m);
    bool barrier(const Inst& i, Turn& t, u32 m);
    Step wait_for_cluster(const Inst& i, Turn& t, u32 m);
    bool merge(Turn& t);
    void count(const Inst& i, u32 m);
    void check_registers(const Inst& i, u32 m) {
        passed = 0;
        for (u32 s : i.reads) passed |= m & ~defined[s];
        if (passed) read_unwritten(i, m);
    }
    void written(const Inst& i, u32 m) {
        if (passed) return pass_on(i, m);
        for (u32 d : i.writes) defined[d] |= m;
    }
    void read_unwritten(const Inst& i, u32 m);
    void pass_on(const Inst& i, u32 m);
    void left_out(const Inst& i, u32 m);
    void check_guard(const Inst& i, u32 mask);
};

struct Launch {
    Module* module = nullptr;
    Kernel* kernel = nullptr;
    MemoryMap* memory = nullptr;
    u32 grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {0, 0, 0};  // cluster: 0: as the kernel says
    u32 dynamic_shared = 0, dynamic_base = 0;
    std::vector<u8> params;
    Options options;
    Counters counters;
    double seconds = 0;
    bool explicit_cluster = false;
    u64 serial = 0;  // unique per launch, for per-thread caches
    u32 threads_used = 1;
    std::vector<u32> start_image;  // constants, broadcast
    std::mutex sync_mutex;         // release sets of global atomics
    std::unordered_map<u64, std::unordered_map<u32, u32>> released;
    std::atomic<bool> stop{false};
    std::atomic<u64> executed{0};

    void run();  // throws Fault

  private:
    void prepare();
    void prepare_cluster();
    u64 clusters() const;
    u32 host_threads() const;
    size_t resident() const;
    void run_ctas(u32 worker, const std::vector<u64>& order, std::atomic<u64>& next, Counters& mine);
};

u32 threads_per_cta(const Launch& l);
void describe(Fault& f, const Warp& w, const Inst& i, int lane);
std::string lanes_text(u32 m);

template <class F>
inline void for_lanes(u32 m, F f) {
    if (m == ~0u) {
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) f(l);
    } else
        for (; m; m &= m - 1) f(__builtin_ctz(m));
}

// Checks of an access of n bytes of global memory by one lane (memory.cpp, global_races.cpp, warp_races.cpp), and what
// the request costs (traffic.cpp).
void global_read(Warp& w, int lane, u64 addr, u32 n, u32 align, bool strong = false);
void global_write(Warp& w, int lane, u64 addr, u32 n, u32 align, const void* value, bool strong = false);
void global_atomic(Warp& w, int lane, u64 addr, u32 n, u32 align);
Block* global_block(Warp& w, int lane, u64 addr, u32 n, u32 align);
void warp_race_check(Warp& w, int lane, u64 addr, u32 n, bool write, bool atomic, bool same_value);
void global_acquire(Warp& w, u64 addr);
void global_release(Warp& w, u64 addr);
void count_global(Warp& w, u32 mask, const u64* addr, u32 n);
void count_shared(Warp& w, u32 mask, const u32* addr, u32 n);

}  // namespace ptx
