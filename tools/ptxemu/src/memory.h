// memory.h - the memories of the machine, with their checkers.
//
// Global memory: blocks at real host addresses (so that pointers inside structs work), each surrounded by
// unmapped guard space. Shared memory: bytes plus one shadow record per 32-bit word that drives the race,
// initialisation and cp.async checks.
#pragma once
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <vector>
#include "isa.h"

namespace ptx {

// Generic address windows (PTX ISA "Generic Addressing"); outside the canonical host range, so they never
// collide.
constexpr u64 kSharedWindow = 1ull << 56, kLocalWindow = 2ull << 56, kParamWindow = 3ull << 56,
              kWindowMask = 0xffull << 56;

struct FreeMemory {
    void operator()(void* p) const { free(p); }
};  // calloc: pages appear when they are used

struct Block {
    u64 base = 0, size = 0;
    bool read_only = false;
    std::unique_ptr<u8[]>
        defined;  // initcheck: one byte per byte, only when part of the block is uninitialised
    // Inter-CTA races: per granule {low: last writer, high: last reader}, see global_races.cpp.
    std::unique_ptr<std::atomic<u64>[], FreeMemory> shadow;
    std::unique_ptr<std::atomic<u8>[], FreeMemory>
        touched;  // one flag per 32-byte sector: the compulsory DRAM traffic
};

class MemoryMap {
  public:
    ~MemoryMap();
    u64 allocate(u64 size, u64 low_bits);  // guarded block; its address is congruent to low_bits modulo 4096
    void free(u64 base);
    void add(u64 base, u64 size);  // memory owned by the caller, without guard space
    void set_uninitialized(u64 base, u64 size);
    void set_defined(u64 base, u64 size);
    void set_read_only(u64 base, bool on);
    Block* find(u64 address, u64 size);
    void prepare_launch(u32 granule, bool traffic);  // granule 0: no race detection
    u64 touched_bytes() const;

  private:
    std::map<u64, Block> blocks_;
    std::map<u64, std::pair<void*, u64>> mappings_;
};

enum : u32 { kPendingNone = 0, kPendingCpAsync = 1, kPendingBulk = 2 };

struct Word {                 // shadow of 4 bytes (or of one byte, when a word is accessed in parts)
    u32 wclk = 0;             // time of the last write
    u32 wmask = 0;            // warps that wrote this value at that time
    u32 rclk = 0, rmask = 0;  // readers since
    u32 wpc = 0, rpc = 0;
    u8 defined = 0;         // 4 bits, one per byte
    u8 pending = 0;         // bytes on their way from cp.async / cp.async.bulk
    u8 split = 0;           // per-byte records are in use
    u16 async_readers = 0;  // asynchronous matrix operations that have not been waited for
    u8 generic = 0;  // written through the generic proxy since the last fence.proxy.async (async-proxy check)
};

struct Cta;

// Happens-before between the warps of a cluster, each by its place there: seen[w][v] is the time up to which w knows
// everything v did.
struct WarpClocks {
    u32 now = 1, warps = 0;
    std::vector<u32> seen;
    void reset(u32 of_warps);
    bool knows(u32 warp, u32 other, u32 time) const { return seen[warp * warps + other] >= time; }
    void release_into(u32 warp, std::vector<u32>& clock);        // arrive
    void acquire_from(u32 warp, const std::vector<u32>& clock);  // wait
};

class SharedMemory {
  public:
    void reset(u32 bytes, WarpClocks& of_cluster, bool vector_clocks, bool poison);
    u32 size() const { return (u32)bytes_; }
    u8* data() { return data_.data(); }
    // Checks of one access by 'lane' of 'w'. 'value' (writes only) allows same-value writes to be benign.
    void read(Warp& w, int lane, u32 addr, u32 n);
    void write(Warp& w, int lane, u32 addr, u32 n, const void* value, u8 pending = 0);
    void atomic(Warp& w, int lane, u32 addr, u32 n);
    void async_read(Warp& w, u32 addr, u32 n);  // by the tensor core or the copy engine
    void async_read_done(u32 addr, u32 n);
    void complete(Warp& w, u32 addr, u32 n);  // a cp.async of this warp has landed
    void complete_bulk(u32 addr, u32 n);
    void proxy_fence(u32 warp);
    void check(Warp& w, int lane, u64 addr, u32 n, u32 align);

    WarpClocks* clocks = nullptr;
    bool vc = false;  // false: barriers of the whole CTA alone, whose intervals clocks->now counts
    std::vector<u32> visits;  // by warp of another CTA of the cluster: the time of its last access

  private:
    std::vector<u8> data_;
    size_t bytes_ = 0;
    std::vector<Word> words_, byte_words_;
    std::vector<u32> readers_;  // vc: last read time per (word, warp)
    void read_record(Warp& w, int lane, u32 addr, Word& r, u32 index, u32 bits);
    bool check_writers(Warp& w, int lane, u32 addr, const Word& r, bool harmless) const;
    void check_readers(Warp& w, int lane, u32 addr, const Word& r, u32 index) const;
    void write_record(Warp& w, int lane, u32 addr, Word& r, u32 index, u32 bits, bool same, u8 pending, bool atomic);
    template <class F>
    void each_record(u32 addr, u32 n, F f);
};

}  // namespace ptx
