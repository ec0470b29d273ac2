// memory_access.cpp - the modifiers that all accesses of memory take, and the counting of their requests.
#include "memory_access.h"

namespace ptx {

void count(Warp& w, Space s, u32 m, const u64* a, u32 n) {
    if (s == Space::Global) count_global(w, m, a, n);
    else if (s == Space::Shared) {
        u32 x[32];
        for_lanes(m, [&](int l) { x[l] = (u32)a[l]; });
        count_shared(w, m, x, n);
    }
}

void take_cache_hints(Decoder& d) {  // performance hints only
    for (auto& r : d.rest()) {
        static const char* hints[] = {
            "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_last", "L1::evict_first", "L1::evict_normal",
            "L1::evict_unchanged", "L1::no_allocate", "L2::evict_last", "L2::evict_first", "L2::evict_normal",
            "L2::64B", "L2::128B", "L2::256B", "L2::cache_hint"};
        for (auto h : hints)
            if (r == h) d.take(r);
    }
}
// Memory-ordering modifiers: returns bit 0 acquire, bit 1 release, bit 2 strong (PTX ISA "Memory Consistency
// Model").
int take_order(Decoder& d) {
    bool sem = d.take("relaxed"), acq = d.take("acquire"), rel = d.take("release"), both = d.take("acq_rel"),
         vol = d.take("volatile");
    d.take("weak");
    d.take("mmio");
    for (auto wide : {"gpu", "sys", "cluster"}) d.take(wide);
    bool cta = d.take("cta");
    if ((acq || rel || both) && !cta) d.b.kernel.gpu_fences = true;
    return (acq || both ? 1 : 0) | (rel || both ? 2 : 0) | (sem || acq || rel || both || vol ? 4 : 0);
}
bool memory_type(Type t) { return t != Type::None && t != Type::Pred && t != Type::B128 && t <= Type::F64; }

void mark_access(Decoder& d, Space s, u32 bytes) {
    d.inst.cls = s == Space::Shared                       ? Cls::Shared
                 : s == Space::Local                      ? Cls::Local
                 : s == Space::Param || s == Space::Const ? Cls::Other
                                                          : Cls::Global;
    if ((s == Space::Global || s == Space::Generic) && bytes < d.b.kernel.granule) d.b.kernel.granule = bytes;
}

}  // namespace ptx
