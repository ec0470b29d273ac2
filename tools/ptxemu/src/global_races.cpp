// global_races.cpp - the checks of an access of global memory: written before it is read, not read-only, ordered with
// the accesses of other CTAs.
#include <algorithm>
#include "machine.h"

namespace ptx {

// The record of a granule (4 bytes, or the smallest global access of the kernel) is 64 bits:
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
    if (!w.cta->kernel->gpu_fences && !w.cta->kernel->clusters) return false;
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
void global_read(Warp& w, int lane, u64 a, u32 n, u32 align, bool strong) {
    Block* b = global_block(w, lane, a, n, align);
    if (b->defined && w.cta->launch->options.init_global)
        for (u32 k = 0; k < n; k++)
            if (!b->defined[a - b->base + k])
                w.fail(FaultKind::Uninitialized, "global memory is read before anything was written to it",
                       lane, true, a + k);
    race_check(w, lane, b, a, n, strong ? kStrongRead : kRead, nullptr);
}
void global_write(Warp& w, int lane, u64 a, u32 n, u32 align, const void* value, bool strong) {
    Block* b = global_block(w, lane, a, n, align);
    if (b->read_only) w.fail(FaultKind::ReadOnly, "write to memory registered as read-only", lane, true, a);
    if (b->defined) memset(&b->defined[a - b->base], 1, n);
    race_check(w, lane, b, a, n, strong ? kAtomic : kWrite, value);
}
void global_atomic(Warp& w, int lane, u64 a, u32 n, u32 align) {
    Block* b = global_block(w, lane, a, n, align);
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

}  // namespace ptx
