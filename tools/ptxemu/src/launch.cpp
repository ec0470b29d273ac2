// launch.cpp - a launch as a set of clusters, of one CTA unless it says more, which host threads share.
//
// With a seed, the order of the clusters and the length of their turns are random; without one they run in order.
#include <algorithm>
#include <chrono>
#include <thread>
#include "cluster.h"

namespace ptx {

void Counters::add(const Counters& o) {
    for (size_t k = 0; k < executed.size(); k++) {
        executed[k] += o.executed[k];
        lanes[k] += o.lanes[k];
        sites[k].accesses += o.sites[k].accesses;
        sites[k].bytes += o.sites[k].bytes;
        sites[k].units += o.sites[k].units;
        sites[k].ideal += o.sites[k].ideal;
    }
    instructions += o.instructions;
}

u32 threads_per_cta(const Launch& l) { return l.block[0] * l.block[1] * l.block[2]; }

static u32 shared_limit(const Launch& l) {
    const int arch = l.module->arch;
    return l.options.smem_limit       ? l.options.smem_limit
           : arch >= 90               ? 232448
           : arch == 86 || arch == 89 ? 101376
           : arch == 75               ? 65536
                                      : 166912;
}

// The clusters' size: that of the launch, or of the kernel; both may say it, if they agree.
void Launch::prepare_cluster() {
    const u32* compiled = kernel->cluster;
    auto text = [](const u32* s) {
        return std::to_string(s[0]) + " x " + std::to_string(s[1]) + " x " + std::to_string(s[2]);
    };
    auto refuse = [](const std::string& m) { throw Fault(FaultKind::Launch, m); };
    if (cluster[0] && compiled[0] && !std::equal(compiled, compiled + 3, cluster))
        refuse("the kernel was compiled for clusters of " + text(compiled) + " CTAs, not " + text(cluster));
    explicit_cluster = cluster[0] || compiled[0];
    for (int k = 0; k < 3; k++) {
        if (!cluster[k]) cluster[k] = std::max(1u, compiled[k]);
        if (grid[k] % cluster[k]) refuse("the grid is not made of clusters of " + text(cluster) + " CTAs");
    }
    const u32 count = cluster[0] * cluster[1] * cluster[2], warps = (threads_per_cta(*this) + 31) / 32;
    if (count > 1 && module->arch < 90) refuse("clusters need sm_90");
    if (count > 8) refuse("clusters of more than 8 CTAs are not portable");
    if (count > 1 && count * warps > 32)
        throw Fault(FaultKind::Unsupported, "clusters of more than 32 warps: " + std::to_string(count) + " CTAs of " +
                                                std::to_string(warps));
}
u64 Launch::clusters() const {
    return (u64)(grid[0] / cluster[0]) * (grid[1] / cluster[1]) * (grid[2] / cluster[2]);
}

// What a device would refuse, is refused; then memory and counters are made ready.
void Launch::prepare() {
    const u64 total = (u64)grid[0] * grid[1] * grid[2];
    const u32 nt = threads_per_cta(*this);
    auto refuse = [](const std::string& m) { throw Fault(FaultKind::Launch, m); };
    if (!total || !nt) refuse("empty grid or block");
    if (nt > 1024) refuse("more than 1024 threads per CTA");
    if (grid[1] > 65535 || grid[2] > 65535 || grid[0] > 0x7fffffff) refuse("grid too large");
    if (kernel->reqntid && kernel->reqntid != nt)
        refuse("the kernel was compiled for " + std::to_string(kernel->reqntid) + " threads per CTA, not " +
               std::to_string(nt));
    prepare_cluster();
    dynamic_base = (kernel->shared_static + 15) / 16 * 16;
    // Where the hardware starts dynamic shared memory, for swizzles.
    if (module->arch >= 90) dynamic_base = (dynamic_base + 1023) / 1024 * 1024;
    if (kernel->shared_static + dynamic_shared > shared_limit(*this))
        refuse("shared memory " + std::to_string(kernel->shared_static + dynamic_shared) + " exceeds the " +
               std::to_string(shared_limit(*this)) + " bytes of the device");
    if (options.global_races && total + 2 > (1u << 21))
        refuse("more CTAs than the inter-CTA race detector can number; launch with global_races=False");
    for (auto& g : module->globals) memory->add(g.first, g.second);
    memory->prepare_launch(options.global_races && total > 1 ? kernel->granule : 0, true);
    counters.resize(kernel->code.size());
}

u32 Launch::host_threads() const {
    const u32 wanted = options.threads           ? options.threads
                       : kernel->order_sensitive ? 1
                                                 : std::max(1u, std::thread::hardware_concurrency());
    return (u32)std::min<u64>(wanted, clusters());
}

// Suspended clusters keep their state: memory bounds their number.
size_t Launch::resident() const {
    const u64 cta_bytes =
        (u64)(kernel->register_bytes * 2 + kernel->local_bytes * 32) * ((threads_per_cta(*this) + 31) / 32) +
        (dynamic_base + dynamic_shared) * 10ull + 65536;
    const u64 bytes = cta_bytes * cluster[0] * cluster[1] * cluster[2];
    return (size_t)std::max<u64>(4, std::min<u64>(1024, (1ull << 30) / bytes));
}

// One host thread: in order, one cluster at a time and a further one only when all running ones wait for something;
// seeded, several.
void Launch::run_ctas(u32 worker, const std::vector<u64>& order, std::atomic<u64>& next, Counters& mine) {
    const Options& o = options;
    const u64 total = order.size();
    std::mt19937_64 rng(o.seed + 77 * worker);
    std::deque<std::unique_ptr<Cluster>> running;
    std::vector<std::unique_ptr<Cluster>> pool;
    bool suspended = false, more = true;
    while (!stop) {
        if (more && running.size() < resident() &&
            (running.empty() || (o.seed ? running.size() < 4 || rng() % 4 == 0 : suspended))) {
            u64 k = next++;
            if (k >= total) {
                more = false;
                if (running.empty()) break;
                continue;
            }
            std::unique_ptr<Cluster> c;
            if (pool.empty()) c.reset(new Cluster);
            else {
                c = std::move(pool.back());
                pool.pop_back();
            }
            c->start(*this, order[k], mine);
            running.push_front(std::move(c));
            if (o.seed && running.size() < 4) continue;
        }
        if (running.empty()) break;
        size_t pick = o.seed ? rng() % running.size() : 0;
        std::unique_ptr<Cluster> c = std::move(running[pick]);
        running.erase(running.begin() + pick);
        bool done = c->run(o.seed ? 500 + rng() % 20000 : 300000);
        suspended = !done;
        if (done) pool.push_back(std::move(c));
        else running.push_back(std::move(c));
        if (executed > o.max_instructions)
            throw Fault(FaultKind::Deadlock, "no end after " + std::to_string(o.max_instructions) +
                                                 " warp instructions (endless loop, or a wait for another CTA)");
    }
}

void Launch::run() {
    static std::atomic<u64> launches{0};
    serial = ++launches;
    auto t0 = std::chrono::steady_clock::now();
    prepare();
    threads_used = host_threads();
    std::vector<u64> order(clusters());
    for (u64 k = 0; k < order.size(); k++) order[k] = k;
    if (options.seed) {
        std::mt19937_64 r(options.seed);
        std::shuffle(order.begin(), order.end(), r);
    }
    std::atomic<u64> next{0};
    std::mutex result;
    std::unique_ptr<Fault> fault;
    auto worker = [&](u32 t) {
        Counters mine;
        mine.resize(kernel->code.size());
        try {
            run_ctas(t, order, next, mine);
        } catch (const Fault& f) {
            std::lock_guard<std::mutex> g(result);
            if (!fault || f.cta_linear < fault->cta_linear) fault.reset(new Fault(f));
            stop = true;
        }
        std::lock_guard<std::mutex> g(result);
        counters.add(mine);
    };
    if (threads_used == 1) worker(0);
    else {
        std::vector<std::thread> pool;
        for (u32 t = 0; t < threads_used; t++) pool.emplace_back(worker, t);
        for (auto& t : pool) t.join();
    }
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    if (fault) throw *fault;
}

}  // namespace ptx
