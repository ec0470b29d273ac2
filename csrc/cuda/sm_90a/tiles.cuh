// The mainloop: NX rows of x stay in shared memory as wgmma's B, y streams through a ring as A, 64 rows a tile.
//
//     warpgroup 0      one thread asks the copy engine for boxes of x and y
//     warpgroups 1, 2  take the tiles in turn: while one multiplies, the other is at its epilogue (a baton of two named barriers)
//
// Work says what becomes of a tile: Rows (rows.cuh) or Weights (weights.cuh).
//
// Two CTAs along x may be a cluster: each brings half of a chunk of y to both. They go through the same tiles in step, and one whose
// block does not want a tile, or that has no block left, passes it over; a chunk's place is free when both have multiplied it.
#pragma once

#include "pairs.cuh"

namespace fastcl::cuda::hopper {

// Boxes of 64 x 64 weights on their way to the strip, for each consumer.
template <class Work>
inline constexpr int staging_bytes = 2 * Work::boxes * box_bytes;

// The t-th block of x that a CTA takes; none from p.blocks on. In the triangle the first blocks have the most tiles: they are dealt
// there and back.
__device__ __forceinline__ int dealt(const Task& p, int t) {
  const int ctas = gridDim.x, cta = blockIdx.x;
  return t * ctas + (p.triangle && t % 2 ? ctas - 1 - cta : cta);
}
// The first of the blocks that the CTAs of a cluster take at once; they lie side by side.
__device__ __forceinline__ int dealt_first(const Task& p, int t, int peers) { return dealt(p, t) / peers * peers; }
// The tiles of y for it: those of the CTA's split, and in the triangle from the block's own rows on.
template <int NX>
__device__ __forceinline__ int first_tile(const Task& p, int block) {
  const int first = blockIdx.y * p.each;
  return p.triangle ? max(first, block * (NX / 64)) : first;
}
__device__ __forceinline__ int end_tile(const Task& p) { return min(p.tiles, static_cast<int>(blockIdx.y + 1) * p.each); }
// Tiles of the block itself hold their pairs in both orders: their columns are its rows.
template <int NX>
__device__ __forceinline__ bool has_columns(const Task& p, int block, int tile) {
  return !p.triangle || tile >= (block + 1) * (NX / 64);
}

template <class T, int NX, class Work>
__global__ void __launch_bounds__(384, 1)
tiles(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap w_map,
      const __grid_constant__ Task p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t bars = shared_address(shared), xs = bars + p.header, ring = xs + p.chunks * NX * 128;
  const int peers = cluster_size();
  if (threadIdx.x == 0) {
    // A stage is released by one arrival a warp: each warp waits for its own products.
    for (int s = 0; s < p.stages; s++) barrier_init(bars + full_at + 8 * s, 1), barrier_init(bars + empty_at + 8 * s, 4 * peers);
    barrier_init(bars + x_full_at, 1), barrier_init(bars + x_empty_at, 8);
    barriers_visible();
  }
  meet_cluster();
  int slot = 0, phase = 0, round = 0;

  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x != 0) return;
    prefetch(&x_map), prefetch(&y_map);
    const int rank = cluster_rank(), rows = 64 / peers;  // of a chunk that this CTA brings
    for (int pair; (pair = dealt_first(p, round, peers)) < p.blocks; round++) {
      if (const int b = dealt(p, round); b < p.blocks) {
        wait(bars + x_empty_at, (round & 1) ^ 1);
        expect(bars + x_full_at, p.chunks * NX * 128);
        for (int c = 0; c < p.chunks; c++) load_box(xs + c * NX * 128, &x_map, c * 64, b * NX, bars + x_full_at);
      }
      for (int j = first_tile<NX>(p, pair); j < end_tile(p); j++)
        for (int c = 0; c < p.chunks; c++) {
          wait(bars + empty_at + 8 * slot, phase ^ 1);
          expect(bars + full_at + 8 * slot, box_bytes);
          load_box_for(peers, ring + slot * box_bytes + rank * rows * 128, &y_map, c * 64, j * 64 + rank * rows, bars + full_at + 8 * slot);
          if (++slot == p.stages) slot = 0, phase ^= 1;
        }
    }
    return;
  }
  more_registers<240>();
  Work work(p);
  const int me = threadIdx.x / 128 - 1;
  const bool leads = threadIdx.x % 32 == 0;
  float acc[NX / 2];
  for (int pair; (pair = dealt_first(p, round, peers)) < p.blocks; round++) {
    const int b = dealt(p, round);
    const bool more = dealt_first(p, round + 1, peers) < p.blocks;
    if (b < p.blocks) {
      work.begin(p, b * NX, round == 0);
      wait(bars + x_full_at, round & 1);
    }
    // Every block has an even number of turns, two at least, so that the baton alternates; some are empty.
    const int first = first_tile<NX>(p, pair), end = end_tile(p), turns = max(2, (end - first + 1) & ~1);
    for (int j = 0; j < turns; j++) {
      const int tile = first + j;
      if ((j & 1) != me) {  // the other's chunks are passed over
        if (tile < end)
          for (slot += p.chunks; slot >= p.stages; slot -= p.stages) phase ^= 1;
        continue;
      }
      if (round + j > 0) meet(1 + me, 256);
      if (tile < end && (b >= p.blocks || tile < first_tile<NX>(p, b))) {  // the other CTA's alone
        for (int c = 0; c < p.chunks; c++) {
          wait(bars + full_at + 8 * slot, phase);
          __syncwarp();
          release(bars + empty_at + 8 * slot, peers);
          if (++slot == p.stages) slot = 0, phase ^= 1;
        }
        if (j + 1 < turns || more) pass(2 - me, 256);
      } else if (tile < end) {
        int before = 0;
        for (int c = 0; c < p.chunks; c++) {
          wait(bars + full_at + 8 * slot, phase);
          products_fence();
          const uint64_t a = k_major(ring + slot * box_bytes), x = k_major(xs + c * NX * 128);
#pragma unroll
          for (int k = 0; k < 4; k++) multiply<T, NX, 0, 0>(acc, a + 2 * k, x + 2 * k, c | k);
          products_commit();
          if (c) {
            products_wait<1>();
            release(bars + empty_at + 8 * before, peers);
          }
          before = slot;
          if (++slot == p.stages) slot = 0, phase ^= 1;
        }
        if (j + 1 < turns || more) pass(2 - me, 256);
        products_wait<0>();
        settle(acc);
        release(bars + empty_at + 8 * before, peers);
        work.tile(p, acc, b * NX, tile * 64, round == 0, has_columns<NX>(p, b, tile), ring + p.stages * box_bytes + me * Work::boxes * box_bytes, &w_map);
      } else if (j + 1 < turns || more) {
        pass(2 - me, 256);
      }
    }
    if (b >= p.blocks) continue;
    if (Work::has_sums(p)) {
      meet(3, 256);  // where x was, once both have multiplied it
      work.finish(p, b * NX, reinterpret_cast<float*>(shared + p.header));
      stores_before_engine();
    }
    __syncwarp();
    if (leads) arrive(bars + x_empty_at);
  }
  work.end(p);
  meet_cluster();
}

}  // namespace fastcl::cuda::hopper
