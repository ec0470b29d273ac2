// memory_access.h - what ld, st, atom and cvta share: the addresses of a warp's lanes, the space each one lies in,
// and the modifiers that all of them take.
#pragma once
#include "decode.h"
#include "machine.h"

namespace ptx {

// Addresses of the active lanes. Generic addresses are resolved per lane; a warp may mix spaces (rare).
struct Addresses {
    u64 a[32];
    Space space[32];
    bool uniform;
    Space first;
};

inline void gather(Warp& w, const Inst& i, u32 m, u64* out) {
    s64 off = i.offset;
    if (i.flag2) {
        u32* b = w.r32(i.base);
        for_lanes(m, [=](int l) { out[l] = (u64)b[l] + off; });
        if (i.space == Space::Shared || i.space == Space::Local)
            for_lanes(m, [=](int l) { out[l] &= 0xffffffff; });
    } else {
        u64* b = w.r64(i.base);
        for_lanes(m, [=](int l) { out[l] = b[l] + off; });
    }
    if (i.space == Space::Shared)
        for_lanes(m, [=](int l) {
            if ((out[l] & kWindowMask) == kSharedWindow) out[l] &= ~kWindowMask;
        });
}
inline Space classify(u64& a) {
    switch (a & kWindowMask) {
        case kSharedWindow: a &= ~kWindowMask; return Space::Shared;
        case kLocalWindow: a &= ~kWindowMask; return Space::Local;
        case kParamWindow: a &= ~kWindowMask; return Space::Param;
        default: return Space::Global;
    }
}
inline void resolve(Warp& w, const Inst& i, u32 m, Addresses& A) {
    gather(w, i, m, A.a);
    if (i.space != Space::Generic) {
        A.uniform = true;
        A.first = i.space;
        return;
    }
    A.uniform = true;
    A.first = Space::Generic;
    for_lanes(m, [&](int l) {
        A.space[l] = classify(A.a[l]);
        if (A.first == Space::Generic) A.first = A.space[l];
        else if (A.first != A.space[l]) A.uniform = false;
    });
}

// Count a request; lanes of one space only.
void count(Warp& w, Space s, u32 m, const u64* a, u32 n);

inline u64 load_bytes(const u8* p, u32 n) {
    u64 v = 0;
    switch (n) {
        case 1: return *p;
        case 2: {
            u16 x;
            memcpy(&x, p, 2);
            return x;
        }
        case 4: {
            u32 x;
            memcpy(&x, p, 4);
            return x;
        }
        default: memcpy(&v, p, 8); return v;
    }
}

void take_cache_hints(Decoder& d);
int take_order(Decoder& d);
bool memory_type(Type t);
// The cost class of an access, and the granule of the kernel's race records.
void mark_access(Decoder& d, Space s, u32 bytes);
inline void nothing(Warp&, const Inst&, u32) {}

}  // namespace ptx
