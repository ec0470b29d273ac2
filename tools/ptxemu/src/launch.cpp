// launch.cpp - a launch as a set of CTAs, which host threads share.
//
// With a seed, the order of the CTAs and the length of their turns are random; without one they run in order.
#include <algorithm>
#include <chrono>
#include <thread>
#include "machine.h"

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
    const u64 total = (u64)grid[0] * grid[1] * grid[2];
    const u32 wanted = options.threads           ? options.threads
                       : kernel->order_sensitive ? 1
                                                 : std::max(1u, std::thread::hardware_concurrency());
    return (u32)std::min<u64>(wanted, total);
}

// Suspended CTAs keep their state: memory bounds their number.
size_t Launch::resident() const {
    const u64 cta_bytes =
        (u64)(kernel->register_bytes * 2 + kernel->local_bytes * 32) * ((threads_per_cta(*this) + 31) / 32) +
        (dynamic_base + dynamic_shared) * 10ull + 65536;
    return (size_t)std::max<u64>(4, std::min<u64>(1024, (1ull << 30) / cta_bytes));
}

// One host thread: in order, one CTA at a time and a further one only when all running ones wait for something;
// seeded, several.
void Launch::run_ctas(u32 worker, const std::vector<u64>& order, std::atomic<u64>& next, Counters& mine) {
    const Options& o = options;
    const u64 total = order.size();
    std::mt19937_64 rng(o.seed + 77 * worker);
    std::deque<std::unique_ptr<Cta>> running;
    std::vector<std::unique_ptr<Cta>> pool;
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
            std::unique_ptr<Cta> c;
            if (pool.empty()) c.reset(new Cta);
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
        std::unique_ptr<Cta> c = std::move(running[pick]);
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
    std::vector<u64> order((u64)grid[0] * grid[1] * grid[2]);
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
