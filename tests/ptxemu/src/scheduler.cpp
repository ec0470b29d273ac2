// scheduler.cpp - warps as sets of converged lanes ("splits"), CTAs as sets of warps, launches as sets of
// CTAs.
//
// Within a warp the split with the smallest program counter runs; splits that meet at the same pc merge. A
// .sync or .aligned instruction waits until the lanes it names have arrived, and it is an error if they
// cannot. With a seed, the order of warps and CTAs and the length of their turns are random; without one they
// run in order.
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

void describe(Fault& f, const Warp& w, const Inst& i, int lane) {
    Launch& l = *w.cta->launch;
    f.line = i.line;
    f.text = i.text;
    if (i.loc) {
        auto it = l.module->files.find(i.file);
        f.source = (it == l.module->files.end() ? "file " + std::to_string(i.file) : it->second) + ":" +
                   std::to_string(i.loc);
    }
    memcpy(f.cta, w.cta->id, sizeof f.cta);
    f.cta_linear = w.cta->linear;
    if (lane < 0) lane = w.active ? __builtin_ctz(w.active) : 0;
    u32 t = w.thread0 + lane;
    f.has_thread = true;
    f.thread[0] = t % l.block[0];
    f.thread[1] = t / l.block[0] % l.block[1];
    f.thread[2] = t / l.block[0] / l.block[1];
}

u32 Warp::pc() const { return (u32)(current - cta->kernel->code.data()); }
SiteStats& Warp::site() const { return cta->counters->sites[pc()]; }
void Warp::fail(FaultKind kind, const std::string& message, int lane, bool has_address, u64 address) const {
    Fault f(kind, message);
    describe(f, *this, *current, lane);
    f.has_address = has_address;
    f.address = address;
    throw f;
}
void Warp::check_registers(const Inst& i, u32 m) {
    for (u32 s : i.reads)
        if ((defined[s] & m) != m)
            fail(FaultKind::UninitializedRegister, "a register is read before it was written",
                 __builtin_ctz(m & ~defined[s]));
}

static std::string lanes_text(u32 m) {
    char b[16];
    snprintf(b, sizeof b, "0x%08x", m);
    return b;
}

// May this split execute the synchronising instruction it stands at? 'm' is its guarded mask.
static bool may_pass(Warp& w, const Inst& i, const Split& s, u32 m) {
    if (i.flow == Flow::WarpSync) {
        u32 need = 0, *mem = w.r32((u32)i.member);
        for_lanes(m, [&](int l) {
            if (!(mem[l] >> l & 1))
                w.fail(FaultKind::Divergence,
                       "the executing thread is not in its own membermask " + lanes_text(mem[l]), l);
            need |= mem[l];
        });
        u32 skipped = need & s.mask & ~m;
        if (skipped)
            w.fail(FaultKind::Divergence,
                   "lanes " + lanes_text(skipped) + " of the membermask are predicated off",
                   __builtin_ctz(skipped));
        return !(need & w.live & ~m);
    }
    if (m != s.mask)
        w.fail(FaultKind::Divergence,
               ".aligned instruction under a predicate that differs within the warp (active " +
                   lanes_text(m) + " of " + lanes_text(s.mask) + ")");
    if (i.flow == Flow::Aligned) {
        u32 lost = ~w.live;
        if (lost)
            w.fail(FaultKind::Divergence, ".aligned instruction needs the whole warp, lanes " +
                                              lanes_text(lost) + " have exited or do not exist");
        return m == ~0u;
    }
    return m == w.live;
}

static void arrive_barrier(Warp& w, const Inst& i, Split& s, u32 m) {
    Cta& c = *w.cta;
    u32 lane = __builtin_ctz(m), id = w.r32(i.s0)[lane];
    if (id >= 16) w.fail(FaultKind::Divergence, "barrier " + std::to_string(id) + " does not exist", lane);
    Barrier& b = c.barriers[id];
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
    if (c.shared.vc) c.shared.release_into(w.id, b.clock);
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
        s.reduction_dst = i.sub == 2 ? (u32)(&i - c.kernel->code.data()) + 1 : 0;
    }
    c.events++;
    c.release_barriers();
}

