// The tiles of tiles.cuh where x does not fit shared memory: x is streamed too, 128 rows of y and NX of x a step of 64 columns, both
// consumers on the same x. To keep x in the L2 cache a launch has few CTAs along x and many splits.
//
// Two splits are a cluster: each brings half of x to both, and takes every other 128 rows of the y of both. So they go in step, and
// a step's place in the ring is free when the consumers of both have multiplied it.
#pragma once

#include "tiles.cuh"

namespace fastcl::cuda::hopper {

template <int NX>
inline constexpr int step_bytes = 2 * box_bytes + NX * 128;
inline constexpr int x_parts = 2;  // of a step's x, in boxes of their own

// Tiles of y of a cluster's splits, in the block's triangle; its CTAs take two at a time in turn, the cluster's first two from a
// multiple on, so that a column belongs to one CTA whatever the block.
template <int NX>
struct Steps {
  int first, end, begin, stride;

  __device__ __forceinline__ Steps(const Task& p, int block, int peers) {
    const int split = blockIdx.y / peers * peers;
    stride = 2 * peers;
    first = split * p.each, end = min(p.tiles, first + peers * p.each);
    if (p.triangle) first = max(first, block * (NX / 64));
    begin = first / stride * stride;
  }
  __device__ __forceinline__ bool has(int tile) const { return tile >= first && tile < end; }
};

template <class T, int NX, class Work>
__global__ void __launch_bounds__(384, 1)
streamed(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap w_map,
         const __grid_constant__ Task p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t bars = shared_address(shared), ring = bars + p.header;
  const int peers = cluster_size();
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; s++) barrier_init(bars + full_at + 8 * s, 1), barrier_init(bars + empty_at + 8 * s, 8 * peers);
    barriers_visible();
  }
  meet_cluster();
  int slot = 0, phase = 0, round = 0;

  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x != 0) return;
    prefetch(&x_map), prefetch(&y_map);
    const int rank = cluster_rank();
    for (int b; (b = dealt(p, round)) < p.blocks; round++) {
      const Steps<NX> steps(p, b, peers);
      for (int j = steps.begin; j < steps.end; j += steps.stride)
        for (int c = 0; c < p.chunks; c++) {
          const uint32_t at = ring + slot * step_bytes<NX>, full = bars + full_at + 8 * slot;
          const int tile = j + 2 * rank;
          wait(bars + empty_at + 8 * slot, phase ^ 1);
          expect(full, steps.has(tile) ? step_bytes<NX> : NX * 128);
          if (steps.has(tile)) load_box(at, &y_map, c * 64, tile * 64, full);  // 128 rows
          for (int part = rank; part < x_parts; part += peers)
            load_box_for(peers, at + 2 * box_bytes + part * (NX / x_parts * 128), &x_map, c * 64, b * NX + part * (NX / x_parts), full);
          if (++slot == p.stages) slot = 0, phase ^= 1;
        }
    }
    return;
  }
  more_registers<240>();
  Work work(p);
  const int me = threadIdx.x / 128 - 1;
  float acc[NX / 2];
  for (int b; (b = dealt(p, round)) < p.blocks; round++) {
    work.begin(p, b * NX, round == 0);
    const Steps<NX> steps(p, b, peers);
    for (int j = steps.begin; j < steps.end; j += steps.stride) {
      const int tile = j + 2 * cluster_rank();
      if (!steps.has(tile)) {  // the other CTA's turn alone
        for (int c = 0; c < p.chunks; c++) {
          wait(bars + full_at + 8 * slot, phase);
          __syncwarp();
          release(bars + empty_at + 8 * slot, peers);
          if (++slot == p.stages) slot = 0, phase ^= 1;
        }
        continue;
      }
      int before = 0;
      for (int c = 0; c < p.chunks; c++) {
        const uint32_t at = ring + slot * step_bytes<NX>;
        wait(bars + full_at + 8 * slot, phase);
        products_fence();
        const uint64_t a = k_major(at + me * box_bytes), x = k_major(at + 2 * box_bytes);
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
      products_wait<0>();
      settle(acc);
      release(bars + empty_at + 8 * before, peers);
      work.tile(p, acc, b * NX, (tile + me) * 64, round == 0, has_columns<NX>(p, b, tile + me), ring + p.stages * step_bytes<NX> + me * Work::boxes * box_bytes, &w_map);
    }
    if (Work::has_sums(p)) {
      meet(3, 256);  // nobody reads the scratch of before
      work.finish(p, b * NX, reinterpret_cast<float*>(shared + (p.header + p.stages * step_bytes<NX> + staging_bytes<Work>)));
      meet(3, 256);
    }
  }
  work.end(p);
  meet_cluster();
}

}  // namespace fastcl::cuda::hopper
