// traffic.cpp - what the requests of memory cost: sectors of global memory, wavefronts of shared memory.
#include <algorithm>
#include "machine.h"

namespace ptx {

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
        Block* b = global_block(w, __builtin_ctz(m), a, n, 1);
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

}  // namespace ptx
