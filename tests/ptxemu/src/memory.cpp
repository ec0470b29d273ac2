// memory.cpp - guarded global blocks, inter-CTA race detection, shared-memory shadow state, traffic counters.
#include "memory.h"
#include <sys/mman.h>
#include <algorithm>
#include <cstdlib>
#include "machine.h"

namespace ptx {

// --- global memory
// --------------------------------------------------------------------------------------------------
constexpr u64 kGuard = 64ull << 20;  // unmapped space on both sides of a block

u64 MemoryMap::allocate(u64 size, u64 low_bits) {
    low_bits &= 4095;
    u64 body = (size + low_bits + 4095) / 4096 * 4096 + 4096, total = body + 2 * kGuard;
    void* p = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Fault(FaultKind::Launch, "cannot reserve address space");
    u64 start = (u64)p + kGuard;
    if (mprotect((void*)start, body, PROT_READ | PROT_WRITE))
        throw Fault(FaultKind::Launch, "out of host memory");
    u64 base = start + low_bits;
    mappings_[base] = {p, total};
    add(base, size);
    return base;
}
void MemoryMap::free(u64 base) {
    blocks_.erase(base);
    auto it = mappings_.find(base);
    if (it != mappings_.end()) {
        munmap(it->second.first, it->second.second);
        mappings_.erase(it);
    }
}
MemoryMap::~MemoryMap() {
    for (auto& m : mappings_) munmap(m.second.first, m.second.second);
}
void MemoryMap::add(u64 base, u64 size) {
    Block& b = blocks_[base];
    b.base = base;
    b.size = std::max(b.size, size);
}
void MemoryMap::set_uninitialized(u64 base, u64 size) {
    Block* b = find(base, size);
    if (!b) throw Fault(FaultKind::Launch, "set_uninitialized: unknown block");
    if (!b->defined) {
        b->defined.reset(new u8[b->size]);
        memset(b->defined.get(), 1, b->size);
    }
    memset(b->defined.get() + (base - b->base), 0, size);
}
void MemoryMap::set_defined(u64 base, u64 size) {
    Block* b = find(base, size);
    if (b && b->defined) memset(b->defined.get() + (base - b->base), 1, size);
}
void MemoryMap::set_read_only(u64 base, bool on) {
    if (Block* b = find(base, 1)) b->read_only = on;
}
Block* MemoryMap::find(u64 a, u64 n) {
    auto it = blocks_.upper_bound(a);
    if (it == blocks_.begin()) return nullptr;
    Block& b = (--it)->second;
    return a >= b.base && a + n <= b.base + b.size ? &b : nullptr;
}
void MemoryMap::prepare_launch(u32 granule, bool traffic) {
    for (auto& [k, b] : blocks_) {
        if (granule) b.shadow.reset((std::atomic<u64>*)calloc(b.size / granule + 2, 8));
        else b.shadow.reset();
        if (traffic) b.touched.reset((std::atomic<u8>*)calloc(b.size / 32 + 2, 1));
    }
}
u64 MemoryMap::touched_bytes() const {
    u64 n = 0;
    for (auto& [k, b] : blocks_)
        if (b.touched)
            for (u64 i = 0; i < b.size / 32 + 2; i++)
                n += b.touched[i].load(std::memory_order_relaxed) ? 32 : 0;
    return n;
}

Block* global_block(Warp& w, const Inst& i, int lane, u64 a, u32 n, u32 align) {
    (void)i;
    static thread_local Block* last[2] = {nullptr, nullptr};
    static thread_local u64 owner = 0;
    if (owner != w.cta->launch->serial) {
        last[0] = last[1] = nullptr;
        owner = w.cta->launch->serial;
    }
    Block* b = last[0];
    if (!(b && a >= b->base && a + n <= b->base + b->size)) {
        std::swap(last[0], last[1]);
        b = last[0];
        if (!(b && a >= b->base && a + n <= b->base + b->size)) {
            b = w.cta->launch->memory->find(a, n);
            if (!b)
                w.fail(FaultKind::OutOfBounds,
                       "global access of " + std::to_string(n) + " bytes outside every registered block",
                       lane, true, a);
            last[0] = b;
        }
    }
    if (a & (align - 1))
        w.fail(FaultKind::Misaligned,
               "global access of " + std::to_string(n) + " bytes is not aligned to " + std::to_string(align),
               lane, true, a);
    return b;
}

// GlobalRace. The record of a granule (4 bytes, or the smallest global access of the kernel) is 64 bits:
// writer {cta:21, time:10, atomic:1} and reader {cta:21, time:10, -:1}. cta is stored plus one; 'many' stands
// for several CTAs. Two accesses of different CTAs, one of them a plain write, or a plain access and an
// atomic one, conflict unless the second CTA has acquired (through a global atomic) something the first one
// released after its access.
constexpr u32 kMany = (1u << 21) - 1, kMaxTime = 1023;
struct Half32 {
    u32 cta, time;
    bool atomic;
};
static inline Half32 unpack(u32 v) { return {v & kMany, v >> 21 & kMaxTime, (v >> 31) != 0}; }
static inline u32 pack(u32 cta, u32 time, bool atomic) {
    return cta | std::min(time, kMaxTime) << 21 | (u32)atomic << 31;
}

static bool knows(Warp& w, Half32 other) {
    auto& known = w.cta->clock.known;
    Launch& l = *w.cta->launch;
    if (!w.cta->kernel->gpu_fences) return false;
    if (other.cta == kMany) return known.size() + 1 >= (u64)l.grid[0] * l.grid[1] * l.grid[2];
    auto it = known.find(other.cta - 1);
    return it != known.end() && it->second >= other.time;
}
static void race(Warp& w, int lane, u64 a, const char* what, Half32 other) {
    w.fail(
        FaultKind::GlobalRace,
        std::string(what) + " by this CTA conflicts with an unordered access of the same word by " +
            (other.cta == kMany ? std::string("several other CTAs") : "CTA " + std::to_string(other.cta - 1)),
        lane, true, a);
}
enum Access { kRead, kStrongRead, kWrite, kAtomic };  // strong (volatile, relaxed ...) stores count as atomic
static void race_check(Warp& w, int lane, Block* b, u64 a, u32 n, Access kind, const void* value) {
    if (w.cta->launch->options.warp_races)
        warp_race_check(w, lane, a, n, kind == kWrite || kind == kAtomic, kind == kAtomic || kind == kStrongRead,
                        kind == kWrite && value && !memcmp(value, (void*)a, n));
    if (!b->shadow) return;
    u32 me = (u32)w.cta->linear + 1, t = w.cta->clock.time, g = w.cta->kernel->granule;
    for (u64 word = (a - b->base) / g; word <= (a + n - 1 - b->base) / g; word++) {
        std::atomic<u64>& rec = b->shadow[word];
        u64 old = rec.load(std::memory_order_relaxed), neu;
        do {
            Half32 wr = unpack((u32)old), rd = unpack((u32)(old >> 32));
            u32 nw = (u32)old, nr = (u32)(old >> 32);
            bool foreign_w = wr.cta && wr.cta != me, foreign_r = rd.cta && rd.cta != me;
            if (kind == kStrongRead && wr.atomic) break;
            if (kind == kRead || kind == kStrongRead) {
                if (foreign_w && !knows(w, wr))
                    race(w, lane, a, wr.atomic ? "plain read (of a word updated atomically)" : "read", wr);
                nr = foreign_r ? kMany : pack(me, t, false);
            } else if (kind == kWrite) {
                bool same = value && !w.cta->launch->options.strict_same_value && b->base + word * g >= a &&
                            b->base + (word + 1) * g <= a + n &&
                            !memcmp((u8*)value + (b->base + word * g - a), (void*)(b->base + word * g), g);
                if (foreign_w && !same && !knows(w, wr))
                    race(w, lane, a, wr.atomic ? "plain write (of a word updated atomically)" : "write", wr);
                if (foreign_r && !same && !knows(w, rd)) race(w, lane, a, "write", rd);
                nw = pack(me, t, false);
                nr = foreign_r && same ? nr : 0;
            } else {
                if (foreign_w && !wr.atomic && !knows(w, wr)) race(w, lane, a, "atomic", wr);
                if (foreign_r && !knows(w, rd)) race(w, lane, a, "atomic", rd);
                nw = foreign_w && wr.atomic ? pack(kMany, t, true) : pack(me, t, true);
            }
            neu = (u64)nr << 32 | nw;
        } while (neu != old && !rec.compare_exchange_weak(old, neu, std::memory_order_relaxed));
    }
}
void global_read(Warp& w, const Inst& i, int lane, u64 a, u32 n, bool strong) {
    (void)i;
    Block* b = global_block(w, i, lane, a, n, 1);
    if (b->defined && w.cta->launch->options.init_global)
        for (u32 k = 0; k < n; k++)
            if (!b->defined[a - b->base + k])
                w.fail(FaultKind::Uninitialized, "global memory is read before anything was written to it",
                       lane, true, a + k);
    race_check(w, lane, b, a, n, strong ? kStrongRead : kRead, nullptr);
}
void global_write(Warp& w, const Inst& i, int lane, u64 a, u32 n, const void* value, bool strong) {
    Block* b = global_block(w, i, lane, a, n, 1);
    if (b->read_only) w.fail(FaultKind::ReadOnly, "write to memory registered as read-only", lane, true, a);
    if (b->defined) memset(&b->defined[a - b->base], 1, n);
    race_check(w, lane, b, a, n, strong ? kAtomic : kWrite, value);
}
void global_atomic(Warp& w, const Inst& i, int lane, u64 a, u32 n) {
    Block* b = global_block(w, i, lane, a, n, 1);
    if (b->read_only) w.fail(FaultKind::ReadOnly, "atomic on memory registered as read-only", lane, true, a);
    if (b->defined && w.cta->launch->options.init_global)
        for (u32 k = 0; k < n; k++)
            if (!b->defined[a - b->base + k])
                w.fail(FaultKind::Uninitialized, "atomic on global memory that was never written", lane, true,
                       a + k);
    race_check(w, lane, b, a, n, kAtomic, nullptr);
}
void global_release(Warp& w, u64 a) {
    CtaClock& c = w.cta->clock;
    std::lock_guard<std::mutex> g(w.cta->launch->sync_mutex);
    auto& set = w.cta->launch->released[a];
    for (auto& [k, t] : c.known) {
        u32& x = set[k];
        x = std::max(x, t);
    }
    set[(u32)w.cta->linear] = c.time;
    if (c.time < kMaxTime) c.time++;
}
void global_acquire(Warp& w, u64 a) {
    CtaClock& c = w.cta->clock;
    std::lock_guard<std::mutex> g(w.cta->launch->sync_mutex);
    auto it = w.cta->launch->released.find(a);
    if (it == w.cta->launch->released.end()) return;
    for (auto& [k, t] : it->second)
        if (k != (u32)w.cta->linear) {
            u32& x = c.known[k];
            x = std::max(x, t);
        }
}

// 32-byte sectors touched by one warp-wide request; the ideal is the number needed if the same bytes were
// contiguous.
void count_global(Warp& w, u32 mask, const u64* addr, u32 n) {
    u64 sectors[64];
    int k = 0;
    u64 prev = ~0ull;
    bool sorted = true;
    for (u32 m = mask; m; m &= m - 1) {
        u64 a = addr[__builtin_ctz(m)];
        for (u64 s = a / 32; s <= (a + n - 1) / 32; s++) {
            if (s == prev) continue;
            if (k && s < prev) sorted = false;
            if (k < 64) sectors[k++] = s;
            prev = s;
        }
    }
    if (!sorted) {
        std::sort(sectors, sectors + k);
        k = (int)(std::unique(sectors, sectors + k) - sectors);
    }
    SiteStats& s = w.site();
    u64 bytes = (u64)n * __builtin_popcount(mask);
    s.accesses++;
    s.bytes += bytes;
    s.units += k;
    s.ideal += (bytes + 31) / 32;
    for (u32 m = mask; m; m &= m - 1) {
        u64 a = addr[__builtin_ctz(m)];
        Block* b = global_block(w, *w.current, __builtin_ctz(m), a, n, 1);
        if (b->touched)
            for (u64 q = a / 32; q <= (a + n - 1) / 32; q++) {
                auto& t = b->touched[q - b->base / 32];
                if (!t.load(std::memory_order_relaxed)) t.store(1, std::memory_order_relaxed);
            }
    }
}
// Wavefronts of a shared-memory request: 32 banks of 4 bytes; 8- and 16-byte accesses go in half and quarter
// warps, in each phase a bank group serves one distinct unit at a time. (A model: documented behaviour up to
// undocumented merging.)
void count_shared(Warp& w, u32 mask, const u32* addr, u32 n) {
    u32 unit = n <= 4 ? 4 : n, lanes = 128 / unit, groups = 128 / unit, waves = 0, ideal = 0;
    for (u32 base = 0; base < 32; base += lanes) {
        u32 m = lanes == 32 ? mask : mask >> base & ((1u << lanes) - 1);
        if (!m) continue;
        u32 seen[32][32];
        u8 depth[32] = {};
        u32 worst = 1;
        for (; m; m &= m - 1) {
            u32 u = addr[base + __builtin_ctz(m)] / unit, g = u % groups;
            bool dup = false;
            for (u32 k = 0; k < depth[g]; k++) dup |= seen[g][k] == u;
            if (!dup) {
                seen[g][depth[g]++] = u;
                worst = std::max<u32>(worst, depth[g]);
            }
        }
        waves += worst;
        ideal++;
    }
    SiteStats& s = w.site();
    s.accesses++;
    s.bytes += (u64)n * __builtin_popcount(mask);
    s.units += waves;
    s.ideal += ideal;
}

// --- shared memory
// --------------------------------------------------------------------------------------------------
void SharedMemory::reset(u32 bytes, u32 nwarps, bool vector_clocks, bool poison) {
    bytes_ = bytes;
    warps = nwarps;
    vc = vector_clocks;
    now = 1;
    data_.assign(bytes + 16, poison ? 0xff : 0);
    words_.assign(bytes / 4 + 2, Word{});
    byte_words_.clear();
    seen.assign((size_t)nwarps * nwarps, 0);
    if (vc) readers_.assign((size_t)(bytes / 4 + 2) * nwarps, 0);
}
void SharedMemory::check(Warp& w, const Inst&, int lane, u64 a, u32 n, u32 align) {
    if (a + n > bytes_)
        w.fail(FaultKind::OutOfBounds,
               "shared access of " + std::to_string(n) + " bytes beyond the " + std::to_string(bytes_) +
                   " bytes of the CTA",
               lane, true, a);
    if (a & (align - 1))
        w.fail(FaultKind::Misaligned,
               "shared access of " + std::to_string(n) + " bytes is not aligned to " + std::to_string(align),
               lane, true, a);
}

template <class F>
inline void SharedMemory::each_record(u32 a, u32 n, F f) {
    for (u32 word = a / 4, end = (a + n - 1) / 4; word <= end; word++) {
        u32 lo = std::max(a, word * 4) & 3, hi = std::min(a + n - 1, word * 4 + 3) & 3,
            bits = (2u << hi) - (1u << lo);
        Word& r = words_[word];
        if (bits == 15 && !r.split) {
            f(r, word, 15u);
            continue;
        }
        if (byte_words_.empty()) byte_words_.resize(words_.size() * 4);
        Word* b = &byte_words_[word * 4];
        if (!r.split) {
            for (int k = 0; k < 4; k++) {
                b[k] = r;
                b[k].defined = r.defined >> k & 1;
            }
            r.split = 1;
        }
        for (u32 k = lo; k <= hi; k++) f(b[k], word, 1u);
    }
}

static std::string where(Warp& w, u32 pc) {
    const Inst& i = w.cta->kernel->code[pc];
    return "line " + std::to_string(i.line) + ": " + i.text;
}

inline void SharedMemory::read_record(Warp& w, const Inst& i, int lane, u32 a, Word& r, u32 index, u32 bits) {
    (void)i;
    const Options& o = w.cta->launch->options;
    if (__builtin_expect(r.pending, 0))
        w.fail(
            FaultKind::MissingWait,
            "shared memory is read while an asynchronous copy into it is in flight (" + where(w, r.wpc) + ")",
            lane, true, a);
    if (o.init_shared && (r.defined & bits) != bits)
        w.fail(FaultKind::Uninitialized,
               "shared memory is read before anything was written to it (never written, or a barrier is "
               "missing)",
               lane, true, a);
    u32 me = 1u << w.id;
    if (!vc) {
        if (r.wclk == now && (r.wmask & ~me) && !(r.wmask & me && !o.strict_same_value) && o.shared_races)
            w.fail(FaultKind::SharedRace,
                   "read conflicts with a write of warp " + std::to_string(__builtin_ctz(r.wmask & ~me)) +
                       " in the same barrier interval (" + where(w, r.wpc) + ")",
                   lane, true, a);
        if (r.rclk != now) {
            r.rclk = now;
            r.rmask = 0;
        }
    } else {
        if (o.shared_races && !(r.wmask & me && !o.strict_same_value))
            for (u32 m = r.wmask & ~me; m; m &= m - 1)
                if (seen[w.id * warps + __builtin_ctz(m)] < r.wclk)
                    w.fail(FaultKind::SharedRace,
                           "read is not ordered after a write of warp " + std::to_string(__builtin_ctz(m)) +
                               " (" + where(w, r.wpc) + ")",
                           lane, true, a);
        readers_[(size_t)index * warps + w.id] = now;
    }
    r.rmask |= me;
    r.rpc = w.pc();
}

inline void SharedMemory::write_record(Warp& w, const Inst& i, int lane, u32 a, Word& r, u32 index, u32 bits,
                                       bool same, u8 pending, bool atomic) {
    (void)i;
    const Options& o = w.cta->launch->options;
    u32 me = 1u << w.id, pc = w.pc();
    if (__builtin_expect(r.pending, 0))
        w.fail(FaultKind::MissingWait,
               "shared memory is written while an asynchronous copy into it is in flight (" +
                   where(w, r.wpc) + ")",
               lane, true, a);
    if (__builtin_expect(r.async_readers, 0))
        w.fail(FaultKind::MissingWait,
               "shared memory is written while an asynchronous matrix operation may still read it", lane,
               true, a);
    bool benign = same && !o.strict_same_value;
    bool both_atomic =
        atomic && r.wpc < w.cta->kernel->code.size() && w.cta->kernel->code[r.wpc].cls == Cls::Atomic;
    bool unordered_writer = false;
    if (o.shared_races) {
        if (!vc) {
            unordered_writer = r.wclk == now && (r.wmask & ~me);
            if (unordered_writer && !benign && !both_atomic)
                w.fail(FaultKind::SharedRace,
                       "write conflicts with a write of warp " +
                           std::to_string(__builtin_ctz(r.wmask & ~me)) + " in the same barrier interval (" +
                           where(w, r.wpc) + ")",
                       lane, true, a);
            if (r.rclk == now && (r.rmask & ~me) && !benign && !both_atomic)
                w.fail(FaultKind::SharedRace,
                       "write conflicts with a read of warp " + std::to_string(__builtin_ctz(r.rmask & ~me)) +
                           " in the same barrier interval (" + where(w, r.rpc) + ")",
                       lane, true, a);
        } else {
            for (u32 m = r.wmask & ~me; m; m &= m - 1)
                if (seen[w.id * warps + __builtin_ctz(m)] < r.wclk) {
                    unordered_writer = true;
                    if (!benign && !both_atomic)
                        w.fail(FaultKind::SharedRace,
                               "write is not ordered after a write of warp " +
                                   std::to_string(__builtin_ctz(m)) + " (" + where(w, r.wpc) + ")",
                               lane, true, a);
                }
            for (u32 m = r.rmask & ~me; m; m &= m - 1)
                if (seen[w.id * warps + __builtin_ctz(m)] <
                        readers_[(size_t)index * warps + __builtin_ctz(m)] &&
                    !benign && !both_atomic)
                    w.fail(FaultKind::SharedRace,
                           "write is not ordered after a read of warp " + std::to_string(__builtin_ctz(m)) +
                               " (" + where(w, r.rpc) + ")",
                           lane, true, a);
        }
    }
    bool join = unordered_writer && (benign || both_atomic);
    r.wmask = join ? r.wmask | me : me;
    r.wclk = now;
    r.wpc = pc;
    r.defined |= bits;
    r.pending = pending;
    r.generic = pending == kPendingBulk ? 0 : 1;
    if (!join) r.rmask = 0;
}

void SharedMemory::read(Warp& w, const Inst& i, int lane, u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32 index, u32 bits) { read_record(w, i, lane, a, r, index, bits); });
}
void SharedMemory::write(Warp& w, const Inst& i, int lane, u32 a, u32 n, const void* value, u8 pending) {
    bool same = value && !memcmp(data_.data() + a, value, n);
    each_record(a, n, [&](Word& r, u32 index, u32 bits) {
        write_record(w, i, lane, a, r, index, bits, same && (r.defined & bits) == bits, pending, false);
    });
}
void SharedMemory::atomic(Warp& w, const Inst& i, int lane, u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32 index, u32 bits) {
        if (w.cta->launch->options.init_shared && (r.defined & bits) != bits)
            w.fail(FaultKind::Uninitialized, "atomic on shared memory that was never written", lane, true, a);
        write_record(w, i, lane, a, r, index, bits, false, 0, true);
    });
}
void SharedMemory::async_read(Warp& w, const Inst& i, u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32 index, u32 bits) {
        read_record(w, i, 0, a, r, index, bits);
        if (r.generic)
            w.fail(FaultKind::SharedRace,
                   "asynchronous-proxy read of shared memory written by ordinary stores without "
                   "fence.proxy.async (" +
                       where(w, r.wpc) + ")",
                   -1, true, a);
        r.async_readers++;
    });
}
void SharedMemory::async_read_done(u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32, u32) { r.async_readers--; });
}
void SharedMemory::complete(Warp& w, u32 a, u32 n) {  // the copy becomes a write at the time of the wait
    each_record(a, n, [&](Word& r, u32, u32) {
        r.pending = 0;
        r.wclk = now;
        r.wmask = 1u << w.id;
    });
}
void SharedMemory::complete_bulk(u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32, u32) { r.pending = 0; });
}
void SharedMemory::proxy_fence(u32 warp) {
    // The fence covers everything the executing thread has done or observed: its own writes and those it is
    // ordered after.
    for (auto* v : {&words_, &byte_words_})
        for (Word& r : *v)
            if (r.generic) {
                bool ordered = true;
                for (u32 m = r.wmask & ~(1u << warp); m; m &= m - 1)
                    ordered &= vc ? seen[warp * warps + __builtin_ctz(m)] >= r.wclk : r.wclk < now;
                if (ordered) r.generic = 0;
            }
}

void SharedMemory::release_into(u32 warp, std::vector<u32>& clock) {
    clock.resize(warps, 0);
    for (u32 v = 0; v < warps; v++) clock[v] = std::max(clock[v], seen[warp * warps + v]);
    clock[warp] = now++;
}
void SharedMemory::acquire_from(u32 warp, const std::vector<u32>& clock) {
    for (u32 v = 0; v < clock.size(); v++)
        if (v != warp) seen[warp * warps + v] = std::max(seen[warp * warps + v], clock[v]);
}

}  // namespace ptx