void Cta::release_barriers() {
    for (int id = 0; id < 16; id++) {
        Barrier& b = barriers[id];
        if (!b.arrived) continue;
        if (b.arrived < (b.expected ? b.expected : live_threads)) continue;
        if (!shared.vc) shared.now++;
        for (auto& w : warps)
            for (auto& s : w->splits)
                if (s.state == Split::WaitBarrier && s.barrier == id) {
                    s.state = Split::Ready;
                    if (shared.vc) shared.acquire_from(w->id, b.clock);
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

void Warp::run(u64& budget) {
    const Inst* code = cta->kernel->code.data();
    Counters& n = *cta->counters;
    const bool track = cta->launch->options.registers;
    stalled = false;
    while (budget && live) {
        // The ready split with the smallest pc; if none is ready, a waiting one whose partners have arrived
        // or exited.
        int pick = -1;
        for (size_t k = 0; k < splits.size(); k++)
            if (splits[k].state == Split::Ready && (pick < 0 || splits[k].pc < splits[pick].pc))
                pick = (int)k;
        if (pick < 0) {
            for (size_t k = 0; k < splits.size() && pick < 0; k++)
                if (splits[k].state == Split::WaitWarp) {
                    current = &code[splits[k].pc];
                    u32 m = current->guard < 0
                                ? splits[k].mask
                                : splits[k].mask & (pred((u32)current->guard) ^ current->guard_xor);
                    active = m;
                    if (may_pass(*this, *current, splits[k], m)) pick = (int)k;
                }
            if (pick < 0) return;
            splits[pick].state = Split::Ready;
        }
        Split s = splits[pick];
        bool alone = splits.size() == 1, keep = true;
        while (budget) {
            const Inst& i = code[s.pc];
            u32 m = i.guard < 0 ? s.mask : s.mask & (pred((u32)i.guard) ^ i.guard_xor);
            current = &i;
            active = m;
            budget--;
            if (track && i.guard >= 0 && (defined[(u32)i.guard / 4] & s.mask) != s.mask) {
                active = s.mask;
                fail(FaultKind::UninitializedRegister, "the guard predicate was never written",
                     __builtin_ctz(s.mask & ~defined[(u32)i.guard / 4]));
            }
            if (!m) {
                s.pc++;
            } else {
                if (track) check_registers(i, m);
                if (__builtin_expect(!wgmma.empty(), 0)) check_wgmma(i);
                if (i.flow == Flow::Plain) {
                    i.run(*this, i, m);
                    s.pc++;
                } else if (i.flow == Flow::Branch) {
                    u32 rest = s.mask & ~m;
                    if (!rest) s.pc = (u32)i.target;
                    else {
                        splits[pick] = {s.pc + 1, rest};
                        s = {(u32)i.target, m};
                        splits.push_back(s);
                        pick = (int)splits.size() - 1;
                        alone = false;
                    }
                } else if (i.flow == Flow::BranchIndexed) {
                    u32* idx = r32(i.s0);
                    u32 rest = s.mask & ~m;
                    std::vector<Split> out;
                    if (rest) out.push_back({s.pc + 1, rest});
                    for_lanes(m, [&](int l) {
                        if (idx[l] >= i.targets.size())
                            fail(FaultKind::OutOfBounds, "brx.idx index out of range", l);
                        u32 t = (u32)i.targets[idx[l]];
                        bool found = false;
                        for (auto& o : out)
                            if (o.pc == t) {
                                o.mask |= 1u << l;
                                found = true;
                            }
                        if (!found) out.push_back({t, 1u << l});
                    });
                    splits.erase(splits.begin() + pick);
                    for (auto& o : out) splits.push_back(o);
                    keep = false;
                } else if (i.flow == Flow::Exit) {
                    live &= ~m;
                    s.mask &= ~m;
                    s.pc++;
                    cta->live_threads -= (u32)__builtin_popcount(m);
                    cta->events++;
                    if (!cp_async.empty() && !live) {
                        current = &i;
                        fail(FaultKind::MissingWait, "the warp exits with cp.async operations in flight");
                    }
                    cta->release_barriers();
                    if (!s.mask) {
                        splits.erase(splits.begin() + pick);
                        keep = false;
                    }
                } else if (i.flow == Flow::Barrier) {
                    bool ok = true;
                    if (i.flag2) {
                        if (m != s.mask) may_pass(*this, i, s, m);
                        ok = m == live;
                    }
                    if (!ok) {
                        s.state = Split::WaitWarp;
                        splits[pick] = s;
                        keep = false;
                        budget++;
                    } else {
                        splits[pick] = s;
                        n.executed[(u32)(&i - code)]++;
                        n.lanes[(u32)(&i - code)] += __builtin_popcount(m);
                        n.instructions++;
                        if (m != s.mask) {
                            splits[pick].mask = m;
                            Split rest{s.pc + 1, s.mask & ~m};
                            splits.push_back(rest);
                        }
                        arrive_barrier(*this, i, splits[pick], m);
                        keep = false;
                        break;
                    }
                } else {  // WarpSync, Aligned, AlignedLive, Poll
                    if (i.flow != Flow::Poll && !may_pass(*this, i, s, m)) {
                        s.state = Split::WaitWarp;
                        splits[pick] = s;
                        keep = false;
                        budget++;
                    } else {
                        i.run(*this, i, m);
                        s.pc++;
                    }
                }
                if (s.state == Split::Ready || i.flow == Flow::Branch) {
                    u32 k = (u32)(&i - code);
                    n.executed[k]++;
                    n.lanes[k] += __builtin_popcount(m);
                    n.instructions++;
                    if (track)
                        for (u32 d : i.writes) defined[d] |= m;
                }
            }
            if (!keep) break;
            if (stalled) {
                splits[pick] = s;
                return;
            }
            if (!alone) {  // merge with splits at the same pc; give way to one further behind
                splits[pick] = s;
                bool behind = false;
                for (size_t k = 0; k < splits.size(); k++) {
                    if ((int)k == pick || splits[k].state == Split::WaitBarrier) continue;
                    if (splits[k].pc == s.pc) {
                        s.mask |= splits[k].mask;
                        splits[pick] = s;
                        splits.erase(splits.begin() + k);
                        if ((int)k < pick) pick--;
                        k--;
                    } else if (splits[k].pc < s.pc && splits[k].state == Split::Ready) behind = true;
                }
                alone = splits.size() == 1;
                if (behind) break;
            }
        }
        if (keep && budget == 0 && pick < (int)splits.size() && splits[pick].state == Split::Ready)
            splits[pick] = s;
    }
}

void Cta::start(Launch& l, u64 lin, Counters& c, std::vector<u8>&) {
    launch = &l;
    kernel = l.kernel;
    linear = lin;
    counters = &c;
    id[0] = (u32)(lin % l.grid[0]);
    id[1] = (u32)(lin / l.grid[0] % l.grid[1]);
    id[2] = (u32)(lin / l.grid[0] / l.grid[1]);
    const Kernel& k = *kernel;
    u32 nt = threads_per_cta(l), nw = (nt + 31) / 32;
    shared.reset(l.dynamic_base + l.dynamic_shared, nw, k.named_barriers, true);
    local.assign((size_t)k.local_bytes * nw * 32, 0xff);
    mbarriers.clear();
    global_words.clear();
    clock = CtaClock{};
    for (auto& b : barriers) b = Barrier{};
    rng.seed(l.options.seed * 1000003 + lin);
    live_threads = nt;
    events = 0;
    while (warps.size() < nw) warps.emplace_back(new Warp);
    warps.resize(nw);
    for (u32 w = 0; w < nw; w++) {
        Warp& W = *warps[w];
        size_t bytes = (k.register_bytes + 127) / 64 * 64;
        if (!W.regs) {
            W.regs_storage.reset(new u8[bytes + 64]);
            W.regs = (u8*)(((u64)W.regs_storage.get() + 63) / 64 * 64);
        }
        u32* r = (u32*)W.regs;
        std::fill(r, r + bytes / 4, 0x7fffdeadu);  // NaN as f32 and as f64
        W.defined.assign(bytes / 4, 0);
        W.id = w;
        W.cta = this;
        W.thread0 = w * 32;
        W.carry = 0;
        W.live = nt - w * 32 >= 32 ? ~0u : (1u << (nt - w * 32)) - 1;
        W.splits.assign(1, Split{0, W.live});
        W.cp_async.clear();
        memset(W.cp_group, 0, sizeof W.cp_group);
        W.wgmma.clear();
        W.busy.clear();
        W.wgmma_group = 0;
        W.stalled = false;
        W.current = k.code.data();
        for (auto& x : k.constants) {
            if (x.width == 1) W.pred(x.offset) = (u32)x.value;
            else if (x.width == 8) std::fill_n(W.r64(x.offset), 32, x.value);
            else std::fill_n(W.r32(x.offset), 32, (u32)x.value);
        }
        for (auto& x : k.specials)
            for (u32 j = 0; j < 32; j++) {
                u32 t = w * 32 + j;
                u64 v = 0;
                switch (x.which) {
                    case Special::TidX: v = t % l.block[0]; break;
                    case Special::TidY: v = t / l.block[0] % l.block[1]; break;
                    case Special::TidZ: v = t / l.block[0] / l.block[1]; break;
                    case Special::NtidX: v = l.block[0]; break;
                    case Special::NtidY: v = l.block[1]; break;
                    case Special::NtidZ: v = l.block[2]; break;
                    case Special::CtaidX: v = id[0]; break;
                    case Special::CtaidY: v = id[1]; break;
                    case Special::CtaidZ: v = id[2]; break;
                    case Special::NctaidX: v = l.grid[0]; break;
                    case Special::NctaidY: v = l.grid[1]; break;
                    case Special::NctaidZ: v = l.grid[2]; break;
                    case Special::LaneId: v = j; break;
                    case Special::WarpId: v = w; break;
                    case Special::NWarpId: v = nw; break;
                    case Special::SmId: v = lin % 108; break;
                    case Special::NSmId: v = 108; break;
                    case Special::LaneMaskEq: v = 1u << j; break;
                    case Special::LaneMaskLt: v = (1u << j) - 1; break;
                    case Special::LaneMaskLe: v = (2u << j) - 1; break;
                    case Special::LaneMaskGt: v = ~((2u << j) - 1); break;
                    case Special::LaneMaskGe: v = ~((1u << j) - 1); break;
                    case Special::DynSmem: v = l.dynamic_shared; break;
                    case Special::TotalSmem: v = l.dynamic_base + l.dynamic_shared; break;
                    case Special::DynBase: v = l.dynamic_base; break;
                    case Special::Zero:
                    case Special::GridId: v = 0; break;
                    case Special::One: v = 1; break;
                }
                if (x.width == 8) W.r64(x.offset)[j] = v;
                else W.r32(x.offset)[j] = (u32)v;
            }
    }
}

void Cta::deadlock() {
    std::string text;
    FaultKind kind = FaultKind::Deadlock;
    Warp* culprit = nullptr;
    const Inst* at = nullptr;
    for (auto& w : warps)
        for (auto& s : w->splits) {
            const Inst* i = &kernel->code[s.state == Split::WaitBarrier ? s.pc - 1 : s.pc];
            if (s.state == Split::WaitWarp && kind != FaultKind::Divergence) {
                kind = FaultKind::Divergence;
                culprit = w.get();
                at = i;
            }
            if (!culprit) {
                culprit = w.get();
                at = i;
            }
            if (text.size() < 1500)
                text += "\n    warp " + std::to_string(w->id) + " lanes " + lanes_text(s.mask) +
                        (s.state == Split::WaitWarp      ? " wait for other lanes at line "
                         : s.state == Split::WaitBarrier ? " wait at the barrier of line "
                         : w->stalled                    ? " poll an mbarrier near line "
                                                         : " are at line ") +
                        std::to_string(i->line) + ": " + i->text;
        }
    Fault f(kind, (kind == FaultKind::Divergence ? "lanes that must execute this together have diverged:"
                                                 : "no thread of the CTA can make progress:") +
                      text);
    culprit->active = culprit->live;
    describe(f, *culprit, *at, -1);
    throw f;
}

bool Cta::run(u64 budget) {
    std::vector<u32> order(warps.size());
    for (u32 k = 0; k < order.size(); k++) order[k] = k;
    const u64 seed = launch->options.seed;
    u64 used = 0;
    int idle = 0;
    while (live_threads) {
        if (launch->stop.load(std::memory_order_relaxed)) return true;
        if (seed) std::shuffle(order.begin(), order.end(), rng);
        u64 before = events;
        bool progress = false;
        for (u32 k : order) {
            Warp& w = *warps[k];
            if (!w.live) continue;
            u64 slice = seed ? 1 + rng() % 700 : 20000, b = slice;
            w.run(b);
            used += slice - b;
            if (slice != b && !w.stalled) progress = true;
        }
        idle = progress || events != before ? 0 : idle + 1;
        if (idle > 3) deadlock();
        if (used >= budget) {
            launch->executed += used;
            return !live_threads;
        }
    }
    launch->executed += used;
    return true;
}

void Launch::run() {
    static std::atomic<u64> launches{0};
    serial = ++launches;
    auto t0 = std::chrono::steady_clock::now();
    const Options& o = options;
    u64 total = (u64)grid[0] * grid[1] * grid[2];
    u32 nt = threads_per_cta(*this);
    auto refuse = [](const std::string& m) { throw Fault(FaultKind::Launch, m); };
    if (!total || !nt) refuse("empty grid or block");
    if (nt > 1024) refuse("more than 1024 threads per CTA");
    if (grid[1] > 65535 || grid[2] > 65535 || grid[0] > 0x7fffffff) refuse("grid too large");
    if (kernel->reqntid && kernel->reqntid != nt)
        refuse("the kernel was compiled for " + std::to_string(kernel->reqntid) + " threads per CTA, not " +
               std::to_string(nt));
    dynamic_base = (kernel->shared_static + 15) / 16 * 16;
    if (module->arch >= 90)
        dynamic_base = (dynamic_base + 1023) / 1024 *
                       1024;  // where the hardware starts dynamic shared memory, for swizzles
    u32 limit = o.smem_limit                               ? o.smem_limit
                : module->arch >= 90                       ? 232448
                : module->arch == 86 || module->arch == 89 ? 101376
                : module->arch == 75                       ? 65536
                                                           : 166912;
    if (kernel->shared_static + dynamic_shared > limit)
        refuse("shared memory " + std::to_string(kernel->shared_static + dynamic_shared) + " exceeds the " +
               std::to_string(limit) + " bytes of the device");
    if (o.global_races && total + 2 > (1u << 21))
        refuse("more CTAs than the inter-CTA race detector can number; launch with global_races=False");
    for (auto& g : module->globals) memory->add(g.first, g.second);
    memory->prepare_launch(o.global_races && total > 1 ? kernel->granule : 0, true);
    counters.resize(kernel->code.size());
    u32 threads = o.threads                 ? o.threads
                  : kernel->order_sensitive ? 1
                                            : std::max(1u, std::thread::hardware_concurrency());
    threads = (u32)std::min<u64>(threads, total);
    threads_used = threads;

    std::vector<u64> order;
    if (o.seed) {
        order.resize(total);
        for (u64 k = 0; k < total; k++) order[k] = k;
        std::mt19937_64 r(o.seed);
        std::shuffle(order.begin(), order.end(), r);
    }
    std::atomic<u64> next{0};
    std::mutex result;
    std::unique_ptr<Fault> fault;
    auto worker = [&](u32 t) {
        Counters mine;
        mine.resize(kernel->code.size());
        std::mt19937_64 rng(o.seed + 77 * t);
        std::deque<std::unique_ptr<Cta>> running;
        std::vector<std::unique_ptr<Cta>> pool;
        std::vector<u8> scratch;
        // Suspended CTAs keep their state: bound their number by memory.
        const u64 cta_bytes =
            (u64)(kernel->register_bytes * 2 + kernel->local_bytes * 32) * ((nt + 31) / 32) +
            (dynamic_base + dynamic_shared) * 10ull + 65536;
        const size_t resident = (size_t)std::max<u64>(4, std::min<u64>(1024, (1ull << 30) / cta_bytes));
        bool suspended = false, more = true;
        try {
            while (!stop) {
                // In order: one CTA at a time, a further one only when all running ones are waiting for
                // something. Seeded: several.
                if (more && running.size() < resident &&
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
                    c->start(*this, o.seed ? order[k] : k, mine, scratch);
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
                    throw Fault(FaultKind::Deadlock,
                                "no end after " + std::to_string(o.max_instructions) +
                                    " warp instructions (endless loop, or a wait for another CTA)");
            }
        } catch (const Fault& f) {
            std::lock_guard<std::mutex> g(result);
            if (!fault || f.cta_linear < fault->cta_linear) fault.reset(new Fault(f));
            stop = true;
        }
        std::lock_guard<std::mutex> g(result);
        counters.add(mine);
    };
    if (threads == 1) worker(0);
    else {
        std::vector<std::thread> pool;
        for (u32 t = 0; t < threads; t++) pool.emplace_back(worker, t);
        for (auto& t : pool) t.join();
    }
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
    if (fault) throw *fault;
}

}  // namespace ptx
