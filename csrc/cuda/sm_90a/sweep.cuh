// Weights to the strip AND W Y of the block of x in registers, from one S (d to 256). What remains of a gradient is W^T X.
//
// The consumers take the tiles of S in turn, as in tiles.cuh. A tile of weights lies in shared memory once, 64 rows of y by 128 of x,
// from where the copy engine stores it and both consumers multiply it: each owns half of d, and (W Y)^T of 64 columns of d and 128 rows
// of x += Y^T W for each of its chunks. Y^T is the chunk that S has read, as MN-major A, and W is MN-major B: nothing is transposed.
#pragma once

#include "start.cuh"
#include "weights.cuh"

namespace fastcl::cuda::hopper {

// CHUNKS of 64 columns of d for each consumer; a ring of four tiles of y.
template <int CHUNKS>
struct SweepLayout {
  static constexpr int rows = 128, chunks = 2 * CHUNKS, stages = 4, tile = chunks * box_bytes, x = chunks * rows * 128, weights = rows * 128;
  static constexpr int kept = x + stages * tile + 2 * weights;
  static constexpr uint32_t w_full_at = full_at + 64, w_empty_at = empty_at + 64;  // beside the ring's
};

template <class T, int CHUNKS>
__global__ void __launch_bounds__(384, 1)
sweep(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap w_map,
      const __grid_constant__ Task p) {
  using L = SweepLayout<CHUNKS>;
  constexpr int NX = L::rows;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t bars = shared_address(shared), xs = bars + p.header, ring = xs + L::x, staging = ring + L::stages * L::tile;
  if (threadIdx.x == 0) {
    for (int s = 0; s < L::stages; s++) barrier_init(bars + full_at + 8 * s, 1), barrier_init(bars + empty_at + 8 * s, 12);  // four warps after S, eight after W Y
    for (int h = 0; h < 2; h++) barrier_init(bars + L::w_full_at + 8 * h, 1), barrier_init(bars + L::w_empty_at + 8 * h, 8);
    barrier_init(bars + x_full_at, 1), barrier_init(bars + x_empty_at, 8);
    barriers_visible();
  }
  __syncthreads();
  int round = 0;

  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x != 0) return;
    prefetch(&x_map), prefetch(&y_map);
    int slot = 0, phase = 0;
    for (int b; (b = dealt(p, round)) < p.blocks; round++) {
      wait(bars + x_empty_at, (round & 1) ^ 1);
      expect(bars + x_full_at, L::x);
      for (int c = 0; c < L::chunks; c++) load_box(xs + c * NX * 128, &x_map, c * 64, b * NX, bars + x_full_at);
      for (int j = 0; j < p.tiles; j++) {
        wait(bars + empty_at + 8 * slot, phase ^ 1);
        expect(bars + full_at + 8 * slot, L::tile);
        for (int c = 0; c < L::chunks; c++) load_box(ring + slot * L::tile + c * box_bytes, &y_map, c * 64, j * 64, bars + full_at + 8 * slot);
        if (++slot == L::stages) slot = 0, phase ^= 1;
      }
    }
    return;
  }
  more_registers<240>();
  Weights<T, NX, Softmax, false, 2> work(p);
  const int me = threadIdx.x / 128 - 1, turns = (p.tiles + 1) & ~1;
  const bool leads = threadIdx.x % 32 == 0;
  float acc[NX / 2], grad[CHUNKS][NX / 2];
  int tile = 0, staged = 0, pairs = 0;  // of this CTA: tiles of y begun with, weights staged by me, pairs of tiles
  for (int b; (b = dealt(p, round)) < p.blocks; round++, tile += p.tiles) {
    const int x0 = b * NX;
    const bool last = dealt(p, round + 1) >= p.blocks;
    work.begin(p, x0, round == 0);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int k = 0; k < NX / 2; k++) grad[c][k] = 0.f;
    wait(bars + x_full_at, round & 1);
    for (int j = 0; j < turns; j += 2, pairs++) {
      const int mine = j + me;
      if (round + mine > 0) meet(1 + me, 256);
      if (mine < p.tiles) {
        const int s = (tile + mine) & 3;
        wait(bars + full_at + 8 * s, (tile + mine) >> 2 & 1);
        products_fence();
#pragma unroll
        for (int c = 0; c < L::chunks; c++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            multiply<T, NX, 0, 0>(acc, k_major(ring + s * L::tile + c * box_bytes) + 2 * k, k_major(xs + c * NX * 128) + 2 * k, c | k);
        products_commit();
        if (mine + 1 < turns || !last) pass(2 - me, 256);
        products_wait<0>();
        settle(acc);
        if (leads) arrive(bars + empty_at + 8 * s);
        wait(bars + L::w_empty_at + 8 * me, (staged++ & 1) ^ 1);  // both consumers have multiplied the last ones
        work.tile(p, acc, x0, mine * 64, false, false, staging + me * L::weights, &w_map);
        if (threadIdx.x % 128 == 0) arrive(bars + L::w_full_at + 8 * me);
      } else if (!last) {
        pass(2 - me, 256);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (j + h >= p.tiles) continue;
        const int s = (tile + j + h) & 3;
        wait(bars + full_at + 8 * s, (tile + j + h) >> 2 & 1);
        // Weights staged in slot h so far: one a pair, but for the last pair of a block with an odd count.
        wait(bars + L::w_full_at + 8 * h, (h ? pairs - (p.tiles & 1 ? round : 0) : pairs) & 1);
        products_fence();
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            multiply<T, NX, 1, 1>(grad[c], mn_major(ring + s * L::tile + (me * CHUNKS + c) * box_bytes, box_bytes) + 128 * k,
                                  mn_major(staging + h * L::weights, box_bytes) + 128 * k, 1);
        products_commit();
      }
      products_wait<0>();
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) settle(grad[c]);
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (j + h < p.tiles && leads) arrive(bars + empty_at + 8 * ((tile + j + h) & 3)), arrive(bars + L::w_empty_at + 8 * h);
    }
    __syncwarp();
    if (leads) arrive(bars + x_empty_at);
    // This CTA alone adds to the block, and launches follow one another. Eight lanes have a whole sector of one row.
    const Place at;
    float* const wy = static_cast<float*>(p.wy);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int k = 0; k < NX / 2; k++) {
        const int i = x0 + k / 4 * 8 + 2 * at.t + k % 2, column = (me * CHUNKS + c) * 64 + at.warp * 16 + at.g + k % 4 / 2 * 8;
        if (i < p.n && column < p.wy_columns) wy[int64_t(i) * p.wy_columns + column] += grad[c][k];
      }
  }
  work.end(p);
}

template <class T>
int start_sweep(const HopperTiles& p, void* stream) {
  if (p.sides.d > 256 || p.splits != 1 || p.weights == nullptr || p.wy == nullptr || hopper_general(p.equation, p.row_parts != nullptr)) return cudaErrorInvalidValue;
  if (p.sides.d > 128) return start(sweep<T, 2>, p, 128, 1, SweepLayout<2>::kept, 0, true, stream, 128, 64);
  return start(sweep<T, 1>, p, 128, 1, SweepLayout<1>::kept, 0, true, stream, 128, 64);
}

}  // namespace fastcl::cuda::hopper
