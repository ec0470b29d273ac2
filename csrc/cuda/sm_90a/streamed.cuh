// The tiles of tiles.cuh where x does not fit shared memory: x is streamed too, 128 rows of y and NX of x a step of 64 columns, both
// consumers on the same x. To keep x in the L2 cache a launch has few CTAs along x and many splits.
#pragma once

#include "tiles.cuh"

namespace fastcl::cuda::hopper {

template <int NX>
inline constexpr int step_bytes = 2 * box_bytes + NX * 128;

template <class T, int NX, class Work>
__global__ void __launch_bounds__(384, 1)
streamed(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap w_map,
         const __grid_constant__ Task p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t bars = shared_address(shared), ring = bars + p.header;
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; s++) barrier_init(bars + full_at + 8 * s, 1), barrier_init(bars + empty_at + 8 * s, 8);
    barriers_visible();
  }
  __syncthreads();
  int slot = 0, phase = 0, round = 0;

  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x != 0) return;
    prefetch(&x_map), prefetch(&y_map);
    for (int b; (b = dealt(p, round)) < p.blocks; round++)
      for (int j = first_tile<NX>(p, b); j < end_tile(p); j += 2)
        for (int c = 0; c < p.chunks; c++) {
          const uint32_t at = ring + slot * step_bytes<NX>, full = bars + full_at + 8 * slot;
          wait(bars + empty_at + 8 * slot, phase ^ 1);
          expect(full, step_bytes<NX>);
          load_box(at, &y_map, c * 64, j * 64, full);  // 128 rows
          load_box(at + 2 * box_bytes, &x_map, c * 64, b * NX, full);
          if (++slot == p.stages) slot = 0, phase ^= 1;
        }
    return;
  }
  more_registers<240>();
  Work work(p);
  const int me = threadIdx.x / 128 - 1;
  const bool leads = threadIdx.x % 32 == 0;
  float acc[NX / 2];
  for (int b; (b = dealt(p, round)) < p.blocks; round++) {
    work.begin(p, b * NX, round == 0);
    for (int j = first_tile<NX>(p, b); j < end_tile(p); j += 2) {
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
          if (leads) arrive(bars + empty_at + 8 * before);
        }
        before = slot;
        if (++slot == p.stages) slot = 0, phase ^= 1;
      }
      products_wait<0>();
      settle(acc);
      if (leads) arrive(bars + empty_at + 8 * before);
      work.tile(p, acc, b * NX, (j + me) * 64, round == 0, has_columns<NX>(p, b, j + me), ring + p.stages * step_bytes<NX> + me * Work::boxes * box_bytes, &w_map);
    }
    if (Work::has_sums(p)) {
      meet(3, 256);  // nobody reads the scratch of before
      work.finish(p, b * NX, reinterpret_cast<float*>(shared + (p.header + p.stages * step_bytes<NX> + staging_bytes<Work>)));
      meet(3, 256);
    }
  }
  work.end(p);
}

}  // namespace fastcl::cuda::hopper
