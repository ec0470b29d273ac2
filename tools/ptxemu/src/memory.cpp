// memory.cpp - global memory: guarded blocks, and which of them an access falls into.
#include "memory.h"
#include <sys/mman.h>
#include <algorithm>
#include <cstdlib>
#include "machine.h"

namespace ptx {

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

Block* global_block(Warp& w, int lane, u64 a, u32 n, u32 align) {
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

}  // namespace ptx
