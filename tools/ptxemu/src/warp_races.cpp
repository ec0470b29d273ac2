// warp_races.cpp - unordered conflicting accesses of global memory by two warps of one CTA.
//
// Only barriers order the warps of a CTA here: a kernel whose warps hand over through atomics or fences is not
// for this check, which a launch has to ask for (Options::warp_races).
#include "machine.h"

namespace ptx {

static bool ordered(const Warp& w, u32 other, u32 time) {
    const SharedMemory& s = w.cta->shared;
    return s.vc ? s.clocks->knows(w.place, other, time) : time < s.clocks->now;
}

static void race(Warp& w, int lane, u64 address, const char* what, u32 other, u32 pc) {
    const Inst& i = w.cta->kernel->code[pc];
    w.fail(FaultKind::GlobalRace,
           std::string(what) + " warp " + std::to_string(other + w.id - w.place) +
               " of this CTA, and no barrier orders them (line " + std::to_string(i.line) + ": " + i.text + ")",
           lane, true, address);
}

void warp_race_check(Warp& w, int lane, u64 address, u32 n, bool write, bool atomic, bool same_value) {
    const bool benign = same_value && !w.cta->launch->options.strict_same_value;
    const u32 now = w.cta->shared.clocks->now, me = 1u << w.place;
    for (u64 word = address / 4; word <= (address + n - 1) / 4; word++) {
        WarpRecord& r = w.cta->global_words[word];
        const bool hidden = benign || (atomic && r.atomic);
        if (!hidden)
            for (u32 m = r.writers & ~me; m; m &= m - 1)
                if (u32 v = __builtin_ctz(m); !ordered(w, v, r.written))
                    race(w, lane, address, write ? "write after a write of" : "read after a write of", v, r.write_pc);
        if (!write) {
            r.readers |= me;
            if (r.read.size() <= w.place) r.read.resize(w.place + 1, 0);
            r.read[w.place] = now;
            r.read_pc = w.pc();
            continue;
        }
        if (!benign)
            for (u32 m = r.readers & ~me; m; m &= m - 1)
                if (u32 v = __builtin_ctz(m); !ordered(w, v, r.read[v]))
                    race(w, lane, address, "write after a read of", v, r.read_pc);
        // Writes of one value, or atomics, at one time have all their warps as writers.
        r.writers = hidden && r.written == now ? r.writers | me : me;
        if (!benign) r.readers = 0;
        r.written = now;
        r.atomic = atomic;
        r.write_pc = w.pc();
    }
}

}  // namespace ptx
