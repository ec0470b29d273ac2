// shared_memory.cpp - the bytes of a CTA's shared memory and a record for each word of them: who wrote and who read it
// last, whether anybody wrote it, what is on its way into it.
#include <algorithm>
#include "cluster.h"

namespace ptx {

void WarpClocks::reset(u32 of_warps) {
    now = 1;
    warps = of_warps;
    seen.assign((size_t)warps * warps, 0);
}
void WarpClocks::release_into(u32 warp, std::vector<u32>& clock) {
    clock.resize(warps, 0);
    for (u32 v = 0; v < warps; v++) clock[v] = std::max(clock[v], seen[warp * warps + v]);
    clock[warp] = now++;
}
void WarpClocks::acquire_from(u32 warp, const std::vector<u32>& clock) {
    for (u32 v = 0; v < clock.size(); v++)
        if (v != warp) seen[warp * warps + v] = std::max(seen[warp * warps + v], clock[v]);
}

void SharedMemory::reset(u32 bytes, WarpClocks& of_cluster, bool vector_clocks, bool poison) {
    bytes_ = bytes;
    clocks = &of_cluster;
    vc = vector_clocks;
    visits.assign(clocks->warps, 0);
    data_.assign(bytes + 16, poison ? 0xff : 0);
    words_.assign(bytes / 4 + 2, Word{});
    byte_words_.clear();
    if (vc) readers_.assign((size_t)(bytes / 4 + 2) * clocks->warps, 0);
}
void SharedMemory::check(Warp& w, int lane, u64 a, u32 n, u32 align) {
    if (a >> kRankShift && a >> 32 == 0)
        w.fail(FaultKind::Unsupported,
               "of shared memory by the rank of its CTA in the cluster (mapa), mbarrier.arrive and bulk copies are implemented",
               lane, true, a);
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

static std::string warp_name(Warp& w, u32 place) {
    const u32 each = w.cta->warps.size(), rank = place / each;
    return "warp " + std::to_string(place % each) +
           (rank == w.cta->rank ? "" : " of the cluster's CTA " + std::to_string(rank));
}
static std::string where(Warp& w, u32 pc) {
    const Inst& i = w.cta->kernel->code[pc];
    return "line " + std::to_string(i.line) + ": " + i.text;
}

inline void SharedMemory::read_record(Warp& w, int lane, u32 a, Word& r, u32 index, u32 bits) {
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
    u32 me = 1u << w.place;
    if (!vc) {
        if (r.wclk == clocks->now && (r.wmask & ~me) && !(r.wmask & me && !o.strict_same_value) && o.shared_races)
            w.fail(FaultKind::SharedRace,
                   "read conflicts with a write of " + warp_name(w, __builtin_ctz(r.wmask & ~me)) +
                       " in the same barrier interval (" + where(w, r.wpc) + ")",
                   lane, true, a);
        if (r.rclk != clocks->now) {
            r.rclk = clocks->now;
            r.rmask = 0;
        }
    } else {
        if (o.shared_races && !(r.wmask & me && !o.strict_same_value))
            for (u32 m = r.wmask & ~me; m; m &= m - 1)
                if (!clocks->knows(w.place, __builtin_ctz(m), r.wclk))
                    w.fail(FaultKind::SharedRace,
                           "read is not ordered after a write of " + warp_name(w, __builtin_ctz(m)) +
                               " (" + where(w, r.wpc) + ")",
                           lane, true, a);
        readers_[(size_t)index * clocks->warps + w.place] = clocks->now;
    }
    r.rmask |= me;
    r.rpc = w.pc();
}

// Is this write unordered with an earlier write of another warp that it may join (same value, or both atomic)?
inline bool SharedMemory::check_writers(Warp& w, int lane, u32 a, const Word& r, bool harmless) const {
    const u32 others = r.wmask & ~(1u << w.place);
    bool unordered = false;
    if (!vc) {
        unordered = r.wclk == clocks->now && others;
        if (unordered && !harmless)
            w.fail(FaultKind::SharedRace,
                   "write conflicts with a write of " + warp_name(w, __builtin_ctz(others)) +
                       " in the same barrier interval (" + where(w, r.wpc) + ")",
                   lane, true, a);
        return unordered;
    }
    for (u32 m = others; m; m &= m - 1)
        if (!clocks->knows(w.place, __builtin_ctz(m), r.wclk)) {
            unordered = true;
            if (!harmless)
                w.fail(FaultKind::SharedRace,
                       "write is not ordered after a write of " + warp_name(w, __builtin_ctz(m)) + " (" +
                           where(w, r.wpc) + ")",
                       lane, true, a);
        }
    return unordered;
}

inline void SharedMemory::check_readers(Warp& w, int lane, u32 a, const Word& r, u32 index) const {
    const u32 others = r.rmask & ~(1u << w.place);
    if (!vc) {
        if (r.rclk == clocks->now && others)
            w.fail(FaultKind::SharedRace,
                   "write conflicts with a read of " + warp_name(w, __builtin_ctz(others)) +
                       " in the same barrier interval (" + where(w, r.rpc) + ")",
                   lane, true, a);
        return;
    }
    for (u32 m = others; m; m &= m - 1)
        if (!clocks->knows(w.place, __builtin_ctz(m), readers_[(size_t)index * clocks->warps + __builtin_ctz(m)]))
            w.fail(FaultKind::SharedRace,
                   "write is not ordered after a read of " + warp_name(w, __builtin_ctz(m)) + " (" +
                       where(w, r.rpc) + ")",
                   lane, true, a);
}

inline void SharedMemory::write_record(Warp& w, int lane, u32 a, Word& r, u32 index, u32 bits, bool same, u8 pending,
                                       bool atomic) {
    const Options& o = w.cta->launch->options;
    if (__builtin_expect(r.pending, 0))
        w.fail(FaultKind::MissingWait,
               "shared memory is written while an asynchronous copy into it is in flight (" + where(w, r.wpc) + ")",
               lane, true, a);
    if (__builtin_expect(r.async_readers, 0))
        w.fail(FaultKind::MissingWait,
               "shared memory is written while an asynchronous matrix operation may still read it", lane, true, a);
    const bool both_atomic =
        atomic && r.wpc < w.cta->kernel->code.size() && w.cta->kernel->code[r.wpc].cls == Cls::Atomic;
    const bool harmless = (same && !o.strict_same_value) || both_atomic;
    const bool join = o.shared_races && check_writers(w, lane, a, r, harmless);
    if (o.shared_races && !harmless) check_readers(w, lane, a, r, index);
    const u32 me = 1u << w.place;
    r.wmask = join ? r.wmask | me : me;
    r.wclk = clocks->now;
    r.wpc = w.pc();
    r.defined |= bits;
    r.pending = pending;
    r.generic = pending == kPendingBulk ? 0 : 1;
    if (!join) r.rmask = 0;
}

void SharedMemory::read(Warp& w, int lane, u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32 index, u32 bits) { read_record(w, lane, a, r, index, bits); });
}
void SharedMemory::write(Warp& w, int lane, u32 a, u32 n, const void* value, u8 pending) {
    bool same = value && !memcmp(data_.data() + a, value, n);
    each_record(a, n, [&](Word& r, u32 index, u32 bits) {
        write_record(w, lane, a, r, index, bits, same && (r.defined & bits) == bits, pending, false);
    });
}
void SharedMemory::atomic(Warp& w, int lane, u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32 index, u32 bits) {
        if (w.cta->launch->options.init_shared && (r.defined & bits) != bits)
            w.fail(FaultKind::Uninitialized, "atomic on shared memory that was never written", lane, true, a);
        write_record(w, lane, a, r, index, bits, false, 0, true);
    });
}
void SharedMemory::async_read(Warp& w, u32 a, u32 n) {
    each_record(a, n, [&](Word& r, u32 index, u32 bits) {
        read_record(w, 0, a, r, index, bits);
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
        r.wclk = clocks->now;
        r.wmask = 1u << w.place;
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
                    ordered &= vc ? clocks->knows(warp, __builtin_ctz(m), r.wclk) : r.wclk < clocks->now;
                if (ordered) r.generic = 0;
            }
}

}  // namespace ptx
